"""The tier *learner* of gpu_check on this CPU at its tiny size: each check passes, and fails without what it checks.

Real FSDP2 on one rank, in this process: a check's own process would not see what is broken here.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import embedding

from benchmarks.gpu_check import learner, updates
from benchmarks.gpu_check.checklist import Bench, line_of
from rft_cluster.learner import checkpoint
from rft_cluster.learner import learner as rank
from rft_cluster.model import class_logprobs, shared_prefix, tower
from rft_cluster.weights.source import PolicyWeights

CHECKS = {check.name: check for check in learner.CHECKS}
MEASURED = {name for name, check in CHECKS.items() if check.limit == "measured"}
Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    """Checks compute in this process, and a new folder's anew."""
    monkeypatch.setattr(updates, "in_a_process", lambda work, *arguments, **_: work(*arguments))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return Bench("cpu", "tiny", tmp_path)


def test_every_check_passes(bench):
    failed = {name: found for name, check in CHECKS.items() if not (found := check.run(bench)).passed}
    assert not failed


# What is taken out of the code, by the check that must notice.


def unscaled_kernel(monkeypatch):
    real = shared_prefix.sdpa_segments

    def attend(query, key, value, layout, scaling):
        return real(query, key, value, layout, 1.0 if query.dtype == torch.bfloat16 else scaling)

    monkeypatch.setattr(learner, "sdpa_segments", attend)


def wrong_gradient_of_the_kernel(monkeypatch):
    real = shared_prefix.sdpa_segments

    def attend(query, key, value, layout, scaling):
        if query.dtype == torch.bfloat16:
            key.register_hook(lambda gradient: 1.1 * gradient)
        return real(query, key, value, layout, scaling)

    monkeypatch.setattr(learner, "sdpa_segments", attend)


def completions_begin_one_position_late(monkeypatch):
    real = learner.collate

    def late(*arguments):
        batch = real(*arguments)
        prompts = sum(queries for queries, keys in batch.layout.segments if queries == keys)
        shift = (torch.arange(batch.input_ids.shape[1]) >= prompts).long()
        return replace(batch, position_ids=batch.position_ids + shift)

    monkeypatch.setattr(learner, "collate", late)


def gradient_of_shared_keys_is_not_added_up(monkeypatch):
    def gather(rows, index):
        found = embedding(index, rows.flatten(1)).unflatten(1, rows.shape[1:])
        if found.requires_grad:
            found.register_hook(lambda gradient: 0.9 * gradient)
        return found

    monkeypatch.setattr(shared_prefix, "_gather", gather)


def unscaled_kernel_in_bf16(monkeypatch):
    def unscaled(query, key, value, layout, scaling):
        return shared_prefix.sdpa_segments(query, key, value, layout, 1.0)

    shared_prefix._register("unscaled", unscaled)
    monkeypatch.setattr(
        learner, "hardware", lambda _: SimpleNamespace(attention={**learner.SDPA, "text_config": "unscaled"})
    )


def one_wrong_matrix_in_bf16(module):
    def take_out(monkeypatch):
        real = module.move_to

        def moved(policy, device, dtype):
            real(policy, device, dtype)
            if dtype == "bfloat16":
                [*_, last] = (parameter for parameter in policy.parameters() if parameter.dim() > 1)
                last.data.neg_()

        monkeypatch.setattr(module, "move_to", moved)

    return take_out


def flipped_bit_in_a_part(monkeypatch):
    real = learner.tensor_digest

    def flipped(tensor, start=0):
        if start:
            tensor = tensor.clone()
            tensor.view(torch.int16)[0] ^= 1
        return real(tensor, start)

    monkeypatch.setattr(learner, "tensor_digest", flipped)


def digest_blind_to_the_last_element(monkeypatch):
    real = learner.tensor_digest
    monkeypatch.setattr(learner, "tensor_digest", lambda tensor, start=0: 0 * real(tensor, start))


def loss_without_importance_weights(monkeypatch):
    real = rank.grpo_loss

    def unweighted(logprobs, batch, *others):
        return real(logprobs, replace(batch, generator_logprobs=logprobs.detach()), *others)

    monkeypatch.setattr(rank, "grpo_loss", unweighted)


def optimizer_that_leaves_the_weights(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)


def checkpoint_without_moments(monkeypatch):
    monkeypatch.setattr(checkpoint, "MOMENTS", ())


def export_of_other_weights(monkeypatch):
    class Wrong(PolicyWeights):
        def __iter__(self):
            for number, (name, tensor) in enumerate(super().__iter__()):
                yield name, tensor if number else -tensor

    monkeypatch.setattr(checkpoint, "PolicyWeights", Wrong)


BROKEN: list[tuple[str, Break]] = [
    ("attention against SDPA: forward", unscaled_kernel),
    ("attention against SDPA: gradients", wrong_gradient_of_the_kernel),
    ("packed against plain, FP32: log-probabilities", completions_begin_one_position_late),
    ("packed against plain, FP32: gradient", gradient_of_shared_keys_is_not_added_up),
    ("packed against plain, BF16: log-probabilities", unscaled_kernel_in_bf16),
    ("scorer against FP32: names' log-probabilities", one_wrong_matrix_in_bf16(class_logprobs)),
    ("vision tower against FP32: features", one_wrong_matrix_in_bf16(tower)),
    ("digests: device against CPU", flipped_bit_in_a_part),
    ("digests: device against CPU", digest_blind_to_the_last_element),
    ("all weights: gradient against plain FP32", loss_without_importance_weights),
    ("all weights: tensors moved wrongly", optimizer_that_leaves_the_weights),
    ("LoRA: checkpoint read back", checkpoint_without_moments),
    ("LoRA: export read back", export_of_other_weights),
]


@pytest.mark.parametrize(("name", "take_out"), BROKEN, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_a_check_fails_without_what_it_checks(bench, monkeypatch, name, take_out):
    take_out(monkeypatch)
    assert CHECKS[name].run(bench).passed is False


def test_a_wrong_interface_fails_and_is_named(bench, monkeypatch):
    monkeypatch.setattr(rank, "interface_to", lambda *_: "nowhere0")
    line = line_of(CHECKS["all weights: tensors moved wrongly"], bench, gpus=0)
    assert line.result == "fail" and "nowhere0" in line.note


@pytest.mark.parametrize(("peak", "passed"), [(60.0, True), (68.0, True), (70.0, False), (50.0, False)])
def test_peak_memory_is_held_against_the_plan_on_gpus(monkeypatch, tmp_path, peak, passed):
    monkeypatch.setattr(learner, "updates", lambda *_: SimpleNamespace(peak_gib=peak, planned_gib=60.0))
    found = CHECKS["all weights: peak memory"].run(Bench("cuda", "true", tmp_path))
    assert (found.passed, found.figure) == (passed, peak)


def test_every_kind_of_check_is_broken_here():
    """A variant's checks are the same functions."""
    kinds = {name.partition(": ")[2] for name in CHECKS.keys() - MEASURED}
    assert kinds == {name.partition(": ")[2] for name, _ in BROKEN} | {"peak memory"}
