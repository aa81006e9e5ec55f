import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from rft_cluster.classification.baselines import (
    BASELINES,
    PENALTIES,
    WIDTHS,
    Baselines,
    _probe,
    _svm,
    compared,
    measure,
    minus_baselines,
    on_features,
    on_pixels,
    recorded_flags,
    verdict,
)
from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset
from rft_cluster.data.dataset import FewShotDataset, LabelledImage


def example(grey: int, label: str) -> LabelledImage:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 50), grey, dtype=np.uint8)).save(file, "PNG")
    return LabelledImage(f"{label}/{grey}", file.getvalue(), label)


# Trained on dark 0 and light 100. Nearest: 40 dark, 60 light, 255 light, so the label "dark" of 60 is the
# one mistake of three. The borders of the regression and of the SVM lie half way, at 50, by symmetry: the same mistake.
GREYS = FewShotDataset.of(
    "greys",
    ["dark", "light"],
    [example(0, "dark"), example(100, "light")],
    [],
    [example(40, "dark"), example(60, "dark"), example(255, "light")],
    [],
)


def test_greys_by_hand():
    found = on_pixels(GREYS)
    assert found == dict.fromkeys(("nearest_neighbour", "logistic_regression", "rbf_svm"), (True, False, True))
    assert Baselines(found).rates == pytest.approx(dict.fromkeys(found, 2 / 3))


def test_four_digits_a_class_are_far_above_chance():
    dataset = load_dataset(DataSection(source="digits", shots=4, validation=0, test=300), 0)
    found = on_pixels(dataset)
    assert all(0.7 < rate < 0.97 for rate in Baselines(found).rates.values())
    assert found == on_pixels(dataset)


def features(dataset: FewShotDataset, vectors: list[list[float]]) -> dict[str, np.ndarray]:
    """Hand-made features: of the training images, then of the test images, in order."""
    images = [*dataset.train, *dataset.test]
    return {one.image.sha256: np.array(v, np.float32) for one, v in zip(images, vectors, strict=True)}


def test_classes_without_training_images_are_no_baseline_s_business():
    """No classifier fitted to the others can name them."""
    dataset = replace(GREYS, classes=[*GREYS.classes, "grey"], test=[GREYS.test[0], example(70, "grey").example()])
    assert set(on_pixels(dataset).values()) == {(True,)}
    assert list(compared(dataset)) == [one.image.sha256 for one in (*GREYS.train, GREYS.test[0])]


def test_features_by_hand():
    """The third value is the same in all training images."""
    found = on_features(GREYS, features(GREYS, [[3, 0, 7], [0, 3, 7], [9, 1, 7], [2, 1.6, 7], [1, 9, 7]]))
    assert found == {"tower_neighbour": (True, True, True), "tower_probe": (True, True, True)}


def test_the_nearest_features_are_those_at_the_smallest_angle():
    # With deviation 1: (1.32, 0) is dark, (-0.22, 1.22) and (-1.10, -1.22) are light. (0.32, 0.34) lies 1.06, 1.03 and
    # 2.11 from them; the cosines are 0.68, 0.60 and -0.99.
    train = [example(0, "dark"), example(100, "light"), example(120, "light")]
    dataset = FewShotDataset.of("greys", ["dark", "light"], train, [], [example(40, "dark")], [])
    found = on_features(dataset, features(dataset, [[6, 0], [-1, 1], [-5, -1], [1.456, 0.2775]]))
    assert found["tower_neighbour"] == (True,)


@pytest.mark.parametrize(
    ("apart", "least", "most"),
    [(0.0, 1e-4, 1e-3), (8.0, 1e2, 1e4)],  # nothing tells the classes apart; one value does, 40 are noise
)
def test_the_probe_takes_the_penalty_that_predicts_best_on_the_shots(apart, least, most):
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 8
    vectors = np.array([[apart * (label == "b") + rng.normal(), *rng.normal(0, 1, 40)] for label in labels])
    assert least <= _probe(vectors, labels).best_params_["C"] <= most


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "a", "b"]])
def test_one_shot_leaves_the_probe_no_penalty_to_choose(labels):
    vectors = np.arange(len(labels))[:, None] * 10
    assert list(_probe(vectors, labels).predict(vectors)) == labels


@pytest.mark.parametrize("shots", [2, 8])
def test_the_svm_s_penalty_and_width_are_those_that_predict_best_on_the_shots(shots):
    """The pair that scikit-learn's own search finds, with the kernel computed anew for each pair."""
    rng = np.random.default_rng(1)
    labels = ["centre", "ring"] * shots
    angles = rng.uniform(0, 2 * np.pi, 2 * shots)
    radii = np.where(np.array(labels) == "ring", 3.0, 0.5) + rng.normal(0, 0.5, 2 * shots)
    vectors = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    scale = 1 / (2 * vectors.var())
    # The first of equally good pairs: the order is that of ours, width by width.
    grid = [{"C": [penalty], "gamma": [width * scale]} for width in WIDTHS for penalty in PENALTIES]
    theirs = GridSearchCV(SVC(), grid, cv=min(5, shots)).fit(vectors, labels).best_estimator_
    ours = _svm(vectors, labels)
    assert (ours.C, ours.gamma) == (theirs.C, pytest.approx(theirs.gamma))
    assert list(ours.predict(vectors)) == list(theirs.predict(vectors))


@pytest.mark.parametrize(("values", "labels"), [([0, 10], ["a", "b"]), ([5, 5, 5, 5], ["a", "b", "a", "b"])])
def test_one_shot_or_equal_images_leave_the_svm_nothing_to_choose(values, labels):
    ours = _svm(np.array(values, float)[:, None], labels)
    assert (ours.C, ours.gamma) == (1.0, "scale")


def test_with_too_many_images_the_svm_is_left_out(monkeypatch):
    monkeypatch.setattr("rft_cluster.classification.baselines.MOST_FOR_SVM", 1)
    assert list(on_pixels(GREYS)) == ["nearest_neighbour", "logistic_regression"]


def test_without_features_the_reason_is_recorded():
    found = measure(GREYS, None, "no room")
    pixels = ["nearest_neighbour", "logistic_regression", "rbf_svm"]
    assert list(found.right) == pixels
    assert json.loads(json.dumps(found.record())) == {
        **dict.fromkeys(pixels, 2 / 3),
        "right": dict.fromkeys(pixels, "101"),
        "skipped": "no room",
    }
    vectors = features(GREYS, [[1.0, 0.0], [0.0, 1.0]] * 2 + [[1.0, 0.0]])
    assert list(measure(GREYS, vectors, "").right) == list(BASELINES)
    assert list(compared(GREYS)) == [one.image.sha256 for one in (*GREYS.train, *GREYS.test)]


def test_flags_are_read_as_they_were_recorded_and_nothing_else():
    assert recorded_flags(measure(GREYS, None, "").record(), 3) == on_pixels(GREYS)
    wrong = {"nearest_neighbour": "10", "tower_probe": "1x1", "logistic_regression": 101, "<b>": "101"}
    assert recorded_flags({"right": wrong}, 3) == {}
    assert recorded_flags({"right": "101"}, 3) == recorded_flags({"nearest_neighbour": 0.5}, 3) == {}


def flags(right: int, n: int = 100) -> tuple[bool, ...]:
    return (True,) * right + (False,) * (n - right)


def test_the_difference_is_image_by_image():
    less = minus_baselines(flags(90), {"nearest_neighbour": flags(80)})["nearest_neighbour"]
    assert (less["difference"], less["only_first"], less["only_second"]) == (pytest.approx(0.1), 0, 10)


@pytest.mark.parametrize("best", BASELINES)
@pytest.mark.parametrize(
    ("right", "words"),
    [
        (50, ["beats the best baseline", "image by image +15.0 points"]),
        (64, ["is not clearly better than the best baseline", "If you need only the label, that will do"]),
        (80, ["is beaten by the best baseline", "image by image -15.0 points", "If you need only the label, use that"]),
    ],
)
@pytest.mark.parametrize("small", [True, False])
def test_the_verdict_names_the_best_baseline_and_what_grpo_adds(best, right, words, small):
    baselines = {name: flags(30) for name in BASELINES} | {best: flags(right)}
    said = verdict(flags(65), flags(10), baselines, 40, small)
    assert all(word in said for word in words)
    assert f"{BASELINES[best]} of the same 40 images ({right}.0 %)" in said
    assert "(65.0 %, interval 55.3 to 73.6)" in said
    lost = right > 50
    assert ("What GRPO adds here is an answer in words from the model itself, +55.0 points" in said) == lost
    assert ("data.shots" in said and "schedule.steps" in said) == lost
    assert ("Qwen2-VL-2B" in said) == (lost and small)


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ("sft", "supervised fine-tuning with the same 40 images (70.0 %)"),
        ("base_closed", "the untouched model with the classes listed (70.0 %)"),
        ("encoder_probe", "linear probe on the encoder's features of the same 40 images (70.0 %)"),
    ],
)
def test_the_verdict_on_a_baseline_that_was_asked_for(best, words):
    said = verdict(flags(65), flags(10), {name: flags(30) for name in BASELINES} | {best: flags(70)}, 40, False)
    assert words in said and "image by image -5.0 points" in said
    answers = "It answers in words, too, and GRPO adds +55.0 points" in said
    assert answers == (best != "encoder_probe") == ("What GRPO adds here" not in said)


def test_the_verdict_on_sft_itself_says_what_sft_adds():
    said = verdict(flags(65), flags(10), {"tower_probe": flags(70)}, 40, False, "sft")
    assert "What SFT adds here is an answer in words" in said and "GRPO" not in said


def test_a_verdict_without_answers_from_before_names_no_gain():
    said = verdict(flags(5), (), {"tower_probe": flags(9)}, 4, False)
    assert "from the model itself. What to try" in said


def test_where_errors_agree_a_small_difference_is_clear():
    """2 points of 500 images, with intervals that overlap; image by image all 10 differences point one way."""
    said = verdict(flags(450, 500), (), {"tower_probe": flags(440, 500)}, 40, False)
    assert "beats" in said
