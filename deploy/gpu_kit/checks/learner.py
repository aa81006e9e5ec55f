"""Check that the learner computes the same on a GPU as on a CPU, and measure its memory.

    python learner.py attention            varlen attention against SDPA in FP32, forward and backward, 2B's heads
    python learner.py tiny [DEVICE [NAME]] three updates of the tiny model: a CPU in FP32 against DEVICE (cuda) in BF16,
                                           plain, offloaded, checkpointed, LoRA; a checkpoint written and read back
    python learner.py shapes FOLDER        Qwen2-VL-2B's shapes with random weights: FP32 masters, Adam, reference

Run in the project's root. One JSON object a line; the last line is `N passed, N failed`.
"""

import json
import math
import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

TINY = ["learners.count=1", "learners.micro_batch_tokens=4096", "optimizer.warmup_steps=0"]
ON_GPU = ["cluster.device=cuda", "generators.gpus=0.5", "learners.gpus=0.5"]
results: list[bool] = []


def report(name: str, passed: bool | None = None, **values: Any) -> None:
    """Print one result as JSON. Without `passed` it is a measurement."""
    shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"check": name, **({} if passed is None else {"passed": passed}), **shown}), flush=True)
    if passed is not None:
        results.append(passed)


def attention() -> None:
    from rft_cluster.model.shared_prefix import pack_layout, sdpa_segments, varlen_segments

    layout = pack_layout([588, 301], [64, 1, 33, 0, 64, 17], [0, 0, 0, 0, 1, 1])
    rows = int(layout.query_starts[-1])
    for heads, key_heads, size in ((12, 2, 128), (4, 2, 32), (28, 4, 128)):
        given = [torch.randn(rows, count, size).bfloat16() for count in (heads, key_heads, key_heads)]
        out_gradient = torch.randn(rows, heads, size).bfloat16()
        wanted_in = [tensor.float().requires_grad_() for tensor in given]
        wanted = sdpa_segments(*wanted_in, layout, size**-0.5)
        wanted.backward(out_gradient.float())
        found_in = [tensor.cuda().requires_grad_() for tensor in given]
        found = varlen_segments(*found_in, layout.to(torch.device("cuda")), size**-0.5)
        found.backward(out_gradient.cuda())
        pairs = zip(("output", "query", "key", "value"), (found, *(t.grad for t in found_in)),
                    (wanted, *(t.grad for t in wanted_in)), strict=True)  # fmt: skip
        errors = {name: float((one.cpu().float() - other).norm() / other.norm()) for name, one, other in pairs}
        report(
            f"attention {heads}/{key_heads} heads of {size}", all(error < 1.5e-2 for error in errors.values()), **errors
        )


def made_up_samples(
    config: Any, encoder: Any, images: Any, prompts: list[Any], group_size: int, tokens: int
) -> list[Any]:
    from rft_cluster.algorithm import load_algorithm
    from rft_cluster.messages import Completion, Group

    draw = torch.Generator().manual_seed(0)
    never = {*encoder.forbidden_token_ids, *encoder.stop_token_ids}
    usual = torch.tensor([token for token in range(len(encoder.tokenizer)) if token not in never])
    groups = []
    for prompt in prompts:
        completions = [
            Completion(usual[torch.randint(len(usual), (tokens - i % 3,), generator=draw)].tolist(),
                       [-4.0] * (tokens - i % 3), "", "stop", 0)
            for i in range(group_size)
        ]  # fmt: skip
        groups.append(
            Group(prompt, encoder.encode(prompt.text, images[prompt.example.image.sha256]).token_ids, completions)
        )
    advantages = [torch.randn(group_size, generator=draw).tolist() for _ in groups]
    return load_algorithm(config).samples(groups, advantages)


def digests_of(policy: Any) -> dict[str, int]:
    """Digests of the policy's present weights."""
    from rft_cluster.weights.source import PolicyWeights

    source = PolicyWeights(policy)
    for _ in source:
        pass
    return source.digests()


def updates(
    answers: Any, path: str, config: Any, images: Any, prompts: list[Any], group: tuple[int, int], keep: bool
) -> None:
    """Run three updates of one learner, in a process of its own, and report the results through `answers`."""
    from transformers.utils import logging

    from rft_cluster.learner.learner import Learner
    from rft_cluster.learner.packing import split_work
    from rft_cluster.model.encoder import PromptEncoder

    logging.disable_progress_bar()
    torch.manual_seed(0)  # adapters are initialised randomly
    encoder = PromptEncoder(path, config.model.min_pixels, config.model.max_pixels)
    samples = made_up_samples(config, encoder, images, prompts, *group)
    (work,) = split_work(samples, 1, 1, config.learners.micro_batch_tokens)
    learner = Learner(path, config, 0, threads=4, images=images)
    with tempfile.TemporaryDirectory() as folder:
        learner.join(f"file://{folder}/rendezvous", ["127.0.0.1"])
        said = []
        for step in range(3):
            began = time.perf_counter()
            stats = learner.update(work, step)
            said.append({**asdict(stats), "seconds": time.perf_counter() - began})
        same = None
        if keep:
            (Path(folder) / "checkpoint").mkdir()
            count = learner.save_checkpoint(f"{folder}/checkpoint")
            before = digests_of(learner._policy)
            learner.update(work, 3)
            changed = digests_of(learner._policy) != before
            learner.restore_checkpoint(f"{folder}/checkpoint", count)
            same = changed and digests_of(learner._policy) == before
    answers.put({"updates": said, "restored": same, "micro_batches": sum(len(update) for update in work)})
    torch.distributed.destroy_process_group()


def in_a_process(*arguments: Any) -> dict[str, Any]:
    processes = multiprocessing.get_context("spawn")
    answers = processes.SimpleQueue()
    process = processes.Process(target=updates, args=(answers, *arguments))
    process.start()
    while process.is_alive() and answers.empty():
        time.sleep(0.1)
    if answers.empty():
        raise SystemExit(f"the learner's process ended with {process.exitcode}")
    answer = answers.get()
    process.join()
    return answer


def tiny(device: str, only: str = "") -> None:
    from rft_cluster.config import load_config
    from rft_cluster.prompts import make_prompts
    from rft_cluster.run.task import base_model_path, prepare

    config = load_config("digits", [*TINY, "cluster.dtype=float32"])
    task = prepare(config)
    path = base_model_path(config, task)
    prompts = make_prompts(task.dataset.train[:6], task.text, "train", 0, 0)
    expected = in_a_process(path, config, task.dataset.images, prompts, (8, 12), True)
    report("tiny cpu FP32", expected["restored"], losses=[u["loss"] for u in expected["updates"]])
    gpu = ON_GPU if device == "cuda" else ["cluster.dtype=bfloat16"]
    variants = {
        "plain": [],
        "offloaded": ["learners.cpu_offload=true"],
        "checkpointed": ["learners.gradient_checkpointing=true"],
        "LoRA, frozen vision": ["model.lora.rank=16", "model.freeze_vision=true"],
    }
    for name, changes in variants.items():
        if only not in name or (device == "cpu" and name == "offloaded"):
            continue
        lora = "LoRA" in name
        reference = expected
        if lora:
            reference = in_a_process(
                path,
                load_config("digits", [*TINY, "cluster.dtype=float32", *changes]),
                task.dataset.images,
                prompts,
                (8, 12),
                False,
            )
        here = load_config("digits", [*TINY, *gpu, *changes])
        answer = in_a_process(path, here, task.dataset.images, prompts, (8, 12), name == "plain")
        # Compare only the norm of the first gradient: Adam's first steps follow signs, which rounding can flip.
        apart = [
            abs(one[key] - other[key]) / (abs(other[key]) + 1e-3)
            for i, (one, other) in enumerate(zip(answer["updates"], reference["updates"], strict=True))
            for key in ("logprob_gap", "entropy", *(() if i else ("grad_norm",)))
        ]
        finite = all(math.isfinite(u["loss"]) and not u["skipped"] for u in answer["updates"])
        last = answer["updates"][-1]
        report(f"tiny {device} BF16, {name}", finite and max(apart) < 0.05 and answer["restored"] in (None, True),
               largest_difference=max(apart), seconds=last["seconds"], memory_gib=last["memory_gib"])  # fmt: skip


def shapes(folder: Path) -> None:
    from benchmarks.models import true_model
    from benchmarks.true_shapes import images, prompt
    from rft_cluster.config import load_config

    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        true_model(folder)
        report("2B built", seconds=time.perf_counter() - began)
    one = prompt()
    prompts = [type(one)(f"train/0/{i}", one.example, one.text, i) for i in range(4)]
    for name, limit in (("flower102_1gpu", 75.0), ("flower102_24gb", 22.0)):
        config = load_config(name, [f"model.path={folder}"])
        answer = in_a_process(str(folder), config, images(), prompts, (8, 64), False)
        last = answer["updates"][-1]
        report(f"2B {name}: 32 completions of 64 tokens", math.isfinite(last["loss"]) and last["memory_gib"] < limit,
               first_seconds=answer["updates"][0]["seconds"], seconds=last["seconds"],
               micro_batches=answer["micro_batches"], memory_gib=last["memory_gib"],
               activation_gib=last["activation_gib"], grad_norm=last["grad_norm"])  # fmt: skip


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "attention":
        attention()
    elif what == "tiny":
        tiny(*(rest or ["cuda"]))
    else:
        shapes(Path(rest[0]))
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not all(results))
