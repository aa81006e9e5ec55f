"""The run folder.

runs/NAME/  config.yaml      the resolved configuration
            config-to-000040.yaml    the one of the steps up to 40, if the run went on from there with another
            manifest.json    which images were chosen, with their SHA-256 (see data/manifest.py)
            warm_start/, warm_start.json, baselines/sft/    runs inside this one (see run/inside.py)
            manifest-also.json    the same of `evaluation.also`
            options.json     what each image's prompts list, with `prompt.options: own_top_k` (see options.py)
            metrics.jsonl    an object a step (see docs/metrics.md)
            eval.jsonl       an object an evaluation
            baselines.json   accuracies without a language model on the same images, and which of them are right
            calibration.json temperatures of the exported models (see probabilities.py)
            evaluations/     step-000080-test.jsonl: an object an image: label, answer, judgement (see answers.py)
            parts.jsonl      machine and versions, an object for each part of the run (see parts.py)
            thumbnails.zip   a small copy of each image (see thumbnails.py)
            report.html      the run for a browser (see report/)
            rollouts/        step-000012.jsonl: an object a group (see rollouts.py)
            checkpoints/     see checkpoints.py
            journal/         see journal.py
            tensorboard/     for TensorBoard (see tracking/tensorboard.py)
            wandb/           what W&B keeps here, if it was asked for
            model/           the trained policy as a Hugging Face folder
            model-best/      the policy with the best validation accuracy
            log.txt          the console output (see log.py)
            redone-DATE/     records of steps that a resumed run did again, after its checkpoint
            activity.json    while a process writes to the folder (see activity.py)
            .lock            while a process writes to the folder (see lock.py)
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from rft_cluster.classification.also import rate_line
from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.report import Evaluation, judge
from rft_cluster.common.files import FORMAT, write_bytes, write_json, write_text
from rft_cluster.common.text import shown
from rft_cluster.config import Config, config_text
from rft_cluster.data.manifest import manifest
from rft_cluster.messages import Group, LearnerStats, Reward
from rft_cluster.run.activity import Activity
from rft_cluster.run.answers import ALSO, evaluated_step, read_answers, write_answers
from rft_cluster.run.checkpoints import clear_unfinished
from rft_cluster.run.debug import chosen, debug_lines
from rft_cluster.run.journal import Journal, step_files
from rft_cluster.run.metrics import StepStats, Stopwatch, console, metrics_file, own_sinks
from rft_cluster.run.parts import add_part
from rft_cluster.run.records import append, json_lines, read_rows, split_rows, steps_in
from rft_cluster.run.rollouts import rollout_rows
from rft_cluster.run.task import Task
from rft_cluster.run.tracker import Tracker

CONFIG_END = "# end\n"
ALSO_MANIFEST = "manifest-also.json"
FIGURES = [field.name for field in fields(Evaluation)]


def write_record(run: Path, config: Config) -> None:
    """Write `config.yaml`, which `load_config` reads back unchanged."""
    write_text(run / "config.yaml", _record(config))


def _record(config: Config) -> str:
    return f"format: {FORMAT}\n{config_text(config)}{CONFIG_END}"


class RunFolder:
    """Writes a run's records. Opening it moves aside the records of steps that a resumed run will do again.

    `first_step`: number of steps already done. `tiny_model`: see `checkpoints.State`. `trackers` get every record,
    too.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        first_step: int = 0,
        tiny_model: str | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.path, self.first_step, self.tiny_model = config.run_folder, first_step, tiny_model
        self._config, self.activity = config, Activity(config.run_folder)
        self._sinks = [metrics_file(self.path / "metrics.jsonl"), console(config.schedule.steps)]
        self._own_sinks, self._trackers = own_sinks(config), trackers
        self._reader, self._also = _reader(task), task.also
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        clear_unfinished(self.path)
        self._move_aside(first_step)
        self._told = {step for file in self.path.glob("redone-*/metrics.jsonl") for step in steps_in(file)}
        self.journal = Journal(config, first_step)
        self._keep_former(config)
        write_record(self.path, config)
        add_part(self.path, first_step, task.question)
        for name, its in (("manifest.json", task), (ALSO_MANIFEST, task.also)):
            if its and not (self.path / name).exists():
                write_json(self.path / name, {"format": FORMAT, **manifest(its.dataset, config.run.seed)})
        for tracker in trackers:
            tracker.begin(first_step)

    def _keep_former(self, config: Config) -> None:
        """Keep the configuration of the steps that are done if another follows: it says what was due in them."""
        now, former = self.path / "config.yaml", self.path / f"config-to-{self.first_step:06d}.yaml"
        if self.first_step and now.is_file() and not former.exists() and now.read_bytes() != _record(config).encode():
            write_bytes(former, now.read_bytes())

    def _move_aside(self, first_step: int) -> None:
        aside = _free(self.path / f"redone-{time.strftime('%Y%m%d-%H%M%S')}")
        again = split_rows(self.path / "metrics.jsonl", aside / "metrics.jsonl", first_step)
        again += split_rows(self.path / "eval.jsonl", aside / "eval.jsonl", first_step)
        rollouts = {file: step for step, file in step_files(self.path / "rollouts").items()}
        answers = {file: evaluated_step(file) for file in (self.path / "evaluations").glob("step-*-*.jsonl")}
        for file, step in (rollouts | answers).items():
            if step > first_step:
                (aside / file.parent.name).mkdir(parents=True, exist_ok=True)
                file.rename(aside / file.parent.name / file.name)
                again.append(step)
        if again:
            print(f"steps {first_step + 1} to {max(again)} are done again; their records are in {aside}", flush=True)

    def stopwatch(self, step: int) -> Stopwatch:
        """For the stages of a step, which are told to whoever watches."""

        def begin(stage: str) -> None:
            self.activity.begin(step, stage)
            for tracker in self._trackers:
                tracker.phase(stage)

        return Stopwatch(begin)

    def log_rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        rewards: Sequence[Sequence[Reward]],
        advantages: Sequence[Sequence[float | None]],
        learned: LearnerStats | None,
    ) -> None:
        """Record a step's completions in `rollouts/`, and show some if asked to. `learned`: None without an update."""
        rows = rollout_rows(groups, rewards, advantages, learned)
        write_text(self.path / "rollouts" / f"step-{step:06d}.jsonl", json_lines(rows))
        data, debug = self._config.data, self._config.debug
        printed = chosen(rows, debug.shown, self._config.run.seed, step)
        for line in debug_lines(step, printed, data.images or data.path):
            print(line, flush=True)
        for tracker in self._trackers:
            tracker.rollouts(step, rows)

    def log_step(self, stats: StepStats) -> None:
        """Record a step's figures by every sink. The user's own get a replayed step once: its figures are the same."""
        replayed = stats.step - 1 in self.journal.replayed
        if replayed:
            stats = replace(stats, replayed=True, tokens_per_second=None)
        for sink in [*self._sinks, *([] if replayed and stats.step in self._told else self._own_sinks)]:
            sink(stats)
        for tracker in self._trackers:
            tracker.step(stats)

    def evaluation(self, step: int, split: str) -> Evaluation | None:
        """The recorded evaluation of this step, if the run was stopped after it; else None."""
        for row in read_rows(self.path / "eval.jsonl"):
            if (row["step"], row.get("split")) == (step, split) and row.keys() == set(FIGURES):
                return Evaluation(**{**row, "interval": tuple(row["interval"])})
        return None

    def log_evaluation(self, evaluation: Evaluation, groups: Sequence[Group]) -> None:
        """Record an evaluation, and the answer to each of its images: the first completion of each of `groups`."""
        judged = [judge(group, self._reader) for group in groups]
        write_answers(self.path, evaluation.step, evaluation.split, judged)
        append(self.path / "eval.jsonl", asdict(evaluation))
        for tracker in self._trackers:
            tracker.evaluation(evaluation, judged)
        low, high = evaluation.interval
        print(
            f"{evaluation.split} accuracy {100 * evaluation.accuracy_strict:.1f} % (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}, {evaluation.n} images; leniently {100 * evaluation.accuracy_lenient:.1f} %), "
            f"format {100 * evaluation.format_rate:.1f} %, after {evaluation.step} steps",
            flush=True,
        )

    def has_also(self, step: int) -> bool:
        """Whether the answers to the images of `evaluation.also` after this step are recorded."""
        return bool(read_answers(self.path, step, ALSO))

    def log_also(self, step: int, groups: Sequence[Group]) -> None:
        """Record and print the answers to the images of `evaluation.also`."""
        assert self._also is not None
        reader = _reader(self._also)
        judged = [judge(group, reader) for group in groups]
        write_answers(self.path, step, ALSO, judged)
        print(f"{rate_line(f'also {shown(self._also.dataset.name)}', judged)}, after {step} steps", flush=True)


def _reader(task: Task) -> AnswerReader:
    return AnswerReader(task.dataset.classes, task.dataset.aliases)


def _free(path: Path) -> Path:
    """The path, or one with a number behind it: a run may go on twice within a second."""
    others = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(one for one in chain([path], others) if not one.exists())


def read_evaluations(run: Path, split: str) -> list[dict[str, Any]]:
    """The recorded evaluations of a split, in order; empty without a file."""
    return [row for row in read_rows(run / "eval.jsonl") if row.get("split") == split]
