"""Configuration: `sections.py`, with `data.py`, `model.py` and `training.py`, defines every key; `load.py` reads a file
and overrides into a checked `Config`; `foreign.py` restricts a `config.yaml` from a run's folder."""

from rft_cluster.config.base import FilePath, PathText, Section
from rft_cluster.config.data import AlsoSection, DataSection
from rft_cluster.config.foreign import run_folder_of
from rft_cluster.config.load import (
    CONFIG_FOLDERS,
    config_text,
    find_config,
    load_config,
    load_run_config,
    read_file,
    validated,
)
from rft_cluster.config.model import LoraSection, ModelSection
from rft_cluster.config.sections import (
    ClusterSection,
    Config,
    DebugSection,
    EvaluationSection,
    GeneratorsSection,
    LearnersSection,
    PromptSection,
    RunSection,
    ScoringSection,
)
from rft_cluster.config.training import (
    AlgorithmSection,
    OptimizerSection,
    SamplingSection,
    ScheduleSection,
    WarmStartSection,
)

__all__ = [
    "CONFIG_FOLDERS",
    "AlgorithmSection",
    "AlsoSection",
    "ClusterSection",
    "Config",
    "DataSection",
    "DebugSection",
    "EvaluationSection",
    "FilePath",
    "GeneratorsSection",
    "LearnersSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "PathText",
    "PromptSection",
    "RunSection",
    "SamplingSection",
    "ScheduleSection",
    "ScoringSection",
    "Section",
    "WarmStartSection",
    "config_text",
    "find_config",
    "load_config",
    "load_run_config",
    "read_file",
    "run_folder_of",
    "validated",
]
