"""A step's figures, and the line that shows them."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rft_cluster.algorithm.advantages import is_live
from rft_cluster.messages import Group, Reward


class Stopwatch:
    """Seconds spent in named stages of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


def step_metrics(
    groups: Sequence[Group],
    rewards: Sequence[Sequence[Reward]],
    learner: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One step as one flat object. Learner sums become means over the tokens that were trained on, rewards means
    over the completions that have one; one at least must. `reward_failures` counts the others."""
    every = [reward for group in rewards for reward in group]
    totals = [reward.total for reward in every if reward.total is not None]
    valid = [reward.parts for reward in every if not reward.failures]
    failures = Counter(name for reward in every for name in reward.failures)
    completions = [completion for group in groups for completion in group.completions]
    tokens = sum(len(completion.token_ids) for completion in completions)
    trained = learner.get("tokens", 0.0)
    means = (
        {
            name: learner[name] / trained if trained else 0.0
            for name in ("logprob_gap", "kl", "entropy", "importance", "clipped")
            if name in learner or not trained
        }
        if learner
        else {}
    )
    return {
        "reward": sum(totals) / len(totals),
        **{f"reward/{name}": sum(parts[name] for parts in valid) / len(valid) for name in valid[0]},
        "reward_failures": len(every) - len(valid),
        **{f"reward_failures/{name}": count for name, count in failures.items()},
        "live_groups": sum(is_live([reward.total for reward in group]) for group in rewards) / len(groups),
        **means,
        **{
            name: learner[name]
            for name in ("loss", "grad_norm", "learning_rate", "skipped", "memory_gib", "activation_gib")
            if name in learner
        },
        "completion_tokens": tokens / len(completions),
        "cut_short": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
        "oldest_version": min(completion.policy_version for completion in completions),
        "tokens": tokens,
        "tokens_trained": trained,
        "tokens_per_second": tokens / sum(seconds.values()),
        **{f"seconds/{stage}": value for stage, value in seconds.items()},
    }


def step_line(step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> str:
    """A step for people, on one line."""
    stages = {name.removeprefix("seconds/"): value for name, value in metrics.items() if name.startswith("seconds/")}
    total = sum(stages.values())
    shares = " ".join(f"{stage} {100 * value / total:.0f}%" for stage, value in stages.items())
    parts = " ".join(
        f"{name.removeprefix('reward/')} {value:.2f}" for name, value in metrics.items() if name.startswith("reward/")
    )
    if metrics["reward_failures"]:
        failed = " ".join(
            f"{name.removeprefix('reward_failures/')} {value}"
            for name, value in metrics.items()
            if name.startswith("reward_failures/")
        )
        parts += f"; {metrics['reward_failures']} completions without: {failed} failed"
    cut = metrics["cut_short"]
    shortened = f"{max(1, round(100 * cut))} % cut at max_tokens  " if cut else ""
    gap = f"gap {metrics['logprob_gap']:.4f}" if "logprob_gap" in metrics else "no live group: no update"
    return (
        f"step {step:>{len(str(steps))}}/{steps}  reward {metrics['reward']:.2f} ({parts})  "
        f"live {metrics['live_groups']:.2f}  {shortened}{gap}  {metrics['tokens_per_second']:.0f} tok/s  "
        f"[{shares}]  {clock(seconds_left)} left"
    )


def clock(seconds: float) -> str:
    """3725 -> 1:02:05, 65 -> 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
