"""A generator without an engine. Apart, since its processes import only this: with the tests' imports each would take
ten seconds to start."""

import math
import threading
from collections.abc import Sequence

from rft_cluster.messages import Completion, Group, Prompt, Sampling


class Waiting:
    """A generator that takes `seconds` for each call, one call after another; infinitely many: until it is released."""

    def begin(self, name: str, seconds: float) -> None:
        self._name, self._seconds, self._engine = name, seconds, threading.Lock()
        self._released = threading.Event()
        self._calls: list[int] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        self._calls.append(len(prompts))
        with self._engine:
            self._released.wait(None if self._seconds == math.inf else self._seconds)
        texts = [f"<think>{self._name}</think><answer>one</answer>"] * sampling.group_size
        return [Group(prompt, [0], [Completion([1], [-1.0], text, "stop", version) for text in texts])
                for prompt in prompts]  # fmt: skip

    def release(self) -> None:
        self._released.set()

    def calls(self) -> list[int]:
        return self._calls
