"""FLOPs are counted as they are computed on a CPU, and the products beside a step are as many as are said."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.roofline import counted_flops, like_products, multiply, products_flops
from rft_cluster.model.matrix_attention import attend

QUERIES, KEYS, HEADS, SIZE = 4, 6, 2, 8
ATTENTION = 4 * HEADS * QUERIES * KEYS * SIZE  # two products, two FLOPs for each multiplication and addition


class Sizes:
    class text_config:
        hidden_size, intermediate_size = 8, 16

    class vision_config:
        embed_dim, mlp_ratio = 4, 2


def test_the_products_are_those_that_are_counted():
    layers = like_products(Sizes, 10, 20, torch.float32)
    assert [[tuple(one.shape) for one in layer] for layer in layers] == [
        [(10, 8), (16, 8), (10, 16)],
        [(20, 4), (8, 4), (20, 8)],
    ]
    assert counted_flops(lambda: multiply(layers)) == products_flops(layers) == 3 * 3 * 2 * (10 * 8 * 16 + 20 * 4 * 8)


@pytest.mark.parametrize("ours", [False, True])
def test_attention_counts_the_same_in_sdpa_and_in_products(ours):
    """Two products, and in the backward five: the scores again, and the gradients of weights, value, query and key."""
    query, key, value = (torch.randn(1, HEADS, rows, SIZE, requires_grad=True) for rows in (QUERIES, KEYS, KEYS))

    def attended() -> torch.Tensor:
        if ours:
            return attend(query, key, value, None, 1.0)
        return F.scaled_dot_product_attention(query, key, value)

    assert counted_flops(attended) == ATTENTION
    assert counted_flops(lambda: attended().sum().backward()) == ATTENTION * 7 / 2
