"""Base class of config sections. A field's type decides how the text of YAML or an override is read."""

import os
import re
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rft_cluster.config.yaml_text import Text

NULLS = ("", "~", "null", "Null", "NULL")
WITH_EXPONENT = re.compile(r"[+-]?[0-9][0-9_]*(\.[0-9]*)?[eE]\+?[0-9]+")  # 1e3 is also valid as an integer


def _expanded(value: Any) -> Any:
    """Replace a leading `~`, and `$HOME` or `${HOME}` anywhere, by the home folder."""
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    return re.sub(r"\$HOME\b|\$\{HOME\}", lambda _: home, os.path.expanduser(value))


def _written(path: Path) -> str:
    """The path as text that reads back as the same path: a literal leading `~` is protected."""
    return f"./{path}" if str(path).startswith("~") else str(path)


FilePath = Annotated[Path, BeforeValidator(_expanded), PlainSerializer(_written, str, when_used="json")]
"""A path of the user's; every field that holds one has this type, or `PathText` where it may be a name as well."""
PathText = Annotated[str, BeforeValidator(_expanded)]


class Section(BaseModel):
    """A section whose fields convert `yaml_text.Text`, the text of YAML or an override, by their types."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        nullable = NoneType in get_args(annotation)
        return None if nullable and _is_null(value) else _meant(annotation, value)


def _is_null(value: Any) -> bool:
    if not isinstance(value, Text):
        return False
    return value.plain and value in NULLS and not (value == "" and value.comment)


def _meant(annotation: Any, value: Any) -> Any:
    """Convert `Text`, also inside lists and mappings, for a field of this type. pydantic does the rest."""
    if isinstance(value, list):
        return [_meant(annotation, one) for one in value]
    if isinstance(value, dict) and _has(annotation, dict):  # a nested section converts its own keys
        return {name: _meant(annotation, one) for name, one in value.items()}
    if not isinstance(value, Text):
        return value
    if value.comment and _has(annotation, str, Path):
        message = "YAML takes {comment} for a comment: put the whole text into quotes, or a space behind the #"
        raise PydanticCustomError("cut", message, {"comment": value.comment})
    if value == "" and value.plain and value.line:
        cure = "an empty text is written ''" if _has(annotation, str, Path) else "give it one, or leave the line out"
        raise PydanticCustomError("empty", "no value stands here; {cure}", {"cure": cure})
    if _has(annotation, int) and WITH_EXPONENT.fullmatch(value):
        return float(value)
    return value


def _has(annotation: Any, *types: type) -> bool:
    """Return True if `annotation`, or a part of it such as X in `X | None`, is one of `types`."""
    return (get_origin(annotation) or annotation) in types or any(_has(one, *types) for one in get_args(annotation))
