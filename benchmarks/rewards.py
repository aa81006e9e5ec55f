"""A reward for benchmarks of speed: every group's rewards differ, so that no step is skipped and no group left out."""

from rft_cluster.messages import Completion, Prompt


def spread(prompt: Prompt, completion: Completion) -> float:
    """The completion's mean token id; 0 for an answer that is only text, as in the trial before a run."""
    return sum(completion.token_ids) / max(1, len(completion.token_ids))
