"""What a run tells to whoever shows it elsewhere: TensorBoard and W&B (see `rft_cluster.tracking`)."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.run.metrics import StepStats


class Tracker(Protocol):
    """Gets the records of a run, in the order in which the run's folder does."""

    def begin(self, first_step: int) -> None:
        """The steps after `first_step` follow. Those of them that were recorded before are done again."""

    def step(self, stats: StepStats) -> None: ...

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """`rows`: the groups of a step, as in `rollouts/`."""

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        """`judged`: the answer to each image."""

    def close(self) -> None:
        """There are no more records."""
