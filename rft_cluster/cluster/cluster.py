"""All actors of a run behind one object: the methods that the loop calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rft_cluster.cluster.handles import Learners, RewardActor, Update
from rft_cluster.cluster.rollouts import Generators, Rollout
from rft_cluster.cluster.weight_sync import WeightSync
from rft_cluster.config import Config
from rft_cluster.messages import Prompt, Sampling, TrainingSample


class Cluster:
    """All actors of a run."""

    def __init__(
        self, generators: Generators, reward: RewardActor, learners: Learners, weights: WeightSync, config: Config
    ) -> None:
        self.generators, self.reward, self.learners, self.weights = generators, reward, learners, weights
        self._config = config

    def join(self, addresses: Mapping[str, str], timeout: float) -> None:
        """Connect the actors after their start. `addresses`: actor's name -> its host's address.

        Learners join once. After the restart of a generator, `WeightSync.connect` alone is called again.
        """
        self.learners.join(addresses, timeout)
        self.weights.connect(addresses)

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
        if self._config.shares_gpus:
            self.learners.call_all("free_memory")
            self.generators.call_all("wake_up", ["weights"])
        self.weights.publish(version)
        if self._config.shares_gpus:
            self.learners.call_all("free_memory")
            self.generators.call_all("wake_up", ["kv_cache"])

    def save_checkpoint(self, folder: Path, state: Mapping[str, Any]) -> None:
        """See `Learners.save_checkpoint`.

        Raises:
            WeightTransferError: the generators' weights differ from those last sent.
        """
        self.weights.wait()  # the run may end here, and nothing else would wait for the last verification
        self.learners.save_checkpoint(folder, state)

    def export(self, folder: Path, files: Mapping[str, Any]) -> None:
        """See `Learners.export`."""
        self.learners.export(folder, files)
