"""A published model's true shapes through this project on a CPU, with random weights: no download, no GPU.

    python -m benchmarks.true_shapes --folder /tmp/true_shapes                          Qwen2-VL-2B-Instruct
    python -m benchmarks.true_shapes --folder /tmp/true_shapes --family qwen3_vl        Qwen3-VL-2B-Instruct
    python -m benchmarks.true_shapes --folder /tmp/true_shapes --family qwen2_5_vl --stages build,names
    python -m benchmarks.true_shapes --folder /tmp/true_shapes --family qwen2_5_vl --layers 12   of Qwen2.5-VL-3B's 36

Four stages, each in a process of its own, so that the memory of one is free for the next:

    build      write a checkpoint folder like the published one: configuration, key layout, shards, special token ids
    names      compare the learner's tensor names and shapes with the published ones and with those that vLLM loads
    transfer   learner -> shared memory -> vLLM, verified, twice; then a real group of 8 completions is sampled
    step       one GRPO step on that group through collate, PolicyModel and grpo_loss

The weights are noise: this shows that billions of parameters in these shapes pass through the code, how long it takes
and how much memory; nothing about quality. Memory is the proportional set size (PSS) of a stage's processes, in which
shared pages count once. The transfer takes 20 GiB for 2.2 billion parameters; `--layers` leaves text layers out. The
folder is removed at the end unless `--keep` is given.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from operator import sub
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import in_a_process, machine, memory_of, parsed, read_result, write_result
from benchmarks.models import TRUE, TRUE_TOKENS, empty_model, published_layout, true_config, true_model, true_question
from rft_cluster.common.hardware import hardware
from rft_cluster.config import AlgorithmSection, Config, load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.messages import Completion, Example, ImageRef, Prompt, Sampling, TrainingSample
from rft_cluster.model.families.family import Family
from rft_cluster.model.folder import read_family

GIB, GB = 2**30, 1e9
IMAGE_TOKENS = (32, 16)
GROUP_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 1216, 64
SEED = 0


def published_name(name: str, family: Family) -> str:
    """A transformers parameter's name in the published checkpoint."""
    if family.model_type == "qwen3_vl":
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def layout_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of the folder's model, by transformers' class."""
    family = read_family(folder)
    named = empty_model(read_config(folder)).named_parameters()
    return {published_name(name, family): tuple(parameter.shape) for name, parameter in named}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def image_size(family: Family) -> tuple[int, int]:
    """Width and height of the largest image."""
    return IMAGE_TOKENS[0] * family.side, IMAGE_TOKENS[1] * family.side


def image(family: Family) -> bytes:
    """A picture of noise of exactly the largest size."""
    return noise_image(image_size(family), SEED)


def noise_image(size: tuple[int, int], seed: int) -> bytes:
    """A picture of noise, as PNG. `size`: width, height."""
    from PIL import Image

    width, height = size
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    buffer = BytesIO()
    Image.fromarray(noise.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def prompt(family: Family) -> Prompt:
    """The question about it."""
    example = Example(ImageRef("noise/0", image_sha256(image(family))), "rose")
    return Prompt("train/0/0", example, true_question(), SEED)


def images(family: Family) -> dict[str, bytes]:
    return {prompt(family).example.image.sha256: image(family)}


def layout_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The same, as the folder's files say it."""
    from safetensors import safe_open

    written: dict[str, tuple[int, ...]] = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            written |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return written


# Stage 1


def build(folder: Path) -> dict[str, Any]:
    """Write the checkpoint of the folder's config.json, and look whether it has the published names and shapes."""
    config = read_config(folder)
    true_model(folder, config=config)
    shards, written = sorted(folder.glob("*.safetensors")), layout_in(folder)
    assert written == layout_of(folder), "the folder has not the names and shapes of the published layout"
    if config == true_config():
        assert written == published_layout()
    return {
        "tensors": len(written),
        "parameters": sum(torch.Size(shape).numel() for shape in written.values()),
        "gigabytes": sum(shard.stat().st_size for shard in shards) / GB,
        "shards": len(shards),
    }


# Stage 2


def names(folder: Path) -> dict[str, Any]:
    """Compare the learner's names and shapes with the published ones, and with what vLLM loads."""
    from rft_cluster.generator.generator import Generator
    from rft_cluster.model.policy import PolicyModel
    from rft_cluster.weights.source import PolicyWeights

    family = read_family(folder)
    infos = PolicyWeights(PolicyModel(empty_model(read_config(folder)), [], 1.0)).metadata()
    exported = {info.name: info.shape for info in infos}
    assert {published_name(name, family): shape for name, shape in exported.items()} == layout_in(folder)
    assert {info.dtype for info in infos} == {torch.bfloat16}
    parameters = sum(torch.Size(shape).numel() for shape in exported.values())

    started = time.perf_counter()
    generator = Generator(EngineOptions.of_run(str(folder), run_config(folder)), images(family))
    start_seconds = time.perf_counter() - started
    found = on_engine(generator, lambda model: load_by_name(model, exported))
    return {"tensors": len(exported), "parameters": parameters, "engine_start_seconds": start_seconds, **found}


def run_config(folder: Path) -> Config:
    """The configuration of a run with the model in a folder, on CPUs."""
    low, high = TRUE_TOKENS
    return load_config("digits", [
        f"model.path={folder}", f"model.min_image_tokens={low}", f"model.max_image_tokens={high}",
        f"model.max_prompt_tokens={PROMPT_TOKENS}", f"sampling.max_tokens={COMPLETION_TOKENS}",
        "generators.cpus=2", f"generators.max_concurrent={GROUP_SIZE}",
    ])  # fmt: skip


def on_engine(generator: Any, work: Callable[[torch.nn.Module], Any]) -> Any:
    """Run `work` with the engine's model, on the engine's thread."""

    def call() -> Any:
        return generator._engine.collective_rpc(lambda worker: work(worker.weight_transfer_engine.model))[0]

    return generator._on_thread(call)


def load_by_name(model: torch.nn.Module, exported: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Reload the engine with one expanded zero for each name: are all names taken, all its parameters filled?"""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    # The shapes before the CPU build packed linear weights away, and the biases, of which vLLM keeps no such record.
    shapes = {
        f"{prefix}.{name}": tuple(parameter.shape)
        for prefix, module in model.named_modules()
        for name, parameter in {**module._parameters, **get_layerwise_info(module).restore_metadata[0]}.items()
        if parameter is not None
    }
    zero = torch.zeros(1, dtype=torch.bfloat16)
    initialize_layerwise_reload(model)
    loaded = model.load_weights((name, zero.expand(shape)) for name, shape in exported.items())
    # Layers that wait for more; those with buffers alone (tables of positions, attention scales) wait for nothing.
    waiting = {
        prefix: info.load_numel
        for prefix, module in model.named_modules()
        if (info := get_layerwise_info(module)).can_load() and any(p is not None for p in module._parameters.values())
    }
    tied = {name for name in shapes if "lm_head" in name}
    assert set(shapes) - set(loaded) <= tied, sorted(set(shapes) - set(loaded))[:5]
    assert set(loaded) <= set(shapes), sorted(set(loaded) - set(shapes))[:5]
    assert not set(waiting) - {name.rpartition(".")[0] for name in tied}, waiting
    assert sum(torch.Size(shapes[name]).numel() for name in set(shapes) - tied) == sum(
        torch.Size(shape).numel() for shape in exported.values()
    )
    other = [name for name, held in model.named_parameters() if not held.is_meta and bool(held.any())]
    assert not other, f"not overwritten: {other[:5]}"
    return {
        "engine_parameters": len(shapes),
        "engine_loaded": len(loaded),
        "engine_tied": sorted(tied),
        "example": shapes["language_model.model.layers.0.self_attn.qkv_proj.weight"],
    }


# Stage 3


def transfer(folder: Path) -> dict[str, Any]:
    """Send weights to a generator, twice, and sample a group with the second."""
    import torch.distributed as dist

    from rft_cluster.cluster.start import start_generators
    from rft_cluster.weights.shared_memory import SharedMemorySender
    from rft_cluster.weights.source import PolicyWeights

    result: dict[str, Any] = {}
    family = read_family(folder)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    (folder / "rendezvous").unlink(missing_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=0, world_size=1)
    policy = bf16_policy(folder)
    sender = SharedMemorySender(PolicyWeights(policy), one_host=True)
    offer = sender.offer(1)
    result["gigabytes"] = sum(parameter.numel() * 2 for parameter in policy.model.parameters()) / GB
    started = time.perf_counter()
    with start_generators(run_config(folder), str(folder), images(family)) as generators:
        result["engine_start_seconds"] = time.perf_counter() - started
        generators.call_all("init_weight_transfer_engine", offer.init)
        # Doubling and halving are exact: version 1 is not the folder's weights, version 2 is.
        for version, factor in ((1, 2.0), (2, 0.5)):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(factor)
            clock = [time.perf_counter()]
            sender.send()
            clock.append(time.perf_counter())
            if version == 2:
                # The memory has them now. Beside them and the engine the policy's own 4.4 GB would not fit into 24 GiB.
                for parameter in policy.parameters():
                    parameter.data = torch.empty(0)
            generators.call_all("load_weights", offer.update, version)
            clock.append(time.perf_counter())
            generators.call_all("verify_weights", version, sender.digests())
            clock.append(time.perf_counter())
            seconds = dict(
                zip(("write", "load", "verification, beside generation"), map(sub, clock[1:], clock), strict=True)
            )
            seconds["all"] = clock[2] - clock[0]
            result[f"update_{version}"] = {"seconds": seconds, "gb_per_second": result["gigabytes"] / seconds["all"]}
            print(f"  update {version}: {result[f'update_{version}']}", flush=True)
        started = time.perf_counter()
        (group,) = generators.generate([prompt(family)], Sampling(GROUP_SIZE, 1.0, COMPLETION_TOKENS), version=2)
        result["generate_seconds"] = time.perf_counter() - started
    result["prompt_tokens"] = len(group.prompt_token_ids)
    result["completion_tokens"] = sum(len(completion.token_ids) for completion in group.completions)
    # The learner's step trains on this group; its image is made again there.
    saved = {
        "prompt_token_ids": group.prompt_token_ids,
        "completions": [asdict(completion) for completion in group.completions],
    }
    (folder / "group.json").write_text(json.dumps(saved))
    dist.destroy_process_group()
    return result


def bf16_policy(folder: Path) -> Any:
    """The learner's model with BF16 masters. A real learner has FP32 ones, which need twice the memory."""
    import transformers

    from rft_cluster.model.encoder import PromptEncoder
    from rft_cluster.model.policy import PolicyModel

    family = read_family(folder)
    encoder = PromptEncoder(str(folder), run_config(folder).model)
    model = getattr(transformers, family.model_class).from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=hardware("cpu").attention, use_safetensors=True
    )
    return PolicyModel(model, encoder.forbidden_token_ids, temperature=1.0).train()


# Stage 4


def step(folder: Path) -> dict[str, Any]:
    """One GRPO step on the sampled group, in one forward: BF16 masters, gradient checkpointing, plain SGD."""
    from rft_cluster.algorithm.advantages import grpo
    from rft_cluster.algorithm.loss import grpo_loss
    from rft_cluster.learner.collate import collate
    from rft_cluster.learner.prompt_cache import PromptCache
    from rft_cluster.model.encoder import PromptEncoder
    from rft_cluster.weights.digests import tensor_digest

    torch.set_flush_denormal(True)
    family = read_family(folder)
    encoder = PromptEncoder(str(folder), run_config(folder).model)
    prompts = PromptCache(encoder, images(family), capacity=1e9)
    policy = bf16_policy(folder)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1, foreach=False)
    before = [tensor_digest(parameter.detach()) for parameter in policy.parameters()]

    saved = json.loads((folder / "group.json").read_text())
    completions = [Completion(**completion) for completion in saved["completions"]]
    (advantages,) = grpo([[float(i % 2) for i in range(len(completions))]])
    samples = [
        TrainingSample(
            *(prompt(family), saved["prompt_token_ids"], one.token_ids, one.generator_logprobs, advantage),
            weight=1.0 / (len(one.token_ids) * len(completions)),
            index=index,
        )
        for index, (one, advantage) in enumerate(zip(completions, advantages, strict=True))
    ]

    started = time.perf_counter()
    batch = collate(samples, prompts, policy.prompt_positions)
    logprobs, _ = policy(**batch.inputs())
    terms = grpo_loss(logprobs, batch, logprobs, None, AlgorithmSection(kl_beta=0.0))
    terms.loss.backward()
    seconds = time.perf_counter() - started
    without = [name for name, parameter in policy.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient: {without[:5]}"
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=False))
    assert norm > 0 and torch.isfinite(torch.tensor(norm))
    started = time.perf_counter()
    optimizer.step()
    after = [tensor_digest(parameter.detach()) for parameter in policy.parameters()]
    return {
        "completions": len(samples),
        "image_tokens": int((batch.input_ids == encoder.image_token_id).sum()),
        "tokens_forward": batch.input_ids.shape[1],
        "completion_tokens": terms.sums.tokens,
        "logprob_gap": terms.sums.logprob_gap / terms.sums.tokens,
        "grad_norm": norm,
        "forward_and_backward_seconds": seconds,
        "optimizer_and_digest_seconds": time.perf_counter() - started,
        "tensors_changed": sum(old != new for old, new in zip(before, after, strict=True)),
        "tensors": len(after),
    }


# Running the stages


def run_stage(name: str, folder: Path) -> dict[str, Any]:
    """Run a stage in a process of its own; its result with `seconds` and `peak_gib`."""
    peak = 0

    def watch(pid: int) -> None:
        nonlocal peak
        peak = max(peak, memory_of(pid))

    started = time.perf_counter()
    found = in_a_process(STAGES[name], folder, environment={}, watch=watch)
    result = {"seconds": time.perf_counter() - started, "peak_gib": peak / GIB, **found}
    print(f"{name:9} {result['seconds']:7.1f} s  peak {result['peak_gib']:5.1f} GiB", flush=True)
    return result


def main() -> None:
    options = parsed(
        __doc__, folder="", keep=False, stages=list(STAGES), name="true_shapes", family="qwen2_vl", layers=0
    )
    if not options.folder:
        raise SystemExit("--folder FOLDER is missing: 4 to 8 GB of weights are written there, and removed at the end")
    if options.family not in TRUE:
        raise SystemExit(f"--family is {options.family!r}: it takes {', '.join(TRUE)}")
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if "build" in options.stages:
        config = true_config(options.family, options.layers)
        levels = len(config["vision_config"].get("deepstack_visual_indexes", ()))
        if 0 < options.layers < levels:
            raise SystemExit(f"--layers is {options.layers}: image features enter the first {levels} of this family")
        (folder / "config.json").write_text(json.dumps(config))
    try:
        results = (read_result(options.name) if options.keep else None) or {}
        results["machine"] = {**machine(), "threads": torch.get_num_threads()}
        for name in options.stages:
            results[name] = run_stage(name, folder)
            write_result(options.name, results)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


STAGES: dict[str, Callable[..., dict[str, Any]]] = {"build": build, "names": names, "transfer": transfer, "step": step}

if __name__ == "__main__":
    main()
