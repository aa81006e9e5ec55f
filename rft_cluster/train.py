"""The loop: one step of GRPO, or of SFT, on one screen.

Each stage belongs to a role: generators write completions, the reward actor scores them, learners update the policy,
and the generators get the new weights, version `step + 1`. With `schedule.max_staleness` above 0 the loop prefetches:
it starts the completions of later steps before the learners have finished this one. With `algorithm.objective: sft` a
step's completions are right answers, which nobody writes or scores (`run/targets.py`), and generators get new weights
before evaluations alone.
"""

from collections import deque
from functools import partial

from rft_cluster.algorithm import load_algorithm
from rft_cluster.classification.card import make_card
from rft_cluster.classification.report import Evaluation, summarise
from rft_cluster.cluster.cluster import Cluster
from rft_cluster.cluster.rollouts import Rollout
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config
from rft_cluster.messages import Example, Group, Prompt, Sampling
from rft_cluster.prompts import make_prompts
from rft_cluster.rewards.scorer import check_failures
from rft_cluster.run.answers import ALSO
from rft_cluster.run.asking import further_rounds, prompts_of, wants_more
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.journal import Recorded
from rft_cluster.run.metrics import step_stats
from rft_cluster.run.options import with_options
from rft_cluster.run.saving import Keeper
from rft_cluster.run.stuck import GO_ON, Stuck
from rft_cluster.run.targets import Targets
from rft_cluster.run.task import Task, image_pixels


def train(config: Config, task: Task, cluster: Cluster, run: RunFolder, targets: Targets | None = None) -> None:
    """Train from step `run.first_step`, whose policy the learners of `cluster` hold, to the last step.

    `targets`: of SFT, which learns from them in place of completions of the policy.
    """
    schedule, dataset = config.schedule, task.dataset
    algorithm, sampling = load_algorithm(config), Sampling(**config.sampling.model_dump())
    card = make_card(config, dataset, task.question, image_pixels(config))
    keeper = Keeper(config, card, cluster, run.first_step, run.tiny_model)
    cluster.do_meanwhile(keeper.look_out)
    cluster.broadcast_weights(version=run.first_step)
    task = with_options(config, task, run.first_step, partial(_answers, cluster, run, run.first_step, "generate"))
    _evaluate_if_due(cluster, config, task, run.first_step, run, keeper)

    start_rollout = targets.start if targets else cluster.start_rollout
    stuck = Stuck(schedule.stop_when_stuck, len(dataset.classes))
    rollouts: deque[Rollout | Recorded] = deque()  # in flight: this step and the next `max_staleness`
    for step in range(run.first_step, schedule.steps):
        with keeper.saved_when_stopped():
            stage = run.stopwatch(step + 1)
            # Generators have version `step` now, so a rollout for step `asked` is at most `max_staleness` steps stale.
            for asked in range(step + len(rollouts), min(step + schedule.max_staleness + 1, schedule.steps)):
                prompts = prompts_of(config, task, asked)
                recorded = run.journal.recorded(asked, prompts, further_rounds(config, task, asked))
                rollouts.append(recorded or start_rollout(prompts, sampling, version=step))
            with stage("generate"):
                groups, rewards = rollouts.popleft().wait()
                while wants_more(rewards, algorithm.advantages, schedule):
                    prompts = prompts_of(config, task, step, further=len(groups) // schedule.prompts_per_step)
                    more, their_rewards = start_rollout(prompts, sampling, version=step).wait()
                    groups, rewards = [*groups, *more], [*rewards, *their_rewards]
            check_failures(groups, rewards, len(groups) * config.completions, config.scoring.failure_budget)
            advantages = algorithm.advantages(rewards)
            samples = algorithm.samples(groups, advantages)
            # A signal waits for the end of this block: a step is done and recorded, or not begun.
            with keeper.step(step + 1):
                with stage("learn"):
                    update = cluster.start_update(samples, step)
                    # While the learners work. From here on the step is never generated again.
                    run.journal.commit(step, groups, rewards)
                    learned = update.wait()
                with stage("transfer"):
                    if not targets or _due(config, task, step + 1):  # SFT needs generators for evaluations alone
                        cluster.broadcast_weights(version=step + 1)
                run.log_rollouts(step + 1, groups, rewards, advantages, learned)
                stats = step_stats(step + 1, groups, rewards, advantages, learned, stage.seconds)
                run.log_step(stats)
            nothing_to_learn = stuck.see(groups, rewards, stats.live_groups > 0, stats.skipped)
            keeper.save_if_due(at_once=bool(nothing_to_learn))
            if nothing_to_learn:
                raise UserError(f"stopped after step {step + 1}, which is saved: {nothing_to_learn}. {GO_ON}")
            _evaluate_if_due(cluster, config, task, step + 1, run, keeper)
    keeper.keep_last()


def _evaluate_if_due(cluster: Cluster, config: Config, task: Task, step: int, run: RunFolder, keeper: Keeper) -> None:
    """Evaluate after `step` steps what is due: see `_due`."""
    for split in _due(config, task, step):
        if split == ALSO:
            if task.also and not run.has_also(step):
                run.log_also(step, _greedy(cluster, config, task.also.dataset.test, task.also.text, ALSO, step, run))
        else:
            evaluation = _evaluate(cluster, config, task, split, step, run)
            if split == "validation":
                keeper.keep_if_best(evaluation)


def _due(config: Config, task: Task, step: int) -> list[str]:
    """What is to evaluate after `step` steps: validation images every `schedule.evaluate_every` steps and at the end,
    test images, and those of `evaluation.also`, before the first step and at the end."""
    schedule, last = config.schedule, step == config.schedule.steps
    every = schedule.evaluate_every
    due = {
        "validation": task.dataset.validation and step and every and (step % every == 0 or last),
        "test": task.dataset.test and (step == 0 or last),
        ALSO: task.also and (step == 0 or last),
    }
    return [split for split, wanted in due.items() if wanted]


def _evaluate(cluster: Cluster, config: Config, task: Task, split: str, step: int, run: RunFolder) -> Evaluation:
    """Evaluate greedy answers of the current policy, unless a stopped run has already recorded this evaluation."""
    evaluation = run.evaluation(step, split)
    if evaluation is None:
        groups = _greedy(cluster, config, task.dataset.splits[split], task.text, split, step, run)
        evaluation = summarise(step, split, groups)
        run.log_evaluation(evaluation, groups)
    return evaluation


def _greedy(
    cluster: Cluster, config: Config, examples: list[Example], text: str, split: str, step: int, run: RunFolder
) -> list[Group]:
    """The greedy answers of the current policy."""
    prompts = make_prompts(examples, text, split, step, config.run.seed)
    return _answers(cluster, run, step, "evaluate", prompts, Sampling(1, 0.0, config.sampling.max_tokens))


def _answers(
    cluster: Cluster, run: RunFolder, step: int, phase: str, prompts: list[Prompt], sampling: Sampling
) -> list[Group]:
    """The answers of the policy of a step, outside the loop."""
    with run.stopwatch(step)(phase):
        return cluster.generators.generate(prompts, sampling, version=step)
