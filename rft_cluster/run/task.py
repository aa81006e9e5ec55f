"""What comes before any actor starts: the data set, the question, the model's folder, and all checks of them."""

from dataclasses import dataclass
from pathlib import Path

from rft_cluster.config import Config
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.data.images import open_image
from rft_cluster.messages import Example
from rft_cluster.prompts import make_prompts, render_template

TINY_CACHE = Path("~/.cache/rft_cluster/tiny")


@dataclass(frozen=True)
class Task:
    """What is to be learned: the few-shot data set, and `text`, the rendered question about each image."""

    dataset: FewShotDataset
    text: str


def prepare(config: Config) -> Task:
    """Read the data and render the template.

    Raises:
        UserError: either will not do.
    """
    dataset = load_dataset(config.data, config.run.seed)
    text = render_template(config.prompt.template, config.prompt.subject, dataset.classes, problem=dataset.problem)
    return Task(dataset, text)


def base_model_path(config: Config, task: Task) -> str:
    """The model to start from: what is configured, or the tiny one, built here if it is not yet."""
    if config.model.path != "tiny":
        return config.model.path
    from rft_cluster.model.tiny.build import ensure_tiny_model

    folder = ensure_tiny_model(
        TINY_CACHE.expanduser(),
        images=[open_image(image) for image in task.dataset.pool],
        class_names=task.dataset.classes,
        prompt_text=task.text,
        pixels=config.model.max_pixels,
        seed=config.run.seed,
        report=lambda line: print(line, flush=True),
    )
    return str(folder)


def check_model(config: Config, task: Task, model_path: str, examples: list[Example]) -> None:
    """Refuse a model that cannot be asked this question about every one of `examples`.

    Raises:
        UserError: it is no Qwen2-VL, or a prompt is too long.
    """
    from rft_cluster.model.encoder import PromptEncoder
    from rft_cluster.model.qwen2vl import check_model_folder

    check_model_folder(model_path, config.max_model_tokens)
    model = config.model
    encoder = PromptEncoder(model_path, model.min_pixels, model.max_pixels, model.trust_remote_code)
    encoder.check_lengths(make_prompts(examples, task.text, "check", 0, config.run.seed), model.max_prompt_tokens)
