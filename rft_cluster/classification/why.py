"""Say why a completion got its reward, in plain words."""

from rft_cluster.common.labels import extract_answer, normalise_label
from rft_cluster.messages import Completion, Prompt, Reward
from rft_cluster.rewards.format import format_problem


def why(prompt: Prompt, completion: Completion, reward: Reward) -> str:
    """E.g. "answered 'rose', label 'pink primrose'; format ok". It has text of the model: escape it where it is shown.

    The answer is the one that the `accuracy` reward reads. Of rewards of the user's own only failures are said.
    """
    words = [_answered(prompt, completion.text)]
    if "format" in reward.parts:
        words.append(f"format: {format_problem(prompt, completion)}" if not reward.parts["format"] else "format ok")
    if completion.finish_reason == "length":
        words.append("cut at max_tokens")
    words += [f"{name} failed: {reason}" for name, reason in reward.failures.items()]
    return "; ".join(words)


def _answered(prompt: Prompt, text: str) -> str:
    answer = extract_answer(text)
    if answer is None:
        return f"no answer block, label '{prompt.label}'"
    read = normalise_label(answer)
    if read == normalise_label(prompt.label):
        return f"answered '{answer.strip()}', the label"
    kind = "an alias of" if read in map(normalise_label, prompt.aliases) else "label"
    return f"answered '{answer.strip()}', {kind} '{prompt.label}'"
