import pytest
from some_prompt import some_prompt

from rft_cluster.classification.why import why
from rft_cluster.messages import Completion, Reward
from rft_cluster.rewards.accuracy import accuracy_reward
from rft_cluster.rewards.format import format_reward

PROMPT = some_prompt(label="pink primrose", aliases=("Primula rosea",))
ANSWER_ONLY = some_prompt(label="pink primrose", text="Put it in <answer> </answer>.")


def said(text: str, prompt=PROMPT, finish_reason: str = "stop") -> str:
    """By the rewards' own figures, so that the words are those of what was given."""
    completion = Completion([1], [-0.1], text, finish_reason, 0)
    parts = {"format": format_reward(prompt, completion), "accuracy": accuracy_reward(prompt, completion)}
    return why(prompt, completion, Reward(sum(parts.values()), parts))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<think>t</think><answer>rose</answer>", "answered 'rose', label 'pink primrose'; format ok"),
        ("<think>t</think><answer>Pink_Primrose </answer>", "answered 'Pink_Primrose', the label; format ok"),
        ("<think>t</think><answer>primula rosea</answer>",
         "answered 'primula rosea', an alias of 'pink primrose'; format ok"),
        ("<think>t</think><answer>rose", "no answer block, label 'pink primrose'; format: no </answer>"),
        ("<answer>rose</answer>", "answered 'rose', label 'pink primrose'; format: no <think>"),
        ("<think>t</think><answer>a</answer><answer>b</answer>",
         "no answer block, label 'pink primrose'; format: <answer> 2 times"),
        ("So: <think>t</think><answer>rose</answer>",
         "answered 'rose', label 'pink primrose'; format: text before the blocks"),
        ("<think>t</think><answer>rose</answer>.",
         "answered 'rose', label 'pink primrose'; format: text after the blocks"),
        ("<think>t</think> so <answer>rose</answer>",
         "answered 'rose', label 'pink primrose'; format: text between the blocks"),
        ("<answer>rose</answer><think>t</think>",
         "answered 'rose', label 'pink primrose'; format: tags out of order"),
    ],
)  # fmt: skip
def test_it_says_what_was_answered_and_what_is_wrong_with_the_format(text, words):
    assert said(text) == words


def test_thinking_that_was_not_asked_for_and_tags_in_the_wrong_order():
    assert said("<think>t</think><answer>rose</answer>", ANSWER_ONLY).endswith("format: <think> was not asked for")
    assert said("</answer>rose<answer>", ANSWER_ONLY).endswith("format: tags out of order")


def test_a_completion_that_was_cut_says_so():
    assert said("<think>t", finish_reason="length").endswith("format: no </think>; cut at max_tokens")


def test_a_failed_reward_is_named_with_its_reason():
    reward = Reward(None, {"accuracy": 0.0}, {"my_judge:judge": "no answer within 10 s"})
    completion = Completion([1], [-0.1], "<answer>rose</answer>", "stop", 0)
    words = why(PROMPT, completion, reward)
    assert words == "answered 'rose', label 'pink primrose'; my_judge:judge failed: no answer within 10 s"
