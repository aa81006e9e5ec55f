"""Write what was measured into docs/performance.md: the tables between its marks, and the plot beside it.

    python -m benchmarks.report

Reads `benchmarks/results/*.json`; what has not been measured is said to be so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common import ROOT, read_result
from rft_cluster.common.files import write_text

PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
NAMES = {
    "service": "rft_cluster",
    "plain": "plain script, no service",
    "trl": "TRL",
    "trl-bf16": "TRL, all BF16",
}
FORWARD = "learner_forward"
Results = dict[str, Any]
Three = tuple[float, float, float]


@dataclass(frozen=True)
class Goal:
    """A row of the table. `read` takes the file's content and gives median, low and high.

    `native`: for the precision of a machine; left out where that was not measured.
    """

    name: str
    what: str
    least: float
    file: str
    read: Callable[[Results], Three]
    native: bool = False

    def row(self) -> str | None:
        found = read_result(self.file)
        try:
            median, low, high = self.read(found)
        except (KeyError, TypeError):  # no such file, or that part was not measured
            return None if self.native else f"| {self.name} | {self.what} | {self.least:g} | not measured | |"
        verdict = "met" if median >= self.least else "**missed**"
        return f"| {self.name} | {self.what} | {self.least:g} | {median:.3g} ({low:.3g} to {high:.3g}) | {verdict} |"


def three(found: Results) -> Three:
    return found["median"], found["low"], found["high"]


def speed(name: str, side: int) -> Callable[[Results], Three]:
    return lambda found: three(found["sides"][str(side)][name])


def digits(found: Results) -> Three:
    """Of the medians over the seeds; the range is the seeds'."""
    (name,) = found["ratio_of_medians"]
    return found["ratio_of_medians"][name], found["ratios"][name]["low"], found["ratios"][name]["high"]


def overlap(found: Results) -> Three:
    """The worst of the emulated cases, one step off."""
    cases = [row["ratio"] for row in found["rows"] if row["max_staleness"] == 1]
    return three(min(cases, key=lambda ratio: ratio["median"]))


def controller(found: Results) -> Three:
    """10 ms over what the dearest case costs beyond its roles."""
    cost = max((row["beyond_roles_ms"] for row in found["rows"]), key=lambda cost: cost["median"])
    return 10 / cost["median"], 10 / cost["high"], 10 / cost["low"]


def transfer(size: str) -> Callable[[Results], Three]:
    return lambda found: three(found["sizes"][size]["ratio"])


def forward(dtype: str) -> Callable[[Results], Three]:
    """How many times as fast the packed learner is as the plain one, in processor time."""
    return lambda found: three(found[dtype]["cpu"]["times_as_fast"]["packed"])


def forward_by_tokens(dtype: str) -> Callable[[Results], Three]:
    """The same as a share of the ratio of their tokens."""

    def read(found: Results) -> Three:
        median, low, high = (value / found["rows"]["token_ratio"] for value in forward(dtype)(found))
        return median, low, high

    return read


def forward_memory(dtype: str) -> Callable[[Results], Three]:
    """One measurement, so without a range."""
    return lambda found: (found[dtype]["memory_ratio"],) * 3


GOALS = [
    Goal("G1", "samples a second / TRL's, images of 448 x 448", 4.0, "speed", speed("g1", 448)),
    Goal("G1", "samples a second / TRL's, images of 112 x 112", 1.2, "speed", speed("g1", 112)),
    Goal("G2", "plain script / wall time of a step, 448 x 448", 0.90, "speed", speed("g2", 448)),
    Goal("G2", "plain script / wall time of a step, 112 x 112", 0.90, "speed", speed("g2", 112)),
    Goal("G3", "longer role / wall time of a step, one step off, emulated devices", 0.97, "overlap", overlap),
    Goal("G4", "sampled tokens a second / plain `LLM.generate`, 448 x 448", 0.97, "generation", speed("ratio", 448)),
    Goal("G4", "sampled tokens a second / plain `LLM.generate`, 112 x 112", 0.97, "generation", speed("ratio", 112)),
    Goal("G5", "plain learner / shared prefix, 448 x 448, FP32", 3.0, FORWARD, forward("fp32"), native=True),
    Goal("G5", "the same as a share of the ratio of tokens", 0.85, FORWARD, forward_by_tokens("fp32"), native=True),
    Goal("G5", "plain learner / shared prefix, 448 x 448, BF16", 3.0, FORWARD, forward("bf16")),
    Goal("G5", "the same as a share of the ratio of tokens", 0.85, FORWARD, forward_by_tokens("bf16")),
    Goal("G6", "weights into an engine, bytes a second / memcpy, 426 MB", 0.30, "weight_transfer", transfer("medium")),
    Goal("G6", "the same, 2.4 MB", 0.30, "weight_transfer", transfer("tiny")),
    Goal("G7", "TRL's time to 60 % on the digits / ours, three seeds", 2.0, "digits", digits),
    Goal(
        "G8",
        "memory of a learner's step, plain / shared prefix, FP32",
        3.0,
        FORWARD,
        forward_memory("fp32"),
        native=True,
    ),
    Goal("G8", "memory of a learner's step, plain / shared prefix, BF16", 3.0, FORWARD, forward_memory("bf16")),
    Goal("", "10 ms / what a step costs beyond its roles, the dearest case", 1.0, "controller", controller),
]


def goals_table() -> str:
    head = "| | What | Goal, at least | Median (range) | |\n|---|---|---|---|---|\n"
    return head + "\n".join(row for goal in GOALS if (row := goal.row()))


def speed_table() -> str:
    found = read_result("speed")
    if not found:
        return "Not measured."
    lines = ["| Images | Program | Seconds a step | Ratio | Rounds | Others | Parts, seconds |", "|" + "---|" * 7]
    for side, measured in found["sides"].items():
        for name, against in measured["against"].items():
            for program in (name, "service"):
                seconds, ratio = against["seconds"][program], against["ratio"]
                parts = against["parts"][program]
                stages = ", ".join(f"{part} {parts[part]:.2f}" for part in parts if part not in ("gap", "tokens"))
                factor = f"{ratio['median']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})" if program == name else ""
                spent = f"{seconds['median']:.2f} ({seconds['low']:.2f} to {seconds['high']:.2f})"
                repeats = f"{seconds['n']} | {100 * against['foreign']:.0f} %"
                lines.append(f"| {side} x {side} | {NAMES[program]} | {spent} | {factor} | {repeats} | {stages} |")
    return "\n".join(lines)


def digits_table() -> str:
    found = read_result("digits")
    if not found:
        return "Not measured."
    lines = ["| Seed | Program | Step at 60 % | Seconds to it | Seconds a step | Best accuracy |", "|" + "---|" * 6]
    for run in found["runs"]:
        for name, own in run.items():
            if name != "seed":
                seconds = f"{own['reached_seconds']:.1f}" if own["reached_seconds"] else "not reached"
                best = max(point["accuracy"] for point in own["curve"])
                lines.append(
                    f"| {run['seed']} | {NAMES[name]} | {own['reached_step'] or '-'} | {seconds} | "
                    f"{own['step_seconds']:.2f} | {100 * best:.1f} % |"
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


def transfer_table() -> str:
    """Milliseconds of an update's parts."""
    found = read_result("weight_transfer")
    if not found:
        return "Not measured."
    parts = list(next(iter(found["sizes"].values()))["milliseconds"])
    lines = [f"| MB | {' | '.join(parts)} | GB/s | memcpy's |", "|" + "---|" * (len(parts) + 3)]
    for measured in found["sizes"].values():
        spent = [f"{measured['milliseconds'][part]['median']:.1f}" for part in parts]
        rates = [f"{measured[name]['median']:.2f}" for name in ("gb_per_second", "memcpy_gb_per_second")]
        lines.append(f"| {measured['bytes'] / 1e6:.1f} | {' | '.join([*spent, *rates])} |")
    return "\n".join(lines)


def roles_table() -> str:
    """Of emulated roles: overlap, and what a step costs beyond its roles."""
    overlapped, costs = read_result("overlap"), read_result("controller")
    if not (overlapped and costs):
        return "Not measured."
    lines = ["| Generating, learning, transfer, s | `max_staleness` | Longer role / wall |", "|" + "---|" * 3]
    for row in overlapped["rows"]:
        ratio = row["ratio"]
        lines.append(
            f"| {row['generate']:g}, {row['learn']:g}, {row['transfer']:g} | {row['max_staleness']} | "
            f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) |"
        )
    stages = list(costs["rows"][0]["stages_ms"])
    lines += ["", f"| Generators | Prompts | Beyond the roles, ms | {' | '.join(stages)} | Simulated | Driver | Loop |"]
    lines.append("|" + "---|" * (len(stages) + 6))
    rows = {(row["generators"], row["prompts"]): row for row in costs["rows"]}
    for simulated in costs["simulated"]:
        size = simulated["generators"], simulated["prompts"]
        cells = [*map(str, size), *[""] * (len(stages) + 4)]
        if row := rows.get(size):
            beyond = row["beyond_roles_ms"]
            cells[2] = f"{beyond['median']:.0f} ({beyond['low']:.0f} to {beyond['high']:.0f})"
            cells[3:-3] = [f"{row['stages_ms'][stage]:.0f}" for stage in stages]
            cells[-2:] = [f"{row[name]['median']:.0f}" for name in ("driver_cpu_ms", "loop_cpu_ms")]
        cells[-3] = f"{simulated['beyond_roles_ms']:.0f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_lines() -> str:
    found = read_result("speed") or read_result("digits")
    if not found:
        return "Not measured."
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
    labelled: set[str] = set()
    for index, measured in enumerate((read_result("speed") or {"sides": {}})["sides"].values()):
        seconds = {name: against["seconds"][name] for name, against in measured["against"].items()}
        seconds["service"] = next(iter(measured["against"].values()))["seconds"]["service"]
        for place, name in enumerate(name for name in NAMES if name in seconds):
            low, middle, high = (measured["completions"] / seconds[name][key] for key in ("high", "median", "low"))
            left.bar(
                index + 0.2 * place,
                middle,
                0.18,
                yerr=[[middle - low], [high - middle]],
                color=colours[name],
                label=None if name in labelled else NAMES[name],
            )
            labelled.add(name)
    sides = list((read_result("speed") or {"sides": {}})["sides"])
    left.set_xticks([0.3 + index for index in range(len(sides))], [f"{side} x {side} pixels" for side in sides])
    left.set_ylabel("samples a second")
    for index, run in enumerate((read_result("digits") or {"runs": []})["runs"]):
        for name in (name for name in run if name != "seed"):
            clock = [point["seconds"] for point in run[name]["curve"]]
            accuracy = [100 * point["accuracy"] for point in run[name]["curve"]]
            label = NAMES[name] if index == 0 else None
            right.plot(clock, accuracy, color=colours[name], label=label, linewidth=1)
    right.axhline(60, color="grey", linewidth=0.5)
    right.set_xlabel("seconds of training")
    right.set_ylabel("digits read, %")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    text = PAGE.read_text()
    parts = {"goals": goals_table, "speed": speed_table, "forward": forward_table, "digits": digits_table}
    parts |= {"machine": machine_lines, "plot": plot_line, "transfer": transfer_table, "roles": roles_table}
    for name, make in parts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, rest = text.split(start)
        text = head + start + make() + end + rest.partition(end.strip())[2]
    write_text(PAGE, text)
    print(goals_table())


if __name__ == "__main__":
    main()
