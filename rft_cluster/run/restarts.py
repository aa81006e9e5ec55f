"""Whether a run goes on by itself after the loss of an actor, or of an answer."""

import time

from rft_cluster.config import Config
from rft_cluster.run.records import read_rows

LONGEST_PAUSE = 60.0  # seconds


class Restarts:
    """Counts losses without a new step between them. What is lost again and again is lost for a reason."""

    def __init__(self, config: Config) -> None:
        self._most, self._metrics = config.cluster.restarts, config.run_folder / "metrics.jsonl"
        self._furthest, self._used = 0, 0

    def again(self, error: Exception) -> bool:
        """After `error`: say that the actors start again, and wait a while; False when the number is used up."""
        steps = [row["step"] for row in read_rows(self._metrics)]
        if steps and steps[-1] > self._furthest:
            self._furthest, self._used = steps[-1], 0
        if self._used >= self._most:
            return False
        self._used += 1
        print(
            f"WARNING: {error}\nthe actors start again ({self._used} of {self._most} times without a new step)",
            flush=True,
        )
        time.sleep(min(LONGEST_PAUSE, 2.0**self._used))
        return True
