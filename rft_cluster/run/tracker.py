"""What a run tells to whoever shows it elsewhere: TensorBoard and W&B (see `rft_cluster.tracking`), Ray's metrics
(`cluster/metrics.py`), the report (`reporting.py`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.run.metrics import StepStats


class Tracker:
    """Gets the records of a run, in the order in which the run's folder does. A class of its own has the methods that
    it needs; the others do nothing.

    The loop waits for each, so they are quick; and none may end a run, so none raises.
    """

    def begin(self, first_step: int) -> None:
        """The steps after `first_step` follow. Those of them that were recorded before are done again."""

    def phase(self, name: str) -> None:
        """A phase of the run begins: a stage of a step, "evaluate", or "other" between them."""

    def step(self, stats: StepStats) -> None:
        """A step is done."""

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """`rows`: the groups of a step, as in `rollouts/`."""

    def evaluation(self, evaluation: Evaluation, judged: Sequence[Judged]) -> None:
        """`judged`: the answer to each image."""

    def close(self) -> None:
        """There are no more records."""
