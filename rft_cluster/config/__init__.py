"""Configuration: `sections.py` has every key; `load.py` reads a file and overrides into a checked `Config`."""

from rft_cluster.config.load import CONFIG_FOLDERS, load_config
from rft_cluster.config.sections import (
    AlgorithmSection,
    ClusterSection,
    Config,
    DataSection,
    GeneratorsSection,
    LearnersSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PromptSection,
    RunSection,
    SamplingSection,
    ScheduleSection,
    ScoringSection,
    Section,
)

__all__ = [
    "CONFIG_FOLDERS",
    "AlgorithmSection",
    "ClusterSection",
    "Config",
    "DataSection",
    "GeneratorsSection",
    "LearnersSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "PromptSection",
    "RunSection",
    "SamplingSection",
    "ScheduleSection",
    "ScoringSection",
    "Section",
    "load_config",
]
