"""Check that this machine has memory for the weights alone. Unlike a plan, which estimates, this refuses a run."""

from rft_cluster.cluster.machine import memory_here, object_store_here, smallest_gpu
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import size
from rft_cluster.config import Config
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.memory import BF16, GIB, compute_size, snapshots, state
from rft_cluster.plan.places import host_memory

PROPORTION = 0.3  # of a machine's free memory, that Ray takes for its object store unless told otherwise


def check_memory(config: Config, shapes: Shapes) -> None:
    """Check that the weights, their gradients and moments fit, without activations.

    Raises:
        UserError: the machine that the run starts on has less memory, or its smallest GPU has.
    """
    if config.cluster.joins:
        return
    weights = f"the weights of {shapes.parameters / 10**6:.1f} million parameters take"
    if config.cluster.device == "cuda":
        needed, (_, total) = on_a_gpu(shapes, config), smallest_gpu()
        if needed > total:
            raise UserError(
                f"{weights} {size(needed)} of a GPU's memory, and the smallest GPU here has {size(total)}: raise "
                f"learners.count where there are more GPUs, set learners.cpu_offload=true or "
                f"model.lora={{rank: 16}}, or take a smaller model"
            )
        _check_host(config, shapes)
        return
    needed, total = on_a_cpu(shapes, config), memory_here()
    if needed > total:
        raise UserError(
            f"{weights} {size(needed)} of memory with {config.learners.count} learners and {config.generators.count} "
            f"generators, and this machine has {size(total)}: lower generators.count, generators.kv_cache_gib or "
            f"learners.count, or take a smaller model"
        )


def _check_host(config: Config, shapes: Shapes) -> None:
    """Check that the learners' state, copied from the GPUs, fits into this machine's memory beside the object store.

    Without that, the run would be killed at its first checkpoint, each time that it is started.
    """
    needed, total = on_a_host(shapes, config, object_store_here()), memory_here()
    if needed > total:
        smaller = "" if config.model.lora else "set model.lora={rank: 16}, whose state is a fifth, or "
        raise UserError(
            f"while the learners' state is saved, it takes {size(needed)} of this machine's memory, which is "
            f"{size(total)}: {smaller}take a machine with more memory, or a smaller model"
        )


def object_store_note(config: Config, shapes: Shapes) -> str:
    """A note if the object store of a Ray that is started here cannot hold the snapshots; else an empty text."""
    if config.cluster.joins:
        return ""
    needed, store = snapshots(shapes, config), object_store_here()
    if needed <= store:
        return ""
    fewer = ", or cluster.snapshot_every=0" if config.cluster.snapshot_every else ""
    return (
        f"note: snapshots of the learners take {size(int(needed))}, and Ray's object store here has {size(store)}: Ray "
        f"moves what does not fit to the disk, which takes longer. Give /dev/shm as much (a container's --shm-size) "
        f"and set RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION above {PROPORTION:g}{fewer}"
    )


def on_a_gpu(shapes: Shapes, config: Config) -> int:
    """The least that the fullest GPU needs, in bytes: a learner's state, or an engine's weights in its share."""
    learner = 0.0 if config.learners.cpu_offload else sum(vars(state(shapes, config)).values())
    engine = BF16 * shapes.parameters / max(1, int(config.generators.gpus)) / config.generators.gpu_memory
    return int(max(learner, engine))


def on_a_host(shapes: Shapes, config: Config, store: int) -> int:
    """The least that the host of learners with GPUs needs while their state is saved, in bytes. What an object store of
    `store` bytes cannot hold goes to the disk."""
    return int(host_memory(shapes, config).saving - max(0, snapshots(shapes, config) - store))


def on_a_cpu(shapes: Shapes, config: Config) -> int:
    """The least that all roles need, in bytes: the engines, and the more of loading the model and of training it."""
    held, ranks, generators = state(shapes, config), config.learners.count, config.generators
    loading = ranks * ranks * (held.weights + held.reference)  # each rank loads the whole model before sharding
    training = ranks * sum(vars(held).values())
    engine = compute_size(config) * shapes.parameters + generators.kv_cache_gib * GIB
    return int(max(loading, training) + generators.count * engine)
