"""The configurations for one's own photos: nothing but the folder and the subject is to be typed."""

import re
from pathlib import Path

import pytest
import yaml

from rft_cluster.cluster.placement import needed
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.data import load_dataset

CONFIGS = Path(__file__).parents[3] / "configs"
PHOTOS = sorted(path.stem for path in CONFIGS.glob("photos*.yaml"))
TYPED = ["data.path=photos", "prompt.subject=plant"]


def said_in(name: str) -> list[str]:
    """The overrides that a file's own comments tell to add."""
    comments = "\n".join(line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    return [word for word in comments.split() if re.fullmatch(r"\w+(\.\w+)+=[\w.]+", word)]


@pytest.mark.parametrize("name", PHOTOS)
def test_the_folder_and_the_subject_are_all_that_is_typed(name: str):
    config = load_config(name, TYPED)
    assert config.run.name == name
    assert (str(config.data.path), config.prompt.subject) == ("photos", "plant")
    without = load_config(name, [])
    with pytest.raises(UserError, match=r"data\.path"):
        load_dataset(without.data, 0)


@pytest.mark.parametrize("name", PHOTOS)
def test_each_is_complete(name: str):
    """Each file contains the settings that differ between CPUs and GPUs."""
    sections = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for section, keys in {
        "model": ("path", "min_image_tokens", "max_image_tokens", "max_prompt_tokens"),
        "data": ("source", "path", "shots", "validation", "test"),
        "sampling": ("group_size", "max_tokens"),
        "optimizer": ("learning_rate",),
        "schedule": ("steps", "prompts_per_step", "evaluate_every"),
        "generators": ("count", "cpus"),
        "learners": ("count", "cpus", "micro_batch_tokens"),
        "cluster": ("device",),
    }.items():
        assert set(keys) <= set(sections[section])
    if sections["cluster"]["device"] == "cuda":
        assert "gpus" in sections["generators"]
        assert "gpus" in sections["learners"]


@pytest.mark.parametrize(("name", "gpus"), [("photos", 0), ("photos_1gpu", 1), ("photos_8gpu", 8)])
def test_each_takes_the_gpus_of_its_name(name: str, gpus: float):
    assert needed(load_config(name, TYPED))[1] == gpus


@pytest.mark.parametrize("name", PHOTOS)
def test_what_a_file_tells_to_add_can_be_added(name: str):
    config = load_config(name, said_in(name))
    assert config.data.path is not None
    if name == "photos_1gpu":
        assert config.model.lora is not None
        assert config.learners.gradient_checkpointing


def test_on_24_gb_the_base_stays_on_the_gpu():
    """It fits beside a sleeping engine. Offloaded, it would be copied there for every micro-batch."""
    for config in (load_config("flower102_24gb", []), load_config("photos_1gpu", said_in("photos_1gpu"))):
        assert config.model.lora is not None
        assert not config.learners.cpu_offload
