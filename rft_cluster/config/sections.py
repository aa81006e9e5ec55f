"""The sections of a configuration: every key with its type, range, default and meaning."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rft_cluster.common.hardware import native_dtype
from rft_cluster.config.base import FilePath, PathText, Section
from rft_cluster.config.model import MOST_TOKENS, ModelSection

Decay = Annotated[float, Field(ge=0, lt=1)]
DEFAULT_REWARDS = {"format": 1.0, "accuracy": 1.0}
# Upper bounds refuse slips, and a stranger's numbers, before memory is allocated for them.
MOST_DECODED = 2_000_000_000  # pixels of an image file
MOST_BYTES = 4_000_000_000  # size of an image file
MOST_IMAGES = 100_000_000
MOST_STEPS = 100_000_000
MOST_ACTORS = 10_000
MOST_GIB = 16_384
MOST_SECONDS = 30 * 86_400.0
Level = Annotated[int, Field(ge=-65_536, le=65_535)]  # a value of 16 bits, signed or unsigned
Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder is `folder/name`."""
    folder: FilePath = Path("runs")
    seed: int = Field(0, ge=0, lt=2**32)
    """Determines everything random: the choice of images, their order, each completion, the tiny model."""
    sinks: list[str] = Field([])
    """Functions of your own that get every step's figures, by dotted path: `[my_module:dashboard]` (docs/metrics.md).
    They may change when a run is resumed."""


class DataSection(Section):
    source: str
    """`digits` (built in), `folder` (a sub-folder of images for each class), `csv` (a table of images and labels),
    `huggingface` (a data set of the hub or on disk), `flower102` (the official archive of Oxford 102 Flowers, with its
    splits), or a function's dotted path."""
    path: FilePath | None = None
    """The folder; for `csv` the table or the folder that holds it; for `huggingface` a folder, a parquet file or a
    name on the hub, e.g. `laolao77/ViRFT_CLS_flower_4_shot`."""
    images: FilePath | None = None
    """For `csv` only: the folder with the pictures, if they are not beside or below the table."""
    image_column: str | None = None
    label_column: str | None = None
    """Both for `csv` and `huggingface`. Left out, they are guessed if only one column fits."""
    splits: dict[Literal["train", "validation", "test"], str] = Field({})
    """The source's names of the splits, if they are none of the usual words for train, validation and test: folders
    (`folder`), splits (`huggingface`) or values of the split column (`csv`)."""
    held_out: FilePath | None = None
    """For `huggingface` only: an official Flower102 archive. Validation and test images are drawn from it if the set
    has only training images."""
    download: bool = False
    """For `flower102` without `path`, and for `huggingface` without `held_out`: fetch the official Flower102 archive
    (345 MB), once, before any actor starts, to `~/.cache/rft_cluster/flowers102`."""
    classes: list[str] | None = None
    """The label set; left out, that of the source. Also gives names to integer labels."""
    only: list[str] | None = None
    """Classes to use. Images of other classes are left out."""
    strip_prefix: bool = False
    """Remove the number or code at the start of every class name: `001.Black_footed_Albatross`."""
    aliases: dict[str, list[str]] = Field({})
    """Other correct names of a label, e.g. `{t-shirt: [tee]}`."""
    on_bad_image: Literal["error", "skip"] = "error"
    """`error`: list all unusable images and do not start. `skip`: leave them out."""
    on_conflict: Literal["error", "skip"] = "error"
    """For pictures with two labels. `error`: list all of them and do not start. `skip`: leave out every copy."""
    max_pixels: int = Field(89_478_485, ge=28 * 28, le=MOST_DECODED)
    max_bytes: int = Field(50_000_000, ge=1, le=MOST_BYTES)
    """Larger images are refused before they are decoded. Decoding takes up to 4 bytes a pixel."""
    sixteen_bit: Literal["auto", "full"] | tuple[Level, Level] = "auto"
    """The values shown as black and white, for pictures with 16 bits a channel. `auto`: powers of two that enclose all
    values of the set. `full`: 0 and 65535. Or two values, e.g. `[-160, 240]`, a window of a CT."""
    manifest: FilePath | None = None
    """The `manifest.json` of an earlier run, whose images are used. Replaces `shots`, `validation` and `test`."""
    shots: int = Field(4, ge=1, le=MOST_IMAGES)
    """Labelled images a class to learn from."""
    validation: int = Field(200, ge=0, le=MOST_IMAGES)
    """Images for evaluations during training, drawn from the rest."""
    test: int = Field(500, ge=0, le=MOST_IMAGES)
    """Images for the evaluations before and after training, and for nothing else. 0: none are made."""
    folds: int = Field(0, ge=0, le=100)
    """Number of folds for cross-validation, for sets too small for a test split: one training a fold, each tested on
    its own share of all images. Replaces `test`. 0: no cross-validation."""
    fold: int = Field(0, ge=0, le=100)
    """The fold to test, from 1. 0: all folds, one after the other."""

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
        readers["download"] = ["huggingface", "flower102"]
        given: dict[str, Any] = {"held_out": self.held_out, "images": self.images, "splits": self.splits or None}
        given["download"] = self.download or None
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
    """A file in `rft_cluster/prompts/`, a path, or `problem`: the question that comes with the data set. `closed` and
    `with_labels` list the classes, for each training prompt in another order."""
    subject: str = "object"
    """What the images show, e.g. `flower`. The template asks for its class."""


class SamplingSection(Section):
    group_size: int = Field(8, ge=2, le=1024)
    temperature: float = Field(1.0, gt=0, le=2)
    max_tokens: int = Field(256, ge=1, le=MOST_TOKENS)
    top_k: int = Field(0, ge=0, le=10_000_000)
    """Sample from the k likeliest tokens; 0: from all. The published recipe had 50, Hugging Face's default. Generators
    then return log-probabilities of the truncated distribution and learners of the full one, so this needs
    `algorithm.importance_cap: null`."""


class ScoringSection(Section):
    time_limit: float = Field(10.0, gt=0, le=MOST_SECONDS)
    """Seconds for one call of your own reward function. A completion that takes longer has no reward: it is masked."""
    load_limit: float = Field(300.0, gt=0, le=MOST_SECONDS)
    """Seconds for the import of your own reward function's module, which may load a model."""
    max_concurrent: int = Field(32, ge=1, le=65_536)
    """Completions that your own reward function scores at once: concurrent calls of an `async` function, or the batch
    of one that takes `(prompts, completions)`. Any other function gets one call at a time."""
    failure_budget: float = Field(0.1, ge=0, lt=1)
    """Largest share of a step's completions without a reward; more stops the run."""
    red_team: Literal["refuse", "warn", "off"] = "refuse"
    """Before training, try the rewards on answers that ignore the image, and on answers that follow the question. If
    one of the former earns, or none of the latter: `refuse` to train, or `warn` and go on. `off`: do not try. See
    docs/rewards.md."""
    red_team_calls: int = Field(1000, ge=100, le=100_000_000)
    """The most completions that the red team lets your own reward function score: a judge may be slow or cost money. A
    low number means that fewer classes are tried."""


class AlgorithmSection(Section):
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
    """Weight of the KL to the starting model. 0: no reference model is loaded."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0, le=1000)
    importance_cap: float | None = Field(2.0, gt=0, le=1_000_000)
    """Cap of the learner-to-generator importance weight. null: no correction."""
    updates_per_step: int = Field(1, ge=1, le=10_000)
    """Optimizer updates on each step's completions. With 1 the policy ratio is 1, so clipping has no effect."""


class OptimizerSection(Section):
    learning_rate: float = Field(1e-6, gt=0, le=10)
    warmup_steps: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps of linear warm-up, followed by linear decay that would reach 0 one step after the last."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0, le=1000)
    max_grad_norm: float = Field(1.0, gt=0, le=1e9)


class ScheduleSection(Section):
    steps: int = Field(ge=1, le=MOST_STEPS)
    prompts_per_step: int = Field(ge=1, le=1_000_000)
    max_staleness: int = Field(0, ge=0, le=10_000)
    """How many steps the policy may be ahead of the weights that wrote a completion's first token; with
    `algorithm.updates_per_step` U, times U updates. 0: generators and learners take turns. 1: generators write the next
    step's completions while the learners train on this step's. Higher values even out steps of different lengths. Above
    0 weights may change within a completion, so a run is not reproducible bit for bit."""
    evaluate_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between evaluations on the validation images; the last step has one, too. 0: none."""
    save_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between checkpoints. 0: by time, see `save_minutes`. The last step always saves one."""
    save_minutes: float = Field(10.0, gt=0, le=MOST_STEPS)
    """Minutes between checkpoints if `save_every` is 0. Longer if writing would take more than 2 % of the time."""
    stop_when_stuck: int = Field(5, ge=0, le=MOST_STEPS)
    """After this many consecutive steps without anything to learn the run saves a checkpoint and ends with exit code 2.
    Nothing to learn: no completion has the format any more, all rewards are equal and below the best, or the gradient
    is not finite. Equal rewards count only with at least 10 completions a class; fewer may be bad luck. 0: the run goes
    on."""
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS)
    """Checkpoints on disk. If the newest is damaged when the run resumes, the one before is taken."""


class GeneratorsSection(Section):
    count: int = Field(1, ge=1, le=MOST_ACTORS)
    min: int | None = Field(None, ge=1, le=MOST_ACTORS)
    """How many generators a run needs: it starts with so many if the cluster has no room for more, and goes on with so
    many when others are lost. The rest join when there is room. Left out: it starts with all, and goes on with one."""
    cpus: float = Field(1, ge=0, le=4096)
    gpus: float = Field(0, ge=0, le=64)
    """GPUs of each generator: its tensor-parallel size."""
    max_concurrent: int = Field(256, ge=1, le=65_536)
    """Completions that an engine generates at once. Further prompts wait for the first generator with room."""
    kv_cache_gib: int = Field(1, ge=1, le=MOST_GIB)
    """CPU only: memory of the KV cache, in GiB."""
    gpu_memory: float = Field(0.85, gt=0, le=1)
    """GPU only: share of a GPU's memory for the engine."""


class LearnersSection(Section):
    count: int = Field(1, ge=1, le=MOST_ACTORS)
    cpus: float = Field(1, ge=0, le=4096)
    gpus: float = Field(0, ge=0, le=64)
    micro_batch_tokens: int = Field(4096, ge=1, le=100_000_000)
    """Tokens in one micro-batch of a rank: each prompt once, and its completions. A larger group is divided."""
    prompt_cache_gib: float = Field(1, ge=0, le=MOST_GIB)
    """Memory of each rank for encoded images, in GiB, so that each image is encoded once and not every epoch."""
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    """GPU only: keep FP32 master weights, gradients and optimizer state in host memory."""


class ClusterSection(Section):
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The type that layers compute in. `auto`: BF16 on GPUs and on processors with BF16 instructions, else FP32. In
    either case master weights are FP32, and weights are transferred and exported in BF16."""
    address: str | None = None
    """Address of a running Ray cluster, or `auto` to find it. Left out: RAY_ADDRESS, else Ray is started locally."""
    interface: str | None = None
    """Network interface between hosts. Left out: the one with the address that Ray uses for a host."""
    start_timeout: float = Field(600, gt=0, le=MOST_SECONDS)
    """Seconds within which every actor must be ready, once its node has the model."""
    step_timeout: float = Field(1800, gt=0, le=MOST_SECONDS)
    """Seconds that a single call to an actor may take, and a weight update with its verification. An actor that takes
    longer counts as lost."""
    restarts: int = Field(3, ge=0, le=1000)
    """How often lost actors are replaced without a new step between. When they are used up, the run ends with exit code
    3."""
    snapshot_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between snapshots of the learners' state in memory, from which new learners go on after a loss. 0: they go
    on from the last checkpoint, as they always do if generators and learners share GPUs. `python -m rft_cluster.plan`
    says what snapshots take."""

    @property
    def joins(self) -> str | None:
        """The address of the running cluster to join; None if Ray is to be started on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS")

    @model_validator(mode="before")
    @classmethod
    def _auto_is_decided_here(cls, values: Any) -> Any:
        """Resolve `auto` once for all roles, so that they agree and the run's record has the result."""
        if isinstance(values, dict) and values.get("dtype", "auto") == "auto":
            return {**values, "dtype": native_dtype(values.get("device", "cuda"))}
        return values


class DebugSection(Section):
    rollouts: int | None = Field(None, ge=0, le=MOST_IMAGES)
    """Images of each step whose completions are shown in the terminal, with rewards, advantages and why each reward was
    given. They are drawn from (`run.seed`, step). Left out: 4 with DEBUG_MODE=true in the environment, else 0. May
    change when a run is resumed."""

    @property
    def shown(self) -> int:
        """How many images to show."""
        if self.rollouts is None:
            return 4 if os.environ.get("DEBUG_MODE", "").lower() == "true" else 0
        return self.rollouts


class Config(Section):
    run: RunSection
    model: ModelSection
    data: DataSection
    prompt: PromptSection = PromptSection()
    sampling: SamplingSection = SamplingSection()
    rewards: dict[str, Weight] = Field(DEFAULT_REWARDS, min_length=1)
    """Weights of reward functions by name: one in `rft_cluster/rewards/`, or a function's dotted path."""
    tracking: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"])
    """Who shows the run: `tensorboard` (`tensorboard --logdir runs`; docs/watching.md), and `wandb`, which sends
    figures, settings and some images to Weights & Biases. `[]`: nobody. It may change when a run is resumed."""
    scoring: ScoringSection = ScoringSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    generators: GeneratorsSection = GeneratorsSection()
    learners: LearnersSection = LearnersSection()
    cluster: ClusterSection = ClusterSection()
    debug: DebugSection = DebugSection()

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
            raise ValueError("learners.cpu_offload moves data from GPUs: it needs cluster.device cuda")
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
        if (least := self.generators.min) and (least > self.generators.count or self.shares_gpus):
            why = "generators share GPUs with learners, one each" if self.shares_gpus else "it must be at most that"
            raise ValueError(f"generators.min is {least} and generators.count {self.generators.count}: {why}")
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
        """True if each GPU has a generator and a learner: one sleeps while the other works."""
        return self.cluster.device == "cuda" and self.generators.gpus < 1

    @property
    def run_folder(self) -> Path:
        return self.run.folder / self.run.name

    @property
    def max_model_tokens(self) -> int:
        return self.model.max_prompt_tokens + self.sampling.max_tokens
