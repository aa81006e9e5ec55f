"""The journal: the scored groups of each step, on disk before the update that trains on them counts.

journal/step-000012.jsonl   a line with the SHA-256 of settings and groups, then an object a group

A run that was killed goes on from its last checkpoint, and makes the updates since then again from the journal, without
generating: the completions that it had paid for are not lost, and the policy is the same to the bit, whichever
generator wrote them. A step is written while the learners make its update, and nothing builds on an update before its
step is on the disk. Files of steps before the oldest checkpoint are removed, once there is a second one: the first may
be lost in its upload to a bucket, and the journal then has all steps. Those of a run with other settings are removed:
each step was written by the policy to which the steps before it led, and this run's steps would lead to another.
"""

import base64
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft_cluster.common.files import FORMAT, json_object, sync, write_bytes
from rft_cluster.config import Config
from rft_cluster.messages import Completion, Group, Prompt, Reward
from rft_cluster.prompts import text_hash

FOLDER = "journal"
# What policies depend on, but for rounding. `steps` decides the learning rates.
SETTINGS: dict[str, Any] = dict.fromkeys(("model", "algorithm", "optimizer", "sampling", "rewards", "prompt"), True) | {
    "run": {"seed"},
    "schedule": {"steps", "prompts_per_step", "max_staleness", "min_live", "warm_start"},
}
Rewards = Sequence[Sequence[Reward]]


@dataclass(frozen=True)
class Recorded:
    """Stands for a rollout in flight, e.g. `Recorded(groups, rewards).wait()`."""

    groups: list[Group]
    rewards: list[list[Reward]]

    def wait(self) -> tuple[list[Group], list[list[Reward]]]:
        return self.groups, self.rewards


class Journal:
    """The journal of a run. Opening it removes what cannot be used: steps that are done, and those after a gap."""

    def __init__(self, config: Config, first_step: int) -> None:
        """`first_step`: number of steps that the run's checkpoint has done."""
        self._folder = config.run_folder / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._settings = settings_digest(config)
        self.replayed: set[int] = set()
        """The steps that `recorded` has given back."""
        self._end = first_step  # the first step that the journal does not have
        while self._body(self._end) is not None:
            self._end += 1
        self._drop_the_rest()
        if self._end > first_step:
            print(f"steps {first_step + 1} to {self._end} are in the journal: their completions are not written again")

    def recorded(
        self, step: int, prompts: Sequence[Prompt], further: Iterable[Sequence[Prompt]] = ()
    ) -> Recorded | None:
        """The scored groups of a step, if an earlier part of the run journalled them for the same prompts, and for as
        many of the `further` rounds of prompts as it had."""
        if step >= self._end:
            return None
        try:
            lines, asked = (self._body(step) or b"").splitlines(), [*prompts]
            for round_of_prompts in further:
                if len(asked) >= len(lines):
                    break
                asked += round_of_prompts
            pairs = [_from_row(json_object(line) or {}, prompt) for line, prompt in zip(lines, asked, strict=True)]
        except (LookupError, TypeError, ValueError):  # of other prompts, or not what `commit` writes
            self._end = step  # a policy that this run will not have wrote the later ones
            self._drop_the_rest()
            return None
        self.replayed.add(step)
        return Recorded([group for group, _ in pairs], [rewards for _, rewards in pairs])

    def commit(self, step: int, groups: Sequence[Group], rewards: Rewards) -> None:
        """Return when the scored groups of a step are on the disk."""
        if step < self._end:
            return
        self._end = step + 1
        body = "".join(
            json.dumps(_to_row(group, own)) + "\n" for group, own in zip(groups, rewards, strict=True)
        ).encode()
        seal = _digest(self._settings, body)
        head = {"format": FORMAT, "step": step, "settings": self._settings, "sha256": seal}
        write_bytes(self._file(step), json.dumps(head).encode() + b"\n" + body)
        sync(self._folder)

    def _body(self, step: int) -> bytes | None:
        """The groups of a step, a line each; None without a whole file of a run with these settings."""
        file = self._file(step)
        if not file.is_file():
            return None
        try:
            settings, body = read_sealed(file)
        except ValueError:
            print(f"WARNING: {file} is damaged: its step and those after it are generated again", flush=True)
            return None
        if settings != self._settings:
            print(f"step {step + 1} and those after it are generated again: {file} is of other settings", flush=True)
            return None
        return body

    def _drop_the_rest(self) -> None:
        """Remove the steps from `_end` on, and what a process left that died while it wrote.

        Other files stay: the folder may have been somebody's before, or be a link to any.
        """
        for file in self._folder.iterdir():
            step, cut = step_of(file), step_of(file.with_suffix("")) is not None
            if (step is not None and step >= self._end) or (cut and file.suffix == ".tmp"):
                file.unlink()

    def _file(self, step: int) -> Path:
        return step_file(self._folder, step)


def settings_digest(config: Config) -> str:
    """SHA-256 of the settings that a journalled step depends on."""
    settings = config.model_dump(mode="json", include=SETTINGS)
    del settings["optimizer"]["sft_learning_rate"]  # of runs inside this one
    if settings["schedule"]["warm_start"] is None:
        del settings["schedule"]["warm_start"]
    if settings["algorithm"]["objective"] == "grpo":
        del settings["algorithm"]["objective"]  # likewise
    if settings["prompt"]["options"] == "all":
        del settings["prompt"]["options"], settings["prompt"]["top_k"]  # likewise
    if not settings["schedule"]["min_live"]:
        del settings["schedule"]["min_live"]  # likewise
    for key in ("family", "min_image_tokens", "max_image_tokens", "min_pixels", "max_pixels"):
        if settings["model"][key] is None:  # journals of versions without this key are as good
            del settings["model"][key]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_sealed(file: Path) -> tuple[str, bytes]:
    """The `settings_digest` and the groups, a line each, of a step's file.

    Raises:
        ValueError: the file has changed since it was written.
    """
    head, _, body = file.read_bytes().partition(b"\n")
    told = json_object(head) or {}
    settings = str(told.get("settings"))
    if told.get("format") != FORMAT or told.get("sha256") != _digest(settings, body):
        raise ValueError("its bytes have changed since they were written")
    return settings, body


def has_all_steps(run: Path) -> bool:
    """True if the journal reaches back to the first step, so that a run can go on without a checkpoint."""
    return step_file(run / FOLDER, 0).is_file()


def prune_journal(run: Path, oldest: int) -> None:
    """Remove the steps that the oldest checkpoint, of `oldest` steps, has done."""
    for file in (run / FOLDER).glob("step-*.jsonl"):
        if (step := step_of(file)) is not None and step < oldest:
            file.unlink()


def _digest(settings: str, body: bytes) -> str:
    return hashlib.sha256(settings.encode() + body).hexdigest()


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step + 1:06d}.jsonl"  # named by the number that people see


def step_of(file: Path) -> int | None:
    """The step, from 0, in a file's name; None for another file."""
    number = re.fullmatch(r"step-(\d{6,9})\.jsonl", file.name, re.ASCII)
    return int(number[1]) - 1 if number else None


def step_files(folder: Path) -> dict[int, Path]:
    """The files of steps by the number that people see, ascending."""
    files = {step_of(path): path for path in folder.glob("step-*.jsonl")}
    return {step + 1: files[step] for step in sorted(step for step in files if step is not None and step >= 0)}


def identity(prompt: Prompt) -> list[str | int]:
    """What a recorded group must agree in with the prompt of a run that goes on."""
    image = prompt.example.image
    shown = [image.sha256] if image.augmentation is None else [image.sha256, repr(image.augmentation)]
    return [prompt.prompt_id, *shown, prompt.label, prompt.seed, text_hash(prompt.text)]


def _to_row(group: Group, rewards: Sequence[Reward]) -> dict[str, Any]:
    return {
        "prompt": identity(group.prompt),
        "prompt_token_ids": _packed("q", group.prompt_token_ids),
        "completions": [
            {
                "token_ids": _packed("q", one.token_ids),
                "generator_logprobs": _packed("d", one.generator_logprobs),
                "text": one.text,
                "finish_reason": one.finish_reason,
                "policy_version": one.policy_version,
                "version_spans": one.version_spans,
            }
            for one in group.completions
        ],
        "rewards": [{"total": one.total, "parts": one.parts, "failures": one.failures} for one in rewards],
    }


def _from_row(row: dict[str, Any], prompt: Prompt) -> tuple[Group, list[Reward]]:
    if row["prompt"] != identity(prompt):
        raise ValueError(f"recorded for another prompt than {prompt.prompt_id}")
    completions, rewards = scored(row)
    return Group(prompt, _unpacked("q", row["prompt_token_ids"]), completions), rewards


def scored(row: dict[str, Any]) -> tuple[list[Completion], list[Reward]]:
    """The completions of a journalled group, and their rewards.

    Raises:
        LookupError, TypeError, ValueError: the row is not what `commit` writes.
    """
    completions = [
        Completion(
            _unpacked("q", one["token_ids"]),
            _unpacked("d", one["generator_logprobs"]),
            one["text"],
            one["finish_reason"],
            one["policy_version"],
            tuple((version, tokens) for version, tokens in one["version_spans"]),
        )
        for one in row["completions"]
    ]
    return completions, [Reward(one["total"], one["parts"], one["failures"]) for one in row["rewards"]]


def _packed(kind: str, numbers: Sequence[int] | Sequence[float]) -> str:
    """Base64 of little-endian numbers, `q` for int64 and `d` for FP64: ten times as fast as digits, and exact."""
    return base64.b64encode(array(kind, numbers).tobytes()).decode()


def _unpacked(kind: str, text: str) -> list[Any]:
    return array(kind, base64.b64decode(text)).tolist()
