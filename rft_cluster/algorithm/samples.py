"""From scored groups to samples with loss weights: which mean the loss is."""

from collections.abc import Sequence

from rft_cluster.messages import Group, TrainingSample


def build_samples(
    groups: Sequence[Group], advantages: Sequence[Sequence[float | None]], keep_all: bool
) -> list[TrainingSample]:
    """Samples whose weights make the loss a mean over each completion's tokens, then over all completions.

    A group without variance has advantages of 0: it pulls nothing but the KL. With `keep_all` false (no KL) its
    samples are left out, but still count in the mean. A masked completion (advantage None) is left out always, and
    does not count. One without tokens counts, as 0, and is left out: there is nothing in it to learn from.
    """
    total = sum(advantage is not None for group_advantages in advantages for advantage in group_advantages)
    return [
        TrainingSample(
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            token_ids=completion.token_ids,
            generator_logprobs=completion.generator_logprobs,
            advantage=advantage,
            weight=1.0 / (len(completion.token_ids) * total),
            policy_version=completion.policy_version,
        )
        for group, group_advantages in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, group_advantages, strict=True)
        if advantage is not None and completion.token_ids and (keep_all or advantage != 0.0)
    ]
