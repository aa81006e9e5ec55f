"""Combine the figures of several processes. The annotation of each field says how."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def reduced(parts: Sequence[T]) -> T:
    """Combine dataclasses of one type, each field by the function in its annotation.

    class Stats:
        tokens: Annotated[float, sum]
        memory_gib: Annotated[float, max]

    reduced([Stats(3.0, 2.0), Stats(4.0, 1.0)])  ->  Stats(7.0, 2.0)
    """
    hints = get_type_hints(type(parts[0]), include_extras=True)
    values: dict[str, Any] = {field.name: [getattr(part, field.name) for part in parts] for field in fields(parts[0])}
    return type(parts[0])(**{name: hints[name].__metadata__[0](values[name]) for name in values})


def largest(values: Sequence[float | None]) -> float | None:
    """The maximum of the values that are not None; None if all are."""
    return max((value for value in values if value is not None), default=None)
