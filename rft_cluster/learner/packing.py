"""From samples to ranks.

    TrainingSamples -> for each rank: updates of micro-batches -> (collate.py) -> Batch

A micro-batch reads each prompt and image once, for all of its completions in it. All ranks get equal numbers of
micro-batches, since each forward is a collective under FSDP.
"""

from collections.abc import Sequence
from dataclasses import replace

from rft_cluster.messages import TrainingSample

# Samples of one prompt: a group, or a part of one.
Part = list[TrainingSample]
# One rank's work in one step: updates, each a list of micro-batches, each a list of samples.
RankWork = list[list[list[TrainingSample]]]


def split_work(samples: Sequence[TrainingSample], ranks: int, updates: int, micro_batch_tokens: int) -> list[RankWork]:
    """Deal a step's samples to ranks: `result[rank][update][forward]` is a list of samples.

    Each update takes a share of the samples, its weights scaled up so that they mean the same as a whole step's. Its
    groups are dealt so that the ranks' tokens are as equal as may be; a group is divided where that helps, and its
    prompt then read twice. A forward has `micro_batch_tokens` at most, unless one completion with its prompt has more.
    """
    work: list[RankWork] = [[] for _ in range(ranks)]
    for update in range(updates):
        chosen = samples[update * len(samples) // updates : (update + 1) * len(samples) // updates]
        scaled = [replace(sample, weight=sample.weight * len(samples) / len(chosen)) for sample in chosen]
        packs = [_pack(share, micro_batch_tokens) for share in _balance(by_prompt(scaled), ranks)]
        forwards = max(map(len, packs))
        for rank, own in enumerate(packs):
            while len(own) < forwards:
                own.append(_split_off(own) or [[_padding(scaled)]])
            # All ranks' large forwards at the same time: each waits for the slowest at every layer.
            own.sort(key=_row_tokens, reverse=True)
            work[rank].append([[sample for part in parts for sample in part] for parts in own])
    return work


def _tokens(part: Part) -> int:
    """Tokens that a part adds to a row: the prompt, and the completions without their last tokens."""
    return len(part[0].prompt_token_ids) + sum(len(sample.token_ids) - 1 for sample in part)


def _row_tokens(parts: Sequence[Part]) -> int:
    return sum(map(_tokens, parts))


def by_prompt(samples: Sequence[TrainingSample]) -> list[Part]:
    parts: dict[str, Part] = {}
    for sample in samples:
        parts.setdefault(sample.prompt.prompt_id, []).append(sample)
    return list(parts.values())


def _halves(part: Part) -> list[Part]:
    return [part[: len(part) // 2], part[len(part) // 2 :]]


def _balance(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Each rank's parts. A part is halved as long as that lowers the tokens of the rank that has most."""
    shares, loads = _deal(parts, ranks)
    while True:
        fullest = shares[loads.index(max(loads))]
        largest = max((part for part in fullest if len(part) > 1), key=_tokens, default=None)
        if largest is None:
            return shares
        parts = [part for part in parts if part is not largest] + _halves(largest)
        finer, finer_loads = _deal(parts, ranks)
        if sorted(finer_loads, reverse=True) >= sorted(loads, reverse=True):
            return shares
        shares, loads = finer, finer_loads


def _deal(parts: list[Part], ranks: int) -> tuple[list[list[Part]], list[int]]:
    """Largest first, each to the rank that has least; the ranks' parts, and their tokens."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for part in sorted(parts, key=_tokens, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append(part)
        loads[rank] += _tokens(part)
    return shares, loads


def _pack(parts: list[Part], limit: int) -> list[list[Part]]:
    """Fill forwards, largest part first, each part into the first that has room."""
    forwards: list[list[Part]] = []
    pieces = [piece for part in parts for piece in _cut(part, limit)]
    for piece in sorted(pieces, key=_tokens, reverse=True):
        for forward in forwards:
            if _row_tokens(forward) + _tokens(piece) <= limit:
                forward.append(piece)
                break
        else:
            forwards.append([piece])
    return forwards


def _cut(part: Part, limit: int) -> list[Part]:
    """Halve a part until each piece has `limit` tokens at most, or one completion."""
    if len(part) == 1 or _tokens(part) <= limit:
        return [part]
    return [piece for half in _halves(part) for piece in _cut(half, limit)]


def _split_off(forwards: list[list[Part]]) -> list[Part] | None:
    """Take a share of the largest forward that can be divided; None if all are of one completion."""
    for parts in sorted(forwards, key=_row_tokens, reverse=True):
        if len(parts) > 1:
            return [parts.pop()]
        if len(parts[0]) > 1:
            parts[0], other = _halves(parts[0])
            return [other]
    return None


def _padding(samples: Sequence[TrainingSample]) -> TrainingSample:
    """A sample that changes nothing: real, so that its forward is a usual one, but of weight 0."""
    return replace(min(samples, key=lambda sample: _tokens([sample])), weight=0.0)
