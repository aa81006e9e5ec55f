"""A learner's state as bytes: the files of a checkpoint, what reads them, and a full disk."""

import errno
import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from rft_cluster.common.errors import UserError
from rft_cluster.config import ModelSection
from rft_cluster.learner.checkpoint import export_model, load_shards, put_back, set_optimizer_updates, take_snapshot
from rft_cluster.learner.snapshot import Snapshot, write_shards
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import untrained
from rft_cluster.prompts import Question

PIXELS = 56 * 56


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> SimpleNamespace:
    processor, model = untrained(40, ["rose", "tulip"], Question("What is it?"), PIXELS)
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    model.config.save_pretrained(folder)
    policy = PolicyModel(model, [], 1.0)
    encoder = PromptEncoder(str(folder), ModelSection(path=str(folder), min_pixels=PIXELS, max_pixels=PIXELS))
    return SimpleNamespace(policy=policy, optimizer=torch.optim.AdamW(policy.parameters()), encoder=encoder)


@pytest.fixture(scope="module")
def snapshot(policy: SimpleNamespace) -> Snapshot:
    """After one update, so that the moments are not 0; in memory of its own."""
    for parameter in policy.policy.parameters():
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
    policy.optimizer.step()
    return clone(take_snapshot(0, 1, policy.policy, policy.optimizer))


def clone(snapshot: Snapshot) -> Snapshot:
    shards = {name: replace(shard, data=shard.data.copy()) for name, shard in snapshot.shards.items()}
    return replace(snapshot, shards=shards)


def disturb(policy: SimpleNamespace) -> None:
    with torch.no_grad():
        for parameter in policy.policy.parameters():
            parameter.add_(1)
            for value in policy.optimizer.state[parameter].values():
                value.add_(1)


def digest(snapshot: Snapshot) -> str:
    found = hashlib.sha256(str(snapshot.updates).encode())
    for name, shard in snapshot.shards.items():
        found.update(name.encode() + shard.data.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("how", ["memory", "file"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_learner_goes_on_with_the_same_bits(tmp_path, policy, snapshot, how):
    write_shards(str(tmp_path), snapshot)
    disturb(policy)
    assert digest(take_snapshot(0, 1, policy.policy, policy.optimizer)) != digest(snapshot)
    if how == "memory":
        put_back(snapshot, policy.policy, policy.optimizer)
    else:
        load_shards(tmp_path, policy.policy, policy.optimizer)
        set_optimizer_updates(policy.optimizer, snapshot.updates)
    assert digest(take_snapshot(0, 1, policy.policy, policy.optimizer)) == digest(snapshot)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_learner_without_moments_gets_them(policy, snapshot):
    fresh = torch.optim.AdamW(policy.policy.parameters())
    assert not fresh.state
    put_back(snapshot, policy.policy, fresh)
    assert digest(take_snapshot(0, 1, policy.policy, fresh)) == digest(snapshot)


def test_equal_snapshots_give_equal_files_that_the_library_reads(tmp_path, snapshot):
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(write_shards(str(tmp_path / name), snapshot))
    contents = [(tmp_path / name / written[0].name).read_bytes() for name in ("one", "two")]
    assert contents[0] == contents[1]
    assert (written[0].bytes, written[0].sha256) == (len(contents[0]), hashlib.sha256(contents[0]).hexdigest())
    assert written[0].name == "shard-00001-model-00001-of-00001.safetensors"
    with safe_open(tmp_path / "one" / written[0].name, "np") as opened:
        assert set(opened.keys()) == set(snapshot.shards)
        offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        for name, shard in snapshot.shards.items():
            assert opened.get_tensor(name).tobytes() == shard.data.tobytes()
            assert tuple(opened.get_slice(name).get_shape()) == shard.shape
            assert offsets[name] == {"saved_offsets": [0] * len(shard.shape)}


def test_bf16_has_its_own_bits(policy):
    model = torch.nn.Module()
    model.model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    model.model.requires_grad_(False)
    taken = clone(take_snapshot(1, 0, model, torch.optim.AdamW(policy.policy.parameters())))
    assert {shard.dtype for shard in taken.shards.values()} == {"BF16"}
    before = model.model.weight.detach().clone()
    model.model.weight.data.add_(1)
    put_back(taken, model, torch.optim.AdamW(policy.policy.parameters()))
    assert torch.equal(model.model.weight, before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("limit", [1, 10_000, 1_000_000])
@pytest.mark.parametrize("what", ["shards", "export"])
def test_no_room(tmp_path, policy, snapshot, what, limit):
    write = {
        "shards": lambda: write_shards(str(tmp_path), snapshot),
        "export": lambda: export_model(tmp_path, policy.policy, policy.encoder, is_writer=True),
    }
    with small_files(limit), pytest.raises(OSError, match="File too large") as caught:
        write[what]()
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename.startswith(str(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (errno.ESTALE, OSError, "Stale file handle"),
        (None, UserError, r"cannot be read by learner-0 \(.*Missing key in checkpoint.*: remove that folder"),
    ],
    ids=["the disk fails", "the files are gone"],
)
def test_a_checkpoint_that_cannot_be_read_is_no_defect(tmp_path, policy, snapshot, monkeypatch, number, error, message):
    """torch wraps what a rank raises for all ranks, in an exception that is no Exception."""
    write_shards(str(tmp_path), snapshot)
    if number is None:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    else:

        def read(*_: object) -> None:
            raise OSError(number, "Stale file handle", "shard")

        monkeypatch.setattr("rft_cluster.learner.checkpoint.HuggingFaceStorageReader.read_data", read)
    with pytest.raises(error, match=message) as caught:
        load_shards(tmp_path, policy.policy, policy.optimizer)
    if number:
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))
