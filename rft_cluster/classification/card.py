"""The card of an exported policy, `classifier.json`: its question, classes and limits, for `evaluate` and `predict`."""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rft_cluster.classification.probabilities import FEWEST, TEMPERATURES
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import FORMAT, check_format, json_object
from rft_cluster.common.lookup import near_path
from rft_cluster.common.text import printable, shown
from rft_cluster.config import Config
from rft_cluster.config.bounds import (
    MOST_BYTES,
    MOST_DECODED,
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_STEPS,
    MOST_TOKENS,
    MOST_TOP_K,
)
from rft_cluster.config.data import Level
from rft_cluster.data.dataset import FewShotDataset, listing
from rft_cluster.data.images import MAX_BYTES, MAX_PIXELS
from rft_cluster.messages import Example
from rft_cluster.prompts import Question, text_hash

CARD_FILE = "classifier.json"
MOST_CARD = 100_000_000  # bytes


class Calibration(BaseModel):
    """The temperature of the classes' probabilities (`probabilities.fit_temperature`), and on how many validation
    images it was fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])
    images: int = Field(ge=FEWEST, le=MOST_IMAGES)


class Card(BaseModel):
    """The question that the policy was trained on, its possible answers, and its image limits.

    A card may come from a stranger, so its numbers must lie within the configuration's ranges.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str
    classes: list[str] = Field(min_length=2)
    aliases: dict[str, list[str]]
    unseen: list[str] = []
    """Classes of which training showed neither image nor name (`data.unseen_classes`)."""
    prompt: str = Field(min_length=1)
    """The question, with the classes, if it lists them, in the order of `classes`. Predictions ask it word for word."""
    prompt_sha256: str
    """`Question.sha256`: of the question's text, and, if it lists the classes, of template, subject and classes."""
    template: str | None = None
    """Source of a template that lists the classes. Each training prompt listed them in an order drawn from (`run.seed`,
    step, index). None: each was `prompt`, as in cards of versions without this key."""
    subject: str = ""
    """What the question, or a second look's, calls the images."""
    min_pixels: int = Field(ge=28 * 28, le=MOST_PIXELS)
    max_pixels: int = Field(ge=28 * 28, le=MOST_PIXELS)
    max_prompt_tokens: int = Field(ge=16, le=MOST_TOKENS)
    max_tokens: int = Field(ge=1, le=MOST_TOKENS)
    temperature: float = Field(gt=0, le=2)
    top_k: int = Field(0, ge=0, le=MOST_TOP_K)
    """`sampling.top_k` of the run: votes are sampled as in its evaluations."""
    steps: int = Field(ge=0, le=MOST_STEPS)
    """Training steps."""
    validation: float | None = Field(None, ge=0, le=1)
    """Strict accuracy on the validation images, if measured."""
    calibration: Calibration | None = None
    """None: no temperature was fitted, and probabilities are as the policy has them."""
    levels: tuple[Level, Level] | None = None
    """The 16-bit values shown as black and white, if there were pictures with 16 bits a channel."""
    data_max_pixels: int = Field(MAX_PIXELS, ge=1, le=MOST_DECODED)
    data_max_bytes: int = Field(MAX_BYTES, ge=1, le=MOST_BYTES)
    """Larger files are not read."""
    trained_on_pixels: list[str] = []
    """Digests of the training images' pixels (`pixel_digest`). Evaluating on these images would prove nothing."""
    trained_on: list[str] = []
    """SHA-256 of the encoded training images, in cards of earlier versions without `trained_on_pixels`."""

    @property
    def question(self) -> Question:
        if self.template is None:
            return Question(self.prompt)
        return Question(self.prompt, self.template, self.subject, tuple(self.classes), tuple(self.unseen))

    def record(self) -> dict[str, Any]:
        """The content of `classifier.json`."""
        return {"format": FORMAT, **self.model_dump()}

    @property
    def calibration_note(self) -> str:
        if self.calibration is None:
            return f"not calibrated (a run fits a temperature on {FEWEST} or more validation images, data.validation)"
        fitted, of = self.calibration, " of the classes that were trained" if self.unseen else ""
        return f"calibrated (temperature {fitted.temperature:g}, fitted on {fitted.images} validation images{of})"


def make_card(config: Config, dataset: FewShotDataset, question: Question, pixels: tuple[int, int]) -> Card:
    """The card of a policy trained with `config` on `dataset`. `pixels`: the fewest and the most of a resized image."""
    return Card(
        dataset=dataset.name,
        classes=dataset.classes,
        aliases=dataset.aliases,
        unseen=list(dataset.unseen),
        prompt=question.text,
        prompt_sha256=question.sha256,
        template=question.template,
        subject=question.subject or config.prompt.subject,
        min_pixels=pixels[0],
        max_pixels=pixels[1],
        max_prompt_tokens=config.model.max_prompt_tokens,
        max_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        top_k=config.sampling.top_k,
        levels=dataset.levels,
        data_max_pixels=config.data.max_pixels,
        data_max_bytes=config.data.max_bytes,
        steps=config.schedule.steps,
        trained_on_pixels=sorted({dataset.pixels_of(example) for example in dataset.train}),
    )


def read_card(folder: Path) -> Card:
    """Read the card of an exported policy.

    Raises:
        UserError: there is none, it is damaged, a newer version of the program wrote it, or its question cannot be
            asked.
    """
    file = folder / CARD_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no {CARD_FILE}: it is not a model that a run of this program exported")
    if file.stat().st_size > MOST_CARD:
        raise UserError(f"{file} holds {file.stat().st_size} bytes: that is no card")
    values = json_object(file.read_bytes())
    if values is None:
        raise UserError(f"{file} cannot be read: it is damaged, no JSON object")
    check_format(values, file)
    try:
        card = Card.model_validate(values)
    except ValidationError as error:
        lines = [f"{shown('.'.join(map(str, one['loc']))) or 'file'}: {one['msg']}" for one in error.errors()]
        raise UserError(f"{file} cannot be read, it is not what a run writes:\n{listing(lines)}") from error
    if card.min_pixels > card.max_pixels:
        raise UserError(f"{file}: min_pixels {card.min_pixels} is above max_pixels {card.max_pixels}")
    if "<|" in card.prompt:  # the tokenizer would read it as a special token
        raise UserError(f"{file}: the prompt holds a special token (<|...), which no template may")
    if card.question.sha256 != card.prompt_sha256:
        what = "prompt, template, subject or classes were" if card.template else "the prompt was"
        raise UserError(f"{file}: {what} changed after training (the SHA-256 is not {card.prompt_sha256})")
    _check_template(card, file)
    return card


def _check_template(card: Card, file: Path) -> None:
    """Check that the card's template gives the card's prompt, and a question about two classes alone, too: a second
    look lists few. The SHA-256 does not prove it, because whoever wrote the template wrote the SHA-256.

    Raises:
        UserError: it does not.
    """
    try:
        text = card.question.listing(card.classes)
        card.question.listing(card.classes[:2])
    except UserError as error:
        raise UserError(f"{file}: {error}. A run writes no such card: ask whoever made it") from error
    if text != card.prompt:
        raise UserError(
            f"{file}: the template gives another question than the prompt: {printable(text)[:80]!r}. A run writes "
            f"no such card: ask whoever made it"
        )


def find_export(path: Path) -> Path:
    """The folder of an exported model. `path` is that folder, or the run folder above it.

    Raises:
        UserError: there is none; the message says what the path is instead.
    """
    path = Path(os.path.expanduser(path))
    for folder in (path, path / "model"):
        if (folder / CARD_FILE).is_file():
            return folder
    if not path.exists():
        raise UserError(f"--checkpoint: there is no folder {path}{near_path(path)}")
    if path.parent.name == "checkpoints":
        raise UserError(
            f"--checkpoint: {path} holds the learners' shards, to resume from; a run exports its model when it ends, "
            f"to {path.parents[1] / 'model'}"
        )
    if (path / "config.yaml").is_file():
        best = path / "model-best"
        other = f", or give {best}, its best so far" if (best / CARD_FILE).is_file() else ""
        raise UserError(f"--checkpoint: {path} holds no model/ yet: finish that run with --resume{other}")
    raise UserError(f"--checkpoint: {path} is neither a run's folder nor a model that one exported ({CARD_FILE})")


def check_card(card: Card, dataset: FewShotDataset, question: Question, pixels: tuple[int, int]) -> None:
    """Check that an evaluation asks a policy what it was trained on, about images that it was not trained on.

    Raises:
        UserError: prompt, classes or pixel limits differ, or an image was a training image.
    """
    # A card without a template was trained on one text, be it that of a template whose order is drawn by now.
    asked = question.sha256 if card.template else text_hash(question.text)
    if asked != card.prompt_sha256:
        raise UserError(
            f"the configuration asks another question (prompt {asked[:12]}) than the policy was trained on "
            f"({card.prompt_sha256[:12]}): set prompt.template and prompt.subject as they were:\n  {card.prompt!r}"
        )
    for name, ours, theirs in (
        ("data.classes", dataset.classes, card.classes),
        ("the fewest pixels of an image (model.min_image_tokens)", pixels[0], card.min_pixels),
        ("the most pixels of an image (model.max_image_tokens)", pixels[1], card.max_pixels),
    ):
        if ours != theirs:
            raise UserError(f"{name} is {ours}, but the policy was trained with {theirs}")
    if dataset.levels and card.levels and dataset.levels != card.levels:
        raise UserError(
            f"of pictures with 16 bits a channel {dataset.levels[0]} and {dataset.levels[1]} are black and white here, "
            f"but the policy was trained with others: set 'data.sixteen_bit={list(card.levels)}'"
        )
    trained = {*card.trained_on_pixels, *card.trained_on}
    digest = dataset.pixels_of if card.trained_on_pixels else _bytes
    seen = [example.example_id for example in [*dataset.validation, *dataset.test] if digest(example) in trained]
    if seen:
        raise UserError(
            f"{len(seen)} of the {len(dataset.validation) + len(dataset.test)} images to evaluate on were trained on "
            f"(first {seen[0]}): give data.manifest=RUN/manifest.json of the run, or its run.seed and data settings"
        )


def _bytes(example: Example) -> str:
    return example.image.sha256
