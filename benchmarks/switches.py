"""Which switches pay: each of `ROWS` against the default, on two data sets, with the small model on a CPU.

    python -m benchmarks.switches               every run that is due, one after another; stop it at any time
    python -m benchmarks.switches --runs 1      the next one
    python -m benchmarks.switches --runs 0      write the tables of docs/switches.md and others anew

The default has five seeds. Each other row is screened with two, and has the other three if it helped (`helped`). Seeds
and rule were fixed before the first run. Each finished run is kept in `results/` (`FILES`), so that the same command
goes on where the last one stopped, also in another checkout; a run that was stopped goes on, too, where its folder is.
The runs are those of a sweep (`rft_cluster.sweep`), in `~/.cache/rft_cluster/benchmarks`.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.common import CACHE, ROOT, check_known, machine, parsed, read_result, write_result
from benchmarks.report import fill, less, table
from rft_cluster.classification.baselines import NAMES
from rft_cluster.classification.plots import draw_sweep
from rft_cluster.classification.repeats import Repeat, Row, against, summary
from rft_cluster.classification.repeats import table as table_of_rows
from rft_cluster.common.errors import UserError, exit_code
from rft_cluster.common.hardware import native_dtype
from rft_cluster.config import load_config
from rft_cluster.model.tiny.conditions import RECIPE_VERSION
from rft_cluster.run.lock import locked
from rft_cluster.sweep import Run, Sweep, combinations, read_repeat, sweep

# Results by the type that a machine's processor computes in: which of two runs is better may change with the rounding.
FILES = {"float32": "switches", "bfloat16": "switches_bfloat16"}
MAIN = "bfloat16"  # all rows were screened in it: plot, docs/published.md and docs/baselines.md have its figures
PAGE, PUBLISHED, BASELINES = (ROOT / "docs" / f"{name}.md" for name in ("switches", "published", "baselines"))
FOLDER = CACHE / "switches" / f"tiny-{RECIPE_VERSION}"  # a run goes on with the small model that it began with
CLOTHES = CACHE / "clothes"
DEFAULT = "default"
SCREENED, SEEDS = (41, 42), (41, 42, 43, 44, 45)
LEAST = 0.01  # of accuracy: the smallest median difference that counts as help

# A line for each switch: its name, and what it overrides on both data sets.
ROWS: dict[str, list[str]] = {
    DEFAULT: [],
    "answer only": ["prompt.template=answer_only"],
    "closed": ["prompt.template=closed"],
    "labels listed": ["prompt.template=with_labels"],
    "closed with own answers": ["prompt.template=closed", "prompt.options=own_top_k"],
    "dr_grpo": ["algorithm.advantage=dr_grpo"],
    "gpg": ["algorithm.advantage=gpg"],
    "rloo": ["algorithm.advantage=rloo"],
    "normalised sum": ["algorithm.total=normalised_sum"],
    "no KL": ["algorithm.kl_beta=0"],
    "groups of 4": ["sampling.group_size=4"],
    "groups of 16": ["sampling.group_size=16"],
    "twice the learning rate": ["optimizer.learning_rate=1e-3"],
    "half the learning rate": ["optimizer.learning_rate=2.5e-4"],
    "2 updates a step": ["algorithm.updates_per_step=2"],
    "temperature 0.7": ["sampling.temperature=0.7"],
    "temperature 1.3": ["sampling.temperature=1.3"],
    "crop": ["data.augment={crop: 0.1}"],
    "rotation": ["data.augment={rotation: 10}"],
    "crop and rotation": ["data.augment={crop: 0.1, rotation: 10}"],
    "colour": ["data.augment={colour: 0.2}"],
    "flip": ["data.augment={flip: true}"],
    "further prompts": ["schedule.min_live=0.9"],
    "SFT": ["algorithm.objective=sft", "algorithm.kl_beta=0"],
    "warm start by SFT": ["schedule.warm_start={steps: 20}"],
}


# The rows that change the question: whether it lists the names, and asks for reasoning.
TEMPLATES = {
    DEFAULT: ("open", "yes"),
    "answer only": ("open", "no"),
    "labels listed": ("listed", "yes"),
    "closed": ("listed", "no"),
}


@dataclass(frozen=True)
class Data:
    """A data set with the settings of all its runs. `config` is a name in `configs/`."""

    config: str
    settings: tuple[str, ...]


DATA = {
    "digits": Data("digits", ("schedule.evaluate_every=0",)),
    "clothes": Data(
        "photos",
        (
            "schedule.evaluate_every=0",
            f"data.path={CLOTHES}",
            "prompt.subject=garment",
            "data.shots=8",
            "data.validation=100",
            "data.test=300",
            "model.min_image_tokens=4",  # 56 x 56 pixels, as the folder has them
            "model.max_image_tokens=4",
            "schedule.steps=160",
        ),
    ),
}


@dataclass(frozen=True)
class Key:
    """One run: a row of a data set with a seed."""

    data: str
    row: str
    seed: int

    @property
    def sweep(self) -> Sweep:
        """The sweep of this run alone."""
        data = DATA[self.data]
        return Sweep(
            name=self.data,
            config=data.config,
            overrides=list(data.settings),
            rows={self.row: ROWS[self.row]},
            seeds=[self.seed],
            folder=FOLDER,
        )

    def matches(self, record: Mapping[str, Any]) -> bool:
        """True if it is the record of this run, with the settings and the small model that the run has now."""
        return key_of(record) == self and record["settings"] == self.settings and record.get("tiny") == RECIPE_VERSION

    @property
    def settings(self) -> list[str]:
        """All overrides; that of the folder differs between machines."""
        return [text for text in (*DATA[self.data].settings, *ROWS[self.row]) if not text.startswith("data.path=")]


def main() -> int:
    options = parsed(__doc__, runs=10_000, data=list(DATA), rows=list(ROWS), again=False)
    return exit_code(lambda: work(options.runs, options.data, options.rows, options.again))


def work(runs: int, data: Sequence[str], rows: Sequence[str], again: bool) -> int:
    """Do up to `runs` of the runs that are due, then write the page. Returns 1 if one failed.

    `again`: those that failed before are due, too.
    """
    check_known(data, list(DATA))
    check_known(rows, list(ROWS))
    failed = 0
    found = {dtype: runs_in(dtype) for dtype in FILES}
    own = native_dtype("cpu")
    records = found[own]
    anew = {key_of(record) for record in records if again and "failed" in record}

    def left() -> list[Key]:
        return due([record for record in records if key_of(record) not in anew], data, rows)

    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(FOLDER) if runs else nullcontext():  # never two at once
        for _ in range(runs):
            if (key := next(iter(left()), None)) is None:
                break
            record = measured(key)
            anew.discard(key)
            failed |= "failed" in record
            records = [*(one for one in records if key_of(one) != key), record]
            write_result(FILES[own], {"machine": machine(), "runs": records})
            print(f"{len(left())} runs are due", flush=True)
    write_page(found | {own: records})
    return failed


def runs_in(dtype: str) -> list[dict[str, Any]]:
    """The records of all runs on machines that compute in this type."""
    return list((read_result(FILES[dtype]) or {"runs": []})["runs"])


def key_of(record: Mapping[str, Any]) -> Key:
    return Key(record["data"], record["row"], record["seed"])


def due(records: Sequence[Mapping[str, Any]], data: Sequence[str], rows: Sequence[str]) -> list[Key]:
    """The runs that are neither done nor failed, in order: for each data set the default, the first seeds of all rows,
    and the other seeds of those that helped."""
    others = [row for row in rows if row != DEFAULT]
    keys = []
    for name in data:
        keys += [Key(name, DEFAULT, seed) for seed in SEEDS if DEFAULT in rows]
        keys += [Key(name, row, seed) for row in others for seed in SCREENED]
        keys += [Key(name, row, seed) for row in others if helped(records, name, row) for seed in SEEDS]
    return [key for key in dict.fromkeys(keys) if not any(key.matches(record) for record in records)]


def helped(records: Sequence[Mapping[str, Any]], data: str, row: str) -> bool:
    """True if the row was better than the default with both of the first seeds, by `LEAST` in the median."""
    both = against(rows_of(records, data, [row], SCREENED)[0], rows_of(records, data, [DEFAULT], SCREENED)[0])
    return both is not None and len(both["seeds"]) == 2 and min(both["differences"]) > 0 and both["median"] >= LEAST


def rows_of(
    records: Sequence[Mapping[str, Any]], data: str, names: Sequence[str], seeds: Sequence[int] = SEEDS
) -> list[Row]:
    """The rows with their finished runs of these seeds. Missing are those of the first seeds, of the default all."""
    rows = []
    for name in names:
        keys = [Key(data, name, seed) for seed in seeds]
        repeats = [repeat_of(one) for key in keys for one in records if key.matches(one) and "failed" not in one]
        wanted = SEEDS if name == DEFAULT else SCREENED
        missing = [seed for seed in wanted if seed in seeds and seed not in {one.seed for one in repeats}]
        rows.append(Row(name, {"switch": name}, tuple(repeats), tuple(missing)))
    return rows


def measured(key: Key) -> dict[str, Any]:
    """The record of a run, which is made now, or goes on. A finished run's folder is removed."""
    if key.data == "clothes" and not CLOTHES.exists():
        make_clothes()
    plan, began = key.sweep, time.monotonic()
    (run,) = combinations(plan)
    code = sweep(plan, parallel=1)
    here = machine()
    record = {
        "data": key.data,
        "row": key.row,
        "seed": key.seed,
        "settings": key.settings,
        "tiny": RECIPE_VERSION,
        "commit": here["commit"],
        "processor": here["processor"],
        "seconds": round(time.monotonic() - began),  # of the last part, if the run was stopped
    }
    repeat = None if code else read_repeat(plan.path / run.name, key.seed)
    if repeat is None:
        return record | {"failed": last_line(plan, run)}
    shutil.rmtree(plan.path / run.name)
    return record | asdict(repeat) | {"right": "".join("01"[flag] for flag in repeat.right)}


def make_clothes() -> None:
    """Write the folder of clothes. Raises UserError where the photographs are missing."""
    script = ROOT / "examples" / "fashion_folder.py"
    done = subprocess.run([sys.executable, script, CLOTHES], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: "))


def last_line(plan: Sweep, run: Run) -> str:
    log = (plan.path / f"{run.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(log) if line.strip()), "its log is empty")


def repeat_of(record: Mapping[str, Any]) -> Repeat:
    names = ("seed", "n", "before", "after", "format", "baselines", "images")
    return Repeat(**{name: record[name] for name in names}, right=tuple(one == "1" for one in record["right"]))


# The page


def write_page(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the tables into the pages, between their marks, and the plot beside them. `found`: records by dtype.

    What stands in docs/baselines.md stays until the default has all its seeds.
    """
    records = found[MAIN]
    tables = {data: switches_table(found["float32"], data) for data in DATA}
    tables |= {f"{data} in BF16": switches_table(found["bfloat16"], data) for data in DATA}
    fill(PAGE, {"plot": plot_line(records), **tables})
    fill(PUBLISHED, {"ours": ours_table(records)})
    defaults = {data: rows_of(records, data, [DEFAULT])[0] for data in DATA}
    whole = {data: row.repeats for data, row in defaults.items() if not row.missing}
    fill(BASELINES, {f"baselines of {data}": baselines_table(repeats) for data, repeats in whole.items()})
    if "clothes" in whole:
        fill(BASELINES, {"tried on clothes": tried_table(records, "clothes", "logistic_regression")})


def summaries(records: Sequence[Mapping[str, Any]], data: str) -> list[dict[str, Any]]:
    """Each row against the default."""
    rows = rows_of(records, data, list(ROWS))
    return [summary(row, rows[0]) for row in rows]


def plot_line(records: Sequence[Mapping[str, Any]]) -> str:
    """The plot, drawn anew, where there is something to draw."""
    found = {data: [(row["name"], row) for row in summaries(records, data) if row["seeds"]] for data in DATA}
    series = {data: points for data, points in found.items() if points}
    if not series:
        return "Not measured."
    draw_sweep(series, "switch", PAGE.with_suffix(".png"))
    return "![Accuracy of each switch, and its differences from the default, seed by seed](switches.png)"


def switches_table(records: Sequence[Mapping[str, Any]], data: str) -> str:
    """Each row against the default, then the runs that failed and the rows that have none."""
    rows = summaries(records, data)
    found = [row for row in rows if row["seeds"]]
    if not found:
        return "Not measured."
    for entry in found:
        entry["baselines"] = {}  # they are the same in all rows, and have a table of their own
    now = [one for one in records if "failed" in one and one["row"] in ROWS and key_of(one).matches(one)]
    failed = [f"- {one['row']}, seed {one['seed']}, failed: {one['failed']}" for one in now if one["data"] == data]
    left = [row["name"] for row in rows if not row["seeds"]]
    screened = [row["name"] for row in rows if row["name"] != DEFAULT and {*SCREENED} <= {*row["seeds"]}]
    better = [name for name in screened if helped(records, data, name)]
    said = f"Better with both of the first seeds, by a point in the median: {', '.join(better) or 'none'}, of "
    said += f"{len(screened)} rows that have both."
    parts = ["\n".join(failed), said, f"Not measured: {', '.join(left)}." if left else ""]
    return "\n\n".join([table_of_rows(found, DEFAULT).rstrip(), *filter(None, parts)])


def has_all_seeds(row: Row) -> bool:
    return {one.seed for one in row.repeats} == {*SEEDS}


def ours_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The templates, with the words that published figures are told apart by."""
    lines = []
    for data in DATA:
        shots = load_config(DATA[data].config, list(DATA[data].settings)).data.shots
        for name, (names, thinks) in TEMPLATES.items():
            (row,) = rows_of(records, data, [name])
            if has_all_seeds(row):
                found = summary(row, row)
                low, high = (f"{100 * end:.1f}" for end in found["range"])
                figure = f"{100 * found['rate']:.1f} ({low} to {high})"
                lines.append((data, names, thinks, "equal", shots, found["n"], figure, len(row.repeats)))
    head = ("images", "names", "thinks", "right if", "shots", "test images", "accuracy", "seeds")
    return table(head, lines) if lines else "Not measured."


def baselines_table(repeats: Sequence[Repeat]) -> str:
    """The default and the baselines on the same images, seed by seed, and the default less each (`sign_flip`)."""
    names = [name for name in NAMES if all(name in one.baselines for one in repeats)]
    head = ["test accuracy, %", *(f"seed {one.seed}" for one in repeats), "median", "policy less it, points", "p"]
    others = {"the policy before": [one.before for one in repeats]}
    others |= {NAMES[name]: [one.baselines[name] for one in repeats] for name in names}
    ours, images = [one.after for one in repeats], [one.n for one in repeats]
    lines = [["**the policy**", *shown(ours), "", ""]]
    lines += [[name, *shown(rates), *less(ours, rates, images)] for name, rates in others.items()]
    return table(head, lines)


def tried_table(records: Sequence[Mapping[str, Any]], data: str, baseline: str) -> str:
    """The rows with all seeds, less a baseline of the same images: seed by seed, best median first."""
    found = []
    for row in rows_of(records, data, list(ROWS)):
        if has_all_seeds(row):
            ours, theirs = [one.after for one in row.repeats], [one.baselines[baseline] for one in row.repeats]
            differences = [f"{100 * (own - other):+.1f}" for own, other in zip(ours, theirs, strict=True)]
            cells = less(ours, theirs, [one.n for one in row.repeats])
            found.append((median(ours), [row.name, *differences, *cells, f"{100 * median(ours):.1f}"]))
    head = ["", *(f"seed {seed}" for seed in SEEDS), f"less {NAMES[baseline]}, points", "p", "accuracy, %"]
    lines = [line for _, line in sorted(found, key=lambda pair: -pair[0])]
    return table(head, lines)


def shown(rates: Sequence[float]) -> list[str]:
    """Cells of a line: each seed, and the median."""
    return [*(f"{100 * rate:.1f}" for rate in rates), f"**{100 * median(rates):.1f}**"]


if __name__ == "__main__":
    sys.exit(main())
