"""Train one run for each combination of settings: python -m rft_cluster.sweep --config sweep.yaml [--parallel N]

    name: templates-and-shots      # the folder runs/NAME gets a run for each combination, a table and a plot
    config: digits                 # the common configuration, as for launch
    overrides: [schedule.steps=80]
    grid:
      prompt.template: [think_answer, answer_only]
      data.shots: [1, 2, 4]        # the last key is the plot's axis; the others become colours
    seeds: [0, 1]                  # run.seed; with several, the table has the mean and the interval of their spread

Each run is a `launch` command, one after another. The same sweep started again continues where it stopped.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NoReturn

from pydantic import Field
from tqdm import tqdm

from rft_cluster.classification.baselines import BASELINES
from rft_cluster.common import stopping
from rft_cluster.common.errors import UserError, check_range, exit_code
from rft_cluster.config import FilePath, PathText, Section, load_config, read_file, run_folder_of, validated
from rft_cluster.run.folder import read_evaluations

LINES = 6  # lines shown of a failed run's log
STEP = re.compile(r"step +(\d+)/\d+ ")  # start of a step's line in the output of `launch`


class Sweep(Section):
    """A sweep's file, see the module's docstring. The grid's values are the texts of overrides."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    config: PathText
    overrides: list[str] = Field([])
    grid: dict[str, list[str]] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    folder: FilePath = Path("runs")

    @property
    def path(self) -> Path:
        return self.folder / self.name


@dataclass(frozen=True)
class Run:
    """One combination of the grid's values and one seed. `name` is that of its folder."""

    values: tuple[str, ...]
    seed: int
    name: str

    def overrides(self, sweep: Sweep) -> list[str]:
        chosen = [f"{key}={value}" for key, value in zip(sweep.grid, self.values, strict=True)]
        return [*sweep.overrides, *chosen, f"run.seed={self.seed}", f"run.folder={sweep.path}", f"run.name={self.name}"]


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 a run failed, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="the sweep's YAML file")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, if the cluster has room (1)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: sweep(read_sweep(options.config), options.parallel))


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file. Raises UserError if it is missing, not YAML, or has unknown or invalid keys."""
    if (run := run_folder_of(path)) is not None:  # its overrides would count as typed by the user
        raise UserError(
            f"{path} lies in the folder of a run, {run}, which may be a stranger's: copy it elsewhere if you trust it"
        )
    return validated(Sweep, read_file(path), f"{path} is not a sweep (name, config, grid, ...)")


def combinations(sweep: Sweep) -> list[Run]:
    """All runs of a sweep. The seed changes fastest, then the last key of the grid.

    Raises:
        UserError: two runs would have the same name.
    """
    runs = []
    for values in itertools.product(*sweep.grid.values()):
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in zip(sweep.grid, values, strict=True)]
        for seed in sweep.seeds:
            name = re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join([*parts, f"seed-{seed}"])).lstrip("._-")
            runs.append(Run(values, seed, name))
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the grid has the same combination twice: {', '.join(twice)}")
    return runs


def sweep(plan: Sweep, parallel: int) -> int:
    """Check every combination, run those that are not complete, then write the table and the plot."""
    check_range("--parallel", parallel, 1, 1000)
    runs = combinations(plan)
    steps = [load_config(plan.config, run.overrides(plan)).schedule.steps for run in runs]
    plan.path.mkdir(parents=True, exist_ok=True)
    print(f"{len(runs)} runs in {plan.path}, {parallel} at a time, each with a log NAME.log there", flush=True)
    finished, failed = 0, []
    with (
        tqdm(total=sum(steps), unit="step") as bar,
        ThreadPoolExecutor(parallel) as pool,
        _all_stopped(pool) as launched,
    ):
        for run, seconds, code in pool.map(lambda run, n: _launch(plan, run, n, bar, launched), runs, steps):
            finished += 1
            with bar.external_write_mode(file=sys.stdout):
                print(f"{finished}/{len(runs)} {_outcome(plan, run, code)}, {seconds:.0f} s", flush=True)
            if code:
                failed.append(run)
    rows = [row for values in itertools.product(*plan.grid.values()) if (row := _row(plan, runs, values))]
    if rows:
        _write(plan, rows)
        _compare(plan, runs)
    for run in failed:
        print(f"failed: {run.name}, see {plan.path / run.name}.log and start the sweep again", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _all_stopped(pool: ThreadPoolExecutor) -> Iterator[list["subprocess.Popen[str]"]]:
    """Stop the processes in the yielded list when the sweep is stopped: each saves a checkpoint."""
    launched: list[subprocess.Popen[str]] = []
    try:
        yield launched
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in launched:
            process.terminate()
        if stopping.received():
            raise KeyboardInterrupt("interrupted: start the sweep again to go on where it stopped") from error
        raise


def _launch(
    plan: Sweep, run: Run, steps: int, bar: "tqdm[NoReturn]", launched: list["subprocess.Popen[str]"]
) -> tuple[Run, float, int]:
    """Run or resume one combination. Its output goes to NAME.log, its steps to the progress bar."""
    started, done = time.monotonic(), 0
    launch = [sys.executable, "-m", "rft_cluster.launch", "--resume=auto"]
    command = [*launch, "--config", plan.config, *run.overrides(plan)]
    bar.set_postfix_str(run.name)
    with (
        (plan.path / f"{run.name}.log").open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C reaches only the sweep, which passes it on once
        ) as process,
    ):  # fmt: skip
        launched.append(process)
        if stopping.received():
            process.terminate()
        assert process.stdout
        for line in process.stdout:
            log.write(line)
            log.flush()
            if step := STEP.match(line):
                bar.update(int(step[1]) - done)
                done = int(step[1])
    bar.update(steps - done)
    return run, time.monotonic() - started, process.returncode


def _tests(plan: Sweep, run: Run) -> list[dict[str, Any]]:
    """The evaluations on the test split, before and after training; fewer if the run is not complete."""
    folder = plan.path / run.name
    return read_evaluations(folder, "test") if (folder / "model").is_dir() else []


def _outcome(plan: Sweep, run: Run, code: int) -> str:
    tests = _tests(plan, run)
    if code or not tests:
        log = (plan.path / f"{run.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        said = "".join(f"\n  {line}" for line in log[-LINES:])
        return f"{run.name}: failed with exit code {code}, see {plan.path / run.name}.log:{said}"
    before, after = (100 * tests[end]["accuracy_strict"] for end in (0, -1))
    return f"{run.name}: test accuracy {before:.1f} % -> {after:.1f} %"


def _row(plan: Sweep, runs: Sequence[Run], values: tuple[str, ...]) -> dict[str, Any] | None:
    """One row of the table, for all seeds of one combination. Rates are means over seeds, `n` the images of each."""
    from rft_cluster.classification.intervals import over_runs

    done = [(run, tests) for run in runs if run.values == values and (tests := _tests(plan, run))]
    if not done:
        return None
    rates, before, formatted = (
        [tests[end][name] for _, tests in done]
        for end, name in ((-1, "accuracy_strict"), (0, "accuracy_strict"), (-1, "format_rate"))
    )
    baselines = [json.loads((plan.path / run.name / "baselines.json").read_text()) for run, _ in done]
    n = done[0][1][-1]["n"]
    return {
        "values": dict(zip(plan.grid, values, strict=True)),
        "seeds": [run.seed for run, _ in done],
        "before": fmean(before),
        "rate": fmean(rates),
        "rates": rates,
        "n": n,
        "interval": list(over_runs(rates, n)),
        "format": fmean(formatted),
        "baselines": {
            name: fmean(own[name] for own in baselines) for name in BASELINES if all(name in own for own in baselines)
        },
    }


def _write(plan: Sweep, rows: list[dict[str, Any]]) -> None:
    from rft_cluster.classification.plots import draw_sweep
    from rft_cluster.common.files import write_json, write_text

    *others, axis = plan.grid
    series: dict[str, list[tuple[str, Any]]] = {}
    for row in rows:
        name = ", ".join(f"{key} {row['values'][key]}" for key in others) or plan.config
        series.setdefault(name, []).append((row["values"][axis], row))
    table = markdown(plan, rows)
    write_json(plan.path / "results.json", rows)
    write_text(plan.path / "table.md", table)
    draw_sweep(series, axis, plan.path / "sweep.png")
    print(f"\n{table}\nwritten: {plan.path}/table.md, results.json, sweep.png")


def _compare(plan: Sweep, runs: Sequence[Run]) -> None:
    """Write the page that shows the runs side by side, and link to it from the table."""
    from rft_cluster.report.compare import write_comparison

    done = [plan.path / run.name for run in runs if _tests(plan, run)]
    if len(done) > 1:
        file = write_comparison(done, plan.path / "compare.html")
        with (plan.path / "table.md").open("a", encoding="utf-8") as table:
            table.write("\n[The runs side by side, image by image](compare.html)\n")
        print(f"written: {file}, the runs side by side; open it in a browser")


def markdown(plan: Sweep, rows: Sequence[dict[str, Any]]) -> str:
    """The table: test accuracy before and after, with its 95 % interval, and the baselines on the same images.

    With several seeds all rates are means, and the interval is that of the spread over seeds (`over_runs`).
    """
    head = [*plan.grid, "before", "after", "95 % interval", "format", *BASELINES.values(), "images", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = (f"{100 * end:.1f}" for end in row["interval"])
        cells = [
            *(value.replace("|", "\\|") for value in row["values"].values()),
            f"{100 * row['before']:.1f} %",
            f"**{100 * row['rate']:.1f} %**",
            f"{low} to {high}",
            f"{100 * row['format']:.1f} %",
            *(f"{100 * row['baselines'][name]:.1f} %" if name in row["baselines"] else "" for name in BASELINES),
            str(row["n"]),
            ", ".join(map(str, row["seeds"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
