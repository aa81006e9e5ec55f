"""The learner's forward and backward with the prompt shared, against the plain way, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/learner_forward.py

Four images of 448 x 448 pixels, 8 completions of 64 tokens to each, through a Qwen2-VL of 87 million parameters with
random weights, whose parts have the shares of Qwen2-VL-2B's: vision tower included, log-probabilities of all completion
tokens, then the gradients of every parameter. Both sides use this project's chunked log-probabilities; they differ in

    plain     every completion with its own copy of prompt and image (`plain_forward.py`), a group in a forward
    shared    each prompt and image once, a group in a forward
    packed    the same, all groups in one forward, as the learner does it

First the gate: log-probabilities and the gradients of every parameter must agree in FP32. Then the time, in turns, in
FP32 and in BF16 (in which learners compute), by the clock and in the process's own CPU seconds, which other programs on
the same cores disturb less. Then the memory, each side in a process of its own: peak resident memory during a forward
and backward less what was resident before, with gradients already allocated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from plain_forward import plain_logprobs
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from rft_cluster.batching import collate
from rft_cluster.hardware import hardware
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.qwen2vl import EncodedPrompt, PolicyModel

RESULTS = Path(__file__).parent / "results" / "learner_forward.json"
IMAGES, GROUP_SIZE, COMPLETION_TOKENS, SIDE = 4, 8, 64, 448
TEXT_TOKENS = 76  # of a real prompt: the question, the chat format
VISION_START, VISION_END, IMAGE_PAD = 3, 4, 6
FORBIDDEN = [3, 4, 5, 6, 7]
GAP, GRADIENT_GAP = 1e-4, 1e-4  # what the gate lets pass
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("plain", "shared", "packed")
PLAIN = {"text_config": "sdpa", "vision_config": "sdpa"}


def build_model() -> Qwen2VLForConditionalGeneration:
    """Random and tied; vision tower, language model and embedding have about their shares of Qwen2-VL-2B."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=dict(
            model_type="qwen2_vl_text", vocab_size=18_432, hidden_size=512, intermediate_size=2_752,
            num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048,
            tie_word_embeddings=True, initializer_range=0.05, bos_token_id=1, eos_token_id=2,
            rope_parameters={"rope_type": "default", "type": "mrope", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
        ),
        vision_config=dict(
            depth=10, embed_dim=448, hidden_size=512, num_heads=7, mlp_ratio=4, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, in_channels=3, initializer_range=0.05,
        ),
        image_token_id=IMAGE_PAD, video_token_id=7, vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config).train()


class Encoder:
    """Noise for images: a prompt's seed makes its pixels and its text."""

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        draw = torch.Generator().manual_seed(prompt.seed)
        patches = SIDE // 14
        image = [VISION_START, *[IMAGE_PAD] * (patches // 2) ** 2, VISION_END]
        text = torch.randint(100, 18_000, (TEXT_TOKENS - 3,), generator=draw).tolist()
        pixels = torch.randn(patches**2, 1176, generator=draw)
        return EncodedPrompt([1, *image, *text], pixels, torch.tensor([[1, patches, patches]]))


ENCODER = Encoder()


def build_groups() -> list[list[TrainingSample]]:
    draw = torch.Generator().manual_seed(0)
    groups = []
    for image in range(IMAGES):
        prompt = Prompt(f"train/0/{image}", f"{image}", b"", "", "", image)
        tokens = ENCODER.encode(prompt).token_ids
        completions = torch.randint(100, 18_000, (GROUP_SIZE, COMPLETION_TOKENS), generator=draw).tolist()
        groups.append(
            [TrainingSample(prompt, tokens, own, [-1.0] * len(own), 1.0, 1.0 / len(own), 0) for own in completions]
        )
    return groups


class Sides:
    """The ways to compute a step's log-probabilities, all with the same weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = build_model().to(dtype)
        self.policy = PolicyModel(self.model, FORBIDDEN, temperature=1.0)
        self.groups = build_groups()
        joined = [sample for group in self.groups for sample in group]
        # What a step reads is made ready beforehand: neither side's preprocessing is measured.
        encoded = {sample.prompt.prompt_id: ENCODER.encode(sample.prompt) for sample in joined}
        self.encoder = ENCODER
        self.encoder.encode = lambda prompt: encoded[prompt.prompt_id]  # type: ignore[method-assign]
        self.batches = {
            "shared": [collate(group, self.encoder, self.policy.prompt_positions) for group in self.groups],
            "packed": [collate(joined, self.encoder, self.policy.prompt_positions)],
        }

    def forwards(self, side: str) -> list[Callable[[], Tensor]]:
        """A function for each forward of a step; it returns the log-probabilities of its completions' tokens."""
        if side == "plain":
            return [
                lambda group=group: torch.cat(plain_logprobs(self.model, group, self.encoder, FORBIDDEN, 1.0))
                for group in self.groups
            ]
        return [lambda batch=batch: self.policy(**batch.inputs())[0] for batch in self.batches[side]]

    def use(self, side: str) -> None:
        self.model.set_attn_implementation(PLAIN if side == "plain" else hardware("cpu").attention)

    def step(self, side: str) -> Tensor:
        """Forward and backward of all groups; gradients add up. Returns the log-probabilities."""
        self.use(side)
        logprobs = []
        for forward in self.forwards(side):
            logprobs.append(forward())
            (logprobs[-1] * self.factors(len(logprobs[-1]))).sum().backward()
        return torch.cat([one.detach() for one in logprobs])

    @staticmethod
    def factors(tokens: int) -> Tensor:
        """Another one for each token of a group, so that no error can hide in a sum."""
        own = torch.linspace(-1, 2, GROUP_SIZE * COMPLETION_TOKENS)
        return own.repeat(tokens // len(own))

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


# Stages, each in a process of its own


def gate() -> dict[str, Any]:
    sides = Sides(torch.float32)
    plain = sides.step("plain")
    expected = sides.gradients()
    result: dict[str, Any] = {"logprob_spread": float(plain.std())}
    for side in ("shared", "packed"):
        sides.clear()
        gap = float((sides.step(side) - plain).abs().max())
        gradients = {
            name: float((found - expected[name]).norm() / expected[name].norm())
            for name, found in sides.gradients().items()
        }
        worst = max(gradients, key=gradients.__getitem__)
        result[side] = {"logprob_gap": gap, "gradient_gap": gradients[worst], "worst_gradient": worst}
        if gap > GAP or gradients[worst] > GRADIENT_GAP:
            raise SystemExit(f"{side} computes something else than plain: {result[side]}")
    return result


def times(dtype: torch.dtype, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each repeat: `result["clock"][side]` and `result["cpu"][side]`."""
    sides = Sides(dtype)
    clocks = {"clock": time.perf_counter, "cpu": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {name: {side: [] for side in SIDES} for name in clocks}
    for repeat in range(-1, repeats):  # the first is not counted
        for side in SIDES:
            sides.clear()
            started = {name: clock() for name, clock in clocks.items()}
            sides.step(side)
            took = {name: clock() - started[name] for name, clock in clocks.items()}
            print(f"  {dtype} {side} {took['clock']:.2f} s, CPU {took['cpu']:.2f} s", flush=True)
            if repeat >= 0:
                for name in clocks:
                    seconds[name][side].append(took[name])
    return seconds


def memory(side: str, dtype: torch.dtype) -> dict[str, float]:
    """MiB of one forward and its backward, without warm-up."""
    sides = Sides(dtype)
    for parameter in sides.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    sides.use(side)
    forward = sides.forwards(side)[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    logprobs = forward()
    (logprobs * sides.factors(len(logprobs))).sum().backward()
    return {"before": before, "peak": status("VmHWM"), "step": status("VmHWM") - before}


def status(name: str) -> float:
    """MiB, from the kernel's account of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


# Running them


def child(*stage: str) -> Any:
    """Run a stage in a process of its own; its last line is its result."""
    process = subprocess.Popen([sys.executable, __file__, "--stage", *stage], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for last in process.stdout:
        if not last.startswith("{"):
            print(last, end="", flush=True)
    if process.wait():
        raise SystemExit(f"stage {' '.join(stage)} failed")
    return json.loads(last)


def row_tokens() -> dict[str, int]:
    """What each side reads of the four groups: tokens of the language model, and patches of the vision tower."""
    groups = build_groups()
    plain = sum(len(one.prompt_token_ids) + len(one.token_ids) for group in groups for one in group)
    shared = sum(len(group[0].prompt_token_ids) + sum(len(one.token_ids) - 1 for one in group) for group in groups)
    patches = IMAGES * (SIDE // 14) ** 2
    return {
        "plain_tokens": plain, "shared_tokens": shared,
        "plain_patches": patches * GROUP_SIZE, "shared_patches": patches,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Versions, and the machine in general words."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(cpu.split())
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="others keep their results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    if arguments.stage:
        name, *rest = arguments.stage
        match name:
            case "gate":
                result: Any = gate()
            case "time":
                result = times(DTYPES[rest[0]], int(rest[1]))
            case _:
                result = memory(rest[0], DTYPES[rest[1]])
        print(json.dumps(result))
        return

    tokens = row_tokens()
    token_ratio = tokens["plain_tokens"] / tokens["shared_tokens"]
    patch_ratio = tokens["plain_patches"] / tokens["shared_patches"]
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    results |= {
        "parameters": sum(parameter.numel() for parameter in build_model().parameters()),
        "rows": tokens | {"token_ratio": token_ratio, "patch_ratio": patch_ratio},
    }
    print(f"{results['parameters'] / 1e6:.1f} million parameters, {torch.get_num_threads()} threads")
    print(f"tokens {token_ratio:.2f} times fewer, patches {patch_ratio:.2f} times", flush=True)
    results["gate"] = child("gate")
    print(f"gate: {results['gate']}", flush=True)
    for dtype in arguments.dtypes:
        seconds = child("time", dtype, str(arguments.repeats))
        mib = {side: child("memory", side, dtype) for side in SIDES}
        results[dtype] = {
            "machine": machine(),
            "seconds": seconds,
            "time_ratio": {
                clock: {side: statistics.median(own["plain"]) / statistics.median(own[side]) for side in SIDES}
                for clock, own in seconds.items()
            },
            "memory_mib": mib,
            "memory_ratio": mib["plain"]["step"] / mib["shared"]["step"],
        }
        for clock, by_side in seconds.items():
            for side, own in by_side.items():
                ratio = results[dtype]["time_ratio"][clock][side]
                print(
                    f"{dtype} {clock:5} {side:6} {statistics.median(own):7.2f} s ({min(own):.2f} to {max(own):.2f})  "
                    f"{ratio:5.2f} times as fast, {ratio / token_ratio:.2f} of the token ratio",
                    flush=True,
                )
        print(f"{dtype} memory of a group: {results[dtype]['memory_ratio']:.2f} times less: {mib}", flush=True)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
