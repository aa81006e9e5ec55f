"""Train a classifier: python -m rft_cluster.launch --config digits [section.key=value ...] [--dry-run] [--resume]"""

import argparse
import shlex
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Literal

from rft_cluster.common import stopping
from rft_cluster.common.errors import UserError, end_with, exit_code
from rft_cluster.config import Config, load_config

if TYPE_CHECKING:
    from rft_cluster.run.log import Log
    from rft_cluster.run.resume import Start
    from rft_cluster.run.task import Task

AUTO = "--resume=auto"
Resume = Literal["no", "yes", "auto"]
"""Whether a run is begun (no), goes on (yes), or whichever its folder asks for (auto)."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 a mistake of the user's, 3 a loss in the cluster. Defects keep their traceback."""
    parser = argparse.ArgumentParser(prog="python -m rft_cluster.launch", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the config")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"go on from the run's last checkpoint; {AUTO}: or begin the run if there is none yet, as for a scheduler "
        f"that starts one command again and again",
    )
    words = sys.argv[1:] if arguments is None else arguments
    # argparse would take the override after an optional value of --resume for that value.
    options = parser.parse_intermixed_args([word for word in words if word != AUTO])
    resume: Resume = "auto" if AUTO in words else "yes" if options.resume else "no"
    command = ["python", "-m", "rft_cluster.launch", *words]
    return exit_code(lambda: launch(load_config(options.config, options.overrides), options.dry_run, resume, command))


def launch(config: Config, dry_run: bool, resume: Resume, command: list[str]) -> None:
    """Run all checks, then train. Until the checks have passed, nothing stays on disk.

    `command` is the command line, for the log and for the message about resuming.
    """
    if config.data.folds and not config.data.fold:
        return launch_folds(config, dry_run, resume, command)
    from rft_cluster.run.lock import locked
    from rft_cluster.run.log import logged
    from rft_cluster.run.preflight import check_deadlines, check_run_folder, check_unread
    from rft_cluster.run.resume import check_begun, check_kinds, find_start, raise_with_cure
    from rft_cluster.run.saving import is_complete

    stopping.grant(config.cluster.grace_seconds)
    check_deadlines(config)
    check_run_folder(config)
    check_kinds(config.run_folder)
    check_unread(config)
    if resume == "yes":
        check_begun(config)
    if dry_run:
        return _dry_run(config, resume != "no")
    with locked(config.run_folder), logged(shlex.join(command)) as log:
        try:
            start = find_start(config, resume != "no")
            if is_complete(config):
                print(
                    f"{config.run_folder} is complete: all {start.step} steps are done\n{_models(config)}", flush=True
                )
                return
            task = _check(config, start)
            _run(config, task, start, log, command)
        except BaseException as error:
            raise_with_cure(error, config.run_folder, command)
            raise


def _dry_run(config: Config, resume: bool) -> None:
    """Run all checks of a launch. An existing run of the same name is only noted, not refused."""
    from rft_cluster.run.lock import holder
    from rft_cluster.run.resume import Start, find_start, is_run

    notes = [holder(config.run_folder)]
    start = Start()
    try:
        start = find_start(config, resume=True)
        if not resume and is_run(config.run_folder):
            notes.append(f"{config.run_folder} holds a run: add --resume to resume it, or choose another run.name")
    except UserError as error:
        if resume:
            raise
        notes.append(str(error))
    _check(config, start if resume else Start(), planned=True)
    for note in filter(None, notes):
        print(f"note: {note}")
    print(_where(config, dry_run=True))


def _check(config: Config, start: "Start", planned: bool = False) -> "Task":
    """Read the data, check everything against the task, and print the result; with `planned` also GiB and hours."""
    from rft_cluster.algorithm import load_algorithm
    from rft_cluster.classification.redteam import check_rewards
    from rft_cluster.cluster.machine import check_machine, check_ray_folder, shared_memory_note
    from rft_cluster.cluster.placement import describe
    from rft_cluster.plan.check import check_memory, object_store_note
    from rft_cluster.rewards.scorer import WeightedRewards
    from rft_cluster.run.metrics import own_sinks
    from rft_cluster.run.options import check_options
    from rft_cluster.run.planned import archive_is_missing, task_before_download
    from rft_cluster.run.preflight import (
        check_baselines,
        check_disk,
        check_paths,
        check_task,
        check_warm_start,
    )
    from rft_cluster.run.resume import read_task
    from rft_cluster.tracking.start import check_tracking

    with closing(WeightedRewards(config.rewards, config.scoring, quiet=True)) as rewards:
        model = check_paths(config, config.model.path)
        check_ray_folder(config.cluster)
        load_algorithm(config)
        own_sinks(config)
        check_tracking(config)
        rewards.load()
        downloaded = not (planned and archive_is_missing(config))
        task = read_task(start, config) if downloaded else task_before_download(start.own_images(config))
        check_options(config, task, start.step if start.manifest and downloaded else None)
        dataset = task.dataset
        print(dataset.described(), flush=True)
        if task.also:
            print(f"also tested before and after: {task.also.dataset.described()}", flush=True)
        red_team = ""
        if config.algorithm.samples:
            red_team = check_rewards(
                rewards, config.scoring, dataset.classes, task.examples, dataset.images, task.question, config.run.seed
            )
    plan = describe(config, len(dataset.train))
    for line in filter(None, [*task.notes, *start.notes, plan, red_team]):
        print(line, flush=True)
    for note in filter(None, [check_machine(config), shared_memory_note(config.cluster)]):
        print(note, flush=True)
    print("trying the longest prompt and the longest answer with the model's own tokenizer", flush=True)
    checked = check_task(config, task, model)
    check_warm_start(config, task)
    check_baselines(config, task, model)
    print("\n".join([*checked.notes, check_disk(config, checked.parameters)]), flush=True)
    if planned:
        from rft_cluster.plan.cards import card_here
        from rft_cluster.plan.report import print_plan

        print_plan(config, checked, card_here(config))
    check_memory(config, checked.shapes)
    if note := object_store_note(config, checked.shapes):
        print(note, flush=True)
    return task


def _run(config: Config, task: "Task", start: "Start", log: "Log", command: list[str]) -> None:
    """Start the actors, load the checkpoint into the learners if the run resumes, train, and print the result."""
    from rft_cluster.cluster.class_scorer import scorers
    from rft_cluster.comparison import compare, elsewhere
    from rft_cluster.run.metrics import clock
    from rft_cluster.run.probabilities import calibrate
    from rft_cluster.run.reporting import Reports
    from rft_cluster.run.saving import is_calibrated, is_trained
    from rft_cluster.run.task import base_model_path, tiny_model_of
    from rft_cluster.run.thumbnails import keep_thumbnails
    from rft_cluster.tracking.start import tracked
    from rft_cluster.training import train_through_losses
    from rft_cluster.warm_start import warm_started

    began = time.monotonic()
    if config.cluster.joins:  # before the small model is built, which takes minutes
        print(_where(config, dry_run=False), flush=True)
    model_path = base_model_path(config, task, start.checkpoint.state.tiny_model if start.checkpoint else None)
    log.write_to(config.run_folder / "log.txt")
    print(f"starting the actors (model ready after {clock(time.monotonic() - began)})", flush=True)
    keep_thumbnails(config.run_folder, task.dataset)
    with Reports(config.run_folder) as reports, tracked(config, task.dataset) as trackers:
        trained = is_trained(config)  # then it goes on for baselines or for the calibration alone
        if not trained:
            tiny_model = tiny_model_of(config, model_path)
            start_from = warm_started(config, task, model_path, tiny_model)
            train_through_losses(config, task, start, start_from, tiny_model, [reports, *trackers])
        if not (trained and is_calibrated(config)):
            for line in calibrate(config, task, scorers):
                print(line, flush=True)
        if task.dataset.test:
            compare(config, task, model_path, command)
        if task.also:
            print(elsewhere(config), flush=True)
        reports.finish()
    print(f"done in {clock(time.monotonic() - began)}; {_models(config)}", flush=True)


def _models(config: Config) -> str:
    from rft_cluster.run.saving import describe_models

    return (
        f"the trained model, and how to ask it:\n{describe_models(config.run_folder)}\n"
        f"  python -m rft_cluster.predict --checkpoint {config.run_folder} IMAGE_OR_FOLDER"
    )


def launch_folds(config: Config, dry_run: bool, resume: Resume, command: list[str]) -> None:
    """Launch one run a fold, one after the other, and pool their results. A dry run checks all folds."""
    from rft_cluster.run.folds import fold_configs, write_folds
    from rft_cluster.run.resume import check_begun

    folds = fold_configs(config)
    if resume == "yes":
        check_begun(folds[0])
    for number, fold in enumerate(folds, 1):
        print(f"--- fold {number} of {config.data.folds}", flush=True)
        # A run that goes on may have been stopped before it began a later fold.
        launch(fold, dry_run, "no" if resume == "no" else "auto", command)
    if not dry_run:
        print(write_folds(config), flush=True)


def _where(config: Config, dry_run: bool) -> str:
    """A line about where the run would be placed. A running cluster is asked whether it has room.

    A run waits up to a minute for resources that others hold; a dry run does not.
    """
    if not config.cluster.joins:
        return "no cluster address is set: the run would start Ray on this machine, which can hold it"
    from rft_cluster.cluster.reservation import RESERVE_TIMEOUT
    from rft_cluster.cluster.start import check_cluster

    return check_cluster(config, patience=0 if dry_run else RESERVE_TIMEOUT)


if __name__ == "__main__":
    end_with(main)
