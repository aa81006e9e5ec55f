"""A second look in writing. The engine is one of two lines."""

from collections.abc import Sequence

import pytest

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.second_look import Again
from rft_cluster.common.errors import UserError
from rft_cluster.messages import Completion, Group, Prompt
from rft_cluster.prompts import make_prompts, make_question
from rft_cluster.run.second_look import options_at_second_look, with_room, written_again
from tests.unit.run.begun import DATASET, config

CLASSES = ["rose", "tulip", "iris"]


def group(prompt: Prompt, *labels: str) -> Group:
    texts = [f"<think>of {prompt.text}</think><answer>{label}</answer>" for label in labels]
    return Group(prompt, [1], [Completion([1], [0.0], text, "stop", 0) for text in texts])


def looked(firsts: Sequence[str], votes: Sequence[Sequence[str]], second: str) -> tuple[list[Again], list[Prompt]]:
    prompts = make_prompts(DATASET.train, "Which?", "test", 0, 0)
    asked: list[Prompt] = []

    def generate(prompts: list[Prompt]) -> list[Group]:
        asked.extend(prompts)
        return [group(prompt, second) for prompt in prompts]

    found = written_again(
        [group(prompt, first) for prompt, first in zip(prompts, firsts, strict=True)],
        [group(prompt, *own) for prompt, own in zip(prompts, votes, strict=True)],
        AnswerReader(CLASSES, {}),
        CLASSES,
        5,
        ", ".join,
        generate,
    )
    return found, asked


def test_only_images_with_several_answers_are_asked_about_again():
    found, asked = looked(["rose", "tulip"], [["rose", "rose"], ["rose", "weed"]], "rose")
    once, twice = "of Which?", "of rose, tulip"
    assert found == [Again(("rose",), "rose", reasoning=once), Again(("rose", "tulip"), "rose", reasoning=twice)]
    (prompt,) = asked
    assert prompt.text == "rose, tulip" and prompt.example == DATASET.train[1]


def test_an_answer_that_is_no_option_is_passed_over():
    found, asked = looked(["rose", "weed"], [["tulip"], ["weed"]], "iris")
    once = "of Which?"
    assert found == [Again(("rose", "tulip"), "rose", reasoning=once), Again((), None, reasoning=once)]
    assert len(asked) == 1


def test_a_question_that_lists_no_more_classes_is_not_asked_again():
    listing, other = (make_question(name, "flower", CLASSES) for name in ("closed", "think_answer"))
    assert options_at_second_look(5, listing, CLASSES) == 0
    assert options_at_second_look(2, listing, CLASSES) == 2
    assert options_at_second_look(5, other, CLASSES) == 5
    assert options_at_second_look(0, other, CLASSES) == 0
    with pytest.raises(UserError, match="--second-look is 1"):
        options_at_second_look(1, other, CLASSES)


def test_a_longer_question_finds_room(tmp_path):
    own = config(tmp_path)
    assert with_room(own, "rosé").max_model_tokens == own.max_model_tokens + 5
