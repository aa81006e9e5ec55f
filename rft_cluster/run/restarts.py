"""Whether a run goes on by itself after the loss of an actor, or of an answer."""

import time
from collections import Counter

from rft_cluster.common import stopping
from rft_cluster.common.errors import ClusterError
from rft_cluster.config import Config
from rft_cluster.run.records import read_rows

LONGEST_PAUSE = 60.0  # seconds


class Restarts:
    """Counts losses without a new step between them. What is lost again and again is lost for a reason."""

    def __init__(self, config: Config) -> None:
        self._most, self._metrics = config.cluster.restarts, config.run_folder / "metrics.jsonl"
        self._furthest, self._used = 0, 0
        self.lost: Counter[str] = Counter()
        """How often each actor was lost, and the run went on."""

    def again(self, error: Exception, doing: str) -> bool:
        """After `error`: say `doing`, what is done about it, and wait a while; False when the number is used up.

        After a signal, too: the losses are its consequences.
        """
        steps = [row["step"] for row in read_rows(self._metrics)]
        if steps and steps[-1] > self._furthest:
            self._furthest, self._used = steps[-1], 0
        if self._used >= self._most or stopping.received():
            return False
        self._used += 1
        self.lost.update(error.lost if isinstance(error, ClusterError) else ())
        print(f"WARNING: {error}\n{doing} ({self._used} of {self._most} times without a new step)", flush=True)
        if self._used > 1:
            time.sleep(min(LONGEST_PAUSE, 2.0**self._used))
        return True
