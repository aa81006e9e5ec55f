"""Watch a run in the terminal: python -m rft_cluster.watch RUN_DIR

Curves, where the time goes, what each actor does, the newest answers, and hints. It only reads the run's folder, so it
works on any machine that sees the folder. Ctrl-C ends it, as does the end of the run. Without a terminal it prints one
view, as with --once.
"""

import argparse
import time
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.live import Live

from rft_cluster.common.errors import end_with, exit_code
from rft_cluster.common.text import shown
from rft_cluster.report.hints import hints
from rft_cluster.run.activity import read_activity
from rft_cluster.run.history import check_is_run, read_history
from rft_cluster.run.lock import holder
from rft_cluster.run.resume import is_run
from rft_cluster.watch.view import View

SHARE = 0.01  # of a core: all that watching takes where it runs, which may be the run's own machine
SHORTEST = 1.0  # seconds between two views
LINES = 50  # of a view that is printed to a file


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 ended, also by Ctrl-C; 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument("--once", action="store_true", help="print one view and end")
    options = parser.parse_args(arguments)
    return exit_code(lambda: watch(options.run, options.once))


def watch(run: Path, once: bool) -> None:
    """Show a run until it ends, or once.

    Raises:
        UserError: it is not the folder of a run, or it was removed meanwhile.
    """
    console = Console()
    try:
        if not once and console.is_terminal and not console.is_dumb_terminal:
            _wait_for_records(run, console)
            _live(run, console)
    except KeyboardInterrupt:  # the usual end of watching; the run goes on
        print(f"{shown(str(run))} is no longer watched", flush=True)
        return
    view = _view(run)
    console.print(view, height=None if console.is_terminal else LINES)


def _view(run: Path) -> View:
    history = read_history(run)
    return View(history, read_activity(run), time.time(), hints(history))


def _live(run: Path, console: Console) -> None:
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for number in count():
            began = time.process_time()
            view = _view(run)
            if not view.goes_on:
                return
            live.update(view, refresh=True)
            # The first view also loads what the later ones need.
            cost = time.process_time() - began if number else 0.0
            time.sleep(max(SHORTEST, cost / SHARE))


def _wait_for_records(run: Path, console: Console) -> None:
    """Wait while a run starts: it writes its records when its actors are ready."""
    if holder(run) is None or is_run(run):
        return
    with console.status("the run starts: its records are written when its actors are ready"):
        while holder(run) and not is_run(run):
            time.sleep(SHORTEST)
    check_is_run(run)


if __name__ == "__main__":
    end_with(main)
