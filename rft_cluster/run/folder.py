"""The run folder, and the line that each step shows.

runs/NAME/  config.yaml      the resolved configuration
            manifest.json       which images were chosen, with their SHA-256 (see data/manifest.py)
            metrics.jsonl    an object a step
            eval.jsonl       an object an evaluation
            baselines.json   what the same images give without a language model
            rollouts/        step-000012.jsonl: an object a group: prompt, label, completions, rewards, version
            checkpoints/     see checkpoint.py
            model/           the trained policy as a Hugging Face folder
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rft_cluster.algorithm.advantages import is_live
from rft_cluster.classification.report import Evaluation
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_json
from rft_cluster.config import Config
from rft_cluster.data.manifest import check_manifest, manifest, read_manifest
from rft_cluster.messages import Group, Reward
from rft_cluster.prompts import text_hash
from rft_cluster.run.task import Task

# These say where and how a run runs, not what it computes: they may change when it is resumed.
MAY_CHANGE = ("cluster", "generators", "learners", "scoring")


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

    def __init__(self, config: Config, task: Task, first_step: int) -> None:
        self._config = config
        self.path = config.run_folder
        self._step_seconds: list[float] = []
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_json(self.path / "manifest.json", manifest(task.dataset, config.data, config.run.seed))
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
                "rewards": [{"total": r.total, "parts": r.parts, "failures": r.failures} for r in group_rewards],
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
            f"{100 * high:.1f}, {evaluation.n} images; leniently {100 * evaluation.accuracy_lenient:.1f} %), "
            f"format {100 * evaluation.format_rate:.1f} %, after {evaluation.step} steps",
            flush=True,
        )


def first_step_of(config: Config, task: Task, resume: bool) -> tuple[int, Path | None]:
    """The step to begin with and the checkpoint to begin from, before anything is written.

    Raises:
        UserError: the run folder exists and is not to be resumed, or holds a run of another configuration, of other
            images, or with another prompt.
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
            then, now = (part["seed"] if section == "run" else part for part in (saved.get(section), ours[section]))
            if section not in MAY_CHANGE and then != now:
                name = "run.seed" if section == "run" else section
                raise UserError(f"{folder} was begun with another configuration: {name} was {then}, and is {now} now")
    if (folder / "manifest.json").is_file():
        check_manifest(task.dataset, read_manifest(folder / "manifest.json"))
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return 0, None
    state = json.loads((checkpoint / "state.json").read_text())
    if state["prompt_sha256"] != text_hash(task.text):
        raise UserError(f"{folder} was begun with another prompt: the template's text has changed since")
    return state["step"], checkpoint


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


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return max(
        (path for path in (run / "checkpoints").glob("step-??????") if (path / "state.json").is_file()),
        default=None,
    )


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest `keep`; called after a newer one is complete."""
    for path in sorted((run / "checkpoints").glob("step-??????"))[:-keep]:
        shutil.rmtree(path)
