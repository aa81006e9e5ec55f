"""The actors of a run, and the four things that the loop asks of them."""

from collections.abc import Sequence

from rft_cluster.cluster.handles import Learners, RewardActor
from rft_cluster.cluster.rollouts import Generators, Rollout
from rft_cluster.config import Config
from rft_cluster.messages import LearnerStats, Prompt, Sampling, TrainingSample


class Cluster:
    """All actors of a run."""

    def __init__(self, generators: Generators, reward: RewardActor, learners: Learners, config: Config) -> None:
        self.generators, self.reward, self.learners = generators, reward, learners
        self._config = config

    def start_rollout(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> Rollout:
        """Begin a step's completions with weights of `version`, without waiting."""
        return self.generators.start(prompts, sampling, version, self.reward)

    def update(self, samples: Sequence[TrainingSample], step: int) -> LearnerStats | None:
        """One step's optimizer updates; see `Learners.update`. On a shared GPU the generators sleep meanwhile."""
        if self._config.shares_gpus:
            self.generators.call_all("sleep")
        return self.learners.update(
            samples, step, self._config.algorithm.updates_per_step, self._config.learners.micro_batch_tokens
        )

    def broadcast_weights(self, version: int) -> None:
        """Bring every generator to the learners' weights, proved, under `version`.

        On a shared GPU the engine's memory comes back in two parts: room for weights, which are sent into it, and
        room for keys and values once the learner has given back what it held for its step.
        """
        if self._config.shares_gpus:
            self.generators.call_all("wake_up", ["weights"])
        self.learners.call_all("send_weights", version)
        if self._config.shares_gpus:
            self.learners.call_all("free_memory")
            self.generators.call_all("wake_up", ["kv_cache"])
