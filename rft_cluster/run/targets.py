"""The targets of supervised fine-tuning (`algorithm.objective: sft`): each prompt's right answer, as a completion.

    question    ... in <think> </think> and the final answer, only the name of the class, in <answer> </answer> ...
    target      <think></think><answer>rose</answer>, and the stop token

The data has labels and no reasons, so a block for reasoning stays empty: such a policy learns to answer at once. A
target has no rewards and no log-probabilities of a generator, because nobody has sampled it.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rft_cluster.classification.earnable import obedient
from rft_cluster.common.errors import UserError
from rft_cluster.common.text import printable
from rft_cluster.config import Config
from rft_cluster.messages import Completion, Group, Images, Prompt, Reward, Sampling
from rft_cluster.model.hub import find_model
from rft_cluster.run.journal import Recorded

if TYPE_CHECKING:
    from rft_cluster.model.encoder import PromptEncoder

UNSCORED = Reward(0.0, {})  # the sum of no rewards


def read_targets(config: Config, model_path: str, images: Images) -> "Targets | None":
    """The targets of a run, with the tokenizer of the model that it starts from; None if it samples completions."""
    if config.algorithm.samples:
        return None
    from rft_cluster.model.encoder import PromptEncoder  # imports transformers, which takes seconds

    return Targets(PromptEncoder(str(find_model(model_path).folder), config.model), images)


class Targets:
    """Writes targets, in the driver: a text and the size of an image are all that the tokens need."""

    def __init__(self, encoder: "PromptEncoder", images: Images) -> None:
        self._encoder, self._images = encoder, images

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> Recorded:
        """As `Cluster.start_rollout`, but each group is one target, which is there at once."""
        groups = [Group(prompt, self._encoder.prompt_tokens(prompt, self._images), [self._target(prompt, version)])
                  for prompt in prompts]  # fmt: skip
        return Recorded(groups, [[UNSCORED] for _ in groups])

    def _target(self, prompt: Prompt, version: int) -> Completion:
        text = target_text(prompt.text, prompt.label)
        return Completion(target_tokens(self._encoder, text), [], text, "stop", version)


def target_text(question: str, label: str) -> str:
    """The right answer to a question, in the layout that the question asks for, with empty blocks for reasoning."""
    return obedient(question, label, reasoning="")[0]


def target_tokens(encoder: "PromptEncoder", text: str) -> list[int]:
    """The tokens that the policy is to write: without what the chat template has written of the text, and with the
    token that ends an answer."""
    written = encoder.opening.strip()
    return [*encoder.tokenizer(text.removeprefix(written))["input_ids"], encoder.stop_token_ids[0]]


def check_targets(config: Config, encoder: "PromptEncoder", question: str, classes: Iterable[str]) -> str:
    """Check that every class's target fits into `sampling.max_tokens`. Returns a line with one of them, for the user.

    `config`: that of the run of SFT, which may be a warm start or a baseline inside another run.

    Raises:
        UserError: one does not fit, so that an evaluation would cut the answer that was taught.
    """
    texts = [target_text(question, label) for label in classes]
    longest = max(texts, key=lambda text: len(target_tokens(encoder, text)))
    tokens, most = len(target_tokens(encoder, longest)), config.sampling.max_tokens
    if tokens > most:
        raise UserError(
            f"sampling.max_tokens is {most}, but the answer that SFT is to teach in {config.run_folder}, "
            f"{printable(longest)}, has {tokens} tokens with the stop token: set it to {tokens} or more"
        )
    return f"targets     {printable(longest)} (the longest, {tokens} tokens)"
