"""What to change if a run does not fit: settings that make it fit, the one that costs least time first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rft_cluster.config import Config, LoraSection
from rft_cluster.plan.estimate import Plan
from rft_cluster.plan.memory import GIB

# What is tried: factors of `learners.micro_batch_tokens`, and of `generators.gpu_memory`.
ROWS, ENGINES = (0.75, 0.5, 0.25), (0.75, 0.5, 1.25, 1.5, 2.0)
MOST_OF_A_GPU = 0.92
LEAST_ROW = 256  # tokens; smaller rows would hold no prompt
LISTED = 3


@dataclass(frozen=True)
class Change:
    """Overrides as the user would type them, and the configuration that they make."""

    overrides: str
    config: Config
    learns_less: bool = False
    """The result is another one: fewer weights are trained."""


@dataclass(frozen=True)
class Cure:
    """A change that makes a run fit, and what it takes then: seconds a step, GiB of the fullest memory."""

    overrides: str
    seconds: float
    gib: float
    learns_less: bool


def cures(config: Config, plan_of: Callable[[Config], Plan]) -> list[Cure]:
    """The changes that make the run fit: first those that train the same, by the time of a step."""
    found = []
    for change in changes(config):
        plan = plan_of(change.config)
        if plan.fits:
            found.append(Cure(change.overrides, round(plan.slowest, 3), plan.fullest / GIB, change.learns_less))
    best: list[Cure] = []
    for cure in sorted(found, key=lambda cure: (cure.learns_less, cure.seconds, len(cure.overrides))):
        if not any(_keys(known) <= _keys(cure) for known in best):  # else it changes more than is needed
            best.append(cure)
    return best


def _keys(cure: Cure) -> set[str]:
    return {override.partition("=")[0] for override in cure.overrides.split()}


def changes(config: Config) -> Iterator[Change]:
    """All that is tried: settings of memory alone and together, then adapters."""
    for whole in (Change("", config), *([_adapters(config)] if config.model.lora is None else [])):
        for first in (whole, *_engine_shares(whole)):
            for second in (first, *_checkpointing(first)):
                for third in (second, *_offloading(second)):
                    for change in (third, *_smaller_rows(third)):
                        if change.overrides:
                            yield change


def _changed(change: Change, section: str, **values: object) -> Change:
    """`change` and further values of a section."""
    own = getattr(change.config, section).model_copy(update=values)
    typed = " ".join(f"{section}.{key}={_typed(value)}" for key, value in values.items())
    config = change.config.model_copy(update={section: own})
    return Change(f"{change.overrides} {typed}".strip(), config, change.learns_less)


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _smaller_rows(change: Change) -> list[Change]:
    tokens = change.config.learners.micro_batch_tokens
    sizes = [int(tokens * share) for share in ROWS]
    return [_changed(change, "learners", micro_batch_tokens=size) for size in sizes if size >= LEAST_ROW]


def _checkpointing(change: Change) -> list[Change]:
    if change.config.learners.gradient_checkpointing:
        return []
    return [_changed(change, "learners", gradient_checkpointing=True)]


def _offloading(change: Change) -> list[Change]:
    if change.config.learners.cpu_offload or change.config.cluster.device == "cpu":
        return []
    return [_changed(change, "learners", cpu_offload=True)]


def _engine_shares(change: Change) -> list[Change]:
    """On a CPU an engine's share is `kv_cache_gib`, in whole GiB."""
    if change.config.cluster.device == "cpu":
        cache = change.config.generators.kv_cache_gib
        return [_changed(change, "generators", kv_cache_gib=1)] if cache > 1 else []
    memory = change.config.generators.gpu_memory
    shares = [round(memory * factor, 2) for factor in ENGINES]
    return [_changed(change, "generators", gpu_memory=share) for share in shares if share <= MOST_OF_A_GPU]


def _adapters(config: Config) -> Change:
    lora = LoraSection(rank=64, alpha=128)
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
    return Change("model.lora.rank=64 model.lora.alpha=128 optimizer.learning_rate=1.0e-5", config, learns_less=True)


def advice_lines(config: Config, plan_of: Callable[[Config], Plan]) -> list[str]:
    """What to change, for the user. Of the changes that train the same, and of adapters, the fastest ones."""
    found = cures(config, plan_of)
    if not found:
        return [
            "nothing tried makes it fit (smaller rows, gradient checkpointing, CPU offload, adapters): lower "
            "model.max_image_tokens, raise learners.count, or take a larger card or a smaller model"
        ]
    same = [cure for cure in found if not cure.learns_less][:LISTED]
    less = [cure for cure in found if cure.learns_less][: 1 if same else LISTED]
    lines = ["to make it fit, the change that costs least time first (seconds a step, estimated):"]
    lines += [f"  {cure.seconds:>8.2g}  {cure.overrides}" for cure in same]
    return lines + [f"  {cure.seconds:>8.2g}  {cure.overrides}  (trains adapters only)" for cure in less]
