"""Bytes that the roles hold, by part and phase. Pure formulas; FSDP2's, AdamW's and vLLM's parts are named after them.

A learner's memory is the fullest in one of four moments of an update:

    logits             all activations of the row, and the gradient of a chunk of logits
    last text layer    all activations, one layer's weights and gradient, and the embedding's gradient
    text is done       the vision tower's activations, and the gradients of all text layers
    root is summed     all gradients, and the root's (embedding, merger): as computed, in FP32 for the sum over ranks,
                       and the sum, which is added to that of the micro-batches before

AdamW runs tensor by tensor on FSDP's shards. Its temporaries, two FP32 tensors of the embedding's size, are less than
the root's sum takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rft_cluster.config import Config
from rft_cluster.model.shapes import FP32, LOGPROB_CHUNK, Shapes
from rft_cluster.plan.work import Row

GIB = 2**30
BF16 = 2  # bytes
MOMENTS = 2 * FP32
# Of one logit in the backward of a chunk: the log-softmax, its gradient, and the gradient of what went in.
LOGITS_BACKWARD = 3 * FP32
PACKED = 2**30  # vLLM's buffer of a transfer: 1 GiB, or the largest tensor if that is larger

PHASES = ("generate", "learn", "transfer")


@dataclass(frozen=True)
class Part:
    """What one thing takes, in bytes, in each phase of a step."""

    name: str
    generate: float = 0
    learn: float = 0
    transfer: float = 0

    @classmethod
    def always(cls, name: str, held: float) -> "Part":
        return cls(name, held, held, held)

    def in_phase(self, phase: str) -> float:
        return float(getattr(self, phase))


@dataclass(frozen=True)
class State:
    """Bytes of what a learner rank keeps from step to step, and of its gradients."""

    weights: float
    moments: float
    gradients: float
    reference: float


def state(shapes: Shapes, config: Config) -> State:
    """One rank's share. Masters, gradients and moments are FP32 (4, 4 and 8 bytes a parameter), the reference is BF16;
    with LoRA the base is BF16 and only the adapters have gradients and moments, and no reference is needed."""
    ranks, lora, frozen = config.learners.count, config.model.lora, 0
    if lora:
        trained = shapes.adapters(lora.rank)
        weights = BF16 * shapes.parameters + FP32 * trained
    else:
        frozen = shapes.vision if config.model.freeze_vision else 0
        trained, weights = shapes.parameters - frozen, FP32 * shapes.parameters
    reference = BF16 * shapes.parameters if config.algorithm.kl_beta and not lora else 0
    return State(weights / ranks, MOMENTS * trained / ranks, FP32 * trained / ranks, reference / ranks)


def snapshot(shapes: Shapes, config: Config) -> float:
    """Bytes of all ranks' state in a snapshot and in a checkpoint: 12 a trained parameter in FP32, 4 a frozen one."""
    held = state(shapes, config)
    return config.learners.count * (held.weights + held.moments)


def snapshots(shapes: Shapes, config: Config) -> float:
    """Bytes that snapshots take in Ray's object stores at most, without second copies: the one that a checkpoint is
    written from and, with `cluster.snapshot_every`, the newest whole one and the next."""
    return (3 if config.cluster.snapshot_every else 1) * snapshot(shapes, config)


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of a row: of the language model, and of the vision tower."""

    text: float
    vision: float
    text_layer: float  # of one text layer alone, computed again with gradient checkpointing
    vision_layer: float


def activations(shapes: Shapes, config: Config, row: Row) -> Activations:
    """Activations of one micro-batch without gradient checkpointing, or only the layers' inputs with it."""
    size, rank = compute_size(config), config.model.lora.rank if config.model.lora else 0
    on_cpu = config.cluster.device == "cpu"
    token = shapes.kept_text(size, rank) + (shapes.kept_text_sdpa(size) if on_cpu else 0)
    key = shapes.kept_key(FP32 if on_cpu else size)
    text_layer = token * row.tokens + key * row.keys
    vision_layer = 0.0 if vision_is_frozen(config) else shapes.kept_vision(size) * row.patches
    text_kept, vision_kept = text_layer, vision_layer
    if config.learners.gradient_checkpointing:
        text_kept = shapes.hidden * size * row.tokens
        vision_kept = 0.0 if vision_is_frozen(config) else shapes.vision_hidden * size * row.patches
    text_ends = shapes.kept_text_ends(size) * row.tokens + shapes.hidden * size * row.predicted
    return Activations(
        text=shapes.layers * text_kept + text_ends,
        vision=shapes.vision_layers * vision_kept + shapes.kept_vision_ends(size) * row.patches,
        text_layer=text_layer,
        vision_layer=vision_layer or 3 * shapes.vision_inner * size * row.patches,
    )


def vision_is_frozen(config: Config) -> bool:
    return config.model.freeze_vision or config.model.lora is not None


def compute_size(config: Config) -> int:
    """Bytes of a number in the type that layers compute in."""
    return BF16 if config.cluster.dtype == "bfloat16" else FP32


def logits(shapes: Shapes, config: Config, predicted: float) -> float:
    """A chunk of logits in the backward, beside the head's gradient of the chunks before."""
    before = head_gradient(shapes, config) if predicted > LOGPROB_CHUNK else 0
    return min(LOGPROB_CHUNK, predicted) * shapes.vocabulary * LOGITS_BACKWARD + before


def head_gradient(shapes: Shapes, config: Config) -> float:
    """The gradient of the `lm_head`, which waits until the whole root's is complete; none for frozen weights."""
    return 0 if config.model.lora else compute_size(config) * shapes.embedding


def in_flight(shapes: Shapes, config: Config, row: Row) -> float:
    """Layers that FSDP gathers (this one and the next), one layer's gradient as computed and as summed in FP32, and the
    gradients of the MLP's three inner tensors."""
    size = compute_size(config)
    layer = (2 + 1) * size + FP32 if not config.model.lora else 2 * size
    return layer * shapes.largest_unit + 3 * shapes.inner * size * row.tokens


def learner_parts(shapes: Shapes, config: Config, row: Row, micro_batches: int) -> list[Part]:
    """What a learner rank holds on its device. `row`: the largest of its micro-batches."""
    held, kept, size = state(shapes, config), activations(shapes, config, row), compute_size(config)
    ranks, offloaded = config.learners.count, config.learners.cpu_offload
    # The root of the reference is never sharded again: no backward follows its forward.
    root, reference_root = size * shapes.root, size * shapes.root if held.reference else 0
    if offloaded:
        held = State(0, 0, 0, 0)
    trained_root = 0 if config.model.lora else shapes.root
    again = config.learners.gradient_checkpointing
    early = held.gradients if micro_batches > 1 else 0  # of the micro-batches before
    flight = in_flight(shapes, config, row)
    whole, head = kept.text + kept.vision, head_gradient(shapes, config)
    moments = [  # gradients, gathered root, layers in flight, activations, logits, temporaries
        (early, root, 0, whole, logits(shapes, config, row.predicted), 0),
        (early, root, flight, whole + (kept.text_layer if again else 0), 0, head),
        (held.gradients, root, flight, kept.vision + (kept.vision_layer if again else 0), 0, head),
        (held.gradients, root, 0, 0, 0, (size + FP32 + (FP32 / ranks if micro_batches > 1 else 0)) * trained_root),
    ]
    gradients, gathered, flight, kept_bytes, logit_bytes, temporary = max(moments, key=sum)
    return [
        Part.always("weights of the policy", held.weights),
        Part.always("moments of AdamW", held.moments),
        Part("gradients", learn=gradients),
        Part.always("reference", held.reference),
        Part("gathered by FSDP", reference_root, reference_root + gathered + flight, reference_root),
        Part("activations", learn=kept_bytes),
        Part("logits", learn=logit_bytes),
        Part("temporaries", learn=temporary),
    ]


def transfer_buffer(shapes: Shapes) -> float:
    """The packed buffer of vLLM's IPC and NCCL senders: it holds whole tensors."""
    return max(PACKED, BF16 * shapes.embedding)


def key_value_bytes(shapes: Shapes) -> float:
    """Of one token in an engine's KV cache, in BF16: keys and values of all layers."""
    return 2 * shapes.key * BF16 * shapes.layers


def total(parts: Iterable[Part], phase: str) -> float:
    return sum(part.in_phase(phase) for part in parts)
