"""The packed row of all answers against transformers' plain forward of each by itself, in FP32."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.models import spread
from rft_cluster.common.errors import UserError
from rft_cluster.config import ModelSection
from rft_cluster.model import class_logprobs
from rft_cluster.model.class_logprobs import ClassScorer, answer_tokens, shared_length
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.tiny.build import build_model, build_processor
from tests.plain import plain_logits

LIMITS = {"min_pixels": 56 * 56, "max_pixels": 84 * 84}
NAMES = ["zero", "ab", "abc", "wxyz", "vwxyz", "qvwxyz"]  # of 1 to 6 tokens
BEFORE = "<answer>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, its weights large enough for log-probabilities that differ."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spread(build_model(processor.tokenizer).float()).to(torch.bfloat16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> PromptEncoder:
    return PromptEncoder(str(folder), ModelSection(path=str(folder), **LIMITS))


@pytest.fixture(scope="module")
def plain(folder):
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def scorer(folder) -> ClassScorer:
    return scorer_in(folder, "float32")


def scorer_in(folder, dtype: str) -> ClassScorer:
    scorer = ClassScorer(ModelSection(path=str(folder), **LIMITS), "cpu", dtype, threads=1)
    scorer.load(str(folder))
    return scorer


def picture(width: int = 70, height: int = 60) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def alone(plain, encoder: PromptEncoder, question: str, text: str, shared: str) -> float:
    """log P(the rest of `text` | image, question, `shared`), from the logits of the whole sequence by itself."""
    prompt, (written,) = encoder.encode(question, picture()), answer_tokens(encoder, [text])
    known = len(prompt.token_ids) + len(encoder.tokenizer(shared)["input_ids"])
    with torch.no_grad():
        logits = plain_logits(plain, prompt, written, encoder.image_token_id)
    logits[:, encoder.forbidden_token_ids] = -torch.inf
    each = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(prompt.token_ids + written)[1:, None])[:, 0]
    return float(each[known - 1 :].double().sum())


@pytest.mark.parametrize("before", [BEFORE, "<think>group-00</think><answer>"], ids=["answer only", "after reasoning"])
def test_each_name_has_the_probability_that_it_has_alone(scorer, plain, encoder, before):
    sizes = [len(encoder.tokenizer(name)["input_ids"]) for name in NAMES]
    assert sizes == [1, 2, 3, 4, 5, 6]
    endings = [f"{name}</answer>" for name in NAMES]
    found, counts = scorer.logprobs(picture(), "Which?", before, endings)
    wanted = [alone(plain, encoder, "Which?", before + ending, before) for ending in endings]
    assert np.std(found) > 1, "a test of equal numbers would be blind"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    closed = len(encoder.tokenizer("</answer>")["input_ids"]) + 1
    assert (counts - closed).tolist() == sizes


def test_in_bf16_as_on_gpus_little_changes(folder, scorer):
    other = scorer_in(folder, "bfloat16")
    endings = [f"{name}</answer>" for name in NAMES]
    exact, found = (one.logprobs(picture(), "Which?", BEFORE, endings)[0] for one in (scorer, other))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, exact, rtol=0.03, atol=0.3)
    assert np.abs(found - exact).max() > 1e-4, "it computed in FP32"


def test_in_bf16_the_rotary_frequencies_stay_exact(folder):
    """A learner's are under FSDP, and an engine's. Rounded ones turn distant tokens by the wrong angle."""
    policy = scorer_in(folder, "bfloat16")._loaded[1]
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    frequencies = {name: buffer for name, buffer in policy.named_buffers() if "inv_freq" in name}
    assert len(frequencies) == 4  # of text and vision, and as they were at first
    assert {buffer.dtype for buffer in frequencies.values()} == {torch.float32}


def test_a_full_gpu_is_said_while_the_policy_is_loaded_and_while_it_computes(folder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    scorer, message = scorer_in(folder, "float32"), "^the policy that scores the classes is out of memory .CUDA out of"
    for name, call in (
        ("answer_logprobs", lambda: scorer.logprobs(picture(), "Which?", BEFORE, ["zero</answer>"])),
        ("move_to", lambda: scorer.load(str(folder))),
    ):
        monkeypatch.setattr(class_logprobs, name, full)
        with pytest.raises(UserError, match=message):
            call()


def test_names_in_any_order_have_the_same_probabilities(scorer):
    endings = [f"{name}</answer>" for name in NAMES]
    found, _ = scorer.logprobs(picture(), "Which?", BEFORE, endings)
    turned, _ = scorer.logprobs(picture(), "Which?", BEFORE, endings[::-1])
    np.testing.assert_allclose(found[::-1], turned, rtol=0, atol=1e-5)


def test_more_names_than_a_row_holds_are_in_several_rows(scorer, monkeypatch):
    endings = [f"{name}</answer>" for name in NAMES]
    whole, counts = scorer.logprobs(picture(), "Which?", BEFORE, endings)
    monkeypatch.setattr(class_logprobs, "MOST_KEYS", 40)  # the prompt has more than 13 tokens: two names, or one
    rows = []
    packed = class_logprobs.pack_row
    monkeypatch.setattr(class_logprobs, "pack_row", lambda *some: rows.append(len(some[1])) or packed(*some))
    found, same = scorer.logprobs(picture(), "Which?", BEFORE, endings)
    assert len(rows) > 2 and sum(rows) == len(NAMES)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)
    assert counts.tolist() == same.tolist()


def test_the_image_and_what_is_shared_are_in_the_row_once(scorer, encoder, monkeypatch):
    rows = []
    packed = class_logprobs.pack_row
    monkeypatch.setattr(class_logprobs, "pack_row", lambda *some: rows.append(packed(*some)) or rows[-1])
    scorer.logprobs(picture(), "Which?", BEFORE, [f"{name}</answer>" for name in NAMES])
    (row,) = rows
    prompt = encoder.encode("Which?", picture())
    shared = len(encoder.tokenizer(BEFORE)["input_ids"])
    tails = sum(len(tokens) - 1 for tokens in answer_tokens(encoder, [f"{name}</answer>" for name in NAMES]))
    assert row.input_ids.shape == (1, len(prompt.token_ids) + shared + tails)
    assert len(row.pixel_values) == len(prompt.pixel_values)


def test_an_image_is_encoded_once_for_all_reasonings(scorer, monkeypatch):
    encoder, seen = scorer._loaded[0], []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *asked: seen.append(asked) or encode(*asked))
    endings = [f"{name}</answer>" for name in NAMES]
    first, _ = scorer.logprobs(picture(), "Which?", BEFORE, endings)
    scorer.logprobs(picture(), "Which?", f"<think>ab</think>{BEFORE}", endings)
    assert len(seen) == 1
    for image, question in ((picture(64), "Which?"), (picture(), "What?")):
        scorer.logprobs(image, question, BEFORE, endings)
    again, _ = scorer.logprobs(picture(), "Which?", BEFORE, endings)
    assert len(seen) == 4
    np.testing.assert_array_equal(first, again)


def test_what_looks_like_a_special_token_is_read_as_characters(scorer, encoder):
    """A name, or a reasoning that spells the image's token, would otherwise be taken for a second image."""
    name = "<|image_pad|>"
    assert encoder.image_token_id not in answer_tokens(encoder, [name])[0]
    found, _ = scorer.logprobs(picture(), "Which?", f"<think>{name}</think>", [f"{name}</answer>", "zero</answer>"])
    assert np.isfinite(found).all()


def test_what_the_chat_template_writes_is_not_written_twice(scorer, encoder, monkeypatch):
    endings = ["zero</answer>", "ab</answer>"]
    found, _ = scorer.logprobs(picture(), "Which?", "group-00</think><answer>", endings)
    monkeypatch.setattr(scorer._loaded[0], "opening", "<think>")
    again, _ = scorer.logprobs(picture(), "Which?", "<think>group-00</think><answer>", endings)
    np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize(
    ("completions", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 5, 9], [2, 5, 9]], 0), ([[1, 9], [1, 2, 9]], 1), ([[1, 9], [1, 9]], 1)],
)
def test_each_completion_keeps_a_token_of_its_own(completions, shared):
    assert shared_length(completions) == shared
