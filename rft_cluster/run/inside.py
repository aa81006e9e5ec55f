"""The configurations of runs that another run has in its folder: SFT on the same images.

    RUN/warm_start/          `schedule.warm_start`
    RUN/baselines/sft/       `baselines: [sft]`

Each is the folder of a whole run, which `evaluate`, `predict` and `doctor` read as any other.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rft_cluster.config import Config, Section

WARM_START = "warm_start"
WARM_START_FILE = "warm_start.json"


class WarmStart(BaseModel):
    """The record of a warm start, in `warm_start.json`: so many `steps` of SFT, and whether GRPO started from it."""

    model_config = ConfigDict(allow_inf_nan=False)
    steps: int
    kept: bool
    validation: tuple[float, float]
    """Accuracy on the validation images before and after, 0 to 1."""
    images: int
    """Number of validation images."""

    def described(self) -> str:
        """A line for people."""
        was, now = (f"{100 * rate:.1f} %" for rate in self.validation)
        said = "GRPO starts from it" if self.kept else "it is not kept, and GRPO starts from the untouched model"
        return (
            f"warm start: {self.steps} steps of SFT, validation accuracy {was} before and {now} after "
            f"({self.images} images): {said}"
        )


def runs_inside(config: Config) -> list[Config]:
    """All runs that a run has in its folder."""
    warm = [warm_start_run(config)] if config.schedule.warm_start else []
    return [*warm, *([sft_baseline(config)] if "sft" in config.baselines else [])]


def warm_start_run(config: Config) -> Config:
    """The run of `schedule.warm_start`, which evaluates on validation images when it ends."""
    assert config.schedule.warm_start is not None
    steps = config.schedule.warm_start.steps
    return _sft(config, config.run_folder, WARM_START, steps, evaluate_every=steps)


def sft_baseline(config: Config) -> Config:
    """SFT from the same model for as many steps on as many images each, without evaluations on validation images."""
    return _sft(config, config.run_folder / "baselines", "sft", config.schedule.steps, evaluate_every=0)


def made_with(config: Config) -> dict[str, str]:
    """The settings of baselines that may change when a run is resumed, by the name in the configuration: one that was
    measured with others is measured anew."""
    own = sft_baseline(config)
    found = {"sft": f"{own.schedule.steps} steps, learning rate {own.optimizer.learning_rate:g}"}
    return found | ({"encoder": str(config.evaluation.encoder)} if config.evaluation.encoder else {})


def usual_sft_rate(config: Config) -> float | None:
    """The learning rate that SFT usually has beside this run's; None if the run's own is usual, or another is set.

    At GRPO's rate a full-size model hardly changes: weights are served in BF16, half a step of which is 6e-5 for a
    weight of 0.02. The small model has one rate for both.
    """
    if config.optimizer.sft_learning_rate is not None or config.model.path == "tiny" or not config.algorithm.samples:
        return None
    return float(f"{10 * config.optimizer.learning_rate:.6g}")


def read_warm_start(run: Path) -> WarmStart | None:
    """What became of a run's warm start; None without one, or if the record is damaged."""
    file = run / WARM_START_FILE
    try:
        return WarmStart.model_validate_json(file.read_bytes(), strict=True) if file.is_file() else None
    except ValidationError:
        return None


def keeps_warm_start(run: Path) -> bool:
    """Whether a run's GRPO started from a warm-started policy."""
    warm = read_warm_start(run)
    return warm is not None and warm.kept


def untouched(run: Path) -> Path:
    """The folder of the run whose answers at step 0 are those of the untouched model: a warm start has its own."""
    return run / WARM_START if keeps_warm_start(run) else run


def _sft(config: Config, folder: Path, name: str, steps: int, evaluate_every: int) -> Config:
    rate, warmup = config.optimizer.sft_learning_rate or config.optimizer.learning_rate, config.optimizer.warmup_steps
    return _changed(
        config,
        run=_changed(config.run, folder=folder, name=name, sinks=[]),
        algorithm=_changed(config.algorithm, objective="sft", kl_beta=0.0),
        optimizer=_changed(config.optimizer, learning_rate=rate, warmup_steps=min(warmup, steps - 1)),
        schedule=_changed(
            config.schedule, steps=steps, max_staleness=0, min_live=0.0, evaluate_every=evaluate_every, warm_start=None
        ),
        prompt=_changed(config.prompt, options="all"),
        baselines=[],
        tracking=[],
    )


def _changed(section: Section, **values: Any) -> Any:
    return section.model_copy(update=values)
