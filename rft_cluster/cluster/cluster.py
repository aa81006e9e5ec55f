"""All actors of a run behind one object: the methods that the loop calls."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft_cluster.cluster.handles import Learners, RewardActor, Update
from rft_cluster.cluster.recovery import Recovery
from rft_cluster.cluster.rollouts import Generators, Recover, Rollout
from rft_cluster.cluster.snapshots import Snapshots, Writing
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.common.errors import ClusterError, WeightTransferError
from rft_cluster.config import Config
from rft_cluster.messages import Prompt, Sampling, TrainingSample


class Cluster:
    """All actors of a run."""

    def __init__(
        self,
        generators: Generators,
        reward: RewardActor,
        learners: Learners,
        weights: WeightSync,
        config: Config,
        recovery: Recovery | None = None,
    ) -> None:
        """`recovery`: left out, what is lost is not replaced."""
        self.generators, self.reward, self.learners, self.weights = generators, reward, learners, weights
        self.snapshots = Snapshots()
        self._config, self._recovery, self._version = config, recovery, 0
        generators.recover = self._recover

    def _replace(self, error: ClusterError) -> None:
        if self._recovery is None:
            raise error
        self._recovery.replace(error)

    def _recover(self, error: ClusterError) -> None:
        """Replace what was lost between two updates: the learners still hold the current version.

        Raises:
            ClusterError: it cannot be replaced.
        """
        self._replace(error)
        assert self._recovery is not None
        # Fresh generators join at the next broadcast, unless this step needs them.
        if isinstance(error, WeightTransferError) or self._recovery.too_few:
            self.broadcast_weights(self._version)

    def restart_learners(self, error: ClusterError) -> None:
        """See `Recovery.restart_learners`."""
        if self._recovery is None:
            raise error
        self._recovery.restart_learners(error)

    def restore_snapshot(self, at_least: int) -> int | None:
        """Bring fresh learners to the newest snapshot in memory. Returns its step.

        None without a usable one that is not older than `at_least`, the step of the newest checkpoint: the journal may
        lack the steps between.
        """
        newest = self.snapshots.newest()
        if newest is None or newest < at_least:
            return None
        step = self.snapshots.restore(self.learners)
        if step is not None:
            print(f"the learners go on after step {step}, from memory", flush=True)
        return step

    def do_meanwhile(self, work: Callable[[], None]) -> None:
        """Call `work` every second from now on, in this thread, while it waits for completions or for an update."""
        self.generators.meanwhile = self.learners.meanwhile = work

    def doing(self) -> dict[str, str]:
        """What each actor is doing, by its name, for people. Any thread may ask."""
        starting = dict.fromkeys(self._recovery.coming if self._recovery else [], "start")
        with_weights = {name: what for name, what in self.weights.doing().items() if what != "idle"}
        return starting | self.generators.doing() | with_weights | self.reward.doing() | self.learners.doing()

    def start_rollout(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> Rollout:
        """Start a step's completions with weights of `version` or newer. Returns without waiting."""
        return self.generators.start(prompts, sampling, version, self.reward)

    def start_update(self, samples: Sequence[TrainingSample], step: int) -> Update:
        """Start one step's optimizer updates; see `Learners.start_update`. On a shared GPU generators sleep then."""
        # A recorded rollout has not asked for the verification. Learners would answer it only after the update, and
        # prefetched completions wait for it.
        self.weights.verify()
        if self._config.shares_gpus:
            self.weights.wait()  # what sleeps has no weights to verify
            self.generators.call_all("sleep")
        return self.learners.start_update(
            samples, step, self._config.algorithm.updates_per_step, self._config.learners.micro_batch_tokens
        )

    def broadcast_weights(self, version: int) -> None:
        """Bring every generator to the learners' weights under `version`; see `WeightSync.publish`.

        On a shared GPU the engine gets its memory back in two steps: first room for the weights, then room for the KV
        cache. Before each, the learner frees memory that its allocator keeps: of the update, then of the transfer.
        """
        self._version = version
        self._until_whole(lambda: self._broadcast(version), self._replace)
        if self._recovery:
            self._recovery.serve_fresh()

    def _until_whole(self, work: Callable[[], None], heal: Recover) -> None:
        """Do `work`, again after each loss.

        Raises:
            ClusterError: what was lost cannot be replaced.
        """
        while True:
            try:
                return work()
            except ClusterError as error:
                heal(error)

    def _broadcast(self, version: int) -> None:
        if self._recovery:
            self._recovery.take_up()
        if self._config.shares_gpus:
            self.learners.call_all("free_memory")
            self.generators.call_all("wake_up", ["weights"])
        self.weights.publish(version)
        if self._config.shares_gpus:
            self.learners.call_all("free_memory")
            self.generators.call_all("wake_up", ["kv_cache"])

    def news_of_leaving(self) -> str:
        """See `Recovery.news_of_leaving`."""
        return self._recovery.news_of_leaving() if self._recovery else ""

    def take_snapshot(self, step: int) -> None:
        """Begin a snapshot in memory of the learners' state after `step` steps. Returns without waiting."""
        self.snapshots.take(self.learners, step)

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint on disk, but for its headers."""
        return sum(self.learners.call_all("state_bytes"))

    def write_checkpoint(self, folder: Path, step: int) -> Writing:
        """Begin to write the ranks' files of a checkpoint of `step` to a folder. Returns without waiting."""
        return self.snapshots.write(self.learners, step, folder)

    def export(self, folder: Path, files: Mapping[str, Any]) -> None:
        """See `Learners.export`.

        Raises:
            WeightTransferError: the generators' weights differ from those last sent.
        """
        # The run may end here, and nothing else would wait for the last verification.
        self._until_whole(self.weights.wait, self._recover)
        self.learners.export(folder, files)
