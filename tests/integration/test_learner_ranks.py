"""The update does not depend on how its samples are split: 1, 2 or 3 FSDP2 ranks, any micro-batch, unequal groups,
a prompt that is read once for all its completions or on two ranks for some of them.

Real FSDP2 over gloo, in processes forked from a server that has imported everything once. Layers compute in FP32
here, so that only the split can make a difference; the plain implementation is an unsharded model, one completion
at a time, with the loss written out.
"""

import json
import math
import multiprocessing
from dataclasses import asdict, astuple, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import TRANSFER_QUESTION, family_model
from rft_cluster.algorithm import load_algorithm
from rft_cluster.config import Config, ModelSection, load_config
from rft_cluster.data import FewShotDataset
from rft_cluster.learner.learner import Learner
from rft_cluster.learner.packing import split_work
from rft_cluster.messages import Images, Prompt, Sampling, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.policy import load_policy
from rft_cluster.run.targets import Targets
from tests.integration.conftest import some_samples
from tests.plain import plain_logits

BETA, CAP = 0.1, 2.0
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rft_cluster.learner.learner"])
Gradients = dict[str, torch.Tensor]
# Gradients; loss, tokens and log-prob gap, summed; the mean gap of each completion by (prompt_id, index).
Plain = tuple[Gradients, list[float], dict[tuple[str, int], float]]


def run_config(checkpointing: bool = False, *overrides: str) -> Config:
    return load_config(
        "digits",
        [f"algorithm.kl_beta={BETA}", "optimizer.max_grad_norm=1000",
         f"learners.gradient_checkpointing={checkpointing}", *overrides],
    )  # fmt: skip


def rank_gradients(folder: str, path: str, config: Config, images: Images, rank: int, ranks: int, work: list) -> None:
    """Make one update in a process of its own. Rank 0 saves the summed, unsharded gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    import rft_cluster.learner.learner as module

    module.MixedPrecisionPolicy = lambda **_: MixedPrecisionPolicy(torch.float32, torch.float32)
    learner = Learner(path, config, rank, threads=1, images=images)
    learner.join(f"file://{folder}/rendezvous", ["127.0.0.1"] * ranks)
    if learner._reference:
        learner._reference.float()
    taken: Gradients = {}

    def take() -> torch.Tensor:
        for name, parameter in learner._policy.model.named_parameters():
            taken[name] = parameter.grad.full_tensor()
        return torch.tensor(1.0)

    learner._clip_gradients = take  # type: ignore[method-assign]
    stats = learner.update(work, step=30)
    if rank == 0:
        save_file(taken, f"{folder}/gradients.safetensors")
    (Path(folder) / f"sums-{rank}").write_text(f"{stats.loss} {stats.tokens} {stats.logprob_gap}")
    (Path(folder) / f"gaps-{rank}").write_text(json.dumps(list(map(astuple, stats.logprob_gaps))))


def gradients_of(
    tmp_path: Path, path: str, config: Config, images: Images, samples: list[TrainingSample], ranks: int, tokens: int
) -> tuple[Gradients, list[float]]:
    work = split_work(samples, ranks, updates=1, micro_batch_tokens=tokens)
    arguments = [(str(tmp_path), path, config, images, rank, ranks, work[rank]) for rank in range(ranks)]
    processes = [PROCESSES.Process(target=rank_gradients, args=argument) for argument in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    sums = [[float(word) for word in (tmp_path / f"sums-{rank}").read_text().split()] for rank in range(ranks)]
    return load_file(tmp_path / "gradients.safetensors"), [sum(column) for column in zip(*sums, strict=True)]


@pytest.fixture(scope="module")
def plain(tiny_model: str, config: Config, dataset: FewShotDataset, samples: list[TrainingSample]) -> Plain:
    return plain_gradients(tiny_model, config.model, dataset, samples)


def plain_gradients(path: str, section: ModelSection, dataset: FewShotDataset, samples: list[TrainingSample]) -> Plain:
    encoder = PromptEncoder(path, section)
    model = load_policy(path, section, {"text_config": "eager", "vision_config": "eager"}, [], 1.0).model
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    total, gaps = torch.zeros(()), {}
    for sample in samples:
        encoded = encoder.encode(sample.prompt.text, dataset.image(sample.prompt.example))
        logits = plain_logits(model, encoded, sample.token_ids, encoder.image_token_id)
        logits[:, encoder.forbidden_token_ids] = float("-inf")
        start, gap = len(sample.prompt_token_ids), 0.0
        for position, token in enumerate(sample.token_ids):
            learner = logits[start + position - 1].log_softmax(-1)[token]
            importance = min(math.exp(float(learner) - sample.generator_logprobs[position]), CAP)
            # On policy the ratio is 1 in value, and the reference is the model itself: k3 is 0, and so is its gradient.
            ratio = (learner - learner.detach()).exp()
            total = total - importance * ratio * sample.advantage / len(sample.token_ids) / len(samples)
            gap += abs(float(learner) - sample.generator_logprobs[position])
        gaps[sample.prompt.prompt_id, sample.index] = gap / len(sample.token_ids)
    total.backward()
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters()}, [
        float(total), float(sum(len(sample.token_ids) for sample in samples)),
        sum(gaps[sample.prompt.prompt_id, sample.index] * len(sample.token_ids) for sample in samples),
    ], gaps  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "tokens", "checkpointing"),
    [
        (1, 4096, False),  # one forward
        (1, 1, False),  # one for each completion
        (2, 4096, True),
        (2, 30, False),
        (3, 4096, False),
    ],
)
def test_gradients_do_not_depend_on_the_split(
    ranks: int, tokens: int, checkpointing: bool, tmp_path: Path, tiny_model: str, dataset: FewShotDataset,
    samples: list[TrainingSample], plain: Plain,
):  # fmt: skip
    gradients, sums = gradients_of(
        tmp_path, tiny_model, run_config(checkpointing), dataset.images, samples, ranks, tokens
    )
    check_equal(tmp_path, ranks, samples, plain, gradients, sums)


def check_equal(
    folder: Path, ranks: int, samples: list[TrainingSample], plain: Plain, gradients: Gradients, sums: list[float]
) -> None:
    expected, expected_sums, gaps = plain
    assert sums == pytest.approx(expected_sums, rel=1e-4)
    told = [entry for rank in range(ranks) for entry in json.loads((folder / f"gaps-{rank}").read_text())]
    assert len(told) == len(samples), "each completion once, and no padding"
    assert {(prompt_id, index): nats for prompt_id, index, nats in told} == pytest.approx(gaps, abs=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        distance = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-12)
        assert distance < 1e-4, name


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def other(
    request: pytest.FixtureRequest, dataset: FewShotDataset, prompts: list[Prompt], tmp_path_factory
) -> tuple[str, Config, list[TrainingSample], Plain]:
    """A small random model of another family, asked about images of several of Qwen2.5-VL's windows."""
    config = run_config(True, "model.min_image_tokens=49", "model.max_image_tokens=100")
    family = FAMILIES[request.param]
    path = str(family_model(tmp_path_factory.mktemp(request.param), family, config.model.pixels(family.side)[1]))
    asked = [replace(prompt, text=TRANSFER_QUESTION) for prompt in prompts]
    samples = some_samples(path, config, dataset, asked)
    return path, config, samples, plain_gradients(path, config.model, dataset, samples)


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 4096), (2, 30)])
def test_gradients_of_the_other_families_do_not_depend_on_the_split(
    ranks: int, tokens: int, tmp_path: Path, dataset: FewShotDataset, other
):
    path, config, samples, plain = other
    gradients, sums = gradients_of(tmp_path, path, config, dataset.images, samples, ranks, tokens)
    check_equal(tmp_path, ranks, samples, plain, gradients, sums)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_of_sft_is_one_of_transformers_own_cross_entropy(
    ranks: int, tmp_path: Path, tiny_model: str, config: Config, dataset: FewShotDataset, prompts: list[Prompt]
):
    """Both compute in FP32. Theirs: one target at a time, with `labels`, then the mean over targets."""
    from transformers import Qwen2VLForConditionalGeneration

    sft = load_config("digits", ["algorithm.objective=sft", "algorithm.kl_beta=0", "optimizer.max_grad_norm=1000"])
    encoder = PromptEncoder(tiny_model, config.model)
    groups, rewards = Targets(encoder, dataset.images).start(prompts, Sampling(1, 1.0, 16), 0).wait()
    algorithm = load_algorithm(sft)
    samples = algorithm.samples(groups, algorithm.advantages(rewards))
    gradients, (loss, tokens, _) = gradients_of(tmp_path, tiny_model, sft, dataset.images, samples, ranks, tokens=60)

    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    losses = []
    for prompt in prompts:
        encoded = encoder.encode(prompt.text, dataset.image(prompt.example))
        answer = encoder.tokenizer(f"<think></think><answer>{prompt.label}</answer><|im_end|>")["input_ids"]
        ids = torch.tensor([encoded.token_ids + answer])
        labels = torch.tensor([[-100] * len(encoded.token_ids) + answer])
        kinds = (ids == encoder.image_token_id).long()
        inputs = {"pixel_values": encoded.pixel_values, "image_grid_thw": encoded.image_grid_thw}
        losses.append(model(input_ids=ids, labels=labels, mm_token_type_ids=kinds, **inputs).loss)
    mean = torch.stack(losses).mean()
    mean.backward()
    assert (loss, tokens) == (pytest.approx(float(mean.detach()), rel=1e-4), 6 * len(prompts))
    for name, parameter in model.named_parameters():
        distance = (gradients[name] - parameter.grad).norm() / (parameter.grad.norm() + 1e-12)
        assert distance < 1e-4, name


def poisoned(folder: str, path: str, config: Config, images: Images, rank: int, work: list) -> None:
    """Make one update in a process of its own; write its figures, and whether it changed this rank's weights."""
    learner = Learner(path, config, rank, threads=1, images=images)
    learner.join(f"file://{folder}/rendezvous", ["127.0.0.1"] * 2)
    shards = [parameter.to_local() for parameter in learner._policy.parameters()]
    before = [shard.clone() for shard in shards]
    stats = learner.update(work, step=0)
    unchanged = all(map(torch.equal, shards, before))
    (Path(folder) / f"stats-{rank}").write_text(json.dumps(asdict(stats) | {"unchanged": unchanged}))


def test_a_loss_that_is_not_finite_on_one_rank_leaves_the_update_out_on_both(
    tmp_path: Path, tiny_model: str, dataset: FewShotDataset, samples: list[TrainingSample]
):
    sound, ill = split_work(samples, ranks=2, updates=1, micro_batch_tokens=4096)
    ill = [[[replace(sample, generator_logprobs=[math.nan] * len(sample.token_ids)) for sample in ill[0][0]]]]
    processes = [
        PROCESSES.Process(target=poisoned, args=(str(tmp_path), tiny_model, run_config(), dataset.images, rank, work))
        for rank, work in enumerate((sound, ill))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    one, other = (json.loads((tmp_path / f"stats-{rank}").read_text()) for rank in range(2))
    assert math.isfinite(one["loss"])
    assert not math.isfinite(other["loss"])
    for stats in (one, other):
        assert (stats["skipped"], stats["finite_weights"], stats["unchanged"]) == (1, True, True)
    names = {f"{sample.prompt.prompt_id} ({sample.prompt.example.image.image_id})" for sample in ill[0][0]}
    assert set(other["not_finite"]) == names
    assert one["not_finite"] == []


def two_updates(folder: str, path: str, config: Config, images: Images, work: list) -> None:
    """Make a step of two updates in a process of its own, and write the optimizer's steps and the figures to a file."""
    learner = Learner(path, config, 0, threads=1, images=images)
    learner.join(f"file://{folder}/rendezvous", ["127.0.0.1"])
    stats = learner.update(work, step=30)
    updates = learner.snapshot(31)[0].updates
    (Path(folder) / "sums").write_text(f"{updates} {stats.tokens} {stats.kl} {stats.skipped}")


def test_several_updates_on_one_step_s_completions(
    tmp_path: Path, tiny_model: str, dataset: FewShotDataset, samples: list[TrainingSample]
):
    (work,) = split_work(samples, ranks=1, updates=2, micro_batch_tokens=60)
    process = PROCESSES.Process(
        target=two_updates, args=(str(tmp_path), tiny_model, run_config(), dataset.images, work)
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0
    updates, tokens, divergence, skipped = (float(word) for word in (tmp_path / "sums").read_text().split())
    assert (updates, tokens, skipped) == (2, sum(len(sample.token_ids) for sample in samples), 0)
    assert divergence > 0, "the second update sees a policy that has left the reference"
