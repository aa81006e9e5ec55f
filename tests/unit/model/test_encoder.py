import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import INSTRUCT, THINKING
from PIL import Image, ImageChops
from some_prompt import some_prompt
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rft_cluster.common.errors import UserError
from rft_cluster.config import DataSection, ModelSection, load_config
from rft_cluster.data import load_dataset
from rft_cluster.data.images import image_sha256
from rft_cluster.generator.engine_thread import Batch, group_of
from rft_cluster.messages import Augmentation, Completion, Prompt
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.families.family import Family
from rft_cluster.model.families.known import FAMILIES
from rft_cluster.model.families.qwen2_vl import QWEN2_VL
from rft_cluster.model.image_size import PromptLength, image_tokens, model_size, view_of
from rft_cluster.model.tiny.build import build_model, build_processor
from rft_cluster.prompts import Question, render_template
from rft_cluster.rewards.format import format_problem
from rft_cluster.run.task import Task, ask_model

START, END, IMAGE_PAD = 3, 4, 6  # vision_start, vision_end, image_pad of the tiny tokenizer
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FORBIDDEN = [1, 3, 4, 5, 6, 7]  # im_start, and the vision tokens


@pytest.fixture(scope="module")
def processor():
    return build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def save(family: Family, folder: Path, template: str | None = None, processor: Any = None) -> str:
    """Write a processor and the small model's configuration. Returns the folder's path."""
    processor = processor or build_processor(["zero"], ["group-00"], "Which?", 56 * 56, family)
    if template:
        processor.chat_template = processor.tokenizer.chat_template = template
    processor.save_pretrained(folder)
    model = build_model(processor.tokenizer, family)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder_with(processor, tmp_path_factory) -> Callable[[int, int], PromptEncoder]:
    """Encoders by pixel limits, each loaded once."""
    folder = save(QWEN2_VL, tmp_path_factory.mktemp("processor"), processor=processor)
    return cache(lambda low, high: PromptEncoder(folder, between(low, high)))


@pytest.fixture(scope="module")
def encoder(encoder_with) -> PromptEncoder:
    return encoder_with(56 * 56, 56 * 56)


def test_a_prompt_that_is_too_long_is_refused_with_its_counts(encoder):
    image = picture(30, 30)
    prompt, images = some_prompt(image=image), {image_sha256(image): image}
    ids = encoder.encode(prompt.text, image).token_ids
    assert ids.count(IMAGE_PAD) == 4  # resized to 56 x 56 pixels, 28 x 28 a token
    assert encoder.check_lengths([prompt], images, len(ids)) == [PromptLength(4, len(ids) - 4)]
    with pytest.raises(UserError) as caught:
        encoder.check_lengths([prompt], images, len(ids) - 1)
    for text in (
        *("the prompt of photos/a.png", f"has {len(ids)} tokens (4 of the image, {len(ids) - 4} of the text)"),
        f"model.max_prompt_tokens = {len(ids) - 1}",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("size", [(30, 30), (500, 667), (1000, 41), (28, 900), (1200, 900)])
def test_a_prompt_s_length_is_known_from_the_size_of_its_image(encoder_with, size):
    encoder, image = encoder_with(56 * 56, 200_000), picture(*size)
    prompt = some_prompt(image=image, text="Which one? \u00e9")
    tokens = len(encoder.encode(prompt.text, image).token_ids)
    (length,) = encoder.check_lengths([prompt], {image_sha256(image): image}, 10_000)
    assert length.tokens == tokens


def between(low: int, high: int) -> ModelSection:
    return ModelSection(path="a model", min_pixels=low, max_pixels=high)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_pixels_and_tokens_are_counted_alike_at_odd_sizes(family, tmp_path_factory):
    """By arithmetic, by the learner's encoder, and by the rule of the image processor in vLLM, with the same limits."""
    limits = (64 * 64, 90_000)
    encoder = PromptEncoder(save(family, tmp_path_factory.mktemp(family.model_type)), between(*limits))
    counts = set()
    for side in range(20):
        image = picture(61 + 37 * side, 997 - 41 * side)
        shown, encoded = encoder.image(image), encoder.encode("Which?", image)
        assert shown.size == model_size(61 + 37 * side, 997 - 41 * side, *limits, family.side)
        (frames, height, width), patches = encoded.image_grid_thw[0].tolist(), len(encoded.pixel_values)
        assert (frames, width * family.patch, height * family.patch) == (1, *shown.size)
        assert encoded.pixel_values.shape[1] == 3 * 2 * family.patch**2
        again = smart_resize(*shown.size[::-1], family.side, min_pixels=limits[0], max_pixels=limits[1])
        assert again == shown.size[::-1], "vLLM's processor would resize it a second time"
        assert patches == height * width
        assert encoded.token_ids.count(IMAGE_PAD) == patches // 4 == image_tokens(*shown.size, family.side)
        counts.add(patches)
    assert len(counts) > 5


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_text_and_image_encoded_apart_are_what_the_processor_makes_of_both(family, tmp_path):
    processor = build_processor(["zero"], ["group-00"], "Which?", 56 * 56, family)
    encoder = PromptEncoder(save(family, tmp_path, processor=processor), between(64 * 64, 90_000))
    turned = Augmentation((0.1, 0.0, 0.95, 0.9), True, 10.0, (1.1, 0.9, 1.0))
    for size, how in (((61, 997), None), ((300, 200), turned), ((70, 70), None)):
        image = picture(*size)
        ours = encoder.joined(encoder.encode_text("Which? \u00e9"), encoder.encode_image(image, how))
        assert encoder.image(image, how).size == encoder.image(image).size
        theirs = processor(
            text=[encoder.chat("Which? \u00e9")],
            images=[encoder.image(image, how)],
            return_tensors="pt",
            images_kwargs=encoder.image_limits(),
        )
        assert ours.token_ids == theirs["input_ids"][0].tolist()
        assert torch.equal(ours.pixel_values, theirs["pixel_values"])
        assert torch.equal(ours.image_grid_thw, theirs["image_grid_thw"])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_between_close_limits_an_image_is_resized_once(family, tmp_path):
    """As the warm start of the small model does it, whose limits are equal."""
    encoder = PromptEncoder(save(family, tmp_path), between(50_000, 50_000))
    encoded = encoder.encode("Which?", picture(300, 200))
    width, height = model_size(300, 200, 50_000, 50_000, family.side)
    assert width * height < 50_000
    assert encoded.image_grid_thw[0].tolist() == [1, height // family.patch, width // family.patch]


@pytest.mark.parametrize(("name", "red"), [("qwen2_vl", 1.93), ("qwen2_5_vl", 1.93), ("qwen3_vl", 1.0)])
def test_pixels_are_normalised_as_the_family_does_it(name, red, tmp_path):
    encoded = PromptEncoder(save(FAMILIES[name], tmp_path), between(64 * 64, 64 * 64)).encode("Which?", picture(70, 70))
    assert encoded.pixel_values[:, 0].mean().item() == pytest.approx(red, abs=0.001)  # the first value is of red


def test_an_instruct_variant_opens_nothing_and_may_be_asked_for_the_answer_alone(tmp_path):
    encoder = PromptEncoder(save(FAMILIES["qwen3_vl"], tmp_path, INSTRUCT), between(64 * 64, 64 * 64))
    assert encoder.chat("Which?") == f"<|im_start|>user\n{IMAGE}Which?<|im_end|>\n<|im_start|>assistant\n"
    asked = some_prompt(text=render_template("answer_only", "flower", ["rose"]))
    assert encoder.opening == ""
    assert format_problem(asked, generated(encoder, asked, "<answer>rose</answer>")) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("It is red.\n</think>\n\n<answer>rose</answer>", ""),
        ("</think><answer>rose</answer>", ""),
        ("It is red.", "no </think>"),
        ("<think>It is red.</think><answer>rose</answer>", "<think> 2 times"),
        ("red</think> So: <answer>rose</answer>", "text between the blocks"),
        ("<answer>rose</answer>", "no </think>"),
    ],
)
def test_a_thinking_variant_s_format_is_judged_on_prompt_and_completion_together(tmp_path, text, problem):
    encoder = PromptEncoder(save(FAMILIES["qwen3_vl"], tmp_path, THINKING), between(64 * 64, 64 * 64))
    assert encoder.opening == "<think>\n" and encoder.chat("Which?").endswith("<|im_start|>assistant\n<think>\n")
    asked = some_prompt(text=render_template("think_answer", "flower", ["rose"]))
    assert format_problem(asked, generated(encoder, asked, text)) == problem


def generated(encoder: PromptEncoder, prompt: Prompt, text: str) -> Completion:
    """The completion that a generator makes of what its engine wrote."""
    span = SimpleNamespace(version="0", start=0, end=1)
    answer = SimpleNamespace(token_ids=[], logprobs=[], text=text, finish_reason="stop", weight_versions=[span])
    output = SimpleNamespace(outputs=[answer], prompt_token_ids=[])
    return group_of(prompt, output, Batch([prompt], 1, 0, encoder.opening)).completions[0]


def test_a_question_for_the_answer_alone_is_refused_to_a_thinking_variant(tmp_path):
    folder = save(FAMILIES["qwen3_vl"], tmp_path, THINKING)
    config = load_config("digits", ["prompt.template=answer_only", "model.max_prompt_tokens=256"])
    dataset = load_dataset(config.data, 0)
    task = Task(dataset, Question(render_template("answer_only", "digit", dataset.classes)))
    with pytest.raises(UserError, match=r"answer_only asks for the answer alone.*opens <think>.*template=think_answer"):
        ask_model(config, task, folder, dataset.train[:1])
    assert ask_model(config, task, folder, dataset.train[:1], training=False).lengths, "nothing is rewarded then"
    task = Task(dataset, Question(render_template("think_answer", "digit", dataset.classes)))
    assert ask_model(config, task, folder, dataset.train[:1]).lengths


def upside_down(image: Image.Image) -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = 8
    return image, {"format": "JPEG", "quality": 90, "exif": exif}


WAYS = {
    "a photograph": lambda image: (image, {"format": "JPEG", "quality": 90}),
    "turned": upside_down,
    "grey": lambda image: (image.convert("L"), {"format": "PNG"}),
    "see-through": lambda image: (image.convert("RGBA"), {"format": "PNG"}),
    "a palette": lambda image: (image.convert("P"), {"format": "PNG"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limits", [(56 * 56, 40_000), (12_544, 12_544)])
def test_an_image_that_was_made_smaller_is_the_same_to_the_model(encoder_with, tmp_path, way, limits):
    """To the last bit, where `min_pixels` leaves room for that; else of the same size, and hardly different."""
    encoder = encoder_with(*limits)
    noise = Image.effect_noise((480, 360), 80)
    shown, how = WAYS[way](Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)]))
    for i in range(2):
        (tmp_path / "photos" / "ab"[i]).mkdir(parents=True, exist_ok=True)
        ImageChops.offset(shown, i).save(tmp_path / "photos" / "ab"[i] / f"{i}.img.png", **how)
    config = DataSection(source="folder", path=tmp_path / "photos", shots=1, validation=0, test=0)
    dataset = load_dataset(config, 0, view_of(*limits, 28))
    for example in dataset.train:
        file, kept = (tmp_path / "photos" / example.example_id).read_bytes(), dataset.image(example)
        assert kept != file
        seen, whole = encoder.image(kept), encoder.image(file)
        assert seen.size == whole.size
        if limits[0] < limits[1]:
            assert seen.tobytes() == whole.tobytes()
        assert np.abs(np.asarray(seen, dtype=int) - np.asarray(whole)).mean() < 2  # of 255


def test_vision_tokens_and_what_a_text_does_not_show_are_forbidden(processor, tmp_path):
    names = ["<|object_ref_start|>", "<|box_end|>", "<unused>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    processor.tokenizer.add_tokens(["<tool_call>"])  # not special: a text shows it
    encoder = PromptEncoder(save(QWEN2_VL, tmp_path, processor=processor), between(56 * 56, 56 * 56))
    hidden = [
        token_id
        for token_id in range(len(encoder.tokenizer))
        if not encoder.tokenizer.decode([token_id], skip_special_tokens=True)
    ]
    assert encoder.forbidden_token_ids == sorted(set(hidden) - set(encoder.stop_token_ids))
    assert set(encoder.tokenizer.convert_tokens_to_ids(names)) < set(encoder.forbidden_token_ids)


def test_special_tokens_are_forbidden_and_both_stop_tokens_known(encoder):
    assert encoder.forbidden_token_ids == FORBIDDEN
    assert encoder.stop_token_ids == encoder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert encoder.image_token_id == IMAGE_PAD


def edit(folder: str, file: str, **values: Any) -> None:
    path = Path(folder) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_stop_and_vision_tokens_are_also_those_of_the_configuration(tmp_path):
    """Here they are plain words of the tokenizer, which no name gives away."""
    folder = save(QWEN2_VL, tmp_path)
    before = PromptEncoder(folder, between(56 * 56, 56 * 56))
    edit(folder, "config.json", vision_start_token_id=100)
    edit(folder, "generation_config.json", eos_token_id=[before.stop_token_ids[0], 101])
    encoder = PromptEncoder(folder, between(56 * 56, 56 * 56))
    assert encoder.stop_token_ids == [*before.stop_token_ids, 101]
    assert encoder.forbidden_token_ids == [*before.forbidden_token_ids, 100]
    (tmp_path / "generation_config.json").unlink()
    assert PromptEncoder(folder, between(56 * 56, 56 * 56)).stop_token_ids == before.stop_token_ids


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = save(QWEN2_VL, tmp_path)
    edit(folder, "config.json", image_token_id=248056)
    with pytest.raises(UserError, match=r"image_token_id of config.json is 248056, but the tokenizer's .* is 6: they"):
        PromptEncoder(folder, between(56 * 56, 56 * 56))
