"""Rows against those of the real packing."""

import json
from pathlib import Path

import pytest
from some_prompt import some_prompt

from rft_cluster.config import load_config
from rft_cluster.learner.packing import split_work
from rft_cluster.messages import TrainingSample
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.estimate import worst_row
from rft_cluster.plan.work import Prompts, fullest_row, group_row, learner_share

FILE = Path(__file__).parents[3] / "benchmarks" / "qwen2_vl_2b.json"
SHAPES = Shapes.of(json.loads(FILE.read_text())["config"], FILE)


def packed(
    prompts: int, length: PromptLength, group: int, tokens: int, ranks: int, limit: int, updates: int = 1
) -> list[list[int]]:
    """Tokens of each micro-batch of each rank, by the learners' own packing."""
    samples = [
        TrainingSample(some_prompt(f"train/0/{index}"), [0] * length.tokens, [0] * tokens, [0.0] * tokens, 0.0, 1.0, 0)
        for index in range(prompts)
        for _ in range(group)
    ]

    def row(batch: list[TrainingSample]) -> int:
        asked = {sample.prompt.prompt_id: length.tokens for sample in batch}
        return sum(asked.values()) + sum(len(sample.token_ids) - 1 for sample in batch)

    work = split_work(samples, ranks, updates, limit)
    return [[row(batch) for update in own for batch in update] for own in work]


@pytest.mark.parametrize(
    ("tokens", "limit", "ranks"), [(53, 4096, 1), (60, 4096, 1), (256, 4096, 4), (256, 1536, 1), (30, 100, 2)]
)
def test_rows_are_those_of_the_learners_packing(tokens, limit, ranks):
    length = PromptLength(512, 90) if limit > 1000 else PromptLength(16, 20)
    real = packed(16, length, 8, tokens, ranks, limit)
    config = load_config("flower102", [f"learners.count={ranks}", f"learners.micro_batch_tokens={limit}"])
    share = learner_share(config, length, tokens)
    assert fullest_row([length] * (16 // ranks), 8, tokens, limit).tokens == max(map(max, real))
    assert share.row.tokens == sum(real[0])
    assert share.micro_batches == len(real[0])


@pytest.mark.parametrize(("updates", "ranks"), [(2, 1), (4, 1), (4, 4)])
def test_each_update_has_rows_of_its_own(updates, ranks):
    length = PromptLength(512, 90)
    real = packed(16, length, 8, 53, ranks, 4096, updates)
    config = load_config("flower102", [f"learners.count={ranks}", f"algorithm.updates_per_step={updates}"])
    share = learner_share(config, length, 53)
    assert share.micro_batches == len(real[0])
    assert share.row.tokens == sum(real[0])
    prompts = Prompts.of([length] * 100)
    row, micro_batches = worst_row(config, SHAPES, prompts)
    assert row.prompts == min(5, 16 // ranks // updates), "five of short completions fit a row"
    assert micro_batches == len(packed(16, length, 8, 16, ranks, 4096, updates)[0]) // updates


def test_200_listed_names_are_read_once_a_group():
    """885 tokens of text, the most of two lists of 200 names of ImageNet's classes; 8 answers of 14 tokens."""
    rows = packed(16, PromptLength(512, 885), 8, 14, 1, load_config("flower102_closed", []).learners.micro_batch_tokens)
    assert rows == [[2 * (1397 + 8 * 13)] * 8], "two groups a row; a row holds not even three such prompts with answers"


def test_a_step_larger_than_the_data_asks_about_an_image_again():
    two = Prompts.of([PromptLength(512, 90), PromptLength(400, 90)])
    row, _ = worst_row(load_config("flower102_1gpu", []), SHAPES, two)
    assert (row.prompts, row.patches) == (5, 5 * 2048), "16 prompts, 8 about the larger image"


def test_a_group_s_row_by_hand():
    row = group_row(PromptLength(4, 6), completions=2, length=4)
    assert (row.tokens, row.patches, row.predicted) == (10 + 2 * 3, 16, 8)
    assert row.keys == 10 + 2 * 13
    assert row.pairs == 50 + 2 * (30 + 4.5) and row.patch_pairs == 256


def test_prompts_are_summed_up():
    prompts = Prompts.of([PromptLength(4, 10), PromptLength(8, 10)])
    assert prompts.mean == PromptLength(6, 10) and prompts.longest[0] == PromptLength(8, 10) and prompts.count == 2
    assert Prompts.of([]).count == 0
