"""The plan against what processes really use: GiB of a learner at the 2B's true widths, seconds of two small runs.

    python -m benchmarks.plan [--layers 4] [--blocks 4] [--stages memory,learn,digits]      14 GiB of memory

`memory`: a real learner (FSDP2 with one rank, BF16 on FP32 masters, reference, AdamW) with all widths of
Qwen2-VL-2B-Instruct and few layers, in a process of its own, trains on two micro-batches of two groups. Resident
memory is compared with the plan, by part: after loading (weights, reference), after an update (moments), what autograd
keeps of a forward, and the peak of the second update; with all weights, gradient checkpointing, adapters.

`learn`: an update of the 87 million parameters of `models.py` on one thread, in processor seconds, beside the plan's
for a card with the rates of that thread.

`digits`: the digits' run by the clock, its phases' medians beside the plan's, with this machine's rates as a card.
Other programs on the machine count here.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CACHE, in_a_process, machine, memory_of, parsed, read_result, write_result
from benchmarks.learner_forward import status
from benchmarks.models import QUESTION, SIDES, TRUE_TOKENS, bench_images, bench_model, true_config, true_model
from benchmarks.planned import (
    GROUP_SIZE,
    GROUPS,
    KEPT,
    KINDS,
    LENGTH,
    LIMIT,
    LOADED,
    PEAK,
    UPDATED,
    case,
    learner_config,
    learner_row,
    speed_config,
)
from benchmarks.true_shapes import images, prompt
from rft_cluster.common.hardware import openmp_environment
from rft_cluster.config import load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.learner.collate import collate
from rft_cluster.learner.learner import Learner
from rft_cluster.learner.packing import split_work
from rft_cluster.messages import Example, ImageRef, Prompt, TrainingSample
from rft_cluster.model.families.qwen2_vl import QWEN2_VL
from rft_cluster.model.folder import read_shapes
from rft_cluster.model.image_size import PromptLength
from rft_cluster.plan.cards import this_machine
from rft_cluster.plan.seconds import share
from rft_cluster.run.preflight import check_task
from rft_cluster.run.task import prepare

# Freed memory goes back to the system at once, so that resident memory is what is in use.
HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
DIGITS_STEPS, WARM_UP = 30, 10
GIB = 2**30


def memory(folder: Path, kind: str) -> dict[str, float]:
    """GiB of a learner by part, and the tokens of its prompts."""
    before = resident()
    low, high = TRUE_TOKENS
    config = learner_config(
        *(kind, f"model.path={folder}", f"model.min_image_tokens={low}", f"model.max_image_tokens={high}"),
        "model.max_prompt_tokens=1216",
    )
    learner = alone(folder, images(QWEN2_VL), config, threads=2)
    found = {LOADED: resident() - before}
    question = prompt(QWEN2_VL)
    asked = [Prompt(f"train/0/{index}", question.example, question.text, index) for index in range(GROUPS)]
    samples = make_samples(learner, asked, GROUP_SIZE, LENGTH)
    work = split_work(samples, 1, 1, LIMIT)[0]
    learner.update(work, 0)
    found[UPDATED] = resident() - before

    held = resident()
    batch = collate(work[0][0], learner._prompts, learner._policy.prompt_positions)
    logprobs, _ = learner._policy(**batch.inputs())
    found[KEPT] = resident() - held
    logprobs.sum().backward()
    learner._optimizer.zero_grad()
    del logprobs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
    learner.update(work, 1)
    found[PEAK] = status("VmHWM") / 1024 - before

    tokens, row = len(samples[0].prompt_token_ids), learner_row(len(samples[0].prompt_token_ids))
    assert (row.tokens, row.keys) == (batch.input_ids.shape[1], len(batch.layout.key_rows)), "not the planned row"
    return {**found, "prompt_tokens": tokens}


def resident() -> float:
    """GiB in use now."""
    gc.collect()
    return status("VmRSS") / 1024


def alone(folder: Path, pictures: dict[str, bytes], config: Any, threads: int) -> Learner:
    """A learner that is the only rank."""
    learner = Learner(str(folder), config, 0, threads, pictures)
    learner.join(learner.offer_rendezvous(["127.0.0.1"]), ["127.0.0.1"])
    return learner


def make_samples(learner: Learner, asked: list[Prompt], group_size: int, length: int) -> list[TrainingSample]:
    """A step's groups with random completions of `length` tokens."""
    draw = torch.Generator().manual_seed(0)
    weight = 1 / (len(asked) * group_size * length)
    samples = []
    for one in asked:
        tokens = learner._prompts.encode(one).token_ids
        for index, own in enumerate(torch.randint(300, 2000, (group_size, length), generator=draw).tolist()):
            samples.append(TrainingSample(one, tokens, own, [-1.0] * length, (-1.0) ** index, weight, index))
    return samples


def learn(side: int) -> dict[str, Any]:
    """Processor seconds of an update with images of `side` x `side` pixels."""
    folder = bench_model(CACHE)
    config = speed_config(f"model.path={folder}")
    files = sorted(bench_images(CACHE, side).rglob("*.png"))[: config.schedule.prompts_per_step]
    pictures = {image_sha256(file.read_bytes()): file.read_bytes() for file in files}
    learner = alone(folder, pictures, config, threads=1)
    text = QUESTION.read_text().strip()
    asked = [
        Prompt(f"train/0/{index}", Example(ImageRef(str(index), sha256), "rose"), text, index)
        for index, sha256 in enumerate(pictures)
    ]
    samples = make_samples(learner, asked, config.sampling.group_size, config.sampling.max_tokens)
    work = split_work(samples, 1, 1, config.learners.micro_batch_tokens)[0]
    learner.update(work, 0)
    started = time.process_time()
    learner.update(work, 1)
    seconds = time.process_time() - started
    tokens = (side // 28) ** 2
    own = PromptLength(tokens, len(samples[0].prompt_token_ids) - tokens)
    thread = share(this_machine("bfloat16"), config, os.cpu_count() or 1)
    return {"seconds": seconds, **case(read_shapes(folder), thread, own)}


def digits() -> dict[str, Any]:
    """Medians of the phases of a real run's steps, after a warm-up, and GiB of all its processes at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *("run.seed=0", f"schedule.steps={DIGITS_STEPS}", "schedule.evaluate_every=0"),
            *("data.test=0", f"run.folder={folder}"),
        ]
        command = [sys.executable, "-m", "rft_cluster.launch", "--config", "digits", *overrides]
        run, peak = subprocess.Popen(command), 0
        while run.poll() is None:
            peak = max(peak, memory_of(run.pid))
            time.sleep(1)
        lines = (Path(folder) / "digits" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines][WARM_UP:]
        config = load_config("digits", overrides)
        checked = check_task(config, prepare(config), None)
    (own,) = set(checked.prompts["train"])
    phases = {
        phase: statistics.median(step[f"seconds/{phase}"] for step in steps)
        for phase in ("generate", "learn", "transfer")
    }
    return {
        "seconds": {
            **phases,
            "a step": statistics.median(step["tokens"] / step["tokens_per_second"] for step in steps),
        },
        "completion_tokens": statistics.fmean(step["completion_tokens"] for step in steps),
        "dtype": config.cluster.dtype,
        "gib": peak / GIB,
        **case(checked.shapes, this_machine(config.cluster.dtype), own),
    }


def main() -> None:
    options = parsed(__doc__, layers=4, blocks=4, kinds=list(KINDS), stages=["memory", "learn", "digits"])
    result: dict[str, Any] = read_result("plan") or {}
    result["machine"] = machine()
    if "memory" in options.stages:
        with tempfile.TemporaryDirectory() as folder:
            true_model(Path(folder), config=true_config(layers=options.layers, blocks=options.blocks))
            environment = {**HONEST, **openmp_environment("cpu")}
            found = {kind: in_a_process(memory, Path(folder), kind, environment=environment) for kind in options.kinds}
        result["memory"] = {"layers": options.layers, "blocks": options.blocks, "gib": found}
    if "learn" in options.stages:
        environment = {**openmp_environment("cpu"), "OMP_NUM_THREADS": "1"}
        result["learn"] = {side: in_a_process(learn, side, environment=environment) for side in SIDES}
    if "digits" in options.stages:
        result["digits"] = digits()
    write_result("plan", result)
    print(json.dumps({name: result.get(name) for name in options.stages}, indent=1))


if __name__ == "__main__":
    main()
