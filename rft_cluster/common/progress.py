"""A line now and then while something takes long."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

QUIET = 3.0  # seconds without a line, and then between two


def with_progress(items: Sequence[T], doing: str) -> Iterator[T]:
    """The items, one after the other; once it takes more than `QUIET` seconds, lines say how far it is.

    `doing` begins them, e.g. `"reading images"`: `reading images: 120 of 1600, 0:41 left`.
    """
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= QUIET:
            left = (now - started) / done * (len(items) - done)
            print(f"{doing}: {done} of {len(items)}, {int(left) // 60}:{int(left) % 60:02d} left", flush=True)
            said = now
        yield item
