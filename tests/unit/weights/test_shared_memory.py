import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights.broadcast import WeightBroadcast
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.shared_memory import ALIGNMENT, SharedMemorySender, memory_layout
from rft_cluster.weights.source import PolicyWeights, TensorInfo
from tests.unit.weights.recorder import Generators


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PolicyModel(build_model(processor.tokenizer).float(), [], 1.0)


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_memory_holds_every_tensor_once_and_matrices_first():
    shapes = {"q.w": (6, 5), "q.b": (6,), "k.w": (3, 5), "k.b": (3,), "patch": (2, 3, 2, 2, 2)}
    infos = [TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    layout = memory_layout(infos)
    assert layout.names == list(shapes)
    assert [tuple(shape) for shape in layout.shapes] == list(shapes.values())
    offset = dict(zip(layout.names, layout.offsets, strict=True))
    # 60, 30 and 96 bytes, then 12 and 6, each from a multiple of 64 on
    assert offset == {"q.w": 0, "k.w": 64, "patch": 128, "q.b": 256, "k.b": 320}
    assert (layout.nbytes, ALIGNMENT) == (384, 64)


def broadcast(policy: PolicyModel, generators: Generators) -> WeightBroadcast:
    return WeightBroadcast(policy, lambda client, source: SharedMemorySender(client, source, True), generators)


def in_memory(update: dict[str, Any], layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a generator would read."""
    with open(update["path"], "rb") as file:
        data = bytearray(file.read(update["nbytes"]))
    return {
        name: torch.frombuffer(data, dtype=torch.bfloat16, count=torch.Size(shape).numel(), offset=offset).view(shape)
        for name, shape, offset in zip(layout["names"], layout["shapes"], layout["offsets"], strict=True)
    }


def test_the_memory_holds_the_masters_in_bf16_and_the_proof_is_of_them(policy, one_rank):
    generators = Generators()
    sending = broadcast(policy, generators)
    sending.send(3)
    sending.wait()
    layout, update, version, digests = generators.heard
    assert version == 3
    expected = dict(PolicyWeights(policy))
    found = in_memory(update, layout)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert digests == {name: tensor_digest(tensor) for name, tensor in expected.items()}
    sending.close()


def test_the_memory_is_not_written_before_the_last_update_is_proved(policy, one_rank):
    generators = Generators()
    sending = broadcast(policy, generators)
    generators.prove.clear()
    sending.send(3)  # returns without the proof: generators may work
    assert generators.heard[-1] == 3
    parameter = next(policy.parameters())
    try:
        parameter.data.add_(1)
        before = in_memory(generators.heard[1], generators.heard[0])
        threading.Timer(0.3, generators.prove.set).start()
        sending.send(4)
        first, second, _ = generators.heard[3:6]
        assert first == {name: tensor_digest(tensor) for name, tensor in before.items()}
        assert second == generators.heard[1], "only now the next update"
    finally:
        parameter.data.sub_(1)
    sending.close()


def test_an_update_that_failed_its_proof_stops_the_next(policy, one_rank):
    generators = Generators()
    sending = broadcast(policy, generators)
    generators.records = [WeightRecord(3, 1, 222)]
    sending.send(3)
    with pytest.raises(WeightTransferError, match="received other weights for version 3"):
        sending.send(4)
    assert 4 not in generators.heard
    sending.close()
