"""Messages hold references: an image crosses a boundary as its hash, never as its bytes."""

import dataclasses
import typing
from collections.abc import Iterator

import pytest

from rft_cluster import messages

MESSAGES = [
    one
    for one in vars(messages).values()
    if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == messages.__name__
]


def reached(kind: object) -> Iterator[object]:
    """The type, those that it is made of, and those of its fields, down to the last."""
    yield kind
    for part in typing.get_args(kind):
        yield from reached(part)
    if dataclasses.is_dataclass(kind):
        for part in typing.get_type_hints(kind).values():
            yield from reached(part)


@dataclasses.dataclass
class Inner:
    images: list[tuple[str, bytes] | None]


@dataclasses.dataclass
class Outer:
    inner: dict[str, Inner]


def test_the_walk_sees_every_depth():
    assert bytes in set(reached(Outer)) and bytes not in set(reached(dict[str, list[int]]))


@pytest.mark.parametrize("message", MESSAGES)
def test_no_message_holds_an_image(message):
    assert not set(reached(message)) & {bytes, bytearray, memoryview, typing.Any, object}


def test_all_messages_are_walked():
    assert {"ImageRef", "Example", "Prompt", "Group", "TrainingSample"} <= {one.__name__ for one in MESSAGES}
