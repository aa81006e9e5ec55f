"""The messages between the roles: one frozen type for each boundary, with an example.

    Example -> Prompt -> Group (of Completions) -> Reward -> advantages -> TrainingSample -> Batch

Each stage returns a new value and fills no blanks in an old one, so a message is complete. A group contains its
completions, so no shuffle can separate them. Images are passed by reference: a message has an `ImageRef`, and each
process fetches the encoded image once, by hash (`Images`). `Batch` has tensors and stays in the learner
(`learner/collate.py`).
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol

from rft_cluster.common.reduce import all_of, joined, largest


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How a training image is changed, e.g. `Augmentation((0.02, 0.0, 0.95, 1.0), False, -4.2, (1.1, 0.9, 1.0))`.

    It is drawn by the driver and applied by `data/augment.py` wherever the image is encoded.
    """

    crop: tuple[float, float, float, float]  # left, top, right and bottom of what is kept: shares of width and height
    flip: bool  # left to right
    rotation: float  # degrees, counter-clockwise
    colour: tuple[float, float, float]  # factors of brightness, contrast and saturation


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Names an image, e.g. `ImageRef("rose/a.jpg", "9f86d081...")`.

    `image_id` is unique in its data set, and is shown to people. `sha256` (64 hex digits) is the file's hash, as
    `sha256sum` prints it. It is the key under which every process finds the image in the form for the model.
    `augmentation`: how the policy is shown the image; None: as it is.
    """

    image_id: str
    sha256: str
    augmentation: Augmentation | None = None


class Images(Protocol):
    """The encoded images (PNG, JPEG, ...) of a run by `ImageRef.sha256`: a dict, or an object that fetches them."""

    def __getitem__(self, sha256: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled image, e.g. `Example(ImageRef("rose/a.jpg", "9f86d081..."), "rose", aliases=("dog rose",))`.

    `aliases` are other correct names of the label.
    """

    image: ImageRef
    label: str
    aliases: tuple[str, ...] = ()

    @property
    def example_id(self) -> str:
        """Unique in the data set."""
        return self.image.image_id

    def changed(self, how: Augmentation | None) -> "Example":
        """The example with its image changed so."""
        return replace(self, image=replace(self.image, augmentation=how)) if how else self


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question about an image, e.g. `Prompt("train/12/3", example, "Which flower is this?", seed=1234)`.

    The image comes first in the user's turn, then `text`. `prompt_id` is (split, step, index in the step). The seeds of
    the completions follow from `seed` (31 bits), so they depend neither on the generator nor on the order.
    """

    prompt_id: str
    example: Example
    text: str
    seed: int

    @property
    def example_id(self) -> str:
        return self.example.example_id

    @property
    def label(self) -> str:
        return self.example.label

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.example.aliases


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample a prompt's completions, e.g. `Sampling(group_size=8, temperature=1.0, max_tokens=256)`."""

    group_size: int  # completions of each prompt
    temperature: float  # 0 is greedy and needs a `group_size` of 1
    max_tokens: int  # of a completion
    top_k: int = 0  # 0: sample from all tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer of R tokens, e.g.
    `Completion([27, 9217, 151645], [-0.1, -2.3, -0.0], "<answer>rose</answer>", "stop", policy_version=12)`.

    `version_spans` is empty unless the weights changed within the completion: then it has (version, number of tokens)
    in order, e.g. `((12, 40), (13, 24))`.

    `text` begins with the `<think>` that the chat template writes at the end of the prompt, if it does (Thinking
    variants): rewards and all that is shown see the whole layout. `token_ids` are the sampled tokens alone.
    """

    token_ids: list[int]  # [R]; ends with the stop token unless `finish_reason` is "length"
    generator_logprobs: list[float]  # [R] nats, under the sampled distribution: tempered, special tokens forbidden;
    # empty for a target of SFT, which nobody has sampled
    text: str
    finish_reason: str
    policy_version: int  # of the weights that wrote the first token
    version_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its completions, e.g. `Group(prompt, [151644, 872, ...], [Completion(...), Completion(...)])`."""

    prompt: Prompt
    prompt_token_ids: list[int]  # [P], with the image tokens expanded, as in the engine
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Reward:
    """A completion's reward, e.g. `Reward(1.0, {"format": 1.0, "accuracy": 0.0})`, or, masked,
    `Reward(None, {"format": 1.0}, {"my_judge:judge": "no answer within 10 s"})`.

    A completion is masked if one of its rewards failed: it has no total, and nothing is learned from it. A total of 0
    would be a false label.
    """

    total: float | None  # weighted sum of `parts`
    parts: dict[str, float]  # by reward name, unweighted, without those that failed
    failures: dict[str, str] = field(default_factory=dict)  # reward name -> short reason


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One completion for the learners, e.g. `TrainingSample(prompt, [151644, ...], [27, 9217, 151645],
    [-0.1, -2.3, -0.0], advantage=0.7, weight=1 / 96, index=3)`.

    Weights are computed over the whole step before it is split. So the loss is a plain sum, and no split over ranks
    changes it.
    """

    prompt: Prompt
    prompt_token_ids: list[int]  # [P]
    token_ids: list[int]  # [R]
    generator_logprobs: list[float]  # [R] nats; empty for a target of SFT
    advantage: float
    weight: float  # of each of the R tokens in the loss
    index: int  # of the completion in its group, from 0


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over trained completion tokens, e.g. `LossSums(tokens=8, logprob_gap=0.4)`: 0.05 nats a token.

    The function at each field combines the figures of micro-batches and of ranks (`common.reduce`).
    """

    tokens: Annotated[int, sum] = 0
    """Number of tokens."""
    loss: Annotated[float, sum] = 0.0
    """Weight times token loss. The weights of an optimizer update add up to a whole loss."""
    kl: Annotated[float, sum] = 0.0
    """Nats. The k3 estimate of the KL from the starting model; 0 if `algorithm.kl_beta` is 0."""
    logprob_gap: Annotated[float, sum] = 0.0
    """Nats. |learner's log-probability - generator's|."""
    importance: Annotated[float, sum] = 0.0
    """Truncated importance weights, learner over generator."""
    clipped: Annotated[int, sum] = 0
    """Number of tokens with a clipped policy ratio."""


@dataclass(frozen=True, slots=True)
class CompletionGap:
    """The log-prob gap of a trained completion, e.g. `CompletionGap("train/12/3", 5, 0.004)`."""

    prompt_id: str
    index: int  # of the completion in its group, from 0
    nats: float  # a token: |learner's log-probability - generator's|, mean over the completion's tokens


@dataclass(frozen=True, slots=True)
class LearnerStats(LossSums):
    """A learner rank's figures of one step, e.g. `LearnerStats(tokens=512, loss=0.01, grad_norm=0.3, ...)`.

    `loss` is the mean over the step's optimizer updates.
    """

    entropy: Annotated[float, sum] = 0.0
    """Nats. Entropy of the policy's distribution, summed over the same tokens."""
    logprob_gaps: Annotated[tuple[CompletionGap, ...], joined] = ()
    """Of each trained completion, in any order."""
    grad_norm: Annotated[float, max] = 0.0
    """L2 norm of the whole gradient before clipping, the largest of the step's updates. Equal on all ranks."""
    learning_rate: Annotated[float, max] = 0.0
    """Learning rate of the step. Equal on all ranks."""
    updates: Annotated[int, max] = 0
    """Optimizer updates of the step, those that were skipped among them. Equal on all ranks."""
    skipped: Annotated[int, max] = 0
    """Optimizer updates skipped because the loss or the gradient was not finite. Equal on all ranks."""
    not_finite: Annotated[tuple[str, ...], all_of] = ()
    """`prompt_id (image_id)` of the prompts in micro-batches whose own loss was not finite."""
    finite_weights: Annotated[bool, all] = True
    """False if a weight of the policy is infinite or not a number, in BF16, after the step's updates."""
    memory_gib: Annotated[float, max] = 0.0
    """GiB. Peak memory: of a GPU in this step, of a CPU process since its start."""
    activation_gib: Annotated[float | None, largest] = None
    """GiB, GPU only. The step's share of that peak: activations, gradients and, in the first step, Adam's moments."""


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """The weights that a generator serves, e.g. `WeightRecord(13, received=0x9F86D081, loaded=0x1B4F0E98)`."""

    version: int
    received: int  # digest of all tensors in BF16, as received
    loaded: int  # digest of the engine's own parameters


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A rank's file of a checkpoint that is on the disk, e.g. `WrittenFile("shard-00001-....safetensors", 12_000_000,
    "9f86d081...", updates=40, seconds=14.2)`."""

    name: str
    bytes: int
    sha256: str
    updates: int  # that the optimizer has made
    seconds: float  # that writing took
