"""Encoded images that are read on access, so that a large set need not fit into memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, overload


class Pool(Sequence[bytes]):
    """A sequence of images without labels."""

    def __init__(self, keys: Sequence[Any], read: Callable[[Any], bytes]) -> None:
        self._keys, self._read = keys, read

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "Pool": ...
    def __getitem__(self, index: int | slice) -> "bytes | Pool":
        if isinstance(index, slice):
            return Pool(self._keys[index], self._read)
        return self._read(self._keys[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class LazyImages(Mapping[str, bytes]):
    """Images by the SHA-256 of their bytes. Each is read on access by its own function."""

    def __init__(self, read: Mapping[str, Callable[[], bytes]]) -> None:
        self._read = dict(read)

    def __getitem__(self, sha256: str) -> bytes:
        return self._read[sha256]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    @classmethod
    def over(cls, *parts: Mapping[str, bytes]) -> "LazyImages":
        """The images of all parts as one mapping, without reading any."""
        return cls({sha256: partial(part.__getitem__, sha256) for part in parts for sha256 in part})
