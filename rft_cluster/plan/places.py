"""The memories of a run, each with what it holds: a GPU of a learner, of a generator or of both, or a CPU's machine."""

from dataclasses import dataclass

from rft_cluster.config import Config
from rft_cluster.model.shapes import FP32, Shapes
from rft_cluster.plan.cards import Card
from rft_cluster.plan.memory import (
    BF16,
    GIB,
    PHASES,
    Part,
    compute_size,
    key_value_bytes,
    learner_parts,
    snapshot,
    snapshots,
    state,
    total,
    transfer_buffer,
)
from rft_cluster.plan.work import Row

# Of a learner's process on a GPU before it holds a tensor: CUDA's context and the libraries' workspaces; NCCL's.
# Of a sleeping engine: the same, and its CUDA graphs, which stay (vLLM's `sleep_mode_offload_cudagraph`). Estimated.
CONTEXT, NCCL, ASLEEP = 0.5 * GIB, 1.0 * GIB, 2.0 * GIB
# vLLM's default number of tokens in one step of an engine: more on large cards (`EngineArgs.get_batch_defaults`).
BATCHED, BATCHED_ON_LARGE, LARGE_GIB = 8192, 16_384, 70
# GiB of a CPU process with torch, transformers, vLLM or Ray imported; measured on the digits (docs/gpus.md).
PROCESS = {"learner": 0.55 * GIB, "engine": 0.7 * GIB, "driver and Ray": 1.2 * GIB}


@dataclass(frozen=True)
class Place:
    """A memory of `limit` bytes and its parts."""

    name: str
    limit: float
    parts: list[Part]

    def peak(self, phase: str) -> float:
        return total(self.parts, phase)

    @property
    def fullest(self) -> str:
        """The phase in which it holds most."""
        return max(PHASES, key=self.peak)

    @property
    def free(self) -> float:
        return self.limit - self.peak(self.fullest)


@dataclass(frozen=True)
class Engine:
    """Bytes of a generator's engine on each of its GPUs, and the tokens that its KV cache has room for."""

    weights: float
    working: float
    cache: float
    tokens: float


def engine(shapes: Shapes, config: Config, gib: float) -> Engine:
    """vLLM takes `generators.gpu_memory` of the card, its context and graphs included. The KV cache gets what weights
    and working memory leave (`determine_available_memory` in vLLM's `gpu_worker.py`)."""
    cards, seats = max(1, int(config.generators.gpus)), config.generators.max_concurrent
    weights = BF16 * shapes.parameters / cards
    batched = BATCHED_ON_LARGE if gib >= LARGE_GIB else BATCHED
    # The largest layer's inner tensors for all tokens of a step, and the sampler's logits for all sequences.
    working = batched * (3 * shapes.inner / cards + 4 * shapes.hidden) * BF16 + 3 * seats * shapes.vocabulary * FP32
    cache = config.generators.gpu_memory * gib * GIB - weights - working - ASLEEP
    return Engine(weights, working, cache, cache / (key_value_bytes(shapes) / cards))


def places(shapes: Shapes, config: Config, card: Card, row: Row, micro_batches: int) -> list[Place]:
    """The memories of a run. `row`: the largest micro-batch of a learner, of `micro_batches` in an update."""
    learner = learner_parts(shapes, config, row, micro_batches)
    if config.cluster.device == "cpu":
        return [Place(card.name, card.gib * GIB, _on_a_cpu(shapes, config, learner))]
    room, serving = card.gib * GIB, engine(shapes, config, card.gib)
    largest, chunk = BF16 * shapes.embedding, transfer_buffer(shapes)
    if config.shares_gpus:
        parts = [
            *learner,
            Part("transfer buffers", transfer=2 * chunk + largest),  # sender's buffer, the receiver's copy of a chunk
            Part("engine: weights", serving.weights, 0, serving.weights),
            Part("engine: working memory", serving.working),
            Part("engine: KV cache", serving.cache),
            Part.always("engine: context and graphs", ASLEEP),
            Part.always("learner: context", CONTEXT),
        ]
        return [Place("GPU of a learner and a generator", room, parts)]
    learning = [
        *learner,
        Part("transfer buffers", transfer=4 * chunk + largest),  # rank 0's: two, and as much while it fills them
        Part.always("context and NCCL", CONTEXT + NCCL),
    ]
    generating = [
        Part.always("engine: weights", serving.weights),
        Part.always("engine: working memory", serving.working),
        Part.always("engine: KV cache", serving.cache),
        Part("transfer buffers", transfer=2 * chunk + shapes.largest_unit * BF16),
        Part.always("engine: context and graphs", ASLEEP),
    ]
    return [
        Place("GPU of a learner", room, learning),
        Place("GPU of a generator", room, generating),
    ]


def _on_a_cpu(shapes: Shapes, config: Config, learner: list[Part]) -> list[Part]:
    """All roles' memory on one machine. Engines keep their weights and caches all the time."""
    learners, generators = config.learners.count, config.generators.count
    processes = {
        "learner processes": learners * PROCESS["learner"],
        "engine processes": generators * PROCESS["engine"],
        "driver and Ray": PROCESS["driver and Ray"],
    }
    return [
        *(Part(part.name, *(learners * part.in_phase(phase) for phase in PHASES)) for part in learner),
        Part.always("weights in shared memory", BF16 * shapes.parameters),
        Part.always("engines: weights", generators * compute_size(config) * shapes.parameters),
        Part.always("engines: KV cache", generators * config.generators.kv_cache_gib * GIB),
        *(Part.always(name, held) for name, held in processes.items()),
    ]


@dataclass(frozen=True)
class HostMemory:
    """Bytes that the hosts of learners with GPUs need in all.

    `loading`: each rank loads the whole model before it is sharded. Part of it may be pages of its files, which ranks
        share.
    `saving`: the state of all ranks is copied from the GPUs, and Ray's object stores (or, beyond their size, disks) get
        a second copy, from which the checkpoint is written, and all that `cluster.snapshot_every` keeps. With
        `cpu_offload` the first is there already.
    """

    loading: float
    saving: float


def host_memory(shapes: Shapes, config: Config) -> HostMemory:
    held, ranks = state(shapes, config), config.learners.count
    loading = ranks * ranks * (held.weights + held.reference)
    copied = ranks * sum(vars(held).values()) if config.learners.cpu_offload else snapshot(shapes, config)
    return HostMemory(loading, copied + snapshots(shapes, config))
