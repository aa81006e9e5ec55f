"""What flows between the roles: one frozen type for each boundary.

    Example -> Prompt -> Group (of Completions) -> Reward -> advantages -> TrainingSample -> Batch

Each stage returns a new value instead of filling blanks in an old one, so a type says all there is to know at
its boundary. A group owns its completions: no shuffle can separate them. Images travel once a prompt, as encoded
bytes (PNG or JPEG), never as pixel tensors. `Batch` holds tensors and lives with the learner, in `learner/collate.py`.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled image. `example_id` is unique in its data set, e.g. `Example("digits/17", PNG, "seven")`.

    `aliases` are other names of the label that are as right as it. `sha256` is that of the file, where `image` is not
    its bytes but what they were made into (of a picture with 16 bits a channel, or a huge one); else empty.
    """

    example_id: str
    image: bytes
    label: str
    aliases: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question about an image. The image comes first in the user's turn, then `text`.

    `prompt_id` names this asking of the question, e.g. `"train/12/3"` (split, step, index in the step); the seed
    of its completions follows from `seed`, so that neither the generator nor the order matters.
    """

    prompt_id: str
    example_id: str
    image: bytes
    text: str
    label: str
    seed: int
    aliases: tuple[str, ...] = ()


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
    """A prompt with its completions. `prompt_token_ids` has the image tokens expanded, as the engine saw them.

    The prompt's `image` is empty: who asked has it, and it need not travel back.
    """

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
    """All that a learner needs of one completion, but for the image, which it was given when generation began.

    `weight` is this completion's share of the loss, the same for each of its tokens. Weights are computed over
    the whole step before it is split, so the loss is a plain sum and no split over ranks changes it.
    """

    prompt: Prompt
    prompt_token_ids: list[int]
    token_ids: list[int]
    generator_logprobs: list[float]
    advantage: float
    weight: float
    policy_version: int


@dataclass(frozen=True, slots=True)
class WeightRecord:
    """What a generator says of the weights it serves: their version, and digests of all tensors as they were
    received (on the wire, in BF16) and as they were loaded (the engine's own parameters)."""

    version: int
    received: int | None
    loaded: int | None
