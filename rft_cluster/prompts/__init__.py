"""Prompt templates: text files in Jinja2, with the variables `subject` and `classes`.

    prompt:
      template: think_answer      # a file in this folder, the path of your own, or `problem`
      subject: flower

    think_answer   reasoning and answer in tags, strictly: the prompt that makes the recipe work
    answer_only    the answer in its tag, no reasoning
    closed         the list of classes, and the answer in its tag, no reasoning: for sets that have no other classes
    with_labels    think_answer, with the list of classes
    weak           asks for no format, for comparison: its answers cannot be told from the rest

`problem` is not a file. It means the question that comes with the data set, word for word.

A template that lists the classes is rendered anew for each training prompt, with the classes in an order drawn from
(`run.seed`, step, index in the step): otherwise a policy could learn places in the list in place of names. Classes that
are not trained (`data.unseen_classes`) are not listed in training. With `prompt.options: own_top_k` a training prompt
lists few classes, which the policy confuses (`run/options.py`).

The image comes before the text in the user's turn, and the model's chat template adds all special tokens.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from rft_cluster.common.errors import UserError
from rft_cluster.common.lookup import did_you_mean
from rft_cluster.common.text import printable
from rft_cluster.messages import Example, Prompt

FOLDER = Path(__file__).parent
PROBLEM = "problem"
# Variables in other tools' syntax, which Jinja2 would leave as text: {subject}, ${subject}, $subject, %(subject)s.
VARIABLES = "subject|classes|class_names|question|problem|image|video"
NOT_RENDERED = re.compile(
    rf"(?<![{{\w])[$%]?\{{\s*(?:{VARIABLES})\b[^{{}}]*\}}(?!\}})|\$(?:{VARIABLES})\b|%\((?:{VARIABLES})\)s|<(?:subject|classes)>",
    re.IGNORECASE,
)
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# Image placeholders of other formats. Here they would be plain text beside the real image.
IMAGE_MARK = re.compile(r"<\s*/?\s*(?:image|img|video)(?:[\s_-]*\d+)?\s*/?\s*>|\[(?:image|img|video)\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about every image, e.g. `Question("Which flower is this?")`.

    `text` lists the classes, if at all, in the data set's order. Evaluations and predictions ask it word for word.
    `template` is the source of a template that lists the classes, with its `subject` and `classes`: training prompts
    list them in drawn orders, and without those of `unseen`. It is None if the text is the same whatever is listed.
    """

    text: str
    template: str | None = None
    subject: str = ""
    classes: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Identifies all that may be asked. Checkpoints and exports record it: resuming, evaluating or predicting with
        another question is an error."""
        if self.template is None:
            return text_hash(self.text)
        held_back = [self.unseen] if self.unseen else []
        return text_hash(json.dumps([self.text, self.template, self.subject, self.classes, "drawn", *held_back]))

    @property
    def trained(self) -> list[str]:
        """The classes that training's prompts list."""
        return [label for label in self.classes if label not in self.unseen]

    def listing(self, classes: Sequence[str]) -> str:
        """The text with the classes listed in this order.

        Raises:
            UserError: the template fails on these classes, or gives an empty text or special tokens. It may be a
                stranger's, of a card.
        """
        if self.template is None:
            return self.text
        where = f"the question's template, with {len(classes)} classes,"
        return _checked(_rendered(self.template, where, self.subject, classes), where)

    def some_orders(self, count: int, seed: int) -> list[list[str]]:
        """`count` drawn orders of the classes, each unlike the others and the data set's own, as far as there are so
        many (two classes have one other order); none if the question does not list them."""
        if self.template is None:
            return []
        found: dict[tuple[str, ...], None] = {}
        drawn = (tuple(drawn_order(self.classes, f"{seed}/some/{index}")) for index in itertools.count())
        while len(found) < min(count, math.factorial(len(self.classes)) - 1):
            if (order := next(drawn)) != self.classes:
                found[order] = None
        return [list(order) for order in found]

    def in_some_orders(self, count: int, seed: int) -> list[str]:
        """The text, and those with the classes listed in `some_orders`."""
        return [self.text, *map(self.listing, self.some_orders(count, seed))]


def make_question(
    name_or_path: str, subject: str, classes: list[str], problem: str | None = None, unseen: tuple[str, ...] = ()
) -> Question:
    """The question of a template (see `render_template`, and its errors).

    A template lists the classes if its text changes with their order, or without those of `unseen`.
    """
    text = render_template(name_or_path, subject, classes, problem)
    if name_or_path == PROBLEM:
        words = {label: rf"(?<!\w){re.escape(label)}(?!\w)" for label in unseen}
        if named := [label for label, word in words.items() if re.search(word, text, re.IGNORECASE)]:
            raise UserError(
                f"prompt.template is problem, and the data set's question names {named[0]!r}, which "
                f"data.unseen_classes keeps out of training: take a template, e.g. prompt.template=closed"
            )
        return Question(text)
    listed = Question(text, _read(find_template(name_or_path)), subject, tuple(classes), unseen)
    differ = {listed.listing(classes[::-1]), listed.listing(listed.trained)} != {text}
    return listed if differ else Question(text)


def render_template(name_or_path: str, subject: str, classes: list[str], problem: str | None = None) -> str:
    """Render the question that is asked about every image, with the classes in this order. `problem` is the data set's
    own question, if any.

    Raises:
        UserError: there is no such template; its Jinja2 is invalid or uses a variable other than `subject` and
            `classes`; the text contains an unreplaced variable, an image placeholder or special tokens, or is empty;
            or the template is `problem` and the data set has none.
    """
    if name_or_path == PROBLEM:
        if problem is None:
            raise UserError(
                "prompt.template is problem, but the data set brings no question (a column problem beside image and "
                "solution): take another template, e.g. prompt.template=think_answer"
            )
        where = "prompt.template: the data set's problem"
        _check_marks(problem, where, "Take it out there, or ask a question of your own (prompt.template=FILE)")
        return _checked(problem, where)
    path = find_template(name_or_path)
    source = _read(path)
    where = f"prompt.template: {path}"
    _check_marks(COMMENT.sub("", source), where, "Take it out there")
    text = _rendered(source, where, subject, classes)
    if _rendered(source, where, "", classes) != _rendered(source, where, "flower", classes):
        _check_subject(subject, path)
    for label in classes:
        if "<|" in label and label in text:
            raise UserError(f"class {label!r} holds a special token (<|...): rename it, or take another template")
    return _checked(text, where)


def narrowed(question: Question, subject: str, options: Sequence[str]) -> str:
    """The question with these options alone listed.

    One that does not list the classes is asked by the template `closed`, or by `with_labels` if it asks for reasoning.

    Raises:
        UserError: a class name holds a special token, or as `Question.listing`.
    """
    if question.template is not None:
        return question.listing(options)
    template = "with_labels" if asks_for_thinking(question.text) else "closed"
    return render_template(template, subject or "object", list(options))


def longest(classes: Sequence[str], count: int) -> list[str]:
    """The `count` longest names, by their bytes in UTF-8."""
    return sorted(classes, key=lambda name: -len(name.encode()))[:count]


def _check_subject(subject: str, path: Path) -> None:
    """Refuse a subject that is empty or has template syntax: it is inserted as plain text."""
    if not subject.strip():
        raise UserError(f"prompt.subject is empty, and {path} asks for it: say what the images show, e.g. flower")
    _check_marks(subject, "prompt.subject", "Take it out there")
    if found := re.search(r"\{[{%#]|<\|", subject):
        raise UserError(f"prompt.subject is {subject!r}: it is inserted as text, so leave {found[0]} out")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"prompt.template: {path} is not UTF-8 text: {error}. Save it as UTF-8") from error


def _check_marks(source: str, where: str, cure: str) -> None:
    """Refuse marks that the author meant as variables or placeholders and the model would read as text."""
    if mark := IMAGE_MARK.search(source):
        raise UserError(
            f"{where} holds {mark[0]}, which is text here: the image comes before the question by itself. {cure}"
        )
    if variable := NOT_RENDERED.search(source):
        raise UserError(
            f"{where} holds {variable[0]}, which is text here: a variable is written in two braces, "
            f"and there are {{{{ subject }}}} and {{{{ classes }}}}"
        )


def _rendered(source: str, where: str, subject: str, classes: Sequence[str]) -> str:
    try:
        # A list of its own: a template may call `classes.sort()`.
        return _compiled(source).render(subject=subject, classes=list(classes)).strip()
    except Exception as error:  # what a template computes may fail in any way, also while Jinja2 compiles it
        raise UserError(
            f"{where} cannot be rendered: {printable(str(error))}. Its variables are subject and classes"
        ) from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = SandboxedEnvironment(undefined=StrictUndefined)
    del environment.filters["random"], environment.globals["lipsum"]  # a question has one text, whenever it is rendered
    return environment.from_string(source)


def _checked(text: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where} gives an empty text")
    if "<|" in text:
        # The model would read an image token in the text as an image.
        raise UserError(f"{where} holds a special token (<|...); leave those to the chat template")
    return text


def text_hash(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_prompts(examples: list[Example], text: str, split: str, step: int, seed: int, first: int = 0) -> list[Prompt]:
    """Make one prompt for each example, all of one text. Ids and seeds depend only on (seed, split, step, index).

    `first`: the index of the first one.
    """
    return [
        Prompt(f"{split}/{step}/{index}", example, text, _prompt_seed(seed, split, step, index))
        for index, example in enumerate(examples, first)
    ]


def draw_prompts(
    examples: list[Example],
    question: Question,
    split: str,
    step: int,
    seed: int,
    first: int = 0,
    options: Mapping[str, Sequence[str]] | None = None,
) -> list[Prompt]:
    """As `make_prompts`, each with the classes listed in an order of its own, if the question lists them.

    The order depends only on (seed, split, step, index), too: a run that resumes asks the same. `options`: by example
    id, the classes that are listed in place of all that are trained.
    """
    prompts = make_prompts(examples, question.text, split, step, seed, first)
    if question.template is None:
        return prompts
    listed = (options[prompt.example_id] if options else question.trained for prompt in prompts)
    orders = (drawn_order(own, f"{seed}/{p.prompt_id}") for own, p in zip(listed, prompts, strict=True))
    return [replace(prompt, text=question.listing(order)) for prompt, order in zip(prompts, orders, strict=True)]


def drawn_order(classes: Sequence[str], key: str) -> list[str]:
    """The classes in an order drawn by `key`: sorted by hashes, which no version of Python or of a library changes."""
    return sorted(classes, key=lambda label: hashlib.blake2b(f"{key}/{label}".encode(), digest_size=8).digest())


def _prompt_seed(seed: int, split: str, step: int, index: int) -> int:
    """A seed of 31 bits: it fits a signed integer, and leaves room to add a completion's index."""
    digest = hashlib.blake2b(f"{seed}/{split}/{step}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def find_template(name_or_path: str) -> Path:
    """The file of a template.

    Raises:
        UserError: there is none; the message gives the nearest name.
    """
    known = {path.stem: path for path in FOLDER.glob("*.txt")}
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = sorted([*known, PROBLEM])
    hint = did_you_mean(path.stem, names)
    raise UserError(f"prompt.template: {name_or_path!r} is neither a file nor one of {', '.join(names)}.{hint}")


def asks_for_thinking(prompt_text: str) -> bool:
    """Return True if completions of this prompt need a think block: always, unless the prompt shows only `<answer>`."""
    return "<think>" in prompt_text or "<answer>" not in prompt_text
