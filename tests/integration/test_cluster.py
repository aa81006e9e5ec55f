"""Refusals that name what is missing, before any actor starts."""

import pytest

from rft_cluster.cluster.start import connect, start_cluster
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config


def test_what_is_missing_is_named_before_an_actor_starts(tiny_model: str):
    greedy = load_config("digits", ["cluster.device=cuda", "generators.gpus=2", "learners.gpus=1"])
    with pytest.raises(UserError, match="needs 4 GPUs, the cluster has 0"), start_cluster(greedy, tiny_model, {}):
        pass


def test_an_address_that_does_not_answer(config: Config):
    section = load_config("digits", ["cluster.address=127.0.0.1:1"]).cluster
    with pytest.raises(UserError, match="no Ray cluster answers at '127.0.0.1:1'".replace(".", r"\.")):
        connect(section, 1)
