"""The loop with roles that only count: stopped anywhere it goes on to the same end.

Real roles are stopped in tests/integration/test_stopped.py; here every call of every step is.
"""

import json
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rft_cluster import launch
from rft_cluster.classification.also import change
from rft_cluster.cluster import handles
from rft_cluster.cluster.handles import Update
from rft_cluster.common import stopping
from rft_cluster.common.errors import ClusterError, NoRoom, UserError, WeightTransferError, exit_code
from rft_cluster.common.files import unfinished, write_json
from rft_cluster.config import Config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.data.manifest import read_manifest
from rft_cluster.messages import Completion, CompletionGap, Group, LearnerStats, Prompt, Reward, TrainingSample
from rft_cluster.prompts import Question, make_question
from rft_cluster.report.summary import elsewhere
from rft_cluster.run.activity import Activity
from rft_cluster.run.answers import read_answers, write_answers
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.history import read_history
from rft_cluster.run.inside import WARM_START, WARM_START_FILE, WarmStart
from rft_cluster.run.ledger import make_ledger
from rft_cluster.run.lock import locked
from rft_cluster.run.records import read_rows
from rft_cluster.run.resume import Start, find_start, is_run, raise_with_cure
from rft_cluster.run.targets import Targets
from rft_cluster.run.task import Task
from rft_cluster.run.tracker import Tracker
from rft_cluster.train import train
from tests.unit.run.begun import Writing, config, picture

STEPS = 6
SETTINGS = (f"schedule.steps={STEPS}", "schedule.prompts_per_step=2", "optimizer.warmup_steps=0",
            "schedule.evaluate_every=2", "schedule.stop_when_stuck=0")  # fmt: skip
COLOURS = ("red", "yellow", "blue", "green", "white", "black")
SHOWN = [LabelledImage(colour, picture(colour), ("rose", "tulip")[i % 2]) for i, colour in enumerate(COLOURS)]
TASK = Task(
    FewShotDataset.of("photos", ["rose", "tulip"], SHOWN[:2], SHOWN[2:4], SHOWN[4:], []), Question("Which flower?")
)
RIGHT = (0, 1, 1, 2, 1, 2, 1)  # of the two validation images, after so many steps


class Roles:
    """Generators, learners and the reward in one. `stop_at`: the call, and the how manieth, in which a signal comes."""

    def __init__(self, stop_at: tuple[str, int] | None, number: int, seconds: float) -> None:
        self.generators = self.learners = self
        self.steps, self.between, self.sent = 0, True, -1
        self.calls: list[str] = []
        self.samples: list[TrainingSample] = []  # of the update in flight
        self._stop_at, self._number, self._seconds = stop_at, number, seconds
        self.leaving = ""

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self._stop_at == (name, self.calls.count(name)):
            os.kill(os.getpid(), self._number)
            time.sleep(self._seconds)

    def start_rollout(self, prompts, sampling, version):
        self._called("asking")
        return SimpleNamespace(wait=lambda: self._rollout(prompts))

    def do_meanwhile(self, work):
        self.meanwhile = work

    def _rollout(self, prompts):
        self._called("generating")
        self.meanwhile()
        groups = [self._group(prompt, "rose") for prompt in prompts]
        return groups, [[Reward(1.0, {"accuracy": 1.0}, {}), Reward(0.0, {"accuracy": 0.0}, {})] for _ in groups]

    def generate(self, prompts, sampling, version):
        self._called("evaluating")
        self.meanwhile()
        assert version == self.sent == self.steps
        right = RIGHT[version]
        return [self._group(p, p.label if i < right else "none") for i, p in enumerate(prompts)]

    def _group(self, prompt: Prompt, answer: str) -> Group:
        text = f"<think>-</think><answer>{answer}</answer>"
        return Group(prompt, [1], [Completion([5, 6], [-0.5, -0.5], text, "stop", self.sent)] * 2)

    def start_update(self, samples, step):
        self.between, self.samples = False, samples
        return SimpleNamespace(wait=lambda: self._learn(step))

    def _learn(self, step):
        self._called("learning")
        self.meanwhile()
        assert step == self.steps
        self.steps, self.between = step + 1, True
        gaps = (CompletionGap(one.prompt.prompt_id, one.index, abs(one.advantage) / 8) for one in self.samples)
        return LearnerStats(tokens=8, logprob_gaps=tuple(gaps))

    def broadcast_weights(self, version):
        self._called("transferring")
        assert version == self.steps
        self.sent = version

    def news_of_leaving(self) -> str:
        told, self.leaving = self.leaving, ""
        return told

    def take_snapshot(self, step):
        assert self.between and step == self.steps

    def checkpoint_bytes(self) -> int:
        return 1000

    def write_checkpoint(self, folder: Path, step):
        assert self.between and step == self.steps
        self._called("saving")
        writing = Writing(folder, self.steps, done=False)  # it ends when it is waited for
        writing.begins = lambda: self._called("writing")
        return writing

    def export(self, folder: Path, files):
        with unfinished(folder) as temporary:
            (temporary / "weights").write_text(str(self.steps))
            self._called("exporting")
            for name, content in files.items():
                write_json(temporary / name, content)


def run(
    settings: Config,
    *,
    resume: bool = True,
    stop_at=None,
    number=0,
    seconds=0.0,
    roles: Roles | None = None,
    task: Task = TASK,
    targets: Targets | None = None,
) -> tuple[int, Roles]:
    """One launch, without its checks; its exit code."""
    roles = roles or Roles(stop_at, number, seconds)

    def work() -> None:
        with locked(settings.run_folder):
            try:
                start = find_start(settings, resume) if is_run(settings.run_folder) else Start()
                roles.steps = start.step
                train(settings, task, roles, RunFolder(settings, task, start.step, "nothing"), targets)
            except BaseException as error:
                raise_with_cure(error, settings.run_folder, ["launch"])
                raise

    return exit_code(work), roles


SFT_SETTINGS = (*SETTINGS, "algorithm.objective=sft", "algorithm.kl_beta=0", "schedule.save_every=2")
TARGETS = Targets(
    SimpleNamespace(
        prompt_tokens=lambda prompt, images: [1, len(images[prompt.example.image.sha256])],
        tokenizer=lambda text: {"input_ids": list(text.encode())[:3]},
        opening="",
        stop_token_ids=[9],
    ),
    TASK.dataset.images,
)


def test_sft_learns_from_targets_and_asks_no_generator_but_in_evaluations(tmp_path):
    learned = []

    class Watching(Roles):
        def start_update(self, samples, step):
            learned.extend(samples)
            return super().start_update(samples, step)

    code, roles = run(config(tmp_path, *SFT_SETTINGS), roles=Watching(None, 0, 0.0), targets=TARGETS)
    assert (code, roles.calls.count("asking"), roles.calls.count("evaluating")) == (0, 0, 5)
    # At the start, and after each step with an evaluation. `Roles.generate` asserts that it has the newest weights.
    assert roles.calls.count("transferring") == 4
    assert len(learned) == 2 * STEPS
    for sample in learned:
        # The question shows no tags, so the label is the whole answer.
        assert sample.token_ids == [*sample.prompt.label.encode()[:3], 9]
        assert (sample.advantage, sample.generator_logprobs) == (1.0, [])
        assert sample.weight == pytest.approx(1 / (2 * 4))  # the mean over 4 tokens, then over 2 targets


@pytest.mark.parametrize("stop_at", [("learning", 4), ("transferring", 4), ("evaluating", 3)])
def test_sft_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, stop_at):
    records = {}
    for name, stops in (("whole", [None]), ("stopped", [stop_at, None])):
        for stop in stops:
            code, _ = run(config(tmp_path / name, *SFT_SETTINGS), stop_at=stop, number=signal.SIGTERM, targets=TARGETS)
            assert code == (143 if stop else 0)
        folder = tmp_path / name / "mine"
        records[name] = {file.name: file.read_text() for file in sorted((folder / "rollouts").iterdir())}
        records[name] |= {
            "evaluations": read_rows(folder / "eval.jsonl"),
            "end": (folder / "model/weights").read_text(),
        }
    assert records["stopped"] == records["whole"]


def test_training_lists_the_classes_in_drawn_orders_and_evaluations_in_their_own(tmp_path):
    task, asked = replace(TASK, question=make_question("closed", "flower", ["rose", "tulip"])), []
    roles, settings = (
        Roles(None, 0, 0.0),
        config(tmp_path, "schedule.steps=6", "schedule.evaluate_every=2", "optimizer.warmup_steps=0"),
    )
    group = roles._group
    roles._group = lambda prompt, answer: asked.append(prompt) or group(prompt, answer)
    assert run(settings, roles=roles, task=task)[0] == 0
    training, others = (
        {p.text for p in asked if p.prompt_id.startswith("train/") == is_training} for is_training in (True, False)
    )
    assert training == {task.question.listing(order) for order in (("rose", "tulip"), ("tulip", "rose"))}
    assert others == {task.text}


def remember(roles: Roles, asked: dict[str, str]) -> None:
    """Note the text of each prompt by its id. There is no group for one that was asked in another text before."""
    group = roles._group
    roles._group = lambda p, answer: asked.setdefault(p.prompt_id, p.text) == p.text and group(p, answer)


def test_a_run_that_resumes_asks_about_each_image_with_the_same_order_of_classes(tmp_path):
    task = replace(TASK, question=make_question("closed", "flower", ["rose", "tulip"]))
    asked: dict[str, dict[str, str]] = {"whole": {}, "stopped": {}}
    for name, stop_at in (("whole", None), ("stopped", ("learning", 3)), ("stopped", None)):
        one, own = Roles(stop_at, signal.SIGTERM, 0.0), asked[name]
        remember(one, own)
        code, _ = run(config(tmp_path / name, *SETTINGS), roles=one, task=task)
        assert (code == 0) == (stop_at is None)
    assert asked["whole"] == asked["stopped"] and len(set(asked["whole"].values())) == 2


def test_options_are_asked_for_once_and_a_run_that_resumes_lists_the_same(tmp_path, monkeypatch):
    three = ["lily", "rose", "tulip"]
    shots = [*SHOWN[:2], LabelledImage("grey", picture("grey"), "lily")]
    task = Task(
        FewShotDataset.of("photos", three, shots, SHOWN[2:4], SHOWN[4:], []), make_question("closed", "digit", three)
    )
    options = ("prompt.template=closed", "prompt.options=own_top_k", "prompt.top_k=2")
    asked: dict[str, dict[str, str]] = {"whole": {}, "stopped": {}}
    parts = (("whole", None), ("stopped", ("evaluating", 1)), ("stopped", ("learning", 3)), ("stopped", None))
    phases: list[str] = []
    begin = Activity.begin
    monkeypatch.setattr(Activity, "begin", lambda self, step, phase: (phases.append(phase), begin(self, step, phase)))
    times = []
    for name, stop_at in parts:
        one, own = Roles(stop_at, signal.SIGTERM, 0.0), asked[name]
        remember(one, own)
        code, _ = run(config(tmp_path / name, *SETTINGS, *options), roles=one, task=task)
        assert (code == 0) == (stop_at is None)
        times.append(one.calls.count("evaluating"))
    assert asked["whole"] == asked["stopped"]
    assert phases[:5] == ["start", "generate", "other", "evaluate", "other"]
    assert times[0] == 1 + 2 + 3  # for the options, test images before and after, validation images
    training = {text for prompt_id, text in asked["whole"].items() if prompt_id.startswith("train/")}
    assert len(training) > 1 and all(sum(name in text for name in three) == 2 for text in training)
    assert all(name in asked["whole"][f"test/{STEPS}/0"] for name in three)


def test_another_data_set_is_asked_about_before_and_after_and_not_twice(tmp_path, capsys):
    others = [LabelledImage(f"bird {colour}", picture(colour), "wren") for colour in COLOURS[:3]]
    birds = FewShotDataset.of("birds", ["wren", "finch"], others[:1], [], others[1:], [])
    task = replace(TASK, also=Task(birds, Question("Which bird?")))
    settings = config(tmp_path, *SETTINGS)
    code, _ = run(settings, task=task, stop_at=("generating", 1), number=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and run(settings, task=task)[0] == 0
    for step in (0, STEPS):
        found = read_answers(settings.run_folder, step, "also")
        assert [one.example_id for one in found] == ["bird yellow", "bird blue"]
        assert [one.strict for one in found] == [i < RIGHT[step] for i in range(2)]
    asked = [step for step in range(STEPS + 1) if read_answers(settings.run_folder, step, "also")]
    assert asked == [0, STEPS] and capsys.readouterr().out.count("also birds: accuracy 0.0 % (95 %") == 1
    assert "also" not in (settings.run_folder / "eval.jsonl").read_text()
    assert read_manifest(settings.run_folder / "manifest-also.json")["classes"] == ["wren", "finch"]
    said = change(*(read_answers(settings.run_folder, step, "also") for step in (0, STEPS)))
    assert said == elsewhere(read_history(settings.run_folder)).replace("On", "on", 1)
    assert "was 0.0 % before training and is 50.0 % after" in said and "+50.0 points" in said
    # With a warm start the untouched model is that before the warm start.
    record = WarmStart(steps=4, kept=True, validation=(0.0, 0.5), images=2)
    write_json(settings.run_folder / WARM_START_FILE, record.model_dump(mode="json"))
    assert elsewhere(read_history(settings.run_folder)) == ""
    (settings.run_folder / WARM_START / "evaluations").mkdir(parents=True)
    write_answers(settings.run_folder / WARM_START, 0, "also", read_answers(settings.run_folder, STEPS, "also"))
    assert "was 50.0 % before training" in elsewhere(read_history(settings.run_folder))


class Scarce(Roles):
    """The first of a step's two groups is live, none of its first further round, and the first of the second. `dies`:
    the step in whose update the process ends."""

    dies: int | None = None

    def _rollout(self, prompts):
        groups, _ = super()._rollout(prompts)
        right, wrong = (Reward(1 + one, {"format": 1.0, "accuracy": one}, {}) for one in (1.0, 0.0))
        live = [group.prompt.prompt_id.rpartition("/")[2] in ("0", "4") for group in groups]
        return groups, [[right, wrong if one else right] for one in live]

    def _learn(self, at):
        if at + 1 == self.dies:
            raise RuntimeError("an actor died")
        return super()._learn(at)


@pytest.mark.parametrize("staleness", [0, 1])
def test_further_prompts_are_asked_while_few_groups_are_live_and_not_again_after_a_crash(tmp_path, staleness):
    few = ("schedule.min_live=1", f"schedule.max_staleness={staleness}", "sampling.group_size=2")
    settings, roles = config(tmp_path, *SETTINGS, *few), Scarce(None, 0, 0.0)
    roles.dies = 4
    with pytest.raises(RuntimeError, match="an actor died"):
        run(settings, roles=roles)
    code, roles = run(settings, roles=Scarce(None, 0, 0.0))
    assert code == 0 and roles.calls.count("generating") == 3 * (STEPS - 4)  # three rounds a step
    for step in range(STEPS):
        rows = read_history(settings.run_folder).rollouts(step + 1)
        assert [row["prompt_id"] for row in rows] == [f"train/{step}/{index}" for index in range(6)]
        assert [any(row["advantages"]) for row in rows] == [True, False, False, False, True, False]
    assert [row["groups"] for row in read_history(settings.run_folder).steps] == [6] * STEPS

    def said() -> dict[str, tuple[str, ...]]:
        ledger = make_ledger(settings.run_folder)
        return {check.name: check.problems for check in ledger.checks if check.name in ("prompts", "rollouts")}

    assert said() == {"prompts": (), "rollouts": ()}
    record = settings.run_folder / "config.yaml"
    record.write_text(record.read_text().replace("min_live: 1.0", "min_live: 0.5"))
    assert said()["prompts"][0] == "step 1: further prompts were asked after 2 groups, which had enough live ones"
    record.write_text(record.read_text().replace("min_live: 0.5", "min_live: 0.0"))
    assert said()["rollouts"][0].endswith("has 6 groups, and schedule.prompts_per_step is 2")


def finished(folder: Path) -> Path:
    """The folder of a run that is done, with baselines."""
    settings = config(folder, *SETTINGS)
    assert run(settings)[0] == 0
    (settings.run_folder / "baselines.json").write_text('{"nearest_neighbour": 0.5}')
    return settings.run_folder


def left(folder: Path) -> dict[str, object]:
    """The records and weights that must not depend on where a run was stopped."""
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".old") or path.name == ".lock"]
    metrics = [{name: row[name] for name in ("step", "reward")} for row in read_rows(folder / "metrics.jsonl")]
    return {
        "metrics": metrics,
        "evaluations": read_rows(folder / "eval.jsonl"),
        **{
            f"{name}/": {path.name: path.read_text() for path in sorted((folder / name).iterdir())}
            for name in ("rollouts", "evaluations")
        },
        "models": {name: (folder / name / "weights").read_text() for name in ("model", "model-best")},
        "cards": {name: (folder / name / "classifier.json").read_text() for name in ("model", "model-best")},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, object], list[str]]:
    settings = config(tmp_path_factory.mktemp("whole"), *SETTINGS, "schedule.save_every=2")
    code, roles = run(settings)
    assert code == 0
    return left(settings.run_folder), roles.calls


def test_a_run_saves_before_it_evaluates_and_keeps_the_best(undisturbed):
    found, calls = undisturbed
    assert [row["step"] for row in found["metrics"]] == list(range(1, STEPS + 1))
    evaluations = [(row["step"], row["split"]) for row in found["evaluations"]]
    assert evaluations == [(0, "test"), (2, "validation"), (4, "validation"), (6, "validation"), (6, "test")]
    assert found["models"] == {"model": "6", "model-best": "2"}  # RIGHT: 1, 1, 1 of 2: the first of equals
    last = len(calls) - calls[::-1].index("writing")
    assert calls[last:] == ["evaluating", "evaluating", "exporting"]


def test_a_record_has_what_each_completion_taught(undisturbed):
    """What a stopped, crashed or replayed run must record in the same way: the tests below compare these texts."""
    for text in undisturbed[0]["rollouts/"].values():
        for row in map(json.loads, text.splitlines()):
            assert row["advantages"] == pytest.approx([0.707, -0.707], abs=1e-3)
            assert row["logprob_gaps"] == [abs(advantage) / 8 for advantage in row["advantages"]]
            assert (row["tokens"], row["finish_reasons"]) == ([2, 2], ["stop", "stop"])


@pytest.mark.parametrize(
    ("number", "save_every"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)], ids=["every two steps", "by the clock"]
)
def test_stopped_in_any_call_of_any_step_it_ends_as_if_it_had_not_been(
    tmp_path, undisturbed, capsys, number, save_every
):
    expected, calls = undisturbed
    for name in sorted(set(calls)):
        for count in range(1, calls.count(name) + 1):
            settings = config(tmp_path / f"{name}-{count}", *SETTINGS, f"schedule.save_every={save_every}")
            code, roles = run(settings, resume=False, stop_at=(name, count), number=number)
            if code == 0:  # by the clock fewer are saved
                assert name in ("saving", "writing") and save_every == 0
                continue
            assert code == 128 + number
            error = capsys.readouterr().err
            done = len(read_rows(settings.run_folder / "metrics.jsonl"))
            assert roles.between, "a step that was begun was finished"
            saved = f"step {done} is saved" if done else "no step was saved yet"  # no whole step is lost
            assert error == f"interrupted: {saved}; go on with: launch --resume\n"
            code, roles = run(settings)
            assert code == 0
            assert roles.calls.count("learning") == STEPS - done, "nothing is learned twice"
            assert left(settings.run_folder) == expected
            assert not list(settings.run_folder.glob("redone-*"))


@pytest.mark.parametrize(
    ("where", "call", "then"),
    [
        ("generating", 4, ["saving", "learning"]),  # of step 4: step 3 is saved before the update
        ("evaluating", 3, ["saving"]),
        ("learning", 4, ["transferring", "saving"]),  # half of step 4 is never saved
    ],
)
def test_a_notice_is_heeded_while_the_loop_waits(tmp_path, capsys, where, call, then):
    class Leaving(Roles):
        def _called(self, name):
            super()._called(name)
            if (name, self.calls.count(name)) == (where, call):
                self.leaving = "10.0.0.3 (learner-1) was told to leave within 28 s"
                self.told = len(self.calls)

    code, roles = run(config(tmp_path, *SETTINGS, "schedule.save_every=99"), resume=False, roles=Leaving(None, 0, 0.0))
    assert code == 0
    assert "10.0.0.3 (learner-1) was told to leave within 28 s: saving step" in capsys.readouterr().out
    own = [name for name in roles.calls[roles.told :] if name in {"saving", "learning", "transferring"}]
    assert own[: len(then)] == then


def test_weights_that_are_not_finite_are_never_sent_saved_or_exported(tmp_path, monkeypatch, capsys):
    class Spoilt(Roles):
        def start_update(self, samples, step):
            learned = LearnerStats(learning_rate=0.5, finite_weights=step != 3)
            monkeypatch.setattr(handles, "wait_for", lambda *_: [super(Spoilt, self)._learn(step) and learned])
            return Update({"call": "learner"}, 1.0, step)

    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2")
    code, roles = run(settings, resume=False, roles=Spoilt(None, 0, 0.0))
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: step 4, with a learning rate of 0.5, made weights that are infinite")
    assert error.count("\n") == 1
    assert roles.calls[-1] == "learning"
    assert sorted(path.name for path in (settings.run_folder / "checkpoints").iterdir()) == ["step-000002"]
    assert not (settings.run_folder / "model").exists()
    assert [row["step"] for row in read_rows(settings.run_folder / "metrics.jsonl")] == [1, 2, 3]


def test_the_completions_are_journalled_while_the_learners_work(tmp_path):
    settings = config(tmp_path, *SETTINGS, "schedule.steps=1")
    run_folder, learning = RunFolder(settings, TASK, 0, "nothing"), []

    class Watching(Roles):
        def _learn(self, step):
            learning.append(sorted(path.name for path in (settings.run_folder / "journal").iterdir()))
            return super()._learn(step)

    train(settings, TASK, Watching(None, 0, 0.0), run_folder)
    assert learning == [["step-000001.jsonl"]]


def test_a_step_that_takes_long_is_not_waited_for(tmp_path, monkeypatch, undisturbed, capsys):
    monkeypatch.setattr(stopping, "WHOLE", 0.05)
    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2")
    stopped = run(settings, stop_at=("learning", 4), number=signal.SIGTERM, seconds=5)
    assert stopped[0] == 143
    assert not stopped[1].between
    assert "interrupted: step 2 is saved" in capsys.readouterr().err  # what the learners hold is no step's
    assert run(settings)[0] == 0
    assert left(settings.run_folder) == undisturbed[0]
    (aside,) = settings.run_folder.glob("redone-*")
    assert [row["step"] for row in read_rows(aside / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("save_every", [2, 100])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_after_a_crash_no_step_that_was_journalled_is_generated_again(
    tmp_path, undisturbed, step, save_every, staleness
):
    """A learner that dies in the update takes the driver with it: nothing is saved then, as after SIGKILL."""
    settings = config(tmp_path, *SETTINGS, f"schedule.save_every={save_every}", f"schedule.max_staleness={staleness}")

    class Dies(Roles):
        def _learn(self, at):
            if at + 1 == step:
                raise RuntimeError("an actor died")
            return super()._learn(at)

    with pytest.raises(RuntimeError, match="an actor died"):
        run(settings, roles=Dies(None, 0, 0.0))
    code, roles = run(settings)
    assert code == 0
    assert roles.calls.count("generating") == roles.calls.count("asking") == STEPS - step
    saved = (step - 1) // save_every * save_every
    assert roles.calls.count("learning") == STEPS - saved
    found = left(settings.run_folder)
    if not staleness:  # else the versions in `rollouts` differ
        assert found == undisturbed[0] | {"evaluations": found["evaluations"]}
    assert found["models"] == undisturbed[0]["models"]
    files = sorted(file.name for file in (settings.run_folder / "journal").iterdir())
    oldest = {2: STEPS - 2, 100: STEPS}[save_every]
    assert files == [f"step-{number:06d}.jsonl" for number in range(oldest + 1, STEPS + 1)]


def test_a_sink_of_the_user_s_gets_no_step_twice_from_the_journal(tmp_path, monkeypatch):
    """Also not where the journal is ahead: killed in a step that is done again."""
    settings, told = config(tmp_path, *SETTINGS, "schedule.save_every=100"), []
    monkeypatch.setattr("rft_cluster.run.folder.own_sinks", lambda _: [told.append])

    class Dies(Roles):
        def _learn(self, at):
            if at + 1 == self.dies_at:
                raise RuntimeError("an actor died")
            return super()._learn(at)

    for dies_at in (5, 2, 0):
        roles = Dies(None, 0, 0.0)
        roles.dies_at = dies_at
        with pytest.raises(RuntimeError, match="an actor died") if dies_at else nullcontext():
            run(settings, roles=roles)
    assert [(stats.step, stats.replayed) for stats in told] == [
        *((step, False) for step in (1, 2, 3, 4)),
        (5, True),  # it was journalled, and no sink had it
        (6, False),
    ]
    rows = read_rows(settings.run_folder / "metrics.jsonl")
    assert [row["replayed"] for row in rows] == [True] * 5 + [False]
    assert ["tokens_per_second" in row for row in rows] == [False] * 5 + [True]


class Reporting(Tracker):
    def finish(self) -> None: ...


class Failing(Roles):
    """Learners that fail once in each of some steps. `restore_checkpoint` as the real ones."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__(None, 0, 0.0)
        self._failures = failures

    def restore_checkpoint(self, folder: Path, updates: int, step: int) -> None:
        assert updates == step
        self.steps = step

    def restart_learners(self, error: ClusterError) -> None:
        raise error

    def doing(self) -> dict[str, str]:
        return {"learner-0": "idle"}

    def _learn(self, at):
        if error := self._failures.pop(at + 1, None):
            raise error
        return super()._learn(at)


def launched(
    settings: Config, monkeypatch, failures: dict[int, Exception], room: int = 1000, before: Any = nullcontext
) -> list[Roles]:
    """The roles of each start of the actors in one launch, in which learners fail in these steps, once each.

    `room`: for so many starts. `before`: a context around each.
    """
    started: list[Roles] = []

    @contextmanager
    def start_cluster(*_):
        if len(started) == room:
            raise NoRoom("the run needs 3 CPUs, the cluster has 2")
        with before(None):
            started.append(Failing(failures))
            yield started[-1]

    monkeypatch.setattr("rft_cluster.training.start_cluster", start_cluster)
    monkeypatch.setattr("rft_cluster.run.task.base_model_path", lambda *_: "nothing")
    monkeypatch.setattr("rft_cluster.run.restarts.time.sleep", lambda _: None)
    monkeypatch.setattr("rft_cluster.comparison.compare", lambda *_: None)
    monkeypatch.setattr("rft_cluster.cluster.metrics.RunMetrics.exported", lambda *_: nullcontext())
    beside = Reporting()
    monkeypatch.setattr("rft_cluster.run.reporting.Reports", lambda _: nullcontext(beside))
    monkeypatch.setattr("rft_cluster.run.thumbnails.keep_thumbnails", lambda *_: None)
    launch._run(settings, TASK, Start(), SimpleNamespace(write_to=lambda _: None), ["launch"])
    return started


@pytest.mark.parametrize("kind", [ClusterError, WeightTransferError])
def test_losses_do_not_end_a_run_and_change_nothing(tmp_path, monkeypatch, undisturbed, kind):
    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2", "cluster.restarts=1")
    started = launched(settings, monkeypatch, {1: kind("lost"), 4: kind("lost"), 5: kind("lost")})
    assert [roles.calls.count("generating") for roles in started] == [1, 3, 1, 1], "nothing is generated twice"
    assert [roles.calls.count("learning") for roles in started] == [0, 3, 2, 2], "from step 0, 2 and 4"
    assert left(settings.run_folder) == undisturbed[0]


@pytest.mark.parametrize("kind", [ClusterError, WeightTransferError])
def test_a_loss_without_a_new_step_ends_it_when_the_restarts_are_used_up(tmp_path, monkeypatch, capsys, kind):
    class Always(dict):
        def pop(self, step, default):
            return kind("lost") if step == 3 else None

    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2", "cluster.restarts=2")

    def work() -> None:
        try:
            launched(settings, monkeypatch, Always())
        except RuntimeError as error:
            raise_with_cure(error, settings.run_folder, ["launch"])
            raise

    assert exit_code(work) == 3
    assert capsys.readouterr().err == "error: lost\nstep 2 is saved; go on with: launch --resume\n"
    assert [row["step"] for row in read_rows(settings.run_folder / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("room", "code"), [(0, 2), (1, 3)], ids=["at the start", "after a loss"])
def test_a_cluster_without_room_is_a_mistake_at_the_start_and_a_loss_later(tmp_path, monkeypatch, capsys, room, code):
    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2")
    assert exit_code(lambda: launched(settings, monkeypatch, {4: ClusterError("lost")}, room)) == code
    error = capsys.readouterr().err
    assert error.endswith("the run needs 3 CPUs, the cluster has 2\n") and error.count("\n") == 1


@pytest.mark.parametrize(("good", "code"), [(0, 2), (1, 3)], ids=["at the start", "after a loss"])
def test_a_start_that_is_refused_is_a_mistake_at_first_and_a_loss_later(tmp_path, monkeypatch, capsys, good, code):
    """A node that comes in a lost one's place may lack a GPU, or the shared disk."""
    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2", "cluster.restarts=2")
    started = iter(range(10))

    @contextmanager
    def check_gpus(_):
        if next(started) >= good:
            raise UserError("10.0.0.2 has a GPU that does not answer")
        yield

    again = exit_code(lambda: launched(settings, monkeypatch, {4: ClusterError("lost")}, before=check_gpus))
    error = capsys.readouterr().err
    assert again == code and error.endswith("10.0.0.2 has a GPU that does not answer\n"), error
    assert next(started) == (1 if code == 2 else 3), "tried again as often as may be"


@pytest.mark.parametrize("error", [UserError("out of memory"), RuntimeError("a defect")])
def test_what_would_happen_again_is_not_tried_again(tmp_path, monkeypatch, error):
    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2")
    with pytest.raises(type(error)):
        launched(settings, monkeypatch, {2: error})


def test_a_run_that_is_resumed_with_more_steps_goes_on(tmp_path, undisturbed):
    settings = config(tmp_path, *SETTINGS, "schedule.save_every=2")
    short = config(tmp_path, *SETTINGS, "schedule.save_every=2", "schedule.steps=4")
    assert run(short)[0] == 0
    code, roles = run(settings)
    assert (code, roles.calls.count("learning")) == (0, 2)
    found = left(settings.run_folder)
    assert [row["step"] for row in found["metrics"]] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found["evaluations"] if row["split"] == "test"] == [0, 4, 6]  # nothing is lost
    assert found["models"]["model"] == "6"
