"""Compare a trained policy with simpler ways to the same labels, on a run's own images, when its actors have ended."""

from collections.abc import Callable, Mapping

from rft_cluster.classification.also import change
from rft_cluster.classification.apart import apart_lines, parted
from rft_cluster.classification.baselines import (
    ASKED,
    BASE,
    BASE_CLOSED,
    ENCODER,
    SFT,
    Baselines,
    Flags,
    compared,
    measure,
    named,
    on_features,
    recorded_flags,
    to_ask,
    verdict,
)
from rft_cluster.cluster.tower import features_of
from rft_cluster.common.errors import ClusterError, UserError
from rft_cluster.common.files import write_json
from rft_cluster.config import Config
from rft_cluster.model.image_encoder import ImageEncoder
from rft_cluster.run.answers import ALSO, read_answers
from rft_cluster.run.inside import keeps_warm_start, made_with, sft_baseline, untouched, usual_sft_rate, warm_start_run
from rft_cluster.run.resume import is_run, read_saved_config
from rft_cluster.run.saving import BASELINES_FILE, measured_otherwise, read_baselines, recorded_settings
from rft_cluster.run.task import Task, base_model_path, with_classes_listed
from rft_cluster.training import greedy_answers, train_inside


def compare(config: Config, task: Task, model_path: str, command: list[str]) -> None:
    """Print and record the accuracies of the baselines, and a verdict.

    `model_path`: the model that the run started from. `command`: that launched the run.
    """
    images = len(task.dataset.train)
    found = with_asked(
        config, task, model_path, measure(task.dataset, *features_of(config, model_path, compared(task.dataset)))
    )
    write_json(config.run_folder / BASELINES_FILE, found.record())
    for name, rate in found.rates.items():
        tested = f"test accuracy{' on the seen classes' if task.dataset.unseen else ''} {100 * rate:.1f} %"
        print(f"for comparison, {named(name, images)}: {tested}")
    if found.skipped:
        print(f"no baselines on vision features: {found.skipped}")
    for name, reason in found.missing.items():
        print(f"no baseline {name}: {reason}")
    if not config.baselines:
        print(to_ask(command, usual_sft_rate(config)))
    before, after = (_right(config, task, step) for step in (0, config.schedule.steps))
    if after:  # earlier versions recorded no answers
        small, objective = config.model.path == "tiny", config.algorithm.objective
        warm = keeps_warm_start(config.run_folder)
        print(verdict(after, before, found.right, images, small, objective, warm), flush=True)
        for line in _apart(config, task):
            print(line, flush=True)


def with_asked(config: Config, task: Task, model_path: str, found: Baselines) -> Baselines:
    """The baselines with those that the configuration asks for, and those that were asked for earlier.

    One that cannot be measured does not end a run that is done: the reason is said, and it is tried again when the run
    is resumed.
    """
    ways: Mapping[str, Callable[[], Mapping[str, Flags]]] = {
        BASE: lambda: {BASE: _base(config, task)},
        BASE_CLOSED: lambda: {BASE_CLOSED: _base_closed(config, task)},
        SFT: lambda: {SFT: _sft(config, task, model_path)},
        ENCODER: lambda: _encoder(config, task),
    }
    record, settings = read_baselines(config.run_folder), made_with(config)
    known, changed = recorded_flags(record, len(task.dataset.seen_test)), measured_otherwise(config, record)
    kept = {one: known[one] for name, own in ASKED.items() if name not in changed for one in own if one in known}
    asked: dict[str, Flags] = {}
    missing: dict[str, str] = {}
    for name in dict.fromkeys(config.baselines):
        if name != BASE and kept.keys() >= {*ASKED[name]}:
            continue
        try:
            asked |= ways[name]()
        except (UserError, ClusterError) as error:
            missing[name] = str(error).splitlines()[0]
    right = {**found.right, **kept, **asked}
    settings = recorded_settings(record) | settings
    made = {name: how for name, how in settings.items() if right.keys() >= {*ASKED[name]}}
    return Baselines(right, found.skipped, missing, made)


def _right(config: Config, task: Task, step: int) -> Flags:
    """Whether the answer to each of `FewShotDataset.seen_test` after `step` steps is right; empty without a record."""
    return tuple(parted(read_answers(config.run_folder, step, "test"), task.dataset.unseen)["seen"])


def _apart(config: Config, task: Task) -> list[str]:
    """The accuracies of a run on seen and unseen classes, for people; empty if there are no unseen ones."""
    before, after = (read_answers(config.run_folder, step, "test") for step in (0, config.schedule.steps))
    return apart_lines(before, after, task.dataset.unseen)


def elsewhere(config: Config) -> str:
    """What training did to the answers about `evaluation.also`."""
    run = config.run_folder
    return change(read_answers(untouched(run), 0, ALSO), read_answers(run, config.schedule.steps, ALSO))


def _base(config: Config, task: Task) -> Flags:
    """The evaluation before the first step, or before the first of a warm start."""
    if keeps_warm_start(config.run_folder):
        config = warm_start_run(config)
    if not (right := _right(config, task, 0)):
        raise UserError("the run has no record of the answers before training")
    return right


def _sft(config: Config, task: Task, model_path: str) -> Flags:
    own = sft_baseline(config)
    if is_run(own.run_folder):
        rate = read_saved_config(own.run_folder / "config.yaml").optimizer.learning_rate
        if rate != own.optimizer.learning_rate:
            raise UserError(
                f"{own.run_folder} was trained with a learning rate of {rate:g}: remove that folder to train with "
                f"{own.optimizer.learning_rate:g}"
            )
    print(f"for comparison, SFT on the same images, {own.schedule.steps} steps, in {own.run_folder}", flush=True)
    train_inside(own, task, model_path)
    for line in [*_apart(own, task)[:-1], *([elsewhere(own)] if task.also else [])]:
        print(f"SFT, {line}")
    return _right(own, task, own.schedule.steps)


def _base_closed(config: Config, task: Task) -> Flags:
    """The untouched model's greedy answers to the question that lists the classes, in the data set's order."""
    closed, own = with_classes_listed(config, task)
    if own.question == task.question:
        return _base(config, task)
    print("for comparison, the untouched model is given the classes", flush=True)
    judged = greedy_answers(closed, own, base_model_path(closed, own), task.dataset.seen_test, "test")
    return tuple(one.strict for one in judged)


def _encoder(config: Config, task: Task) -> dict[str, Flags]:
    features, reason = features_of(config, str(config.evaluation.encoder), compared(task.dataset), ImageEncoder)
    if features is None:
        raise UserError(reason)
    return on_features(task.dataset, features, ENCODER)
