"""Write what was measured into docs/performance.md: the tables between its marks, and the plot beside it.

    python -m benchmarks.report

Reads `benchmarks/results/*.json`; what has not been measured is said to be so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common import ROOT, read_result
from rft_cluster.files import write_text

PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
ARMS = {
    "service": "rft_cluster",
    "raw": "plain script, no service",
    "trl": "TRL, FP32 weights, BF16 computation",
    "trl-bf16": "TRL, all BF16",
    "trl-fp32": "TRL, FP32",
}
Results = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A row of the table. `read` takes the file's content and gives median, low and high, or raises KeyError."""

    name: str
    what: str
    least: float
    file: str
    read: Callable[[Results], tuple[float, float, float]]

    def row(self) -> str:
        found = read_result(self.file)
        try:
            median, low, high = self.read(found) if found else (None, None, None)
        except (KeyError, TypeError):
            median = None
        if median is None:
            return f"| {self.name} | {self.what} | {self.least:g} | not measured | |"
        verdict = "met" if median >= self.least else "**missed**"
        return f"| {self.name} | {self.what} | {self.least:g} | {median:.3g} ({low:.3g} to {high:.3g}) | {verdict} |"


def three(found: Results) -> tuple[float, float, float]:
    return found["median"], found["low"], found["high"]


def digits(found: Results) -> tuple[float, float, float]:
    """TRL over ours, of the medians; the range is of the seeds."""
    ours = found["seconds"]["service"]
    theirs = min((found["seconds"][arm] for arm in found["seconds"] if arm != "service"), key=lambda one: one["median"])
    return theirs["median"] / ours["median"], theirs["low"] / ours["high"], theirs["high"] / ours["low"]


def overlap(found: Results) -> tuple[float, float, float]:
    """The worst case of the emulated ones, one step off."""
    rows = [row for row in found["rows"] if row["max_staleness"] == 1]
    worst = min(rows, key=lambda row: row["ratio"])
    return worst["ratio"], *worst["range"]


def forward(found: Results) -> tuple[float, float, float]:
    """Plain over packed in BF16, in processor seconds of one thread, as a share of the ratio of their tokens."""
    tokens, ratio = found["rows"]["token_ratio"], found["bf16"]["cpu"]["times_as_fast"]["packed"]
    return tuple(ratio[name] / tokens for name in ("median", "low", "high"))


def side(name: str, pixels: int) -> Callable[[Results], tuple[float, float, float]]:
    return lambda found: three(found["sides"][str(pixels)][name])


GOALS = [
    Goal("G1", "samples a second / TRL's, images of 448 x 448", 4.0, "speed", side("g1", 448)),
    Goal("G1", "samples a second / TRL's, images of 112 x 112", 1.2, "speed", side("g1", 112)),
    Goal("G2", "plain script / wall time of a step, 448 x 448", 0.90, "speed", side("g2", 448)),
    Goal("G2", "plain script / wall time of a step, 112 x 112", 0.90, "speed", side("g2", 112)),
    Goal("G3", "longer role / wall time of a step, one step off, emulated devices", 0.97, "overlap", overlap),
    Goal("G4", "sampled tokens a second / plain `LLM.generate`, 448 x 448", 0.97, "generation", side("ratio", 448)),
    Goal("G4", "sampled tokens a second / plain `LLM.generate`, 112 x 112", 0.97, "generation", side("ratio", 112)),
    Goal("G5", "learner's gain by the shared prefix / its gain in tokens, BF16", 0.85, "learner_forward", forward),
    Goal("G7", "TRL's time to 60 % on the digits / ours", 2.0, "digits", digits),
]


def goals_table() -> str:
    head = "| | What | Goal, at least | Median (range) | |\n|---|---|---|---|---|\n"
    return head + "\n".join(goal.row() for goal in GOALS)


def speed_table() -> str:
    found = read_result("speed")
    if not found:
        return "Not measured."
    lines = ["| Images | Program | Seconds a step | Samples a second | generate | learn | transfer |", "|" + "---|" * 7]
    for pixels, measured in found["sides"].items():
        for arm, rate in measured["samples_per_second"].items():
            repeats = [repeat[arm] for repeat in measured["repeats"]]
            parts = [middle([r[name] for r in repeats if name in r]) for name in ("generate", "learn", "transfer")]
            seconds = middle([r["seconds"] for r in repeats])
            lines.append(
                f"| {pixels} x {pixels} | {ARMS[arm]} | {seconds} | {rate['median']:.3g} ({rate['low']:.3g} to "
                f"{rate['high']:.3g}) | {' | '.join(parts)} |"
            )
    return "\n".join(lines)


def digits_table() -> str:
    found = read_result("digits")
    if not found:
        return "Not measured."
    lines = ["| Seed | Program | Step at 60 % | Seconds to it | Seconds a step | Last accuracy |", "|" + "---|" * 6]
    for run in found["runs"]:
        seconds = f"{run['reached_seconds']:.1f}" if run["reached_seconds"] else "not reached"
        lines.append(
            f"| {run['seed']} | {ARMS[run['arm']]} | {run['reached_step'] or '-'} | {seconds} | "
            f"{run['step_seconds']:.2f} | {run['curve'][-1]['accuracy']:.1f} % |"
        )
    return "\n".join(lines)


def forward_table() -> str:
    """Of the shared prefix: processor seconds, times as fast within a round, and peak memory."""
    found = read_result("learner_forward")
    if not found:
        return "Not measured."
    lines = ["| Computation | Side | Processor seconds | Times as fast | MiB, of a forward |", "|" + "---|" * 5]
    for dtype in ("bf16", "fp32"):
        if dtype not in found:
            continue
        measured = found[dtype]
        for side, seconds in measured["cpu"]["seconds"].items():
            ratio = measured["cpu"]["times_as_fast"].get(side)
            times = f"{ratio['median']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})" if ratio else ""
            lines.append(
                f"| {dtype.upper()} | {side} | {seconds['median']:.3g} ({seconds['low']:.3g} to {seconds['high']:.3g}) "
                f"| {times} | {measured['memory_mib'][side]['step']:.0f} |"
            )
    return "\n".join(lines)


def machine_lines() -> str:
    found = read_result("speed") or read_result("digits")
    if not found:
        return "Not measured."
    box = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in box["versions"].items())
    return (
        f"{box['cores']} cores ({box['processor']}; {', '.join(box['instructions'])}), {box['memory_gib']:g} GiB, "
        f"Python {box['python']}, {versions}."
    )


def middle(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.2f}" if values else ""


def plot() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "rft_cluster"  # the same figures give the same file
    speed, learned = read_result("speed"), read_result("digits")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    if speed:
        for index, measured in enumerate(speed["sides"].values()):
            for place, (arm, rate) in enumerate(measured["samples_per_second"].items()):
                error = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
                label = ARMS[arm] if index == 0 else None
                left.bar(index + 0.2 * place, rate["median"], 0.18, yerr=error, color=f"C{place}", label=label)
        left.set_xticks([0.3 + i for i in range(len(speed["sides"]))], [f"{p} x {p} pixels" for p in speed["sides"]])
        left.set_ylabel("samples a second")
        left.legend(fontsize=7)
    if learned:
        for place, arm in enumerate(dict.fromkeys(run["arm"] for run in learned["runs"])):
            own = [run for run in learned["runs"] if run["arm"] == arm]
            for run in own:
                points = [(0.0, None), *((point["seconds"], point["accuracy"]) for point in run["curve"])][1:]
                label = ARMS[arm] if run is own[0] else None
                right.plot(*zip(*points, strict=True), color=f"C{place}", label=label, linewidth=1)
        right.axhline(learned["goal"], color="grey", linewidth=0.5)
        right.set_xlabel("seconds of training")
        right.set_ylabel("digits read, %")
        right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    text = PAGE.read_text()
    parts = {"goals": goals_table, "speed": speed_table, "forward": forward_table, "digits": digits_table}
    parts["machine"] = machine_lines
    for name, make in parts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(start)
        text = head + start + make() + end + rest.partition(end.strip())[2]
    write_text(PAGE, text)
    plot()
    print(goals_table())


if __name__ == "__main__":
    main()
