"""What flows between the roles: one frozen type for each boundary.

    Example -> Prompt -> Group (of Completions) -> Reward -> advantages -> TrainingSample -> Batch

Each stage returns a new value instead of filling blanks in an old one, so a type says all there is to know at
its boundary. A group owns its completions: no shuffle can separate them. Images travel by reference: a message holds
an `ImageRef`, and each process fetches the encoded image once, by hash (`Images`). `Batch` holds tensors and lives
with the learner, in `learner/collate.py`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Protocol

from rft_cluster.common.reduce import largest


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Names an image, e.g. `ImageRef("rose/a.jpg", "9f86d081...")`.

    `image_id` is unique in its data set and is what people see. `sha256` (64 hex digits) is that of the file, as
    `sha256sum` prints it; under it every process finds the image as it is shown to the model.
    """

    image_id: str
    sha256: str


class Images(Protocol):
    """The encoded images (PNG, JPEG, ...) of a run by `ImageRef.sha256`: a dict, or what fetches them (`cluster/`)."""

    def __getitem__(self, sha256: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled image, e.g. `Example(ImageRef("rose/a.jpg", "9f86d081..."), "rose", aliases=("dog rose",))`.

    `aliases` are other names of the label that are as right as it.
    """

    image: ImageRef
    label: str
    aliases: tuple[str, ...] = ()

    @property
    def example_id(self) -> str:
        """Unique in the data set."""
        return self.image.image_id


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question about an image, e.g. `Prompt("train/12/3", example, "Which flower is this?", seed=1234)`.

    The image comes first in the user's turn, then `text`. `prompt_id` names this asking of the question (split, step,
    index in the step). The seeds of its completions follow from `seed`, 31 bits, so that neither the generator nor the
    order matters.
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
    """How to sample. `group_size` completions at `temperature`; 0 is greedy and needs a `group_size` of 1."""

    group_size: int
    temperature: float
    max_tokens: int
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. `token_ids` ends with the stop token unless `finish_reason` is "length".

    `generator_logprobs` are those of the distribution that was sampled from (tempered, special tokens forbidden),
    in nats, one a token. `policy_version` is the version of the weights that wrote the oldest token; where an update
    fell into the completion, `version_spans` has all of them in order: (version, number of tokens).
    """

    token_ids: list[int]
    generator_logprobs: list[float]
    text: str
    finish_reason: str
    policy_version: int
    version_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its completions. `prompt_token_ids` has the image tokens expanded, as the engine saw them."""

    prompt: Prompt
    prompt_token_ids: list[int]
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Reward:
    """A completion's reward: `parts` by reward name, unweighted; `total` is their weighted sum.

    A reward that failed on the completion is in `failures`, with a short reason, and not in `parts`. Then there is no
    total: the completion is masked, which means that nothing is learned from it. 0 would be a false label.
    """

    total: float | None
    parts: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """All that a learner needs of one completion; the image is fetched by its reference.

    `weight` is that of each of the completion's tokens in the loss. Weights are computed over the whole step before
    it is split, so the loss is a plain sum and no split over ranks changes it.
    """

    prompt: Prompt
    prompt_token_ids: list[int]
    token_ids: list[int]
    generator_logprobs: list[float]
    advantage: float
    weight: float


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over completion tokens that were trained on, e.g. `LossSums(tokens=8, logprob_gap=0.4)`: 0.05 nats a token.

    The function at each field makes one figure of those of several micro-batches, or ranks (`common.reduce`).
    """

    tokens: Annotated[int, sum] = 0
    """How many."""
    loss: Annotated[float, sum] = 0.0
    """Of weight times token loss. Weights add up to a whole loss over an optimizer update."""
    kl: Annotated[float, sum] = 0.0
    """Nats. The k3 estimate of the KL from the starting model; 0 where `algorithm.kl_beta` is."""
    logprob_gap: Annotated[float, sum] = 0.0
    """Nats. |learner's log-probability - generator's|."""
    importance: Annotated[float, sum] = 0.0
    """Of truncated importance weights, learner over generator."""
    clipped: Annotated[int, sum] = 0
    """Tokens whose policy ratio was clipped."""


@dataclass(frozen=True, slots=True)
class LearnerStats(LossSums):
    """What a learner rank says of its share of a step; `loss` is the mean over the step's optimizer updates."""

    entropy: Annotated[float, sum] = 0.0
    """Nats. Sum over the same tokens, of the policy's distribution."""
    grad_norm: Annotated[float, max] = 0.0
    """L2 norm of the whole gradient before clipping, the largest of the step's updates; the same on all ranks."""
    learning_rate: Annotated[float, max] = 0.0
    """The same on all ranks."""
    skipped: Annotated[int, max] = 0
    """Optimizer updates left out because the gradient was not finite; the same on all ranks."""
    memory_gib: Annotated[float, max] = 0.0
    """GiB. Of a GPU the most that was allocated at once in the step, of a CPU process the most in its life."""
    activation_gib: Annotated[float | None, largest] = None
    """GiB. GPU only: how much of that the step itself took, with gradients and, in the first step, Adam's moments."""


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """What a generator says of the weights it serves: their version, and digests of all tensors as they were
    received (on the wire, in BF16) and as they were loaded (the engine's own parameters)."""

    version: int
    received: int
    loaded: int
