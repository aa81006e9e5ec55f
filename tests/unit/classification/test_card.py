import hashlib
import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from rft_cluster.classification.card import CARD_FILE, check_card, find_export, make_card, read_card
from rft_cluster.common.errors import UserError
from rft_cluster.config import load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.prompts import Question, make_question


def picture(colour: str, encoding: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(file, encoding)
    return file.getvalue()


CONFIG = load_config("digits", ["sampling.max_tokens=12", "sampling.top_k=50", "algorithm.importance_cap=null"])
DATASET = FewShotDataset.of(
    "photos",
    ["rose", "tulip"],
    train=[LabelledImage("a", picture("red"), "rose", ("Rosa",)), LabelledImage("b", picture("blue"), "tulip")],
    validation=[],
    test=[LabelledImage("c", picture("green"), "rose")],
    pool=[],
)
QUESTION = Question("Which flower?")
PIXELS = (3136, 401_408)


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    (folder / CARD_FILE).write_text(json.dumps(make_card(CONFIG, DATASET, QUESTION, PIXELS).model_dump()))
    return folder


def test_a_card_says_all_that_predicting_needs(export):
    card = read_card(export)
    assert (card.classes, card.aliases, card.prompt) == (["rose", "tulip"], {"rose": ["Rosa"]}, QUESTION.text)
    assert (card.min_pixels, card.max_pixels, card.max_tokens) == (
        *PIXELS, 12,
    )  # fmt: skip
    assert (card.temperature, card.top_k) == (1.0, 50)  # with which votes are sampled
    # The size, then red, green and blue of 30 x 20 pixels.
    pixels = [b"(30, 20)" + bytes(colour) * 600 for colour in ((255, 0, 0), (0, 0, 255))]
    assert card.trained_on_pixels == sorted(hashlib.sha256(picture).hexdigest() for picture in pixels)


def test_a_changed_prompt_is_noticed(export):
    file = export / CARD_FILE
    file.write_text(file.read_text().replace("Which flower?", "Which tree?"))
    with pytest.raises(UserError, match="changed after training"):
        read_card(export)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"classes": ["a"]}'])
def test_a_broken_card_is_explained(export, content):
    (export / CARD_FILE).write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_card(export)


def test_a_run_or_its_model_may_be_named(export):
    assert find_export(export) == export
    assert find_export(export.parent) == export


def test_what_is_no_export_is_explained(export, tmp_path):
    shards = tmp_path / "run" / "checkpoints" / "step-000004"
    shards.mkdir(parents=True)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("")
    for path, message in (
        (shards, "learners' shards.*run/model"),
        (unfinished, "no model/ yet.*--resume"),
        (tmp_path / "none", "there is no folder"),
        (tmp_path, "neither a run's folder nor a model"),
    ):
        with pytest.raises(UserError, match=message):
            find_export(path)


def test_only_what_was_trained_is_asked(export):
    card = read_card(export)
    check_card(card, DATASET, QUESTION, PIXELS)
    with pytest.raises(UserError, match="another question"):
        check_card(card, DATASET, Question("Which tree?"), PIXELS)
    with pytest.raises(UserError, match=r"max_image_tokens\) is 6272, but the policy was trained with 401408"):
        check_card(card, DATASET, QUESTION, (3136, 6272))


@pytest.mark.parametrize(
    ("calibration", "wrong"),
    [
        ({"temperature": 0.4621, "images": 200}, None),
        (None, None),
        ({"temperature": 0.0, "images": 200}, "calibration.temperature"),
        ({"temperature": 1e9, "images": 200}, "calibration.temperature"),
        ({"temperature": "nan", "images": 200}, "calibration.temperature"),
        ({"temperature": 1.0, "images": 12}, "calibration.images"),
        ({"temperature": 1.0, "images": 200, "scale": 2}, "calibration.scale"),
    ],
)
def test_a_stranger_s_temperature_lies_within_bounds(export, calibration, wrong):
    carded(export, calibration=calibration)
    if wrong:
        with pytest.raises(UserError, match=f"classifier.json cannot be read.*\n.*{wrong}"):
            read_card(export)
    else:
        note = read_card(export).calibration_note
        assert ("temperature 0.4621, fitted on 200 validation images" in note) == bool(calibration)
        assert note.startswith("not calibrated") != bool(calibration)


def test_a_calibration_says_that_it_saw_no_image_of_the_unseen_classes(export):
    fitted = {"temperature": 0.5, "images": 200}
    carded(export, calibration=fitted)
    assert read_card(export).calibration_note.endswith("fitted on 200 validation images)")
    seen_alone = read_card(export).model_copy(update={"unseen": ["tulip"]})
    assert seen_alone.calibration_note.endswith("200 validation images of the classes that were trained)")


def split_of(image: bytes) -> FewShotDataset:
    return FewShotDataset.of("photos", DATASET.classes, [], [], [LabelledImage("again", image, "tulip")], [])


@pytest.mark.parametrize("encoding", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_an_image_that_was_trained_on_proves_nothing_in_whatever_encoding(export, encoding):
    lossless = {"lossless": True} if encoding == "WEBP" else {}
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "blue").save(file, encoding, **lossless)
    with pytest.raises(UserError, match=r"1 of the 1 images to evaluate on were trained on \(first again\)"):
        check_card(read_card(export), split_of(file.getvalue()), QUESTION, PIXELS)


def test_a_card_that_knows_encoded_images_alone_is_read(export):
    file = export / CARD_FILE
    card = json.loads(file.read_text())
    del card["trained_on_pixels"]
    card["trained_on"] = [hashlib.sha256(picture("blue")).hexdigest()]
    file.write_text(json.dumps(card))
    with pytest.raises(UserError, match="were trained on"):
        check_card(read_card(export), split_of(picture("blue")), QUESTION, PIXELS)
    check_card(read_card(export), split_of(picture("green")), QUESTION, PIXELS)


def test_black_and_white_of_16_bits_are_those_of_the_training(export):
    seen = replace(DATASET, levels=(0, 4095))
    card = make_card(CONFIG, seen, QUESTION, PIXELS)
    assert card.levels == (0, 4095) and make_card(CONFIG, DATASET, QUESTION, PIXELS).levels is None
    check_card(card, seen, QUESTION, PIXELS)
    check_card(card, DATASET, QUESTION, PIXELS)  # without such pictures there is nothing to differ
    with pytest.raises(UserError, match=r"set 'data.sixteen_bit=\[0, 4095\]'$"):
        check_card(card, replace(DATASET, levels=(0, 65535)), QUESTION, PIXELS)


LISTED = make_question("closed", "flower", DATASET.classes)


def carded(folder, **changes) -> None:
    """Write the card of a policy whose prompts list the classes, with changes."""
    values = {**make_card(CONFIG, DATASET, LISTED, PIXELS).model_dump(), **changes}
    (folder / CARD_FILE).write_text(json.dumps(values))


def test_a_card_holds_the_template_whose_order_of_classes_is_drawn(export):
    carded(export)
    card = read_card(export)
    assert card.question == LISTED and "{{ classes" in card.template
    check_card(card, DATASET, LISTED, PIXELS)
    one_text = Question(LISTED.text)  # as if training had listed the classes in one order
    for other in (one_text, make_question("closed", "tree", DATASET.classes)):
        with pytest.raises(UserError, match="another question"):
            check_card(card, DATASET, other, PIXELS)


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "{{ classes }}"},
        {"template": None},
        {"subject": "tree"},
        {"classes": ["tulip", "rose"]},
        {"unseen": ["rose"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_card_binds_is_not_changed_unnoticed(export, changes):
    carded(export, **changes)
    with pytest.raises(UserError, match="changed after training"):
        read_card(export)


def test_a_card_of_one_text_that_lists_the_classes_is_still_asked_that_text(export):
    old = make_card(CONFIG, DATASET, Question(LISTED.text), PIXELS).model_dump()
    del old["template"], old["subject"]
    (export / CARD_FILE).write_text(json.dumps(old))
    check_card(read_card(export), DATASET, LISTED, PIXELS)
    with pytest.raises(UserError, match="another question"):
        check_card(read_card(export), DATASET, make_question("closed", "tree", DATASET.classes), PIXELS)


THREE = ["rose", "tulip", "iris"]
NESTED = "{% for one in classes %}" * 30 + "{% endfor %}" * 30  # more than Python compiles


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        ("{{ 6 // (classes | length - 2) }}", "6", "template, with 2 classes, cannot be rendered: integer division"),
        ("{{ 'x'.encode('no such') }}", "Which?", "with 3 classes, cannot be rendered: unknown encoding: no such"),
        (NESTED, "Which?", "with 3 classes, cannot be rendered: too many"),
        ("{{ classes | random }}", "rose", "cannot be rendered: No filter named 'random'"),
        ("{{ 'Which?' if classes | length > 2 else '<|image_pad|>' }}", "Which?", "2 classes, holds a special token"),
        ("{{ 'Which?' if classes | length > 2 }}", "Which?", "2 classes, gives an empty text"),
        ("Where? {{ classes | join }}", "Where?", r"another question than the prompt: 'Where\? rosetulipiris'\. A run"),
    ],
)
def test_a_stranger_s_template_is_tried_when_its_card_is_read(export, template, prompt, message):
    theirs = Question(prompt, template, "flower", tuple(THREE))  # whose SHA-256 fits
    carded(export, template=template, prompt=prompt, prompt_sha256=theirs.sha256, classes=THREE)
    with pytest.raises(UserError, match=rf"^{export / CARD_FILE}: .*{message}.*ask whoever made it$"):
        read_card(export)
