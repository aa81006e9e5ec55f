"""Plan a run before anything is rented: python -m rft_cluster.plan CONFIG [section.key=value ...] [--gpu h100]

Reads the data, the model's config.json and tokenizer, and starts nothing. Prints GiB by role and phase, seconds a step,
hours, and what to change if it does not fit.
"""

import argparse

from rft_cluster.common.errors import end_with, exit_code
from rft_cluster.common.files import size
from rft_cluster.config import Config, load_config
from rft_cluster.plan.cards import CARDS, DEFAULT, find_card, this_machine


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(prog="python -m rft_cluster.plan", description=__doc__)
    parser.add_argument("config", help="a YAML file, or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the config")
    parser.add_argument("--gpu", default=DEFAULT, help=f"the card: {', '.join(CARDS)} ({DEFAULT})")
    options = parser.parse_intermixed_args(arguments)
    return exit_code(lambda: plan(load_config(options.config, options.overrides), options.gpu))


def plan(config: Config, gpu: str) -> None:
    """Check what the plan depends on, and print it."""
    card = find_card(gpu) if config.cluster.device == "cuda" else None
    from rft_cluster.plan.report import print_plan
    from rft_cluster.run.folds import fold_configs
    from rft_cluster.run.planned import archive_is_missing, task_before_download
    from rft_cluster.run.preflight import check_paths, check_task
    from rft_cluster.run.space import disk_bytes
    from rft_cluster.run.task import prepare_run

    if config.data.folds and not config.data.fold:
        print(f"the plan of one of {config.data.folds} folds; all of them take {config.data.folds} times as long")
        config = fold_configs(config)[0]
    model = check_paths(config, config.model.path)
    missing = archive_is_missing(config)
    task = task_before_download(config) if missing else prepare_run(config)
    checked = check_task(config, task, model)
    print("\n".join([*(task.notes if missing else []), *checked.notes]), flush=True)
    print(f"disk        {size(disk_bytes(config, checked.parameters))} for checkpoints, models and journal", flush=True)
    print_plan(config, checked, card or this_machine(config.cluster.dtype))


if __name__ == "__main__":
    end_with(main)
