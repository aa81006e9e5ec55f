"""Text stays text: a field that takes text gets it as written, in a file, in quotes and on the command line."""

import json
import os
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, Section, config_text, load_config
from rft_cluster.config.yaml_text import read_yaml

HOME = "/home/me"
BASE: dict[str, dict[str, Any]] = {
    "run": {"name": "mine"},
    "model": {"path": "tiny"},
    "data": {"source": "my_data:load"},
    "evaluation": {"also": {"source": "my_data:load"}},
    "schedule": {"steps": "4", "prompts_per_step": "2"},
    "cluster": {"device": "cpu"},
}
WORDS = ["no", "yes", "on", "off", "true", "False", "null", "~", "NULL", "y", "n", "None", "nan", ".inf"]
NUMBERS = ["0", "01", "007", "2024", "1_000", "1e5", "1.0", "0x1F", "0o17", "12:30:45", "2026-11-26", "-1", "+1", "1,5"]
SIGNS = [
    *("photos #1", "#1", "a # b", "[2024] photos", "photos: new", "a:b", "@home", "{x}", "{a: b}", "*star", "&and"),
    *("!important", "! x", "% off", "50%", "a, b", "`tick`", "|", "> x", "- x", "? x", "-", "=", "<<", "a]", "}"),
    *("???", "it's", '"quoted"', "'quoted'", 'say "hi"', "back\\slash", "\\n", "a\\tb", "$5 - $10", "${nothing}"),
    *("$(id)", "a=b"),
]
LETTERS = ["rose garden", "Blüte", "薔薇 (赤)", "🌹", "e\u0301", 'O\'Brien "x"', "a\u200bb", "x" * 300, "a.b.c"]
PATHS = ["~/photos", "~", "$HOME/photos", "${HOME}/my #1", "./~", "$HOMES/x", "a//b/../c", "~nobody-of-that-name/x"]
SCALARS = [*WORDS, *NUMBERS, *SIGNS, *LETTERS, *PATHS]


def fields(section: type[Section] = Config, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of the configuration with its type; an optional section's keys, too."""
    for name, field in section.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        sections = [one for one in inner if issubclass(one, Section)]
        if sections:
            yield from fields(sections[0], (*above, name))
        else:
            yield (*above, name), field.annotation


def kinds(annotation: Any) -> set[Any]:
    """`str`, `Path`, `list`, `dict`, `None`: what a type is made of."""
    parts = {get_origin(annotation) or annotation}
    for inner in get_args(annotation):
        parts |= kinds(inner) if get_origin(annotation) is not Annotated or inner is get_args(annotation)[0] else set()
    return parts


# What a run is called has a pattern, so not every text will do.
TEXTS = {key: kinds(annotation) for key, annotation in fields() if kinds(annotation) & {str, Path}}
TEXTS.pop(("run", "name"))
TEXTS.pop(("evaluation", "also", "unseen_classes"))  # refused: nothing is trained on that data set
PATH_KEYS = {key for key, kind in TEXTS.items() if Path in kind} | {("model", "path"), ("prompt", "template")}
COLLECTIONS = {list, dict}


def test_the_fields_are_seen():
    assert kinds(dict[str, list[str]] | None) >= {dict, list, str, type(None)}
    assert {("data", "path"), ("data", "classes"), ("data", "aliases"), ("rewards",)} <= set(TEXTS)
    assert ("cluster", "device") not in TEXTS and ("schedule", "steps") not in TEXTS


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", HOME)


def nested(kind: set[Any], scalar: str) -> Any:
    """A value for a field, with `scalar` wherever it takes text."""
    value: Any = [scalar, "other"] if list in kind else scalar
    if dict in kind:
        value = {"train" if Literal in kind else scalar: "1" if float in kind else value}
    return value


def expected(key: tuple[str, ...], scalar: str, plain: bool) -> Any:
    """The expected value of a field for `scalar`, with or without quotes."""
    kind = TEXTS[key]
    if kind & COLLECTIONS:
        return {scalar: 1.0} if float in kind else nested(kind, scalar)
    if plain and type(None) in kind and scalar in ("null", "~", "NULL"):
        return None
    if key not in PATH_KEYS:
        return scalar
    text = os.path.expanduser(scalar).replace("${HOME}", HOME)
    text = HOME + text.removeprefix("$HOME") if text.startswith("$HOME/") else text
    return Path(text) if Path in kind else text


def found(config: Config) -> dict[tuple[str, ...], Any]:
    values = {}
    for key in TEXTS:
        value: Any = config
        for part in key:
            value = getattr(value, part)
        values[key] = value
    return values


def filled(scalar: str) -> dict[str, Any]:
    """A configuration in which every field of text holds `scalar`."""
    values: dict[str, Any] = deepcopy(BASE)
    for key, kind in TEXTS.items():
        put(values, key, nested(kind, scalar))
    return values


def put(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    for part in key[:-1]:
        values = values.setdefault(part, {})
    values[key[-1]] = value


def block(value: Any, write: Callable[[str], str], indent: str = "") -> list[str]:
    """YAML in block style whose texts are as `write` writes them."""
    lines = []
    for name, entry in value.items() if isinstance(value, dict) else [("", one) for one in value]:
        head = f"{indent}- " if isinstance(value, list) else f"{indent}{write(name) if indent else name}: "
        if isinstance(entry, str):
            lines.append(head + write(entry))
        else:
            lines += [head.rstrip(), *block(entry, write, indent + "  ")]
    return lines


def double(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def single(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@pytest.mark.parametrize("write", [double, single])
@pytest.mark.parametrize("scalar", SCALARS)
def test_in_quotes_a_text_arrives_as_it_is_written(tmp_path, scalar, write):
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(block(filled(scalar), write)), encoding="utf-8")
    assert found(load_config(str(file), [])) == {key: expected(key, scalar, plain=False) for key in TEXTS}


@pytest.mark.parametrize("key", sorted(TEXTS), ids=".".join)
def test_without_quotes_it_arrives_or_is_refused_with_its_line(tmp_path, key):
    """Never cut, never turned into something else: where YAML reads a sign as its own, the message says quotes."""
    file = tmp_path / "mine.yaml"
    arrived = 0
    for scalar in (scalar for scalar in SCALARS if " # " not in scalar):  # a comment, in YAML as in Python
        values: dict[str, Any] = deepcopy(BASE)
        put(values, key, nested(TEXTS[key], scalar))
        file.write_text("\n".join(block(values, str)), encoding="utf-8")
        try:
            value = found(load_config(str(file), []))[key]
        except UserError as error:
            message = str(error)
        else:
            arrived += 1
            quoted = scalar[0] in "\"'"  # which are YAML's
            assert value == expected(key, yaml.safe_load(scalar) if quoted else scalar, plain=not quoted), scalar
            continue
        assert (str(file) in message and ", line " in message) or " (line " in message, (scalar, message)
        assert "quotes" in message, (scalar, message)
    assert arrived > 40


@pytest.mark.parametrize("scalar", SCALARS)
def test_an_override_takes_a_text_word_for_word(tmp_path, scalar):
    """And a list or a mapping as YAML, whose texts are kept as well."""
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(BASE))
    overrides = []
    for key, kind in TEXTS.items():
        value = double(nested(kind, scalar)) if kind & COLLECTIONS else scalar
        overrides.append(f"rewards.{scalar}=1" if key == ("rewards",) else f"{'.'.join(key)}={value}")
    wanted = {key: expected(key, scalar, plain=not TEXTS[key] & COLLECTIONS) for key in TEXTS}
    wanted[("rewards",)] = {"format": 1.0, "accuracy": 1.0, scalar: 1.0}
    if "=" in scalar:  # the first one ends a key
        overrides = [override for override in overrides if not override.startswith("rewards.")]
        wanted[("rewards",)].pop(scalar)
    assert found(load_config(str(file), overrides)) == wanted


@pytest.mark.parametrize("scalar", [*WORDS, *NUMBERS[:-1], "rose garden", "50%", "a.b.c", "薔薇"])
def test_lists_on_the_command_line_need_no_quotes_for_words(tmp_path, scalar):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(BASE))
    overrides = [f"data.classes=[{scalar}, other]", f"data.aliases={{{scalar}: [{scalar}]}}"]
    config = load_config(str(file), overrides)
    assert config.data.classes == [scalar, "other"]
    assert config.data.aliases == {scalar: [scalar]}


@pytest.mark.parametrize("name", ["St. Bernard", "1.5 mm", "a:b"])
def test_an_entry_of_a_mapping_keeps_the_dots_of_its_name(tmp_path, name):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(BASE))
    assert load_config(str(file), [f"data.aliases.{name}=[x, no]"]).data.aliases == {name: ["x", "no"]}


def random_texts(rng: random.Random, count: int) -> list[str]:
    alphabet = "aZ09 _-.:#[]{}&*!|>%@`'\"\\/,?~$=<\t\n\r\x1b\x85\u2028é薔🌹"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_run_saves_is_read_as_the_same_configuration(tmp_path, seed):
    """Text of any kind, every path and every label: `runs/NAME/config.yaml` gives the configuration back."""
    rng = random.Random(seed)
    texts = [text for text in [*SCALARS, *random_texts(rng, 60)] if "://" not in text]
    for _ in range(20):
        values: dict[str, Any] = deepcopy(BASE)
        for key, kind in TEXTS.items():
            text = rng.choice(texts)
            # A name of a file need not be UTF-8.
            put(values, key, nested(kind, text + "\udce9" if Path in kind and rng.random() < 0.3 else text))
        config = Config.model_validate(values)
        (tmp_path / "saved.yaml").write_text(config_text(config))
        assert load_config(str(tmp_path / "saved.yaml"), []) == config


# --- what YAML has besides


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3, cannot be read: duplicate key a, which stands on line 1 already"),
        ("a: {b: 1, b: 2}\n", "line 1, cannot be read: duplicate key b"),
        ("a: &x 1\n", "line 1, cannot be read: &x names a value that no *x uses"),
        ("a: *x\n", "line 1, cannot be read: *x stands for a value that no &x names"),
        ("a: &x [*x]\n", "*x stands for a value that no &x names"),
        ("a: !!python/name:os.system\n", "is a tag"),
        ("? [a]\n: b\n", "cannot be a key"),
        ("a: 1\n---\nb: 2\n", "line 2, cannot be read: a second document"),
        ('a: "\\UFFFFFFFF"\n', "cannot be read"),
        ("[" * 5000, "nested too deeply"),
        ("a: \x1b[2J\n", "special characters"),
        ("<<: 3\n", "<< takes the keys of other mappings"),
    ],
)
def test_what_no_configuration_needs_is_refused(text, message):
    with pytest.raises(UserError) as caught:
        read_yaml(text, "file")
    assert message in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_value_may_be_used_twice():
    text = "a: &x {p: 1, q: 2}\nb: *x\nc: {<<: *x, q: 3}\nd: {<<: [{p: 4}, *x]}\n"
    assert read_yaml(text, "file") == {
        "a": {"p": "1", "q": "2"}, "b": {"p": "1", "q": "2"}, "c": {"p": "1", "q": "3"}, "d": {"p": "4", "q": "2"},
    }  # fmt: skip


def test_aliases_that_stand_for_billions_are_refused():
    lines = [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(UserError, match="more than 200000 values"):
        read_yaml("\n".join(["k0: &k0 [x]", *lines]), "file")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_however_an_editor_saved_it(encoding, end):
    data = end.join(["a: Blüte", "b: no  # a comment", ""]).encode(encoding)
    assert read_yaml(data, "file") == {"a": "Blüte", "b": "no"}
