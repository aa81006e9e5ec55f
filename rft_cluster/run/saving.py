"""Save the policy of a run: checkpoints for resuming, and the last and the best policy as exported models."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rft_cluster.classification.baselines import ASKED, MADE_WITH
from rft_cluster.classification.card import CARD_FILE, Card, read_card
from rft_cluster.classification.probabilities import FEWEST
from rft_cluster.classification.report import Evaluation
from rft_cluster.common import stopping
from rft_cluster.common.errors import ClusterError, described
from rft_cluster.common.files import ROOM, DiskFull, bytes_in, check_space, json_object, sync
from rft_cluster.config import Config
from rft_cluster.run.checkpoints import (
    NewCheckpoint,
    State,
    Writing,
    checkpoint_folder,
    is_due,
    newest_step,
    prune_checkpoints,
    seconds_since_saved,
)
from rft_cluster.run.inside import made_with
from rft_cluster.run.journal import FOLDER, prune_journal
from rft_cluster.run.records import ROWS
from rft_cluster.run.space import journal_bytes

MODEL, BEST = "model", "model-best"
BASELINES_FILE = "baselines.json"
CALIBRATION_FILE = "calibration.json"
NEVER = "never"  # key of a record of why there is no temperature, if no resumed run can change that


class Learners(Protocol):
    """The methods of `cluster.cluster.Cluster` that are used here."""

    def news_of_leaving(self) -> str: ...

    def take_snapshot(self, step: int) -> None: ...

    def checkpoint_bytes(self) -> int: ...

    def write_checkpoint(self, folder: Path, step: int) -> Writing: ...

    def export(self, folder: Path, files: Mapping[str, Any]) -> None: ...


class Keeper:
    """Saves the policy when it is due, and when the run is stopped between two steps.

    A checkpoint is written while the run goes on, one at a time, and completed at the end of a later step. The run
    waits for it only where no later step would: at the last one, when it stops, before a model is exported.
    """

    def __init__(self, config: Config, card: Card, learners: Learners, step: int, tiny_model: str | None) -> None:
        """`step`: the step of the learners' weights, on disk or from memory. `tiny_model`: see `State`."""
        self._config, self._card, self._learners = config, card, learners
        self._tiny_model = tiny_model
        self._step = step
        self._saved = min(step, newest_step(config.run_folder) or 0)
        self._between_steps = True  # the learners have the weights of step `_step`
        self._new: NewCheckpoint | None = None  # that is being written
        # The last one. Its age counts, or a run with many losses would never come to the next.
        self._begun_at = time.monotonic() - seconds_since_saved(config.run_folder)
        self._cost = 0.0  # seconds that writing the last one took
        self._bytes = 0  # of each checkpoint; 0 before the first
        self._validation: dict[int, float] = {}
        self._leaving = False  # a node is, and no step has been saved since the notice
        self._after = ", and the run goes on"  # after a warning

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context for the update, transfer and record of a step. A signal is delayed to its end, if that comes soon."""
        self._between_steps = False
        with stopping.whole():
            yield
            self._step, self._between_steps = step, True

    def save_if_due(self, at_once: bool = False) -> None:
        """Save a checkpoint if the schedule says so, or if `at_once`; take a snapshot in memory if that is due.

        Where a node is about to leave, a checkpoint is saved at once, and waited for; see `look_out`.

        Raises:
            DiskFull, OSError, ClusterError: nothing is saved, and the run cannot go on after this step.
        """
        every = self._config.cluster.snapshot_every
        if every and self._step % every == 0:
            self._learners.take_snapshot(self._step)
        last = at_once or self._step == self._config.schedule.steps
        self._hear()
        now = last or self._leaving
        due = now or is_due(self._config.schedule, self._step, time.monotonic() - self._begun_at, self._cost)
        self._save(due, now, last)

    def look_out(self) -> None:
        """Hear of nodes that are about to leave. Between two steps, save the last one at once, and wait for that.

        The loop calls this while it waits: a cloud gives 30 s to 2 minutes, and completions may take longer.

        Raises:
            OSError, ClusterError: as `save_if_due`.
        """
        self._hear()
        if self._leaving and self._between_steps:
            self._save(due=True, now=True, last=False)

    def _save(self, due: bool, now: bool, last: bool) -> None:
        """Complete the checkpoint that is being written, if it is on the disk or another one is `due`. Begin that. With
        `now` wait for it."""
        with stopping.whole():
            if due or (self._new and self._new.done):
                self._finish()
            if due:
                self._begin(last)
            if now:
                self._finish(last)
                self._leaving = False

    def _hear(self) -> None:
        """Tell of nodes that are about to leave, and what will be saved."""
        if leaving := self._learners.news_of_leaving():
            self._leaving = True
            if not self._between_steps:
                then = f"saving step {self._step + 1} when it is done"
            elif self._step > self._saved:
                then = f"saving step {self._step} at once"
            else:
                then = f"step {self._step} is saved" if self._step else "no step is done yet"
            print(f"{leaving}: {then}", flush=True)

    @contextmanager
    def _going_on(self, missed: str, last: bool, *errors: type[Exception]) -> Iterator[None]:
        """Go on after one of `errors`, with a warning: older files are untouched, and a later time may do better.

        `last`: the run ends after this step, so there is no later time.
        """
        try:
            yield
        except errors as error:
            if last:
                raise
            self._begun_at = time.monotonic()  # not at every step
            print(f"WARNING: {missed}{self._after}: {described(error)}", flush=True)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save when a signal arrives in this context between two steps, if the learners can do so within seconds.

        After any error, complete the checkpoint that is being written.
        """
        try:
            yield
        except BaseException:
            self._after = ""  # another error ends the run, or what this object is for
            stopped, new = stopping.received() is not None, self._new
            self._finish(seconds=stopping.WHOLE if stopped else None)
            if stopped and self._between_steps and self._step > self._saved:
                if self._cost > stopping.WHOLE:
                    print(self._too_slow(), flush=True)
                elif new is None or self._saved == new.step:
                    self._begin(last=True)
                    self._finish(last=True, seconds=stopping.WHOLE)
            raise

    def _too_slow(self) -> str:
        """Why a signal finds no time to save this step."""
        return (
            f"step {self._step} is not saved: a checkpoint took {self._cost:.0f} s, and there are "
            f"{stopping.WHOLE:.0f} s for it, a third of cluster.grace_seconds"
        )

    def _begin(self, last: bool) -> None:
        """Begin to write a checkpoint of this step, unless there is one."""
        if self._step == self._saved:
            return
        run = self._config.run_folder
        state = State(step=self._step, prompt_sha256=self._card.prompt_sha256, tiny_model=self._tiny_model)
        with self._going_on(f"step {self._step} is not saved", last, DiskFull, OSError):
            self._check_space()
            self._new, self._begun_at = NewCheckpoint(run, state, self._learners.write_checkpoint), time.monotonic()

    def _check_space(self) -> None:
        """Raise DiskFull without room for a checkpoint and for the journal, which is written meanwhile and must be."""
        run = self._config.run_folder
        self._bytes = self._bytes or self._learners.checkpoint_bytes()
        journal = max(0, journal_bytes(self._config) - bytes_in(run / FOLDER))
        what = f"the files of {checkpoint_folder(run, self._step).name}, and the journal,"
        check_space(run, self._bytes + journal, what, ROOM)

    def _finish(self, last: bool = False, seconds: float | None = None) -> None:
        """Complete the checkpoint that is being written, if any. `seconds`: to wait for it at most."""
        new, self._new = self._new, None
        if new is None:
            return
        run = self._config.run_folder
        with self._going_on(f"step {new.step} is not saved", last, DiskFull, OSError, ClusterError):
            for name in ROWS:  # a checkpoint must not outlive the rows of its steps, when a machine loses its power
                if (run / name).is_file():
                    sync(run / name)
            self._cost = new.finish(seconds)
            self._saved = new.step
            self._prune()

    def _prune(self, ended: bool = False) -> None:
        """Remove older checkpoints, and the steps of the journal before the oldest that is left.

        While there is one checkpoint alone, a run that has not `ended` keeps all steps: that one may be lost in its
        upload.
        """
        run, keep = self._config.run_folder, self._config.schedule.keep_checkpoints
        oldest = prune_checkpoints(run, self._saved, keep)
        if ended or keep == 1 or oldest < self._saved:
            prune_journal(run, oldest)

    def keep_if_best(self, evaluation: Evaluation) -> None:
        """Export the policy if no earlier one was better on the validation images."""
        self._validation[evaluation.step] = evaluation.accuracy_strict
        best = exported(self._config.run_folder / BEST)
        if best is None or best.validation is None or evaluation.accuracy_strict > best.validation:
            last = self._step == self._config.schedule.steps
            with self._going_on(f"the best policy so far, of step {self._step}, is not exported", last, DiskFull):
                self._export(BEST)

    def keep_last(self) -> None:
        """Export the last policy. Its step is saved before, if a loss has kept it from that."""
        self._begin(last=True)
        self._finish(last=True)
        self._export(MODEL)
        if self._saved:
            self._prune(ended=True)

    def _export(self, name: str) -> None:
        own = {"steps": self._step, "validation": self._validation.get(self._step)}
        card = self._card.model_copy(update=own)
        with stopping.whole():
            self._finish()  # not two large writes at once
            self._learners.export(self._config.run_folder / name, {CARD_FILE: card.record()})


def is_trained(config: Config) -> bool:
    """Return True if the run's last step has been exported."""
    last = exported(config.run_folder / MODEL)
    return last is not None and last.steps == config.schedule.steps


def is_calibrated(config: Config) -> bool:
    """Return True if a temperature was fitted after the run's last step, or never can be."""
    file = config.run_folder / CALIBRATION_FILE
    record = (json_object(file.read_bytes()) or {}) if file.is_file() else {}
    done = "models" in record or record.get(NEVER) is True
    return config.data.validation < FEWEST or (done and record.get("steps") == config.schedule.steps)


def is_complete(config: Config) -> bool:
    """Return True if the run's last step has been exported, calibrated, and compared with all baselines that are asked
    for."""
    asked, record = {name for one in config.baselines for name in ASKED[one]}, read_baselines(config.run_folder)
    is_compared = (config.run_folder / BASELINES_FILE).is_file() and asked <= record.keys()
    if MADE_WITH in record:  # else an earlier version's, which is left as it is
        is_compared = is_compared and not measured_otherwise(config, record) & {*config.baselines}
    return is_trained(config) and is_calibrated(config) and (not config.data.test or is_compared)


def measured_otherwise(config: Config, record: Mapping[str, Any]) -> set[str]:
    """The baselines, by the name in the configuration, whose settings are others now than in the record."""
    then = recorded_settings(record)
    return {name for name, now in made_with(config).items() if then.get(name) != now}


def recorded_settings(record: Mapping[str, Any]) -> dict[str, str]:
    """What is recorded of `made_with`; what is damaged is left out."""
    then = record.get(MADE_WITH)
    return {name: str(how) for name, how in then.items() if name in ASKED} if isinstance(then, dict) else {}


def read_baselines(run: Path) -> dict[str, Any]:
    """What `baselines.json` has (see `classification.baselines.Baselines.record`); empty without it, or if it is
    damaged."""
    file = run / BASELINES_FILE
    return (json_object(file.read_bytes()) or {}) if file.is_file() else {}


def exported(folder: Path) -> Card | None:
    return read_card(folder) if (folder / CARD_FILE).is_file() else None


def describe_models(run: Path) -> str:
    """The exported models of a run with their accuracies, a line each."""
    lines = []
    for name, what in ((MODEL, "the last"), (BEST, "the best on the validation images")):
        card = exported(run / name)
        if card:
            figure = "" if card.validation is None else f", validation accuracy {100 * card.validation:.1f} %"
            lines.append(f"  {run / name}  {what}: step {card.steps}{figure}")
    return "\n".join(lines)
