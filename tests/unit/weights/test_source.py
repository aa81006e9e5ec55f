import pytest
import torch
import torch.distributed as dist

from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.source import PolicyWeights


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
