"""`benchmarks.gpu_check` on a CPU at a tiny size: each check passes, and fails with its cure taken out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.gpu_check import digits, several, shared
from benchmarks.gpu_check import generator as tier
from benchmarks.gpu_check.checklist import Bench, Outcome
from benchmarks.gpu_check.generator import Served
from rft_cluster.cluster.handles import ActorGroup
from rft_cluster.common.errors import WeightTransferError
from rft_cluster.generator import generator as role
from rft_cluster.generator import vllm_options


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench("cpu", "tiny", tmp_path_factory.mktemp("gpu_check"))


@pytest.fixture(scope="module")
def served(bench: Bench) -> Iterator[Served]:
    made = tier.served(bench)
    yield made
    made.engine.end()


PASS: dict[str, Callable[[Bench], Outcome]] = {check.name: check.run for check in tier.CHECKS if not check.cpu_lacks}


@pytest.mark.parametrize("name", PASS)
def test_each_check_passes(name: str, bench: Bench, served: Served):
    found = PASS[name](bench)
    assert found.passed, found


def in_engine(served: Served, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work`, a function of this module, in the engine's process."""
    return served.engine._pool.submit(work, *arguments).result()


# The old weights stay in the engine.


def test_weights_that_never_arrive_are_seen(bench: Bench, served: Served, monkeypatch: pytest.MonkeyPatch):
    version = served.policy.send()
    monkeypatch.setattr(served.policy, "send", lambda: version)
    assert not tier.changed_weights(bench).passed


def test_other_weights_than_the_checkpoints_are_seen(bench: Bench, served: Served):
    with served.policy.changed():
        assert not tier.same_weights(bench).passed
    assert tier.same_weights(bench).passed


def test_a_flipped_digest_is_refused(bench: Bench, served: Served, monkeypatch: pytest.MonkeyPatch):
    right = served.policy.sender.digests

    def flipped() -> dict[str, int]:
        digests = right()
        return digests | {next(iter(digests)): 1}

    with monkeypatch.context() as wrong:
        wrong.setattr(served.policy.sender, "digests", flipped)
        with pytest.raises(WeightTransferError, match=r"1 of .* tensors arrived with other bytes"):
            tier.same_weights(bench)
    assert tier.same_weights(bench).passed


# Log-probabilities of another distribution than the sampled one, which a temperature of 1 would hide.


def test_untempered_logprobs_are_seen(bench: Bench, served: Served, monkeypatch: pytest.MonkeyPatch):
    policy = served.policy._policy
    monkeypatch.setattr(policy, "_sampled", policy._sampled._replace(temperature=1.0))
    assert not tier.logprob_gap(bench).passed


# The ban of tokens is lifted in the engine.


def lift_the_ban(bias: float) -> None:
    vllm_options.FORBIDDEN_BIAS = bias


def test_a_lifted_ban_is_seen(bench: Bench, served: Served):
    in_engine(served, lift_the_ban, 0.0)
    found = tier.forbidden_tokens(bench)
    in_engine(served, lift_the_ban, vllm_options.FORBIDDEN_BIAS)
    assert not found.passed and found.figure > 100
    assert tier.forbidden_tokens(bench).passed


# The engine does not get the prompts' seeds.


def seeds_are(seed: int | None) -> None:
    right = vllm_options.sampling_params
    role.sampling_params = lambda sampling, _, *tokens: right(sampling, seed, *tokens)


def seeds_are_right() -> None:
    role.sampling_params = vllm_options.sampling_params


@pytest.mark.parametrize("seed", [None, 0])
def test_wrong_seeds_are_seen(bench: Bench, served: Served, seed: int | None):
    in_engine(served, seeds_are, seed)
    found = tier.seeds(bench)
    in_engine(served, seeds_are_right)
    assert not found.passed
    assert (found.figure == 0) is (seed == 0), "one seed for all repeats, and is no seed"


# The tier shared: a real cluster for each test


@pytest.mark.slow
def test_steps_through_the_real_loop_pass(bench: Bench):
    failed = {check.name: found for check in shared.CHECKS if not (found := check.run(bench)).passed}
    assert not failed


@pytest.mark.slow
def test_old_weights_in_the_engine_are_seen_though_they_verify(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The learner's weights never reach the memory that the engine loads and the digests are taken of."""
    call_all, sent = ActorGroup.call_all, []

    def once(self: ActorGroup, method: str, *arguments: Any) -> list[Any]:
        if method == "publish_weights":
            if sent:
                return []
            sent.append(method)
        return call_all(self, method, *arguments)

    monkeypatch.setattr(ActorGroup, "call_all", once)
    bench = Bench("cpu", "tiny", tmp_path)
    found = shared.transfer(bench)
    assert not found.passed and found.note.endswith("the engine's parameters never changed")
    assert shared.updates(bench).passed


@pytest.mark.slow
def test_digits_learn(bench: Bench):
    failed = {check.name: found for check in digits.CHECKS if not (found := check.run(bench)).passed}
    assert not failed
    assert len(digits.run(bench).tests) == 2, "before and after"


# The tier several: real clusters; a gradient summed over two ranks is that of one


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["prefetch", "2 learners"])
def test_learners_and_generators_apart_pass(bench: Bench, setting: str):
    checks = [check for check in several.CHECKS if check.name.startswith(setting)]
    failed = {check.name: found for check in checks if not (found := check.run(bench)).passed}
    assert not failed
