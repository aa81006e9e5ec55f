import pytest

from rft_cluster.model.tiny.build import build_processor
from rft_cluster.prompts import render_template
from rft_cluster.run.task import small_model_tokens

CLASSES = ["zero", "hard-leaved pocket orchid", 'O\'Brien "x"', "5 mm, new", "\u8594\u8587"]


@pytest.mark.parametrize("template", ["think_answer", "answer_only"])
def test_tokens_of_the_small_model_are_known_before_it_is_built(template):
    question = render_template(template, "thing", CLASSES)
    tokenizer = build_processor(CLASSES, ["group-00", "kind-000"], question, 56 * 56).tokenizer
    for name in CLASSES:
        for text in (f"<answer>{name}</answer>", f"<think></think><answer>{name}</answer>"):
            assert small_model_tokens(text) == len(tokenizer(text)["input_ids"])
