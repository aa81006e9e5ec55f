import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights.broadcast import WeightBroadcast
from rft_cluster.weights.client import VersioningClient, check_records
from rft_cluster.weights.digests import combined_digest, tensor_digest
from rft_cluster.weights.shared_memory import ALIGNMENT, SharedMemorySender, memory_layout
from rft_cluster.weights.source import PolicyWeights, TensorInfo

# --- the policy's weights


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PolicyModel(build_model(processor.tokenizer).float(), [], 1.0)


def test_what_is_sent_is_bf16_as_announced(policy):
    source = PolicyWeights(policy)
    announced = source.metadata()
    sent = list(source)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert [info.name for info in announced] == [name for name, _ in sent]
    for info, (name, tensor) in zip(announced, sent, strict=True):
        assert info.dtype == tensor.dtype == torch.bfloat16
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == 2 * tensor.numel()
        assert torch.equal(tensor, policy.model.get_parameter(name).to(torch.bfloat16))
    assert [name for name, _ in source] == [name for name, _ in sent], "each round iterates anew"


def test_a_tied_weight_comes_once(policy):
    names = [info.name for info in PolicyWeights(policy).metadata()]
    assert policy.model.lm_head.weight is policy.model.model.language_model.embed_tokens.weight
    assert [name for name in names if "embed_tokens" in name or "lm_head" in name] == [
        "model.language_model.embed_tokens.weight"
    ]
    assert len(names) == len(set(names)) == len(list(policy.parameters()))


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_digests_of_one_rank_are_those_of_the_tensors(policy, one_rank):
    source = PolicyWeights(policy)
    assert source.digests() == {name: tensor_digest(tensor) for name, tensor in source}


# --- what the generators answer

NEXT = WeightRecord(version=5, received=22, loaded=222)


def test_records_that_agree_pass():
    check_records([NEXT, NEXT], 5, 22)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([replace(NEXT, version=4), NEXT], "generator 0 serves version 4 instead of 5"),
        ([NEXT, replace(NEXT, version=6)], "generator 1 serves version 6 instead of 5"),
        ([NEXT, NEXT, replace(NEXT, received=11)], "generator 2 received other weights for version 5 than were sent"),
        ([NEXT, replace(NEXT, loaded=223)], "generators 0 and 1 hold different parameters for version 5"),
        ([replace(NEXT, received=None)], "generator 0 received other weights for version 5 than were sent"),
        ([], "no generator reports that it serves version 5"),
    ],
)
def test_records_that_do_not_agree_are_refused(records, message):
    with pytest.raises(WeightTransferError, match=message):
        check_records(records, 5, 22)


class Generators:
    """Keeps what it is told; proves at once, or when `prove` is set, and answers with `records`."""

    def __init__(self) -> None:
        self.ranks = 2
        self.heard: list[Any] = []
        self.records: list[WeightRecord] | None = None
        self.prove = threading.Event()
        self.prove.set()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.heard.append(init_info)

    def start_weight_update(self) -> None:
        self.heard.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.heard.append(update_info)

    def finish_weight_update(self, weight_version: str) -> None:
        self.heard.append(weight_version)

    def load_weights(self, update_info: dict[str, Any], weight_version: str) -> None:
        self.heard += [update_info, weight_version]

    def prove_weights(self, weight_version: str, digests: dict[str, int]) -> list[WeightRecord]:
        assert self.prove.wait(10)
        self.heard.append(digests)
        return self.records or [WeightRecord(int(weight_version), combined_digest(digests), 222)] * 2


def test_the_client_adds_the_version_and_checks_the_proof():
    generators, digests = Generators(), {"a": 1, "b": -2}
    client = VersioningClient(generators)
    client.init_weight_transfer_engine({"port": 5})
    client.version = 5
    client.start_weight_update()
    client.update_weights({"names": ["a", "b"], "more": 3})
    client.finish_weight_update()
    client.prove(digests)
    assert generators.heard == [{"port": 5}, "start", {"names": ["a", "b"], "more": 3}, "5", digests]
    client.load_weights({"path": "memory"})
    assert generators.heard[5:] == [{"path": "memory"}, "5"]


def test_the_client_refuses_what_does_not_agree():
    generators, digests = Generators(), {"a": 1}
    client = VersioningClient(generators)
    client.version = 5
    generators.records = [WeightRecord(4, combined_digest(digests), 222)]
    with pytest.raises(WeightTransferError, match="serves version 4 instead of 5"):
        client.prove(digests)
    generators.records = [WeightRecord(5, combined_digest({"a": 2}), 222)]
    with pytest.raises(WeightTransferError, match="received other weights"):
        client.prove(digests)
    generators.records = [WeightRecord(5, combined_digest(digests), 222)]
    client.prove(digests)


# --- shared memory


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
    assert version == "3"
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
    assert generators.heard[-1] == "3"
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
    assert "4" not in generators.heard
    sending.close()
