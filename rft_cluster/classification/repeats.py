"""Rows of a sweep, each repeated with several seeds: medians, ranges, and paired tests against one of the rows (pure).

A seed chooses the images, so accuracies of equal seeds are pairs, and so are the answers to each test image of a seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rft_cluster.classification.apart import NOTE
from rft_cluster.classification.baselines import NAMES, Flags
from rft_cluster.classification.intervals import paired_difference, sign_flip, wilson
from rft_cluster.common.text import percent

NONE = "-"  # a cell for what was not measured


@dataclass(frozen=True)
class Repeat:
    """A row's run with one seed. Rates are 0 to 1, on its `n` test images.

    `images`: a digest of the test images with their labels. `right`: whether each of these was answered right after
    training, in an order that depends on the images alone; empty if the run recorded no answers. `parts`: the rates
    after training on images of "seen" and of "unseen" classes; empty if all classes were trained (`apart`). Baselines
    know the seen classes alone, and are measured on their images.
    """

    seed: int
    n: int
    before: float
    after: float
    format: float
    baselines: Mapping[str, float]
    images: str
    right: Flags
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of the table. `values`: its first cells, by heading. `missing`: seeds without a finished run."""

    name: str
    values: Mapping[str, str]
    repeats: tuple[Repeat, ...]
    missing: tuple[int, ...]


def summary(row: Row, reference: Row) -> dict[str, Any]:
    """The row's entry in `results.json`. Figures over seeds are medians; `rates` are the accuracies after training.

    `interval` is Wilson's of the test images of the only run, if the sweep has one seed; else None, since the images of
    several runs overlap.
    """
    repeats = row.repeats
    found: dict[str, Any] = {
        "name": row.name,
        "values": dict(row.values),
        "seeds": [one.seed for one in repeats],
        "missing": list(row.missing),
    }
    if not repeats:
        return found
    rates, first = [one.after for one in repeats], repeats[0]
    alone = len(repeats) == 1 and not row.missing
    shared = [name for name in NAMES if all(name in one.baselines for one in repeats)]
    parts = first.parts if all(one.parts for one in repeats) else ()
    return found | {
        "n": min(one.n for one in repeats),
        "before": median(one.before for one in repeats),
        "rates": rates,
        "rate": median(rates),
        "range": [min(rates), max(rates)],
        "interval": list(wilson(round(first.after * first.n), first.n)) if alone else None,
        "parts": {name: median(one.parts[name] for one in repeats) for name in parts},
        "format": median(one.format for one in repeats),
        "baselines": {name: median(one.baselines[name] for one in repeats) for name in shared},
        "against": None if row is reference else against(row, reference),
    }


def against(row: Row, reference: Row) -> dict[str, Any] | None:
    """The row less the reference, over the seeds that tested both on the same images; None without such a seed.

    By seed: `differences` of the accuracies with their `median`, and `p` of the sign-flip test, of which `least_p` is
    the smallest that so many seeds allow. `images`: all answers of these seeds pooled (`paired_difference`). They tell
    how these models differ, but not how much those of other seeds would. None if a run recorded no answers.
    """
    theirs = {(one.seed, one.images): one for one in reference.repeats}
    pairs = [(theirs[key], one) for one in row.repeats if (key := (one.seed, one.images)) in theirs]
    if not pairs:
        return None
    differences = [new.after - old.after for old, new in pairs]
    recorded = all(old.right and new.right for old, new in pairs)
    return {
        "row": reference.name,
        "seeds": [new.seed for _, new in pairs],
        "differences": differences,
        "median": median(differences),
        "p": sign_flip([round(new.after * new.n) - round(old.after * old.n) for old, new in pairs]),
        "least_p": least_p(len(pairs)),
        "images": paired_difference(
            [flag for old, _ in pairs for flag in old.right], [flag for _, new in pairs for flag in new.right]
        )
        if recorded
        else None,
    }


def least_p(seeds: int) -> float:
    """The smallest p of a two-sided sign-flip test of so many differences: two of the 2^n choices of signs."""
    return 2.0 / 2**seeds


def table(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """The Markdown table of `summary` entries, which share the headings of their values, and what its columns mean."""
    several = any(len(row["seeds"]) + len(row["missing"]) > 1 for row in rows)
    spread = "range over seeds" if several else "95 % interval"
    pairs = [f"less {_cell(reference)}, by seed", "p", "the same, image by image"] if len(rows) > 1 else []
    names = [name for name in NAMES if any(name in row["baselines"] for row in rows if row["seeds"])]
    baselines = [NAMES[name] for name in names]
    parts = list(dict.fromkeys(name for row in rows if row["seeds"] for name in row["parts"]))
    shares = [f"{name} classes" for name in parts]
    head = [*rows[0]["values"], "before", "after", spread, *shares, "seeds", *pairs, "format", *baselines, "images"]
    lines = [f"| {' | '.join(map(_cell, head))} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(_cells(row, parts, bool(pairs), names))} |" for row in rows]
    paired = {len(row["against"]["seeds"]) for row in rows if row["seeds"] and row["against"]}
    if paired:
        lines += ["", _explained(sorted(paired))]
    if parts and baselines:
        lines += ["", f"With unseen classes, {NOTE}."]
    return "\n".join(lines) + "\n"


def _explained(numbers: Sequence[int]) -> str:
    """What the columns mean. `numbers`: of seeds that were paired."""
    least = ", ".join(f"{least_p(seeds):.2g} with {seeds} seed{'s' * (seeds > 1)}" for seeds in numbers)
    return (
        f"Figures are medians over seeds. By seed: median and range of the differences of runs with the same seed and "
        f"test images, and `p` of their exact sign-flip test, two-sided: at least {least}. Image by image: the answers "
        f"of all these seeds pooled, with a 95 % interval for these models, not for other seeds: too narrow where "
        f"several seeds test an image. The best of many rows is in part the luckiest on these images: measure it again "
        f"with other seeds."
    )


def _cells(row: Mapping[str, Any], parts: Sequence[str], paired: bool, baselines: Sequence[str]) -> list[str]:
    values = [_cell(value) for value in row["values"].values()]
    seeds = ", ".join(map(str, row["seeds"]))
    if row["missing"]:
        seeds = f"{seeds or 'none'}; missing {', '.join(map(str, row['missing']))}"
    if not row["seeds"]:
        return [*values, *[NONE] * (3 + len(parts)), seeds, *[NONE] * ((5 if paired else 2) + len(baselines))]
    low, high = (f"{100 * end:.1f}" for end in row["interval"] or row["range"])
    return [
        *values,
        percent(row["before"]),
        f"**{percent(row['rate'])}**",
        f"{low} to {high}",
        *(percent(row["parts"][name]) if name in row["parts"] else NONE for name in parts),
        seeds,
        *(_pair_cells(row) if paired else []),
        percent(row["format"]),
        *(percent(row["baselines"][name]) if name in row["baselines"] else "" for name in baselines),
        str(row["n"]),
    ]


def _pair_cells(row: Mapping[str, Any]) -> list[str]:
    if not (found := row["against"]):
        return [NONE, NONE, NONE]
    low, high = (f"{100 * end:+.1f}" for end in (min(found["differences"]), max(found["differences"])))
    some = "" if found["seeds"] == row["seeds"] else f"seeds {', '.join(map(str, found['seeds']))}: "
    cells = [f"{some}{100 * found['median']:+.1f} ({low} to {high})", f"{found['p']:.2g}"]
    if not found["images"]:
        return [*cells, NONE]
    ends = " to ".join(f"{100 * end:+.1f}" for end in found["images"]["interval"])
    return [*cells, f"{100 * found['images']['difference']:+.1f} ({ends})"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
