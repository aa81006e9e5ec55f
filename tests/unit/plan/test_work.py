"""Rows against those of the real packing."""

import pytest
from some_prompt import some_prompt

from rft_cluster.config import load_config
from rft_cluster.learner.packing import split_work
from rft_cluster.messages import TrainingSample
from rft_cluster.model.image_size import PromptLength
from rft_cluster.plan.work import Prompts, fullest_row, group_row, learner_share


def packed(prompts: int, length: PromptLength, group: int, tokens: int, ranks: int, limit: int) -> list[list[int]]:
    """Tokens of each micro-batch of each rank, by the learners' own packing."""
    samples = [
        TrainingSample(some_prompt(f"train/0/{index}"), [0] * length.tokens, [0] * tokens, [0.0] * tokens, 0.0, 1.0)
        for index in range(prompts)
        for _ in range(group)
    ]

    def row(batch: list[TrainingSample]) -> int:
        asked = {sample.prompt.prompt_id: length.tokens for sample in batch}
        return sum(asked.values()) + sum(len(sample.token_ids) - 1 for sample in batch)

    return [[row(batch) for batch in work[0]] for work in split_work(samples, ranks, 1, limit)]


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


def test_a_group_s_row_by_hand():
    row = group_row(PromptLength(4, 6), completions=2, length=4)
    assert (row.tokens, row.patches, row.predicted) == (10 + 2 * 3, 16, 8)
    assert row.keys == 10 + 2 * 13
    assert row.pairs == 50 + 2 * (30 + 4.5) and row.patch_pairs == 256


def test_prompts_are_summed_up():
    prompts = Prompts.of([PromptLength(4, 10), PromptLength(8, 10)])
    assert prompts.mean == PromptLength(6, 10) and prompts.longest[0] == PromptLength(8, 10) and prompts.count == 2
    assert Prompts.of([]).count == 0
