"""The sizes of a model, from its config.json: parameters by part, and the bytes and FLOPs of one layer.

Formulas of transformers' Qwen2-VL (`modeling_qwen2_vl.py`, 5.19) with this project's attention. `benchmarks/plan.py`
measures the bytes at the 2B's true widths, and unit tests count them at small ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft_cluster.model.families.family import TEXT_LINEAR
from rft_cluster.model.families.known import family_of
from rft_cluster.model.numbers import FRAMES, MERGE, read_numbers

COLOURS = 3
MERGED = MERGE * MERGE  # patches of an image token
ADAPTED = len(TEXT_LINEAR)  # linear layers of a text layer with a LoRA adapter
FP32 = 4  # bytes
# Tokens for which log-probabilities are computed at once. Bounds the FP32 [tokens x vocabulary] tensor.
LOGPROB_CHUNK = 512


@dataclass(frozen=True)
class Shapes:
    """Widths and numbers of layers. `query` and `key` are widths of all heads together: 1536 and 256 in the 2B.

    `patch`: pixels of a patch's side. `windowed_layers`: vision layers that attend in windows of `window` patches. The
    others: see `TextNumbers` and `VisionNumbers`.
    """

    hidden: int
    query: int
    key: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    tied: bool
    vision_hidden: int
    vision_inner: int
    vision_layers: int
    vision_heads: int
    # Recorded measurements of Qwen2-VL do not name these:
    patch: int = 14
    query_key_norm: bool = False
    gated: bool = False
    inner_kept: int = 3
    learned_positions: int = 0
    deepstack: int = 0
    windowed_layers: int = 0
    window: int = 0

    @classmethod
    def of(cls, config: dict[str, Any], file: Path) -> "Shapes":
        """The sizes in `config`, the content of `file`.

        Raises:
            UserError: the family is not supported, or a number is out of its range.
        """
        family = family_of(config.get("model_type"), file)
        text, vision = read_numbers(config, family.numbers, file)
        section = config.get("text_config") or {}
        return cls(
            hidden=text.hidden_size,
            query=text.query,
            key=text.key,
            inner=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            vocabulary=text.vocab_size,
            tied=bool(config.get("tie_word_embeddings", section.get("tie_word_embeddings", False))),
            patch=family.patch,
            query_key_norm=text.query_key_norm,
            gated=vision.gated,
            inner_kept=vision.inner_kept,
            learned_positions=vision.learned_positions,
            deepstack=vision.deepstack,
            windowed_layers=vision.windowed_layers,
            window=vision.window_patches,
            vision_hidden=vision.width,
            vision_inner=vision.inner,
            vision_layers=vision.depth,
            vision_heads=vision.num_heads,
        )

    # Numbers of parameters

    @property
    def text_layer(self) -> int:
        """q, k, v with biases, or with norms of the first two; o; gate, up, down; two norms."""
        beside = 2 * self.head if self.query_key_norm else self.query + 2 * self.key
        attention = 2 * self.hidden * (self.query + self.key) + beside
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.query // self.heads

    @property
    def vision_layer(self) -> int:
        """qkv, proj, the MLP and two norms, all with biases; those of a gated one have none in the norms."""
        width, inner = self.vision_hidden, self.vision_inner
        up = 2 if self.gated else 1
        return 4 * width * (width + 1) + (up + 1) * width * inner + up * inner + width + 2 * self._vision_norm

    @property
    def _vision_norm(self) -> int:
        """A weight, and LayerNorm's bias."""
        return self.vision_hidden * (1 if self.gated else 2)

    @property
    def merger(self) -> int:
        """A norm and two linear layers, from the patches of a token to the language model's width."""
        width = MERGED * self.vision_hidden
        return self._vision_norm + width * (width + 1) + (width + 1) * self.hidden

    @property
    def deepstack_merger(self) -> int:
        """As `merger`, but its norm is of all patches of a token together."""
        return self.merger + 2 * (MERGED - 1) * self.vision_hidden

    @property
    def patch_values(self) -> int:
        """A patch's pixel values: 1176 for 14 x 14 pixels."""
        return COLOURS * FRAMES * self.patch**2

    @property
    def patch_embedding(self) -> int:
        """With the learned positions, and the bias that there is then."""
        beside = 1 + self.learned_positions if self.learned_positions else 0
        return (self.patch_values + beside) * self.vision_hidden

    @property
    def embedding(self) -> int:
        """Also the size of the `lm_head`, which is the same tensor if `tied`."""
        return self.vocabulary * self.hidden

    @property
    def vision(self) -> int:
        """The whole vision tower, mergers included."""
        mergers = self.merger + self.deepstack * self.deepstack_merger
        return self.vision_layers * self.vision_layer + self.patch_embedding + mergers

    @property
    def root(self) -> int:
        """What FSDP keeps outside the layers: embedding, head, last norm, patch embedding, merger."""
        return self.embedding * (1 if self.tied else 2) + self.hidden + self.patch_embedding + self.merger

    @property
    def parameters(self) -> int:
        units = self.layers * self.text_layer + self.vision_layers * self.vision_layer
        return units + self.deepstack * self.deepstack_merger + self.root

    @property
    def largest_unit(self) -> int:
        """The largest layer that FSDP gathers by itself."""
        return max(self.text_layer, self.vision_layer, self.deepstack_merger if self.deepstack else 0)

    @property
    def tensors(self) -> int:
        """Number of parameter tensors: 11 or 12 a text layer, 12 a vision layer, 6 a merger of deepstack, and those of
        the root."""
        units = (11 if self.query_key_norm else 12) * self.layers + 12 * self.vision_layers + 6 * self.deepstack
        root = (8 if self.gated else 9) + (2 if self.learned_positions else 0) + (0 if self.tied else 1)
        return units + root

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of this rank: [rank, in] and [out, rank] for each of seven linear layers."""
        hidden, query, key, inner = self.hidden, self.query, self.key, self.inner
        widths = (hidden + query) + 2 * (hidden + key) + (query + hidden) + 3 * (hidden + inner)
        return self.layers * rank * widths

    # Bytes that autograd keeps for the backward. `size`: bytes of the type that layers compute in.

    def kept_text(self, size: int, rank: int = 0) -> int:
        """Of a token in one text layer, without attention's keys. `rank`: of LoRA adapters; 0: weights are trained.

        Each norm keeps its input in FP32, the normalised input (for its weight's gradient), and its output, the next
        linear layer's input. The MLP keeps four tensors (gate, its activation, up, their product), attention its query
        and its output. Adapters keep their own rank's values; frozen norms keep no normalised input.
        """
        of_a_norm = FP32 + size + (0 if rank else size)
        norms = 2 * self.hidden * of_a_norm
        if self.query_key_norm:  # of each head; their outputs are not kept, the rotated ones are
            norms += (self.query + self.key) * (of_a_norm - size) + FP32 * (self.query + self.key) // self.head
        return norms + 4 * self.inner * size + 2 * self.query * size + ADAPTED * rank * size + FP32 * (self.heads + 2)

    def kept_text_sdpa(self, size: int) -> int:
        """What SDPA keeps beyond that of a token: on CPUs it computes in FP32 (`shared_prefix.sdpa_segments`), so query
        and output are there in FP32 too, or in FP32 once more."""
        return self.query * (2 * FP32 - size)

    def kept_key(self, size: int) -> int:
        """Of one row of gathered keys and values in one text layer. A completion gathers its prompt's rows again."""
        return 2 * self.key * size

    def kept_vision(self, size: int) -> int:
        """Of a patch in one vision layer: two norms' inputs and outputs (4 widths); qkv, rotated query and key,
        attention's output, once more as the next layer's input (7); and the MLP's inner tensors. Norms of a gated tower
        keep what those of a text layer do."""
        width, inner = self.vision_hidden, self.inner_kept * self.vision_inner * size
        norms = 2 * (width * (FP32 + 2 * size) + FP32) if self.gated else 4 * width * size + 4 * size
        return norms + 7 * width * size + inner + FP32 * self.vision_heads

    def kept_text_ends(self, size: int) -> int:
        """Of a token outside the layers: the embedding, the last norm, the rotary tables of a head's width."""
        return self.hidden * (FP32 + 2 * size) + 2 * self.head * size

    def kept_vision_ends(self, size: int) -> int:
        """Of a patch outside the layers: pixels as given (FP32) and as computed with, and four tensors a merger."""
        head = self.vision_hidden // self.vision_heads
        return (
            self.patch_values * (FP32 + size) + 4 * (1 + self.deepstack) * self.vision_hidden * size + 2 * head * FP32
        )

    # FLOPs of a forward: two for each weight and token (a multiplication and an addition)

    def text_flops(self, tokens: float, pairs: float) -> float:
        """Of all text layers. `pairs`: of a query and a key that it attends to; each takes 4 FLOPs a head's width."""
        return self.layers * (2 * self.text_layer * tokens + 4 * self.query * pairs)

    def vision_flops(self, patches: float, pairs: float) -> float:
        """Of the vision tower. `pairs`: of patches of the same image."""
        whole = self.vision_layers - self.windowed_layers
        all_pairs = whole * pairs + self.windowed_layers * min(pairs, patches * self.window)
        layers = self.vision_layers * 2 * self.vision_layer * patches + 4 * self.vision_hidden * all_pairs
        mergers = self.merger + self.deepstack * self.deepstack_merger
        return layers + 2 * patches * (self.patch_values * self.vision_hidden + mergers / MERGED)

    def head_flops(self, tokens: float) -> float:
        """Of the logits of these tokens."""
        return 2 * self.embedding * tokens
