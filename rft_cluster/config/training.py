"""The sections of a training: what is sampled, what an update does, and how many there are."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rft_cluster.config.base import Section
from rft_cluster.config.bounds import LAST_STEP, MOST_STEPS, MOST_TOKENS, MOST_TOP_K

Decay = Annotated[float, Field(ge=0, lt=1)]


class SamplingSection(Section):
    group_size: int = Field(8, ge=2, le=1024)
    """Completions of each prompt in training: a group. An advantage compares a completion with its group."""
    temperature: float = Field(1.0, gt=0, le=2)
    """Of sampling in training, and for votes. 1 is the policy's own distribution."""
    max_tokens: int = Field(256, ge=1, le=MOST_TOKENS)
    """Tokens of a completion at most; a longer one is cut, and earns no reward for its format."""
    top_k: int = Field(0, ge=0, le=MOST_TOP_K)
    """Sample from the k likeliest tokens; 0: from all. The published recipe had 50, Hugging Face's default. Generators
    then return log-probabilities of the truncated distribution and learners of the full one, so this needs
    `algorithm.importance_cap: null`."""


class AlgorithmSection(Section):
    objective: Literal["grpo", "sft"] = "grpo"
    """What an update does. `grpo`: completions that the policy has sampled become likelier or less likely, by their
    rewards. `sft`: the right answer becomes likelier, in the layout that the question asks for and with an empty block
    for reasoning (docs/sft.md): nothing is sampled or scored in a step. Of this section only `normaliser` and
    `updates_per_step` count then, and `kl_beta` is 0."""
    total: str = "weighted_sum"
    """How a completion's rewards become the number that its advantage is computed from: `weighted_sum`,
    `normalised_sum` (each reward first brought to mean 0 and deviation 1 in its group), or a function's dotted path."""
    advantage: str = "grpo"
    """How good a completion is beside its group: `grpo` (deviations from the mean, in standard deviations), `dr_grpo`
    (without the division), `rloo` (from the mean of the others), `gpg` (as `dr_grpo`, divided by the share of groups
    whose rewards differ), or a function's dotted path."""
    normaliser: str = "completion"
    """Which mean over tokens the loss is: `completion` (over each completion's tokens, then over completions), `token`
    (over all tokens of the step), `constant` (the sum by `sampling.max_tokens`, then over completions), or a function's
    dotted path."""
    kl_beta: float = Field(0.04, ge=0, le=1000)
    """Weight of the KL to the starting model. 0: no reference model is loaded. With `objective: sft` it is 0 if left
    out, and must be."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio of new to old policy is clipped to 1 - `clip_low` and 1 + `clip_high` (with `updates_per_step` above
    1)."""
    clip_high: float = Field(0.2, gt=0, le=1000)
    importance_cap: float | None = Field(2.0, gt=0, le=1_000_000)
    """Cap of the learner-to-generator importance weight. null: no correction."""
    updates_per_step: int = Field(1, ge=1, le=10_000)
    """Optimizer updates on each step's completions, no more than there are completions to train on. With 1 the policy
    ratio is 1, so clipping has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _sft_has_no_kl(cls, values: Any) -> Any:
        """The default of `kl_beta` is GRPO's. An estimate of the KL needs completions that the policy has sampled."""
        if isinstance(values, dict) and values.get("objective") == "sft":
            return {"kl_beta": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _agrees_with_its_objective(self) -> "AlgorithmSection":
        if self.objective == "sft" and self.kl_beta:
            raise ValueError(
                f"kl_beta is {self.kl_beta:g} but objective is sft, whose completions the policy has not sampled, so "
                f"that they do not estimate a KL: set algorithm.kl_beta=0"
            )
        return self

    @property
    def samples(self) -> bool:
        """Whether a step learns from completions that the policy has sampled, and from their rewards."""
        return self.objective == "grpo"


class OptimizerSection(Section):
    learning_rate: float = Field(1e-6, gt=0, le=10)
    """At its highest, after the warm-up. For `objective: sft`, too."""
    sft_learning_rate: float | None = Field(None, gt=0, le=10)
    """Learning rate of `baselines: [sft]` and of `schedule.warm_start`; left out: `learning_rate`. Usual is ten times
    that: 1e-5 for full models, and 1e-6 in reinforcement learning."""
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps of linear warm-up, followed by linear decay that would reach 0 one step after the last."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0, le=1000)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)
    """Gradients of an update are scaled down to this norm."""


class WarmStartSection(Section):
    """Supervised fine-tuning on the same images before GRPO (docs/sft.md)."""

    steps: int = Field(ge=1, le=LAST_STEP)
    """Steps of SFT, each of `prompts_per_step` images, at `optimizer.sft_learning_rate`."""


class ScheduleSection(Section):
    steps: int = Field(ge=1, le=LAST_STEP)
    """Steps of training; 8 passes over the images are 8 x images / `prompts_per_step`."""
    prompts_per_step: int = Field(ge=1, le=1_000_000)
    """Images in a step; a step has `sampling.group_size` times as many completions."""
    max_staleness: int = Field(0, ge=0, le=10_000)
    """How many steps the policy may be ahead of the weights that wrote a completion's first token; with
    `algorithm.updates_per_step` U, times U updates. 0: generators and learners take turns. 1: generators write the next
    step's completions while the learners train on this step's. Higher values even out steps of different lengths. Above
    0 weights may change within a completion, so a run is not reproducible bit for bit. Not with shared GPUs."""
    warm_start: WarmStartSection | None = None
    """`{steps: 40}`: so many steps of SFT come first. GRPO, and its KL, start from that policy if it answers more
    validation images right than the untouched model, and else from the untouched model."""
    min_live: float = Field(0, ge=0, le=1)
    """Live groups that a step is to have, as a share of `prompts_per_step`. While it has fewer, as many further prompts
    are drawn and asked about, at most three times: a step may take four times the completions. Groups that are not live
    still count in the loss's means. 0: no further prompts."""
    evaluate_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between evaluations on the validation images; the last step has one, too. 0: none."""
    save_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between checkpoints; others are saved by time, see `save_minutes`. 0: by time alone. The last step always
    saves one."""
    save_minutes: float = Field(10.0, gt=0, le=MOST_STEPS)
    """Minutes from one checkpoint to the next at most. Longer if writing would take more than 2 % of the time."""
    stop_when_stuck: int = Field(5, ge=0, le=MOST_STEPS)
    """After this many consecutive steps without anything to learn the run saves a checkpoint and ends with exit code 2.
    Nothing to learn: no completion has the format any more, all rewards are equal and below the best, or the gradient
    is not finite. Equal rewards count only with at least 10 completions a class; fewer may be bad luck. 0: the run goes
    on."""
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS)
    """Checkpoints on disk, whatever they were due by. If the newest is damaged when the run resumes, the one before is
    taken."""
