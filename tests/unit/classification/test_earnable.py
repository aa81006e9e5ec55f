"""Questions as people write them, held against the rewards: built from parts, each with what it must lead to."""

import itertools
import re

import pytest

from rft_cluster.classification.earnable import check_room, obedient, tags_shown
from rft_cluster.classification.redteam import check_rewards
from rft_cluster.common.errors import UserError
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Example, ImageRef
from rft_cluster.prompts import Question, render_template
from rft_cluster.rewards.scorer import WeightedRewards

ROSE = Example(ImageRef("rose/a.jpg", "0" * 64), "rose")
IMAGES = {ROSE.image.sha256: b"a rose"}
CLASSES = ["rose", "tulip", "daisy"]
BOTH, ACCURACY = {"format": 1.0, "accuracy": 1.0}, {"accuracy": 1.0}


def tried(question: str, weights: dict[str, float] = BOTH, how: str = "refuse") -> str:
    scoring = ScoringSection(red_team=how)
    return check_rewards(WeightedRewards(weights, scoring), scoring, CLASSES, [ROSE], IMAGES, Question(question), 0)


INSIDE = ["", " ", " ... ", "...", "\u2026", "\n...\n", "label", "[the name ...]", "{name}", "species name"]
THINKING = [
    "",
    "<think> </think> ",
    "<think>...</think>",
    "<think>\n...\n</think>\n",
    "Think in <think> </think>, say ",
]


@pytest.mark.parametrize("think", THINKING)
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("place", ["Which flower?\n{}", "Which flower? Write {} and <b>nothing</b> else.", "{}"])
def test_a_question_that_shows_the_layout_passes_without_a_word(think, inside, place):
    question = place.format(f"{think}<answer>{inside}</answer>")
    for weights in (BOTH, ACCURACY):
        said = tried(question, weights)
        assert "cannot be" not in said and "question" not in said


@pytest.mark.parametrize(
    "words",
    ["Answer in <answer> tags.", "Use <think> and <answer> tags.", "<think> first, then <answer>", "<answer>: name"],
)
def test_tags_may_be_named_without_their_ends(words):
    for weights in (BOTH, ACCURACY):
        assert "cannot be" not in tried(f"Which flower? {words}", weights)


OTHER_TAGS = ["ANSWER", "Answer", "final_answer", "answers", "ans", "solution", "output", "class", "flower"]
NO_TAGS = [
    *(r"Put it in \boxed{}.", r"Final answer: $\boxed{...}$", "Just say it.", 'Reply in JSON: {"answer": "..."}'),
    *("**Answer:** ...", "[answer] ... [/answer]", "&lt;answer&gt; ... &lt;/answer&gt;", "\uff1canswer\uff1e ..."),
    *("Begin with <ANSWER>", r"<think>...</think> \boxed{...}", r"<answer>\boxed{}</answer>", "```answer```"),
    *('<answer>{"class": "..."}</answer>', "<answer>{'class': '...'}</answer>", "< answer >...</ answer >"),
]
UNEARNED = [
    *("<{0}> </{0}>".replace("{0}", name) for name in OTHER_TAGS),
    *("<think> ... </think>\n<{0}> ... </{0}>".replace("{0}", name) for name in OTHER_TAGS),
    *NO_TAGS,
]


@pytest.mark.parametrize("shown", UNEARNED)
def test_a_question_by_which_nothing_can_be_earned_is_refused_and_its_cures_work(shown):
    question = f"Which flower does the image show? {shown}"
    for weights in (BOTH, ACCURACY):
        with pytest.raises(UserError, match="no answer that follows the question can be rewarded") as refused:
            tried(question, weights)
    message = str(refused.value)
    assert re.search(r"For instance .*rose|For instance .*tulip|For instance .*daisy", message)
    assert "can be rewarded" in tried(question, how="warn")
    assert tried(question, how="off") == ""
    # Its cures: what to change, and a template.
    if "add this line" in message:
        fixed = f"{question}\n" + re.findall(r"^  (<answer>.*)$", message, re.MULTILINE)[0]
    elif "hold the name alone" in message:
        fixed = re.sub("<answer>.*</answer>", re.findall(r"^  (<answer>.*)$", message, re.MULTILINE)[0], question)
    else:
        ((opening, closing),) = re.findall(r"in place of (<[^>]*>) and (.*)$", message, re.MULTILINE)
        fixed = question.replace(opening, "<answer>").replace(closing, "</answer>")
    for weights in (BOTH, ACCURACY):
        assert "cannot be" not in tried(fixed, weights)
    (name,) = re.findall(r"prompt\.template=(\w+)", message)
    assert "cannot be" not in tried(render_template(name, "flower", CLASSES))


@pytest.mark.parametrize("name", OTHER_TAGS)
def test_the_tags_that_are_shown_in_place_of_answer_are_named(name):
    with pytest.raises(UserError, match=f"shows no <answer> tag, but <{name}> </{name}>, and"):
        tried(f"Which? <{name}> </{name}>")


@pytest.mark.parametrize("extra", ["reasoning", "scratchpad", "Thought", "confidence", "caption"])
@pytest.mark.parametrize("between", ["", "\n", " "])
@pytest.mark.parametrize("inside", ["", "\n...\n", "..."])
def test_tags_that_format_does_not_know_are_noted(extra, between, inside):
    question = f"Which flower?\n<{extra}>{inside}</{extra}>{between}<answer>{inside}</answer>"
    said = tried(question)
    assert f"rewards.format cannot be earned by following the question: the question shows <{extra}>" in said
    assert "gets format 0.00, accuracy 1.00" in said
    assert "cannot be" not in tried(question, ACCURACY)


@pytest.mark.parametrize("template", ["think_answer", "answer_only", "closed", "with_labels", "weak"])
def test_the_templates_that_come_along(template):
    question = render_template(template, "flower", CLASSES)
    if template == "weak":  # which is there to show that
        with pytest.raises(UserError, match=r"shows no <answer> tag, and the rewards read"):
            tried(question)
    else:
        assert "cannot be" not in tried(question)


def test_a_reward_that_needs_no_tags_is_earned_without():
    said = tried("Which flower?", {"format": 1.0, "own_rewards:contained": 1.0}, how="warn")
    assert "can be rewarded" not in said and "rewards.format cannot be earned" in said


def test_obedience_by_hand():
    question = "Reason in <Reasoning> </Reasoning>.\n<Reasoning>\n...\n</Reasoning>\n<final>\\boxed{...}</final>"
    reason = "<Reasoning>This is what the image shows.</Reasoning>"
    assert obedient(question, "rose") == [rf"{reason}<final>\boxed{{rose}}</final>"]
    assert tags_shown(question) == [("<Reasoning>", "</Reasoning>"), ("<final>", "</final>")]
    assert obedient("Which?", "rose") == ["rose"]
    # Two readings: all that it shows, or the example alone.
    both = obedient("Which? <ANSWER></ANSWER>\n<answer> ... </answer>", "rose")
    assert both == ["<ANSWER>rose</ANSWER><answer>This is what the image shows.</answer>", "<answer>rose</answer>"]


# --- room for an answer


def words(text: str) -> int:
    """A tokenizer of one token a tag and one a letter."""
    return len(re.findall(r"</?\w+>|[^<>]", text))


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("weights", [("format", "accuracy"), ("accuracy",), ("format",)])
@pytest.mark.parametrize("labels", [["rose"], ["rose", "hard-leaved pocket orchid"], ["a", "bc", "def"]])
def test_room_for_right_answers_by_hand(think, weights, labels):
    question = "<think> </think> <answer> </answer>" if think else "<answer> </answer>"
    tags = 2 + 2 * (think and "format" in weights)
    needed = [tags + len(label) + 1 for label in labels]
    for limit in range(1, 2 * max(needed)):
        arguments = (labels, {}, weights, question, limit, words)
        if limit < min(needed):
            with pytest.raises(
                UserError, match=rf"max_tokens is {limit}, but the shortest .* has {min(needed)} tokens"
            ) as at:
                check_room(*arguments)
            (cure,) = re.findall(r"Set sampling\.max_tokens to (\d+) at least", str(at.value))
            check_room(labels, {}, weights, question, int(cure), words)
        elif limit < max(needed):
            (note,) = check_room(*arguments)
            long = [label for label, tokens in zip(labels, needed, strict=True) if tokens > limit]
            assert f"right answers of {', '.join(long)} are longer" in note
        elif tags == 4 and limit < 1.5 * max(needed):
            (note,) = check_room(*arguments)
            assert f"leaves {limit - max(needed)} for reasoning" in note
        else:
            assert check_room(*arguments) == []


def test_an_alias_may_be_what_fits():
    question, labels = "<answer> </answer>", ["orchid of the meadow", "rose"]
    assert check_room(labels, {labels[0]: ("oom",)}, ["accuracy"], question, 7, words) == []
    assert check_room(labels, {labels[0]: ("a longer one than that",)}, ["accuracy"], question, 7, words) != []


def test_of_rewards_of_ones_own_nothing_is_known():
    for names, limit in itertools.product((["mine:f"], ["containment"]), (1, 100)):
        assert check_room(CLASSES, {}, names, "Which?", limit, words) == []
