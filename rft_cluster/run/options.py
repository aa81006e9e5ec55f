"""Hard prompts (`prompt.options: own_top_k`): a training prompt lists few classes, those that the policy confuses.

Before the first step the policy is asked about each training image, as often as a group has completions. The right
class and the classes that it answered most often are that image's options in the whole run: wrong names that look right
teach more than names that nobody would say. DiVE-k (arXiv 2511.18305) makes its questions so, from the base model.

The options are made once and recorded in `options.json`, so a run that goes on asks the same. Evaluations list all
classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.second_look import first_of
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import FORMAT, check_format, json_object, write_json
from rft_cluster.config import Config
from rft_cluster.messages import Group, Prompt, Sampling
from rft_cluster.prompts import draw_prompts, drawn_order
from rft_cluster.run.task import Task

OPTIONS_FILE = "options.json"
SPLIT = "options"  # of the prompts' ids


class Options(BaseModel):
    """Of one image: what it shows, how often the policy answered each class, and the classes that its prompts list."""

    label: str
    votes: dict[str, int]
    options: list[str]


def check_options(config: Config, task: Task, step: int | None) -> None:
    """Raise UserError if prompts cannot list options, or would list all classes, or if the record of them is damaged or
    missing. `step`: number of steps already done; None if there is no run to go on with."""
    if config.prompt.options == "all":
        return
    template, count, trained = config.prompt.template, config.prompt.top_k, len(task.question.trained)
    if task.question.template is None:
        raise UserError(
            f"prompt.options is own_top_k, but prompt.template: {template} lists no classes: take "
            f"prompt.template=closed, or with_labels, which also asks for reasoning"
        )
    if count >= trained:
        raise UserError(
            f"prompt.top_k is {count}, and there are {trained} classes to train, so prompts would list all of them: "
            f"lower prompt.top_k, or leave prompt.options out"
        )
    if step is not None and step < config.schedule.steps:
        _recorded(config, task, step)


def with_options(
    config: Config, task: Task, step: int, generate: Callable[[list[Prompt], Sampling], list[Group]]
) -> Task:
    """The task with the options of each training image, if the configuration asks for them.

    `step`: number of steps already done. `generate` asks the policy, which is that of the beginning at step 0.

    Raises:
        UserError: the record is damaged, or missing after the first step.
    """
    if config.prompt.options == "all":
        return task
    found = _recorded(config, task, step)
    if found is None:
        found = _asked(config, task, generate)
        images = {example_id: one.model_dump(mode="json") for example_id, one in found.items()}
        write_json(config.run_folder / OPTIONS_FILE, {"format": FORMAT, "images": images})
    return replace(task, options={example_id: tuple(one.options) for example_id, one in found.items()})


def hard_options(label: str, votes: Mapping[str, int], classes: Sequence[str], count: int, key: str) -> list[str]:
    """The right class and those that were answered most often, `count` in all, in the order of `classes`.

    If fewer were answered, others are drawn by `key`. Ties: the one that comes first in `classes`.
    """
    answered = sorted((one for one in classes if votes.get(one)), key=lambda one: -votes[one])
    return first_of([label, *answered, *drawn_order(classes, key)], classes, count)


def _asked(config: Config, task: Task, generate: Callable[[list[Prompt], Sampling], list[Group]]) -> dict[str, Options]:
    train, seed, classes = task.dataset.train, config.run.seed, task.question.trained
    sampling = Sampling(**config.sampling.model_dump())
    print(f"options: the policy is asked {sampling.group_size} times about each of {len(train)} images", flush=True)
    groups = generate(draw_prompts(train, task.question, SPLIT, 0, seed), sampling)
    reader = AnswerReader(classes, task.dataset.aliases)
    found = {}
    for group in groups:
        votes = reader.vote([completion.text for completion in group.completions]).counts
        key = f"{seed}/{group.prompt.prompt_id}"
        options = hard_options(group.prompt.label, votes, classes, config.prompt.top_k, key)
        found[group.prompt.example_id] = Options(label=group.prompt.label, votes=votes, options=options)
    print(_described(found, config.prompt.top_k), flush=True)
    return found


def _described(found: Mapping[str, Options], count: int) -> str:
    right = sum(one.votes.get(one.label, 0) > 0 for one in found.values())
    wrong = sum(len(one.votes.keys() - {one.label}) for one in found.values()) / len(found)
    return (
        f"options: it named the right class of {right} of {len(found)} images at least once, and {wrong:.1f} wrong "
        f"ones an image; each prompt lists {count} (others are drawn where it named fewer)"
    )


def _recorded(config: Config, task: Task, step: int) -> dict[str, Options] | None:
    """The options by image; None if they are still to be asked for.

    Raises:
        UserError: the record is damaged, or missing after the first step.
    """
    file = config.run_folder / OPTIONS_FILE
    if not file.exists():
        if step:
            raise UserError(
                f"{file} is missing, and has what each prompt lists: bring it back, or choose another run.name"
            )
        return None
    trained = set(task.question.trained)
    try:
        values: dict[str, Any] = json_object(file.read_bytes()) or {}
        check_format(values, file)
        found = {name: Options.model_validate(one, strict=True) for name, one in values["images"].items()}
        for example in task.dataset.train:
            options = found[example.example_id].options
            if example.label not in options or not trained.issuperset(options):
                raise ValueError("options without the label, or of other classes")
    except (AttributeError, LookupError, ValidationError, ValueError) as error:
        raise UserError(f"{file} is damaged: bring it back, or choose another run.name") from error
    return found
