"""What a generator's actor says in its log."""

import re
from typing import Any

import pytest

from rft_cluster.cluster import generator_actor
from rft_cluster.generator import generator
from rft_cluster.messages import Completion, Group, Sampling, WeightRecord
from tests.unit.some_prompt import some_prompt


def written(finish_reason: str) -> Completion:
    return Completion([1, 2], [0.0, 0.0], "", finish_reason, 3)


def actor(monkeypatch: pytest.MonkeyPatch, *finish_reasons: str) -> Any:
    """An actor whose engine has written completions that ended so."""
    groups = [Group(some_prompt(), [1], [written(reason) for reason in finish_reasons])]
    monkeypatch.setattr(generator.Generator, "generate", lambda *_: groups)
    monkeypatch.setattr(generator.Generator, "load_weights", lambda *_: None)
    monkeypatch.setattr(generator.Generator, "verify_weights", lambda *_: WeightRecord(3, 1, 2))
    return object.__new__(generator_actor.Generator)


def test_there_is_a_line_for_each_phase(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    one = actor(monkeypatch, "stop", "length")
    one.load_weights({}, 3)
    one.verify_weights(3)
    one.generate([some_prompt()], Sampling(2, 1.0, 16), 3)
    said = [re.sub(r"\d+\.\d s$", "N s", line) for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "transfer: version 3 loaded, N s",
        "verify: version 3 holds the learners' weights, N s",
        "generate: version 3, 2 completions, 4 tokens, N s",
    ]


def test_if_most_answers_are_cut_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    actor(monkeypatch, "length", "length", "stop").generate([some_prompt()], Sampling(3, 1.0, 16), 3)
    _, warning = capsys.readouterr().out.splitlines()
    assert warning.startswith("WARNING: 2 of 3 completions were cut at 16 tokens: raise sampling.max_tokens")
