import pytest
import torch
import torch.distributed as dist

from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights import source as module
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.source import Adapter, PolicyWeights


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


def test_the_digests_are_of_what_was_yielded_not_of_what_the_policy_is_by_then(policy, one_rank):
    source, parameter = PolicyWeights(policy), next(policy.parameters())
    sent = {name: tensor_digest(tensor) for name, tensor in source}
    parameter.data.add_(1)
    try:
        assert source.digests() == sent
        later = {name: tensor_digest(tensor) for name, tensor in source}
        assert source.digests() == later != sent
    finally:
        parameter.data.sub_(1)


def test_each_tensor_is_digested_once(policy, one_rank, monkeypatch):
    taken = []
    monkeypatch.setattr(module, "tensor_digest", lambda rows, start: taken.append(rows) or len(taken))
    source = PolicyWeights(policy)
    yielded = [tensor for _, tensor in source]
    source.digests()
    assert len(taken) == len(yielded)
    assert all(rows is tensor for rows, tensor in zip(taken, yielded, strict=True)), "of the very tensors"


def test_offloaded_adapters_are_multiplied_where_the_rows_are():
    """The 2B model's products would take seconds on a CPU."""
    places = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                places.extend(one.device.type for one in args)
            return function(*args, **(kwargs or {}))

    adapter = Adapter(torch.ones(2, 5), torch.ones(4, 2), scale=0.5)
    with Products():
        merged = module._merged(torch.empty(4, 5, dtype=torch.bfloat16, device="meta"), adapter)
    assert (merged.device.type, merged.dtype, merged.shape) == ("meta", torch.float32, (4, 5))
    assert places == ["meta", "meta"]
