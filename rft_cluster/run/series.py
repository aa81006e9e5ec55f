"""The series of a run's own figures: of its steps, its phases and its evaluations.

A field of `StepStats` is a series of the same name and meaning. So a panel shows what `metrics.jsonl` has.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.common.series import Figures, Series
from rft_cluster.run.metrics import OTHER, StepStats
from rft_cluster.run.reference import step_fields
from rft_cluster.run.tracker import Tracker

# Fields that count something: their series add up all steps.
COUNTED = {
    *("reward_failures", "failures", "updates", "skipped", "groups", "skipped_groups"),
    *("tokens", "tokens_trained", "replayed"),
}
# Fields whose series have another name: a mapping's has one for each entry.
NAMES = {"reward_parts": "reward_part", "failures": "reward_part_failures", "replayed": "replayed_steps"}
LABELS = {"reward_parts": "reward", "failures": "reward"}
UNITS = {"replayed": "steps"}


def _step_series() -> dict[str, Series]:
    return {
        field.name: Series(
            f"rft_{NAMES.get(field.name, field.name)}",
            "counter" if field.name in COUNTED else "gauge",
            UNITS.get(field.name, unit),
            meaning,
            LABELS.get(field.name, ""),
        )
        for field, (_, unit, meaning) in zip(fields(StepStats), step_fields(), strict=True)
        if field.name != "seconds"  # PHASE_SECONDS
    }


STEP = _step_series()
"""By the field of `StepStats`."""

PHASE = Series("rft_phase", "gauge", "1 or 0", "1 for the phase that the run is in, 0 for the others.", "phase")
PHASE_SECONDS = Series(
    "rft_phase_seconds",
    "counter",
    "s",
    "Time in each phase: the stages of a step as in `seconds/NAME`, `evaluate`, and `other` (checkpoints, exports). It "
    "grows while the phase goes on.",
    "phase",
)
EVALUATION = {
    "accuracy_strict": Series("rft_evaluation_accuracy", "gauge", "share of images", "Strict accuracy.", "split"),
    "accuracy_lenient": Series(
        "rft_evaluation_accuracy_lenient", "gauge", "share of images", "Accuracy by the published rule.", "split"
    ),
    "format_rate": Series("rft_evaluation_format", "gauge", "share of images", "Answers in the format.", "split"),
}
"""By the field of `Evaluation`."""

OF_A_RUN = (*STEP.values(), PHASE, PHASE_SECONDS, *EVALUATION.values())


class RunFigures(Figures, Tracker):
    """The current value of each of these series, as a run tells them."""

    def __init__(self) -> None:
        super().__init__()
        self._phase, self._since = OTHER, time.monotonic()

    def phase(self, name: str) -> None:
        self.pass_time()
        self.set(PHASE, 0, self._phase)
        self.set(PHASE, 1, name)
        self._phase = name

    def pass_time(self) -> None:
        """Add the time since the last call to the present phase's."""
        with self._lock:
            now = time.monotonic()
            passed, self._since, key = now - self._since, now, (PHASE_SECONDS, self._phase)
            self._values[key] = self._values.get(key, 0.0) + passed

    def step(self, stats: StepStats) -> None:
        for field, series in STEP.items():
            value = getattr(stats, field)
            for label, one in value.items() if isinstance(value, Mapping) else [("", value)]:
                if one is None:
                    continue  # the step has no such figure
                if series.kind == "gauge":
                    self.set(series, one, label)
                elif not stats.replayed or field == "replayed":  # what is replayed was not sampled, nor did it fail
                    self.add(series, one, label)

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        for field, series in EVALUATION.items():
            self.set(series, getattr(evaluation, field), evaluation.split)
