"""The configuration with all its sections: every key with its type, range, default and meaning.

The larger sections have files of their own beside this one.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rft_cluster.common.hardware import native_dtype
from rft_cluster.config.base import FilePath, PathText, Section
from rft_cluster.config.bounds import MOST_ACTORS, MOST_GIB, MOST_IMAGES, MOST_SECONDS, MOST_STEPS
from rft_cluster.config.data import AlsoSection, DataSection
from rft_cluster.config.model import ModelSection
from rft_cluster.config.training import AlgorithmSection, OptimizerSection, SamplingSection, ScheduleSection

DEFAULT_REWARDS = {"format": 1.0, "accuracy": 1.0}
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


class PromptSection(Section):
    template: PathText = "think_answer"
    """A file in `rft_cluster/prompts/`, a path, or `problem`: the question that comes with the data set. `closed` and
    `with_labels` list the classes, for each training prompt in another order."""
    subject: str = "object"
    """What the images show, e.g. `flower`. The template asks for its class."""
    options: Literal["all", "own_top_k"] = "all"
    """Which classes a training prompt lists, if the template lists any. `own_top_k`: the right one and those that the
    policy itself answers most often about the image, asked once before the first step (as many completions as an
    epoch). Evaluations list all."""
    top_k: int = Field(5, ge=2, le=1_000_000)
    """With `options: own_top_k`: how many classes a training prompt lists."""


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


class EvaluationSection(Section):
    encoder: FilePath | None = None
    """The folder of an image encoder (SigLIP2, DINOv3, ...), as transformers saves it, for `baselines: [encoder]`: the
    nearest image and a linear probe on its vectors. May change when a run is resumed."""
    also: AlsoSection | None = None
    """Another data set whose test images are asked about before and after training: what was forgotten, or carried
    over. E.g. `evaluation.also.source=folder evaluation.also.path=birds evaluation.also.subject=bird`."""


class GeneratorsSection(Section):
    count: int = Field(1, ge=1, le=MOST_ACTORS)
    """Number of vLLM engines, each an actor."""
    min: int | None = Field(None, ge=1, le=MOST_ACTORS)
    """How many generators a run needs: it starts with so many if the cluster has no room for more, and goes on with so
    many when others are lost. The rest join when there is room. Left out: it starts with all, and goes on with one."""
    cpus: float = Field(1, ge=0, le=4096)
    """CPU cores of each generator, for placement, and its threads."""
    gpus: float = Field(0, ge=0, le=64)
    """GPUs of each generator. Whole: its tensor-parallel size. Below 1, as 0.5 here and in `learners.gpus`: each
    generator shares one GPU with one learner, and they take turns; there are as many of both, `generators.min` is left
    out, and `schedule.max_staleness` is 0. On a CPU 0."""
    max_concurrent: int = Field(256, ge=1, le=65_536)
    """Completions that an engine generates at once. Further prompts wait for the first generator with room."""
    kv_cache_gib: int = Field(1, ge=1, le=MOST_GIB)
    """CPU only: memory of the KV cache, in GiB."""
    gpu_memory: float = Field(0.85, gt=0, le=1)
    """GPU only: share of a GPU's memory for the engine."""


class LearnersSection(Section):
    count: int = Field(1, ge=1, le=MOST_ACTORS)
    """Number of FSDP2 ranks, each an actor: they share the weights and the samples of a step."""
    cpus: float = Field(1, ge=0, le=4096)
    """CPU cores of each learner, for placement, and its threads."""
    gpus: float = Field(0, ge=0, le=64)
    """1 on GPUs, below 1 if each shares its GPU with a generator, 0 on a CPU."""
    micro_batch_tokens: int = Field(4096, ge=1, le=100_000_000)
    """Tokens in one micro-batch of a rank: each prompt once, and its completions. A larger group is divided."""
    prompt_cache_gib: float = Field(1, ge=0, le=MOST_GIB)
    """Memory of each rank for encoded images, in GiB, so that each image is encoded once and not every epoch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward: less memory, more time."""
    cpu_offload: bool = False
    """GPU only: keep FP32 master weights, gradients and optimizer state in host memory."""


class ClusterSection(Section):
    device: Literal["cpu", "cuda"] = "cuda"
    """What generators and learners compute on."""
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
    grace_seconds: float = Field(30, gt=0, le=MOST_SECONDS)
    """Seconds that a scheduler gives a run between SIGTERM and the kill. A third is for the step in flight, a third for
    a checkpoint that is being written, a third for a last one. Kubernetes gives 30 by default; where more is given, as
    in `deploy/slurm/rft.sbatch`, large models can be saved. A run that hangs ends by force with the grace if that is
    a minute or more, else after twice as long."""
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
    baselines: list[Literal["base", "base_closed", "sft", "encoder"]] = Field([])
    """What else to compare the trained policy with at the end, beside what needs no language model: `base` (the
    untouched model, same question), `base_closed` (the untouched model, with the classes listed), `sft` (supervised
    fine-tuning on the same images, as many steps: docs/sft.md), `encoder` (`evaluation.encoder`). More may be asked for
    when a run is resumed, even one that is done."""
    evaluation: EvaluationSection = EvaluationSection()
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
            if self.cluster.device == "cpu" and role.cpus == 0:
                raise ValueError(f"{name}.cpus is 0 but cluster.device is cpu: they compute there, so set it above 0")
        if "encoder" in self.baselines and self.evaluation.encoder is None:
            raise ValueError("baselines has encoder, but no folder of one is named: set evaluation.encoder to it")
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
        if self.schedule.max_staleness and not self.algorithm.samples:
            raise ValueError(
                f"schedule.max_staleness is {self.schedule.max_staleness}, but with algorithm.objective sft no "
                f"completion is sampled that could be stale: set it to 0"
            )
        if self.schedule.warm_start and not self.algorithm.samples:
            raise ValueError(
                "schedule.warm_start is SFT before GRPO, but algorithm.objective is sft: leave one of them out"
            )
        if self.schedule.min_live and not self.algorithm.samples:
            raise ValueError(
                f"schedule.min_live is {self.schedule.min_live:g}, but with algorithm.objective sft no "
                f"completions are sampled: set it to 0"
            )
        if self.optimizer.warmup_steps >= self.schedule.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below schedule.steps "
                f"({self.schedule.steps})"
            )
        return self

    @property
    def completions(self) -> int:
        """Completions of each prompt in a step of training."""
        return self.sampling.group_size if self.algorithm.samples else 1

    @property
    def scored(self) -> dict[str, float]:
        """The weights of the rewards that completions of training get."""
        return self.rewards if self.algorithm.samples else {}

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
