"""The speed of the weight transfer, from the learners' FP32 shards into a serving vLLM engine, against plain memcpy.

    python -m benchmarks.weight_transfer [--sizes tiny,medium] [--repeats 9]

The actors are a run's: two learner ranks (FSDP2 over gloo, FP32 masters, one thread each) and a generator, on CPUs. An
update and a memcpy of as many bytes take turns. The clock runs while the driver publishes, until the engine may
generate. The verification follows, and is timed separately.

First a gate: the engine computes, bit by bit, with the weights that vLLM itself would load (`read_back`).
"""

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import CACHE, machine, parsed, spread, write_result
from benchmarks.models import SIZES, transfer_model
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.handles import ActorGroup
from rft_cluster.cluster.start import start_cluster
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.config import load_config

MEMCPY_LIMIT = 1 << 30  # bytes; larger models are compared with a copy of this size
GOAL = 0.30
WARM = 2
ACTORS = ["learners.count=2", "learners.cpus=1", "generators.cpus=1", "algorithm.kl_beta=0"]


class Timed(ActorGroup):
    """Records the duration of the last call of each method."""

    def __init__(self, actors: ActorGroup) -> None:
        super().__init__(dict(zip(actors.names, actors.handles, strict=True)), actors.timeout)
        self.seconds: dict[str, float] = {}

    def call_each(self, method: str, arguments: Sequence[tuple[Any, ...]], timeout: float | None = None) -> list[Any]:
        began = time.perf_counter()
        answers = super().call_each(method, arguments, timeout)
        self.seconds[method] = time.perf_counter() - began
        return answers


# In the actors


def change(learner: Any) -> int:
    """Every weight becomes another, and the same again when this is called twice. Returns the bytes that are sent."""
    parameters = list(learner._policy.model.parameters())
    for parameter in parameters:
        parameter.detach().to_local().neg_()
    return 2 * sum(parameter.numel() for parameter in parameters)


def read_back(generator: Any) -> dict[str, int]:
    """Digests of the weights that the engine computes with, by its own names: packed ones, too."""
    from rft_cluster.weights.digests import tensor_digest

    def unpacked(layer: Any) -> torch.Tensor:
        """[outputs, inputs]: products with the identity are exact, all but one of their terms being 0."""
        rows = torch.eye(layer.input_size_per_partition, dtype=dtype).split(1024)
        return torch.cat([layer.cpu_linear(part, layer.weight, None) for part in rows]).t()

    def digests() -> dict[str, int]:
        (engine,) = generator._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
        # A packed layer has given its own parameter up: nothing is left of it.
        held = {name: tensor for name, tensor in engine.model.named_parameters() if tensor.numel()}
        packed = {name: module for name, module in engine.model.named_modules() if hasattr(module, "cpu_linear")}
        held |= {f"{name}.packed": unpacked(module) for name, module in packed.items()}
        return {name: tensor_digest(tensor.detach().bfloat16().contiguous()) for name, tensor in held.items()}

    dtype = generator._llm.model_config.dtype
    return generator._on_thread(digests)


# In the driver


class Service:
    """A run's actors, and the transfer between them with a clock."""

    def __init__(self, cluster: Cluster) -> None:
        self.learners, self.generators, self.version = Timed(cluster.learners), Timed(cluster.generators), 0
        self.sync = WeightSync(self.learners, self.generators, "shared_memory", 1)
        self.sync.connect(dict.fromkeys([*self.learners.names, *self.generators.names], "here"))

    def update(self) -> dict[str, float]:
        """Other weights, sent and verified: seconds of each part."""
        self.version += 1
        self.nbytes = self.learners.call_all("__ray_call__", change)[0]
        clock = [time.perf_counter()]
        self.sync.publish(self.version)
        clock.append(time.perf_counter())
        self.sync.wait()
        clock.append(time.perf_counter())
        write, load = self.learners.seconds["publish_weights"], self.generators.seconds["load_weights"]
        whole = clock[1] - clock[0]
        parts = {"write": write, "load": load, "after": whole - write - load, "all": whole}
        return {**parts, "verification, afterwards": clock[2] - clock[1]}

    def gate(self) -> None:
        """Two updates turn every sign twice: the engine then computes with the weights that vLLM itself loaded."""
        (fresh,) = self.generators.call_all("__ray_call__", read_back)
        for same in (False, True):
            self.update()
            (held,) = self.generators.call_all("__ray_call__", read_back)
            wrong = [name for name in fresh if (held[name] == fresh[name]) is not same]
            assert not wrong, f"{len(wrong)} of {len(fresh)} of the engine's weights are wrong, first {wrong[0]}"


def memcpy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second of libc's, one thread. [N] uint8 each."""
    began = time.perf_counter()
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    return source.nbytes / (time.perf_counter() - began)


def compare(running: Service, repeats: int) -> dict[str, Any]:
    """Updates and copies in turns."""
    running.gate()
    for _ in range(WARM):
        running.update()
    buffers = [torch.ones(min(running.nbytes, MEMCPY_LIMIT), dtype=torch.uint8) for _ in range(2)]
    memcpy(*buffers)  # all pages are there from now on
    updates, copies = [], []
    for _ in range(repeats):
        copies.append(memcpy(*buffers))
        updates.append(running.update())
    copies.append(memcpy(*buffers))
    rates = [running.nbytes / update["all"] for update in updates]
    # Each update against the copies before and after it.
    ratios = [rate / ((copies[i] + copies[i + 1]) / 2) for i, rate in enumerate(rates)]
    return {
        "bytes": running.nbytes,
        "gate": "after an update the engine computes, bit by bit, with the weights that vLLM itself would load",
        "gb_per_second": spread([rate / 1e9 for rate in rates]),
        "memcpy_gb_per_second": spread([rate / 1e9 for rate in copies]),
        "ratio": spread(ratios),
        "milliseconds": {name: spread([1000 * update[name] for update in updates]) for name in updates[0]},
    }


def main() -> None:
    options = parsed(__doc__, sizes=list(SIZES), repeats=9)
    results: dict[str, Any] = {}
    for size in options.sizes:
        path = str(transfer_model(CACHE, size))
        load_average = os.getloadavg()[0]
        with start_cluster(load_config("digits", [f"model.path={path}", *ACTORS]), path, images={}) as cluster:
            results[size] = {"load_average_before": load_average, **compare(Service(cluster), options.repeats)}
        print(f"{size}, goal {GOAL}:", *(f"{name} {found}" for name, found in results[size].items()), sep="\n    ")
        write_result("weight_transfer", {"machine": machine(), "ranks": 2, "sizes": results})


if __name__ == "__main__":
    main()
