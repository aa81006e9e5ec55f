"""The run folder.

runs/NAME/  config.yaml      the resolved configuration
            manifest.json    which images were chosen, with their SHA-256 (see data/manifest.py)
            metrics.jsonl    an object a step (see metrics.py)
            eval.jsonl       an object an evaluation
            baselines.json   what the same images give without a language model
            rollouts/        step-000012.jsonl: an object a group: prompt, label, completions, rewards, version
            checkpoints/     see learner/checkpoint.py
            model/           the trained policy as a Hugging Face folder
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rft_cluster.classification.report import Evaluation
from rft_cluster.common.files import write_json, write_text
from rft_cluster.config import Config, config_text
from rft_cluster.data.manifest import manifest
from rft_cluster.messages import Group, Reward
from rft_cluster.run.metrics import step_line, step_metrics
from rft_cluster.run.task import Task


class RunFolder:
    """Writes a run's records. Lines of steps that a resumed run will do again are dropped when it opens."""

    def __init__(self, config: Config, task: Task, first_step: int) -> None:
        self._config = config
        self.path = config.run_folder
        self._step_seconds: list[float] = []
        (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", config_text(config))
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


def read_evaluations(run: Path, split: str) -> list[dict[str, Any]]:
    """What `log_evaluation` wrote of a split, in order; nothing where there is no such file."""
    file = run / "eval.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [row for row in rows if row["split"] == split]


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
