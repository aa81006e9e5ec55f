"""The ledger of runs that the package's own code has written, whole and damaged in every way."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rft_cluster.common.files import write_json
from rft_cluster.doctor import proof
from rft_cluster.doctor.__main__ import main
from rft_cluster.learner.snapshot import shards_file
from rft_cluster.messages import Reward
from rft_cluster.prompts import make_question
from rft_cluster.run.ledger import check_run, make_ledger
from rft_cluster.run.lock import locked
from rft_cluster.run.task import Task
from tests.unit.run.begun import config, rewrite_state
from tests.unit.test_train import SETTINGS, SFT_SETTINGS, TARGETS, TASK, Roles, run

SMALL = (*SETTINGS, "sampling.group_size=2", "schedule.save_every=2")


def rewarded(accuracy: float) -> Reward:
    return Reward(1 + accuracy, {"format": 1.0, "accuracy": accuracy})


FAILED = Reward(None, {"format": 1.0}, {"accuracy": "no answer within \x1b[31m10 s"})


class Writing(Roles):
    """Roles whose records are as those of real ones. Each step has a live group, and one that is not, for a reason."""

    def _rollout(self, prompts):
        groups = [self._group(prompt, "rose") for prompt in prompts]
        live, equal = [rewarded(1.0), rewarded(0.0)], [rewarded(1.0), rewarded(1.0)]
        return groups, [live, [FAILED, FAILED] if self.steps == 3 else equal]

    def _learn(self, step):
        return replace(super()._learn(step), skipped=int(step == 4))

    def write_checkpoint(self, folder: Path, step):
        writing = super().write_checkpoint(folder, step)
        writing.updates = self.steps - (self.steps > 4)
        return writing


class OfFewSamples(Writing):
    """Roles whose steps have two samples to train on, so two updates of four."""

    def _learn(self, step):
        return replace(super()._learn(step), updates=2, skipped=2 * int(step == 4))

    def write_checkpoint(self, folder: Path, step):
        writing = super().write_checkpoint(folder, step)
        writing.updates *= 2
        return writing


def written(folder: Path, *overrides: str, roles: Roles | None = None, task: Task = TASK) -> Path:
    settings = config(folder, *SMALL, "scoring.failure_budget=0.6", *overrides)
    code, _ = run(settings, roles=roles or Writing(None, 0, 0.0), task=task)
    assert code == 0
    return settings.run_folder


def test_a_step_makes_no_more_updates_than_it_has_samples(tmp_path):
    run = written(tmp_path, "algorithm.updates_per_step=4", roles=OfFewSamples(None, 0, 0.0))
    ledger = check_run(run)
    assert ledger.problems == ()
    assert ledger.epochs[4].fates == {"update left out": 1, "equal rewards": 1}, "both updates were"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "mine"))


def test_a_run_of_a_version_that_recorded_less_of_each_completion_is_proved(copy):
    for file in (copy / "rollouts").iterdir():
        rows = [json.loads(line) for line in lines_of(file)]
        later = ("advantages", "tokens", "finish_reasons", "logprob_gaps", "why")
        former = [{key: value for key, value in row.items() if key not in later} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in former))
    assert check_run(copy).problems == ()


def test_a_whole_run_is_proved(whole):
    ledger = check_run(whole)
    assert ledger.problems == ()
    assert (ledger.state, ledger.steps, ledger.of, ledger.checkpoints) == ("done", 6, 6, (4, 6))
    assert [epoch.number for epoch in ledger.epochs] == [1, 2, 3, 4, 5, 6]
    assert [epoch.prompts for epoch in ledger.epochs] == [2] * 6
    assert ledger.epochs[3].fates == {"trained": 1, "masked": 1}
    assert ledger.epochs[4].fates == {"update left out": 1, "equal rewards": 1}
    assert ledger.fates == {"trained": 5, "equal rewards": 5, "masked": 1, "update left out": 1}
    assert ledger.masked == {f"accuracy: {FAILED.failures['accuracy']}": 2}
    assert (ledger.redone, ledger.replayed) == ((), 0)


def test_a_run_of_sft_is_proved(tmp_path):
    code, _ = run(config(tmp_path, *SFT_SETTINGS), targets=TARGETS)
    assert code == 0
    ledger = check_run(tmp_path / "mine")
    assert (ledger.problems, ledger.state, ledger.fates) == ((), "done", {"trained": 12})
    file = tmp_path / "mine" / "rollouts" / "step-000003.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"total": 0.0', b'"total": 1.0', 1))
    assert any(problem.startswith("rewards: step 3") for problem in check_run(tmp_path / "mine").problems)


# Damage: what is done to the lines of a file


def test_a_run_whose_prompts_list_the_classes_in_drawn_orders_is_proved(tmp_path):
    task = replace(TASK, question=make_question("closed", "flower", ["rose", "tulip"]))
    assert not make_ledger(written(tmp_path, task=task)).problems


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def without(*numbers: int) -> Callable[[Path], None]:
    return lambda file: _write(file, [line for i, line in enumerate(lines_of(file), 1) if i not in numbers])


def twice(number: int) -> Callable[[Path], None]:
    return lambda file: _write(file, [*lines_of(file)[:number], *lines_of(file)[number - 1 :]])


def swapped(number: int) -> Callable[[Path], None]:
    """This line, and the next one before it."""

    def damage(file: Path) -> None:
        lines = lines_of(file)
        _write(file, [*lines[: number - 1], lines[number], lines[number - 1], *lines[number + 1 :]])

    return damage


def cut(number: int) -> Callable[[Path], None]:
    """Half of this line."""

    def damage(file: Path) -> None:
        lines = lines_of(file)
        _write(file, [*lines[: number - 1], lines[number - 1][: len(lines[number - 1]) // 2], b"\n", *lines[number:]])

    return damage


def changed(number: int, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        lines = lines_of(file)
        row = json.loads(lines[number - 1])
        change(row)
        _write(file, [*lines[: number - 1], json.dumps(row).encode() + b"\n", *lines[number:]])

    return damage


def added(row: dict) -> Callable[[Path], None]:
    return lambda file: _write(file, [*lines_of(file), json.dumps(row).encode() + b"\n"])


def flipped(at: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        whole = file.read_bytes()
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])

    return damage


def _write(file: Path, lines: list[bytes]) -> None:
    file.write_bytes(b"".join(lines))


ROLLOUTS, JOURNAL, NEWEST = "rollouts/step-000003.jsonl", "journal/step-000005.jsonl", "checkpoints/step-000006"
SHARDS = [shards_file(rank) for rank in (0, 1)]
DAMAGE = {
    "a step is missing": ("metrics.jsonl", without(3), "steps: metrics.jsonl: step 3 is missing"),
    "steps are missing": ("metrics.jsonl", without(2, 3), "steps: metrics.jsonl: steps 2 to 3 are missing"),
    "the first step is missing": ("metrics.jsonl", without(1), "steps: metrics.jsonl: step 1 is missing"),
    "a step twice": ("metrics.jsonl", twice(3), "steps: metrics.jsonl: step 3 is there 2 times"),
    "steps in another order": ("metrics.jsonl", swapped(2), "steps: metrics.jsonl: step 2 stands after step 3"),
    "a line is cut": ("metrics.jsonl", cut(3), "steps: metrics.jsonl, line 3 is damaged"),
    "the last line is cut": (
        *("metrics.jsonl", cut(6)),
        "checkpoints: checkpoints/step-000006: step 6 is not recorded in metrics.jsonl, whose last line is cut",
    ),
    "too many steps": (
        *("metrics.jsonl", added({"step": 7})),
        "steps: metrics.jsonl: step 7 is not of this run: schedule.steps is 6",
    ),
    "a figure": (
        *("metrics.jsonl", changed(3, lambda row: row.update(reward=1.76))),
        "rewards: step 3: reward is 1.76 in metrics.jsonl, and 1.75 by its completions",
    ),
    "a figure is gone": (
        *("metrics.jsonl", changed(3, lambda row: row.pop("live_groups"))),
        "rewards: step 3: live_groups is not in metrics.jsonl, and 0.5 by its completions",
    ),
    "an update too many": (
        *("metrics.jsonl", changed(5, lambda row: row.update(skipped=0))),
        "checkpoints: checkpoints/step-000006: the optimizer has made 5 updates, and the records of its steps have 6",
    ),
    "an evaluation is missing": (
        "eval.jsonl",
        without(2),
        "evaluations: eval.jsonl: the validation of step 2 is missing",
    ),
    "the first test is missing": ("eval.jsonl", without(1), "evaluations: eval.jsonl: the test of step 0 is missing"),
    "the last test is missing": ("eval.jsonl", without(5), "evaluations: eval.jsonl: the test of step 6 is missing"),
    "an evaluation twice": (
        "eval.jsonl",
        twice(2),
        "evaluations: eval.jsonl: the validation of step 2 is there 2 times",
    ),
    "an evaluation is cut": ("eval.jsonl", cut(2), "evaluations: eval.jsonl, line 2 is damaged"),
    "an evaluation of another split": (
        *("eval.jsonl", added({"step": 2, "split": "tr\x1bain"})),
        r"evaluations: eval.jsonl: the tr\x1bain of step 2 is not of this run, which has 6 steps",
    ),
    "an evaluation of fewer images": (
        *("eval.jsonl", changed(2, lambda row: row.update(n=1))),
        "evaluations: eval.jsonl: the validation of step 2 is of 1 images, and the manifest has 2",
    ),
    "a prompt is missing": (
        *(ROLLOUTS, without(2)),
        "rollouts: rollouts/step-000003.jsonl has 1 groups, and schedule.prompts_per_step is 2",
        "prompts: step 3: prompt train/2/1 is missing",
    ),
    "a prompt twice": (ROLLOUTS, twice(1), "prompts: step 3: prompt train/2/0 is there 2 times"),
    "prompts in another order": (ROLLOUTS, swapped(1), "prompts: step 3: prompt train/2/0 stands after train/2/1"),
    "another example": (
        *(ROLLOUTS, changed(1, lambda row: row.update(example_id="gr\u202een", label="\x07"))),
        r"prompts: step 3, prompt train/2/0: example gr\u202een (\x07) where red (rose) was due",
        "prompts: epoch 3: 1 examples are missing (first red)",
    ),
    "an example twice": (
        *(ROLLOUTS, changed(1, lambda row: row.update(example_id="yellow", label="tulip"))),
        "prompts: epoch 3: 1 examples are there twice (first yellow)",
    ),
    "another step's prompt": (
        *(ROLLOUTS, changed(1, lambda row: row.update(prompt_id="train/1/0"))),
        "prompts: step 3: prompt train/1/0 is none of this step",
    ),
    "a completion is missing": (
        *(ROLLOUTS, changed(1, lambda row: [entries.pop() for entries in row.values() if isinstance(entries, list)])),
        "rollouts: rollouts/step-000003.jsonl, line 1 has 1 completions, and 2 were due",
    ),
    "a reward is missing": (
        *(ROLLOUTS, changed(1, lambda row: row["rewards"].pop())),
        "rollouts: rollouts/step-000003.jsonl, line 1 has 1 or 2 completions, and 2 were due",
    ),
    "an advantage is missing": (
        *(ROLLOUTS, changed(1, lambda row: row["advantages"].pop())),
        "rollouts: rollouts/step-000003.jsonl, line 1 has 1 or 2 completions, and 2 were due",
    ),
    "another advantage": (
        *(ROLLOUTS, changed(1, lambda row: row["advantages"].__setitem__(1, 0.5))),
        "rewards: step 3, prompt train/2/0, completion 2: advantage 0.5, and by the rewards of its group -0.7",
    ),
    "an advantage of what is masked": (
        *("rollouts/step-000004.jsonl", changed(2, lambda row: row["advantages"].__setitem__(0, 0.5))),
        "rewards: step 4, prompt train/3/1, completion 1: advantage 0.5, and by the rewards of its group None",
    ),
    "another length": (
        *(ROLLOUTS, changed(1, lambda row: row["tokens"].__setitem__(1, 3))),
        "staleness: step 3, prompt train/2/0, completion 2: has 3 tokens, and its versions wrote 2",
    ),
    "another finish reason": (
        *("rollouts/step-000005.jsonl", changed(2, lambda row: row["finish_reasons"].__setitem__(1, "length"))),
        "journal: journal/step-000005.jsonl, group 2 (train/4/1) has other finish reasons than rollouts/",
    ),
    "a group is cut": (ROLLOUTS, cut(2), "rollouts: rollouts/step-000003.jsonl, line 2 is damaged: line: Invalid JSON"),
    "a group is another thing": (
        *(ROLLOUTS, changed(2, lambda row: row.update(completions="one"))),
        "rollouts: rollouts/step-000003.jsonl, line 2 is damaged: completions: Input should be a valid",
    ),
    "a total": (
        *(ROLLOUTS, changed(1, lambda row: row["rewards"][0].update(total=1.0))),
        "rewards: step 3, prompt train/2/0, completion 1: total 1.0, and the weighted sum of its rewards is 2",
    ),
    "a total that is no number": (
        *(
            ROLLOUTS,
            changed(
                1,
                lambda row: row["rewards"][0].update(total=float("nan"), parts={"format": 1, "accuracy": float("nan")}),
            ),
        ),
        "rewards: step 3, prompt train/2/0, completion 1: total nan, and the weighted sum of its rewards is nan",
    ),
    "a reward and its total": (
        *(ROLLOUTS, changed(1, lambda row: row["rewards"][0].update(total=1, parts={"format": 0, "accuracy": 1}))),
        "rewards: step 3: reward is 1.75 in metrics.jsonl, and 1.5 by its completions",
    ),
    "a reward of another name": (
        *(ROLLOUTS, changed(1, lambda row: row["rewards"][0].update(parts={"format": 1.0, "\x1b": 1.0}))),
        r"rewards: step 3, prompt train/2/0, completion 1: has rewards format, \x1b, and rewards are format, accuracy",
    ),
    "masked without a reason": (
        *(ROLLOUTS, changed(1, lambda row: row["rewards"][0].update(total=None))),
        "rewards: step 3, prompt train/2/0, completion 1: total None, and the weighted sum of its rewards is 2",
    ),
    "masked with a total": (
        *("rollouts/step-000004.jsonl", changed(2, lambda row: row["rewards"][0].update(total=1.0))),
        "rewards: step 4, prompt train/3/1, completion 1: total 1, although a reward failed",
    ),
    "too stale": (
        *(ROLLOUTS, changed(1, lambda row: row.update(version_spans=[[[1, 2]], [[2, 2]]]))),
        "staleness: step 3, prompt train/2/0, completion 1: version 1 is 1 steps old, and schedule.max_staleness is 0",
    ),
    "of weights that were not there": (
        *(ROLLOUTS, changed(1, lambda row: row.update(version_spans=[[[2, 2]], [[3, 2]]]))),
        "staleness: step 3, prompt train/2/0, completion 2: version 3 wrote it, and the policy was of version 2",
    ),
    "a million tokens": (
        *(ROLLOUTS, changed(1, lambda row: row.update(version_spans=[[[2, 2]], [[2, 10**15]]]))),
        "staleness: step 3, prompt train/2/0, completion 2: versions and tokens [(2, 1000000000000000)] are impossible",
    ),
    "other tokens": (
        *(ROLLOUTS, changed(1, lambda row: row.update(version_spans=[[[2, 2]], [[2, 3]]], tokens=[2, 3]))),
        "rewards: step 3: tokens is 8 in metrics.jsonl, and 9 by its completions",
    ),
    "rollouts are missing": (ROLLOUTS, Path.unlink, "rollouts: rollouts/: step 3 is missing"),
    "rollouts are a folder": (
        *(ROLLOUTS, lambda file: [file.unlink(), file.mkdir()]),
        "rollouts: rollouts/step-000003.jsonl is not a file",
    ),
    "rollouts of no step": (
        *(ROLLOUTS, lambda file: shutil.copy(file, file.with_name("step-000009.jsonl"))),
        "rollouts: rollouts/: step 9 is there, and not recorded in metrics.jsonl",
    ),
    "a journalled text": (
        *("rollouts/step-000005.jsonl", changed(2, lambda row: row["completions"].__setitem__(1, "other"))),
        "journal: journal/step-000005.jsonl, group 2 (train/4/1) has other texts than rollouts/",
    ),
    "a journal's bit": (JOURNAL, flipped(700), "journal: journal/step-000005.jsonl is damaged: its bytes have changed"),
    "a journal's seal": (
        JOURNAL,
        flipped(120),
        "journal: journal/step-000005.jsonl is damaged: its bytes have changed",
    ),
    "a journal is cut": (JOURNAL, without(3), "journal: journal/step-000005.jsonl is damaged: its bytes have changed"),
    "a journal is missing": (
        *(JOURNAL, Path.unlink),
        "journal: journal: step 5 is missing, and the oldest checkpoint is of step 4",
    ),
    "another step's journal": (
        *(JOURNAL, lambda file: shutil.copy(file.with_name("step-000006.jsonl"), file)),
        "journal: journal/step-000005.jsonl, group 1 is of another prompt than train/4/0",
    ),
    "a journal of no step": (
        *(JOURNAL, lambda file: shutil.copy(file, file.with_name("step-000008.jsonl"))),
        "journal: journal: step 8 is there, and the last recorded step is 6",
    ),
    "a journal that is a link": (
        *(JOURNAL, lambda file: [file.unlink(), file.symlink_to("/dev/zero")]),
        "journal: journal/step-000005.jsonl is not a file",
    ),
    "a weight's bit": (
        *(f"{NEWEST}/{SHARDS[0]}", flipped(200)),
        f"checkpoints: checkpoints/step-000006: {SHARDS[0]} is damaged: its bytes have changed",
    ),
    "a shard is missing": (
        *(f"{NEWEST}/{SHARDS[1]}", Path.unlink),
        f"checkpoints: checkpoints/step-000006: {SHARDS[1]} is missing",
    ),
    "a checkpoint's state": (
        f"{NEWEST}/state.json",
        flipped(40),
        "checkpoints: checkpoints/step-000006: state.json is",
    ),
    "a checkpoint of another step": (
        *(NEWEST, lambda folder: folder.rename(folder.with_name("step-000005"))),
        "checkpoints: checkpoints/step-000005: state.json is of step 6",
    ),
    "no checkpoint of the last step": (NEWEST, shutil.rmtree, "checkpoints: none is of the last step, 6"),
    "an update twice": (
        *(NEWEST, lambda folder: rewrite_state(folder, optimizer_updates=6)),
        "checkpoints: checkpoints/step-000006: the optimizer has made 6 updates, and the records of its steps have 5",
    ),
    "another model": (
        *("model/classifier.json", lambda file: file.write_text(file.read_text().replace('"steps": 6', '"steps": 7'))),
        "models: model/ is of step 7, and the last recorded step is 6",
    ),
    "a model's card is gone": (
        "model/classifier.json",
        Path.unlink,
        "models: model/ has no classifier.json: it is not whole",
    ),
    "a checkpoint is left": (
        *("checkpoints/step-000009.tmp", Path.mkdir),
        "leftovers: checkpoints/step-000009.tmp is left of a process that died while it wrote",
    ),
    "a hostile name is left": (
        *("rollouts/\x1b[31m\n.tmp", Path.touch),
        r"leftovers: rollouts/\x1b[31m\n.tmp is left of a process that died while it wrote",
    ),
    "the settings are cut": (
        "config.yaml",
        lambda file: file.write_text(file.read_text().replace("  source: digits\n", "")),
        "settings: ",
    ),
    "the settings' end": ("config.yaml", lambda file: file.write_bytes(file.read_bytes()[:-6]), "its end is missing"),
    "the manifest is cut": ("manifest.json", without(5), "settings: data.manifest"),
    "the manifest is missing": ("manifest.json", Path.unlink, "manifest.json cannot be read: No such file"),
    "the manifest's order": (
        *(
            "manifest.json",
            lambda file: file.write_text(
                file.read_text().replace("red", "x").replace("yellow", "red").replace('"x"', '"yellow"')
            ),
        ),
        "prompts: step ",
    ),
    "another augmentation": (
        *("config.yaml", lambda file: file.write_text(file.read_text().replace("rotation: 0.0", "rotation: 9.0"))),
        *("journal: ", "is of another prompt than train/"),
    ),
    "another seed": (
        *("config.yaml", lambda file: file.write_text(file.read_text().replace("seed: 0", "seed: 1"))),
        "prompts: step ",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_is_found_and_said(copy, capsys, monkeypatch, what):
    file, damage, *messages = DAMAGE[what]
    damage(copy / file)
    ledger = check_run(copy)
    problems = ledger.problems
    for message in messages:
        assert [problem for problem in problems if message in problem], problems
    monkeypatch.setattr(proof, "check_run", lambda _: ledger)
    assert main(["--run", str(copy)]) == 1
    shown = capsys.readouterr().out
    assert "NOT proved" in shown
    assert all(character.isprintable() for character in shown.replace("\n", "")), "names cannot control a terminal"
    assert len(problems) <= 12, "one fault is not said again and again"


@pytest.mark.parametrize(
    "file", ["metrics.jsonl", "eval.jsonl", *(f"rollouts/step-{n:06d}.jsonl" for n in range(1, 7))]
)
def test_every_line_that_is_gone_or_there_twice_is_found(copy, file):
    whole = (copy / file).read_bytes()
    for number in range(1, len(lines_of(copy / file)) + 1):
        for damage in (without(number), twice(number), cut(number)):
            damage(copy / file)
            assert check_run(copy).problems, (damage, number)
            (copy / file).write_bytes(whole)
    assert not check_run(copy).problems


@pytest.mark.parametrize("file", [JOURNAL, f"{NEWEST}/{SHARDS[1]}", f"{NEWEST}/state.json"])
def test_every_bit_of_what_is_sealed_counts(copy, file):
    whole = (copy / file).read_bytes()
    for at in range(0, len(whole), 61):
        flipped(at)(copy / file)
        assert check_run(copy).problems, at
        (copy / file).write_bytes(whole)


def test_wherever_a_run_is_stopped_it_is_proved_before_it_goes_on_and_at_the_end(tmp_path, whole):
    _, roles = run(config(tmp_path / "calls", *SMALL, "scoring.failure_budget=0.6"), roles=Writing(None, 0, 0.0))
    expected = check_run(whole)
    for name in sorted(set(roles.calls)):
        calls = roles.calls.count(name)
        for count in sorted({1, calls // 2 + 1, calls}):
            settings = config(tmp_path / f"{name}-{count}", *SMALL, "scoring.failure_budget=0.6")
            code, _ = run(settings, roles=Writing((name, count), signal.SIGTERM, 0.0))
            assert code == 143
            stopped = check_run(settings.run_folder)
            assert (stopped.problems, stopped.state == "done") == ((), (name, count) == ("exporting", 2)), (name, count)
            assert run(settings, roles=Writing(None, 0, 0.0))[0] == 0
            done = check_run(settings.run_folder)
            assert (done.problems, done.epochs) == ((), expected.epochs), (name, count)


class Dies(Writing):
    """Learners that die in the update of a step, as after SIGKILL: nothing is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(None, 0, 0.0)
        self._dies_at = step

    def _learn(self, step):
        if step + 1 == self._dies_at:
            raise RuntimeError("an actor died")
        return super()._learn(step)


@pytest.mark.parametrize("save_every", [2, 100])
@pytest.mark.parametrize("step", range(1, 7))
def test_after_a_crash_a_run_is_proved_with_the_steps_that_it_did_again(tmp_path, whole, step, save_every):
    settings = config(tmp_path, *SMALL, "scoring.failure_budget=0.6", f"schedule.save_every={save_every}")
    with pytest.raises(RuntimeError, match="an actor died"):
        run(settings, roles=Dies(step))
    crashed = check_run(settings.run_folder)
    assert (crashed.problems, crashed.steps) == ((), step - 1)
    again = max(1, step - 2)
    with pytest.raises(RuntimeError, match="an actor died"):  # in a step that is done again: the journal is ahead
        run(settings, roles=Dies(again if save_every == 100 else step))
    assert check_run(settings.run_folder).problems == ()
    assert run(settings, roles=Writing(None, 0, 0.0))[0] == 0
    done = check_run(settings.run_folder)
    assert (done.problems, done.epochs) == ((), check_run(whole).epochs)
    assert done.replayed == len(done.redone)
    assert set(done.redone) == set(range((step - 1) // save_every * save_every + 1, step))


def test_a_step_from_the_journal_counts_as_replayed_whatever_else_its_record_has(tmp_path):
    settings = config(tmp_path, *SMALL, "scoring.failure_budget=0.6", "schedule.save_every=4")
    with pytest.raises(RuntimeError, match="an actor died"):
        run(settings, roles=Dies(6))
    for number in (1, 2):  # other ranks, and a version that wrote fewer keys
        changed(number, lambda row: row.update(logprob_gaps=[0.1, 0.2]) or row.pop("why"))(
            settings.run_folder / "rollouts" / "step-000005.jsonl"
        )
    assert run(settings, roles=Writing(None, 0, 0.0))[0] == 0
    ledger = check_run(settings.run_folder)
    assert (ledger.problems, ledger.redone, ledger.replayed) == ((), (5,), 1)
    (before,) = settings.run_folder.glob("redone-*/rollouts/*5.jsonl")
    changed(1, lambda row: row.update(completions=["", ""]))(before)
    assert check_run(settings.run_folder).replayed == 0


def test_a_run_that_goes_on_with_another_schedule_is_proved(tmp_path):
    folder = written(tmp_path, "schedule.steps=3", "schedule.evaluate_every=3")
    assert check_run(folder).state == "done"
    written(tmp_path)  # evaluates after every second step: none was due after step 2
    ledger = check_run(folder)
    assert (ledger.problems, ledger.steps, ledger.of) == ((), 6, 6)
    (folder / "config-to-000003.yaml").unlink()
    assert check_run(folder).problems == ("evaluations: eval.jsonl: the validation of step 2 is missing",)


def test_a_run_with_a_journal_of_other_settings_is_not_proved(copy):
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / NEWEST)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("learning_rate: 0.0005", "learning_rate: 0.0004"))
    assert [problem[:82] for problem in check_run(copy).problems] == [
        f"journal: journal/step-00000{n}.jsonl is of other settings than config.yaml (SHA-256 " for n in (5, 6)
    ]


def test_a_run_of_an_older_version_is_proved_but_for_the_journal_that_it_does_not_have(copy):
    shutil.rmtree(copy / "journal")
    for file in ("config.yaml", "manifest.json"):
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace("format: 2\n", "").replace('"format": 2,', "").replace("# end\n", ""))
    for file in (copy / "checkpoints").glob("*/state.json"):
        state = json.loads(file.read_text())
        write_json(file, {name: state[name] for name in ("step", "prompt_sha256", "tiny_model")})
    without(2)(copy / "eval.jsonl")
    added({"step": 2, "split": "validation", "accuracy_strict": 0.5})(copy / "eval.jsonl")  # it had no other figures
    assert check_run(copy).problems == (
        "journal: journal/ is not there: it was removed, or an older version wrote the run",
    )


def test_a_function_of_a_stranger_is_not_imported(copy):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("advantage: grpo", "advantage: no.such:module"))
    changed(1, lambda row: row.update(live_groups=1.0))(copy / "metrics.jsonl")  # which only that function could tell
    ledger = check_run(copy)
    assert (ledger.problems, ledger.fates["trained"]) == ((), 5)


def test_a_run_in_progress_is_read_as_it_is(copy, capsys):
    (copy / "checkpoints" / "step-000007.tmp").mkdir()
    with locked(copy):
        ledger = check_run(copy)
        assert ledger.problems == ()
        assert ledger.state == "in progress"
        without(2)(copy / "metrics.jsonl")
        assert "steps: metrics.jsonl: step 2 is missing" in check_run(copy).problems


def test_what_only_seems_wrong_while_files_move_is_not_said(copy, monkeypatch):
    without(2)(copy / "metrics.jsonl")
    wrong = make_ledger(copy)
    shutil.copy(copy / "eval.jsonl", copy / "metrics.jsonl")
    other = make_ledger(copy)
    seen = iter([wrong, other])
    monkeypatch.setattr("rft_cluster.run.ledger.make_ledger", lambda _: next(seen))
    with locked(copy):
        assert set(check_run(copy).problems) == set(wrong.problems) & set(other.problems)


def test_the_command_says_what_it_has_proved(whole, capsys):
    assert main(["--run", str(whole)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{whole}: 6 of 6 steps, done"
    assert lines[2] == "steps       ok     6 of 6 recorded, each once and in order"
    assert ["epoch", "prompts", "trained", "equal", "rewards", "masked", "update", "left", "out"] in map(
        str.split, lines
    )
    assert ["all", "12", "5", "5", "1", "1"] in map(str.split, lines)
    assert r"masked completions: 2 by accuracy: no answer within \x1b[31m10 s" in lines
    assert lines[-1] == "proved: nothing was lost, and nothing was done twice"


def test_a_folder_that_is_no_run_is_a_mistake_with_the_nearest_name(whole, capsys):
    for name, said in (
        ("min", f"there is no folder {whole.parent}/min. Did you mean {whole}?"),
        ("", f"{whole.parent} is not the folder of a run. It holds runs: mine"),
        ("mine/rollouts", f"{whole}/rollouts is not the folder of a run"),
        ("mine/config.yaml", f"{whole}/config.yaml is not the folder of a run"),
    ):
        assert main(["--run", str(whole.parent / name)]) == 2
        assert capsys.readouterr().err == f"error: --run: {said}\n"
