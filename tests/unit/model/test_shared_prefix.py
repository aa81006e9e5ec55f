"""Attention over packed groups against a dense mask over the whole row, forward and backward, in FP32."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from rft_cluster.model import shared_prefix
from rft_cluster.model.shared_prefix import PackLayout, pack_layout

HEADS, KEY_HEADS, SIZE, SCALING = 4, 2, 8, 0.3

# Tokens of the prompts, of the completions, and whose completions they are.
PACKS = {
    "one group": ([5], [3, 3, 3], [0, 0, 0]),
    "different lengths": ([5], [1, 2, 4], [0, 0, 0]),
    "several groups": ([3, 5, 5], [2, 2, 4, 1, 2, 2], [0, 0, 0, 1, 1, 2]),
    "one completion": ([4], [6], [0]),
    "a completion without tokens in the row": ([4, 6], [0, 3, 0, 2], [0, 0, 1, 1]),
    "prompts alone": ([4, 2], [0, 0], [0, 1]),
    "owners out of order": ([2, 3], [1, 4, 2], [1, 0, 1]),
    "longer than the prompt": ([1], [7, 7], [0, 0]),
}


def dense_mask(prompts: list[int], completions: list[int], owners: list[int]) -> Tensor:
    """[T, T] bool, written out token by token: who sees whom."""
    # For each token: its prompt, its completion (None within a prompt), its place.
    tokens = [(prompt, None, place) for prompt, length in enumerate(prompts) for place in range(length)]
    for completion, (length, owner) in enumerate(zip(completions, owners, strict=True)):
        tokens += [(owner, completion, place) for place in range(length)]

    def sees(query: tuple, key: tuple) -> bool:
        if query[1] == key[1]:  # both in one completion, or both in prompts
            return query[0] == key[0] and query[2] >= key[2]
        return key[1] is None and query[0] == key[0]

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int) -> list[Tensor]:
    """Query, key and value as transformers has them: [1, heads, T, size]."""
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [draw(1, count, tokens, SIZE, seed=seed).requires_grad_() for seed, count in enumerate(heads)]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[1, T, heads, size]: softmax over a masked square of scores."""
    key, value = (rows.repeat_interleave(HEADS // KEY_HEADS, dim=1) for rows in (key, value))
    scores = (query @ key.transpose(2, 3) * SCALING).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def documented_varlen(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, longest: int, longest_key: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """`varlen_attn` by its documentation, for machines that cannot run it: segment by segment, causal from the end."""
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert (window_size, enable_gqa) == ((-1, 0), True)
    assert (int(query_starts[-1]), int(key_starts[-1])) == (len(query), len(key))
    assert (longest, longest_key) == (int(query_starts.diff().max()), int(key_starts.diff().max()))
    outputs = []
    for i in range(len(query_starts) - 1):
        q = query[query_starts[i] : query_starts[i + 1]].transpose(0, 1)
        k, v = (
            rows[key_starts[i] : key_starts[i + 1]].transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, dim=0)
            for rows in (key, value)
        )
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        outputs.append(((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def varlen_of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, longest: int, longest_key: int,
    *, return_aux: None = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """It has no `enable_gqa`; its kernel shares key heads unasked."""
    return documented_varlen(
        query, key, value, query_starts, key_starts, longest, longest_key,
        scale=scale, window_size=window_size, enable_gqa=True,
    )  # fmt: skip


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_torch_2_11_s_attention_is_called_with_the_arguments_that_it_has(pack, monkeypatch):
    prompts, completions, owners = pack
    layout = pack_layout(prompts, completions, owners)
    rows = [one[0].transpose(0, 1) for one in inputs(sum(prompts) + sum(completions))]
    outputs = []
    for function in (documented_varlen, varlen_of_torch_2_11):
        monkeypatch.setattr(shared_prefix, "varlen_attn", function)
        outputs.append(shared_prefix.varlen_segments(*rows, layout, SCALING))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["shared_prefix_sdpa", "shared_prefix_varlen"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
def test_attention_and_its_gradients_are_those_of_a_dense_mask(pack, name, monkeypatch):
    monkeypatch.setattr(shared_prefix, "varlen_attn", documented_varlen)
    prompts, completions, owners = pack
    mask = dense_mask(prompts, completions, owners)
    query, key, value = inputs(len(mask))
    attend = AttentionInterface()[name]
    output, weights = attend(
        torch.nn.Module(), query, key, value, None, scaling=SCALING, dropout=0.0, sliding_window=None,
        position_ids=None, use_cache=False, layout=pack_layout(prompts, completions, owners),
    )  # fmt: skip
    expected = dense(query, key, value, mask)
    assert weights is None
    assert output.shape == (1, len(mask), HEADS, SIZE)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    direction = draw(*expected.shape, seed=9)
    found = torch.autograd.grad(output, (query, key, value), direction)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (query, key, value), direction), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_gradients_of_a_prompt_s_keys_are_added_in_fp32(monkeypatch):
    """Each completion reads them. On GPUs attention is in BF16, and so would be the sums."""
    monkeypatch.setattr(shared_prefix, "varlen_attn", documented_varlen)
    added: list[torch.dtype] = []

    class Additions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "embedding_dense_backward" in str(function):
                added.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    prompts, completions, owners = PACKS["several groups"]
    rows = [one.bfloat16()[0].transpose(0, 1) for one in inputs(sum(prompts) + sum(completions))]
    layout = pack_layout(prompts, completions, owners)
    output = shared_prefix.varlen_segments(*rows, layout, SCALING)
    assert output.dtype == torch.bfloat16
    with Additions():
        output.sum().backward()
    assert added == [torch.float32] * 2  # of keys and of values


def test_neighbours_of_one_shape_go_together(monkeypatch):
    calls = []

    def counted(query: Tensor, *rest, **named) -> Tensor:
        calls.append(tuple(query.shape))
        return attention(query, *rest, **named)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    layout = pack_layout([5, 5], [3, 3, 3, 4], [0, 0, 1, 1])
    query, key, value = (draw(sum((5, 5, 3, 3, 3, 4)), 2, SIZE, seed=0) for _ in range(3))
    shared_prefix.sdpa_segments(query, key, value, layout, SCALING)
    assert calls == [(2, 2, 5, SIZE), (3, 2, 3, SIZE), (1, 2, 4, SIZE)]


def test_a_layout_by_hand():
    layout = pack_layout([2, 3], [2, 0, 1], [1, 0, 0])
    assert layout.segments == ((2, 2), (3, 3), (2, 5), (1, 3))
    assert layout.key_rows.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 0, 1, 7]
    assert layout.query_starts.tolist() == [0, 2, 5, 7, 8]
    assert layout.key_starts.tolist() == [0, 2, 5, 10, 13]


def test_nothing_as_large_as_the_row_s_square_is_made():
    """64 completions of 16 tokens: a mask over the row would have a thousand times the largest one's elements."""
    prompts, completions = [20], [16] * 64
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, Tensor))
            return made

    layout = pack_layout(prompts, completions, [0] * 64)
    tokens = 20 + 64 * 16
    query, key, value = (rows.detach() for rows in inputs(tokens))
    with Sizes():
        AttentionInterface()["shared_prefix_sdpa"](
            torch.nn.Module(), query, key, value, None, scaling=SCALING, layout=layout
        )
    assert sizes
    assert max(sizes) <= max(len(layout.key_rows) * KEY_HEADS, tokens * HEADS) * SIZE < tokens**2


def test_the_layout_moves_with_its_batch():
    layout = pack_layout([2], [1], [0]).to(torch.device("meta"))
    assert isinstance(layout, PackLayout)
    assert {layout.key_rows.device.type, layout.query_starts.device.type, layout.key_starts.device.type} == {"meta"}
