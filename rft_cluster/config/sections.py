"""The sections of a configuration: every key with its type, its range, its default and what it means."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rft_cluster.common.hardware import native_dtype
from rft_cluster.config.base import FilePath, PathText, Section

Decay = Annotated[float, Field(ge=0, lt=1)]
DEFAULT_REWARDS = {"format": 1.0, "accuracy": 1.0}
# Ranges end where a number can only be a slip, or a stranger's: before memory is taken for it.
MOST_PIXELS = 16_384 * 28 * 28  # what Qwen2-VL's own processor allows an image
MOST_TOKENS = 1_048_576
MOST_DECODED = 2_000_000_000  # pixels of a picture as it lies on disk
MOST_BYTES = 4_000_000_000  # of a picture's file
MOST_IMAGES = 100_000_000
MOST_STEPS = 100_000_000
MOST_ACTORS = 10_000
MOST_GIB = 16_384
MOST_SECONDS = 30 * 86_400.0
Level = Annotated[int, Field(ge=-65_536, le=65_535)]  # of 16 bits, signed or not
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder is `folder/name`."""
    folder: FilePath = Path("runs")
    seed: int = Field(0, ge=0, lt=2**32)
    """Everything random hangs on it: the choice of images, their order, each completion, the tiny model."""
    sinks: list[str] = Field([])
    """Functions of your own that get every step's figures, by dotted path: `[my_module:dashboard]` (docs/metrics.md).
    They may change when a run is resumed."""


class LoraSection(Section):
    """Train low-rank adapters of the language model's linear layers instead of the weights (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: int = Field(32, ge=1, le=65_536)
    """An adapter's output is scaled by alpha / rank."""


class ModelSection(Section):
    path: PathText
    """A Qwen2-VL folder or hub name, or `tiny`: a small one built here for the configured data set."""
    freeze_vision: bool = False
    lora: LoraSection | None = None
    """Generators get the merged weights, by the same transfer; the export is merged, too."""
    min_pixels: int = Field(56 * 56, ge=28 * 28, le=MOST_PIXELS)
    max_pixels: int = Field(401_408, ge=28 * 28, le=MOST_PIXELS)
    """An image is resized to lie between the two; 28x28 pixels make one token."""
    max_prompt_tokens: int = Field(1024, ge=16, le=MOST_TOKENS)
    """With the image's tokens. A longer prompt is refused, never cut."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _pixels_in_order(self) -> "ModelSection":
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self


class DataSection(Section):
    source: str
    """`digits` (built in), `folder` (a sub-folder of images for each class), `csv` (a table of images and labels),
    `huggingface` (a data set of the hub or on disk), `flower102` (the official archive of Oxford 102 Flowers), or a
    function's dotted path."""
    path: FilePath | None = None
    """The folder; for `csv` the table or the folder that holds it; for `huggingface` a folder, a parquet file or a
    name on the hub, e.g. `laolao77/ViRFT_CLS_flower_4_shot`."""
    images: FilePath | None = None
    """For `csv` only: the folder with the pictures, where they do not lie beside or below the table."""
    image_column: str | None = None
    label_column: str | None = None
    """Both for `csv` and `huggingface`. Left out, they are guessed where only one column can be meant."""
    splits: dict[Literal["train", "validation", "test"], str] = Field({})
    """What a source calls its splits, where it does not say train, validation and test in one of the usual ways:
    folders (`folder`), splits (`huggingface`) or values of the split column (`csv`)."""
    held_out: FilePath | None = None
    """For `huggingface` only: an official Flower102 archive, from which the validation and test images are drawn
    when the set has only images to train on."""
    classes: list[str] | None = None
    """The label set. Left out, it is what the source holds. Names of integer labels are given here as well."""
    only: list[str] | None = None
    """Classes to use; images of the others are left out."""
    strip_prefix: bool = False
    """Leave out the number or code that every class name begins with: `001.Black_footed_Albatross`."""
    aliases: dict[str, list[str]] = Field({})
    """Other names of a label that are as right as it, e.g. `{t-shirt: [tee]}`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """With `error` all images that cannot be used are listed and nothing starts; with `skip` they are left out."""
    on_conflict: Literal["error", "skip"] = "error"
    """The same picture under two labels: `error` lists all of them, `skip` leaves out every copy."""
    max_pixels: int = Field(89_478_485, ge=28 * 28, le=MOST_DECODED)
    max_bytes: int = Field(50_000_000, ge=1, le=MOST_BYTES)
    """Larger pictures are refused before they are decoded, which takes up to 4 bytes a pixel."""
    sixteen_bit: Literal["auto", "full"] | tuple[Level, Level] = "auto"
    """What becomes black and white of pictures with 16 bits a channel. `auto`: the powers of two that hold all values
    of the set. `full`: 0 and 65535. Or two values, e.g. `[-160, 240]`, a window of a CT."""
    manifest: FilePath | None = None
    """The `manifest.json` of an earlier run, to use exactly its images. `shots`, `validation` and `test` then follow
    from it."""
    shots: int = Field(4, ge=1, le=MOST_IMAGES)
    """Labelled images a class to learn from."""
    validation: int = Field(200, ge=0, le=MOST_IMAGES)
    """Images for the curves during training, drawn from what is left."""
    test: int = Field(500, ge=0, le=MOST_IMAGES)
    """Images for the figures before and after, used for nothing else. 0: train without measuring."""
    folds: int = Field(0, ge=0, le=100)
    """Cross-validation, for sets too small for test images of their own: so many trainings one after the other, each
    tested on its share of all images, so that every image is tested once. 0: none. `test` is not used then."""
    fold: int = Field(0, ge=0, le=100)
    """Which of the folds is tested, from 1. 0: all of them, in turn."""

    @field_validator("path", "images", "held_out", "manifest", mode="before")
    @classmethod
    def _no_url(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError("nothing is fetched from a URL: download it, or name a set on the hub as owner/name")
        return value

    @model_validator(mode="after")
    def _keys_have_a_reader(self) -> "DataSection":
        built_in = ("digits", "folder", "csv", "huggingface", "flower102")
        readers = {"held_out": ["huggingface"], "images": ["csv"], "splits": ["folder", "csv", "huggingface"]}
        given = {"held_out": self.held_out, "images": self.images, "splits": self.splits or None}
        for key, value in given.items():
            if value is not None and self.source in built_in and self.source not in readers[key]:
                sources = " and ".join(readers[key])
                raise ValueError(f"{key} is for source {sources} only, source is {self.source}: leave it out")
        return self

    @model_validator(mode="after")
    def _numbers_agree(self) -> "DataSection":
        if self.folds == 1 or self.fold > self.folds:
            raise ValueError(f"folds is {self.folds} and fold {self.fold}: folds must be 2 or more, fold at most that")
        if isinstance(self.sixteen_bit, tuple) and self.sixteen_bit[0] >= self.sixteen_bit[1]:
            raise ValueError(f"sixteen_bit is {list(self.sixteen_bit)}: black must be below white")
        return self


class PromptSection(Section):
    template: PathText = "think_answer"
    """A file in `rft_cluster/prompts/`, a path, or `problem`: the question that the data set itself brings."""
    subject: str = "object"
    """What the images show, e.g. `flower`: the template asks for the class of it."""


class SamplingSection(Section):
    group_size: int = Field(8, ge=2, le=1024)
    temperature: float = Field(1.0, gt=0, le=2)
    max_tokens: int = Field(256, ge=1, le=MOST_TOKENS)
    top_k: int = Field(0, ge=0, le=10_000_000)
    """Sample from the k likeliest tokens; 0 is off. The published recipe had 50, Hugging Face's default. The
    generators' log-probabilities are then those of the truncated distribution and the learners' are not, so it goes
    only with `algorithm.importance_cap: null`."""


class ScoringSection(Section):
    time_limit: float = Field(10.0, gt=0, le=MOST_SECONDS)
    """Seconds for one call of a reward function of your own. Past it the completion has no reward: it is masked."""
    max_concurrent: int = Field(32, ge=1, le=65_536)
    """Completions on which a reward function of your own works at once: the calls of an `async` one, the batch of one
    that takes `(prompts, completions)`. Any other is called once at a time."""
    failure_budget: float = Field(0.1, ge=0, lt=1)
    """Share of a step's completions that may be without a reward; more stops the run."""
    red_team: Literal["refuse", "warn", "off"] = "refuse"
    """Before training the rewards are tried against answers that know nothing of the image, and against answers that do
    as the question says. Where one of the former pays, or none of the latter: `refuse` to train, or `warn` and go on;
    `off` does not try. See docs/rewards.md."""
    red_team_calls: int = Field(1000, ge=100, le=100_000_000)
    """Completions, at most, on which that trial asks a reward function of your own, since a judge may be slow or cost
    money. With many classes it then tries fewer of them."""


class AlgorithmSection(Section):
    total: str = "weighted_sum"
    """How a completion's rewards become the number that its advantage is computed from: `weighted_sum`,
    `normalised_sum` (each reward first brought to mean 0 and deviation 1 in its group), or a function's dotted path."""
    advantage: str = "grpo"
    """How good a completion is beside its group: `grpo` (deviations from the mean, in standard deviations), `dr_grpo`
    (without the division), `rloo` (from the mean of the others), `gpg` (as `dr_grpo`, scaled up by the share of groups
    whose rewards are equal), or a function's dotted path."""
    normaliser: str = "completion"
    """Which mean over tokens the loss is: `completion` (over each completion's tokens, then over completions), `token`
    (over all tokens of the step), `constant` (the sum by `sampling.max_tokens`, then over completions), or a function's
    dotted path."""
    kl_beta: float = Field(0.04, ge=0, le=1000)
    """Weight of the KL to the starting model. 0 keeps no reference model."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0, le=1000)
    importance_cap: float | None = Field(2.0, gt=0, le=1_000_000)
    """Cap of the learner-to-generator importance weight; null turns the correction off."""
    updates_per_step: int = Field(1, ge=1, le=10_000)
    """Optimizer updates on each step's completions. With 1 the policy ratio is 1 and clipping does nothing."""


class OptimizerSection(Section):
    learning_rate: float = Field(1e-6, gt=0, le=10)
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Linear warm-up; after it, linear decay towards 0, which the step after the last one would have."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, le=1000)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)


class ScheduleSection(Section):
    steps: int = Field(ge=1, le=MOST_STEPS)
    prompts_per_step: int = Field(ge=1, le=1_000_000)
    max_staleness: int = Field(0, ge=0, le=10_000)
    """Steps that the policy may be ahead of the weights which wrote a completion's oldest token; with
    `algorithm.updates_per_step` U these are U times as many updates. 0: generators and learners take turns. 1: they
    write the next step's completions while the learners work on this one's. More evens out steps of different
    lengths. Above 0 an update may fall into running completions: a run is not reproducible bit for bit then."""
    evaluate_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between evaluations on the validation images, which the last step has, too; 0 for none."""
    save_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between checkpoints; 0: by the clock. The last step always saves one."""
    save_minutes: float = Field(10.0, gt=0, le=MOST_STEPS)
    """With save_every 0, minutes between checkpoints. More, where writing them would take over 2 % of the time."""
    stop_when_stuck: int = Field(5, ge=0, le=MOST_STEPS)
    """Steps in a row in which no completion has the format any more, or all rewards are equal and not the best there
    are: then the run saves a checkpoint and ends with exit code 2. 0: it goes on. Equal rewards count only from 10
    completions a class on, since few wrong answers may be bad luck."""
    keep_checkpoints: int = Field(1, ge=1, le=MOST_STEPS)


class GeneratorsSection(Section):
    count: int = Field(1, ge=1, le=MOST_ACTORS)
    cpus: float = Field(1, ge=0, le=4096)
    gpus: float = Field(0, ge=0, le=64)
    """For each generator, so its tensor-parallel size on GPUs."""
    max_concurrent: int = Field(256, ge=1, le=65_536)
    """Completions that an engine works on at once. Prompts beyond it go to the generator that has room first."""
    kv_cache_gib: int = Field(1, ge=1, le=MOST_GIB)
    """CPU only: memory for keys and values."""
    gpu_memory: float = Field(0.85, gt=0, le=1)
    """GPU only: the share of a GPU's memory that the engine may take."""


class LearnersSection(Section):
    count: int = Field(1, ge=1, le=MOST_ACTORS)
    cpus: float = Field(1, ge=0, le=4096)
    gpus: float = Field(0, ge=0, le=64)
    micro_batch_tokens: int = Field(4096, ge=1, le=100_000_000)
    """Tokens in one forward of one rank: prompts, each once, and their completions. A larger group is divided."""
    prompt_cache_gib: float = Field(1, ge=0, le=MOST_GIB)
    """Memory of each rank for images that are ready for the model, so that each is decoded once, not every epoch."""
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    """GPU only: keep masters, gradients and optimizer state in host memory."""


class ClusterSection(Section):
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What layers compute in. `auto`: BF16 on GPUs, and on processors that have BF16 instructions; else FP32. Masters
    are FP32, and weights travel and are exported in BF16, in either case."""
    address: str | None = None
    """A running Ray cluster (`auto` finds it). Left out: RAY_ADDRESS, and without that a local one is started."""
    interface: str | None = None
    """Network interface between hosts. Left out: the one that bears the address Ray gave a host."""
    start_timeout: float = Field(600, gt=0, le=MOST_SECONDS)
    """Seconds until every actor must be ready."""
    step_timeout: float = Field(1800, gt=0, le=MOST_SECONDS)
    """Seconds that any one call to an actor may take."""

    @property
    def joins(self) -> str | None:
        """The address of the running cluster that is joined; without one Ray is started on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS")

    @model_validator(mode="before")
    @classmethod
    def _auto_is_decided_here(cls, values: Any) -> Any:
        """Once for all roles, so that they agree, and the run's record has it."""
        if isinstance(values, dict) and values.get("dtype", "auto") == "auto":
            return {**values, "dtype": native_dtype(values.get("device", "cuda"))}
        return values


class Config(Section):
    run: RunSection
    model: ModelSection
    data: DataSection
    prompt: PromptSection = PromptSection()
    sampling: SamplingSection = SamplingSection()
    rewards: dict[str, Weight] = Field(DEFAULT_REWARDS, min_length=1)
    """Reward functions with their weights: a name in `rft_cluster/rewards/`, or a function's dotted path."""
    scoring: ScoringSection = ScoringSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    generators: GeneratorsSection = GeneratorsSection()
    learners: LearnersSection = LearnersSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _roles_agree_with_the_device(self) -> "Config":
        for name, role in (("generators", self.generators), ("learners", self.learners)):
            if self.cluster.device == "cuda" and role.gpus == 0:
                raise ValueError(f"{name}.gpus is 0 but cluster.device is cuda: give each of the {name} a GPU")
            if role.gpus > 1 and role.gpus % 1:
                raise ValueError(f"{name}.gpus is {role.gpus:g}: below 1 a GPU is shared, above 1 it counts whole GPUs")
            if self.cluster.device == "cpu" and role.gpus:
                raise ValueError(f"{name}.gpus is {role.gpus:g} but cluster.device is cpu: set it to 0")
        if self.sampling.top_k and self.algorithm.importance_cap is not None:
            raise ValueError(
                f"sampling.top_k is {self.sampling.top_k} but algorithm.importance_cap is "
                f"{self.algorithm.importance_cap:g}: the correction compares log-probabilities that top_k makes "
                f"incomparable. Set sampling.top_k=0 or algorithm.importance_cap=null"
            )
        if self.cluster.device == "cuda" and self.cluster.dtype == "float32":
            raise ValueError("cluster.dtype is float32 but cluster.device is cuda: attention there needs bfloat16")
        if self.cluster.device == "cpu" and self.learners.cpu_offload:
            raise ValueError("learners.cpu_offload moves what is on GPUs: it needs cluster.device cuda")
        shared = self.generators.gpus < 1, self.learners.gpus < 1
        if self.cluster.device == "cuda" and any(shared):
            whole = self.generators.gpus + self.learners.gpus <= 1 and self.generators.count == self.learners.count
            if not (all(shared) and whole):
                raise ValueError(
                    f"a GPU is shared by one generator and one learner: with generators.gpus "
                    f"{self.generators.gpus:g} and learners.gpus {self.learners.gpus:g} both must be below 1, add up "
                    f"to 1 at most, and generators.count ({self.generators.count}) must equal learners.count "
                    f"({self.learners.count})"
                )
        if self.shares_gpus and self.schedule.max_staleness:
            raise ValueError(
                f"schedule.max_staleness is {self.schedule.max_staleness}, but generators and learners share GPUs and "
                f"so take turns: set it to 0, or give each a GPU of its own"
            )
        if self.optimizer.warmup_steps >= self.schedule.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below schedule.steps "
                f"({self.schedule.steps})"
            )
        return self

    @property
    def shares_gpus(self) -> bool:
        """A generator and a learner on each GPU: one sleeps while the other works."""
        return self.cluster.device == "cuda" and self.generators.gpus < 1

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def max_model_tokens(self) -> int:
        return self.model.max_prompt_tokens + self.sampling.max_tokens
