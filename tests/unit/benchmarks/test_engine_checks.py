"""The tier *generator* where a GPU or a second engine is needed: the engines here only record and answer."""

from dataclasses import replace

import pytest

from benchmarks.gpu_check import generator
from benchmarks.gpu_check.checklist import Bench
from benchmarks.gpu_check.engine import Policy
from benchmarks.gpu_check.generator import Agreement, Served, agreement, another_engine, same_weights, sleep_memory
from rft_cluster.config import load_config
from rft_cluster.messages import Completion, Example, Group, ImageRef, Prompt, Sampling
from rft_cluster.weights.sender import WeightOffer

PROMPT = Prompt("train/0/0", Example(ImageRef("noise/0", "0" * 64), "rose"), "Which?", 0)
BENCH = Bench("cuda", "tiny", None)


def group(*answers: tuple[list[int], list[float]]) -> Group:
    return Group(PROMPT, [1], [Completion(tokens, nats, "", "length", 0) for tokens, nats in answers])


ANSWERS = group(([5, 6, 7, 8], [-1.0, -1.0, -1.0, -1.0]), ([5, 6], [-2.0, -2.0]))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (ANSWERS, Agreement(0.0, 1.0, True)),
        # The first different token is compared; later ones say nothing.
        (
            group(([5, 9, 9, 9], [-1.0, -1.3, -9.0, -9.0]), ([5, 6], [-2.0, -2.0])),
            Agreement(0.3 / 4, 4 / 6, False),
        ),
        # One ends where the other goes on.
        (group(([5, 6], [-1.0, -1.0]), ([5, 6], [-2.0, -2.0])), Agreement(0.0, 4 / 6, False)),
        (
            group(([9] * 4, [-1.5] * 4), ([9] * 2, [-2.5] * 2)),
            Agreement(0.5, 2 / 6, False),
        ),
    ],
)
def test_answers_are_compared_up_to_the_first_different_token(other, expected):
    found = agreement([ANSWERS], [other])
    assert (found.nats, found.share) == pytest.approx((expected.nats, expected.share))
    assert found.equal is expected.equal


class Recording:
    """An engine and the policy beside it, which note their calls."""

    def __init__(self, answers: Group) -> None:
        self.calls: list[str] = []
        self.answers = answers
        self.features = {"cuda_graphs": "FULL", "async_scheduling": True}
        self.free = 10.0
        self.given_back = 24.0

    def call(self, method, *arguments):
        self.calls.append(" ".join([method, *(str(tag) for one in arguments if isinstance(one, list) for tag in one)]))
        self.free += {"sleep": self.given_back}.get(method, 0)
        return [self.answers]

    def send(self) -> int:
        self.calls.append("send")
        return 1

    def end(self) -> None:
        self.calls.append("end")


@pytest.fixture
def engine(monkeypatch) -> Recording:
    engine = Recording(ANSWERS)
    made = Served(engine, engine, [], Sampling(8, 0.7, 4), [ANSWERS], 1.0)
    monkeypatch.setattr(generator, "served", lambda bench: made)
    return engine


def test_answers_after_a_sleep_are_compared(engine):
    assert same_weights(BENCH, asleep=True).passed
    assert engine.calls == ["sleep", "wake_up weights", "send", "wake_up kv_cache", "generate"]
    engine.answers = group(([9] * 4, [-1.0] * 4), ([9] * 2, [-2.0] * 2))  # old or lost weights
    found = same_weights(BENCH, asleep=True)
    assert not found.passed and found.note == "33 % of the tokens compared"
    engine.answers = group(
        *[(c.token_ids, [nats - 0.01 for nats in c.generator_logprobs]) for c in ANSWERS.completions]
    )
    assert not same_weights(BENCH).passed


def test_the_memory_that_a_sleep_gives_back_is_measured(engine, monkeypatch):
    monkeypatch.setattr(generator.torch.cuda, "mem_get_info", lambda: (engine.free * 2**30, 80 * 2**30))
    monkeypatch.setattr(
        generator, "run_config", lambda *_: load_config("flower102_1gpu", ["generators.gpu_memory=0.3"])
    )
    found = sleep_memory(BENCH)
    assert (found.passed, found.figure, found.note) == (True, 24.0, "100 % of the engine's share")
    assert engine.calls[-2:] == ["send", "wake_up kv_cache"], "awake for the next check"
    engine.given_back = 12.0
    assert not sleep_memory(BENCH).passed


@pytest.fixture
def other(monkeypatch, engine) -> Recording:
    """The engine without the feature."""
    other = Recording(ANSWERS)
    other.features = {"cuda_graphs": "NONE", "async_scheduling": True}
    monkeypatch.setattr(generator, "run_config", lambda *_: None)
    monkeypatch.setattr(generator, "images", lambda *_: {})
    monkeypatch.setattr(generator, "Engine", lambda *_, **options: other)
    return other


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (None, ["start_weight_update", "sent", "update_weights", "finish_weight_update 1", "verify_weights 1"]),
        ({"path": "/proc/1/fd/3"}, ["sent", "load_weights 1", "verify_weights 1"]),
    ],
)
def test_an_update_by_cuda_ipc_is_sent_while_the_engine_receives(update, expected):
    calls: list[str] = []

    class Sender:
        def connect(self, forward):
            self.forward = forward

        def send(self):
            calls.append("sent")
            if update is None:
                self.forward({"names": []})

        def digests(self):
            return {"norm.weight": 5}

    class Noting:
        def call(self, method, *arguments):
            version = [str(one) for one in arguments if isinstance(one, int)]
            calls.append(" ".join([method, *version]))

    policy = object.__new__(Policy)
    policy._version, policy._engine, policy.sender, policy._offer = 0, Noting(), Sender(), WeightOffer({}, update, 8)
    policy.sender.connect(policy._forward)
    assert policy.send() == 1
    assert calls == expected


def without_graphs():
    return another_engine(BENCH, feature="cuda_graphs", option="enforce_eager", value=True)


def test_an_engine_of_another_kind_is_compared_and_ended(other):
    found = without_graphs()
    assert found.passed and found.note == "all tokens equal (cuda_graphs FULL and NONE)"
    assert other.calls == ["serve_checkpoint", "generate", "end"]
    other.answers = replace(ANSWERS, completions=list(reversed(ANSWERS.completions)))
    assert not without_graphs().passed


def test_engines_of_one_kind_compare_nothing(other):
    other.features = {"cuda_graphs": "FULL", "async_scheduling": True}
    with pytest.raises(RuntimeError, match="cuda_graphs is FULL in both engines"):
        without_graphs()
    assert other.calls[-1] == "end"
