"""The record of a step's completions.

rollouts/step-000012.jsonl   an object a group: `prompt_id`, `example_id`, `label`, and lists, an entry a completion:

    completions      text
    version_spans    [version of the weights, number of tokens that they wrote], ...
    rewards          total (null if masked), parts by reward name, failures by reward name
    advantages       null if masked
    tokens           length
    finish_reasons   "stop", or "length" if it was cut at `sampling.max_tokens`
    logprob_gaps     nats a token, mean over its tokens; null if it was not trained on, or if the gap is not finite
    why              the reward in words, e.g. "answered 'rose', label 'pink primrose'; format ok"

The last five are missing in records of older versions. `run.debug` shows some of these in the terminal.
"""

from collections.abc import Sequence
from typing import Any

from rft_cluster.classification.why import why
from rft_cluster.messages import Group, LearnerStats, Reward
from rft_cluster.run.figures import finite
from rft_cluster.run.metrics import version_spans


def rollout_rows(
    groups: Sequence[Group],
    rewards: Sequence[Sequence[Reward]],
    advantages: Sequence[Sequence[float | None]],
    learned: LearnerStats | None,
) -> list[dict[str, Any]]:
    """The objects of a step's file. `learned`: None if there was no update."""
    gaps = {(gap.prompt_id, gap.index): gap.nats for gap in learned.logprob_gaps} if learned else {}
    return [
        {
            "prompt_id": group.prompt.prompt_id,
            "example_id": group.prompt.example_id,
            "label": group.prompt.label,
            "completions": [completion.text for completion in group.completions],
            "version_spans": [version_spans(completion) for completion in group.completions],
            "rewards": [{"total": r.total, "parts": r.parts, "failures": r.failures} for r in group_rewards],
            "advantages": list(own),
            "tokens": [len(completion.token_ids) for completion in group.completions],
            "finish_reasons": [completion.finish_reason for completion in group.completions],
            "logprob_gaps": [
                finite(gaps.get((group.prompt.prompt_id, index))) for index in range(len(group.completions))
            ],
            "why": [why(group.prompt, one, r) for one, r in zip(group.completions, group_rewards, strict=True)],
        }
        for group, group_rewards, own in zip(groups, rewards, advantages, strict=True)
    ]
