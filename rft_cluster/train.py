"""The loop: one GRPO step on one screen.

Each stage is a role's: generators write completions, the reward actor scores them, learners update the policy,
and the new weights go back to the generators, which then hold version `step + 1`. With `schedule.max_staleness` above
0 the generators are asked for later steps' completions before the learners have finished this one's.
"""

from collections import deque

from rft_cluster.algorithm.advantages import group_advantages
from rft_cluster.algorithm.samples import build_samples
from rft_cluster.classification.card import CARD_FILE, make_card
from rft_cluster.classification.report import summarise
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.rollouts import Rollout
from rft_cluster.cluster.start import start_cluster
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config
from rft_cluster.messages import Example, Sampling
from rft_cluster.prompts import make_prompts
from rft_cluster.rewards.scorer import check_failures
from rft_cluster.run.folder import RunFolder, checkpoint_folder, prune_checkpoints
from rft_cluster.run.metrics import Stopwatch
from rft_cluster.run.resume import first_step_of
from rft_cluster.run.stuck import GO_ON, Stuck
from rft_cluster.run.task import Task


def train(config: Config, task: Task, model_path: str, resume: bool) -> None:
    """Run a configuration to its last step, starting from the model in `model_path`."""
    schedule, algorithm, seed = config.schedule, config.algorithm, config.run.seed
    dataset, card = task.dataset, make_card(config, task.dataset, task.text)
    sampling = Sampling(**config.sampling.model_dump())
    first_step, checkpoint = first_step_of(config, task, resume)

    with start_cluster(config, model_path) as cluster:
        run = RunFolder(config, task, first_step)
        if checkpoint:
            cluster.learners.restore_checkpoint(checkpoint)
        cluster.broadcast_weights(version=first_step)
        if first_step == 0:
            _evaluate(cluster, config, dataset.test, task.text, "test", 0, run)

        stuck = Stuck(schedule.stop_when_stuck, len(dataset.classes))
        rollouts: deque[Rollout] = deque()  # of this step and the next `max_staleness`
        for step in range(first_step, schedule.steps):
            stage = Stopwatch()
            for asked in range(step + len(rollouts), min(step + schedule.max_staleness + 1, schedule.steps)):
                examples = dataset.batch(seed, asked, schedule.prompts_per_step)
                prompts = make_prompts(examples, task.text, "train", asked, seed)
                rollouts.append(cluster.start_rollout(prompts, sampling, version=step, step=asked))
            with stage("generate"):
                groups, rewards = rollouts.popleft().wait()
            check_failures(groups, rewards, len(groups) * sampling.group_size, config.scoring.failure_budget)
            advantages = [group_advantages([reward.total for reward in group]) for group in rewards]
            samples = build_samples(groups, advantages, keep_all=algorithm.kl_beta > 0)
            with stage("learn"):
                learned = cluster.update(samples, step)
            with stage("transfer"):
                cluster.broadcast_weights(version=step + 1)
            run.log_step(step + 1, groups, rewards, learned, stage.seconds)
            nothing_to_learn = stuck.see(groups, rewards)

            if _due(step, schedule.evaluate_every):
                _evaluate(cluster, config, dataset.validation, task.text, "validation", step + 1, run)
            if _due(step, schedule.save_every) or step + 1 == schedule.steps or nothing_to_learn:
                state = {"step": step + 1, "prompt_sha256": card.prompt_sha256}
                cluster.learners.save_checkpoint(checkpoint_folder(config.run_folder, step + 1), state)
                prune_checkpoints(config.run_folder, schedule.keep_checkpoints)
            if nothing_to_learn:
                raise UserError(f"stopped after step {step + 1}, which is saved: {nothing_to_learn}. {GO_ON}")

        _evaluate(cluster, config, dataset.test, task.text, "test", schedule.steps, run)
        cluster.learners.export(config.run_folder / "model", {CARD_FILE: card.model_dump()})


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0


def _evaluate(
    cluster: Cluster,
    config: Config,
    examples: list[Example],
    text: str,
    split: str,
    step: int,
    run: RunFolder,
) -> None:
    """Greedy answers of the current policy to every example."""
    if not examples:
        return
    prompts = make_prompts(examples, text, split, step, config.run.seed)
    greedy = Sampling(1, 0.0, config.sampling.max_tokens)
    run.log_evaluation(summarise(step, split, cluster.generators.generate(prompts, greedy, version=step)))
