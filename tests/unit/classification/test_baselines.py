import io

import numpy as np
import pytest
from PIL import Image

from rft_cluster.classification.baselines import BASELINES, nearest_neighbour_and_regression, verdict
from rft_cluster.config import DataSection
from rft_cluster.data import load_dataset
from rft_cluster.data.dataset import FewShotDataset, LabelledImage


def example(grey: int, label: str) -> LabelledImage:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 50), grey, dtype=np.uint8)).save(file, "PNG")
    return LabelledImage(f"{label}/{grey}", file.getvalue(), label)


def test_greys_by_hand():
    # Trained on dark 0 and light 100. Nearest: 40 dark, 60 light, 255 light, so the label "dark" of 60 is the
    # one mistake of three. The regression's border lies half way, at 50, by symmetry: the same mistake.
    train = [example(0, "dark"), example(100, "light")]
    test = [example(40, "dark"), example(60, "dark"), example(255, "light")]
    figures = nearest_neighbour_and_regression(FewShotDataset.of("greys", ["dark", "light"], train, [], test, []))
    assert figures == pytest.approx({"nearest_neighbour": 2 / 3, "logistic_regression": 2 / 3})


def test_four_digits_a_class_are_far_above_chance():
    dataset = load_dataset(DataSection(source="digits", shots=4, validation=0, test=300), 0)
    figures = nearest_neighbour_and_regression(dataset)
    assert list(figures) == ["nearest_neighbour", "logistic_regression"]
    assert all(0.7 < figure < 0.97 for figure in figures.values())
    assert figures == nearest_neighbour_and_regression(dataset)


@pytest.mark.parametrize("best", ["nearest_neighbour", "logistic_regression"])
@pytest.mark.parametrize(("accuracy", "words"), [(0.5, "beats"), (0.65, "not clearly better"), (0.8, "beaten by")])
@pytest.mark.parametrize("small", [True, False])
def test_the_verdict_names_the_better_baseline_and_what_to_try(best, accuracy, words, small):
    baselines = {name: accuracy - 0.3 for name in BASELINES} | {best: accuracy}
    said = verdict(0.65, (0.6, 0.7), baselines, 40, small)
    assert words in said and f"{BASELINES[best]} on the pixels of the same 40 images ({100 * accuracy:.1f} %)" in said
    assert "(65.0 %, interval 60.0 to 70.0)" in said
    assert ("data.shots" in said and "schedule.steps" in said) == (accuracy > 0.6)
    assert ("Qwen2-VL-2B" in said) == (accuracy > 0.6 and small)
