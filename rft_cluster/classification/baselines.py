"""What the same few images give without a language model: the figures to beat.

Both baselines see an image as 32x32 RGB pixels from 0 to 1.
"""

import numpy as np
from PIL import Image

from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.images import open_image
from rft_cluster.messages import Example

SIDE = 32


def nearest_neighbour_and_regression(dataset: FewShotDataset) -> dict[str, float]:
    """Test accuracy, 0 to 1, of two classifiers trained on the data set's few-shot training images.

    `nearest_neighbour` takes the label of the training image at the smallest Euclidean distance;
    `logistic_regression` is scikit-learn's, with its default regularisation.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.neighbors import KNeighborsClassifier
    from threadpoolctl import threadpool_limits

    train, test = _pixels(dataset.train), _pixels(dataset.test)
    train_labels, test_labels = _labels(dataset.train), _labels(dataset.test)
    classifiers = {
        "nearest_neighbour": KNeighborsClassifier(n_neighbors=1),
        "logistic_regression": LogisticRegression(max_iter=1000),
    }
    # Matrices this small only lose by threads, a hundredfold where other processes hold the cores.
    with threadpool_limits(limits=1):
        return {
            name: float(classifier.fit(train, train_labels).score(test, test_labels))
            for name, classifier in classifiers.items()
        }


def _pixels(examples: list[Example]) -> np.ndarray:  # [n, 32 * 32 * 3]
    images = [open_image(e.image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for e in examples]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in images])


def _labels(examples: list[Example]) -> list[str]:
    return [example.label for example in examples]
