"""An engine whose weights were updated through the transfer equals a fresh engine loaded from the same weights.

Real vLLM engines, in this process. Both cures of vLLM's silent staleness are taken out in turn, to see that the
comparison would notice: the packed lm_head of the CPU build, and image embeddings that outlive an update.
"""

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from rft_cluster import receivers
from rft_cluster.config import Config
from rft_cluster.files import write_json
from rft_cluster.generator import Generator, Sampling, StaleGenerator
from rft_cluster.hardware import hardware
from rft_cluster.messages import Group, Prompt, WeightRecord
from rft_cluster.qwen2vl import PromptEncoder
from rft_cluster.weights import (
    WIRE_DTYPE,
    SharedMemoryUpdate,
    WeightTransferError,
    check_records,
    combined_digest,
    tensor_digest,
)

GREEDY = Sampling(1, 0.0, 12)
SAMPLED = Sampling(8, 1.0, 12)
Weights = dict[str, torch.Tensor]


def make_generator(path: str, config: Config) -> Generator:
    return Generator(path, config.model, config.generators, config.max_model_tokens, hardware("cpu"), seed=0)


@pytest.fixture(scope="module")
def generator(tiny_model: str, config: Config) -> Generator:
    generator = make_generator(tiny_model, config)
    generator.init_weight_transfer_engine({})
    return generator


@pytest.fixture(scope="module")
def original(tiny_model: str) -> Weights:
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model, dtype=WIRE_DTYPE)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def changed(original: Weights) -> Weights:
    draw = torch.Generator().manual_seed(1)
    return {
        name: (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=draw)).to(WIRE_DTYPE)
        for name, tensor in original.items()
    }


@pytest.fixture(scope="module")
def fresh_answers(
    tiny_model: str, changed: Weights, config: Config, prompts: list[Prompt], tmp_path_factory
) -> list[Group]:
    """What an engine answers that was loaded from an export of the changed weights."""
    folder = tmp_path_factory.mktemp("export")
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model, dtype=WIRE_DTYPE)
    model.save_pretrained(folder, state_dict=changed)
    PromptEncoder(tiny_model, config.model.min_pixels, config.model.max_pixels).save(folder)
    fresh = make_generator(str(folder), config)
    fresh.init_weight_transfer_engine({})
    # It already holds these weights; sending them gives it the version, and changes nothing.
    fresh_from_disk = parameter_digest_of(fresh)
    record = send(fresh, changed, version=7)
    assert record.loaded == fresh_from_disk
    answers = fresh.generate(prompts, GREEDY, version=7)
    del fresh
    gc.collect()
    return answers


def parameter_digest_of(generator: Generator) -> int:
    def digest() -> int:
        (engine,) = generator._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
        return receivers.parameter_digest(engine.model)

    return generator._call(digest).result()


def send(generator: Generator, weights: Weights, version: int, digests: list[int] | None = None) -> WeightRecord:
    """One update by shared memory, as the learners' sender does it."""
    offsets, end = [], 0
    for tensor in weights.values():
        offsets.append(end)
        end += -(-tensor.nbytes // 64) * 64
    file = os.memfd_create("test_weights")
    os.ftruncate(file, end)
    for offset, tensor in zip(offsets, weights.values(), strict=True):
        os.pwrite(file, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), offset)
    update = SharedMemoryUpdate(
        path=f"/proc/{os.getpid()}/fd/{file}",
        nbytes=end,
        names=list(weights),
        dtype_names=["bfloat16"] * len(weights),
        shapes=[list(tensor.shape) for tensor in weights.values()],
        offsets=offsets,
        digests=digests or [tensor_digest(tensor) for tensor in weights.values()],
    )
    try:
        generator.start_weight_update()
        generator.update_weights(asdict(update))
        return generator.finish_weight_update(str(version))
    finally:
        os.close(file)


def digest_of(weights: Weights) -> int:
    return combined_digest({name: tensor_digest(tensor) for name, tensor in weights.items()})


def answers(groups: list[Group]) -> list[tuple[list[int], list[float]]]:
    return [(group.completions[0].token_ids, group.completions[0].generator_logprobs) for group in groups]


def test_without_a_version_it_does_not_generate(generator: Generator, prompts: list[Prompt]):
    with pytest.raises(StaleGenerator, match="asked for version 0, but this generator holds version None"):
        generator.generate(prompts, GREEDY, version=0)


def test_updated_engine_equals_a_fresh_one(
    generator: Generator, original: Weights, changed: Weights, prompts: list[Prompt], fresh_answers: list[Group]
):
    record = send(generator, original, version=1)
    assert (record.version, record.received) == (1, digest_of(original))
    before = generator.generate(prompts, GREEDY, version=1)  # the same images, now in every cache
    send(generator, changed, version=2)
    after = generator.generate(prompts, GREEDY, version=2)
    assert answers(after) == answers(fresh_answers)
    assert answers(after) != answers(before)
    assert {completion.policy_version for group in after for completion in group.completions} == {2}


@pytest.mark.parametrize("cure", ["output layer", "image embeddings"])
def test_each_cure_is_needed(
    cure: str, generator: Generator, original: Weights, changed: Weights, prompts: list[Prompt],
    fresh_answers: list[Group], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    send(generator, original, version=3)
    generator.generate(prompts, GREEDY, version=3)
    with monkeypatch.context() as without:
        if cure == "output layer":
            without.setattr(receivers, "repack_output_layers", lambda model: None)
        else:
            without.setattr(generator._engine, "reset_encoder_cache", lambda: None)
        send(generator, changed, version=4)
    assert answers(generator.generate(prompts, GREEDY, version=4)) != answers(fresh_answers)
    # Whole again, for the tests that follow.
    send(generator, original, version=5)
    send(generator, changed, version=6)
    assert answers(generator.generate(prompts, GREEDY, version=6)) == answers(fresh_answers)


def test_groups_keep_order_seed_and_version(generator: Generator, original: Weights, prompts: list[Prompt]):
    send(generator, original, version=8)
    groups = generator.generate(prompts, SAMPLED, version=8)
    assert [group.prompt for group in groups] == prompts
    assert all(len(group.completions) == 8 for group in groups)
    assert len({tuple(completion.token_ids) for completion in groups[0].completions}) > 1
    again = generator.generate(prompts, SAMPLED, version=8)
    assert [group.completions for group in again] == [group.completions for group in groups]
    other_seed = generator.generate([replace(prompts[0], seed=prompts[0].seed + 1000)], SAMPLED, version=8)
    assert [c.token_ids for c in other_seed[0].completions] != [c.token_ids for c in groups[0].completions]
    vision = set(generator._encoder.vision_token_ids)
    assert not vision & {token for group in groups for c in group.completions for token in c.token_ids}
    assert groups[0].prompt_token_ids == generator._encoder.encode(prompts[0]).token_ids


def test_wrong_bytes_are_refused(generator: Generator, original: Weights, prompts: list[Prompt]):
    digests = [tensor_digest(tensor) for tensor in original.values()]
    digests[3] += 1
    with pytest.raises(WeightTransferError, match=f"1 of {len(digests)} tensors arrived with other bytes"):
        send(generator, original, version=9, digests=digests)
    with pytest.raises(StaleGenerator):
        generator.generate(prompts, GREEDY, version=9)
    send(generator, original, version=10)  # and it is mended by the next update


@pytest.fixture
def nudged(original: Weights) -> Weights:
    """One AdamW step at a learning rate of 1e-6: FP32 masters move by 1e-6, and few BF16 weights at all."""
    draw = torch.Generator().manual_seed(2)
    return {
        name: (tensor.float() + 1e-6 * torch.randn(tensor.shape, generator=draw).sign()).to(WIRE_DTYPE)
        for name, tensor in original.items()
    }


def drop_all(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """The engine reads every tensor off the wire and loads none."""

    def read(self: receivers.CheckedModel, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _ in self._digested(weights):
            pass

    monkeypatch.setattr(receivers.CheckedModel, "load_weights", read)


def drop_one(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """The engine loads every tensor but one, part of a fused layer."""
    lost = "model.language_model.layers.1.self_attn.k_proj.weight"

    def load(self: receivers.CheckedModel, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._model.load_weights((name, tensor) for name, tensor in self._digested(weights) if name != lost)

    monkeypatch.setattr(receivers.CheckedModel, "load_weights", load)


def drop_call(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """The update never reaches the engine."""
    monkeypatch.setattr(generator, "update_weights", lambda update_info: None)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (drop_all, "arrived but .* layers did not load theirs"),
        (drop_one, "arrived but 1 layers did not load theirs, first language_model.model.layers.1.self_attn.qkv_proj"),
        (drop_call, "arrived but .* layers did not load theirs"),
    ],
)
def test_a_dropped_update_is_caught_however_small(
    drop: Callable[[pytest.MonkeyPatch, Generator], None], message: str, generator: Generator, original: Weights,
    nudged: Weights, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    changed = sum(int((original[name] != nudged[name]).sum()) for name in original)
    total = sum(tensor.numel() for tensor in original.values())
    assert 0 < changed < 0.03 * total, "few of the BF16 weights change at all (1.8 % when this was written)"
    send(generator, original, version=11)
    check_records([send(generator, nudged, version=12)], 12, digest_of(nudged))
    send(generator, original, version=13)
    with monkeypatch.context() as broken:
        drop(broken, generator)
        with pytest.raises(WeightTransferError, match=message):
            send(generator, nudged, version=14)
    with pytest.raises(StaleGenerator):
        generator.generate(prompts, GREEDY, version=14)


def test_json_files_are_written_whole(tmp_path: Path):
    write_json(tmp_path / "state.json", {"step": 3})
    assert (tmp_path / "state.json").read_text() == '{\n  "step": 3\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def token_logprobs(
    path: str, weights: Weights, group: Group, token_ids: list[int], encoder: PromptEncoder, temperature: float
) -> torch.Tensor:
    """Of a completion's tokens under given weights, by transformers alone: [tokens] FP32."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=WIRE_DTYPE)
    model.load_state_dict(weights, strict=False)
    prompt = encoder.encode(group.prompt)
    ids = torch.tensor([prompt.token_ids + token_ids])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(ids == encoder.image_token_id).long(),
        ).logits[0, len(prompt.token_ids) - 1 : -1]
    logits = logits.float() / temperature
    logits[:, encoder.vision_token_ids] = float("-inf")
    return logits.log_softmax(-1)[torch.arange(len(token_ids)), token_ids]


def test_an_update_may_fall_into_running_completions(
    generator: Generator, original: Weights, changed: Weights, prompts: list[Prompt], tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    further = {name: (2 * changed[name].float() - tensor.float()).to(WIRE_DTYPE) for name, tensor in original.items()}
    send(generator, changed, version=11)
    under_way, step, steps = threading.Event(), generator._step, itertools.count()

    def counted() -> None:
        step()
        if next(steps) == 8:
            under_way.set()

    monkeypatch.setattr(generator, "_step", counted)
    hot = Sampling(8, 2.0, 64)  # with weights full of noise few completions stop early
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generator.generate, prompts, hot, 11)
        while not under_way.wait(1):
            assert not asked.done(), asked.result()
        send(generator, further, version=12)
        groups = asked.result(timeout=60)
    assert [group.prompt for group in groups] == prompts

    spanning = [(group, c) for group in groups for c in group.completions if c.version_spans]
    assert len(spanning) > len(prompts)
    group, completion = max(spanning, key=lambda pair: len(pair[1].token_ids))
    (old, first), (new, second) = completion.version_spans
    assert (old, new, completion.policy_version) == (11, 12, 11)
    assert first + second == len(completion.token_ids) and second > 5
    written = torch.tensor(completion.generator_logprobs)
    by_old, by_new = (
        token_logprobs(tiny_model, weights, group, completion.token_ids, generator._encoder, hot.temperature)
        for weights in (changed, further)
    )
    gap = (written - torch.cat([by_old[:first], by_new[first:]])).abs().mean()
    # Nothing that the old weights computed of the prompt, the image or the first tokens reaches the later ones.
    stale = (written - by_old)[first:].abs().mean()
    assert gap <= 0.005 < stale / 4, (gap, stale)
    # And what was asked afterwards is of the new weights alone.
    after = generator.generate(prompts, SAMPLED, version=12)
    assert {c.policy_version for group in after for c in group.completions} == {12}
    assert not any(c.version_spans for group in after for c in group.completions)
