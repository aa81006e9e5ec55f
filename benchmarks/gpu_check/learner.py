"""The tier *learner*: what a learner computes on a GPU, without vLLM and Ray. For torch 2.11 to 2.13."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check.checklist import Bench, Check, Outcome, once
from benchmarks.gpu_check.material import OTHERS, images, model_folder, run_config, samples
from benchmarks.gpu_check.scoring import FEATURES, SCORES, class_scores, tower_features
from benchmarks.gpu_check.updates import PLAIN, VARIANTS, by_itself, updates, whole_error
from benchmarks.plain_forward import plain_logprobs
from rft_cluster.common.hardware import hardware
from rft_cluster.learner.collate import collate
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel, load_policy, move_to
from rft_cluster.model.shared_prefix import PackLayout, pack_layout, sdpa_segments, varlen_segments
from rft_cluster.weights.digests import tensor_digest

Attention = Callable[[Tensor, Tensor, Tensor, PackLayout, float], Tensor]
# Prompts, completions and their owners: unequal, one completion without a token in the row, two groups.
SEGMENTS = ([588, 301], [64, 1, 33, 0, 64, 17], [0, 0, 0, 0, 1, 1])
HEADS = {"true": (12, 2, 128), "tiny": (4, 2, 32)}  # heads, key heads, size
SDPA = {"text_config": "sdpa", "vision_config": "sdpa"}
ATTENTION_ERROR = 0.015  # relative; BF16 rounds to 0.004
# Relative. On a CPU 0.011 with 2 + 2 layers of the true widths, 0.017 with 6 + 4; 0.020 with 4 + 4 at a sixth of the
# widths, and 0.072 with all 28 + 32.
GRADIENT_ERROR = 0.15


# Attention alone


def attention_forward(bench: Bench) -> Outcome:
    error = attention_errors(bench)["output"]
    return Outcome(error <= ATTENTION_ERROR, error)


def attention_backward(bench: Bench) -> Outcome:
    errors = attention_errors(bench)
    del errors["output"]
    worst = max(errors, key=errors.__getitem__)
    return Outcome(errors[worst] <= ATTENTION_ERROR, errors[worst], note=f"of the {worst}")


def attention_errors(bench: Bench) -> dict[str, float]:
    """The device's attention in BF16 against SDPA in FP32 on the CPU: relative errors of output and gradients."""
    layout = pack_layout(*SEGMENTS)
    rows = int(layout.query_starts[-1])
    heads, key_heads, size = HEADS[bench.size]
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, count, size, generator=draw).bfloat16() for count in (heads, key_heads, key_heads)]
    factors = torch.randn(rows, heads, size, generator=draw).bfloat16()
    wanted = attended(sdpa_segments, [tensor.float() for tensor in given], layout, factors.float())
    device = torch.device(bench.device)
    attend = varlen_segments if bench.device == "cuda" else sdpa_segments
    found = attended(attend, [tensor.to(device) for tensor in given], layout.to(device), factors.to(device))
    return {name: relative(found[name], wanted[name]) for name in wanted}


def attended(attend: Attention, given: list[Tensor], layout: PackLayout, factors: Tensor) -> dict[str, Tensor]:
    """The output of an attention, and the gradients of its inputs when the output's are `factors`."""
    query, key, value = (tensor.requires_grad_() for tensor in given)
    output = attend(query, key, value, layout, factors.shape[-1] ** -0.5)
    output.backward(factors)
    return {"output": output.detach(), "query": query.grad, "key": key.grad, "value": value.grad}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.to(wanted).float() - wanted.float()).norm() / wanted.float().norm())


# The packed forward


def packed_logprobs(bench: Bench, size: str = "") -> Outcome:
    gap = packed(of_size(bench, size))["logprobs"]
    return Outcome(gap <= 1e-3, gap, "nats")


def packed_gradients(bench: Bench, size: str = "") -> Outcome:
    error = packed(of_size(bench, size))["gradients"]
    return Outcome(error <= 1e-3, error)


def packed_bf16(bench: Bench, size: str = "") -> Outcome:
    found = packed(of_size(bench, size))
    ratio = found["packed_bf16"] / found["plain_bf16"]
    return Outcome(ratio <= 1.5, ratio, note=f"{found['packed_bf16']:.4f} nats off on average")


def of_size(bench: Bench, size: str) -> Bench:
    return replace(bench, size=size) if size else bench


@once
def packed(bench: Bench) -> dict[str, float]:
    """The figures of `run_packed`, made once in a process of its own."""
    found: dict[str, float] = by_itself(run_packed, bench)
    return found


def run_packed(bench: Bench) -> dict[str, float]:
    """Two groups in one packed row against every completion with its own copy of prompt and image.

    Returns in FP32 the largest gap of log-probabilities in nats and the relative error of the gradient; in BF16 the
    mean distance of either way from the plain one in FP32, in nats.
    """
    config, device = run_config(bench), torch.device(bench.device)
    encoder = PromptEncoder(str(model_folder(bench)), config.model)
    prompts = PromptCache(encoder, images(bench, 2), capacity=1e9)
    # In the order of the packed row.
    rows = sorted(samples(bench, config, 2), key=lambda one: (len(one.prompt_token_ids), len(one.token_ids)))
    policy = load_policy(str(model_folder(bench)), config.model, PLAIN, encoder.forbidden_token_ids, 1.0).to(device)
    batch = collate(rows, prompts, policy.prompt_positions).to(device)

    def plain() -> Iterator[Tensor]:
        """A completion at a time: in FP32 the activations of all would not fit."""
        for row in rows:
            yield from plain_logprobs(policy.model, [row], prompts, encoder.forbidden_token_ids, 1.0)

    def packed_row() -> Iterator[Tensor]:
        yield policy(**batch.inputs())[0]

    with attention_of(policy, SDPA):
        wanted, wanted_gradient = with_gradient(policy, plain())
    found, found_gradient = with_gradient(policy, packed_row())
    result = {
        "logprobs": float((found - wanted).abs().max()),
        "gradients": whole_error(found_gradient, wanted_gradient),
    }
    del found_gradient, wanted_gradient
    move_to(policy, bench.device, "bfloat16")
    for name, way, attention in (("plain", plain, SDPA), ("packed", packed_row, hardware(bench.device).attention)):
        with torch.no_grad(), attention_of(policy, attention):
            result[f"{name}_bf16"] = float((torch.cat(list(way())) - wanted).abs().mean())
    return result


def with_gradient(policy: PolicyModel, parts: Iterator[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All log-probabilities, and the gradient of their sum with a different factor for each, so that no error cancels.

    The gradient is one tensor for each parameter, and is taken out of the policy.
    """
    logprobs: list[Tensor] = []
    for part in parts:
        first = sum(map(len, logprobs))
        factors = torch.cos(torch.arange(first, first + len(part), device=part.device))
        (part * factors).sum().backward()
        logprobs.append(part.detach())
    gradient = [parameter.grad for parameter in policy.parameters()]
    policy.zero_grad(set_to_none=True)
    return torch.cat(logprobs), gradient


@contextmanager
def attention_of(policy: PolicyModel, attention: dict[str, str]) -> Iterator[None]:
    policy.model.set_attn_implementation(attention)
    yield
    policy.model.set_attn_implementation(PLAIN)


# Digests, matrix products


def digests_agree(bench: Bench) -> Outcome:
    """Digests of the model's tensors on the device, in two parts, against those on the CPU; and of a flipped bit."""
    from safetensors.torch import load_file

    wrong, count = [], 0
    for shard in sorted(model_folder(bench).glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            flat, count = tensor.flatten(), count + 1
            moved, cut = flat.to(bench.device), len(flat) // 3
            parts = tensor_digest(moved[:cut]) + tensor_digest(moved[cut:], cut)
            flipped = moved.view(torch.int16).clone()
            flipped[-1] ^= 1
            if (parts - (own := tensor_digest(flat))) % 2**64 or tensor_digest(flipped.view(torch.bfloat16)) == own:
                wrong.append(name)
    return Outcome(not wrong, len(wrong), f"of {count}", next(iter(wrong), ""))


@once
def matrix_product(bench: Bench) -> float:
    """FLOP/s of the fastest of ten BF16 products of square matrices."""
    size = 8192 if bench.device == "cuda" else 1024
    one, other = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.get_device_module(bench.device).synchronize
    seconds = []
    for _ in range(11):  # the first warms up
        wait()
        started = time.perf_counter()
        one @ other
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def peak_product(bench: Bench) -> Outcome:
    return Outcome(True, matrix_product(bench) / 1e12, "TFLOP/s")


# Updates: figures of `updates.py`


def gradient(variant: str, bench: Bench) -> Outcome:
    error = updates(bench, variant).gradient_error
    return Outcome(error <= GRADIENT_ERROR, error)


def movement(variant: str, bench: Bench) -> Outcome:
    found = updates(bench, variant)
    return Outcome(found.sound and not found.wrong_moves, found.wrong_moves, f"of {found.tensors}")


def memory(variant: str, bench: Bench) -> Outcome:
    """A CPU only knows the memory of its whole process, which the plan of a learner does not."""
    found = updates(bench, variant)
    within = abs(found.peak_gib / found.planned_gib - 1) <= 0.15
    return Outcome(within or bench.device == "cpu", found.peak_gib, "GiB", f"planned {found.planned_gib:.3g} GiB")


def speed(variant: str, bench: Bench) -> Outcome:
    found = updates(bench, variant)
    return Outcome(True, found.tokens / found.seconds[-1], "tok/s", f"{found.seconds[-1]:.2f} s an update")


def utilisation(variant: str, bench: Bench) -> Outcome:
    """An update's FLOPs a second over those of a large matrix product here."""
    found = updates(bench, variant)
    share = found.flops / found.seconds[-1] / matrix_product(bench)
    return Outcome(True, 100 * share, "%", f"{found.flops / 1e12:.4g} TFLOP an update")


def kernels(bench: Bench) -> Outcome:
    """Seconds that the GPU computes in an update; for the rest it waits. The log says for which kernels."""
    found = updates(bench, "all weights")
    return Outcome(True, found.kernels, "s", f"of {found.seconds[-1]:.2f} s")


def checkpoint(bench: Bench) -> Outcome:
    found = updates(bench, "LoRA")
    return Outcome(not found.restored, found.restored, f"of {found.tensors}")


def export(bench: Bench) -> Outcome:
    found = updates(bench, "LoRA")
    return Outcome(not found.exported, found.exported, f"of {found.tensors}")


CHECKS = (
    Check("attention against SDPA: forward", "at most 0.015 of the norm", attention_forward),
    Check("attention against SDPA: gradients", "at most 0.015 of the norm", attention_backward),
    Check("packed against plain, FP32: log-probabilities", "at most 0.001 nats", packed_logprobs),
    Check("packed against plain, FP32: gradient", "at most 0.001 of the norm", packed_gradients),
    Check("packed against plain, BF16: log-probabilities", "at most 1.5 x plain BF16", packed_bf16),
    *(
        Check(f"{family.name}, {name}", limit, partial(check, size=size))
        for size, family in OTHERS.items()
        for name, limit, check in (
            ("FP32: log-probabilities", "at most 0.001 nats", packed_logprobs),
            ("FP32: gradient", "at most 0.001 of the norm", packed_gradients),
            ("BF16: log-probabilities", "at most 1.5 x plain BF16", packed_bf16),
        )
    ),
    Check("scorer against FP32: names' log-probabilities", f"at most {SCORES} nats a token", class_scores),
    Check("vision tower against FP32: features", f"at most {FEATURES} of the norm", tower_features),
    Check("digests: device against CPU", "0 differ", digests_agree),
    Check("matrix product, BF16", "measured", peak_product),
    *(
        check
        for variant in VARIANTS
        for check in (
            Check(
                f"{variant}: gradient against plain FP32",
                f"at most {GRADIENT_ERROR} of the norm",
                partial(gradient, variant),
            ),
            Check(f"{variant}: tensors moved wrongly", "0", partial(movement, variant)),
            Check(f"{variant}: peak memory", "GPU: 15 % from the plan", partial(memory, variant)),
            Check(f"{variant}: speed", "measured", partial(speed, variant)),
            Check(f"{variant}: share of the matrix product", "measured", partial(utilisation, variant)),
        )
    ),
    Check("all weights: seconds of kernels", "measured", kernels, cpu_lacks="kernels that the host starts"),
    Check("LoRA: checkpoint read back", "0 differ", checkpoint),
    Check("LoRA: export read back", "0 differ", export),
)
