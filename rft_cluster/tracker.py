"""The run folder, and the line that each step shows.

runs/NAME/  config.yaml      the resolved configuration
            metrics.jsonl    an object a step
            eval.jsonl       an object an evaluation
            rollouts/        step-000012.jsonl: an object a group: prompt, label, completions, rewards, version
            checkpoints/     see checkpoint.py
            model/           the trained policy as a Hugging Face folder
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rft_cluster.advantages import is_live
from rft_cluster.checkpoint import latest_checkpoint
from rft_cluster.config import Config
from rft_cluster.errors import UserError
from rft_cluster.evaluation import Evaluation
from rft_cluster.messages import Group, Reward

# These say where and how a run runs, not what it computes: they may change when it is resumed.
MAY_CHANGE = ("cluster", "generators", "learners")


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
    """One step as one flat object. Learner sums become means over the tokens that were trained on."""
    every = [reward for group in rewards for reward in group]
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
        "reward": sum(reward.total for reward in every) / len(every),
        **{f"reward/{name}": sum(reward.parts[name] for reward in every) / len(every) for name in every[0].parts},
        "live_groups": sum(is_live([reward.total for reward in group]) for group in rewards) / len(groups),
        **means,
        **{
            name: learner[name]
            for name in ("loss", "grad_norm", "learning_rate", "skipped", "memory_gib")
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
    gap = f"gap {metrics['logprob_gap']:.4f}" if "logprob_gap" in metrics else "no live group: no update"
    return (
        f"step {step:>{len(str(steps))}}/{steps}  reward {metrics['reward']:.2f} ({parts})  "
        f"live {metrics['live_groups']:.2f}  {gap}  {metrics['tokens_per_second']:.0f} tok/s  "
        f"[{shares}]  {clock(seconds_left)} left"
    )


def clock(seconds: float) -> str:
    """3725 -> 1:02:05, 65 -> 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunFolder:
    """Writes a run's records. Lines of steps that a resumed run will do again are dropped when it opens."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._config = config
        self.path = config.run_folder
        self._step_seconds: list[float] = []
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        for name in ("metrics.jsonl", "eval.jsonl"):
            _keep_rows(self.path / name, first_step)

    def log_step(
        self,
        step: int,
        groups: Sequence[Group],
        rewards: Sequence[Sequence[Reward]],
        learner: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> None:
        """Record step number `step` (from 1: the version it made) and show its line."""
        metrics = step_metrics(groups, rewards, learner, seconds)
        rows = [
            {
                "prompt_id": group.prompt.prompt_id,
                "example_id": group.prompt.example_id,
                "label": group.prompt.label,
                "policy_version": group.completions[0].policy_version,
                "completions": [completion.text for completion in group.completions],
                "rewards": [asdict(reward) for reward in group_rewards],
            }
            for group, group_rewards in zip(groups, rewards, strict=True)
        ]
        rollouts = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.path / "rollouts" / f"step-{step:06d}.jsonl").write_text(rollouts)
        _append(self.path / "metrics.jsonl", {"step": step, **metrics})
        self._step_seconds.append(sum(seconds.values()))
        recent = self._step_seconds[-20:]
        left = (self._config.schedule.steps - step) * sum(recent) / len(recent)
        print(step_line(step, self._config.schedule.steps, metrics, left), flush=True)

    def log_evaluation(self, evaluation: Evaluation) -> None:
        _append(self.path / "eval.jsonl", asdict(evaluation))
        low, high = evaluation.interval
        print(
            f"{evaluation.split} accuracy {100 * evaluation.accuracy_strict:.1f} % (95 % interval {100 * low:.1f} to "
            f"{100 * high:.1f}, {evaluation.n} images), format {100 * evaluation.format_rate:.1f} %, "
            f"after {evaluation.step} steps",
            flush=True,
        )


def first_step_of(config: Config, resume: bool) -> tuple[int, Path | None]:
    """The step to begin with and the checkpoint to begin from, before anything is written.

    Raises:
        UserError: the run folder exists and is not to be resumed, or holds a run of another configuration.
    """
    folder = config.run_folder
    if not folder.exists():
        return 0, None
    if not resume:
        raise UserError(f"{folder} exists: add --resume to go on with that run, or choose another run.name")
    saved_file = folder / "config.yaml"
    if saved_file.is_file():
        saved, ours = yaml.safe_load(saved_file.read_text()), config.model_dump(mode="json")
        for section in ours:
            # A run may move to another folder; another seed would draw other images.
            then, now = (part["seed"] if section == "run" else part for part in (saved[section], ours[section]))
            if section not in MAY_CHANGE and then != now:
                name = "run.seed" if section == "run" else section
                raise UserError(f"{folder} was begun with another configuration: {name} was {then}, and is {now} now")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return 0, None
    return json.loads((checkpoint / "state.json").read_text())["step"], checkpoint


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _keep_rows(path: Path, last_step: int) -> None:
    """Keep what a run that goes on after `last_step` will not write again; a half-written last line goes, too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        row = json.loads(line)
        # The test is evaluated before the first step, and after the last.
        again = last_step == 0 or (row.get("split") == "test" and row["step"] > 0)
        if row["step"] <= last_step and not again:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
