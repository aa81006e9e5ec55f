"""How fast weights go from the learners' FP32 shards into a vLLM engine that serves them, against plain memcpy.

    LD_PRELOAD=.venv/lib/libiomp5.so python -m benchmarks.weight_transfer --sizes tiny,medium

Two learner ranks (FSDP2 over gloo, FP32 masters, one thread each) send through shared memory to the project's
generator, each in a process of its own, on CPUs. An update and a memcpy of as many bytes take turns. The clock runs
from the ranks' call to its return, when the engine may generate; verification follows off the clock, timed apart.

First a gate: what the engine computes with is read back before and after updates, the packed matrices through products
with the identity, and must be what vLLM itself loads, in every bit.
"""

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import CACHE, machine, parsed, spread, write_result
from benchmarks.models import SIZES, TRANSFER_PIXELS, transfer_model
from rft_cluster.common.hardware import hardware, openmp_environment
from rft_cluster.config import GeneratorsSection, ModelSection
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.generator.vllm_options import environment as generator_environment

RANKS = 2
MEMCPY_LIMIT = 1 << 30  # bytes; larger models are compared with a copy of this size
GOAL = 0.30
SEED = 0


# The engine's process


def serve(options: EngineOptions, images: Mapping[str, bytes], connections: list[Connection]) -> None:
    """Calls of a generator's methods, or of functions here with it, from several connections until one sends None."""
    from rft_cluster.generator.generator import Generator

    generator = Generator(options, images)

    def answer(connection: Connection) -> None:
        connection.send("ready")
        while (call := connection.recv()) is not None:
            method, arguments = call
            try:
                done = partial(method, generator) if callable(method) else getattr(generator, method)
                connection.send(done(*arguments))
            except Exception as error:  # noqa: BLE001 - not swallowed: the other process raises it
                connection.send(error)
        os._exit(0)  # the engine has nothing to save

    with ThreadPoolExecutor(len(connections)) as pool:
        list(pool.map(answer, connections))


def call(connection: Connection, method: Any, *arguments: Any) -> Any:
    connection.send((method, arguments))
    answer = connection.recv()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def read_back(generator: Any) -> dict[str, int]:
    """Digests of the weights that the engine computes with, by its own names: packed ones, too."""
    from rft_cluster.weights.digests import tensor_digest

    def unpacked(layer: Any) -> torch.Tensor:
        """[outputs, inputs]: products with the identity are exact, all but one of their terms being 0."""
        rows = torch.eye(layer.input_size_per_partition, dtype=dtype).split(1024)
        return torch.cat([layer.cpu_linear(part, layer.weight, None) for part in rows]).t()

    def digests() -> dict[str, int]:
        (engine,) = generator._engine.collective_rpc(lambda worker: worker.weight_transfer_engine)
        held = dict(engine.model.named_parameters())
        packed = {name: module for name, module in engine.model.named_modules() if hasattr(module, "cpu_linear")}
        held |= {f"{name}.packed": unpacked(module) for name, module in packed.items()}
        return {name: tensor_digest(tensor.detach().bfloat16().contiguous()) for name, tensor in held.items()}

    dtype = generator._llm.model_config.dtype
    return generator._on_thread(digests)


# A learner rank's process


def rank_process(rank: int, ranks: int, folder: str, meeting: str, engine: Connection, parent: Connection) -> None:
    """One FSDP2 rank: change, send and verify its masters as the parent says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import Qwen2VLForConditionalGeneration

    from rft_cluster.model.policy import PolicyModel, shard_units
    from rft_cluster.weights.shared_memory import SharedMemorySender
    from rft_cluster.weights.source import PolicyWeights

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    policy = PolicyModel(Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16), [], 1.0)
    for unit in [*shard_units(policy), policy]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (ranks,)))
    policy.float()  # after sharding: whole FP32 masters of a large model would not fit, once for each rank
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    parent.send("sharded")
    parent.recv()
    if rank == 0:
        assert engine.recv() == "ready"
    weights = PolicyWeights(policy)
    sender = SharedMemorySender(weights, one_host=True)
    offer = sender.offer(1)
    if rank == 0:
        call(engine, "init_weight_transfer_engine", offer.init)
    parent.send(sum(info.nbytes for info in weights.metadata()))

    def change() -> None:
        for parameter in policy.parameters():
            parameter.detach().to_local().neg_()  # every weight is another

    def send(version: int) -> dict[str, float]:
        """As the driver has it: all ranks write, then the generator loads."""
        dist.barrier()
        began = time.perf_counter()
        sender.send()
        dist.barrier()
        written = time.perf_counter()
        if rank == 0:
            call(engine, "load_weights", offer.update, version)
        done = time.perf_counter()
        return {"write": written - began, "load": done - written, "all": done - began}

    def verify(version: int) -> float:
        began = time.perf_counter()
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, sender.digests())
        if rank == 0:
            call(engine, "verify_weights", version, *parts)
        return time.perf_counter() - began

    does: dict[str, Callable[..., Any]] = {"change": change, "send": send, "verify": verify}
    while (order := parent.recv()) is not None:
        parent.send(does[order[0]](*order[1]))
    os._exit(0)


# The parent


class Service:
    """Ranks and an engine under way, from the weights in a folder."""

    def __init__(self, engine: Connection, ranks: list[Connection]) -> None:
        self.engine, self._ranks, self.version = engine, ranks, 0
        self.nbytes = max(rank.recv() for rank in ranks)

    def all_ranks(self, order: str, *arguments: Any) -> Any:
        """What rank 0 answers when all have done it."""
        for rank in self._ranks:
            rank.send((order, arguments))
        answers = [rank.recv() for rank in self._ranks]
        return answers[0]

    def update(self) -> dict[str, float]:
        """Other weights, sent and verified: seconds of each part."""
        self.version += 1
        self.all_ranks("change")
        seconds = self.all_ranks("send", self.version)
        return {**seconds, "verification, off the clock": self.all_ranks("verify", self.version)}

    def gate(self) -> None:
        """Two updates turn every sign twice: the engine then computes with the weights that vLLM itself loaded."""
        fresh = call(self.engine, read_back)
        for same in (False, True):
            self.update()
            held = call(self.engine, read_back)
            wrong = [name for name in fresh if (held[name] == fresh[name]) is not same]
            assert not wrong, f"{len(wrong)} of {len(fresh)} of the engine's weights are wrong, first {wrong[0]}"


@contextmanager
def service(folder: Path) -> Iterator[Service]:
    model = ModelSection(path=str(folder), min_pixels=TRANSFER_PIXELS, max_pixels=TRANSFER_PIXELS)
    options = EngineOptions(str(folder), model, GeneratorsSection(max_concurrent=8), 256, hardware("cpu"), SEED)
    context = multiprocessing.get_context("spawn")
    own, theirs = context.Pipe()
    senders, engines = context.Pipe()
    parents = [context.Pipe() for _ in range(RANKS)]
    meeting = folder / f"meeting-{os.getpid()}"
    meeting.unlink(missing_ok=True)
    os.environ.update({**openmp_environment("cpu"), "OMP_NUM_THREADS": "1"})
    workers = [
        context.Process(target=rank_process, args=(rank, RANKS, str(folder), str(meeting), senders, parents[rank][1]))
        for rank in range(RANKS)
    ]
    for worker in workers:
        worker.start()
    for connection, _ in parents:
        assert connection.recv() == "sharded"
    os.environ.update(generator_environment("cpu"))
    engine = context.Process(target=serve, args=(options, {}, [theirs, engines]))  # nothing is generated
    engine.start()
    assert own.recv() == "ready"
    for connection, _ in parents:
        connection.send("connect")
    try:
        yield Service(own, [connection for connection, _ in parents])
    finally:
        for connection in (*(connection for connection, _ in parents), own):
            connection.send(None)
        for worker in (*workers, engine):
            worker.join()
        meeting.unlink(missing_ok=True)


class Memcpy:
    """libc's, one thread, between two buffers whose pages are there."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = min(nbytes, MEMCPY_LIMIT)
        self._source, self._target = (torch.ones(self.nbytes, dtype=torch.uint8) for _ in range(2))

    def __call__(self) -> float:
        """Bytes a second."""
        began = time.perf_counter()
        ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), self.nbytes)
        return self.nbytes / (time.perf_counter() - began)


def compare(running: Service, repeats: int, warm_up: int = 2) -> dict[str, Any]:
    """Updates and copies in turns."""
    running.gate()
    for _ in range(warm_up):
        running.update()
    memcpy = Memcpy(running.nbytes)
    memcpy()
    updates, copies = [], []
    for _ in range(repeats):
        copies.append(memcpy())
        updates.append(running.update())
    copies.append(memcpy())
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
        folder = transfer_model(CACHE, size)
        load_average = os.getloadavg()[0]
        with service(folder) as running:
            results[size] = {"load_average_before": load_average, **compare(running, options.repeats)}
        show(size, results[size])
        write_result("weight_transfer", {"machine": machine(), "ranks": RANKS, "sizes": results})


def show(size: str, result: dict[str, Any]) -> None:
    print(f"{size}: {result['bytes'] / 1e6:.1f} MB, {result['gb_per_second']} GB/s, memcpy "
          f"{result['memcpy_gb_per_second']} GB/s, ratio {result['ratio']}, goal {GOAL}")  # fmt: skip
    for name, milliseconds in result["milliseconds"].items():
        print(f"    {name:22} {milliseconds} ms")


if __name__ == "__main__":
    main()
