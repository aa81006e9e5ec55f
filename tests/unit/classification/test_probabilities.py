import numpy as np
import pytest

from rft_cluster.classification.calibration import probability_report
from rft_cluster.classification.probabilities import (
    FORMS,
    Scores,
    answer_of,
    at_temperature,
    averaged,
    before_answer,
    fit_temperature,
    score_classes,
    softmax,
    written_answers,
)
from rft_cluster.common.labels import normalise_label

CLASSES = ["rose", "dog rose", "iris"]


def scores(*shares: float, tokens: int = 3) -> Scores:
    """Of classes with these probabilities, all in the first form."""
    logprobs = np.log([shares, np.full(len(shares), 1e-12)])
    return Scores(logprobs, np.full(logprobs.shape, tokens))


def test_a_class_is_as_probable_as_all_its_forms_together():
    one = Scores(np.log([[0.1, 0.3], [0.2, 0.05]]), np.array([[2, 3], [4, 5]]))
    np.testing.assert_allclose(np.exp(one.joint), [0.3, 0.35])
    assert one.named == pytest.approx(0.65)
    np.testing.assert_allclose(one.per_token, [np.log(0.2) / 4, np.log(0.3) / 3])


def test_a_longer_name_is_not_less_probable_for_its_length():
    """The policy is as sure of either name; a mean per token would take the one with more tokens."""
    one = Scores(np.log([[0.4, 0.4], [1e-12, 1e-12]]), np.array([[2, 7], [2, 7]]))
    found = softmax(one.joint)
    assert found[0] == pytest.approx(found[1])
    assert one.per_token.argmax() == 1


def test_reasonings_are_averaged_and_one_out_of_format_says_nothing():
    found = averaged([scores(0.8, 0.1, 0.1), scores(0.2, 0.6, 0.2), None], 3)
    np.testing.assert_allclose(found, np.mean([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [1 / 3] * 3], axis=0), atol=1e-9)
    np.testing.assert_allclose(averaged([None], 4), np.full(4, 0.25))


def test_the_same_reasoning_is_scored_once():
    asked = []

    def score(image, question, before, answers):
        asked.append((image, question, before, tuple(answers)))
        return np.log(np.linspace(0.1, 0.6, len(answers))), np.arange(len(answers))

    first, none, again = score_classes(score, b"image", "Which?", ["<answer>", None, "<answer>"], CLASSES, {})
    texts = [form.format(name=name) for name in CLASSES for form in FORMS]
    assert asked == [(b"image", "Which?", "<answer>", tuple(texts))]
    assert none is None and again is first
    assert first.logprobs.shape == (len(FORMS), 3)
    np.testing.assert_allclose(np.exp(first.logprobs), [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]])  # class by class


def test_a_class_is_answered_by_its_other_names_too():
    """The policy's word for t-shirts is the alias."""
    shares = {" tee ": 0.4, "tee": 0.5, "t-shirt": 0.01, "shirt": 0.06}

    def score(image, question, before, answers):
        probabilities = [shares.get(text.removesuffix("</answer>"), 1e-12) for text in answers]
        return np.log(probabilities), np.full(len(answers), 2)

    classes, aliases = ["shirt", "t-shirt"], {"t-shirt": ["tee", "t-shirt"], "none of them": ["hat"]}
    (found,) = score_classes(score, b"", "Which?", ["<answer>"], classes, aliases)
    answer = answer_of([found], classes, 1.0)
    assert (answer.label, answer.probability) == ("t-shirt", pytest.approx(0.91 / 0.97))
    assert answer.named == pytest.approx(0.97)
    np.testing.assert_allclose(found.per_token, np.log([0.06, 0.5]) / 2)
    (plain,) = score_classes(score, b"", "Which?", ["<answer>"], classes, {})
    assert answer_of([plain], classes, 1.0).label == "shirt"


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("rose", ["rose"]),
        ("Pink_Primrose", ["Pink_Primrose", "Pink Primrose", "pink primrose"]),
        ("black-eyed susan", ["black-eyed susan", "black eyed susan"]),
        ("20-30", ["20-30"]),  # with a space it would be another answer
        ("-1", ["-1"]),
    ],
)
def test_a_name_is_answered_as_people_write_it_too(name, spelt):
    found = written_answers(name, {})
    assert found == [form.format(name=one) for one in spelt for form in FORMS]
    texts = [text.removesuffix("</answer>") for text in found]
    assert {normalise_label(text) for text in texts} == {normalise_label(name)}, "the rewards take no other for right"


def test_a_blank_is_no_method_s_right_answer():
    report = probability_report([scores(0.8, 0.1, 0.1), None, None], [], np.array([0, 0, 0]), 3, None)
    rates = {name: found["accuracy"] for name, found in report["methods"].items()}
    assert rates == {"joint": pytest.approx(1 / 3), "per_token": pytest.approx(1 / 3)}
    assert report["accuracy"]["right"] == 1


def test_where_nothing_had_the_format_there_is_no_answer():
    found = answer_of([None, None], CLASSES, 1.0)
    assert (found.label, found.probability, found.named) == (None, pytest.approx(1 / 3), 0.0)
    assert answer_of([None, scores(0.2, 0.2, 0.5)], CLASSES, 1.0).label == "iris"


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("<think>red</think><answer>rose</answer>", "<think>red</think><answer>"),
        ("<answer> rose </answer>", "<answer>"),
        ("rose", None),
        ("<answer>rose</answer><answer>iris</answer>", None),
    ],
)
def test_what_is_written_before_the_answer(text, before):
    assert before_answer(text) == before


def drawn(temperature: float, images: int = 3000) -> tuple[list, np.ndarray]:
    """Scores of a policy whose probabilities would be right at this temperature, with labels drawn from those."""
    draw = np.random.default_rng(5)
    joint = draw.normal(0, 2, (images, 4)) * temperature
    right = (softmax(joint, temperature).cumsum(axis=1) < draw.random((images, 1))).sum(axis=1)
    return [[Scores(np.stack([row, np.full(4, -1e9)]), np.ones((2, 4)))] for row in joint], right


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_at_which_the_labels_were_drawn_is_found(temperature):
    after, right = drawn(temperature)
    joint = np.array([own[0].joint for own in after])
    found = fit_temperature(lambda t: softmax(joint, t), right)
    assert found == pytest.approx(temperature, rel=0.06)
    np.testing.assert_allclose(at_temperature(after, 4, found), softmax(joint, found))


@pytest.mark.parametrize("images", [60, 600])
def test_images_that_are_all_right_do_not_prove_that_the_policy_is_never_wrong(images):
    after = [[scores(0.9, 0.05, 0.05)]] * images
    found = fit_temperature(lambda t: at_temperature(after, 3, t), np.zeros(images, int))
    surest = at_temperature(after[:1], 3, found).max()
    assert 1 - surest == pytest.approx(1 / (images + 1), rel=0.01)


def test_classes_are_ranked_and_equal_ones_keep_their_order():
    found = answer_of([scores(0.2, 0.2, 0.5)], CLASSES, 1.0)
    assert list(found.probabilities) == ["iris", "rose", "dog rose"]
    assert (found.label, found.probability) == ("iris", pytest.approx(0.5 / 0.9))
    assert found.named == pytest.approx(0.9)
    assert sum(found.probabilities.values()) == pytest.approx(1.0)
