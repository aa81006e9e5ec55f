"""Progress lines for work that takes more than a few seconds."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

QUIET = 3.0  # seconds before the first line, and between lines


def with_progress(items: Sequence[T], doing: str) -> Iterator[T]:
    """Yield the items. Print a progress line every `QUIET` seconds.

    `doing` begins each line, e.g. `"reading images"`: `reading images: 120 of 1600, 0:41 left`.
    """
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= QUIET:
            left = (now - started) / done * (len(items) - done)
            print(f"{doing}: {done} of {len(items)}, {int(left) // 60}:{int(left) % 60:02d} left", flush=True)
            said = now
        yield item
