from dataclasses import replace

import pytest

from rft_cluster.common.errors import WeightTransferError
from rft_cluster.messages import WeightRecord
from rft_cluster.weights.client import VersioningClient, check_records
from rft_cluster.weights.digests import combined_digest
from tests.unit.weights.recorder import Generators

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


def test_the_client_adds_the_version_and_checks_the_proof():
    generators, digests = Generators(), {"a": 1, "b": -2}
    client = VersioningClient(generators)
    client.init_weight_transfer_engine({"port": 5})
    client.version = 5
    client.start_weight_update()
    client.update_weights({"names": ["a", "b"], "more": 3})
    client.finish_weight_update()
    client.prove(digests)
    assert generators.heard == [{"port": 5}, "start", {"names": ["a", "b"], "more": 3}, 5, digests]
    client.load_weights({"path": "memory"})
    assert generators.heard[5:] == [{"path": "memory"}, 5]


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
