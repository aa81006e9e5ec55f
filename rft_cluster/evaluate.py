"""Evaluate a policy: python -m rft_cluster.evaluate --checkpoint RUN_OR_MODEL [--config C] [--split test]

`--checkpoint base` evaluates the untouched model that the configuration starts from. Judges greedy answers strictly and
leniently, and a vote over several samples, with 95 % intervals, and the probabilities of the classes. A question that
lists the classes is also asked with them in several other orders. Writes evaluation.json, predictions.csv,
evaluation.png and calibration.png. The same command writes the same files again.
To compare two: python -m rft_cluster.compare A B
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.classification.apart import NOTE, apart, parted
from rft_cluster.classification.baselines import (
    ASKED,
    NAMES,
    TOWER,
    Baselines,
    compared,
    measure,
    minus_baselines,
    on_pixels,
    to_ask,
    verdict,
)
from rft_cluster.classification.calibration import probability_lines
from rft_cluster.classification.calibration_plot import draw_calibration
from rft_cluster.classification.card import check_card, find_export, read_card
from rft_cluster.classification.intervals import rate_line
from rft_cluster.classification.orders import order_lines, over_orders
from rft_cluster.classification.plots import draw_evaluation
from rft_cluster.classification.report import Judged, judge, report
from rft_cluster.classification.second_look import OPTIONS, Again, second_look_lines, second_look_report
from rft_cluster.cluster.machine import check_machine, check_ray_folder
from rft_cluster.common.errors import UserError, check_range, end_with, exit_code
from rft_cluster.common.files import check_writable, write_json, write_text
from rft_cluster.common.text import csv_line, printable
from rft_cluster.config import Config, find_config, load_config, load_run_config, run_folder_of
from rft_cluster.data.manifest import manifest
from rft_cluster.messages import Example, Group, Sampling
from rft_cluster.model.folder import read_family
from rft_cluster.prompts import asks_for_thinking, longest, make_prompts, narrowed
from rft_cluster.run.history import read_history
from rft_cluster.run.inside import read_warm_start, usual_sft_rate
from rft_cluster.run.preflight import check_paths
from rft_cluster.run.probabilities import Scored, score_groups, with_probabilities
from rft_cluster.run.resume import is_run
from rft_cluster.run.saving import BASELINES_FILE, BEST
from rft_cluster.run.second_look import options_at_second_look, with_room, written_again
from rft_cluster.run.task import Task, base_model_path, check_model, prepare

BASE = "base"
AT_ONCE = 64  # prompts in one call to a generator
ORDERS = 4  # unless --orders is given
# Sections of a run's configuration that an evaluation does not use, and unused keys that may name a user's functions.
UNUSED = (
    *("rewards", "scoring", "algorithm.total", "algorithm.advantage", "algorithm.normaliser"),
    *("run.sinks", "tracking", "baselines", "evaluation"),
)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m rft_cluster.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a model it exported, or: base")
    parser.add_argument("--config", help="a config, as for launch; left out, the run's own")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--votes", type=int, default=8, help="samples an image for the vote (8)")
    parser.add_argument(
        "--score-votes", action="store_true",
        help="of a policy that thinks, also the probabilities averaged over the votes' reasonings: a forward each",
    )  # fmt: skip
    parser.add_argument("--orders", type=int, help=f"other orders of the listed classes to ask in, greedily ({ORDERS})")
    parser.add_argument(
        "--second-look", type=int, default=OPTIONS, metavar="K",
        help=f"ask again with the policy's own K most probable answers as options; 0: do not ({OPTIONS})",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="the folder to write to (evaluation-SPLIT beside the model)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    return exit_code(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    """Check the options, generate and judge the answers, write the files, and print the figures."""
    check_range("--votes", options.votes, 1, 10_000)
    check_range("--second-look", options.second_look, 0, 1000)
    check_range("--orders", ORDERS if options.orders is None else options.orders, 0, 1000)
    export = None if options.checkpoint == BASE else find_export(Path(options.checkpoint))
    config = _config(options, export)
    output = _output(options, config, export)
    check_paths(config, str(export) if export else config.model.path)
    check_ray_folder(config.cluster)
    if note := check_machine(config, training=False):
        print(note)
    task = prepare(config, export)
    examples: list[Example] = getattr(task.dataset, options.split)
    if not examples:
        raise UserError(f"the {options.split} split is empty: set data.{options.split}")
    card = read_card(export) if export else None
    if export and card:
        check_card(card, task.dataset, task.question, config.model.pixels(read_family(export).side))
    orders = _orders(options, config, task)
    model_path = str(export) if export else base_model_path(config, task)
    check_model(config, task, model_path, examples)

    reader = AnswerReader(task.dataset.classes, task.dataset.aliases)
    looks = options_at_second_look(options.second_look, task.question, task.dataset.classes)
    greedy, sampled, reordered, again = _ask(config, task, model_path, examples, options, orders, reader, looks)
    scored = _score(config, task, model_path, greedy, sampled if options.score_votes else [], looks)
    judged = [judge(group, reader) for group in greedy]
    figures = {
        "checkpoint": options.checkpoint,
        "steps": card.steps if card else 0,
        "data": task.dataset.name,
        "split": options.split,
        "seed": config.run.seed,
        "prompt_sha256": task.question.sha256,
        "votes": options.votes,
        "temperature": config.sampling.temperature,
        **report(
            judged,
            [reader.vote([completion.text for completion in group.completions]) for group in sampled],
            task.dataset.classes,
            {example.example_id: task.dataset.pixels_of(example) for example in examples},
        ),
        **_over_orders(task.dataset.classes, judged, orders, reordered, reader),
        **apart(judged, task.dataset.unseen),
        **_second_look(again or scored.again, judged),
        "baselines": {},
    }
    calibration = card.calibration if card else None
    figures = with_probabilities(figures, scored, examples, task.dataset.classes, calibration)
    if options.split == "test":
        figures |= _compared(config, task, model_path, export, parted(judged, task.dataset.unseen)["seen"])
    _write(output, figures)
    said = [_summary(figures), _in_sample(figures, options, export), _to_ask(config, export, figures)]
    print("\n".join(filter(None, said)), flush=True)
    print(f"written: {output}/evaluation.json, predictions.csv, evaluation.png, calibration.png")


def _write(output: Path, figures: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "evaluation.json", figures)
    write_text(output / "predictions.csv", _csv(figures["predictions"]))
    title = f"{figures['data']}, {figures['split']}"
    draw_evaluation(figures, title, output / "evaluation.png")
    draw_calibration(figures["probabilities"], title, output / "calibration.png")


def _output(options: argparse.Namespace, config: Config, export: Path | None) -> Path:
    """The folder to write to."""
    whose = f"-{BASE}" if export is None else "-best" if export.name == BEST else ""
    folder = export.parent if export else config.run_folder
    output = options.output or folder / f"evaluation{whose}-{options.split}"
    if options.output is None and output.is_symlink():  # a stranger's folder may have links to anywhere
        raise UserError(f"{output} is a link to {output.readlink()}: name the folder to write to with --output")
    check_writable(output, "Set --output to a folder that can be")
    return output


def _config(options: argparse.Namespace, export: Path | None) -> Config:
    if options.config:
        file = find_config(options.config)
        run = run_folder_of(file)
    elif export and (export.parent / "config.yaml").is_file():
        file, run = export.parent / "config.yaml", export.parent
    else:
        raise UserError("--config is missing: only a model in its run's folder has its own configuration")
    if run is None:
        return load_config(options.config, options.overrides)
    config = load_run_config(run, file, options.overrides, without=("data.manifest", *UNUSED))
    if config.data.manifest is not None or not (run / "manifest.json").is_file():
        return config
    # Use the images of the run. Set on the object, because a path need not survive YAML.
    return config.model_copy(update={"data": config.data.model_copy(update={"manifest": run / "manifest.json"})})


def _orders(options: argparse.Namespace, config: Config, task: Task) -> list[list[str]]:
    """The other orders of the listed classes to ask in; none if the question does not list them."""
    if options.orders and task.question.template is None:
        raise UserError(
            f"--orders is {options.orders}, but the question does not list the classes: leave it out, or evaluate a "
            f"policy that was trained with prompt.template=closed"
        )
    return task.question.some_orders(ORDERS if options.orders is None else options.orders, config.run.seed)


def _over_orders(
    classes: Sequence[str],
    judged: Sequence[Judged],
    orders: list[list[str]],
    reordered: list[list[Group]],
    reader: AnswerReader,
) -> dict[str, Any]:
    if not orders:
        return {}
    others = [[judge(group, reader) for group in groups] for groups in reordered]
    return {"orders": over_orders(classes, judged, orders, others)}


def _ask(
    config: Config,
    task: Task,
    model_path: str,
    examples: list[Example],
    options: argparse.Namespace,
    orders: list[list[str]],
    reader: AnswerReader,
    looks: int,
) -> tuple[list[Group], list[Group], list[list[Group]], list[Again]]:
    """Greedy and sampled completions for every example, greedy ones for each of the other orders, and, if the policy
    thinks, the second answers among `looks` options."""
    from rft_cluster.cluster.start import start_generators  # imports Ray, which takes seconds

    images = {example.image.sha256: task.dataset.image(example) for example in examples}
    texts = [task.text, *map(task.question.listing, orders)]
    prompts, *others = (make_prompts(examples, text, options.split, 0, config.run.seed) for text in texts)
    greedy = Sampling(1, 0.0, config.sampling.max_tokens)
    sampling = Sampling(options.votes, config.sampling.temperature, config.sampling.max_tokens, config.sampling.top_k)
    answers: list[Group] = []
    samples: list[Group] = []
    reordered: list[list[Group]] = [[] for _ in others]
    again: list[Again] = []
    second = partial(narrowed, task.question, config.prompt.subject)
    writes_again = looks and asks_for_thinking(task.text)
    if writes_again:
        config = with_room(config, second(longest(task.dataset.classes, looks)))
    with start_generators(config, model_path, images) as generators, tqdm(total=len(prompts), unit="image") as bar:
        size, write = AT_ONCE * len(generators), partial(generators.generate, sampling=greedy, version=0)
        for first in range(0, len(prompts), size):
            chunk = prompts[first : first + size]
            answers += write(chunk)
            samples += generators.generate(chunk, sampling, version=0)
            if writes_again:
                own = answers[first:], samples[first:]
                again += written_again(*own, reader, task.dataset.classes, looks, second, write)
            for found, prompts_in_order in zip(reordered, others, strict=True):
                found += write(prompts_in_order[first : first + size])
            bar.update(len(chunk))
    return answers, samples, reordered, again


def _score(config: Config, task: Task, model_path: str, greedy: list[Group], votes: list[Group], looks: int) -> Scored:
    from rft_cluster.cluster.class_scorer import scorers  # imports Ray, which takes seconds

    return score_groups(config, task, model_path, greedy, votes, scorers, looks)


def _second_look(again: Sequence[Again], judged: Sequence[Judged]) -> dict[str, Any]:
    if not again:
        return {}
    right, labels = [one.strict for one in judged], [one.label for one in judged]
    return {"second_look": second_look_report(again, right, labels)}


def _compared(
    config: Config, task: Task, model_path: str, export: Path | None, right: Sequence[bool]
) -> dict[str, Any]:
    """The baselines on the same images, and the differences from them; of a trained policy also the verdict. `right`:
    whether each test image of a seen class is answered right.

    Vision features are those of the model that the run started from. Of an export the run's own record is taken.
    """
    if export is None:
        from rft_cluster.cluster.tower import features_of  # imports Ray, which takes seconds

        found, before = measure(task.dataset, *features_of(config, model_path, compared(task.dataset))), list[bool]()
    else:
        found, before = _recorded(task, export.parent)
    figures = {"baselines": found.rates, "greedy_minus_baselines": minus_baselines(right, found.right)}
    if found.skipped:
        figures["baselines_skipped"] = found.skipped
    if export:
        small = config.model.path == "tiny"
        images, objective = len(task.dataset.train), config.algorithm.objective
        warm = read_warm_start(export.parent)
        kept = warm is not None and warm.kept
        figures["verdict"] = verdict(right, before, found.right, images, small, objective, kept)
        if warm:
            figures["warm_start"] = warm.model_dump(mode="json")
            print(warm.described())
    return figures


def _recorded(task: Task, run: Path) -> tuple[Baselines, list[bool]]:
    """Baselines, those that need a model as a run recorded them, and what it was right on before training."""
    history, pixels = read_history(run) if is_run(run) else None, on_pixels(task.dataset)
    ours = manifest(task.dataset, 0)["splits"]
    theirs = history.manifest["splits"] if history and history.manifest else {}
    if not history or any(ours[split] != theirs.get(split) for split in ("train", "test")):
        return Baselines(pixels, f"no run is recorded in {run} with the same images"), []
    others = {name: flags for name, flags in history.right.items() if name not in pixels}
    is_seen = any(name.startswith(TOWER) for name in others)
    skipped = "" if is_seen else f"{run / BASELINES_FILE} has none: a run records them when it is done"
    return Baselines(pixels | others, skipped), history.answered_right(0)


def _in_sample(figures: dict[str, Any], options: argparse.Namespace, export: Path | None) -> str:
    """A line for figures of validation images that flatter, because the run that `export` is of has chosen something
    by these images. With another configuration the images are others."""
    if export is None or options.config or options.split != "validation":
        return ""
    chosen = {
        "this policy was chosen": export.name == BEST,
        "its temperature was fitted": bool(figures["probabilities"]["fitted_on"]),
    }
    why = " and ".join(what for what, true in chosen.items() if true)
    return why and f"{why} on these images, so figures flatter: --split test judges"


def _to_ask(config: Config, export: Path | None, figures: dict[str, Any]) -> str:
    """A line with the command that measures further baselines; empty if the run has some, or if there is no run."""
    if "verdict" not in figures or export is None or not is_run(export.parent):
        return ""
    has_some = figures["baselines"].keys() & {name for names in ASKED.values() for name in names}
    launched = ["python", "-m", "rft_cluster.launch", "--config", str(export.parent / "config.yaml")]
    return "" if has_some else to_ask(launched, usual_sft_rate(config))


def _csv(rows: list[dict[str, Any]]) -> str:
    return "".join(map(csv_line, [rows[0], *(row.values() for row in rows)]))


def _summary(figures: dict[str, Any]) -> str:
    votes, greedy = figures["votes"], figures["greedy"]
    difference = figures["vote_minus_greedy"]
    low, high = difference["interval"]
    lines = [
        f"{figures['images']} images of {figures['split']}: accuracy, and its 95 % interval",
        rate_line("greedy, strict", greedy["strict"]),
        *(rate_line(f"{name} classes", figures[name]) for name in ("seen", "unseen") if name in figures),
        *(order_lines(figures["orders"]) if "orders" in figures else []),
        rate_line(f"vote of {votes}, strict", figures["vote"]["strict"]),
        *(second_look_lines(figures["second_look"]) if "second_look" in figures else []),
        *probability_lines(figures["probabilities"]),
        rate_line("greedy, lenient", greedy["lenient"])
        + "   (the published rule, but for empty answers: it forgives much)",
        rate_line("format", greedy["format"]),
        *_baseline_lines(figures),
        f"vote - greedy     {100 * difference['difference']:+6.1f}     {100 * low:+.1f} to {100 * high:+.1f} points",
        "lowest classes:",
    ]
    known = [row for row in figures["classes"] if row["n"]]
    for row in sorted(known, key=lambda row: row["rate"])[:5]:
        taken = ", ".join(f"{printable(label)} {count}" for label, count in list(row["taken_for"].items())[:3])
        lines.append(f"  {printable(row['label'])}: {row['right']}/{row['n']}{'; taken for ' + taken if taken else ''}")
    failures = figures["format_failures"]
    if failures["count"]:
        lines.append(f"{failures['count']} answers out of format, for instance:")
        lines += [f"  {printable(failure['text'])[:160]}" for failure in failures["examples"][:3]]
    if "verdict" in figures:
        lines.append(figures["verdict"])
    if "unseen" in figures and figures["baselines"]:
        lines.append(NOTE)
    return "\n".join(lines)


def _baseline_lines(figures: dict[str, Any]) -> list[str]:
    """The baselines, with the difference of the greedy answers from each, in points, and its 95 % interval."""
    lines = []
    for name, rate in figures["baselines"].items():
        less = figures["greedy_minus_baselines"][name]
        low, high = (f"{100 * end:+.1f}" for end in less["interval"])
        points = f"greedy is {100 * less['difference']:+.1f} points ({low} to {high})"
        lines.append(f"{NAMES[name]:<39}{100 * rate:5.1f} %   {points}")
    if skipped := figures.get("baselines_skipped"):
        lines.append(f"none on vision features: {printable(skipped)}")
    return lines


if __name__ == "__main__":
    end_with(main)
