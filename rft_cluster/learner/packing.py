"""Divide a step's samples into ranks, updates and micro-batches.

    TrainingSamples -> for each rank: updates of micro-batches -> (collate.py) -> Batch

A micro-batch encodes each prompt and image once, for all of its completions in it. All ranks get equal numbers of
micro-batches, because each forward is a collective under FSDP.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from operator import itemgetter

from rft_cluster.messages import TrainingSample

# Samples of one prompt: a group or part of a group.
Part = list[TrainingSample]
# One rank's work in one step: updates, each a list of micro-batches, each a list of samples.
RankWork = list[list[list[TrainingSample]]]


def split_work(samples: Sequence[TrainingSample], ranks: int, updates: int, micro_batch_tokens: int) -> list[RankWork]:
    """Assign a step's samples to ranks: `result[rank][update][micro_batch]` is a list of samples.

    Each update gets a share of the samples, with weights scaled up to those of a whole step; of fewer samples than
    `updates` each has an update of its own. An update's groups are assigned so that the ranks have nearly equal numbers
    of tokens. A group is divided if that helps; its prompt is then encoded twice. A micro-batch has at most
    `micro_batch_tokens` tokens, unless one completion with its prompt has more.
    """
    work: list[RankWork] = [[] for _ in range(ranks)]
    updates = min(updates, len(samples))
    for update in range(updates):
        chosen = samples[update * len(samples) // updates : (update + 1) * len(samples) // updates]
        scaled = [replace(sample, weight=sample.weight * len(samples) / len(chosen)) for sample in chosen]
        packs = [_pack(share, micro_batch_tokens) for share in _balance(by_prompt(scaled), ranks)]
        count = max(map(len, packs))  # micro-batches of each rank
        for rank, own in enumerate(packs):
            while len(own) < count:
                own.append(_split_off(own) or [[_padding(scaled)]])
            # Largest first on every rank: at each layer all ranks wait for the slowest, so sizes should match.
            own.sort(key=_row_tokens, reverse=True)
            work[rank].append([[sample for part in parts for sample in part] for parts in own])
    return work


def _tokens(part: Part) -> int:
    """Tokens of a part in a row: the prompt, and the completions without their last tokens."""
    return len(part[0].prompt_token_ids) + sum(len(sample.token_ids) - 1 for sample in part)


def _row_tokens(parts: Sequence[Part]) -> int:
    return sum(map(_tokens, parts))


def by_prompt(samples: Sequence[TrainingSample]) -> list[Part]:
    parts: dict[str, Part] = {}
    for sample in samples:
        parts.setdefault(sample.prompt.prompt_id, []).append(sample)
    return list(parts.values())


def _balance(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Each rank's parts: whole groups, or divided ones if that lowers the tokens of the fullest rank."""
    # Every rank waits for the fullest, so minimise its tokens. Whole groups encode each prompt once but may fill ranks
    # unevenly; an even cut encodes up to `ranks` - 1 prompts more. `min` takes whole groups if both are equal.
    ways = _assign(parts, ranks), _cut_evenly(parts, ranks)
    return min(ways, key=lambda shares: max(map(_row_tokens, shares)))


def _cut_evenly(parts: Sequence[Part], pieces: int) -> list[list[Part]]:
    """Cut the samples, in order, into `pieces` runs. Minimises the largest run's tokens, then evens out the lengths.

    A run's tokens include the prompt of each of its completions, once.
    """
    # Prefix sums make the tokens of any run an O(1) difference.
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

    # Search the smallest limit with which greedily filled runs hold all samples.
    most = bisect_left(range(prompts[-1] * pieces + completions[-1]), True, key=holds_all)
    # From the last run backwards: where each run must end at the earliest, so that the later ones can hold the rest.
    earliest = [len(samples)]
    for _ in range(pieces - 1):
        earliest.append(first_start(earliest[-1], most))
    # Between these bounds, aim at equal numbers of samples: greedy runs would leave the last one nearly empty.
    runs, start = [], 0
    for left, at_least in zip(range(pieces, 0, -1), reversed(earliest), strict=True):
        even = start - (start - len(samples)) // left  # rounded up
        end = min(max(even, at_least), last_end(start, most))
        runs.append(by_prompt(samples[start:end]))
        start = end
    return runs


def _assign(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Assign whole parts, largest first, each to the rank with the fewest tokens."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for part in sorted(parts, key=_tokens, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append(part)
        loads[rank] += _tokens(part)
    return shares


def _pack(parts: list[Part], limit: int) -> list[list[Part]]:
    """Fill micro-batches: largest part first, each into the first micro-batch with room."""
    micro_batches: list[list[Part]] = []
    room: list[int] = []  # tokens that each still takes
    sized = [(_tokens(piece), piece) for part in parts for piece in _cut(part, limit)]
    for tokens, piece in sorted(sized, key=itemgetter(0), reverse=True):
        for i, left in enumerate(room):
            if tokens <= left:
                micro_batches[i].append(piece)
                room[i] -= tokens
                break
        else:
            micro_batches.append([piece])
            room.append(limit - tokens)
    return micro_batches


def _cut(part: Part, limit: int) -> list[Part]:
    """Divide a part into the fewest pieces of at most `limit` tokens each, or into single completions."""
    for pieces in range(1, len(part)):
        runs = _cut_evenly([part], pieces)
        if max(map(_row_tokens, runs)) <= limit:
            return [piece for run in runs for piece in run]
    return [[sample] for sample in part]


def _split_off(micro_batches: list[list[Part]]) -> list[Part] | None:
    """Split off a part of the largest divisible micro-batch; None if each has only one completion."""
    for parts in sorted(micro_batches, key=_row_tokens, reverse=True):
        if len(parts) > 1:
            return [parts.pop()]
        if len(parts[0]) > 1:
            (parts[0],), other = _cut_evenly(parts, 2)
            return other
    return None


def _padding(samples: Sequence[TrainingSample]) -> TrainingSample:
    """A real sample with weight 0: its micro-batch is an ordinary one and changes nothing."""
    return replace(min(samples, key=lambda sample: _tokens([sample])), weight=0.0)
