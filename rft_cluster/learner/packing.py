"""From samples to ranks.

    TrainingSamples -> for each rank: updates of micro-batches -> (collate.py) -> Batch

A micro-batch reads each prompt and image once, for all of its completions in it. All ranks get equal numbers of
micro-batches, since each forward is a collective under FSDP.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

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


def _balance(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Each rank's parts: whole ones, or cut ones where that lowers the tokens of the rank that has most."""
    ways = _deal(parts, ranks), _cut_evenly(parts, ranks)
    return min(ways, key=lambda shares: max(map(_row_tokens, shares)))


def _cut_evenly(parts: Sequence[Part], pieces: int) -> list[list[Part]]:
    """All samples in their order, in `pieces` runs, of which the largest has as few tokens as may be.

    A prompt is read in each run that has completions of it. Within that bound the runs are as equally long as may be.
    """
    samples = [sample for part in parts for sample in part]
    part_of = [index for index, part in enumerate(parts) for _ in part]
    prompts = list(accumulate((len(part[0].prompt_token_ids) for part in parts), initial=0))
    completions = list(accumulate((len(sample.token_ids) - 1 for sample in samples), initial=0))

    def tokens(start: int, end: int) -> int:
        asked = prompts[part_of[end - 1] + 1] - prompts[part_of[start]] if start < end else 0
        return asked + completions[end] - completions[start]

    def last_end(start: int, most: int) -> int:
        ends = range(start, len(samples) + 1)
        return ends[bisect_right(ends, most, key=lambda end: tokens(start, end)) - 1]

    def first_start(end: int, most: int) -> int:
        starts = range(end, -1, -1)
        return starts[bisect_right(starts, most, key=lambda start: tokens(start, end)) - 1]

    def holds_all(most: int) -> bool:
        end = 0
        for _ in range(pieces):
            end = last_end(end, most)
        return end == len(samples)

    most = bisect_left(range(prompts[-1] * pieces + completions[-1]), True, key=holds_all)
    earliest = [len(samples)]  # where a run may end, so that those after it hold the rest; the last run's first
    for _ in range(pieces - 1):
        earliest.append(first_start(earliest[-1], most))
    runs, start = [], 0
    for left, at_least in zip(range(pieces, 0, -1), reversed(earliest), strict=True):
        even = start - (start - len(samples)) // left  # rounded up
        end = min(max(even, at_least), last_end(start, most))
        runs.append(by_prompt(samples[start:end]))
        start = end
    return runs


def _deal(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Whole parts, the largest first, each to the rank that has least."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for part in sorted(parts, key=_tokens, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append(part)
        loads[rank] += _tokens(part)
    return shares


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
    """Divide a part into the fewest pieces that have `limit` tokens each at most, or one completion."""
    for pieces in range(1, len(part)):
        runs = _cut_evenly([part], pieces)
        if max(map(_row_tokens, runs)) <= limit:
            return [piece for run in runs for piece in run]
    return [[sample] for sample in part]


def _split_off(forwards: list[list[Part]]) -> list[Part] | None:
    """Take a share of the largest forward that can be divided; None if all are of one completion."""
    for parts in sorted(forwards, key=_row_tokens, reverse=True):
        if len(parts) > 1:
            return [parts.pop()]
        if len(parts[0]) > 1:
            (parts[0],), other = _cut_evenly(parts, 2)
            return other
    return None


def _padding(samples: Sequence[TrainingSample]) -> TrainingSample:
    """A sample that changes nothing: real, so that its forward is a usual one, but of weight 0."""
    return replace(min(samples, key=lambda sample: _tokens([sample])), weight=0.0)
