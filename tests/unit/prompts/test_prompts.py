import pytest

from rft_cluster.common.errors import UserError
from rft_cluster.messages import Example, ImageRef
from rft_cluster.prompts import (
    Question,
    draw_prompts,
    longest,
    make_prompts,
    make_question,
    narrowed,
    render_template,
    text_hash,
)
from rft_cluster.rewards.format import THINK_ANSWER

EXAMPLES = [
    Example(ImageRef("digits/0017", "1" * 64), "seven", ("7",)),
    Example(ImageRef("digits/0018", "2" * 64), "eight"),
]


def test_think_answer_asks_for_the_subject_and_shows_the_layout():
    text = render_template("think_answer", "flower", ["rose", "tulip"])
    assert "flower" in text and "{" not in text
    assert THINK_ANSWER.fullmatch(text.splitlines()[-1])
    assert "rose" not in text  # the published task does not offer the names


def test_each_built_in_template_asks_for_what_its_name_says():
    texts = {
        name: render_template(name, "flower", ["rose", "tulip"])
        for name in ("think_answer", "answer_only", "closed", "with_labels", "weak")
    }
    assert [name for name, text in texts.items() if "<think>" in text] == ["think_answer", "with_labels"]
    assert [name for name, text in texts.items() if "<answer>" in text] == [
        "think_answer",
        "answer_only",
        "closed",
        "with_labels",
    ]
    assert [name for name, text in texts.items() if "rose, tulip" in text] == ["with_labels"]
    assert [name for name, text in texts.items() if "\nrose\ntulip\n" in text] == ["closed"]
    assert all("flower" in text and "{" not in text for text in texts.values())
    assert len({text_hash(text) for text in texts.values()}) == 5


def test_a_template_of_ones_own_sees_the_classes(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("A {{ subject }}: {{ classes | join(', ') }}?\n")
    assert render_template(str(path), "flower", ["rose", "tulip"]) == "A flower: rose, tulip?"


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"'think_anwser' is neither .*Did you mean think_answer\?"):
        render_template("think_anwser", "flower", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Which {{ subjet }}?", "'subjet' is undefined. Its variables are subject and classes"),
        ("Which {{ subject ?", "cannot be rendered"),
        ("{{ subject.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 + subject }}", "unsupported operand"),
        ("  \n", "empty text"),
        ("<|image_pad|> Which {{ subject }}?", "special token"),
    ],
)
def test_a_wrong_template_is_explained(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        render_template(str(path), "flower", [])


SYNTAXES = ["{%s}", "{ %s }", "${%s}", "$%s", "%%(%s)s", "{%s:>3}", "<%s>"]
PLACES = ["Which {}? <answer> </answer>", "{}", "a {}.\n<answer>...</answer>", "({})", "Is it:{}"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("name", ["subject", "classes", "Subject"])
def test_a_variable_in_another_tool_s_writing_is_refused_and_the_cure_works(tmp_path, place, syntax, name):
    path, variable = tmp_path / "q.txt", syntax % name
    path.write_text(place.replace("{}", variable))
    with pytest.raises(UserError, match=r"q\.txt holds .*two braces, and there are \{\{ subject \}\}") as refused:
        render_template(str(path), "flower", ["rose", "tulip"])
    assert f"holds {variable}, which" in str(refused.value)
    path.write_text(place.replace("{}", f"{{{{ {name.lower()} }}}}"))
    assert "{" not in render_template(str(path), "flower", ["rose", "tulip"]).replace("{}", "")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "mark", ["<image>", "<video>", "<IMAGE>", "<image_1>", "<image 2>", "<img>", "< image >", "<image/>", "[image]"]
)
def test_a_mark_for_the_image_is_refused_and_the_cure_works(tmp_path, place, mark):
    path, text = tmp_path / "q.txt", place.replace("{}", f"{mark}Which flower?")
    path.write_text(text)
    for name, problem in ((str(path), None), ("problem", text)):
        with pytest.raises(UserError, match=r"the image comes before the question by itself\. Take it out") as refused:
            render_template(name, "flower", [], problem=problem)
        assert f"holds {mark}, which" in str(refused.value)
    path.write_text(text.replace(mark, ""))
    assert "Which flower?" in render_template(str(path), "flower", [])


@pytest.mark.parametrize(
    "text",
    [
        "Put it in \\boxed{}. <answer>{label}</answer>",
        'Say {"subject": "flower"} in <answer>{...}</answer>',
        "{{ subject }}: {% for name in classes %}{{ name }}, {% endfor %}",
        "{# neither {subject} nor <image> #}Which {{subject}} does the image show, {as you see it}?",
        "It costs $5 or 100 % (tax included); a photo of a video recorder.",
    ],
)
def test_other_braces_and_tags_are_left_alone(tmp_path, text):
    path = tmp_path / "q.txt"
    path.write_text(text)
    assert render_template(str(path), "flower", ["rose", "<image>", "{subject}"])


def test_a_template_that_is_not_text_is_explained(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        render_template(str(path), "flower", [])


def test_prompts_carry_their_example_and_a_place():
    prompts = make_prompts(EXAMPLES, "Which digit?", "train", 12, seed=0)
    assert [p.prompt_id for p in prompts] == ["train/12/0", "train/12/1"]
    first = prompts[0]
    assert (first.example, first.text) == (EXAMPLES[0], "Which digit?")
    assert (first.example_id, first.label, first.aliases) == ("digits/0017", "seven", ("7",))


def test_seeds_depend_on_all_four_and_never_change():
    assert make_prompts(EXAMPLES, "x", "train", 12, 0) == make_prompts(EXAMPLES, "x", "train", 12, 0)
    seeds = [
        p.seed
        for seed in range(5)
        for split in ("train", "validation")
        for step in range(5)
        for p in make_prompts(EXAMPLES, "x", split, step, seed)
    ]
    assert len(set(seeds)) == 5 * 2 * 5 * 2
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds[0] == 109515029  # recorded runs hang on it: (0, train, 0, 0)


MARKS = [
    "<image>",
    "[img]",
    "{subject}",
    "${subject}",
    "{{ 7 * 7 }}",
    "{% for x in classes %}",
    "{# x #}",
    "<|im_end|>",
    "<|x",
]


@pytest.mark.parametrize("template", ["think_answer", "answer_only", "closed", "weak", "with_labels"])
@pytest.mark.parametrize("around", ["", "red {} rose", "{}\nrose"])
@pytest.mark.parametrize("mark", MARKS)
def test_a_subject_that_would_be_read_otherwise_than_meant_is_named(template, around, mark):
    subject = around.replace("{}", mark) or mark
    with pytest.raises(UserError, match=r"^prompt\.subject "):
        render_template(template, subject, ["rose", "tulip"])
    assert "red rose" in render_template(template, "red rose", ["rose", "tulip"])


@pytest.mark.parametrize("blank", ["", " ", "\n", "\t \u00a0"])
def test_an_empty_subject_is_refused_where_it_is_asked_for(tmp_path, blank):
    with pytest.raises(UserError, match=r"prompt\.subject is empty"):
        render_template("think_answer", blank, ["rose", "tulip"])
    (tmp_path / "own.txt").write_text("What is it? <answer></answer>")
    assert render_template(str(tmp_path / "own.txt"), blank, ["rose", "tulip"]).startswith("What is it?")


def test_a_class_that_holds_a_special_token_is_named_and_not_the_template():
    with pytest.raises(UserError, match=r"^class '<\|pad\|>' holds a special token"):
        render_template("with_labels", "flower", ["rose", "<|pad|>"])
    assert "rose" not in render_template("think_answer", "flower", ["rose", "<|pad|>"])


CLASSES = ["rose", "tulip", "daisy", "lily", "iris"]


def listed(question: Question, split: str = "train", step: int = 0, seed: int = 0) -> list[list[str]]:
    """The classes of each prompt of `closed`, in the order in which the prompt lists them."""
    prompts = draw_prompts([EXAMPLES[0]] * 40, question, split, step, seed)
    return [prompt.text.splitlines()[1:-2] for prompt in prompts]


def test_each_prompt_lists_the_classes_in_an_order_drawn_from_seed_step_and_index():
    question = make_question("closed", "flower", CLASSES)
    orders = listed(question)
    assert orders == listed(question), "a run that resumes asks the same"
    assert all(sorted(order) == sorted(CLASSES) for order in orders)
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(CLASSES)
    others = (listed(question, step=1), listed(question, seed=1), listed(question, split="validation"))
    assert all(orders != other for other in others) and orders[0] != orders[1]
    assert orders[0] == ["daisy", "rose", "iris", "tulip", "lily"]  # recorded runs hang on it: (0, train, 0, 0)


def test_ids_and_seeds_are_those_of_one_text_and_the_first_text_has_the_own_order():
    question = make_question("with_labels", "flower", CLASSES)
    drawn = draw_prompts(EXAMPLES, question, "train", 12, seed=0)
    fixed = make_prompts(EXAMPLES, question.text, "train", 12, seed=0)
    assert [(p.prompt_id, p.seed, p.example) for p in drawn] == [(p.prompt_id, p.seed, p.example) for p in fixed]
    assert "rose, tulip, daisy, lily, iris." in question.text and question.text not in {p.text for p in drawn}
    assert all(question.text.split(": ")[0] == p.text.split(": ")[0] for p in drawn)
    some = question.in_some_orders(3, seed=0)
    assert some[0] == question.text and len(set(some)) == 4


@pytest.mark.parametrize("seed", [5, 10, 11])
@pytest.mark.parametrize(("classes", "count", "found"), [(2, 4, 1), (3, 4, 4), (3, 9, 5), (102, 4, 4)])
def test_some_orders_differ_from_each_other_and_from_the_own_one(classes, count, found, seed):
    names = [f"class {number}" for number in range(classes)]
    orders = make_question("closed", "flower", names).some_orders(count, seed)
    assert len({tuple(order) for order in [names, *orders]}) == 1 + found == 1 + len(orders)
    assert all(sorted(order) == sorted(names) for order in orders)


@pytest.mark.parametrize(
    ("template", "lists"),
    [
        ("A {{ subject }} of {{ classes | length }} kinds?", False),
        ("{{ classes | sort | join(' ') }}", False),
        ("{{ classes | join(' ') }}", True),
        ("{% for name in classes %}{{ loop.index }}. {{ name }}\n{% endfor %}", True),
    ],
)
def test_a_template_lists_the_classes_if_their_order_shows(tmp_path, template, lists):
    path = tmp_path / "mine.txt"
    path.write_text(template)
    question = make_question(str(path), "flower", CLASSES)
    assert (question.template is not None) == lists
    texts = {prompt.text for prompt in draw_prompts([EXAMPLES[0]] * 9, question, "train", 0, 0)}
    assert (len(texts) > 1) == lists


def test_the_hash_of_a_question_is_that_of_its_text_unless_it_lists_the_classes():
    assert Question("Which?").sha256 == text_hash("Which?")
    question = make_question("closed", "flower", CLASSES)
    others = [make_question("closed", "tree", CLASSES), make_question("closed", "flower", CLASSES[::-1])]
    assert len({text_hash(question.text), question.sha256, *(other.sha256 for other in others)}) == 4
    assert make_question("problem", "flower", CLASSES, problem="Which, of rose and tulip?").template is None


def test_unseen_classes_stay_out_of_training_whatever_lists_them(tmp_path):
    """A template that sorts the classes has one text in every order, but not without some of them."""
    path = tmp_path / "sorted.txt"
    path.write_text("One of {{ classes | sort | join(', ') }}?")
    classes = ["tulip", "rose", "lily"]
    assert make_question(str(path), "flower", classes).template is None
    question = make_question(str(path), "flower", classes, unseen=("rose",))
    (prompt,) = draw_prompts(EXAMPLES[:1], question, "train", 0, 0)
    assert prompt.text == "One of lily, tulip?" and question.text == "One of lily, rose, tulip?"
    assert question.sha256 != make_question(str(path), "flower", classes, unseen=("lily",)).sha256
    with pytest.raises(UserError, match=r"names 'rose', which data\.unseen_classes keeps out of training"):
        make_question("problem", "flower", classes, "A rose, a lily or a tulip?", unseen=("rose",))
    assert make_question("problem", "flower", classes, "Which primrose?", unseen=("rose",)).text == "Which primrose?"


@pytest.mark.parametrize(
    ("template", "subject", "expected"),
    [
        ("closed", "flower", render_template("closed", "flower", ["iris", "rose"])),
        ("with_labels", "flower", render_template("with_labels", "flower", ["iris", "rose"])),
        ("answer_only", "flower", render_template("closed", "flower", ["iris", "rose"])),
        ("think_answer", "flower", render_template("with_labels", "flower", ["iris", "rose"])),
        ("think_answer", "", render_template("with_labels", "object", ["iris", "rose"])),  # cards of earlier versions
    ],
)
def test_a_question_is_narrowed_to_some_options(template, subject, expected):
    asked = make_question(template, "flower", ["rose", "tulip", "iris"])
    assert narrowed(asked, subject, ["iris", "rose"]) == expected


def test_a_name_that_holds_a_special_token_is_not_listed():
    with pytest.raises(UserError, match="holds a special token"):
        narrowed(make_question("answer_only", "flower", ["<|x", "b"]), "flower", ["<|x", "b"])


def test_the_longest_names_are_those_with_the_most_bytes():
    assert longest(["abcd", "éèê", "a"], 2) == ["éèê", "abcd"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 6 // (classes | length - 2) }}", "with 2 classes, cannot be rendered: integer division"),
        ("{{ 'Which?' if classes | length > 2 else '<|image_pad|>' }}", "with 2 classes, holds a special token"),
        ("{{ 'Which?' if classes | length > 2 }}", "with 2 classes, gives an empty text"),
    ],
)
def test_a_template_that_fails_with_fewer_classes_is_explained(source, message):
    asked = Question("Which?", source, "flower", ("rose", "tulip", "iris"))
    with pytest.raises(UserError, match=f"^the question's template, {message}"):
        narrowed(asked, "flower", ["rose", "iris"])


@pytest.mark.parametrize("source", ["{{ classes | random }}?", "{{ lipsum() }}?"])
def test_a_question_is_the_same_whenever_it_is_rendered(tmp_path, source):
    (tmp_path / "own.txt").write_text(source)
    with pytest.raises(UserError, match=r"cannot be rendered: (No filter named 'random'|'lipsum' is undefined)"):
        make_question(str(tmp_path / "own.txt"), "flower", ["rose", "tulip"])


def test_a_template_sorts_a_list_of_its_own():
    classes = ["tulip", "rose"]
    asked = Question("", "{{ classes.sort() or classes | join(', ') }}?", "flower", tuple(classes))
    assert asked.listing(classes) == "rose, tulip?" and classes == ["tulip", "rose"]
