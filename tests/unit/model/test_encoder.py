import io

import pytest
from PIL import Image
from some_prompt import some_prompt

from rft_cluster.common.errors import UserError
from rft_cluster.data.images import image_sha256
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.tiny.build import build_processor

START, END, IMAGE_PAD = 3, 4, 6  # vision_start, vision_end, image_pad of the tiny tokenizer
FORBIDDEN = [1, 3, 4, 5, 6, 7]  # im_start, and the vision tokens


@pytest.fixture(scope="module")
def processor():
    return build_processor(["zero", "one"], ["group-00", "kind-000"], "Which?", 56 * 56)


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def encoder(processor, tmp_path_factory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    return PromptEncoder(str(folder), 56 * 56, 56 * 56)


def test_a_prompt_that_is_too_long_is_refused_with_its_counts(encoder):
    image = picture(30, 30)
    prompt, images = some_prompt(image=image), {image_sha256(image): image}
    ids = encoder.encode(prompt.text, image).token_ids
    assert ids.count(IMAGE_PAD) == 4  # resized to 56 x 56 pixels, 28 x 28 a token
    assert encoder.check_lengths([prompt], images, len(ids)) == len(ids)
    with pytest.raises(UserError) as caught:
        encoder.check_lengths([prompt], images, len(ids) - 1)
    for text in (
        *("the prompt of photos/a.png", f"has {len(ids)} tokens (4 of the image, {len(ids) - 4} of the text)"),
        f"model.max_prompt_tokens = {len(ids) - 1}",
    ):
        assert text in str(caught.value)


def test_vision_tokens_and_what_a_text_does_not_show_are_forbidden(processor, tmp_path):
    names = ["<|object_ref_start|>", "<|box_end|>", "<unused>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    processor.tokenizer.add_tokens(["<tool_call>"])  # not special: a text shows it
    processor.save_pretrained(tmp_path)
    encoder = PromptEncoder(str(tmp_path), 56 * 56, 56 * 56)
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
