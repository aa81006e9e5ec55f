"""Seconds of a step by phase, from FLOPs, bytes and a card's rates.

    learn       the longest of arithmetic with memory traffic, links, and the processor's time to start kernels
    generate    prefill by arithmetic; then a step of the engine for each token of a completion, which reads the weights
                and the KV cache once
    transfer    the weights over the link or the memory, a few times

Rates are shares of the data sheet's that such programs reach. One update was measured on a GPU here (LAYER_SECONDS).
"""

from dataclasses import dataclass, replace

from rft_cluster.config import Config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import FP32, MERGED, Shapes
from rft_cluster.plan.cards import Card
from rft_cluster.plan.memory import BF16, GIB, activations, compute_size, key_value_bytes, vision_is_frozen
from rft_cluster.plan.places import engine
from rft_cluster.plan.work import Prompts, Row, Share, learner_share

# Share of the peak that large BF16 matrix products reach, and share of the bandwidth that long copies reach. They give
# 55 % of the peak for an update of a language model of 7 billion parameters on an A100. torchtitan reports 57 % for
# Llama 3 8B (docs/performance.md there, FSDP2), fms-fsdp 50 % on A100 and 32 % on 96 H100 (its README, 7B).
PRODUCTS, COPIES = 0.6, 0.8
# Times that the bytes kept for the backward are written or read: in a forward that keeps them, and with its backward.
FORWARD_PASSES, TRAINING_PASSES = 2, 6
ADAM_BYTES = 28  # a parameter: read weight, gradient and two moments, write weight and two moments, all FP32
ADAM_PASSES = 3  # AdamW on DTensors runs operation by operation, not fused: it reads and writes that often
SLEEP = 0.5  # seconds for an engine to sleep and wake, level 2 (vLLM's blog of 2025-10-26: 0.1 to 0.8 for small models)
# Seconds of a processor's core for a layer's forward (its backward takes twice that), and for clipping and AdamW of one
# DTensor. Measured on a core of an AMD EPYC with tiny widths, which leaves Python, dispatch and FSDP: 1.0 ms a layer,
# and 2.4 on the digits, where attention is one call for each length of completions. On GPUs one call does for all, so
# 0.6 ms was expected. But an update on an H100 took 3.85 s where that gave 1.1 (benchmarks/results/gpu_learner.json),
# for reasons that are not known yet. So the figure is fitted to that one measurement.
LAYER_SECONDS, TENSOR_SECONDS = {"cpu": 2.4e-3, "cuda": 2.6e-3}, 1.0e-4
SEND_TENSOR = 2.0e-4  # to cast, send, load and digest a tensor, whatever its size (20 ms for the tiny model's 82)
# Seconds of an engine's own work in a step: scheduling, sampling, detokenising. On CPUs fitted to `make bench`.
ENGINE_SECONDS = {"cuda": 4e-3, "cpu": 15e-3}  # on GPUs estimated
# Seconds of one core to take in a prompt, fitted likewise, and to decode and prepare its image, for each of its tokens.
PROMPT_SECONDS, IMAGE_SECONDS = 3e-3, 2.5e-5
# Seconds of a collective of FSDP beyond its bytes: gloo's, measured (0.3 to 0.6 ms); NCCL's runs beside the arithmetic.
LATENCY = {"cuda": 0.0, "cpu": 0.5e-3}
# Seconds of the driver in each step, and for each generator, prompt and learner of it: the goals of `make
# bench-controller`. On two cores, which all actors shared, it measured two to five times that (docs/performance.md).
DRIVER, PER_GENERATOR, PER_PROMPT, PER_LEARNER = 15e-3, 1.5e-3, 0.3e-3, 0.5e-3
HOST_LINK = 20e9  # bytes a second between a GPU and pinned host memory (PCIe 4)
SAMPLER_PASSES = 8  # over the FP32 logits of a step


@dataclass(frozen=True)
class Learning:
    """Seconds that one learner needs in a step. On a GPU the first three overlap, and the longest is the bound."""

    arithmetic: float
    links: float
    kernels: float
    optimizer: float
    overlap: bool

    @property
    def seconds(self) -> float:
        parts = self.arithmetic, self.links, self.kernels
        return (max(parts) if self.overlap else sum(parts)) + self.optimizer

    @property
    def bound(self) -> str:
        bounds = {"arithmetic": self.arithmetic, "links": self.links, "starting kernels": self.kernels}
        return max(bounds, key=bounds.__getitem__)


@dataclass(frozen=True)
class Seconds:
    """Of one step. `learners` and `generators` that have their own devices and `max_staleness` above 0 overlap."""

    generate: float
    learning: Learning
    transfer: float
    driver: float
    overlap: bool

    @property
    def learn(self) -> float:
        return self.learning.seconds

    @property
    def step(self) -> float:
        roles = max(self.generate, self.learn) if self.overlap else self.generate + self.learn
        return roles + self.transfer + self.driver


def step_seconds(shapes: Shapes, config: Config, card: Card, prompt: PromptLength, length: float) -> Seconds:
    """The phases of a step with completions of `length` tokens on average."""
    prompts, generators, learners = config.schedule.prompts_per_step, config.generators.count, config.learners.count
    serving, learner = share(card, config, generators), share(card, config, learners)
    return Seconds(
        generate=generate_seconds(
            shapes, config, serving, prompt, prompts / generators, config.sampling.group_size, length
        )
        if config.algorithm.samples
        else 0.0,
        learning=learning(shapes, config, learner, learner_share(config, prompt, length)),
        # SFT transfers weights before evaluations alone.
        transfer=transfer_seconds(shapes, config, card) if config.algorithm.samples else 0.0,
        driver=DRIVER + PER_GENERATOR * generators + PER_PROMPT * prompts + PER_LEARNER * learners,
        overlap=bool(config.schedule.max_staleness),
    )


def share(card: Card, config: Config, actors: int) -> Card:
    """The part of the device that each actor of a role has: all of a GPU, on CPUs its share of the machine."""
    if config.cluster.device == "cuda":
        return card
    return replace(card, flops=card.flops / actors, bandwidth=card.bandwidth / actors)


# Learning


def learning(shapes: Shapes, config: Config, card: Card, part: Share) -> Learning:
    """A step's updates on one learner, which has `part` of the step's tokens."""
    row, count = part.row, part.micro_batches
    old_policy = config.algorithm.samples and config.algorithm.updates_per_step > 1
    forwards = bool(config.algorithm.kl_beta) + old_policy  # of the reference, and of the policy before the step
    flops = forwards * forward_flops(shapes, row) + training_flops(shapes, config, row)
    moved = traffic(shapes, config, row, forwards)
    units = shapes.layers + shapes.vision_layers
    passes = forwards + 3 + config.learners.gradient_checkpointing  # a backward starts twice as many kernels
    links = (forwards + 2) * _gathered(shapes, config, card) + _reduced(shapes, config, card)
    if config.learners.count > 1:
        links += (forwards + 3) * (units + 1) * LATENCY[config.cluster.device]
    return Learning(
        arithmetic=flops / (PRODUCTS * card.flops) + moved / (COPIES * card.bandwidth),
        links=count * links,
        kernels=count * passes * units * LAYER_SECONDS[config.cluster.device],
        optimizer=config.algorithm.updates_per_step * optimizer_seconds(shapes, config, card),
        overlap=config.cluster.device == "cuda",
    )


def forward_flops(shapes: Shapes, row: Row) -> float:
    return (
        shapes.text_flops(row.tokens, row.pairs)
        + shapes.vision_flops(row.patches, row.patch_pairs)
        + shapes.head_flops(row.predicted)
    )


def training_flops(shapes: Shapes, config: Config, row: Row) -> float:
    """Forward and backward. A backward has the FLOPs of two forwards, one for the inputs' gradients and one for the
    weights'; frozen weights need none for themselves. The head is computed twice (`model.policy`)."""
    lora, again = config.model.lora is not None, config.learners.gradient_checkpointing
    text, head = (2 if lora else 3) + again, 3 if lora else 4
    vision = 1 if vision_is_frozen(config) else 3 + again
    return (
        text * shapes.text_flops(row.tokens, row.pairs)
        + vision * shapes.vision_flops(row.patches, row.patch_pairs)
        + head * shapes.head_flops(row.predicted)
    )


def traffic(shapes: Shapes, config: Config, row: Row, forwards: int) -> float:
    """Bytes between memory and processor of everything between the matrix products, which is not fused."""
    plain = config.model_copy(update={"learners": config.learners.model_copy(update={"gradient_checkpointing": False})})
    kept = activations(shapes, plain, row)
    again = FORWARD_PASSES * config.learners.gradient_checkpointing
    chunk = shapes.vocabulary * FP32 * row.predicted
    return (kept.text + kept.vision + chunk) * (forwards * FORWARD_PASSES + TRAINING_PASSES + again)


def optimizer_seconds(shapes: Shapes, config: Config, card: Card) -> float:
    """AdamW and clipping. Each tensor takes some time of the processor, whatever its size."""
    lora = config.model.lora
    trained = shapes.adapters(lora.rank) if lora else shapes.parameters
    moved = ADAM_PASSES * ADAM_BYTES * trained / config.learners.count
    rate = HOST_LINK if config.learners.cpu_offload else COPIES * card.bandwidth
    device, processor = moved / rate, shapes.tensors * TENSOR_SECONDS
    return max(device, processor) if config.cluster.device == "cuda" else device + processor


def _gathered(shapes: Shapes, config: Config, card: Card) -> float:
    """Seconds to gather all weights once, for a forward or a backward; from host memory if they are kept there."""
    ranks, weights = config.learners.count, compute_size(config) * shapes.parameters
    if config.learners.cpu_offload:
        return weights / HOST_LINK
    return weights * (ranks - 1) / ranks / card.link


def _reduced(shapes: Shapes, config: Config, card: Card) -> float:
    """Seconds to add up all gradients in FP32."""
    lora, ranks = config.model.lora, config.learners.count
    trained = shapes.adapters(lora.rank) if lora else shapes.parameters
    rate = HOST_LINK if config.learners.cpu_offload else card.link
    return FP32 * trained * (1 if config.learners.cpu_offload else (ranks - 1) / ranks) / rate


# Generating


def generate_seconds(
    shapes: Shapes, config: Config, card: Card, prompt: PromptLength, prompts: float, samples: int, length: float
) -> float:
    """One engine's time for `prompts` prompts with `samples` completions each. A prompt is read once for all of them
    (prefix caching), and so is its image. Completions beyond the engine's seats take turns."""
    cards = max(1, int(config.generators.gpus))
    patches = prompt.image * MERGED
    row = Row(1, prompt.tokens, patches, 0, prompt.tokens**2 / 2, patches**2, 1)
    taken_in = PROMPT_SECONDS + prompt.image * IMAGE_SECONDS
    prefill = prompts * (forward_flops(shapes, row) / (PRODUCTS * card.flops * cards) + taken_in)
    completions = prompts * samples
    rounds = max(1.0, completions / seats(shapes, config, card, prompt.tokens / samples + length))
    at_once = completions / rounds
    return prefill + rounds * length * decode_seconds(shapes, config, card, prompt.tokens + length / 2, at_once)


def seats(shapes: Shapes, config: Config, card: Card, tokens: float) -> float:
    """Completions that an engine writes at once. `tokens`: of the KV cache for each, with its share of the prompt."""
    if config.cluster.device == "cpu":
        room = config.generators.kv_cache_gib * GIB / key_value_bytes(shapes)
    else:
        room = engine(shapes, config, card.gib).tokens
    return max(1.0, min(config.generators.max_concurrent, room / tokens))


def decode_seconds(shapes: Shapes, config: Config, card: Card, context: float, at_once: float) -> float:
    """One token for each of `at_once` completions: the weights once, each completion's keys and values once; or the
    arithmetic, if that takes longer; and the engine's own work."""
    cards, size = max(1, int(config.generators.gpus)), compute_size(config)
    weights = size * (shapes.layers * shapes.text_layer + shapes.embedding)
    cache = at_once * context * key_value_bytes(shapes)
    sampler = SAMPLER_PASSES * at_once * shapes.vocabulary * FP32
    flops = at_once * (shapes.text_flops(1, context) + shapes.head_flops(1))
    memory = (weights + cache + sampler) / (COPIES * card.bandwidth * cards)
    return max(memory, flops / (PRODUCTS * card.flops * cards)) + ENGINE_SECONDS[config.cluster.device]


# Transfer


def transfer_seconds(shapes: Shapes, config: Config, card: Card) -> float:
    """Cast the masters, send them, load them, and compute the digests of both ends. On a shared GPU the engine also
    sleeps and wakes."""
    weights = BF16 * shapes.parameters
    cast = (FP32 + BF16) * shapes.parameters / config.learners.count
    copies = (cast + 2 * weights + 2 * weights + 2 * weights) / (COPIES * card.bandwidth)  # pack, load, digests
    copies += SEND_TENSOR * shapes.tensors
    if config.cluster.device == "cpu":
        return copies
    if config.shares_gpus:
        return copies + SLEEP
    ranks = config.learners.count
    return copies + weights / card.link + weights * (ranks - 1) / ranks / card.link


def answers_seconds(
    shapes: Shapes, config: Config, card: Card, prompts: Prompts, length: float, samples: int = 1
) -> float:
    """So many answers to each prompt, on all generators, outside the steps."""
    each = prompts.count / config.generators.count
    return generate_seconds(shapes, config, card, prompts.mean, each, samples, length) if each else 0.0
