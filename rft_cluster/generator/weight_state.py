"""The weights that a generator serves: five states and their transitions. No call of vLLM is here.

    NO_WEIGHTS --begin_update--> UPDATING --end_update(v)--> UNVERIFIED --verify(v)--> VERIFIED
                                     ^                           |                         |
                                     +------- begin_update ------+-------------------------+

    refuse(error)   UPDATING, UNVERIFIED -> NO_WEIGHTS   the update failed, or other weights arrived than were sent
    drop()          all but FAILED -> NO_WEIGHTS         the generator sleeps, and has freed its weights
    serve(v)        all but FAILED -> VERIFIED           the engine's own checkpoint is used as version v
    fail(error)     all -> FAILED                        the engine failed, for good

A request for version v or newer:

    NO_WEIGHTS   raises StaleGenerator
    UPDATING     waits until the update has ended
    UNVERIFIED   runs if the version is new enough; its groups are returned when `verification` is done
    VERIFIED     runs if the version is new enough
    FAILED       raises the error that broke the engine
"""

import threading
from concurrent.futures import Future
from enum import Enum

from rft_cluster.common.errors import StaleGenerator, WeightTransferError


class State(Enum):
    NO_WEIGHTS = "no weights"
    UPDATING = "updating"
    UNVERIFIED = "serving, unverified"
    VERIFIED = "serving, verified"
    FAILED = "failed"


class WeightState:
    """The states above. All methods are called on the engine's thread, except `wait_for_update`."""

    def __init__(self, timeout: float | None) -> None:
        """`timeout`: seconds from the first of an update's calls to the last; None where weights are never updated."""
        self._timeout = timeout
        self.state = State.NO_WEIGHTS
        self.version: int | None = None  # of the served weights; None in NO_WEIGHTS, UPDATING and FAILED
        self.verification: Future[None] = Future()  # of the served weights; raises if they were refused
        self._error: BaseException | None = None  # the error that broke the engine
        self._no_update = threading.Event()
        self._no_update.set()

    @property
    def updating(self) -> bool:
        return self.state is State.UPDATING

    def admits(self, version: int) -> bool:
        """Return True if a request for weights of `version` or newer may run now, False if it must wait for an update.

        Raises:
            StaleGenerator: the served weights are older, or there are none.
            BaseException: the error that broke the engine.
        """
        self._check()
        if self.updating:
            return False
        if self.version is None or self.version < version:
            raise StaleGenerator(f"asked for version {version}, but this generator holds version {self.version}")
        return True

    def wait_for_update(self) -> None:
        """Wait until no update is in flight. In any thread.

        Raises:
            WeightTransferError: the update takes too long.
        """
        if not self._no_update.wait(self._timeout):
            raise WeightTransferError(f"a weight update took more than {self._timeout:g} s (cluster.step_timeout)")

    def serve(self, version: int) -> None:
        self._check()
        self._enter(State.VERIFIED, version)
        self.verification = Future()
        self.verification.set_result(None)

    def begin_update(self) -> None:
        """Enter UPDATING. Groups that still wait for the verification of the previous weights are refused."""
        self._check()
        self._refuse_groups(WeightTransferError("another update began before this one was verified"))
        self._enter(State.UPDATING)
        self.verification = Future()

    def end_update(self, version: int) -> None:
        if not self.updating:
            raise WeightTransferError(f"an update to version {version} ended without having begun")
        self._enter(State.UNVERIFIED, version)

    def check_held(self, version: int) -> None:
        """Raise WeightTransferError unless weights of `version` are served."""
        self._check()
        if self.version != version:
            raise WeightTransferError(f"asked to verify version {version}, but it holds {self.version}")

    def verify(self, version: int) -> None:
        """Enter VERIFIED: the weights are those that were sent, so groups by them may be returned."""
        self.check_held(version)
        if self.state is State.UNVERIFIED:
            self._enter(State.VERIFIED, version)
            self.verification.set_result(None)

    def refuse(self, error: BaseException) -> None:
        """Enter NO_WEIGHTS: the weights are not those that were sent. Only another update can end this state."""
        self._refuse_groups(error)
        self.drop()

    def drop(self) -> None:
        if self.state is not State.FAILED:
            self._enter(State.NO_WEIGHTS)

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._refuse_groups(error)
        self._enter(State.FAILED)

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _refuse_groups(self, error: BaseException) -> None:
        if not self.verification.done():
            self.verification.set_exception(error)

    def _enter(self, state: State, version: int | None = None) -> None:
        self.state, self.version = state, version
        if self.updating:
            self._no_update.clear()
        else:
            self._no_update.set()
