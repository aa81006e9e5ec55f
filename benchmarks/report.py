"""Write what was measured into docs/performance.md: the tables between its marks, and the plot beside it.

    python -m benchmarks.report

Reads `benchmarks/results/*.json`; what has not been measured is said to be so.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, read_result
from rft_cluster.classification.intervals import sign_flip
from rft_cluster.common.files import write_text

PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
NAMES = {
    "service": "rft_cluster",
    "plain": "plain script, no service",
    "trl": "TRL",
    "trl-bf16": "TRL, all BF16",
}
FORWARD, TRANSFER = "learner_forward", "weight_transfer"
Results = dict[str, Any]
Spread = dict[str, float]
SPREAD = ("median", "low", "high")


@dataclass(frozen=True)
class Goal:
    """A row of the table. `read` takes the file's content and gives `SPREAD`.

    `native`: for the precision of a machine; left out where that was not measured.
    """

    name: str
    what: str
    least: float
    file: str
    read: Callable[[Results], Spread]
    native: bool = False

    def row(self) -> Sequence[Any] | None:
        found = read_result(self.file)
        try:
            spread = self.read(found)
        except (KeyError, TypeError):  # no such file, or that part was not measured
            return None if self.native else (self.name, self.what, f"{self.least:g}", "not measured", "")
        verdict = "met" if spread["median"] >= self.least else "**missed**"
        return self.name, self.what, f"{self.least:g}", shown(spread), verdict


def shown(spread: Spread, form: str = ".3g") -> str:
    """A median with its range, e.g. `5.56 (5.55 to 5.91)`."""
    return f"{spread['median']:{form}} ({spread['low']:{form}} to {spread['high']:{form}})"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown. A cell is what `str` makes of it."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def less(rates: Sequence[float], others: Sequence[float], images: Sequence[int]) -> list[str]:
    """Cells: rates less others of the same images, seed by seed, in points: median with range, and p (`sign_flip`)."""
    found = [rate - other for rate, other in zip(rates, others, strict=True)]
    counts = [round(difference * n) for difference, n in zip(found, images, strict=True)]
    spread = f"{100 * median(found):+.1f} ({100 * min(found):+.1f} to {100 * max(found):+.1f})"
    return [spread, f"{sign_flip(counts):.2g}"]


def at(*keys: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda found: functools.reduce(operator.getitem, keys, found)


def digits(found: Results) -> Spread:
    """The ratio of the medians over seeds, with the range of the seeds' ratios."""
    (name,) = found["ratio_of_medians"]
    return found["ratios"][name] | {"median": found["ratio_of_medians"][name]}


def overlap(found: Results) -> Spread:
    """The worst of the emulated cases, one step off."""
    cases = [row["ratio"] for row in found["rows"] if row["max_staleness"] == 1]
    return min(cases, key=operator.itemgetter("median"))


def controller(found: Results) -> Spread:
    """A case's goal divided by what a step takes beyond its roles: the worst case."""
    costs = [{name: row["beyond_roles_ms"][name] / row["goal_ms"] for name in SPREAD} for row in found["rows"]]
    worst = max(costs, key=operator.itemgetter("median"))
    return {"median": 1 / worst["median"], "low": 1 / worst["high"], "high": 1 / worst["low"]}


def stall(found: Results) -> Spread:
    """The goal divided by the share of a write in the foreground that training waits for one in the background."""
    share = found["share_of_the_write"]["checkpoint in the background, blocked"]
    return {name: found["goal"] / share[other] for name, other in zip(SPREAD, ("median", "high", "low"), strict=True)}


def forward(dtype: str) -> list[Goal]:
    """The speed of the packed learner relative to the plain one, in processor time."""
    faster, native = at(dtype, "cpu", "times_as_fast", "packed"), dtype == "fp32"

    def by_tokens(found: Results) -> Spread:
        return {name: value / found["rows"]["token_ratio"] for name, value in faster(found).items()}

    what = f"plain learner / shared prefix, 448 x 448, {dtype.upper()}"
    return [
        Goal("G5", what, 3.0, FORWARD, faster, native),
        Goal("G5", "the same as a share of the ratio of tokens", 0.85, FORWARD, by_tokens, native),
    ]


def roofline(dtype: str) -> Goal:
    what = f"the packed learner's share of the roofline of matrix products, 448 x 448, {dtype.upper()}"
    return Goal("", what, 0.7, FORWARD, at(dtype, "roofline", "packed", "share"), native=dtype == "fp32")


def memory(dtype: str) -> Goal:
    """One measurement, so without a range."""
    what = f"memory of a learner's step, plain / shared prefix, {dtype.upper()}"
    return Goal("G8", what, 3.0, FORWARD, lambda found: dict.fromkeys(SPREAD, found[dtype]["memory_ratio"]),
                native=dtype == "fp32")  # fmt: skip


def effective(found: Results) -> Spread:
    """One run, so without a range."""
    share: float = found["effective_training_time"]
    return dict.fromkeys(SPREAD, share)


GOALS = [
    Goal("G1", "samples a second / TRL's, images of 448 x 448", 4.0, "speed", at("sides", "448", "g1")),
    Goal("G1", "samples a second / TRL's, images of 112 x 112", 1.2, "speed", at("sides", "112", "g1")),
    Goal("G2", "plain script / wall time of a step, 448 x 448", 0.90, "speed", at("sides", "448", "g2")),
    Goal("G2", "plain script / wall time of a step, 112 x 112", 0.90, "speed", at("sides", "112", "g2")),
    Goal("G3", "longer role / wall time of a step, one step off, emulated devices", 0.97, "overlap", overlap),
    *(
        Goal("G4", f"sampled tokens a second / plain `LLM.generate`, {side} x {side}", 0.97, "generation",
             at("sides", side, "ratio"))
        for side in ("448", "112")
    ),
    *forward("fp32"),
    *forward("bf16"),
    roofline("fp32"),
    roofline("bf16"),
    Goal("G6", "weights into an engine, bytes a second / memcpy, 426 MB", 0.30, TRANSFER,
         at("sizes", "medium", "ratio")),
    Goal("G6", "the same, 2.4 MB", 0.30, TRANSFER, at("sizes", "tiny", "ratio")),
    Goal("", "5 % of a checkpoint's write / what training waits for one, 2.6 GB", 1.0, "checkpoints", stall),
    Goal("", "effective training time, an actor killed every ten steps of half a minute", 0.90, "losses", effective),
    Goal("G7", "TRL's time to 60 % on the digits / ours, three seeds", 2.0, "digits", digits),
    memory("fp32"),
    memory("bf16"),
    Goal("", "the controller's goal / a step beyond its roles, the worst case", 1.0, "controller", controller),
]  # fmt: skip


def goals_table() -> str:
    rows = (goal.row() for goal in GOALS)
    return table(("", "What", "Goal, at least", "Median (range)", ""), filter(None, rows))


def speed_table(found: Results) -> str:
    rows = []
    for side, measured in found["sides"].items():
        for name, against in measured["against"].items():
            for program in (name, "service"):
                seconds, parts = against["seconds"][program], against["parts"][program]
                stages = ", ".join(f"{part} {parts[part]:.2f}" for part in parts if part not in ("gap", "tokens"))
                factor = shown(against["ratio"]) if program == name else ""
                others = f"{100 * against['foreign']:.0f} %"
                size = f"{side} x {side}"
                rows.append((size, NAMES[program], shown(seconds, ".2f"), factor, seconds["n"], others, stages))
    return table(("Images", "Program", "Seconds a step", "Ratio", "Rounds", "Others", "Parts, seconds"), rows)


def digits_table(found: Results) -> str:
    rows = [
        (
            *(run["seed"], NAMES[name], own["reached_step"] or "-"),
            f"{own['reached_seconds']:.1f}" if own["reached_seconds"] else "not reached",
            f"{own['step_seconds']:.2f}",
            f"{100 * max(point['accuracy'] for point in own['curve']):.1f} %",
        )
        for run in found["runs"]
        for name, own in run.items()
        if name != "seed"
    ]
    return table(("Seed", "Program", "Step at 60 %", "Seconds to it", "Seconds a step", "Best accuracy"), rows)


def forward_table(found: Results) -> str:
    """The table of the shared prefix: processor seconds, relative speed within a round, and peak memory."""
    rows = []
    for dtype in (one for one in ("bf16", "fp32") if one in found):
        measured = found[dtype]
        for side, seconds in measured["cpu"]["seconds"].items():
            ratio = measured["cpu"]["times_as_fast"].get(side)
            mib = f"{measured['memory_mib'][side]['step']:.0f}"
            share = shown(measured["roofline"][side]["share"])
            rows.append((dtype.upper(), side, shown(seconds), shown(ratio) if ratio else "", share, mib))
    heads = ("Computation", "Side", "Processor seconds", "Times as fast", "Share of the roofline", "MiB, of a forward")
    return table(heads, rows)


def transfer_table(found: Results) -> str:
    """Milliseconds of an update's parts."""
    sizes = list(found["sizes"].values())
    parts = list(sizes[0]["milliseconds"])
    rows = [
        (
            f"{size['bytes'] / 1e6:.1f}",
            *(f"{size['milliseconds'][part]['median']:.1f}" for part in parts),
            *(f"{size[name]['median']:.2f}" for name in ("gb_per_second", "memcpy_gb_per_second")),
        )
        for size in sizes
    ]
    return table(("MB", *parts, "GB/s", "memcpy's"), rows)


def checkpoints_table(found: Results) -> str:
    shares = found["share_of_the_write"]
    rows = [
        (name, shown(seconds), f"{100 * shares[name]['median']:.1f} %" if name in shares else "")
        for name, seconds in found["seconds"].items()
    ]
    return table(("What", "Seconds", "Share of the checkpoint in the foreground"), rows)


def overlap_table(found: Results) -> str:
    rows = [
        (", ".join(f"{row[role]:g}" for role in ("generate", "learn", "transfer")), row["max_staleness"],
         shown(row["ratio"], ".3f"))
        for row in found["rows"]
    ]  # fmt: skip
    return table(("Generating, learning, transfer, s", "`max_staleness`", "Longer role / wall"), rows)


def controller_table(found: Results) -> str:
    """Milliseconds of a step beyond its emulated roles, beside the goal."""
    stages = list(found["rows"][0]["stages_ms"])
    rows = [
        (
            *(row[name] for name in ("generators", "learners", "prompts")),
            *(f"{row['goal_ms']:.0f}", shown(row["beyond_roles_ms"], ".0f"), f"{100 * row['foreign']:.0f} %"),
            *(f"{row['stages_ms'][stage]:.0f}" for stage in stages),
            *(f"{row[name]:.0f}" for name in ("driver_cpu_ms", "loop_cpu_ms")),
        )
        for row in found["rows"]
    ]
    head = ("Generators", "Learners", "Prompts", "Goal, ms", "Beyond the roles, ms", "Others")
    return table((*head, *stages, "Driver", "Loop"), rows)


def machine_line(found: Results) -> str:
    box = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in box["versions"].items())
    return (
        f"{box['cores']} cores ({box['processor']}; {', '.join(box['instructions'])}), {box['memory_gib']:g} GiB, "
        f"{box['openmp']}, Python {box['python']}, {versions}."
    )


def plot_line() -> str:
    """The plot, drawn anew, where there is something to draw."""
    if not (read_result("speed") or read_result("digits")):
        return "(The plot comes with the first measurement against TRL.)"
    plot()
    return f"![Samples a second, and accuracy over time]({PLOT.name})"


def plot() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rft_cluster"  # the same figures give the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    colours = {name: f"C{place}" for place, name in enumerate(NAMES)}
    sides = (read_result("speed") or {"sides": {}})["sides"]
    for index, measured in enumerate(sides.values()):
        seconds = {name: against["seconds"][name] for name, against in measured["against"].items()}
        seconds["service"] = next(iter(measured["against"].values()))["seconds"]["service"]
        for place, name in enumerate(name for name in NAMES if name in seconds):
            low, middle, high = (measured["completions"] / seconds[name][key] for key in ("high", "median", "low"))
            bar = {"yerr": [[middle - low], [high - middle]], "color": colours[name]}
            left.bar(index + 0.2 * place, middle, 0.18, label=NAMES[name], **bar)
    left.set_xticks([0.3 + index for index in range(len(sides))], [f"{side} x {side} pixels" for side in sides])
    left.set_ylabel("samples a second")
    for run in (read_result("digits") or {"runs": []})["runs"]:
        for name in (name for name in run if name != "seed"):
            clock, accuracy = zip(*((p["seconds"], 100 * p["accuracy"]) for p in run[name]["curve"]), strict=True)
            right.plot(clock, accuracy, color=colours[name], label=NAMES[name], linewidth=1)
    right.axhline(60, color="grey", linewidth=0.5)
    right.set_xlabel("seconds of training")
    right.set_ylabel("digits read, %")
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        if handles:  # one for each program, of however many sizes or seeds
            named = dict(zip(labels, handles, strict=True))
            axes.legend(named.values(), named, fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


# The page's marks: what stands between them, made from which results.
PARTS: dict[str, tuple[Callable[[Results], str], str]] = {
    "speed": (speed_table, "speed"),
    "digits": (digits_table, "digits"),
    "forward": (forward_table, FORWARD),
    "transfer": (transfer_table, TRANSFER),
    "checkpoints": (checkpoints_table, "checkpoints"),
    "overlap": (overlap_table, "overlap"),
    "controller": (controller_table, "controller"),
    "controller before": (controller_table, "controller_before"),
    "machine": (machine_line, "speed"),
}


def main() -> None:
    texts = {"goals": goals_table(), "plot": plot_line()}
    for name, (make, file) in PARTS.items():
        found = read_result(file)
        texts[name] = make(found) if found else "Not measured."
    fill(PAGE, texts)
    print(texts["goals"])


def fill(file: Path, texts: Mapping[str, str]) -> None:
    """Put each text between the page's marks of its name, in place of what stands there."""
    page = file.read_text()
    for name, text in texts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, rest = page.split(start)
        page = head + start + text + end + rest.partition(end.strip())[2]
    write_text(file, page)


if __name__ == "__main__":
    main()
