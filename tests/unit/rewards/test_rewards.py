import sys
from contextlib import closing
from random import Random

import pytest
from some_prompt import some_prompt

from rft_cluster.common.errors import UserError
from rft_cluster.common.labels import extract_answer, normalise_label
from rft_cluster.config import ScoringSection
from rft_cluster.messages import Completion, Prompt
from rft_cluster.prompts import render_template
from rft_cluster.rewards import check_names, isolation
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.format import format_reward
from rft_cluster.rewards.scorer import WeightedRewards


def prompt(label: str, *aliases: str, text: str = "Which flower?") -> Prompt:
    return some_prompt("train/0/0", "photos/a.png", b"", text, label, 0, aliases)


def completion(text: str) -> Completion:
    return Completion([1], [-0.1], text, "stop", 0)


def accuracy(text: str, label: str) -> float:
    return accuracy_reward(prompt(label), completion(text))


def of_format(text: str) -> float:
    return format_reward(prompt("rose"), completion(text))


@pytest.mark.parametrize(
    "text",
    [
        "<think> red petals </think> <answer> rose </answer>",
        "<think>red petals</think><answer>rose</answer>",
        "<think>\nred\npetals\n</think>\n\n<answer>\nrose\n</answer>",
        "<think></think><answer></answer>",
        "<think>a < b, so <b>red</b></think><answer>rose</answer>",
    ],
)
def test_the_layout_gets_the_format_reward(text):
    assert of_format(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rose",
        "<answer>rose</answer>",
        "<think>red</think>",
        "<think>red</think> so <answer>rose</answer>",
        "It is: <think>red</think><answer>rose</answer>",
        "<think>red</think><answer>rose</answer>.",
        " <think>red</think><answer>rose</answer>",
        "<think>red</think><answer>rose</answer>\n",
        "<answer>rose</answer><think>red</think>",
        "<think>red</think><answer>rose",
        "<think>red</think><answer>rose</answer><answer>tulip</answer>",
        "<think>red</think><answer>rose<answer></answer>",
        "<think>red</think><answer>rose</answer></answer>",
        "<think>red</think><think>petals</think><answer>rose</answer>",
        "<think><think>red</think></think><answer>rose</answer>",
        "<think>red<answer>tulip</answer></think><answer>rose</answer>",
        "<think>red</think><answer><think>rose</answer>",
        "<THINK>red</THINK><answer>rose</answer>",
    ],
)
def test_everything_else_gets_none(text):
    assert of_format(text) == 0.0


ANSWER_ONLY = "Put it in <answer> </answer>."
BOTH = "Put it in <think> </think> and <answer> </answer>."


@pytest.mark.parametrize("question", ["Which flower?", BOTH])
def test_thinking_is_asked_for_unless_only_an_answer_is(question):
    for text, reward in (
        ("<think>red</think> <answer>rose</answer>", 1.0),
        ("<answer>rose</answer>", 0.0),
    ):
        assert format_reward(prompt("rose", text=question), completion(text)) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>rose</answer>", 1.0),
        ("<answer>\n rose \n</answer>", 1.0),
        ("<answer></answer>", 1.0),
        ("<think>red</think><answer>rose</answer>", 0.0),
        ("<answer><think>red</think>rose</answer>", 0.0),
        ("<answer>rose</think></answer>", 0.0),
        ("<answer>rose</answer> ", 0.0),
        ("It is <answer>rose</answer>", 0.0),
        ("<answer>rose</answer><answer>rose</answer>", 0.0),
        ("<answer>rose", 0.0),
        ("</answer>rose<answer>", 0.0),
        ("rose", 0.0),
        ("", 0.0),
    ],
)
def test_a_prompt_that_shows_an_answer_block_alone_wants_that_alone(text, reward):
    assert format_reward(prompt("rose", text=ANSWER_ONLY), completion(text)) == reward


@pytest.mark.parametrize("template", ["think_answer", "answer_only", "closed", "weak", "with_labels"])
def test_each_template_of_ours_gets_its_layout(template):
    text = render_template(template, "flower", ["rose", "tulip"])
    right = (
        "<answer>rose</answer>" if template in ("answer_only", "closed") else "<think>red</think><answer>rose</answer>"
    )
    assert format_reward(prompt("rose", text=text), completion(right)) == 1.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [("thorn apple", 1.0), ("Datura_", 1.0), ("jimson-weed", 1.0), ("datura, jimson weed", 0.0), ("", 0.0)],
)
def test_an_alias_is_as_right_as_the_label(answer, right):
    asked = prompt("thorn apple", "datura", "jimson weed")
    assert accuracy_reward(asked, completion(f"<think>hm</think><answer>{answer}</answer>")) == right


def test_an_alias_that_is_nothing_would_make_an_empty_answer_right():
    with pytest.raises(ValueError, match=r"label '--' of photos/a\.png has no letter"):
        accuracy_reward(prompt("rose", "--"), completion("<answer></answer>"))


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("rose", "rose"),
        (" Rose.\n", "rose"),
        ("hard leaved pocket orchid", "hard-leaved pocket orchid"),
        ("Hard-Leaved_Pocket  Orchid", "hard-leaved pocket orchid"),
        ("hard\u2011leaved pocket orchid", "hard-leaved pocket orchid"),  # a non-breaking hyphen
        ("colts foot", "colt's foot"),
        ("\nhard-leaved\npocket orchid\n", "hard-leaved pocket orchid"),
        ("STRASSE", "straße"),
        ("ｒｏｓｅ", "rose"),  # full-width letters
        ("cafe\u0301", "caf\u00e9"),  # an accent as a character of its own
        ("ro\u200bse", "rose"),  # a zero-width space
    ],
)
def test_the_right_answer_in_another_writing_is_right(answer, label):
    assert accuracy(f"<think>hm</think><answer>{answer}</answer>", label) == 1.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("", "rose"),  # right for every class by containment
        (" \n ", "rose"),
        ("-_.", "rose"),
        ("e", "rose"),  # right for 73 % of the flowers by containment
        ("rose, tulip, daisy", "rose"),
        ("rose tulip", "rose"),
        ("rose", "pink primrose"),
        ("pink primrose", "rose"),
        ("petunia", "mexican petunia"),
        ("mexican petunia", "petunia"),
        ("a rose", "rose"),
        ("cafe", "café"),
        ("C", "C++"),
    ],
)
def test_what_only_contains_or_resembles_the_label_is_wrong(answer, label):
    assert accuracy(f"<think>hm</think><answer>{answer}</answer>", label) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "rose",
        "<think>rose</think>",
        "<think>a rose or a tulip</think><answer>rose",  # open: the rest is not searched
        "<think>a rose</think><answer>tulip\nrose",
        "rose</answer>",
        "</answer>rose<answer>",
        "<answer>rose</answer><answer>tulip</answer>",
        "<answer>tulip</answer><answer>rose</answer>",
        "<answer>rose</answer><answer>rose</answer>",
        "<answer><answer>rose</answer></answer>",
        "<answer>rose</answer></answer>",
    ],
)
def test_no_single_answer_block_is_no_answer(text):
    assert extract_answer(text) is None
    assert accuracy(text, "rose") == 0.0


def test_the_answer_counts_without_the_layout():
    assert accuracy("It is <answer>rose</answer>.", "rose") == 1.0


def test_the_answer_is_extracted_untouched():
    assert extract_answer("<answer>\n hard-leaved\n orchid </answer>") == "\n hard-leaved\n orchid "


# Texts of which each means something else; what stands beside one another in a line differs in one sign alone.
NUMBERS = [
    *("0.5 mm", "5 mm", "15 mm", "1.5 mm", "1,5 mm", "1:5 mm", "1/5 mm", "1-5 mm"),
    *("1", "-1", "10", "1.0", "-10", "-1.0", "-0.1", "0.1", "+1"),
    *("10:30", "1030", "10.30", "2020-01-02", "20200102", "20-20-0102", "192.168.0.1", "192.16.80.1"),
    *("C", "C#", "C++", "C&", "C%", "B&C", "BC", "5", "5%", "5 \u2030", "#5", "temperature -1", "temperature 1"),
]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_with_another_sign_is_another_answer(number):
    right = [label for label in NUMBERS if accuracy(f"<answer>{number}</answer>", label)]
    assert right == [number]


WRITINGS = [
    "{}",
    " {}\n",
    "{}.",
    "**{}**",
    "`{}`",
    "'{}'",
    '"{}"',
    "({})",
    "\u201c{}\u201d",
    "_{}_",
    "[{}]",
    "{}!",
    "\u00ab{}\u00bb",
]


@pytest.mark.parametrize("writing", WRITINGS)
@pytest.mark.parametrize("label", [*NUMBERS, "rose", "hard-leaved pocket orchid", "F-16", "3-spined stickleback"])
def test_marks_around_an_answer_do_not_count(label, writing):
    assert accuracy(f"<answer>{writing.format(label)}</answer>", label) == 1.0


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("20 - 30", "20-30"),
        ("20\u201330", "20-30"),  # an en dash
        ("\uff11\uff0e\uff15", "1.5"),  # full width
        (".5", "0.5"),
        ("F 16", "F-16"),
        ("F16", "F-16"),
        ("3 spined stickleback", "3-spined stickleback"),
        ("001 black footed albatross", "001.Black_footed_Albatross"),
        ("No. 5", "no 5"),
        ("1/2", "\u00bd"),
    ],
)
def test_the_same_number_or_name_in_another_writing_is_right(answer, label):
    assert accuracy(f"<answer>{answer}</answer>", label) == 1.0


@pytest.mark.parametrize(
    "text", [*NUMBERS, "Hard-Leaved_Pocket Orchid", "ＳＴＲＡßE", "İ", "\u03aa\u0301", "C++", "5 -.5", "a - 1", "5--5"]
)
def test_normalising_twice_changes_nothing(text):
    assert normalise_label(normalise_label(text)) == normalise_label(text)


def test_normalising_random_texts_twice_changes_nothing():
    rng = Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("1a5 -.,:/#%&_`*'\u2013\u2212\u00b2\u00bd", k=rng.randint(1, 8)))
        assert normalise_label(normalise_label(text)) == normalise_label(text), text


def test_punctuation_alone_is_nothing():
    assert normalise_label(" -_.,;:!?'\"()\t\n\u00a0\u200b") == ""


@pytest.mark.parametrize("label", ["", "--", " "])
def test_a_label_that_is_nothing_is_no_label(label):
    with pytest.raises(ValueError, match="has no letter"):
        accuracy("<answer></answer>", label)


def test_names_and_paths_are_taken():
    check_names(["accuracy", "my_rewards:short", "format", "my.module.function"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", r"rewards: 'acuracy' is unknown. Did you mean accuracy\?"),
        ("my rewards:f", "'my rewards:f' is not a dotted path"),
        ("my.py:f", r"'my.py:f' names a file: name the module, as in an import. Did you mean my:f\?"),
        ("./rewards/my.py:f", r"Did you mean rewards.my:f\?"),
        ("rewards/my:f", r"Did you mean rewards.my:f\?"),
    ],
)
def test_a_name_that_can_be_none_is_refused_before_anything_is_imported(name, message):
    with pytest.raises(UserError, match=message):
        check_names([name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_rewards:brevty", r"has no function 'brevty'. Did you mean brevity\?"),
        ("nowhere.module:f", "^rewards: 'nowhere.module:f' cannot be found: there is no module 'nowhere'"),
        ("rft_cluster.nowhere:f", "no module 'rft_cluster.nowhere'"),
        ("broken_reward:f", "^rewards: 'broken_reward:f': broken_reward.py, line 1: ModuleNotFoundError"),
        ("ends:f", r"'ends:f': its import ends the process \(exit code 3\). It printed last:\n  no licence$"),
        ("mixed:f", r"^rewards: 'mixed:f' takes prompt, completions: a function of one completion takes \(prompt"),
    ],
)
def test_one_that_cannot_be_loaded_is_explained(tmp_path, monkeypatch, name, message):
    """Here nothing of it is imported: this process goes on, whatever the module does."""
    (tmp_path / "broken_reward.py").write_text("import no_such_dependency\n")
    (tmp_path / "ends.py").write_text("import os\nprint('no licence')\nos._exit(3)\n")
    (tmp_path / "mixed.py").write_text("def f(prompt, completions): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = WeightedRewards({name: 1.0}, ScoringSection(), quiet=True)
    with closing(rewards), pytest.raises(UserError, match=message):
        rewards.load()
    assert not {"broken_reward", "ends", "mixed"} & set(sys.modules)


def test_an_import_that_does_not_end_is_named_with_the_limit(tmp_path, monkeypatch, capsys):
    (tmp_path / "endless.py").write_text("while True: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(isolation, "LOADING_LINE", 0.2)
    rewards = WeightedRewards({"endless:f": 1.0}, ScoringSection(load_limit=0.5), quiet=True)
    message = r"^rewards: 'endless:f': its module was not imported within 0.5 s \(scoring\.load_limit\)$"
    with closing(rewards), pytest.raises(UserError, match=message):
        rewards.load()
    assert capsys.readouterr().out.startswith("waiting for the import of rewards.endless:f: 0 s of at most 0.5 s\n")
