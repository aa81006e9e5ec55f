"""Ask a policy that thinks a second time, in writing, with its own answers as options."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rft_cluster.classification.answers import AnswerReader, reasoning
from rft_cluster.classification.second_look import Again, most_voted
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config
from rft_cluster.messages import Group, Prompt
from rft_cluster.model.tiny.conditions import WINDOW
from rft_cluster.prompts import Question

Generate = Callable[[list[Prompt]], list[Group]]
Ask = Callable[[Sequence[str]], str]
"""(options) -> the question with these alone listed"""


def options_at_second_look(given: int, question: Question, classes: Sequence[str]) -> int:
    """How many options a second look has; 0 if there is none. `given`: --second-look.

    Raises:
        UserError: one option would be no question.
    """
    if given == 1:
        raise UserError("--second-look is 1: give it 2 or more options, or 0 to leave it out")
    same = question.template is not None and len(classes) <= given  # it would be the first question again
    return 0 if same else given


def with_room(config: Config, text: str) -> Config:
    """The configuration with room for prompts of this text: a token has at least one byte of it.

    The small model has a token for each word, so its window has room for far longer texts than their bytes.
    """
    own = config.model.max_prompt_tokens
    tokens = own + len(text.encode())
    if config.model.path == "tiny":
        tokens = max(own, min(tokens, WINDOW - config.sampling.max_tokens))
    return config.model_copy(update={"model": config.model.model_copy(update={"max_prompt_tokens": tokens})})


def written_again(
    greedy: Sequence[Group], votes: Sequence[Group], reader: AnswerReader, classes: Sequence[str], count: int,
    ask: Ask, generate: Generate,
) -> list[Again]:  # fmt: skip
    """The second, greedy answer to each image. An answer that is none of the options is passed over for the first.

    `votes`: samples of the same prompts as `greedy`. Of each at most `count` options are made.
    """
    first = [reader.label(group.completions[0].text) for group in greedy]
    options = [
        most_voted(label, reader.vote([completion.text for completion in group.completions]), classes, count)
        for label, group in zip(first, votes, strict=True)
    ]
    asked = [replace(group.prompt, text=ask(own)) for group, own in zip(greedy, options, strict=True) if len(own) > 1]
    answers = iter(generate(asked) if asked else [])
    found = []
    for group, label, own in zip(greedy, first, options, strict=True):
        text = group.completions[0].text
        if len(own) > 1:
            again = next(answers).completions[0].text
            if (second := reader.label(again)) in own:
                label, text = second, again
        found.append(Again(tuple(own), label, reasoning=reasoning(text)))
    return found
