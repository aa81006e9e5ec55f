"""Save the policy of a run: checkpoints for resuming, and the last and the best policy as exported models."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rft_cluster.classification.card import CARD_FILE, Card, read_card
from rft_cluster.classification.report import Evaluation
from rft_cluster.common import stopping
from rft_cluster.common.files import FORMAT, ROOM, DiskFull, bytes_in, check_space
from rft_cluster.config import Config
from rft_cluster.run.checkpoints import State, checkpoint_folder, is_due, prune_checkpoints
from rft_cluster.run.journal import prune_journal

MODEL, BEST = "model", "model-best"
BASELINES_FILE = "baselines.json"


class Learners(Protocol):
    """The methods of `cluster.cluster.Cluster` that are used here."""

    def take_snapshot(self, step: int) -> None: ...

    def save_checkpoint(self, folder: Path, state: Mapping[str, Any]) -> None: ...

    def export(self, folder: Path, files: Mapping[str, Any]) -> None: ...


class Keeper:
    """Saves the policy when it is due, and when the run is stopped between two steps."""

    def __init__(self, config: Config, card: Card, learners: Learners, step: int, tiny_model: str | None) -> None:
        """`step`: the step of the learners' weights, which is on disk already. `tiny_model`: see `State`."""
        self._config, self._card, self._learners = config, card, learners
        self._tiny_model = tiny_model
        self._step = self._saved = step
        self._between_steps = True  # the learners have the weights of step `_step`
        self._saved_at, self._cost = time.monotonic(), 0.0
        self._bytes = 0  # of the last checkpoint, and so of the next
        self._validation: dict[int, float] = {}

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Context for the update, transfer and record of a step. A signal is delayed to its end, if that comes soon."""
        self._between_steps = False
        with stopping.whole():
            yield
            self._step, self._between_steps = step, True

    def save_if_due(self, at_once: bool = False) -> None:
        """Save a checkpoint if the schedule says so, or if `at_once`; take a snapshot in memory if that is due.

        Raises:
            DiskFull: the run cannot go on after this step.
        """
        every = self._config.cluster.snapshot_every
        if every and self._step % every == 0:
            self._learners.take_snapshot(self._step)
        if not (at_once or is_due(self._config.schedule, self._step, time.monotonic() - self._saved_at, self._cost)):
            return
        with self._going_on(f"step {self._step} is not saved", ends=at_once):
            self._save()

    @contextmanager
    def _going_on(self, missed: str, ends: bool = False) -> Iterator[None]:
        """Go on although the disk is full, with a warning: older files are untouched, and there may be room later.

        `ends`: the run ends after this step, as it does after the last one, so there is no later.
        """
        try:
            yield
        except DiskFull as error:
            if ends or self._step == self._config.schedule.steps:
                raise
            self._saved_at = time.monotonic()  # not at every step
            print(f"WARNING: {missed}, and the run goes on: {error}", flush=True)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save when a signal arrives in this context between two steps, if the learners can do so within seconds."""
        try:
            yield
        except BaseException:
            quick = self._cost <= stopping.WHOLE
            if stopping.received() and self._between_steps and self._step > self._saved and quick:
                self._save()
            raise

    def _save(self) -> None:
        if self._step == self._saved:
            return
        start = time.monotonic()
        state = State(step=self._step, prompt_sha256=self._card.prompt_sha256, tiny_model=self._tiny_model)
        run = self._config.run_folder
        folder = checkpoint_folder(run, self._step)
        with stopping.whole():
            check_space(run, self._bytes, f"the files of {folder.name}", ROOM)
            self._learners.save_checkpoint(folder, state.model_dump())
            self._bytes = bytes_in(folder)
            prune_journal(run, prune_checkpoints(run, self._step, self._config.schedule.keep_checkpoints))
            self._saved, self._saved_at = self._step, time.monotonic()
        self._cost = self._saved_at - start

    def keep_if_best(self, evaluation: Evaluation) -> None:
        """Export the policy if no earlier one was better on the validation images."""
        self._validation[evaluation.step] = evaluation.accuracy_strict
        best = exported(self._config.run_folder / BEST)
        if best is None or best.validation is None or evaluation.accuracy_strict > best.validation:
            with self._going_on(f"the best policy so far, of step {self._step}, is not exported"):
                self._export(BEST)

    def keep_last(self) -> None:
        self._export(MODEL)

    def _export(self, name: str) -> None:
        own = {"steps": self._step, "validation": self._validation.get(self._step)}
        card = self._card.model_copy(update=own)
        with stopping.whole():
            self._learners.export(self._config.run_folder / name, {CARD_FILE: {"format": FORMAT, **card.model_dump()}})


def is_complete(config: Config) -> bool:
    """Return True if the run's last step has been exported and compared with the baselines."""
    last = exported(config.run_folder / MODEL)
    compared = not config.data.test or (config.run_folder / BASELINES_FILE).is_file()
    return last is not None and last.steps == config.schedule.steps and compared


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
