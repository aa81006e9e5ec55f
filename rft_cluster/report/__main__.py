"""Write the report of a run: python -m rft_cluster.report RUN_DIR [data.path=IMAGES]
Or compare runs: python -m rft_cluster.report --compare RUN_DIR RUN_DIR ...

One HTML file that needs nothing else: before and after, curves, confusion matrix, every completion with its image. The
run may be done, stopped or in progress, and its folder a copy.
"""

import argparse
from pathlib import Path

from rft_cluster.common.errors import end_with, exit_code
from rft_cluster.common.files import check_writable, size, write_text
from rft_cluster.common.text import shown

MOST_FILE = 30 * 10**6  # bytes: mail and browsers take it
SCRIPTS = ("charts.js", "pictures.js", "confusion.js", "rollouts.js", "report.js")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR", help="the folder of a run")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="where the images are now")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="RUN_DIR", help="show these runs side by side")
    parser.add_argument(
        "--output", type=Path, help="the file to write (RUN_DIR/report.html, or compare.html beside the runs)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="without the proof, which reads all checkpoints, and without the data set"
    )
    options = parser.parse_intermixed_args(arguments)
    if (options.run is None) == (options.compare is None):
        parser.error("name one RUN_DIR, or --compare and all that are to be compared")
    if options.compare:
        return exit_code(lambda: compare(options.compare, options.output))
    output = options.output or options.run / "report.html"
    return exit_code(lambda: report(options.run, options.overrides, output, options.quick))


def compare(runs: list[Path], output: Path | None) -> None:
    """Write the page of several runs. Raises UserError, see `write_comparison`."""
    from rft_cluster.report.compare import write_comparison

    file = write_comparison(runs, output)
    print(f"written: {shown(str(file))}; open it in a browser", flush=True)


def report(run: Path, overrides: list[str], output: Path, quick: bool) -> None:
    """Write the page of a run.

    Raises:
        UserError: it is not the folder of a run, or the file cannot be written.
    """
    from rft_cluster.report.collect import collect
    from rft_cluster.report.completions import MOST_BYTES
    from rft_cluster.report.page import render
    from rft_cluster.report.pictures import find_pictures
    from rft_cluster.run.history import read_history
    from rft_cluster.run.ledger import check_run

    history = read_history(run)
    check_writable(output.parent, "Set --output to a file in a folder that can be")
    pictures, missing = find_pictures(history, overrides, from_data=not quick)
    ledger = None if quick else check_run(run)
    for most in (MOST_BYTES, MOST_BYTES // 3, MOST_BYTES // 10, 0):
        page = collect(history, pictures, missing, ledger, most)
        text = render("report.html", page.context, page.data, SCRIPTS)
        if len(text) <= MOST_FILE:
            break  # completions that repeat little compress less than others
    write_text(output, text)
    print(f"written: {shown(str(output))} ({size(len(text.encode()))}); open it in a browser", flush=True)


if __name__ == "__main__":
    end_with(main)
