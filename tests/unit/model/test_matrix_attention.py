"""Attention by matrix products against a softmax written out in FP64, and against SDPA, which short sequences keep."""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from rft_cluster.model import matrix_attention, shared_prefix
from rft_cluster.model.matrix_attention import LONG, attend, is_long
from rft_cluster.model.shared_prefix import pack_layout

HEADS, KEY_HEADS, SIZE, SCALING = 4, 2, 8, 0.3


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def inputs(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys))
    return [draw(3, heads, rows, SIZE, seed=seed, dtype=dtype) for seed, (heads, rows) in enumerate(shapes)]


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    key, value = (rows.repeat_interleave(HEADS // KEY_HEADS, dim=1) for rows in (key, value))
    scores = query @ key.mT * SCALING
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_are_those_of_a_softmax(dtype, tolerance, masked):
    queries, keys = 5, 9
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if masked else None
    ours = inputs(queries, keys, dtype)
    exact = [one.detach().double().requires_grad_() for one in ours]
    found, expected = attend(*ours, mask, SCALING), written_out(*exact, mask)
    assert found.dtype == dtype
    direction = draw(*expected.shape, seed=9, dtype=dtype).detach()
    pairs = zip(
        (found, *torch.autograd.grad(found, ours, direction)),
        (expected, *torch.autograd.grad(expected, exact, direction.double())),
        strict=True,
    )
    for one, other in pairs:
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("dtype", "keys", "expected"), [
    (torch.bfloat16, LONG, True), (torch.bfloat16, LONG - 1, False), (torch.float32, LONG, False),
])  # fmt: skip
def test_only_long_sequences_in_bf16_leave_sdpa(dtype, keys, expected):
    assert is_long(dtype, keys) is expected


def attended(name: str, rows: list[Tensor], **options: object) -> Tensor:
    return AttentionInterface()[name](torch.nn.Module(), *rows, None, scaling=SCALING, dropout=0.0, **options)[0]


@pytest.mark.parametrize("patches", [LONG - 1, LONG])
def test_the_vision_tower_s_is_that_of_sdpa(patches):
    rows = [draw(1, HEADS, patches, SIZE, seed=seed, dtype=torch.bfloat16).detach() for seed in range(3)]
    ours, theirs = (attended(name, rows, is_causal=False) for name in ("matrix_or_sdpa", "sdpa"))
    assert ours.shape == theirs.shape == (1, patches, HEADS, SIZE)
    assert torch.equal(ours, theirs) == (patches < LONG), "it must be SDPA itself, or not at all"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_long_segments_of_a_packed_row_are_those_of_sdpa(monkeypatch):
    layout = pack_layout([LONG, 40], [7, 7, 5, 5], [0, 0, 1, 1])
    tokens = LONG + 40 + 24
    rows = [draw(tokens, heads, SIZE, seed=heads, dtype=torch.bfloat16) for heads in (HEADS, KEY_HEADS)]
    rows.append(draw(tokens, KEY_HEADS, SIZE, seed=7, dtype=torch.bfloat16))
    direction = draw(tokens, HEADS, SIZE, seed=8, dtype=torch.bfloat16).detach()
    called = []
    monkeypatch.setattr(shared_prefix, "attend", lambda *given: called.append(len(given[0])) or attend(*given))
    found = shared_prefix.sdpa_segments(*rows, layout, SCALING)
    assert called == [1, 2], "the long prompt, and its two completions"
    ours = torch.autograd.grad(found, rows, direction)
    monkeypatch.setattr(matrix_attention, "LONG", tokens)
    expected = shared_prefix.sdpa_segments(*rows, layout, SCALING)
    assert len(called) == 2
    for one, other in zip((found, *ours), (expected, *torch.autograd.grad(expected, rows, direction)), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).float().norm() <= 0.02 * other.float().norm()
