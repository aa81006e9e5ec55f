"""Check on a GPU that vLLM's log-probabilities agree with the learner's model.

    python engine.py tiny            the demo's model
    python engine.py shapes FOLDER   Qwen2-VL-2B's shapes, in the folder that learner.py built
    EAGER=1 python engine.py ...     without torch.compile and CUDA graphs, in case those fail

Run in the project's root. One JSON object a line; the last line is `N passed, N failed`.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ON_GPU = ["cluster.device=cuda", "generators.gpus=0.5", "learners.gpus=0.5", "learners.count=1"]
results: list[bool] = []


def report(name: str, passed: bool | None = None, **values: Any) -> None:
    """Print one result as JSON. Without `passed` it is a measurement."""
    shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"check": name, **({} if passed is None else {"passed": passed}), **shown}), flush=True)
    if passed is not None:
        results.append(passed)


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


def eagerly() -> None:
    import vllm

    whole = vllm.LLM
    vllm.LLM = lambda **options: whole(**{**options, "enforce_eager": True})


def engine(path: str, config: Any, prompts: list[Any], images: Any) -> None:
    from rft_cluster.algorithm import load_algorithm
    from rft_cluster.common.hardware import hardware
    from rft_cluster.generator.generator import Generator
    from rft_cluster.generator.vllm_options import EngineOptions
    from rft_cluster.learner.collate import collate
    from rft_cluster.learner.prompt_cache import PromptCache
    from rft_cluster.messages import Sampling
    from rft_cluster.model.encoder import PromptEncoder
    from rft_cluster.model.policy import load_policy

    devices = hardware("cuda", shares_gpus=True)
    before, began = free_gib(), time.perf_counter()
    generator = Generator(EngineOptions.of_run(path, config), images)
    report("engine started", seconds=time.perf_counter() - began, held_gib=before - free_gib())
    generator.serve_checkpoint(0)

    sampling = Sampling(8, 1.0, config.sampling.max_tokens, 0)
    generator.generate(prompts, sampling, 0)
    began = time.perf_counter()
    groups = generator.generate(prompts, sampling, 0)
    seconds = time.perf_counter() - began
    completions = [completion for group in groups for completion in group.completions]
    tokens = sum(len(completion.token_ids) for completion in completions)
    report("generated", len(completions) == 8 * len(prompts) and all(c.policy_version == 0 for c in completions),
           tokens=tokens, tokens_per_second=tokens / seconds, example=completions[0].text[:120])  # fmt: skip

    model = config.model
    encoder = PromptEncoder(path, model.min_pixels, model.max_pixels)
    encoded = PromptCache(encoder, images, capacity=0)
    policy = load_policy(path, model, devices.attention, encoder.forbidden_token_ids, 1.0)
    for parameter in policy.parameters():  # like FSDP: parameters only, not the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    policy.cuda()
    total = 0.0
    for group in groups:
        samples = load_algorithm(config).samples([group], [[1.0] * 8])
        batch = collate(samples, encoded, policy.prompt_positions).to(torch.device("cuda"))
        with torch.no_grad():
            logprobs, _ = policy(**batch.inputs())
        total += float((logprobs - batch.generator_logprobs).abs().sum())
    report("log-probabilities of engine and learner", total / tokens < 0.05, gap_nats=total / tokens)

    del policy
    torch.cuda.empty_cache()
    held = free_gib()
    generator.sleep()
    report("sleep", free_gib() - held > 0.8 * config.generators.gpu_memory * 70, given_back_gib=free_gib() - held)
    generator.wake_up(["weights"])
    generator.wake_up(["kv_cache"])
    report("wake_up", free_gib() < held + 2, free_gib=free_gib())


if __name__ == "__main__":
    from rft_cluster.config import load_config
    from rft_cluster.generator.vllm_options import environment
    from rft_cluster.prompts import make_prompts

    os.environ.update(environment("cuda"))
    what, *rest = sys.argv[1:]
    if os.environ.get("EAGER"):
        eagerly()
    if what == "tiny":
        from rft_cluster.run.task import base_model_path, prepare

        config = load_config("digits", [*ON_GPU, "generators.gpu_memory=0.3"])
        task = prepare(config)
        prompts = make_prompts(task.dataset.train[:20], task.text, "train", 0, 0)
        engine(base_model_path(config, task), config, prompts, task.dataset.images)
    else:
        from benchmarks.true_shapes import images, prompt

        config = load_config("flower102_1gpu", [f"model.path={Path(rest[0])}"])
        one = prompt()
        prompts = [type(one)(f"train/0/{i}", one.example, one.text, i) for i in range(16)]
        engine(rest[0], config, prompts, images())
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not all(results))
