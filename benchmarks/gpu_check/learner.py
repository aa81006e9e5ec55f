"""The tier *learner*: what a learner computes on a GPU, without vLLM and Ray. For torch 2.11 to 2.13."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_check.checklist import Bench, Check, Outcome
from rft_cluster.model.shared_prefix import PackLayout, pack_layout, sdpa_segments, varlen_segments

Attention = Callable[[Tensor, Tensor, Tensor, PackLayout, float], Tensor]
# Prompts, completions and their owners: unequal, one completion without a token in the row, two groups.
SEGMENTS = ([588, 301], [64, 1, 33, 0, 64, 17], [0, 0, 0, 0, 1, 1])
HEADS = {"true": (12, 2, 128), "tiny": (4, 2, 32)}  # heads, key heads, size


def attention_forward(bench: Bench) -> Outcome:
    errors = attention_errors(bench)
    return Outcome(errors["output"] < 0.015, errors["output"])


def attention_backward(bench: Bench) -> Outcome:
    errors = attention_errors(bench)
    del errors["output"]
    worst = max(errors, key=errors.__getitem__)
    return Outcome(errors[worst] < 0.015, errors[worst], note=worst)


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
    return {name: float((found[name].cpu().float() - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


def attended(attend: Attention, given: list[Tensor], layout: PackLayout, factors: Tensor) -> dict[str, Tensor]:
    """The output of an attention, and the gradients of its inputs when the output's are `factors`."""
    query, key, value = (tensor.requires_grad_() for tensor in given)
    output = attend(query, key, value, layout, factors.shape[-1] ** -0.5)
    output.backward(factors)
    return {"output": output.detach(), "query": query.grad, "key": key.grad, "value": value.grad}


CHECKS = (
    Check("attention against SDPA: forward", "at most 0.015 of the norm", attention_forward),
    Check("attention against SDPA: gradients", "at most 0.015 of the norm", attention_backward),
)
