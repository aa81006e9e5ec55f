"""Train a classifier: python -m rft_cluster.launch --config digits [section.key=value ...] [--dry-run] [--resume]"""

import argparse
import sys
import time

from rft_cluster.common.errors import exit_code
from rft_cluster.config import Config, load_config


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(prog="python -m rft_cluster.launch", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the config")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    options = parser.parse_intermixed_args(arguments)
    return exit_code(lambda: launch(load_config(options.config, options.overrides), options.dry_run, options.resume))


def launch(config: Config, dry_run: bool, resume: bool) -> None:
    """Check all that can be checked, then train. Nothing is written before the checks are over."""
    if config.data.folds and not config.data.fold:
        return launch_folds(config, dry_run, resume)
    from rft_cluster.classification.baselines import nearest_neighbour_and_regression, verdict
    from rft_cluster.classification.redteam import check_rewards
    from rft_cluster.cluster.machine import check_machine, check_memory
    from rft_cluster.cluster.placement import describe
    from rft_cluster.common.files import write_json
    from rft_cluster.rewards import load_rewards
    from rft_cluster.run.folder import read_evaluations
    from rft_cluster.run.metrics import clock
    from rft_cluster.run.preflight import check_paths, check_task
    from rft_cluster.run.resume import first_step_of
    from rft_cluster.run.task import base_model_path, prepare

    load_rewards(config.rewards)
    model = check_paths(config)
    note = check_machine(config)
    task = prepare(config)
    dataset = task.dataset
    first_step, _ = first_step_of(config, task, resume or dry_run)
    print(
        f"{dataset.name}: {len(dataset.classes)} classes, {len(dataset.train)} images to learn from, "
        f"{len(dataset.validation)} for validation, {len(dataset.test)} for the test",
        flush=True,
    )
    if not dry_run and first_step >= config.schedule.steps and (config.run_folder / "model").exists():
        print(f"{config.run_folder} is complete: all {first_step} steps are done, and model/ is there")
        return
    red_team = check_rewards(config.rewards, config.scoring, dataset.classes, task.examples, task.text, config.run.seed)
    for line in filter(None, [*dataset.notes(), describe(config, len(dataset.train)), red_team, note]):
        print(line, flush=True)
    print("trying the longest prompt and the longest answer with the model's own tokenizer", flush=True)
    checked = check_task(config, task, model)
    check_memory(config, checked.parameters)
    print("\n".join(checked.notes), flush=True)
    if dry_run:
        print(_where(config))
        return

    start = time.monotonic()
    model_path = base_model_path(config, task)

    from rft_cluster.train import train

    print(f"starting the actors (model ready after {clock(time.monotonic() - start)})", flush=True)
    train(config, task, model_path, resume)
    if dataset.test:
        baselines = nearest_neighbour_and_regression(dataset)
        write_json(config.run_folder / "baselines.json", baselines)
        for name, accuracy in baselines.items():
            print(
                f"for comparison, {name} on the same {len(dataset.train)} images: test accuracy {100 * accuracy:.1f} %"
            )
        final = read_evaluations(config.run_folder, "test")[-1]
        small = config.model.path == "tiny"
        print(verdict(final["accuracy_strict"], final["interval"], baselines, len(dataset.train), small))
    print(
        f"done in {clock(time.monotonic() - start)}: {config.run_folder}/model holds the trained model; ask it with\n"
        f"  python -m rft_cluster.predict --checkpoint {config.run_folder} IMAGE_OR_FOLDER",
        flush=True,
    )


def launch_folds(config: Config, dry_run: bool, resume: bool) -> None:
    """A run for each fold, one after the other, then the figure of all together. A dry run checks them all."""
    from rft_cluster.run.folds import fold_configs, write_folds

    for number, fold in enumerate(fold_configs(config), 1):
        print(f"--- fold {number} of {config.data.folds}", flush=True)
        launch(fold, dry_run, resume)
    if not dry_run:
        print(write_folds(config), flush=True)


def _where(config: Config) -> str:
    """Where the run would go. A running cluster that it would join is asked whether it can hold it."""
    if not config.cluster.joins:
        return "no cluster address is set: the run would start Ray on this machine, which can hold it"
    from rft_cluster.cluster.start import check_cluster

    return check_cluster(config)


if __name__ == "__main__":
    sys.exit(main())
