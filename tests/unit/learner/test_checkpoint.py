"""A checkpoint or an export for which there is no room: the system's own error, with the folder's name."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rft_cluster.learner.checkpoint import export_model, save_shards, shards_of
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel
from rft_cluster.model.tiny.build import untrained

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
    processor, model = untrained(40, ["rose", "tulip"], "What is it?", PIXELS)
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    policy = PolicyModel(model, [], 1.0)
    encoder = PromptEncoder(str(folder), PIXELS, PIXELS)
    return SimpleNamespace(policy=policy, optimizer=torch.optim.AdamW(policy.parameters()), encoder=encoder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("limit", [1, 10_000, 1_000_000])
@pytest.mark.parametrize("what", ["shards", "export"])
def test_no_room(tmp_path, policy, what, limit):
    write = {
        "shards": lambda: save_shards(tmp_path, policy.policy, policy.optimizer),
        "export": lambda: export_model(tmp_path, policy.policy, policy.encoder, is_writer=True),
    }
    with small_files(limit), pytest.raises(OSError, match="File too large") as caught:
        write[what]()
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_room_enough(tmp_path, policy):
    save_shards(tmp_path / "shards", policy.policy, policy.optimizer)
    assert shards_of(tmp_path / "shards", rank=0) == list((tmp_path / "shards").iterdir())
    assert shards_of(tmp_path / "shards", rank=1) == []
