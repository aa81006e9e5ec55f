"""What supervised fine-tuning teaches: answers that earn every reward, in the tokens that an encoder makes of them."""

import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.messages import Completion, Reward, Sampling
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.prompts import draw_prompts, make_question, render_template
from rft_cluster.rewards import REWARDS
from rft_cluster.run.targets import Targets, check_targets, read_targets, target_text, target_tokens
from tests.unit.model.chat_templates import INSTRUCT, THINKING
from tests.unit.run.begun import DATASET
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
