"""P(class | image) from the log-probabilities of the classes' names, and its temperature (pure).

How names of different lengths are compared: by the joint log-probability of the name and of all that ends the answer.
Answers are disjoint texts, so these are probabilities of one distribution, and a longer name loses nothing that the
policy did not mean. They are renormalised over the classes. For a comparison there are two ways that others take, see
`METHODS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rft_cluster.common.labels import extract_answer, normalise_label

OPEN, CLOSE = "<answer>", "</answer>"
# The question shows `<answer> ... </answer>`, so a policy may write the name with these spaces or without: both count.
FORMS = ("{name}" + CLOSE, " {name} " + CLOSE)
TEMPERATURES = (0.05, 20.0)
FEWEST = 50  # images to fit a temperature on
JOINT = "joint"
METHODS = {
    JOINT: "of name and end together",
    "per_token": "mean per token",  # the length normalisation of Brown et al. 2020, arXiv 2005.14165, section 2.4
    # Domain-conditional pointwise mutual information, Holtzman et al. 2021, arXiv 2104.08315; the premise without
    # content is a grey image, as in the contextual calibration of Zhao et al. 2021, arXiv 2102.09690.
    "grey": "less that with a grey image",
}


@dataclass(frozen=True)
class Scores:
    """What a policy says of K classes after one reasoning, e.g. of three with two ways to write each.

    `logprobs` [ways, K] FP64: nats, joint; -inf where a class has fewer ways. `tokens` [ways, K]: their numbers of
    tokens.
    """

    logprobs: np.ndarray
    tokens: np.ndarray

    @property
    def joint(self) -> np.ndarray:
        """[K]: of the class in any way of writing it."""
        return np.logaddexp.reduce(self.logprobs, axis=0)

    @property
    def per_token(self) -> np.ndarray:
        """[K]: the mean over the tokens of the way that is the most probable."""
        ways = self.logprobs.argmax(axis=0)[None]
        return (np.take_along_axis(self.logprobs, ways, 0) / np.take_along_axis(self.tokens, ways, 0))[0]

    @property
    def named(self) -> float:
        """The share of the policy's probability that is on names of classes, 0 to 1. The rest is on other answers."""
        return float(min(1.0, np.exp(self.joint).sum()))


Score = Callable[[bytes, str, str, Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""(encoded image, question, what the completion has so far, answers) -> log-probabilities and numbers of tokens
[answers]; `model.class_logprobs.ClassScorer.logprobs`, or the same in an actor."""


def score_classes(
    score: Score,
    image: bytes,
    question: str,
    befores: Sequence[str | None],
    classes: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
) -> list["Scores | None"]:
    """The scores of the classes after each of the reasonings `befores`. None: a completion out of format.

    `aliases`: other right names, by class. Whoever answers with one of them means the class.
    """
    ways = [written_answers(label, aliases) for label in classes]
    answers = [text for own in ways for text in own]
    found = {
        before: scores_of(*score(image, question, before, answers), [len(own) for own in ways])
        for before in {*befores}
        if before is not None
    }
    return [None if before is None else found[before] for before in befores]


def written_answers(label: str, aliases: Mapping[str, Sequence[str]]) -> list[str]:
    """What a completion may end with that means this class: each of its names, as it is spelt and as people write it,
    in both forms.

    A folder is called Pink_Primrose, and a model that has read of flowers writes "pink primrose". The rewards take both
    for right (`normalise_label`).
    """
    names = (label, *aliases.get(label, ()))
    spelt = dict.fromkeys(way for name in names for way in (name, _spaced(name), _spaced(name).lower()))
    return [form.format(name=way) for way in spelt for form in FORMS]


def _spaced(name: str) -> str:
    """With spaces between words; the name itself where that would mean another one, as of `20-30`."""
    spaced = name.replace("_", " ").replace("-", " ").strip()
    return spaced if normalise_label(spaced) == normalise_label(name) else name


def scores_of(logprobs: np.ndarray, tokens: np.ndarray, ways: Sequence[int]) -> Scores:
    """The scores from those of all answers, class by class. `ways`: how many answers each class has."""
    shape, ends = (max(ways), len(ways)), np.cumsum(ways)[:-1]
    found = Scores(np.full(shape, -np.inf), np.ones(shape))
    for index, (own, counts) in enumerate(zip(np.split(logprobs, ends), np.split(tokens, ends), strict=True)):
        found.logprobs[: len(own), index], found.tokens[: len(own), index] = own, counts
    return found


def before_answer(text: str) -> str | None:
    """What a completion has up to its answer; None without exactly one answer block."""
    return None if extract_answer(text) is None else text[: text.index(OPEN) + len(OPEN)]


def softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[..., K] -> probabilities [..., K]."""
    scaled = scores / temperature
    whole = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return whole / whole.sum(axis=-1, keepdims=True)


def averaged(scores: Sequence[Scores | None], classes: int, temperature: float = 1.0) -> np.ndarray:
    """P [K] after several reasonings: the mean of what each says.

    A completion out of format has no scores (None), and says nothing: it counts as equal probabilities.
    """
    equal = np.full(classes, 1 / classes)
    return np.mean([equal if one is None else softmax(one.joint, temperature) for one in scores], axis=0)


def log_loss(probabilities: np.ndarray, right: np.ndarray) -> np.ndarray:
    """-log P(label) of each image [n], nats. `probabilities` [n, K], `right` [n]: the labels' indices."""
    return -np.log(np.maximum(probabilities[np.arange(len(right)), right], 1e-12))


def fit_temperature(probabilities: Callable[[float], np.ndarray], right: np.ndarray) -> float:
    """The temperature with the smallest log-loss, within `TEMPERATURES` (Guo et al. 2017, arXiv 1706.04599).

    The loss is as if one image more had been answered wrongly, for the same reason as the targets of Platt 1999: a few
    images that are all right do not prove that the policy is never wrong, and would give a temperature of 0.

    Args:
        probabilities: [n, K] at a temperature.
        right: the labels' indices [n].
    """
    from scipy.optimize import minimize_scalar  # takes a second to import

    def loss(log: float) -> float:
        found = probabilities(np.exp(log))
        wrong = np.maximum(1 - found.max(axis=1), 1e-12)
        return float(log_loss(found, right).sum() - np.log(wrong).mean())

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-4})
    return round(float(np.clip(np.exp(found.x), *TEMPERATURES)), 4)


def at_temperature(scores: Sequence[Sequence[Scores | None]], classes: int, temperature: float) -> np.ndarray:
    """P [n, K] of n images, each after its reasonings."""
    return np.array([averaged(own, classes, temperature) for own in scores])


@dataclass(frozen=True)
class Answer:
    """What P says of an image. `probabilities`: by class, the most probable first. `named`: see `Scores.named`, mean
    over the reasonings. `blank`: no reasoning had the format, so all classes are equally probable."""

    probabilities: Mapping[str, float]
    named: float
    blank: bool = False

    @property
    def label(self) -> str | None:
        """The most probable class; None if nothing was said."""
        return None if self.blank else next(iter(self.probabilities))

    @property
    def probability(self) -> float:
        return next(iter(self.probabilities.values()))

    def top(self, count: int) -> dict[str, float]:
        return dict(list(self.probabilities.items())[:count])

    def record(self) -> dict[str, Any]:
        return {"label": self.label, "probability": self.probability, "probabilities": dict(self.probabilities),
                "named": self.named}  # fmt: skip


def answer_of(scores: Sequence[Scores | None], classes: Sequence[str], temperature: float) -> Answer:
    """The answer after one or several reasonings. Equal probabilities are in the order of `classes`."""
    found = averaged(scores, len(classes), temperature)
    ranked = {classes[index]: float(found[index]) for index in np.argsort(-found, kind="stable")}
    named = float(np.mean([one.named if one else 0.0 for one in scores]))
    return Answer(ranked, named, blank=all(one is None for one in scores))
