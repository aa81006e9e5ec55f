import math
import os
from contextlib import nullcontext
from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from rft_cluster.algorithm.loss import LossTerms
from rft_cluster.common.errors import ClusterError, RepeatedUpdate, UserError
from rft_cluster.common.hardware import hardware
from rft_cluster.config import load_config
from rft_cluster.learner import learner
from rft_cluster.learner.learner import LESS, Learner, completion_gaps, learning_rate_factor
from rft_cluster.messages import CompletionGap, LearnerStats, LossSums, TrainingSample
from rft_cluster.model.computing import within_memory
from tests.unit.some_prompt import some_prompt


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 20),  # linear warm-up: step + 1 of 20
        (1, 2 / 20),
        (18, 19 / 20),
        (19, 1.0),
        (20, 1.0),  # (80 - 20) / (80 - 20)
        (21, 59 / 60),
        (50, 0.5),  # (80 - 50) / 60
        (79, 1 / 60),  # the last step still learns
    ],
)
def test_warm_up_and_decay_by_hand(step, factor):
    assert learning_rate_factor(step, warmup_steps=20, steps=80) == pytest.approx(factor)


@pytest.mark.parametrize(("step", "factor"), [(0, 1.0), (1, 3 / 4), (2, 2 / 4), (3, 1 / 4)])
def test_without_warm_up_it_decays_from_the_start(step, factor):
    assert learning_rate_factor(step, warmup_steps=0, steps=4) == pytest.approx(factor)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 2), (3, 4), (20, 80)])
def test_it_rises_to_one_then_falls_and_never_reaches_zero(warmup, steps):
    factors = [learning_rate_factor(step, warmup, steps) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1.0
    assert min(factors) > 0
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in pairwise(factors[peak:]))


class OneNumber(torch.nn.Module):
    """A policy of one parameter, which is the log-probability of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.logprob = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logprob.expand(tokens), torch.zeros(tokens)


@pytest.mark.parametrize(
    ("advantages", "loss"),
    [
        ([[2.0]], -2.0),
        ([[2.0], [-6.0]], 2.0),  # ratios are 1, so an update's loss is -A; (-2 + 6) / 2
        ([[1.0, 3.0], [-6.0], [-2.0]], 2.0),  # an update of two micro-batches, each half of it: (-2 + 6 + 2) / 3
    ],
)
def test_the_loss_of_a_step_is_the_mean_of_its_updates(advantages, loss):
    """The model and its batches are stood in for: what is tested is what is added up, and over what it is a mean."""
    rank = learner_of_one_number(f"algorithm.updates_per_step={len(advantages)}")
    rank._optimizer.step = lambda: None  # the policy stays, and with it every ratio at 1
    rank._batches = lambda update: (batch(advantage, 1 / (4 * len(update))) for advantage in update)
    assert rank.update(advantages, step=0).loss == pytest.approx(loss)


def learner_of_one_number(*overrides: str) -> Learner:
    """A learner of `OneNumber`; a test gives it `_batches`."""
    rank = object.__new__(Learner)
    rank._config = load_config("digits", ["algorithm.kl_beta=0", *overrides])
    rank._device, rank._policy = torch.device("cpu"), OneNumber()
    rank._rank = rank._step = 0
    rank._optimizer = torch.optim.SGD(rank._policy.parameters(), lr=0.0)
    rank._forgotten = []
    rank._prompts = SimpleNamespace(forget_augmented=lambda: rank._forgotten.append(rank._step))
    return rank


@pytest.mark.parametrize(
    ("augment", "forgotten"),
    [("{}", []), ("{flip: true}", []), ("{flip: true, crop: 0.1}", [1]), ("{rotation: 5}", [1])],
)
def test_augmented_images_that_never_recur_are_forgotten_before_a_step(augment, forgotten):
    rank = learner_of_one_number(f"data.augment={augment}")
    rank._optimizer.step = lambda: None
    rank._batches = lambda update: (batch(advantage, 1 / (4 * len(update))) for advantage in update)
    rank.update([[1.0]], step=0)
    assert rank._forgotten == forgotten


def batch(advantage: float, weight: float) -> SimpleNamespace:
    """Four tokens of equal advantage."""
    return SimpleNamespace(
        inputs=lambda: {"tokens": 4},
        generator_logprobs=torch.full((4,), -1.0),
        advantages=torch.full((4,), advantage),
        weights=torch.full((4,), weight),
        completions=(TrainingSample(some_prompt(), [1], [2] * 4, [-1.0] * 4, advantage, weight, 0),),
    )


def work_of(*advantages: float) -> list[list[list[TrainingSample]]]:
    """One update of two samples a micro-batch, each micro-batch with its own prompt."""
    return [
        [
            [TrainingSample(some_prompt(f"train/3/{i}", f"photos/{i}.png"), [1], [2], [-1.0], advantage, 1 / 8, 0)] * 2
            for i, advantage in enumerate(advantages)
        ]
    ]


def trained_by(rank: Learner, *advantages: float, step: int = 0) -> LearnerStats:
    rank._batches = lambda update: (batch(samples[0].advantage, samples[0].weight) for samples in update)
    return rank.update(work_of(*advantages), step)


def test_the_gap_of_each_completion_by_hand():
    first, second = some_prompt("train/3/0"), some_prompt("train/3/1")
    completions = [
        TrainingSample(second, [1], [2], [-1.0], 1.0, 1 / 8, 5),
        TrainingSample(first, [1], [2] * 3, [-1.0] * 3, 1.0, 0.0, 2),  # padding
        TrainingSample(first, [1], [2] * 2, [-1.0] * 2, 1.0, 1 / 8, 7),
    ]
    found = completion_gaps(completions, torch.tensor([0.5, 9.0, 9.0, 9.0, 0.25, 0.75]))
    assert found == (CompletionGap("train/3/1", 5, 0.5), CompletionGap("train/3/0", 7, 0.5))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_the_update_out_and_names_its_prompts(poison):
    rank = learner_of_one_number("optimizer.learning_rate=0.5")
    stats = trained_by(rank, 1.0, poison, 2.0)
    assert (stats.skipped, stats.not_finite) == (1, ("train/3/1 (photos/1.png)",))
    assert (rank._policy.logprob.item(), stats.finite_weights) == (-1.0, True)
    stats = trained_by(rank, 1.0, 2.0, step=1)
    assert (stats.skipped, stats.not_finite) == (0, ())
    assert rank._policy.logprob.item() != -1.0


def test_the_log_has_a_line_a_step_and_a_warning_with_the_cure(capsys):
    rank = learner_of_one_number()
    trained_by(rank, 1.0, 2.0)
    trained_by(rank, math.nan, step=1)
    first, second, warning = capsys.readouterr().out.splitlines()
    assert first.startswith("learn: step 1, ") and second.startswith("learn: step 2, ")
    assert warning.startswith("WARNING: step 2: 1 of 1 updates left out")
    assert "optimizer.learning_rate" in warning


def test_the_gradient_carries_to_all_ranks_that_a_loss_is_not_finite(monkeypatch):
    """Here the loss is infinite and its derivative finite, as where infinity is clamped."""

    def infinite(logprobs, *_):
        return LossTerms(logprobs.sum() + math.inf, LossSums(tokens=4, loss=math.inf), torch.zeros(4))

    monkeypatch.setattr(learner, "grpo_loss", infinite)
    rank = learner_of_one_number()
    rank._optimizer.zero_grad = lambda: None
    assert trained_by(rank, 1.0).skipped == 1
    assert math.isnan(rank._policy.logprob.grad.item())


@pytest.mark.parametrize(
    ("weight", "finite"),
    [(1e38, True), (-1e38, True), (math.nan, False), (math.inf, False), (3.4e38, False)],
    ids=["large", "negative", "not a number", "infinite", "infinite in BF16"],
)
def test_a_step_tells_whether_it_made_weights_that_are_not_finite(weight, finite):
    rank = learner_of_one_number()
    rank._optimizer.step = lambda: rank._policy.logprob.data.fill_(weight)
    assert trained_by(rank, 1.0).finite_weights is finite


def test_a_rank_without_a_row_of_any_weight_has_no_weight_that_is_not_finite():
    rank = learner_of_one_number()
    rank._policy.logprob = torch.nn.Parameter(torch.empty(0))
    assert rank._weights_are_finite()


def test_no_update_is_made_twice():
    rank = learner_of_one_number("optimizer.learning_rate=0.5")
    trained_by(rank, 1.0, step=0)
    trained_by(rank, 1.0, step=2)  # step 1 had nothing to learn from, and made no call
    weight = rank._policy.logprob.item()
    for step in (0, 1, 2):
        with pytest.raises(RepeatedUpdate, match=f"update {step} is asked for, but the next one is 3"):
            trained_by(rank, 1.0, step=step)
    assert rank._policy.logprob.item() == weight


def test_a_restored_learner_goes_on_from_its_step(monkeypatch):
    monkeypatch.setattr(learner, "load_shards", lambda *_: None)
    rank = learner_of_one_number()
    trained_by(rank, 1.0, step=8)
    rank.restore_checkpoint("step-000004", updates=4, step=4)
    with pytest.raises(RepeatedUpdate, match="update 3 is asked for, but the next one is 4"):
        trained_by(rank, 1.0, step=3)
    trained_by(rank, 1.0, step=4)


def test_an_update_that_ended_in_an_error_is_not_made_again():
    """Of two updates the first may have changed the weights."""

    def full() -> None:
        raise MemoryError

    rank = learner_of_one_number()
    rank._optimizer.step = full
    with pytest.raises(MemoryError):
        trained_by(rank, 1.0)
    with pytest.raises(RepeatedUpdate):
        trained_by(rank, 1.0)


@pytest.mark.parametrize(
    ("error", "fixable"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),  # no room for CUDA's context
        (RuntimeError("The size of tensor a must match"), False),
        (ClusterError("generator-0 died: it was killed by the kernel: out of memory, 21 of 24 GiB"), False),
        (ValueError("a defect"), False),
    ],
)
def test_no_memory_names_what_to_lower(error, fixable):
    @within_memory("a learner", LESS)
    def work() -> None:
        raise error

    with pytest.raises(UserError if fixable else type(error)) as caught:
        work()
    assert ("lower learners.micro_batch_tokens" in str(caught.value)) is fixable


@pytest.mark.parametrize("call", ["connect_weights", "publish_weights"])
def test_no_memory_for_a_transfer_names_what_to_lower(call):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    learner = Learner.__new__(Learner)
    learner._sender, learner._step = SimpleNamespace(connect=full, send=full), 0
    with pytest.raises(UserError, match=r"a learner is out of memory \(CUDA .* lower learners\.micro_batch_tokens"):
        getattr(learner, call)(*[None] * (call == "connect_weights"))


def test_memory_that_no_machine_has():
    with pytest.raises(UserError, match="a learner is out of memory"), within_memory("a learner"):
        torch.empty(2**55)


@pytest.mark.parametrize(
    ("device", "others", "interfaces"),
    [
        ("cuda", ["10.0.0.1"], ("lo", "=lo")),
        ("cuda", ["10.0.0.1", "10.0.0.2"], ("lo", "=ib0")),
        ("cuda", None, ("lo", "=ib0")),  # a generator may come on a host that joins in mid-run
        ("cpu", ["10.0.0.1", "10.0.0.2"], ("lo", None)),
    ],
)
def test_nccl_listens_where_generators_on_other_hosts_reach_it(monkeypatch, device, others, interfaces):
    """Learners on one host need its loopback interface only, but rank 0 sends weights to generators elsewhere."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    formed: list[tuple[str | None, str | None]] = []

    def form(**_: object) -> None:
        formed.append((os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")))
        raise InterruptedError

    monkeypatch.setattr(learner.dist, "init_process_group", form)
    rank = Learner.__new__(Learner)
    rank._rank, rank._config = 0, load_config("digits", ["cluster.interface=ib0"])
    rank._device, rank._hardware = torch.device(device), hardware(device)
    with pytest.raises(InterruptedError):
        rank.join("file:///nowhere", ["10.0.0.1", "10.0.0.1"], others)
    assert formed == [interfaces]


def test_ranks_on_one_host_meet_in_memory():
    path = Learner.__new__(Learner).offer_rendezvous(["10.0.0.1"] * 2).removeprefix("file://")
    assert os.readlink(path).startswith("/memfd:"), "no file that a killed rank would leave"
    one, other = learner.dist.FileStore(path, 2), learner.dist.FileStore(path, 2)
    one.set("name", "value")
    assert other.get("name") == b"value"


@pytest.mark.parametrize("hosts", [["10.0.0.1", "10.0.0.1"], ["10.0.0.1", "10.0.0.2"]], ids=["one host", "two hosts"])
def test_a_group_waits_for_a_rank_as_long_as_the_driver_waits_for_a_call(monkeypatch, hosts):
    formed = {}

    def form(**settings: object) -> None:
        formed.update(settings)
        raise InterruptedError

    monkeypatch.setattr(learner.dist, "init_process_group", form)
    monkeypatch.setattr(learner, "connections", lambda *_: nullcontext())
    rank = Learner.__new__(Learner)
    rank._rank, rank._config, rank._store = 0, load_config("digits", ["cluster.step_timeout=77"]), "store"
    rank._device, rank._hardware = torch.device("cpu"), hardware("cpu")
    monkeypatch.setattr(learner, "interface_to", lambda *_: "lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    with pytest.raises(InterruptedError):
        rank.join("file:///nowhere", hosts)
    assert formed["timeout"] == timedelta(seconds=77)
    assert (formed["backend"], formed["rank"], formed["world_size"]) == ("gloo", 0, 2)
