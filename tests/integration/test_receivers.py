"""vLLM's end of the weight transfer with vLLM's real dataclasses, without an engine."""

import threading
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rft_cluster.weights import vllm_senders
from rft_cluster.weights.digests import tensor_digest
from rft_cluster.weights.source import TensorInfo
from rft_cluster.weights.vllm_senders import Client, IPCSender, NCCLSender, nccl_init_infos


def bf16(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def receivers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        from rft_cluster.weights import receivers

        yield receivers


def payload(world_size: int) -> dict[str, Any]:
    """The payload of vLLM's NCCL sender for the generators, made by vLLM's own code."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

    info = NCCLWeightTransferInitInfo(
        master_address="10.0.0.1", master_port=29501, rank_offset=1, world_size=world_size, packed=True
    )
    return worker_init_payload(info)


@pytest.mark.parametrize(
    ("sizes", "offsets", "world_size"),
    [
        ([1], [1], 2),
        ([1, 1, 1], [1, 2, 3], 4),
        ([2, 2], [1, 3], 5),
        ([2, 2, 2], [1, 3, 5], 7),  # the same with one generator more: the group is formed anew
        ([1, 4, 2], [1, 2, 6], 8),
    ],
)
def test_each_generator_joins_the_group_at_its_own_rank(receivers, sizes, offsets, world_size):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    sent = payload(world_size)
    infos = [NCCLWeightTransferInitInfo(**info) for info in nccl_init_infos(sent, sizes)]
    assert [info.rank_offset for info in infos] == offsets
    ranks = [info.rank_offset + i for info, size in zip(infos, sizes, strict=True) for i in range(size)]
    assert sorted([0, *ranks]) == list(range(world_size)), "the sender is rank 0; every rank is taken once"
    for info in infos:
        assert (info.master_address, info.master_port, info.world_size, info.packed) == (
            *("10.0.0.1", 29501, world_size, True),
        )
    assert sent == payload(world_size), "the sender's own is left as it was"


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ([1, 1], 5, "the transfer group has 5 ranks, but 3 take part"),
        ([2, 2, 2], 5, "the transfer group has 5 ranks, but 7 take part"),
        ([], 2, "the transfer group has 2 ranks, but 1 take part"),
    ],
)
def test_a_group_of_another_size_is_refused(receivers, sizes, world_size, message):
    with pytest.raises(ValueError, match=message):
        nccl_init_infos(payload(world_size), sizes)


class Source:
    """Two tensors, as `PolicyWeights` has them."""

    tensors = {"a": bf16(1, 2), "b": bf16(3)}  # noqa: RUF012
    nbytes = 6

    def metadata(self) -> list[TensorInfo]:
        return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())


@pytest.fixture
def calls(receivers, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of vLLM's real NCCL trainer to its client, and the tensors in a group that only records them."""
    from vllm.distributed.weight_transfer import nccl_engine

    calls: list[Any] = []

    def broadcast(iterator: Iterator[tuple[str, Tensor]], group: str, **options: Any) -> None:
        calls.append((f"broadcast to {group}", [(name, tensor.tolist()) for name, tensor in iterator]))

    stream = SimpleNamespace(synchronize=lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: f"{info.world_size} ranks")
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", broadcast)
    monkeypatch.setattr(vllm_senders.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(vllm_senders, "free_port", lambda address: 29501)
    for method in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        monkeypatch.setattr(Client, method, lambda self, *said, method=method: calls.append((method, *said)))
    return calls


def test_what_the_driver_tells_generators_is_what_vllm_s_trainer_would(calls: list[Any]):
    """The driver makes the trainer's calls itself, in its order, with what `offer` says: here are both."""
    sender = NCCLSender(Source(), "10.0.0.1")
    offer = sender.offer(generator_ranks=3)
    sender.connect(None)
    sender.send()
    assert calls == [
        ("init_weight_transfer_engine", offer.init),
        "synchronize",  # vLLM packs on other streams, which do not wait for the optimizer's
        ("start_weight_update",),
        ("update_weights", offer.update),
        ("broadcast to 4 ranks", [("a", [1, 2]), ("b", [3])]),
        ("finish_weight_update",),
    ]
    assert (offer.init["master_address"], offer.init["master_port"], offer.init["world_size"]) == ("10.0.0.1", 29501, 4)
    assert offer.update == {"names": ["a", "b"], "dtype_names": ["bfloat16"] * 2, "shapes": [[2], [1]]}


def test_the_learner_s_thread_keeps_its_stream(calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    """vLLM's communicator asks for the thread's stream. If vLLM knows none, it makes one and sets it for good."""
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.platforms import current_platform
    from vllm.utils import torch_utils

    streams = []
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_stream", torch_utils._patched_set_stream)
    monkeypatch.setattr(torch_utils, "prev_set_stream", lambda stream: None)
    monkeypatch.setattr(torch_utils, "_current_stream_tls", threading.local())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: streams.append(torch_utils.current_stream()))
    sender = NCCLSender(Source(), "10.0.0.1")
    sender.offer(1)
    sender.connect(None)
    assert streams == [torch.cuda.current_stream()]


def test_a_group_is_formed_anew_when_a_generator_was_replaced(calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    from vllm.distributed.weight_transfer import nccl_engine

    def shutdown(trainer: nccl_engine.NCCLTrainerWeightTransferEngine) -> None:
        calls.append(f"{trainer.model_update_group} part")

    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "shutdown", shutdown)
    sender = NCCLSender(Source(), "10.0.0.1")
    for ranks in (3, 2):
        sender.offer(ranks)
        sender.connect(None)
    sender.send()
    assert [call for call in calls if "part" in call or "broadcast" in call[0]] == [
        "4 ranks part",
        ("broadcast to 3 ranks", [("a", [1, 2]), ("b", [3])]),
    ]


@pytest.fixture
def buffers(receivers, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the buffers of vLLM's real IPC trainer; handles of GPU memory, which is not here, are made up."""
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedIpcChunk

    sizes: list[int] = []

    def producer(
        iterator: Iterator[tuple[str, Tensor]], gpu_uuid: str, buffer_size_bytes: int, **options: Any
    ) -> Iterator[PackedIpcChunk]:
        sizes.append(buffer_size_bytes)
        for name, tensor in iterator:  # a chunk a tensor
            yield PackedIpcChunk([name], [list(tensor.shape)], ["bfloat16"], [tensor.nbytes], {gpu_uuid: (name,)})

    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", producer)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="gpu-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(vllm_senders.dist, "get_rank", lambda: 0)
    return sizes


@pytest.mark.parametrize(
    ("embedding", "size"),
    [((151_936, 1536), 2**30), ((152_064, 3584), 152_064 * 3584 * 2)],
    ids=["Qwen2-VL-2B", "Qwen2-VL-7B"],
)
def test_vllm_s_ipc_buffer_holds_the_largest_tensor(buffers: list[int], embedding: tuple[int, int], size: int):
    """vLLM refuses a tensor that is larger than its buffer, 1 GiB by default."""
    source = Source()
    source.tensors = {"embedding": torch.empty(embedding, dtype=torch.bfloat16, device="meta")}
    sender = IPCSender(source)
    sender.connect(lambda update: None)
    sender.send()
    assert buffers == [size]


def test_vllm_s_ipc_trainer_makes_what_is_forwarded_while_it_sends(receivers, buffers: list[int]):
    forwarded: list[dict[str, Any]] = []
    sender = IPCSender(Source())
    offer = sender.offer(generator_ranks=1)
    assert receivers.VerifiedIPCEngine.init_info_cls(**offer.init).packed and offer.update is None
    sender.connect(forwarded.append)
    assert not forwarded
    sender.send()
    assert [(update["names"], update["ipc_handles"]) for update in forwarded] == [
        (["a"], {"gpu-0": ("a",)}),
        (["b"], {"gpu-0": ("b",)}),
    ]
    for update in forwarded:
        receivers.VerifiedIPCEngine.update_info_cls(**update)  # is what vLLM's engine takes


def test_the_client_of_vllm_s_senders_forwards_updates_alone():
    forwarded: list[dict[str, Any]] = []
    client = Client(forwarded.append)
    client.init_weight_transfer_engine({})
    client.start_weight_update()
    client.update_weights({"chunk": 0})
    client.finish_weight_update()
    assert forwarded == [{"chunk": 0}]
    Client().update_weights({"chunk": 0})  # NCCL's: the driver has told the generators


class Model(nn.Module):
    """Takes what it is given, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.loaded |= dict(weights)
        return set(self.loaded)


SENT = {"a": bf16(1, 2), "b": bf16(3)}
DIGESTS = {name: tensor_digest(tensor) for name, tensor in SENT.items()}


def test_weights_that_pass_through_reach_the_model_and_are_digested(receivers):
    model = Model()
    digesting = receivers.DigestingModel(model)
    digesting.load_weights([("b", SENT["b"])])  # in pieces and in any order, as packed buffers come
    assert digesting.load_weights([("a", SENT["a"])]) == {"a", "b"}
    assert digesting.digests == DIGESTS
    assert {name: tensor.tolist() for name, tensor in model.loaded.items()} == {"a": [1, 2], "b": [3]}
    receivers.check_digests(digesting.digests, DIGESTS)


@pytest.mark.parametrize(
    ("arrived", "message"),
    [
        ({"a": bf16(1, 2)}, "1 of 2 tensors never arrived, first b"),
        ({}, "2 of 2 tensors never arrived, first a"),
        ({**SENT, "c": bf16(4)}, "1 tensors arrived that were not announced, first c"),
        ({**SENT, "b": bf16(3.015625)}, "1 of 2 tensors arrived with other bytes, first b"),  # one bit
        ({**SENT, "a": bf16(2, 1)}, "1 of 2 tensors arrived with other bytes, first a"),
        ({"a": bf16(3), "b": bf16(1, 2)}, "2 of 2 tensors arrived with other bytes, first a"),
    ],
)
def test_weights_that_do_not_arrive_whole_are_refused(receivers, arrived, message):
    digesting = receivers.DigestingModel(Model())
    digesting.load_weights(arrived.items())
    with pytest.raises(receivers.WeightTransferError, match=message):
        receivers.check_digests(digesting.digests, DIGESTS)


def test_a_model_that_skips_a_tensor_is_found_out(receivers):
    class Lazy(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return {name for name, _ in [next(iter(weights))]}

    digesting = receivers.DigestingModel(Lazy())
    digesting.load_weights(SENT.items())
    with pytest.raises(receivers.WeightTransferError, match="1 of 2 tensors never arrived, first b"):
        receivers.check_digests(digesting.digests, DIGESTS)


def engine_of(receivers: Any, **weights: nn.Parameter) -> Any:
    """A receiver with a model of vLLM's own layers, an embedding and an output layer, as after loading a checkpoint."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model = nn.Module()
    for name, kind in (("embed", receivers.VocabParallelEmbedding), ("head", receivers.ParallelLMHead)):
        layer = kind.__new__(kind)  # its constructor needs a process group
        nn.Module.__init__(layer)
        layer.weight = weights[name]
        layer.weight.weight_loader = lambda param, loaded_weight: param.data.copy_(loaded_weight)
        layer.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None)
        model.add_module(name, layer)
    record_metadata_for_reloading(model)
    model.load_weights = lambda named: [
        layer.weight.weight_loader(layer.weight, loaded)
        for name, loaded in named
        for layer in [model.get_submodule(name)]
    ]
    engine = receivers.SharedMemoryEngine.__new__(receivers.SharedMemoryEngine)
    # As vLLM leaves it when the checkpoint has an lm_head, even one that it ties again.
    engine.model_config = SimpleNamespace(hf_config=SimpleNamespace(tie_word_embeddings=False), dtype=torch.bfloat16)
    engine.model = model
    return engine


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((4, 2), value, dtype=torch.bfloat16), requires_grad=False)


@pytest.mark.parametrize(("tied", "not_loaded"), [(True, []), (False, ["head"])])
def test_an_output_layer_needs_no_weights_of_its_own_if_it_shares_an_embedding_s(receivers, tied, not_loaded):
    embedding = parameter(1)
    engine = engine_of(receivers, embed=embedding, head=embedding if tied else parameter(2))
    for value in (3, 4):  # still so in the second update
        engine.start_weight_update()
        engine.model.load_weights([("embed", torch.full((4, 2), value, dtype=torch.bfloat16))])
        engine.finish_weight_update()
        assert engine.not_loaded == not_loaded
        assert engine.model.embed.weight.unique().tolist() == [value]
