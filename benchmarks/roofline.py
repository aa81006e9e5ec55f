"""FLOPs of a learner's step, and matrix products of like shapes, whose rate a processor can reach."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Qwen2VLConfig

TIMES = 3  # that the products are computed: half a second on a thread with AVX-512 BF16


def like_products(config: Qwen2VLConfig, tokens: int, patches: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Input, weight and the output's gradient of the widest linear layer of the text and of the vision tower."""
    text, vision = config.text_config, config.vision_config
    layers = (
        (tokens, text.hidden_size, text.intermediate_size),
        (patches, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)),
    )
    draw = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=draw).to(dtype) for shape in ((rows, wide), (out, wide), (rows, out))]
        for rows, wide, out in layers
    ]


def multiply(layers: list[list[Tensor]]) -> None:
    """Compute the output and both gradients of each layer, `TIMES` times."""
    for inputs, weight, gradient in layers * TIMES:
        _ = inputs @ weight.T, gradient @ weight, gradient.T @ inputs


def products_flops(layers: list[list[Tensor]]) -> float:
    """FLOPs of `multiply`: two for each multiplication and addition."""
    return TIMES * sum(6.0 * len(inputs) * weight.numel() for inputs, weight, _ in layers)


def counted_flops(work: Callable[[], object]) -> float:
    """FLOPs of all matrix products in `work`, including those inside SDPA, and those made again for the backward."""

    def attention(query: object, key: object, value: object, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(
        gradient: object, query: object, key: object, value: object, *_: object, **__: object
    ) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    operators = torch.ops.aten
    formulas = {
        operators._scaled_dot_product_flash_attention_for_cpu: attention,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return float(counter.get_total_flops())
