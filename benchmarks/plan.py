"""The plan against what processes really use: GiB of a learner at the 2B's true widths, and seconds of the digits.

    python -m benchmarks.plan [--layers 4] [--blocks 4] [--kinds plain,again,lora]      12 GiB of memory

`memory`: a real learner (FSDP2 with one rank, BF16 on FP32 masters, reference, AdamW) with all widths of
Qwen2-VL-2B-Instruct and few layers, in a process of its own, trains on two micro-batches of two groups. Resident
memory is compared with the plan, by part: after loading (weights, reference), after an update (moments), what autograd
keeps of a forward, and the peak of the second update. `again`: gradient checkpointing. `lora`: adapters on a BF16 base.

`seconds`: the digits' run, its phases' medians beside the plan's, with this machine's rates as a card.
"""

import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import in_a_process, machine, parsed, read_result, write_result
from benchmarks.learner_forward import status
from benchmarks.models import TRUE_PIXELS, shorter_config, true_model
from benchmarks.true_shapes import image, prompt
from rft_cluster.common.hardware import openmp_environment
from rft_cluster.config import Config, load_config
from rft_cluster.learner.collate import collate
from rft_cluster.learner.learner import Learner
from rft_cluster.learner.packing import split_work
from rft_cluster.messages import Prompt, TrainingSample
from rft_cluster.model.folder import read_shapes
from rft_cluster.model.image_size import PromptLength
from rft_cluster.plan.cards import this_machine
from rft_cluster.plan.memory import activations, compute_size, learner_parts, state, total
from rft_cluster.plan.seconds import step_seconds
from rft_cluster.plan.work import fullest_row
from rft_cluster.run.preflight import check_task
from rft_cluster.run.task import prepare

MIB, GIB = 2**20, 2**30
GROUPS, GROUP_SIZE, LENGTH = 4, 8, 53  # two groups a micro-batch
LIMIT = 2100  # tokens of a micro-batch
KINDS = {
    "plain": [],
    "again": ["learners.gradient_checkpointing=true"],
    "lora": ["model.lora.rank=64", "model.lora.alpha=128"],
}
# Freed memory goes back to the system at once, so that resident memory is what is in use.
HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
DIGITS_STEPS = 30


# Memory


def memory(folder: Path, kind: str) -> dict[str, dict[str, float]]:
    """GiB planned and measured, by part."""
    before = status("VmRSS")
    config = learner_config(folder, kind)
    shapes = read_shapes(folder)
    pictures = {prompt().example.image.sha256: image()}
    learner = Learner(str(folder), config, 0, 2, pictures)
    learner.join(learner.offer_rendezvous(["127.0.0.1"]), ["127.0.0.1"])
    found = {"weights and reference": resident() - before}
    samples = make_samples(learner)
    work = split_work(samples, 1, 1, LIMIT)[0]
    assert [len(update) for update in work] == [GROUPS // 2]
    learner.update(work, 0)
    found["and moments, after an update"] = resident() - before

    held = resident()
    batch = collate(work[0][0], learner._prompts, learner._policy.prompt_positions)
    logprobs, _ = learner._policy(**batch.inputs())
    found["kept of a forward"] = resident() - held
    logprobs.sum().backward()
    learner._optimizer.zero_grad()
    del logprobs
    held = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
    learner.update(work, 1)
    found["peak of an update"] = status("VmHWM") - before

    length = len(samples[0].prompt_token_ids)
    row = fullest_row([PromptLength(512, length - 512)] * GROUPS, GROUP_SIZE, LENGTH, LIMIT)
    assert row.tokens == batch.input_ids.shape[1] and row.keys == len(batch.layout.key_rows)
    parts, own = learner_parts(shapes, config, row, GROUPS // 2), state(shapes, config)
    kept, root = activations(shapes, config, row), compute_size(config) * shapes.root
    planned = {
        "weights and reference": own.weights + own.reference,
        "and moments, after an update": total(parts, "generate"),
        "kept of a forward": kept.text + kept.vision + root,  # the root stays gathered until the backward
        "peak of an update": total(parts, "learn"),
    }
    return {name: {"planned": planned[name] / GIB, "measured": found[name] * MIB / GIB} for name in planned}


def resident() -> float:
    """MiB in use now."""
    gc.collect()
    return status("VmRSS")


def learner_config(folder: Path, kind: str) -> Config:
    low, high = TRUE_PIXELS
    return load_config("digits", [
        f"model.path={folder}", f"model.min_pixels={low}", f"model.max_pixels={high}", "model.max_prompt_tokens=1216",
        f"schedule.prompts_per_step={GROUPS}", "learners.count=1", "learners.prompt_cache_gib=0",
        f"learners.micro_batch_tokens={LIMIT}", *KINDS[kind],
    ])  # fmt: skip


def make_samples(learner: Learner) -> list[TrainingSample]:
    """The step's groups: the same picture of noise, and random completions."""
    draw = torch.Generator().manual_seed(0)
    asked = [Prompt(f"train/0/{index}", prompt().example, prompt().text, index) for index in range(GROUPS)]
    tokens = learner._prompts.encode(asked[0]).token_ids
    completions = torch.randint(300, 2000, (GROUPS, GROUP_SIZE, LENGTH), generator=draw).tolist()
    return [
        TrainingSample(one, tokens, own, [-1.0] * LENGTH, (-1.0) ** index, 1 / (GROUPS * GROUP_SIZE * LENGTH))
        for one, group in zip(asked, completions, strict=True)
        for index, own in enumerate(group)
    ]


# Seconds


def seconds() -> dict[str, Any]:
    """The digits' phases: the plan's, and the medians of a real run's steps after the first ten."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *("run.seed=0", f"schedule.steps={DIGITS_STEPS}", "schedule.evaluate_every=0"),
            *("data.test=0", f"run.folder={folder}"),
        ]  # fmt: skip
        command = [sys.executable, "-m", "rft_cluster.launch", "--config", "digits", *overrides]
        subprocess.run(command, check=True)
        lines = (Path(folder) / "digits" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines][10:]
        config = load_config("digits", overrides)
        checked = check_task(config, prepare(config), None)
    return {"steps": len(steps), **compared(config, checked, steps)}


def compared(config: Config, checked: Any, steps: list[dict[str, Any]]) -> dict[str, Any]:
    card = this_machine(config.cluster.dtype)
    length = statistics.fmean(step["completion_tokens"] for step in steps)
    (prompt_length,) = set(checked.prompts["train"])
    planned = step_seconds(checked.shapes, config, card, prompt_length, length)
    phases = ("generate", "learn", "transfer")
    measured = {phase: statistics.median(step[f"seconds/{phase}"] for step in steps) for phase in phases}
    return {
        "card": asdict(card),
        "completion_tokens": length,
        "phases": {phase: {"planned": getattr(planned, phase), "measured": measured[phase]} for phase in phases},
        "step": {"planned": planned.step, "measured": math.fsum(measured.values())},
    }


def main() -> None:
    options = parsed(__doc__, layers=4, blocks=4, kinds=list(KINDS), stages=["memory", "seconds"])
    result: dict[str, Any] = read_result("plan") or {}
    result["machine"] = machine()
    if "memory" in options.stages:
        config = shorter_config(options.layers, options.blocks)
        with tempfile.TemporaryDirectory() as folder:
            true_model(Path(folder), config=config)
            result["layers"], result["blocks"] = options.layers, options.blocks
            for kind in options.kinds:
                environment = {**HONEST, **openmp_environment("cpu")}
                found = in_a_process(memory, Path(folder), kind, environment=environment)
                result.setdefault("memory", {})[kind] = found
                print(kind, json.dumps(found, indent=1), flush=True)
                write_result("plan", result)
    if "seconds" in options.stages:
        result["seconds"] = seconds()
        print(json.dumps(result["seconds"], indent=1), flush=True)
        write_result("plan", result)


if __name__ == "__main__":
    main()
