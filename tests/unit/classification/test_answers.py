import pytest

from rft_cluster.classification.answers import AnswerReader, reasoning
from rft_cluster.common.text import printable

READER = AnswerReader(["pink primrose", "rose"], {"rose": ["Rosa"]})


def say(answer: str, thought: str = "t") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (say("Pink-Primrose."), "pink primrose"),
        (say("rosa"), "rose"),
        (say("prim rose"), None),
        (say(""), None),
        ("rose", None),
        (say("rose") + "<answer>rose</answer>", None),
    ],
)
def test_an_answer_is_read_as_the_accuracy_reward_reads_it(text, label):
    assert READER.label(text) == label


def test_the_class_with_most_votes_wins_and_brings_its_first_reasoning():
    vote = READER.vote([say("rosa", " red "), say("pink primrose"), say("tulip"), say("rose", "thorns")])
    assert (vote.label, vote.share, vote.counts) == ("rose", 0.5, {"rose": 2, "pink primrose": 1})
    assert vote.reasoning == "red"


def test_of_equally_many_the_first_wins():
    assert READER.vote([say("pink primrose"), say("rose")]).label == "pink primrose"


def test_no_class_at_all():
    vote = READER.vote([say("tulip", "yellow"), "x"])
    assert (vote.label, vote.share, vote.counts, vote.reasoning) == (None, 0.0, {}, "yellow")
    with pytest.raises(ValueError, match="at least one"):
        READER.vote([])


def test_reasoning_is_what_stands_in_the_first_think_block():
    assert reasoning("<think> a\nb </think><think>c</think>") == "a\nb"
    assert reasoning("<think>open") == ""


def test_printable_text_cannot_steer_a_terminal():
    assert printable("a\x1b[31mred\x07\nb") == "a?[31mred? b"
    assert printable("\u202etxt.exe") == "?txt.exe"  # right-to-left override
    assert printable("نمی\u200cخواهم 🍰") == "نمی\u200cخواهم 🍰"
