"""Shared by the integration tests: real models, engines and actors are slow to start, so each is made once."""

import os
import sys
from pathlib import Path

# Read when vLLM is imported, which some of these tests do in their own process.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}

import psutil
import pytest
import torch

from rft_cluster.algorithm import load_algorithm
from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.data.images import open_image
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Completion, Group, Prompt, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.tiny.build import ensure_tiny_model
from rft_cluster.prompts import Question, make_prompts, render_template

torch.set_num_threads(1)
BIN = Path(sys.executable).parent


def is_alive(pid: int) -> bool:
    """A zombie is dead: it waits for a parent to ask, and in a container without an init nobody asks."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config("digits", [])


@pytest.fixture(scope="session")
def token_environment(tmp_path_factory) -> dict[str, str]:
    """The environment of a user with a token, for commands that start or reach a Ray cluster of their own."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


@pytest.fixture(scope="session")
def dataset(config: Config) -> FewShotDataset:
    return load_dataset(config.data, seed=0)


@pytest.fixture(scope="session")
def prompts(config: Config, dataset: FewShotDataset) -> list[Prompt]:
    text = render_template(config.prompt.template, config.prompt.subject, dataset.classes)
    return make_prompts(dataset.train[:6], text, "train", 0, seed=0)


@pytest.fixture(scope="session")
def tiny_model(config: Config, dataset: FewShotDataset, prompts: list[Prompt], tmp_path_factory) -> str:
    """A tiny Qwen2-VL with tied embeddings, hardly warmed up: it writes the format more often than not."""
    folder = ensure_tiny_model(
        tmp_path_factory.mktemp("tiny"),
        images=[open_image(image) for image in dataset.pool[:200]],
        class_names=dataset.classes,
        question=Question(prompts[0].text),
        pixels=56 * 56,
        seed=0,
        warm_steps=60,
    )
    return str(folder)


@pytest.fixture(scope="session")
def samples(tiny_model: str, config: Config, dataset: FewShotDataset, prompts: list[Prompt]) -> list[TrainingSample]:
    return some_samples(tiny_model, config, dataset, prompts)


def some_samples(path: str, config: Config, dataset: FewShotDataset, prompts: list[Prompt]) -> list[TrainingSample]:
    """Three groups of 4, 2 and 1 completions, of 1 to 9 tokens, with made-up log-probabilities and advantages."""
    encoder = PromptEncoder(path, config.model)
    cache = PromptCache(encoder, dataset.images, capacity=0)
    draw = torch.Generator().manual_seed(0)

    def completion(length: int) -> Completion:
        tokens = torch.randint(300, len(encoder.tokenizer), (length,), generator=draw).tolist()
        logprobs = (-4 - torch.rand(length, generator=draw)).tolist()
        return Completion(tokens, logprobs, "", "stop", 0)

    lengths = [[3, 9, 1, 5], [2, 7], [4]]
    groups = [
        Group(prompt, cache.encode(prompt).token_ids, [completion(length) for length in group])
        for prompt, group in zip(prompts, lengths, strict=False)
    ]
    advantages = [[1.0, -0.5, 0.3, -0.8], [0.7, -0.7], [1.2]]
    return load_algorithm(config).samples(groups, advantages)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests whose learner is in this process come first: vLLM's engines leave a process group behind in it."""
    items.sort(key=lambda item: item.path.name != "test_gpu_check_learner.py")  # stable: else as they were
