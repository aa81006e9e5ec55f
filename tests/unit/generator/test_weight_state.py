from collections.abc import Callable

import pytest

from rft_cluster.common.errors import StaleGenerator, WeightTransferError
from rft_cluster.generator.weight_state import State, WeightState

BROKEN, WRONG = MemoryError("no room"), WeightTransferError("other bytes")
STEPS: dict[str, Callable[[WeightState], None]] = {
    "begin": lambda weights: weights.begin_update(),
    "end": lambda weights: weights.end_update(3),
    "verify": lambda weights: weights.verify(3),
    "serve": lambda weights: weights.serve(3),
    "refuse": lambda weights: weights.refuse(WRONG),
    "drop": lambda weights: weights.drop(),
    "fail": lambda weights: weights.fail(BROKEN),
}


def after(*steps: str, timeout: float | None = None) -> WeightState:
    weights = WeightState(timeout)
    for step in steps:
        STEPS[step](weights)
    return weights


@pytest.mark.parametrize(
    ("steps", "state", "version"),
    [
        ((), State.NO_WEIGHTS, None),
        (("begin",), State.UPDATING, None),
        (("begin", "end"), State.UNVERIFIED, 3),
        (("begin", "end", "verify"), State.VERIFIED, 3),
        (("begin", "end", "verify", "verify"), State.VERIFIED, 3),
        (("begin", "end", "verify", "begin"), State.UPDATING, None),
        (("begin", "end", "begin"), State.UPDATING, None),
        (("begin", "refuse"), State.NO_WEIGHTS, None),
        (("begin", "end", "refuse"), State.NO_WEIGHTS, None),
        (("begin", "end", "refuse", "begin", "end", "verify"), State.VERIFIED, 3),
        (("serve",), State.VERIFIED, 3),
        (("serve", "drop"), State.NO_WEIGHTS, None),
        (("serve", "fail"), State.FAILED, None),
        (("fail", "drop"), State.FAILED, None),
        (("fail", "refuse"), State.FAILED, None),
    ],
)
def test_the_states_follow_each_other_as_drawn(steps, state, version):
    weights = after(*steps)
    assert (weights.state, weights.version) == (state, version)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("end",), "an update to version 3 ended without having begun"),
        (("serve", "end"), "an update to version 3 ended without having begun"),
        (("verify",), "asked to verify version 3, but it holds None"),
        (("begin", "verify"), "asked to verify version 3, but it holds None"),
        (("fail", "begin"), "no room"),
        (("fail", "serve"), "no room"),
        (("fail", "verify"), "no room"),
    ],
)
def test_other_steps_are_refused(steps, message):
    with pytest.raises((WeightTransferError, MemoryError), match=message):
        after(*steps)


@pytest.mark.parametrize("steps", [("begin", "end"), ("begin", "end", "verify"), ("serve",)])
def test_weights_that_are_served_admit_requests_for_their_version_and_older_ones(steps):
    weights = after(*steps)
    assert weights.admits(3) and weights.admits(0)
    with pytest.raises(StaleGenerator, match="asked for version 4, but this generator holds version 3"):
        weights.admits(4)


def test_without_weights_nothing_is_admitted():
    with pytest.raises(StaleGenerator, match="asked for version 0, but this generator holds version None"):
        after().admits(0)
    with pytest.raises(MemoryError, match="no room"):
        after("serve", "fail").admits(0)


def test_a_request_waits_for_the_end_of_an_update():
    weights = after("begin", timeout=0.01)
    assert not weights.admits(0)
    with pytest.raises(WeightTransferError, match=r"a weight update took more than 0\.01 s \(cluster\.step_timeout\)"):
        weights.wait_for_update()
    for ending in (("begin", "end"), ("begin", "refuse"), ("begin", "fail")):
        after(*ending).wait_for_update()


def test_the_verification_is_done_when_the_weights_are_verified_refused_or_followed_by_others():
    weights = after("begin", "end")
    verification = weights.verification
    assert not verification.done()
    weights.verify(3)
    assert verification.result(0) is None and weights.verification is verification
    assert after("serve").verification.result(0) is None
    for step, error in (("refuse", WRONG), ("fail", BROKEN)):
        weights = after("begin", "end")
        verification = weights.verification
        STEPS[step](weights)
        assert verification.exception(0) is error
    weights = after("begin", "end")
    verification = weights.verification
    weights.begin_update()
    with pytest.raises(WeightTransferError, match="another update began before this one was verified"):
        verification.result(0)
    assert not weights.verification.done(), "the next weights have a verification of their own"
