"""Updates of a real engine's weights, for the tests that compare an updated engine with a fresh one."""

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rft_cluster.config import Config
from rft_cluster.generator.generator import Generator
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.messages import Group, Images, Prompt, Sampling, WeightRecord
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.weights import receivers
from rft_cluster.weights.digests import combined_digest, tensor_digest
from rft_cluster.weights.shared_memory import memory_layout
from rft_cluster.weights.source import WIRE_DTYPE, TensorInfo

GREEDY = Sampling(1, 0.0, 12)
CURES = ("output layer", "image embeddings")  # of vLLM's silent staleness
Weights = dict[str, torch.Tensor]


def make_generator(path: str, config: Config, images: Images) -> Generator:
    return Generator(EngineOptions.of_run(path, config), images)


def parameter_digest_of(generator: Generator) -> int:
    def digest() -> int:
        (engine,) = generator._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
        return receivers.parameter_digest(engine.model)

    return generator._on_thread(digest)


def write(generator: Generator, weights: Weights) -> tuple[int, dict[str, Any]]:
    """Write weights into memory, as the learners' sender does it: (file, what an update takes)."""
    layout = memory_layout([TensorInfo(name, WIRE_DTYPE, tuple(tensor.shape)) for name, tensor in weights.items()])
    file = os.memfd_create("test_weights")
    os.ftruncate(file, layout.nbytes)
    for offset, tensor in zip(layout.offsets, weights.values(), strict=True):
        os.pwrite(file, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), offset)
    generator.init_weight_transfer_engine(asdict(layout))
    return file, {"path": f"/proc/{os.getpid()}/fd/{file}", "nbytes": layout.nbytes}


def load(generator: Generator, weights: Weights, version: int) -> int:
    """An update without its verification; the file that holds the memory."""
    file, update = write(generator, weights)
    try:
        generator.load_weights(update, version)
    except BaseException:
        os.close(file)
        raise
    return file


def send(generator: Generator, weights: Weights, version: int, digests: dict[str, int] | None = None) -> WeightRecord:
    """One update by shared memory and its verification."""
    file = load(generator, weights, version)
    try:
        return generator.verify_weights(version, digests or digests_of(weights))
    finally:
        os.close(file)


def digests_of(weights: Weights) -> dict[str, int]:
    return {name: tensor_digest(tensor) for name, tensor in weights.items()}


def digest_of(weights: Weights) -> int:
    return combined_digest(digests_of(weights))


def answers(groups: list[Group]) -> list[tuple[list[int], list[float]]]:
    return [(group.completions[0].token_ids, group.completions[0].generator_logprobs) for group in groups]


def weights_of(model: Any) -> Weights:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def noisy(weights: Weights, size: float) -> Weights:
    """Other weights: normal noise of this standard deviation is added."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: (tensor.float() + size * torch.randn(tensor.shape, generator=draw)).to(WIRE_DTYPE)
        for name, tensor in weights.items()
    }


def answers_from_disk(
    model: Any, path: str, changed: Weights, export: Path, config: Config, images: Images, prompts: Sequence[Prompt]
) -> list[Group]:
    """The answers of an engine that vLLM itself loaded from an export of the changed weights.

    `model`: any weights of the model. `path`: a folder with its processor.
    """
    model.save_pretrained(export, state_dict=changed)
    PromptEncoder(path, config.model).save(export)
    fresh = make_generator(str(export), config, images)
    fresh.serve_checkpoint(7)
    from_disk = fresh.generate(prompts, GREEDY, version=7)
    # It already holds these weights: sending them changes nothing, so every tensor arrives where vLLM's loader puts it.
    digest = parameter_digest_of(fresh)
    assert send(fresh, changed, version=8).loaded == combined_digest({"0": digest})
    assert answers(fresh.generate(prompts, GREEDY, version=8)) == answers(from_disk)
    del fresh
    gc.collect()
    return from_disk


def check_an_update(
    generator: Generator, original: Weights, changed: Weights, prompts: Sequence[Prompt], fresh: list[Group]
) -> list[Group]:
    """Update an engine, and check that its answers are those of a fresh one. Returns them, of version 2."""
    record = send(generator, original, version=1)
    assert (record.version, record.received) == (1, digest_of(original))
    before = generator.generate(prompts, GREEDY, version=1)  # the same images, now in every cache
    send(generator, changed, version=2)
    after = generator.generate(prompts, GREEDY, version=2)
    assert answers(after) == answers(fresh)
    assert answers(after) != answers(before)
    return after


def check_that_a_cure_is_needed(
    cure: str, generator: Generator, original: Weights, changed: Weights, prompts: Sequence[Prompt],
    fresh: list[Group], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Check that without one of `CURES` the answers of an updated engine are not those of a fresh one."""
    send(generator, original, version=3)
    generator.generate(prompts, GREEDY, version=3)
    with monkeypatch.context() as without:
        if cure == "output layer":
            without.setattr(receivers, "repack_output_layers", lambda model: None)
        else:
            without.setattr(generator._engine, "reset_encoder_cache", lambda: None)
        send(generator, changed, version=4)
    assert answers(generator.generate(prompts, GREEDY, version=4)) != answers(fresh)
    # Whole again, for the tests that follow.
    send(generator, original, version=5)
    send(generator, changed, version=6)
    assert answers(generator.generate(prompts, GREEDY, version=6)) == answers(fresh)


def drop(lost: str, monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """The engine is not given tensors in whose names `lost` is."""
    (engine,) = generator._on_thread(
        lambda: generator._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
    )
    load = engine.model.load_weights
    monkeypatch.setattr(
        engine.model, "load_weights", lambda weights: load((name, one) for name, one in weights if lost not in name)
    )
