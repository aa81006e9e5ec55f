"""The configurations of runs that another run has in its folder: SFT on the same images.

    RUN/baselines/sft/       `baselines: [sft]`

Each is the folder of a whole run, which `evaluate`, `predict` and `doctor` read as any other.
"""

from pathlib import Path
from typing import Any

from rft_cluster.config import Config, Section


def sft_baseline(config: Config) -> Config:
    """SFT from the same model for as many steps on as many images each, without evaluations on validation images."""
    return _sft(config, config.run_folder / "baselines", "sft", config.schedule.steps)


def _sft(config: Config, folder: Path, name: str, steps: int) -> Config:
    rate, warmup = config.optimizer.sft_learning_rate or config.optimizer.learning_rate, config.optimizer.warmup_steps
    return _changed(
        config,
        run=_changed(config.run, folder=folder, name=name, sinks=[]),
        algorithm=_changed(config.algorithm, objective="sft", kl_beta=0.0),
        optimizer=_changed(config.optimizer, learning_rate=rate, warmup_steps=min(warmup, steps - 1)),
        schedule=_changed(config.schedule, steps=steps, max_staleness=0, evaluate_every=0),
        baselines=[],
        tracking=[],
    )


def _changed(section: Section, **values: Any) -> Any:
    return section.model_copy(update=values)
