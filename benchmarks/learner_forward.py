"""The learner's forward and backward with the prompt shared, against the plain way, on a CPU.

    python -m benchmarks.learner_forward [--dtypes bf16,fp32] [--repeats 5]

Four photographs of 448 x 448 pixels, 8 completions of 64 tokens to each, through the model of `models.py`: vision
tower included, log-probabilities of all completion tokens, then the gradients of every parameter. Both sides have the
learner's patch embedding; they differ in

    plain     every completion with its own copy of prompt and image (`plain_forward.py`), a group in a forward; torch's
              own attention, and log-probabilities in chunks under torch's own checkpointing
    shared    each prompt and image once, a group in a forward
    packed    the same, all groups in one forward, as the learner does it

First the gate: log-probabilities and the gradients of every parameter must agree in FP32. Then the time, in turns, in
BF16 (in which learners compute) and in FP32, on one thread, by the clock and in the process's own processor seconds:
other programs on the machine disturb these less, and a round in which they took more than 5 % does not count for the
clock. Just before and after each side like matrix products are timed: at their rate all FLOPs of the side would take a
least time, and its share of the roofline is that time by its own. Then the memory, each side in a process of its own:
peak resident memory during a forward and backward less what was resident before, with gradients already allocated and
after a small image.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from benchmarks.common import (
    CACHE,
    FOREIGN_LIMIT,
    Usage,
    in_a_process,
    machine,
    parsed,
    read_result,
    spread,
    write_result,
)
from benchmarks.models import QUESTION, bench_images, bench_model
from benchmarks.plain_forward import plain_logprobs
from benchmarks.roofline import counted_flops, like_products, multiply, products_flops
from rft_cluster.common.hardware import hardware, malloc_environment, openmp_environment
from rft_cluster.config import ModelSection
from rft_cluster.data.images import image_sha256
from rft_cluster.learner.collate import Batch, collate
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Example, ImageRef, Prompt, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel

IMAGES, GROUP_SIZE, COMPLETION_TOKENS, SIDE = 4, 8, 64, 448
SMALL = 112  # pixels: the other photographs of the benchmarks
THREADS = 1  # more would spin while they wait for each other, and that is no work
GAP, GRADIENT_GAP = 1e-4, 1e-4  # what the gate lets pass
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIDES = ("plain", "shared", "packed")
PLAIN = {"text_config": "sdpa", "vision_config": "sdpa"}


class Sides:
    """The ways to compute a step's log-probabilities, all with the same weights."""

    def __init__(self, dtype: torch.dtype, question: str = "", completion_tokens: int = COMPLETION_TOKENS) -> None:
        self.question, self.completion_tokens = question or QUESTION.read_text().strip(), completion_tokens
        path = bench_model(CACHE)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=dtype).train()
        encoder = PromptEncoder(str(path), ModelSection(path=str(path), min_pixels=SMALL**2, max_pixels=SIDE**2))
        self.forbidden = encoder.forbidden_token_ids
        self.images: dict[str, bytes] = {}
        self.encoder = PromptCache(encoder, self.images, capacity=1e9)
        self.policy = PolicyModel(self.model, self.forbidden, temperature=1.0)
        self.read(IMAGES, GROUP_SIZE, SIDE)

    def read(self, images: int, group_size: int, pixels: int) -> None:
        """Prepare the inputs of a step, so that no preprocessing is measured."""
        draw = torch.Generator().manual_seed(0)
        self.groups = []
        for image in sorted(bench_images(CACHE, pixels).rglob("*.png"))[:images]:
            reference = ImageRef(image.stem, image_sha256(image.read_bytes()))
            self.images[reference.sha256] = image.read_bytes()
            prompt = Prompt(image.stem, Example(reference, "rose"), self.question, 0)
            tokens = self.encoder.encode(prompt).token_ids
            completions = torch.randint(300, 16_000, (group_size, self.completion_tokens), generator=draw).tolist()
            self.groups.append(
                [
                    TrainingSample(prompt, tokens, own, [-1.0] * len(own), 1.0, 1.0, index)
                    for index, own in enumerate(completions)
                ]
            )
        joined = [sample for group in self.groups for sample in group]
        self.parts: dict[str, list[Any]] = {
            "plain": self.groups,
            "shared": [collate(group, self.encoder, self.policy.prompt_positions) for group in self.groups],
            "packed": [collate(joined, self.encoder, self.policy.prompt_positions)],
        }

    def forwards(self, side: str) -> list[Callable[[], Tensor]]:
        """A function for each forward of a step; it returns the log-probabilities of its completions' tokens."""
        return [partial(self._logprobs, part) for part in self.parts[side]]

    def _logprobs(self, part: Batch | list[TrainingSample]) -> Tensor:
        if isinstance(part, Batch):
            return self.policy(**part.inputs())[0]
        return torch.cat(plain_logprobs(self.model, part, self.encoder, self.forbidden, 1.0))

    def step(self, side: str) -> Tensor:
        """Forward and backward of all groups; gradients add up. Returns the log-probabilities."""
        self.model.set_attn_implementation(PLAIN if side == "plain" else hardware("cpu").attention)
        logprobs = []
        for forward in self.forwards(side):
            logprobs.append(forward())
            backward(logprobs[-1])
        return torch.cat([one.detach() for one in logprobs])

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}


def backward(logprobs: Tensor) -> None:
    """Backward of a sum with a different factor for each token of a group, so that no error can cancel."""
    factors = torch.cos(torch.arange(len(logprobs)) % (GROUP_SIZE * COMPLETION_TOKENS))
    (logprobs * factors).sum().backward()


# Stages, each in a process of its own


def gate() -> dict[str, Any]:
    sides = Sides(torch.float32)
    plain = sides.step("plain")
    expected = sides.gradients()
    result: dict[str, Any] = {"logprob_spread": float(plain.std())}
    for side in ("shared", "packed"):
        sides.model.zero_grad(set_to_none=True)
        gap = float((sides.step(side) - plain).abs().max())
        # Some are nothing but rounding: a key's bias shifts all of a query's scores alike, which softmax takes out.
        floor = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
        gaps = {
            name: float((found - expected[name]).norm() / (expected[name].norm() + floor))
            for name, found in sides.gradients().items()
        }
        worst = max(gaps, key=gaps.__getitem__)
        result[side] = {"logprob_gap": gap, "gradient_gap": gaps[worst], "worst_gradient": worst}
        if gap > GAP or gaps[worst] > GRADIENT_GAP:
            raise SystemExit(f"{side} computes something else than plain: {result[side]}")
    return result


def times(dtype: torch.dtype, repeats: int) -> list[dict[str, dict[str, float]]]:
    """Each round's times of each side, its FLOPs, and the rate of like products just before and after it."""
    sides = Sides(dtype)
    batch = sides.parts["packed"][0]
    layers = like_products(sides.model.config, batch.input_ids.shape[1], len(batch.pixel_values), dtype)
    flops = {side: counted_flops(partial(sides.step, side)) for side in SIDES}
    usage = Usage()
    rounds = []
    for _ in range(repeats + 1):
        measured = {}
        for side in SIDES:
            sides.model.zero_grad(set_to_none=True)
            before = timed(usage, partial(multiply, layers))
            measured[side] = timed(usage, partial(sides.step, side))
            after = timed(usage, partial(multiply, layers))
            rate = 2 * products_flops(layers) / (before["cpu"] + after["cpu"])
            measured[side] |= {"flops": flops[side], "products_flops_a_second": rate}
            print(f"  {side} {measured[side]}", flush=True)
        rounds.append(measured)
    return rounds[1:]  # the first warms up


def timed(usage: Usage, work: Callable[[], object]) -> dict[str, float]:
    """Seconds by the clock, own processor seconds, and the share that others took."""
    usage.since_last()
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"clock": clock, "cpu": cpu, "foreign": usage.since_last()[1]}


def memory(side: str, dtype: torch.dtype) -> dict[str, float]:
    """MiB of one forward and its backward. What libraries set up on first use is not a step's: one completion of a
    small image goes first."""
    sides = Sides(dtype)
    for parameter in sides.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    sides.read(images=1, group_size=1, pixels=SMALL)
    sides.step(side)
    sides.read(IMAGES, GROUP_SIZE, SIDE)
    forward = sides.forwards(side)[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
    before = status("VmRSS")
    backward(forward())
    return {"before": before, "peak": status("VmHWM"), "step": status("VmHWM") - before}


def status(name: str) -> float:
    """MiB, from the kernel's account of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def rows() -> dict[str, int | float]:
    """The input of each side: tokens of the language model, patches of the vision tower."""
    sides = Sides(torch.bfloat16)
    batch = sides.parts["packed"][0]
    plain = [len(one.prompt_token_ids) + len(one.token_ids) for group in sides.groups for one in group]
    tokens, patches = batch.input_ids.shape[1], len(batch.pixel_values)
    return {
        "parameters": sum(parameter.numel() for parameter in sides.model.parameters()),
        "prompt_tokens": len(sides.groups[0][0].prompt_token_ids),
        "plain_tokens": sum(plain),
        "shared_tokens": tokens,
        "token_ratio": sum(plain) / tokens,
        "plain_patches": patches * GROUP_SIZE,
        "shared_patches": patches,
    }


# Running them


def child(stage: Callable[..., Any], *arguments: Any) -> Any:
    own = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    return in_a_process(
        _run, stage, *arguments, environment={**openmp_environment("cpu"), **malloc_environment("cpu"), **own}
    )


def _run(stage: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_flush_denormal(True)
    return stage(*arguments)


def ratios(rounds: list[dict[str, dict[str, float]]], clock: str) -> dict[str, Any]:
    """Plain over each side, within a round; for the clock in rounds that others left alone, none if there are none."""
    counted = [
        one for one in rounds if clock == "cpu" or all(side["foreign"] <= FOREIGN_LIMIT for side in one.values())
    ]
    if not counted:
        return {"rounds": 0}
    return {
        "rounds": len(counted),
        "seconds": {side: spread([one[side][clock] for one in counted]) for side in SIDES},
        "times_as_fast": {
            side: spread([one["plain"][clock] / one[side][clock] for one in counted]) for side in ("shared", "packed")
        },
    }


def roofline(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The FLOPs of each side by its processor seconds, as a share of the rate of products alone."""

    def shares(side: str) -> list[float]:
        times = [one[side] for one in rounds]
        return [one["flops"] / one["cpu"] / one["products_flops_a_second"] for one in times]

    return {
        side: {
            "gflop": rounds[0][side]["flops"] / 1e9,
            "products_gflop_a_second": spread([one[side]["products_flops_a_second"] / 1e9 for one in rounds]),
            "share": spread(shares(side)),
        }
        for side in SIDES
    }


def main() -> None:
    options = parsed(__doc__, repeats=5, dtypes=list(DTYPES))  # dtypes left out keep the results they have
    CACHE.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = read_result("learner_forward") or {}
    result |= {"rows": child(rows), "gate": child(gate)}
    print({"rows": result["rows"], "gate": result["gate"]}, flush=True)
    for dtype in options.dtypes:
        rounds = child(times, DTYPES[dtype], options.repeats)
        mib = {side: child(memory, side, DTYPES[dtype]) for side in SIDES}
        result[dtype] = {
            "machine": machine(),
            "threads": THREADS,
            "rounds": rounds,
            "clock": ratios(rounds, "clock"),
            "cpu": ratios(rounds, "cpu"),
            "roofline": roofline(rounds),
            "memory_mib": mib,
            "memory_ratio": mib["plain"]["step"] / mib["shared"]["step"],
        }
        write_result("learner_forward", result)
        print(dtype, {name: result[dtype][name] for name in ("clock", "cpu", "roofline", "memory_ratio")}, flush=True)


if __name__ == "__main__":
    main()
