"""Check before training that a policy which follows the question can earn a reward, and that answers fit (pure).

`obedient` writes completions that follow the question: its own example line with a label filled in, and the tags that
it shows, whatever their names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import printable
from rft_cluster.prompts import asks_for_thinking

REASONING = "This is what the image shows."
OPENING = re.compile(r"<\s*([A-Za-z][\w.-]*)(?:\s[^<>]*)?>")
MARKUP = re.compile("b|br|code|em|i|li|p|pre|strong|sub|sup|u|ul", re.IGNORECASE)  # tags that format prose
THINKS = re.compile("think|thought|reason|analy|explain|rationale|scratch", re.IGNORECASE)
ANSWERS = re.compile("answer|label|class|final|solution|result|output|predict", re.IGNORECASE)
BOXED = re.compile(r"\\?boxed\s*\{")
JSON = re.compile(r"\s*\{\s*[\"']")
BLANK = re.compile(r"\.\.\.|\u2026")
LISTED = 5
Tag = tuple[str, str]  # opening and closing tag, as in the question


def tags_shown(question: str) -> list[Tag]:
    """The opening and closing tag of each block that the question shows, in order of appearance.

    `<think>` and `<answer>` also count without a closing tag ("in <answer> tags").
    """
    shown: dict[str, Tag] = {}
    for opening in OPENING.finditer(question):
        name = opening[1]
        end = rf"</\s*{re.escape(name)}\s*>"
        closing = re.search(end, question) or re.search(end, question, re.IGNORECASE)
        if not MARKUP.fullmatch(name) and (closing or name.lower() in ("think", "answer")):
            shown.setdefault(name, (opening[0], closing[0] if closing else f"</{name}>"))
    return list(shown.values())


def obedient(question: str, label: str, reasoning: str = REASONING) -> list[str]:
    """Completions that follow the question and answer `label`, one for each way to read the question. The first has all
    blocks that the question shows, the second those of its example alone."""
    tags = tags_shown(question)
    example = _example(question, tags)
    in_example = [tag for tag in tags if tag[0] in example]
    readings = [_filled(tags, question, label, reasoning), _filled(in_example, example, label, reasoning)]
    return list(dict.fromkeys(readings[: 2 if example else 1]))


def _filled(tags: Sequence[Tag], shown: str, label: str, reasoning: str) -> str:
    """A completion with `reasoning` in every block and the answer in its own block, or at the end if it has none.

    If the question shows a box or a JSON object in the answer block, the label goes inside it.
    """
    place = _for_the_answer(tags)
    inside = shown.rpartition(place[0])[2].partition(place[1])[0] if place else shown
    answer = rf"\boxed{{{label}}}" if BOXED.search(inside) else label
    if JSON.match(inside):
        answer = BLANK.sub(lambda _: label, inside)
    text = "".join(f"{tag[0]}{answer if tag == place else reasoning}{tag[1]}" for tag in tags)
    return text if place else text + answer


def _for_the_answer(tags: Sequence[Tag]) -> Tag | None:
    blocks = [tag for tag in tags if not THINKS.search(tag[0])]
    return next((tag for tag in blocks if ANSWERS.search(tag[0])), blocks[-1] if blocks else None)


def _example(question: str, tags: Sequence[Tag]) -> str:
    """The question's example of the layout: from the last lines that begin with a tag to the end. Empty without one."""
    lines = [line.lstrip() for line in question.splitlines() if line.strip()]
    openings, closings = tuple(tag[0] for tag in tags), {tag[1]: tag[0] for tag in tags}
    start = next((i for i in reversed(range(len(lines))) if openings and lines[i].startswith(openings)), len(lines))
    while 0 < start < len(lines):
        above = lines[start - 1]
        opening = next((opening for closing, opening in closings.items() if above.startswith(closing)), None)
        begins = [i for i in range(start) if opening and lines[i].startswith(opening)]
        if above.startswith(openings):
            start -= 1
        elif begins:
            start = begins[-1]
        else:
            break
    return "\n".join(lines[start:])


def what_it_shows(question: str) -> str:
    """Text for a message: the blocks that the question shows, and whether the rewards read one of them."""
    shown = [f"{opening} {closing}" for opening, closing in tags_shown(question)]
    shown += [r"\boxed{}"] if BOXED.search(question) else []
    if "<answer>" in question:
        return f"the question shows {', '.join(shown)}"
    return f"the question shows no <answer> tag{', but ' if shown else ''}{', '.join(shown)}"


def cure(question: str) -> str:
    """Advice for a message: how to change the question so that its answers can be rewarded."""
    place = _for_the_answer(tags_shown(question))
    if place is None:
        return "add this line to the question:\n  <answer> ... </answer>"
    if place == ("<answer>", "</answer>"):
        return "let the answer block hold the name alone:\n  <answer> ... </answer>"
    return f"write <answer> and </answer> in the question in place of {' and '.join(place)}"


def check_room(
    classes: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
    rewards: Iterable[str],
    question: str,
    max_tokens: int,
    count: Callable[[str], int],
) -> list[str]:
    """Check that right answers fit into `max_tokens` (`sampling.max_tokens`). Returns notes on those that barely fit.

    Args:
        rewards: names of the rewards; the check needs `accuracy` or `format`, whose layout is known.
        count: returns the number of tokens of a text.

    Raises:
        UserError: no right answer fits.
    """
    if not {"accuracy", "format"} & set(rewards):
        return []
    think = "<think></think>" if "format" in rewards and asks_for_thinking(question) else ""
    needed: dict[str, int] = {}
    for label in classes:
        texts = [f"{think}<answer>{name}</answer>" for name in (label, *aliases.get(label, ()))]
        needed[label] = min(map(count, texts)) + 1  # plus the stop token
    least, most = min(needed.values()), max(needed.values())
    cure = f"Set sampling.max_tokens to {max(most, 16)} at least; 256 leaves room for reasoning"
    if least > max_tokens:
        label = min(needed, key=lambda label: needed[label])
        raise UserError(
            f"sampling.max_tokens is {max_tokens}, but the shortest right answer, {think}<answer>{printable(label)}"
            f"</answer>, has {least} tokens with the stop token: every right answer would be cut. {cure}"
        )
    long = [printable(label) for label, tokens in needed.items() if tokens > max_tokens]
    if long:
        more = f" and {len(long) - LISTED} more" if len(long) > LISTED else ""
        return [
            f"sampling.max_tokens is {max_tokens}: right answers of {', '.join(long[:LISTED])}{more} are longer and "
            f"would be cut. {cure}"
        ]
    if think and max_tokens < 1.5 * most:
        return [
            f"sampling.max_tokens is {max_tokens}: {most} are taken by the tags and the longest label, which leaves "
            f"{max_tokens - most} for reasoning. 256 leaves room"
        ]
    return []
