"""Baselines on the same few images: the accuracies to beat, and whether the policy does.

Three see an image as 32x32 RGB pixels from 0 to 1, two as one vector: the mean of its tokens from the vision tower of
the model that the run started from (`model/tower.py`). The tower is not trained for them. Others are measured where
`baselines` of the configuration asks for them, two of which see an image as an encoder's vector
(`model/image_encoder.py`), and three of which are language models.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from rft_cluster.classification.intervals import paired_difference, wilson
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.images import open_image
from rft_cluster.messages import Example

SIDE = 32
# Names in files, and names in messages.
BASELINES = {
    "nearest_neighbour": "1-nearest neighbour on pixels",
    "logistic_regression": "logistic regression on pixels",
    "rbf_svm": "SVM with an RBF kernel on pixels",
    "tower_neighbour": "1-nearest neighbour on vision features",
    "tower_probe": "linear probe on vision features",
}
# Those that are measured where asked for.
BASE, BASE_CLOSED, SFT = "base", "base_closed", "sft"
NAMES = BASELINES | {
    "encoder_neighbour": "1-nearest neighbour on the encoder's features",
    "encoder_probe": "linear probe on the encoder's features",
    BASE: "the untouched model",
    BASE_CLOSED: "the untouched model with the classes listed",
    SFT: "supervised fine-tuning",
}
ASKED = {"encoder": ("encoder_neighbour", "encoder_probe"), BASE: (BASE,), BASE_CLOSED: (BASE_CLOSED,), SFT: (SFT,)}
"""By the name in the configuration."""
UNTAUGHT = {BASE, BASE_CLOSED}  # see no labelled image
TOWER, ENCODER = "tower", "encoder"
STRENGTHS = np.logspace(-4, 4, 9)  # inverse L2 penalties that the probe tries
MOST_FOLDS = 5
# What the SVM tries: penalties, and widths of its kernel in units of scikit-learn's "scale". Of equally good pairs the
# first is taken, so the usual values stand first.
PENALTIES, WIDTHS = (10.0, 1.0, 100.0), (1.0, 0.5, 2.0, 0.25, 4.0)
MOST_FOR_SVM = 2000  # training images: with 1,632 of 102 classes it takes 17 s, and its time grows with their square
RIGHT = "right"  # key of the flags in a record
SKIPPED, MISSING, MADE_WITH = "skipped", "missing", "made_with"

Fit = Callable[[np.ndarray, list[str]], Any]  # (vectors [n, values], labels) -> a fitted classifier of scikit-learn
Flags = tuple[bool, ...]


@dataclass(frozen=True)
class Baselines:
    """`right`: by `NAMES`, whether each of `FewShotDataset.seen_test` gets its label, in order. `skipped`: why there
    are none on vision features; empty if there are. `missing`: by the name in the configuration, why one that was asked
    for was not measured. `made_with`: by the same name, the settings that one was measured with (`run.inside`)."""

    right: Mapping[str, Flags]
    skipped: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        """Test accuracies, 0 to 1."""
        return {name: sum(flags) / len(flags) for name, flags in self.right.items()}

    def record(self) -> dict[str, Any]:
        """The content of `baselines.json`: rates by name, and the flags as text, `1` for right."""
        flags = {name: "".join("01"[one] for one in own) for name, own in self.right.items()}
        others = {SKIPPED: self.skipped, MISSING: dict(self.missing), MADE_WITH: dict(self.made_with)}
        return {**self.rates, RIGHT: flags, **{key: value for key, value in others.items() if value}}


def recorded_flags(record: Mapping[str, Any], images: int) -> dict[str, Flags]:
    """The flags in a record of as many images. Empty in those of earlier versions; what is no flag is left out."""
    found = record.get(RIGHT)
    return {
        name: tuple(one == "1" for one in flags)
        for name, flags in (found.items() if isinstance(found, dict) else ())
        if name in NAMES and isinstance(flags, str) and len(flags) == images and set(flags) <= {"0", "1"}
    }


def compared(dataset: FewShotDataset) -> dict[str, bytes]:
    """The encoded images that baselines see, by SHA-256: those to train on, and those to be tried on."""
    return {one.image.sha256: dataset.image(one) for one in (*dataset.train, *dataset.seen_test)}


def measure(dataset: FewShotDataset, features: Mapping[str, np.ndarray] | None, skipped: str) -> Baselines:
    """All baselines. `features`: see `on_features`; None if there are none, for the reason `skipped`."""
    right = on_pixels(dataset)
    return Baselines(right if features is None else right | on_features(dataset, features), skipped)


def named(name: str, images: int) -> str:
    """A baseline, for people. `images`: number of labelled training images."""
    seen = "" if name in UNTAUGHT else f" {'with' if name == SFT else 'of'} the same {images} images"
    return NAMES[name] + seen


def on_pixels(dataset: FewShotDataset) -> dict[str, Flags]:
    """Whether classifiers that are trained on the training images' pixels are right.

    `nearest_neighbour` takes the label of the training image at the smallest Euclidean distance;
    `logistic_regression` is scikit-learn's, with its default regularisation. `rbf_svm` is an SVM with an RBF kernel,
    whose penalty and width have the highest accuracy in cross-validation on the training images (see `_svm`); with more
    than `MOST_FOR_SVM` of these it is left out.
    """
    fits: dict[str, Fit] = {"nearest_neighbour": _nearest, "logistic_regression": _regression}
    if len(dataset.train) <= MOST_FOR_SVM:
        fits["rbf_svm"] = _svm
    return _right(dataset, _pixels(dataset, dataset.train), _pixels(dataset, dataset.seen_test), fits)


def on_features(dataset: FewShotDataset, features: Mapping[str, np.ndarray], whose: str = TOWER) -> dict[str, Flags]:
    """The same on features, [values] for each image by its SHA-256. `whose`: the tower's, or an encoder's.

    Each value is first brought to mean 0 and deviation 1 over the training images. `tower_neighbour` takes the training
    image at the smallest angle. `tower_probe` is logistic regression, the usual linear probe; its L2 penalty is the one
    with the smallest log-loss in cross-validation on the training images (see `_probe`).
    """
    train, test = (
        np.stack([features[one.image.sha256] for one in split]).astype(np.float64)  # lbfgs is slower in FP32
        for split in (dataset.train, dataset.seen_test)
    )
    centre, scale = train.mean(0), train.std(0)
    scale = np.where(scale > 1e-6, scale, 1.0)  # of a value that is the same in all
    train, test = (train - centre) / scale, (test - centre) / scale
    return _right(dataset, train, test, {f"{whose}_neighbour": _nearest_angle, f"{whose}_probe": _probe})


def _right(dataset: FewShotDataset, train: np.ndarray, test: np.ndarray, fits: Mapping[str, Fit]) -> dict[str, Flags]:
    from threadpoolctl import threadpool_limits

    labels, wanted = _labels(dataset.train), _labels(dataset.seen_test)
    # Threads only slow down matrices this small, a hundredfold while other processes occupy the cores.
    with threadpool_limits(limits=1):
        found = {name: fit(train, labels).predict(test) for name, fit in fits.items()}
    return {name: tuple(bool(a == b) for a, b in zip(own, wanted, strict=True)) for name, own in found.items()}


# Each imports scikit-learn itself, which takes a second.


def _nearest(vectors: np.ndarray, labels: list[str]) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors=1).fit(vectors, labels)


def _nearest_angle(vectors: np.ndarray, labels: list[str]) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(n_neighbors=1, metric="cosine").fit(vectors, labels)


def _regression(vectors: np.ndarray, labels: list[str]) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(vectors, labels)


def _probe(vectors: np.ndarray, labels: list[str]) -> Any:
    """Logistic regression with the best of `STRENGTHS`; with one image of a class, which cannot be both learned from
    and tried on, with scikit-learn's default."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    folds = _folds(labels)
    if folds < 2:
        return _regression(vectors, labels)
    tried = GridSearchCV(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, scoring="neg_log_loss", cv=folds)
    return tried.fit(vectors, labels)


def _svm(vectors: np.ndarray, labels: list[str]) -> Any:
    """The best pair of `PENALTIES` and `WIDTHS`; with one image of a class scikit-learn's default.

    All pairs of a width share one kernel matrix, which is ten times as fast as to compute it for each.
    """
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    folds, spread = _folds(labels), float(vectors.var())
    if folds < 2 or spread == 0:
        return SVC().fit(vectors, labels)
    found: dict[tuple[float, float], float] = {}
    for gamma in (width / (vectors.shape[1] * spread) for width in WIDTHS):
        tried = GridSearchCV(SVC(kernel="precomputed"), {"C": PENALTIES}, cv=folds, refit=False)
        means = tried.fit(rbf_kernel(vectors, gamma=gamma), labels).cv_results_["mean_test_score"]
        found |= {(penalty, gamma): mean for penalty, mean in zip(PENALTIES, means, strict=True)}
    penalty, gamma = max(found, key=lambda pair: found[pair])
    return SVC(C=penalty, gamma=gamma).fit(vectors, labels)


def _folds(labels: list[str]) -> int:
    """Folds of a cross-validation in which each fold has every class."""
    return min(MOST_FOLDS, *Counter(labels).values())


def minus_baselines(policy: Sequence[bool], right: Mapping[str, Flags]) -> dict[str, dict[str, Any]]:
    """The policy's accuracy less that of each baseline, image by image (see `paired_difference`)."""
    return {name: paired_difference(flags, policy) for name, flags in right.items()}


def verdict(
    policy: Sequence[bool],
    before: Sequence[bool],
    right: Mapping[str, Flags],
    images: int,
    small_model: bool,
    objective: str = "grpo",
    warm: bool = False,
) -> str:
    """Is the trained policy or the best baseline better, image by image? If a baseline is as good: what GRPO adds.

    Args:
        policy: whether each test image's answer is right.
        before: the same of the untrained policy; empty if unknown.
        right: of the baselines, at least one.
        images: number of labelled training images, the same for all.
        small_model: True for the model of `model.path: tiny`.
        objective: what the policy was trained by, as `algorithm.objective` names it.
        warm: True if `before` is of the warm-started policy.
    """
    name = max(right, key=lambda one: sum(right[one]))
    best = sum(right[name]) / len(right[name])
    less = paired_difference(right[name], policy)
    low, high = less["interval"]
    ends = " to ".join(f"{100 * end:.1f}" for end in wilson(sum(policy), len(policy)))
    ours = f"the trained model ({100 * sum(policy) / len(policy):.1f} %, interval {ends})"
    other = f"the best baseline, {named(name, images)} ({100 * best:.1f} %)"
    by = f"image by image {_points(less)}"
    if low > 0:
        return f"verdict: {ours} beats {other}: {by}"
    said = f"is beaten by {other}" if high < 0 else f"is not clearly better than {other}"
    use = "use that" if high < 0 else "that will do"
    tries = ["more labelled images (data.shots)", "more steps (schedule.steps)"]
    if small_model:
        tries.append("a model that has seen photographs, on a GPU (model.path=Qwen/Qwen2-VL-2B-Instruct)")
    label = f"If you need only the label, {use}. {_adds(policy, before, name, objective.upper(), warm)}"
    return f"verdict: {ours} {said}: {by}. {label}. What to try: {', '.join(tries)}"


def _adds(policy: Sequence[bool], before: Sequence[bool], name: str, trained: str, warm: bool) -> str:
    """What training (GRPO or SFT) adds to the baseline `name`, which is as good."""
    start = "the warm-started model" if warm else "the untrained model"
    over = f"{_points(paired_difference(before, policy))} over {start}" if before else ""
    if name in ASKED:  # a language model
        return "It answers in words, too" + (f", and {trained} adds {over}" if over else "")
    words = f"What {trained} adds here is an answer in words from the model itself"
    return f"{words}, {over}" if over else words


def _points(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    return f"{100 * difference['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _pixels(dataset: FewShotDataset, examples: list[Example]) -> np.ndarray:  # [n, 32 * 32 * 3]
    images = [open_image(dataset.image(e)).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for e in examples]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() / 255 for image in images])


def _labels(examples: list[Example]) -> list[str]:
    return [example.label for example in examples]


def to_ask(command: list[str], sft_rate: float | None) -> str:
    """A line with what adds baselines to the run that `command` has launched. `sft_rate`: SFT's, if not the run's."""
    words = [*(word for word in command if not word.startswith("--resume")), "--resume", "baselines=[base_closed,sft]"]
    words += [f"optimizer.sft_learning_rate={sft_rate:g}"] if sft_rate else []
    others = "the untouched model, given the classes, and SFT (or an image encoder: docs/baselines.md), too"
    return f"to compare with {others}: {shlex.join(words)}"
