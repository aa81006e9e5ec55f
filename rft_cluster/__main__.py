"""python -m rft_cluster: list the commands."""

import sys

from rft_cluster.common.errors import exit_code

COMMANDS = """\
python -m rft_cluster.launch    train a classifier; --dry-run checks everything and prints the plan
python -m rft_cluster.plan      estimate what a training takes on a card: GiB, seconds a step, hours
python -m rft_cluster.evaluate  measure a trained model, or the untouched one, on held-out images
python -m rft_cluster.compare   compare two evaluations of the same images
python -m rft_cluster.predict   classify images with a trained model
python -m rft_cluster.watch     watch a run in the terminal: curves, phases, actors, newest answers
python -m rft_cluster.doctor    check this machine and the cluster; with --run, prove that a run lost nothing
python -m rft_cluster.report    write the page of a run, with every completion and its image; --compare runs
python -m rft_cluster.sweep     train one model for each combination of settings; a table and a plot

Each says more with --help."""

if __name__ == "__main__":
    sys.exit(exit_code(lambda: print(COMMANDS)))
