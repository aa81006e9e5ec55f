"""Train one run for each combination of settings: python -m rft_cluster.sweep --config sweep.yaml [--parallel N]

    name: templates-and-shots      # the folder runs/NAME gets a run for each combination, a table and a plot
    config: digits                 # the common configuration, as for launch
    overrides: [schedule.steps=80]
    grid:
      prompt.template: [think_answer, answer_only]
      data.shots: [1, 2, 4]        # the last key is the plot's axis; the others become colours
    seeds: [0, 1, 2, 3, 4]         # run.seed: repeats of each row of the table, which has their median and range
    against: template-think_answer_shots-1     # the row that others are compared with, seed by seed; else the first

In place of `grid`, settings to try one by one:

    rows:
      default: []
      closed: [prompt.template=closed]
      few and slow: [data.shots=2, optimizer.learning_rate=1e-4]

Each run is a `launch` command, one after another. The same sweep started again continues where it stopped.
"""

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, model_validator
from tqdm import tqdm

from rft_cluster.classification.apart import apart
from rft_cluster.classification.repeats import Repeat, Row, summary, table
from rft_cluster.classification.report import Judged
from rft_cluster.common import stopping
from rft_cluster.common.errors import UserError, check_range, end_with, exit_code
from rft_cluster.common.files import write_json, write_text
from rft_cluster.common.lookup import did_you_mean
from rft_cluster.common.text import shown
from rft_cluster.config import Config, FilePath, PathText, Section, load_config, read_file, run_folder_of, validated
from rft_cluster.run.history import History, read_history
from rft_cluster.run.resume import is_run, read_saved_config

OWN_KEYS = ("run.seed=", "run.folder=", "run.name=")
LINES = 6  # lines shown of a failed run's log
STEP = re.compile(r"step +(\d+)/\d+ ")  # start of a step's line in the output of `launch`


class Sweep(Section):
    """A sweep's file, see the module's docstring. The grid's values are the texts of overrides."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    config: PathText
    overrides: list[str] = Field([])
    grid: dict[str, Annotated[list[str], Field(min_length=1)]] = Field({})
    rows: dict[str, list[str]] = Field({})
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    against: str | None = None
    folder: FilePath = Path("runs")

    @model_validator(mode="after")
    def _rows_are_told_once(self) -> "Sweep":
        if bool(self.grid) == bool(self.rows):
            raise ValueError("give either grid (all combinations) or rows (settings one by one)")
        settings = [*self.overrides, *(text for own in self.rows.values() for text in own)]
        told = [*settings, *(f"{key}=" for key in self.grid)]
        for text in told:
            if text.startswith(OWN_KEYS):
                raise ValueError(f"{text.partition('=')[0]} is set by the sweep: repeats are listed under seeds")
        return self

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def axes(self) -> list[str]:
        """The headings of a row's values; the last is the plot's axis."""
        return list(self.grid) or ["row"]

    @property
    def settings(self) -> list[tuple[tuple[str, ...], list[str]]]:
        """The values of each row, and its overrides."""
        if self.rows:
            return [((name,), own) for name, own in self.rows.items()]
        return [
            (values, [f"{key}={value}" for key, value in zip(self.grid, values, strict=True)])
            for values in itertools.product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Run:
    """One seed of a row. `values` and `settings` are the row's, `row` is its name; `name` is the run's."""

    values: tuple[str, ...]
    settings: tuple[str, ...]
    seed: int
    row: str

    @property
    def name(self) -> str:
        return f"{self.row}_seed-{self.seed}"

    def overrides(self, sweep: Sweep) -> list[str]:
        own = [f"run.seed={self.seed}", f"run.folder={sweep.path}", f"run.name={self.name}"]
        return [*sweep.overrides, *self.settings, *own]


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
    """All runs of a sweep, row by row.

    Raises:
        UserError: two runs would have the same name, or no row is called `against`.
    """
    runs = [
        Run(values, tuple(own), seed, _name(sweep, values)) for values, own in sweep.settings for seed in sweep.seeds
    ]
    if nameless := [", ".join(run.values) for run in runs if not run.row]:
        raise UserError(f"rows: {nameless[0]!r} names a folder, which needs a letter from a to z or a digit in it")
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two runs of the sweep would have one name: {', '.join(twice)}. Name or list each row once")
    rows = {run.row for run in runs}
    if sweep.against is not None and _folder_name(sweep.against) not in rows:
        near = did_you_mean(sweep.against, rows)
        raise UserError(f"against: no row is called {sweep.against}.{near} The rows are {', '.join(sorted(rows))}")
    return runs


def _name(sweep: Sweep, values: tuple[str, ...]) -> str:
    """The name of a row, which is part of a folder's."""
    parts = values if sweep.rows else [f"{k.rpartition('.')[2]}-{v}" for k, v in zip(sweep.grid, values, strict=True)]
    return _folder_name("_".join(parts))


def _folder_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-")


def sweep(plan: Sweep, parallel: int) -> int:
    """Check every combination, run those that are not complete, then write the table and the plot."""
    check_range("--parallel", parallel, 1, 1000)
    runs = combinations(plan)
    configs = [_config(plan, run) for run in runs]
    if parallel > 1 and any(config.cluster.device == "cuda" and not config.cluster.joins for config in configs):
        raise UserError(
            f"--parallel is {parallel}, but each run would start a Ray of its own here, and each of them gives out "
            f"the first GPU: start one for all with `ray start --head`, set RAY_ADDRESS=auto, and start the sweep again"
        )
    for run, config in zip(runs, configs, strict=True):
        _check_begun(plan.path / run.name, config)
    steps = [config.schedule.steps for config in configs]
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
    good = [run for run in runs if run not in failed]
    done = {run: found for run in good if (found := read_repeat(plan.path / run.name, run.seed))}
    if done:
        _write(plan, runs, done)
        _compare(plan, done)
    for run in failed:
        print(f"failed: {run.name}, see {plan.path / run.name}.log and start the sweep again", file=sys.stderr)
    return 1 if failed else 0


def _config(plan: Sweep, run: Run) -> Config:
    """The configuration of a run. Raises UserError if the run would not measure one test accuracy."""
    config = load_config(plan.config, run.overrides(plan))
    if config.data.folds or not config.data.test:
        key = f"data.folds is {config.data.folds}: leave it out" if config.data.folds else "data.test is 0: set it"
        raise UserError(f"{run.name}: a sweep compares runs by their accuracy on test images, and {key}")
    return config


def _check_begun(folder: Path, config: Config) -> None:
    """Check that a run that was begun had the sweep's steps all the time: `launch` goes on with another number, from a
    learning rate that had fallen to its end, and such a run is no repeat of one that was not stopped."""
    for file in [folder / "config.yaml", *folder.glob("config-to-*.yaml")]:
        had = read_saved_config(file).schedule.steps if file.is_file() else config.schedule.steps
        if had != config.schedule.steps:
            raise UserError(
                f"{file} has schedule.steps={had}, and the sweep has {config.schedule.steps} now: remove {folder}, or "
                f"give the sweep another name"
            )


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


def read_repeat(folder: Path, seed: int) -> Repeat | None:
    """What a run measured on its test images; None if it is not complete, or tested nothing."""
    history = read_history(folder) if is_run(folder) else None
    tests = [row for row in history.evaluations if row["split"] == "test"] if history else []
    if not history or history.state != "done" or not tests:
        return None
    judged = history.tested(tests[-1]["step"])
    images, right = _answers(history, judged)
    return Repeat(
        seed=seed,
        n=tests[-1]["n"],
        before=tests[0]["accuracy_strict"],
        after=tests[-1]["accuracy_strict"],
        format=tests[-1]["format_rate"],
        baselines=history.baselines,
        images=images,
        right=right,
        parts={name: own["rate"] for name, own in apart(judged, history.unseen).items()},
    )


def _answers(history: History, judged: Sequence[Judged]) -> tuple[str, tuple[bool, ...]]:
    """A digest of the test images with their labels, and whether each was answered right, sorted by image."""
    entries = history.manifest["splits"]["test"] if history.manifest else []
    pictures = [(entry["sha256"], entry["label"]) for entry in entries]
    ordered = sorted(range(len(pictures)), key=lambda index: pictures[index])
    digest = hashlib.sha256(json.dumps([pictures[index] for index in ordered]).encode()).hexdigest()
    return digest, tuple(judged[index].strict for index in ordered) if judged else ()


def _outcome(plan: Sweep, run: Run, code: int) -> str:
    repeat = None if code else read_repeat(plan.path / run.name, run.seed)
    if repeat is None:
        log = (plan.path / f"{run.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        said = "".join(f"\n  {shown(line)}" for line in log[-LINES:])
        return f"{run.name}: failed with exit code {code}, see {plan.path / run.name}.log:{said}"
    return f"{run.name}: test accuracy {100 * repeat.before:.1f} % -> {100 * repeat.after:.1f} %"


def _write(plan: Sweep, runs: Sequence[Run], done: Mapping[Run, Repeat]) -> None:
    """Write the table, its figures and the plot."""
    from rft_cluster.classification.plots import draw_sweep

    rows = {}
    for run in runs:
        own = [one for one in runs if one.row == run.row]
        repeats, missing = [done[one] for one in own if one in done], [one.seed for one in own if one not in done]
        rows[run.row] = Row(run.row, dict(zip(plan.axes, run.values, strict=True)), tuple(repeats), tuple(missing))
    reference = rows[_folder_name(plan.against) if plan.against else runs[0].row]
    found = [summary(row, reference) for row in rows.values()]
    *others, axis = plan.axes
    series: dict[str, list[tuple[str, Any]]] = {}
    for row in (row for row in found if row["seeds"]):
        name = ", ".join(f"{key} {row['values'][key]}" for key in others) or plan.config
        series.setdefault(name, []).append((row["values"][axis], row))
    text = table(found, reference.name)
    write_json(plan.path / "results.json", found)
    write_text(plan.path / "table.md", text)
    draw_sweep(series, axis, plan.path / "sweep.png")
    print(f"\n{text}\nwritten: {plan.path}/table.md, results.json, sweep.png")


def _compare(plan: Sweep, done: Mapping[Run, Repeat]) -> None:
    """Write the page that shows the runs side by side, and link to it from the table."""
    from rft_cluster.report.compare import write_comparison

    if len(done) > 1:
        file = write_comparison([plan.path / run.name for run in done], plan.path / "compare.html")
        with (plan.path / "table.md").open("a", encoding="utf-8") as text:
            text.write("\n[The runs side by side, image by image](compare.html)\n")
        print(f"written: {file}, the runs side by side; open it in a browser")


if __name__ == "__main__":
    end_with(main)
