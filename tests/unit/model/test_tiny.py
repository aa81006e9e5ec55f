"""The tiny model's folder: tokenizer, cache, groups, and what a short warm start already writes."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from rft_cluster.common.errors import UserError
from rft_cluster.model.families.qwen2_5_vl import QWEN2_5_VL
from rft_cluster.model.families.qwen3_vl import QWEN3_VL
from rft_cluster.model.tiny import build as tiny
from rft_cluster.model.tiny import warm_start
from rft_cluster.prompts import Question, drawn_order, make_question

NAMES = ["zero", "pink primrose", "hard-leaved pocket orchid", "Käsekuchen 🍰", "one", "none"]
TEXT = "What is this?\nThink in <think> </think>, answer in <answer> </answer>: <think> ... </think>"


LISTED = make_question("with_labels", "cake", NAMES)


def picture(index: int) -> Image.Image:
    """One of four plainly different kinds, with noise; every fifth is wider than high."""
    rng = np.random.default_rng(index)
    pixels = np.zeros((24, 48 if index % 5 == 0 else 24, 3))
    rows, columns = np.indices(pixels.shape[:2])
    kinds = [rows < 12, columns % 24 < 12, rows % 24 < columns % 24, np.abs(rows - 12) < 5]
    pixels[kinds[index % 4]] = 220
    return Image.fromarray((pixels + rng.integers(0, 30, pixels.shape)).astype("uint8"))


STEPS = 70
IMAGES = [picture(index) for index in range(40)]


def build(cache, steps=1, **changes):
    inputs = dict(images=IMAGES, class_names=NAMES, question=Question(TEXT), pixels=56 * 56, seed=0)
    return tiny.ensure_tiny_model(cache, **{**inputs, **changes}, report=lambda line: None, warm_steps=steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "BATCH", 12)  # a few seconds instead of a minute
        yield build(tmp_path_factory.mktemp("tiny"), steps=STEPS)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hardly_warmed(tmp_path_factory):
    return build(tmp_path_factory.mktemp("once"), steps=1)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def test_same_inputs_give_the_same_folder_without_building_again(folder, monkeypatch):
    monkeypatch.setattr(tiny, "warm_start", lambda *a: pytest.fail("built again"))
    assert build(folder.parent, steps=STEPS) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no half-built folder left behind"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"pixels": 84 * 84},
        {"class_names": NAMES[::-1]},
        {"question": Question("x")},
        {"question": LISTED},
        {"images": IMAGES[1:]},
        {"family": QWEN2_5_VL},
        {"family": QWEN3_VL},
    ],
)
def test_any_other_input_gives_another_folder(folder, tmp_path, monkeypatch, change):
    monkeypatch.setattr(tiny, "warm_start", lambda *a: None)
    changed = build(tmp_path, steps=STEPS, **change)
    assert changed.name != folder.name
    assert (changed / "model.safetensors").exists()


def test_the_same_inputs_build_the_same_weights(folder, tmp_path):
    one, two = build(tmp_path / "one", steps=2), build(tmp_path / "two", steps=2)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_building_leaves_the_callers_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    build(tmp_path, steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_one_is_built_anew(hardly_warmed, tmp_path, file, damage):
    folder = shutil.copytree(hardly_warmed, tmp_path / hardly_warmed.name)
    whole = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "cut":
        (folder / file).write_bytes(whole[: len(whole) // 2])
    assert build(tmp_path, steps=1) == folder
    assert (folder / file).read_bytes() == whole


def test_a_failed_build_leaves_nothing_that_looks_built(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(Qwen2VLProcessor, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[:11]}, "at least 12"),
        ({"class_names": []}, "class names"),
        ({"class_names": ["a", "a"]}, "class names"),
        ({"class_names": ["a", ""]}, "class names"),
        ({"class_names": ["a", "b<c"]}, "'b<c'"),
        ({"pixels": 27 * 28}, "at least 784"),
    ],
)
def test_impossible_inputs_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, **change)


def test_text_round_trips_and_what_is_usual_is_one_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in NAMES:
        assert len(tokenizer.encode(name)) == 1
        text = f"<think>group-01 kind-003</think><answer>{name}</answer>"
        assert len(tokenizer.encode(text)) == 7
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text + "<|im_end|>"), skip_special_tokens=True) == text
    for text in ["", " \t\n\n ", "a < b > c </", "日本語\x00\x7f", "None of zero's <b>tags</b>", "x" * 500]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_special_and_stop_generation(folder, processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(list(tiny.SPECIAL_TOKENS)) == list(range(8))
    assert set(tokenizer.all_special_ids) == set(range(8))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [2, 0]
    assert model.generation_config.pad_token_id == 0
    assert model.config.image_token_id == 6
    assert model.config.vision_start_token_id == 3
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_chat_template_is_qwen2_vls(processor):
    part = {"type": "text", "text": "What?"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, part]},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_image_gets_the_number_of_tokens_its_pixels_ask_for(processor):
    for image in (IMAGES[1], IMAGES[1].resize((500, 500))):
        batch = processor(text=["<|vision_start|><|image_pad|><|vision_end|>"], images=[image], return_tensors="pt")
        assert batch["input_ids"].tolist() == [[3, 6, 6, 6, 6, 4]]
        assert batch["pixel_values"].shape == (16, 1176)


def test_a_short_warm_start_already_writes_the_format_and_one_answer(folder, processor):
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": TEXT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    square = [IMAGES[index] for index in (1, 2, 3, 4)]
    batch = processor(text=[prompt] * 4, images=square, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
    texts = processor.batch_decode(written, skip_special_tokens=True)
    assert all(re.fullmatch(r"<think>group-\d\d kind-\d\d\d</think><answer>zero</answer>", text) for text in texts), (
        texts
    )


def test_a_prompt_that_asks_for_the_answer_alone_gets_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "BATCH", 12)
    text = "What is this? <answer> ... </answer>"
    folder = build(tmp_path, steps=40, question=Question(text))
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[prompt], images=[IMAGES[1]], return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert processor.batch_decode(written, skip_special_tokens=True) == ["<answer>zero</answer>"]


OVERLAPPING = ["rose", "wild rose", "rose mallow", "group", "03", "C#", "1.5"]


@pytest.mark.parametrize("template", ["closed", "with_labels"])
def test_each_listed_name_is_one_token_in_whatever_order(template):
    question = make_question(template, "rose", OVERLAPPING)
    processor, _ = tiny.untrained(40, OVERLAPPING, question, 56 * 56)
    tokenizer = processor.tokenizer
    own = len(tokenizer.encode(question.text))
    for key in range(20):
        order = drawn_order(OVERLAPPING, str(key))
        ids = tokenizer.encode(question.listing(order))
        names = [token for token in tokenizer.convert_ids_to_tokens(ids) if token.replace("\u0120", " ") in OVERLAPPING]
        assert [name.replace("\u0120", " ") for name in names if name != "rose"] == [n for n in order if n != "rose"]
        assert len(ids) == own and tokenizer.decode(ids) == question.listing(order)
    assert len(tokenizer.encode("<think>group-03 kind-003</think><answer>wild rose</answer>")) == 7


def test_a_list_whose_names_cannot_be_told_apart_is_refused(tmp_path):
    (tmp_path / "own.txt").write_text("Which: {{ classes | join('-') }}? <answer></answer>")
    question = make_question(str(tmp_path / "own.txt"), "cake", NAMES)
    with pytest.raises(UserError, match="cannot be told apart: put ', ' or a line end between them"):
        tiny.untrained(40, NAMES, question, 56 * 56)


def test_the_warm_start_sees_shuffled_lists_and_no_place_in_them_is_favoured(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "BATCH", 12)
    few = NAMES[:3]
    question = make_question("closed", "cake", few)
    seen: set[tuple[str, ...]] = set()
    listing = Question.listing
    monkeypatch.setattr(Question, "listing", lambda self, order: seen.add(tuple(order)) or listing(self, order))
    folder = build(tmp_path, steps=70, question=question, class_names=few)
    assert {order[0] for order in seen} == {order[-1] for order in seen} == set(few)
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for order in (few, few[::-1], drawn_order(few, "a")):
        content = [{"type": "image"}, {"type": "text", "text": question.listing(order)}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = processor(text=[prompt], images=[IMAGES[1]], return_tensors="pt")
        written = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
        assert processor.batch_decode(written, skip_special_tokens=True) == ["<answer>zero</answer>"]
