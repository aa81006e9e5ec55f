"""Baselines without a language model on the same few images: the accuracies to beat.

Both see an image as 32x32 RGB pixels from 0 to 1.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.images import open_image
from rft_cluster.messages import Example

SIDE = 32
# Names in files, and names in messages.
BASELINES = {"nearest_neighbour": "1-nearest neighbour", "logistic_regression": "logistic regression"}


def nearest_neighbour_and_regression(dataset: FewShotDataset) -> dict[str, float]:
    """Test accuracy, 0 to 1, of two classifiers trained on the data set's few-shot training images.

    `nearest_neighbour` takes the label of the training image at the smallest Euclidean distance;
    `logistic_regression` is scikit-learn's, with its default regularisation.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    train, test = _pixels(dataset, dataset.train), _pixels(dataset, dataset.test)
    train_labels, test_labels = _labels(dataset.train), _labels(dataset.test)
    classifiers = {
        "nearest_neighbour": KNeighborsClassifier(n_neighbors=1),
        "logistic_regression": LogisticRegression(max_iter=1000),
    }
    # Threads only slow down matrices this small, a hundredfold while other processes occupy the cores.
    with threadpool_limits(limits=1):
        return {
            name: float(classifier.fit(train, train_labels).score(test, test_labels))
            for name, classifier in classifiers.items()
        }


def verdict(
    rate: float, interval: tuple[float, float], baselines: Mapping[str, float], images: int, small_model: bool
) -> str:
    """One sentence: is the trained model or a baseline better? If a baseline is, also what to try.

    Args:
        rate, interval: the model's test accuracy with its 95 % interval, 0 to 1.
        baselines: test accuracies, by the names of `BASELINES`.
        images: number of labelled training images, the same for all.
        small_model: True for the model of `model.path: tiny`.
    """
    name, best = max(baselines.items(), key=lambda item: item[1])
    other = f"{BASELINES[name]} on the pixels of the same {images} images ({100 * best:.1f} %)"
    low, high = (f"{100 * end:.1f}" for end in interval)
    ours = f"({100 * rate:.1f} %, interval {low} to {high})"
    if best < interval[0]:
        return f"verdict: the trained model {ours} beats the better baseline, {other}"
    clear = best > interval[1]
    first = f"the trained model {ours} is {'beaten by' if clear else 'not clearly better than'} {other}"
    tries = ["more labelled images (data.shots)", "more steps (schedule.steps)"]
    if small_model:
        tries.append("a model that has seen photographs, on a GPU (model.path=Qwen/Qwen2-VL-2B-Instruct)")
    return f"verdict: {first}. What to try: {', '.join(tries)}"


def _pixels(dataset: FewShotDataset, examples: list[Example]) -> np.ndarray:  # [n, 32 * 32 * 3]
    images = [open_image(dataset.image(e)).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for e in examples]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in images])


def _labels(examples: list[Example]) -> list[str]:
    return [example.label for example in examples]
