import pytest
import torch
import torch.distributed as dist

from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.sender import WeightOffer
from rft_cluster.weights.shared_memory import ALIGNMENT, SharedMemorySender, memory_layout
from rft_cluster.weights.source import PolicyWeights, TensorInfo


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


def test_the_memory_holds_one_tensor_after_the_other():
    shapes = {"q.w": (6, 5), "q.b": (6,), "k.w": (3, 5), "k.b": (3,), "patch": (2, 3, 2, 2, 2)}
    infos = [TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    layout = memory_layout(infos)
    assert layout.names == list(shapes)
    assert [tuple(shape) for shape in layout.shapes] == list(shapes.values())
    offset = dict(zip(layout.names, layout.offsets, strict=True))
    # 60, 12, 30, 6 and 96 bytes, each from a multiple of 64 on
    assert offset == {"q.w": 0, "q.b": 64, "k.w": 128, "k.b": 192, "patch": 256}
    assert (layout.nbytes, ALIGNMENT) == (384, 64)


def in_memory(offer: WeightOffer) -> dict[str, torch.Tensor]:
    """The tensors as a generator reads them."""
    assert offer.update is not None
    layout = offer.init
    with open(offer.update["path"], "rb") as file:
        data = bytearray(file.read(offer.update["nbytes"]))
    return {
        name: torch.frombuffer(data, dtype=torch.bfloat16, count=torch.Size(shape).numel(), offset=offset).view(shape)
        for name, shape, offset in zip(layout["names"], layout["shapes"], layout["offsets"], strict=True)
    }


@pytest.mark.parametrize("one_host", [True, False])
def test_the_memory_holds_the_masters_in_bf16_and_the_digests_are_of_them(policy, one_rank, one_host):
    sender = SharedMemorySender(PolicyWeights(policy), one_host)
    offer = sender.offer(1)
    sender.send()
    expected = dict(PolicyWeights(policy))
    found = in_memory(offer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sender.digests() == {name: tensor_digest(tensor) for name, tensor in expected.items()}
    with open(offer.update["path"], "rb") as file:
        assert file.read() == sender.contents().tobytes()


def test_the_digests_are_of_what_lies_in_the_memory_whatever_the_policy_is_by_then(policy, one_rank):
    sender = SharedMemorySender(PolicyWeights(policy), one_host=True)
    sender.send()
    digests, parameter = sender.digests(), next(policy.parameters())
    parameter.data.add_(1)
    try:
        assert sender.digests() == digests
        sender.send()
        assert sender.digests() != digests
    finally:
        parameter.data.sub_(1)
