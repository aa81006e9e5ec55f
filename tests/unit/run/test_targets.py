"""What supervised fine-tuning teaches: answers that earn every reward, in the tokens that an encoder makes of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage, check_names
from rft_cluster.messages import Completion, Reward, Sampling
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.prompts import Question, asks_for_thinking, draw_prompts, make_question, render_template
from rft_cluster.rewards import REWARDS
from rft_cluster.run import preflight
from rft_cluster.run.targets import Targets, check_targets, read_targets, target_text, target_tokens
from rft_cluster.run.task import Task, ask_model, check_model
from tests.unit.model.chat_templates import INSTRUCT, THINKING
from tests.unit.run.begun import DATASET, EXAMPLES, picture
from tests.unit.some_prompt import some_prompt

SFT = ("algorithm.objective=sft", "algorithm.kl_beta=0")
LABELS = ["rose", "tulip"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path, family = tmp_path_factory.mktemp("processor"), FAMILIES["qwen2_vl"]
    processor = build_processor(LABELS, ["group-00"], "Which?", 56 * 56, family)
    processor.save_pretrained(path)
    build_model(processor.tokenizer, family).config.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def encoder(folder) -> PromptEncoder:
    return PromptEncoder(folder, load_config("digits", []).model)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("think_answer", "<think></think><answer>rose</answer>"),
        ("with_labels", "<think></think><answer>rose</answer>"),
        ("answer_only", "<answer>rose</answer>"),
        ("closed", "<answer>rose</answer>"),
        ("weak", "rose"),
    ],
)
def test_the_target_of_each_built_in_template(template, text):
    question = render_template(template, "flower", LABELS)
    assert target_text(question, "rose") == text
    if template != "weak":  # whose answers no reward can read
        earned = [one(some_prompt(text=question), Completion([], [], text, "stop", 0)) for one in REWARDS.values()]
        assert earned == [1.0] * len(REWARDS)


def test_a_target_goes_where_the_question_shows_a_box():
    question = "Think in <think></think>, then write <answer>\\boxed{...}</answer>."
    assert target_text(question, "rose") == "<think></think><answer>\\boxed{rose}</answer>"


@pytest.mark.parametrize("name", ["<NA>", "<label>", "<h1>", "<5 mm", "> 10 mm", "a < b", "</3"])
@pytest.mark.parametrize("template", ["closed", "with_labels"])
def test_a_class_that_is_listed_does_not_change_the_layout(template, name):
    check_names([*LABELS, name])  # of those that would, see the tests of the data
    question = render_template(template, "flower", [*LABELS, name])
    for label in (*LABELS, name):
        assert target_text(question, label).removeprefix("<think></think>") == f"<answer>{label}</answer>"
    assert asks_for_thinking(question) == (template == "with_labels")


def test_a_step_s_targets_are_there_at_once_with_the_prompts_that_engine_and_learner_see(encoder):
    prompts = draw_prompts(DATASET.train, make_question("closed", "flower", LABELS), "train", 3, seed=0)
    groups, rewards = Targets(encoder, DATASET.images).start(prompts, Sampling(8, 1.0, 16), version=3).wait()
    assert rewards == [[Reward(0.0, {})], [Reward(0.0, {})]]
    for group, prompt in zip(groups, prompts, strict=True):
        assert group.prompt == prompt
        assert group.prompt_token_ids == encoder.encode(prompt.text, DATASET.image(prompt.example)).token_ids
        (target,) = group.completions
        assert target.text == f"<answer>{prompt.label}</answer>"
        assert encoder.tokenizer.decode(target.token_ids) == f"{target.text}<|im_end|>"
        assert (target.generator_logprobs, target.finish_reason, target.policy_version) == ([], "stop", 3)


@pytest.mark.parametrize(("template", "taught"), [(INSTRUCT, "<think></think>"), (THINKING, "</think>")])
def test_what_the_chat_template_has_written_is_not_taught_again(encoder, tmp_path, folder, template, taught):
    other = PromptEncoder(folder, load_config("digits", []).model)
    other._processor.chat_template = template
    other.opening = other._opening(folder)
    tokens = target_tokens(other, "<think></think><answer>rose</answer>")
    assert other.tokenizer.decode(tokens) == f"{taught}<answer>rose</answer><|im_end|>"


def test_a_target_that_an_evaluation_would_cut_is_refused(encoder):
    question = render_template("think_answer", "flower", LABELS)
    line = check_targets(load_config("digits", [*SFT, "sampling.max_tokens=6"]), encoder, question, LABELS)
    assert line == "targets     <think></think><answer>rose</answer> (the longest, 6 tokens)"
    with pytest.raises(UserError, match=r"^sampling.max_tokens is 5, but .*<answer>rose</answer>, has 6 tokens"):
        check_targets(load_config("digits", [*SFT, "sampling.max_tokens=5"]), encoder, question, LABELS)


def test_only_a_run_of_sft_has_targets(folder):
    assert read_targets(load_config("digits", []), folder, {}) is None
    assert isinstance(read_targets(load_config("digits", [*SFT]), folder, {}), Targets)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.kl_beta=0.04", "algorithm: kl_beta is 0.04 but objective is sft"),
        ("schedule.max_staleness=1", "schedule.max_staleness is 1, but with algorithm.objective sft"),
    ],
)
def test_what_contradicts_sft_is_refused_in_one_line(override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config("digits", [*SFT, override])
    assert str(caught.value).count("\n") <= 1


def test_the_kl_of_sft_is_0_if_left_out(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("run: {name: a}\nmodel: {path: tiny}\ndata: {source: digits}\nalgorithm: {objective: sft}\n"
                    "schedule: {steps: 2, prompts_per_step: 2}\ncluster: {device: cpu}\n")  # fmt: skip
    found = load_config(str(file), [])
    assert (found.algorithm.kl_beta, found.completions, found.scored) == (0.0, 1, {})


# --- whose targets are checked before a run

THINKS = Task(DATASET, Question(render_template("think_answer", "flower", LABELS)))


def settings_of(tokens: int, *overrides: str) -> Config:
    """Rewards that ask for no think block, so that shorter answers than the targets have room."""
    own = load_config("digits", [f"sampling.max_tokens={tokens}", "model.max_prompt_tokens=256", *overrides])
    return own.model_copy(update={"rewards": {"accuracy": 1.0}})


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (SFT, "runs/digits"),
        (["schedule.warm_start={steps: 2}"], "runs/digits/warm_start"),
        (["baselines=[sft]"], "runs/digits/baselines/sft"),
    ],
)
def test_the_targets_of_every_run_inside_are_checked_before_anything_starts(folder, overrides, where):
    message = rf"^sampling.max_tokens is 5, but the answer that SFT is to teach in {where}, <think></think>.* 6 tokens"
    with pytest.raises(UserError, match=message):
        ask_model(settings_of(5, *overrides), THINKS, folder, DATASET.train)
    notes = ask_model(settings_of(6, *overrides), THINKS, folder, DATASET.train).notes
    assert notes[-1] == "targets     <think></think><answer>rose</answer> (the longest, 6 tokens)"
    assert not any("targets" in note for note in ask_model(settings_of(5), THINKS, folder, DATASET.train).notes)


def test_what_is_only_asked_has_no_targets(folder, monkeypatch):
    settings = settings_of(6, *SFT)
    shots = [EXAMPLES[0], LabelledImage("c", picture("blue"), "rose rose tulip")]
    longer = FewShotDataset.of("birds", [one.label for one in shots], shots, [], shots, [])
    also = Task(longer, Question(render_template("think_answer", "bird", longer.classes)))
    with pytest.raises(UserError, match="SFT is to teach"):
        ask_model(settings, also, folder, longer.test)
    asked = preflight._asked(settings, replace(THINKS, also=also), folder, training=True)
    assert sum("targets" in note for note in asked.notes) == 1, "those of the run's own classes"
    monkeypatch.setattr("rft_cluster.model.hub.find_model", lambda path: SimpleNamespace(folder=path))
    monkeypatch.setattr("rft_cluster.model.hub.check_files", lambda *_: 0)
    check_model(settings, also, folder, longer.test)  # an evaluation


def test_an_unseen_class_has_no_target(folder):
    unseen = LabelledImage("c", picture("blue"), "rose rose tulip")
    dataset = FewShotDataset.of("photos", [*LABELS, unseen.label], EXAMPLES, [], [unseen], [])
    assert dataset.unseen == (unseen.label,)
    notes = ask_model(settings_of(6, *SFT), replace(THINKS, dataset=dataset), folder, dataset.train).notes
    assert "<answer>rose</answer> (the longest, 6 tokens)" in notes[-1]


def test_an_evaluation_needs_room_for_the_label_alone(folder):
    """It does not know the run's rewards, and whatever they are, it counts right labels."""
    settings = load_config("digits", ["sampling.max_tokens=5", "model.max_prompt_tokens=256"])
    with pytest.raises(UserError, match=r"the shortest right answer, <think></think>.* has 6 tokens"):
        ask_model(settings, THINKS, folder, DATASET.train)
    assert ask_model(settings, THINKS, folder, DATASET.train, training=False).lengths
