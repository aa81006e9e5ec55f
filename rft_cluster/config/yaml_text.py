"""Read YAML with scalars as text: the config field, not YAML, decides what `no`, `01`, `2024` and `1e-4` mean.

Safe for a stranger's file: no tags, no objects, a bounded size.
"""

import codecs
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown

MAX_BYTES = 10_000_000
MAX_VALUES = 200_000  # each use of an alias counts: a few lines of aliases can expand to billions of values
QUOTES = "a text with any of # : , [ ] { } & * ! | > % @ ` ' \" in it needs quotes around it"


class Text(str):
    """A scalar as written.

    `plain`: without quotes, so null may mean None. `line`: from 1; 0 for the command line.
    `comment`: a following comment of one word, `#word`, which may have been meant as part of the text.
    """

    plain: bool
    line: int
    comment: str

    def __new__(cls, text: str, plain: bool = True, line: int = 0, comment: str = "") -> "Text":
        made = super().__new__(cls, text)
        made.plain, made.line, made.comment = plain, line, comment
        return made


def read_yaml(data: bytes | str, where: str) -> Any:
    """Parse one YAML document into dicts, lists and `Text`; an empty one gives {}. `where` is for messages.

    Raises:
        UserError: the text is not YAML, repeats a key, has a tag, or is larger than any configuration.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{where} holds {len(data)} bytes: that is no configuration")
    try:
        text = data if isinstance(data, str) else _decoded(data)
        return _Reader(text, where).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        written = text.split("\n")[line].rstrip()
        begun = error.context_mark.line if error.context_mark else line
        within = f" (in what begins on line {begun + 1})" if begun != line else ""
        raise UserError(
            f"{where}, line {line + 1}, cannot be read: {shown(error.problem or error.context or '')}{within}\n"
            f"  {shown(written)}\n{QUOTES}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where} cannot be read: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read: it is not UTF-8 text ({error}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError, OverflowError: invalid characters
        raise UserError(f"{where} cannot be read: {shown(str(error))}") from error


def _decoded(data: bytes) -> str:
    """Decode as YAML requires: UTF-16 with a byte order mark, else UTF-8."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


class _Reader:
    """Builds values from the parser's events, which keep how a scalar was written."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.BaseLoader)
        self._anchors: dict[str, tuple[Any, int]] = {}  # (value, number of values in it)
        self._unused: dict[str, yaml.Event] = {}
        self._count = 0

    def document(self) -> Any:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return {}
        value = self._value(next(self._events))
        next(self._events)  # the document's end
        if not isinstance(again := next(self._events), yaml.StreamEndEvent):
            self._refuse(again, "a second document begins here; there may be one")
        for name, event in self._unused.items():
            self._refuse(event, f"&{name} names a value that no *{name} uses; {QUOTES}")
        return value

    def _value(self, event: yaml.Event) -> Any:
        self._count += 1
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.tag is not None:
            self._refuse(event, f"{event.tag} is a tag, which means nothing here; {QUOTES}")
        before = self._count
        value = self._scalar(event) if isinstance(event, yaml.ScalarEvent) else self._collection(event)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._count - before + 1
            self._unused[event.anchor] = event
        if self._count > MAX_VALUES:
            self._refuse(event, f"more than {MAX_VALUES} values, aliases counted as often as used: no configuration")
        return value

    def _alias(self, event: yaml.AliasEvent) -> Any:
        if event.anchor not in self._anchors:
            self._refuse(event, f"*{event.anchor} stands for a value that no &{event.anchor} names; {QUOTES}")
        value, size = self._anchors[event.anchor]
        self._unused.pop(event.anchor, None)
        self._count += size
        return value

    def _scalar(self, event: yaml.ScalarEvent) -> Text:
        plain = event.style is None
        if event.style in ("|", ">") and not event.value:
            self._refuse(event, f"{event.style} begins a text of several lines, and none follows; {QUOTES}")
        comment = re.match(r"[ \t]+(#[^\s#]\S*)[ \t\r]*$", self._rest_of_line(event)) if plain else None
        return Text(event.value, plain, _line(event), comment.group(1) if comment else "")

    def _rest_of_line(self, event: yaml.Event) -> str:
        assert event.end_mark is not None
        return self._text[event.end_mark.index :].partition("\n")[0]

    def _collection(self, event: yaml.CollectionStartEvent) -> Any:
        return self._mapping() if isinstance(event, yaml.MappingStartEvent) else self._sequence()

    def _sequence(self) -> list[Any]:
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event))
        return values

    def _mapping(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        inherited: list[dict[str, Any]] = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event)
            if not isinstance(key, Text):
                self._refuse(event, f"a list or a mapping cannot be a key; {QUOTES}")
            value = self._value(next(self._events))
            if key == "<<" and key.plain:
                inherited += self._merged(event, value)
                continue
            if key in values:
                self._refuse(event, f"duplicate key {key}, which stands on line {lines[key]} already")
            values[str(key)], lines[key] = value, key.line
        for other in inherited:
            values = {**other, **values}
        return values

    def _merged(self, event: yaml.Event, value: Any) -> list[dict[str, Any]]:
        others = value if isinstance(value, list) else [value]
        if not all(isinstance(other, dict) for other in others):
            self._refuse(event, "<< takes the keys of other mappings, e.g. <<: *name")
        return others

    def _refuse(self, event: yaml.Event, problem: str) -> NoReturn:
        raise UserError(f"{self._where}, line {_line(event)}, cannot be read: {shown(problem)}")


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1
