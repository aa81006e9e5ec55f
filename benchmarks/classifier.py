"""What the answers of a trained policy are worth: votes, probabilities, second looks, orders of the classes, unseen
classes, and the baselines that are measured where asked. The digits with the small model, five seeds each.

    python -m benchmarks.classifier                     every run that is due; stop it at any time
    python -m benchmarks.classifier --policies closed   some of them; a second command may do others meanwhile
    python -m benchmarks.classifier --write             the tables of the pages anew, from what was measured

A run is `launch` and then `evaluate`, as a user types them, in `~/.cache/rft_cluster/benchmarks/classifier`. One that
was stopped goes on there. Each finished one is kept in `results/classifier.json`. The seeds were fixed before the first
run.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import CACHE, ROOT, check_known, in_turn, machine, parsed, read_result, write_result
from benchmarks.report import at, fill, less, table
from rft_cluster.classification.baselines import ASKED, NAMES
from rft_cluster.classification.probabilities import METHODS
from rft_cluster.common.errors import UserError, exit_code
from rft_cluster.model.tiny.conditions import RECIPE_VERSION
from rft_cluster.run.lock import locked

NAME = "classifier"
FOLDER = CACHE / NAME / f"tiny-{RECIPE_VERSION}"
SEEDS = (41, 42, 43, 44, 45)
PREDICT, EVALUATE, BASELINES = (ROOT / "docs" / f"{name}.md" for name in ("predict", "evaluate", "baselines"))

Record = Mapping[str, Any]
Figure = Callable[[Record], float]


@dataclass(frozen=True)
class Policy:
    """A configuration of the digits, and what is asked of the policy that it trains.

    `votes`, `orders`, `looks`: options of `evaluate`. Of several `looks` the first comes with all other figures.
    """

    overrides: tuple[str, ...]
    looks: tuple[int, ...] = (5,)
    votes: int = 8
    orders: int | None = None  # None: the question lists no classes


CLOSED = "prompt.template=closed"
POLICIES = {
    "thinks": Policy(("baselines=[base,base_closed,sft]",)),
    "closed": Policy((CLOSED,), looks=(5, 3, 2), orders=4),
    "closed with own options": Policy((CLOSED, "prompt.options=own_top_k", "prompt.top_k=5"), votes=1, orders=0),
    "closed without eight and nine": Policy(
        (CLOSED, "data.unseen_classes=[eight,nine]"), looks=(0,), votes=1, orders=0
    ),
}


def main() -> int:
    options = parsed(__doc__, policies=list(POLICIES), seeds=list(SEEDS), write=False)
    return exit_code(lambda: work([] if options.write else options.policies, options.seeds))


def work(policies: Sequence[str], seeds: Sequence[int]) -> None:
    """Do the runs that are due, then write the pages."""
    check_known(policies, list(POLICIES))
    for name, seed in due(policies, seeds):
        keep(measured(name, seed))
    write_pages(records())


def records() -> list[dict[str, Any]]:
    """Those that were measured with the settings and the small model of today."""
    found: list[dict[str, Any]] = (read_result(NAME) or {"runs": []})["runs"]
    return [one for one in found if one["tiny"] == RECIPE_VERSION and one["asked"] == asked(one["policy"])]


def asked(name: str) -> Any:
    """All that a record depends on but the seed, as JSON has it; None of a policy that is no more."""
    policy = POLICIES.get(name)
    return policy and [list(policy.overrides), list(policy.looks), policy.votes, policy.orders]


def due(policies: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Seed by seed, so that each table grows by whole lines."""
    done = {(one["policy"], one["seed"]) for one in records()}
    return [(name, seed) for seed in seeds for name in policies if (name, seed) not in done]


def keep(record: dict[str, Any]) -> None:
    """Add a record to the results; several commands may do so, one after the other."""
    with in_turn(FOLDER):
        others = [one for one in records() if (one["policy"], one["seed"]) != (record["policy"], record["seed"])]
        runs = sorted([*others, record], key=lambda one: (list(POLICIES).index(one["policy"]), one["seed"]))
        write_result(NAME, {"machine": machine(), "runs": runs})


def measured(name: str, seed: int) -> dict[str, Any]:
    """Train a policy, or go on with it, and evaluate it. The run's folder is removed."""
    policy, run, began = POLICIES[name], FOLDER / f"{name.replace(' ', '_')}_{seed}", time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(FOLDER / f"{run.name}.lock"):
        overrides = [*policy.overrides, f"run.seed={seed}", f"run.folder={FOLDER}", f"run.name={run.name}"]
        command(run, "launch", "--config", "digits", "--resume=auto", *overrides)
        evaluate = partial(_evaluation, run, policy)
        figures, *others = [evaluate(look, first=look == policy.looks[0]) for look in policy.looks]
        here = machine()
        record = {
            "policy": name,
            "seed": seed,
            "asked": asked(name),
            "tiny": RECIPE_VERSION,
            "commit": here["commit"],
            "processor": here["processor"],
            "seconds": round(time.monotonic() - began),
            **figures,
            "looks": {str(look): one["look"] for look, one in zip(policy.looks, [figures, *others], strict=True)},
        }
        del record["look"]
        shutil.rmtree(run)
    return record


def command(run: Path, module: str, *arguments: str) -> None:
    """Run a command of ours, with what it says in the run's log."""
    print(f"{run.name}: {module}", flush=True)
    with run.with_suffix(".log").open("a") as log:
        code = subprocess.run(
            [sys.executable, "-m", f"rft_cluster.{module}", *arguments], stdout=log, stderr=log, cwd=ROOT
        ).returncode
    if code:
        raise UserError(f"{module} ended with exit code {code}: see {log.name}")


def _evaluation(run: Path, policy: Policy, look: int, first: bool) -> dict[str, Any]:
    """The figures of one `evaluate`. One that is not the first asks for no more than a second look."""
    output = run / f"evaluation-{look}"
    votes, orders = (policy.votes, policy.orders) if first else (1, 0)
    given = ["--score-votes"] if first else []
    given += [] if orders is None else ["--orders", str(orders)]
    command(
        run, "evaluate", "--checkpoint", str(run), "--votes", str(votes), "--second-look", str(look), *given,
        "--output", str(output),
    )  # fmt: skip
    return figures_of(json.loads((output / "evaluation.json").read_text()))


def figures_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables are made of, from an `evaluation.json`. Rates and errors are 0 to 1, log-losses nats."""
    probabilities = found["probabilities"]
    orders = found.get("orders")
    return {
        "n": found["images"],
        "greedy": found["greedy"]["strict"]["rate"],
        "vote": found["vote"]["strict"]["rate"],
        "parts": {name: found[name]["rate"] for name in ("seen", "unseen") if name in found},
        "orders": orders and {key: orders[key] for key in ("mean", "same", "first", "last")},
        "probabilities": {
            "temperature": probabilities["temperature"],
            "fitted": _short(probabilities),
            "unfitted": _short(probabilities["unfitted"]) if "unfitted" in probabilities else None,
            "votes": _short(probabilities["votes"]) if "votes" in probabilities else None,
            "coverage": probabilities["coverage"]["value"],
            "methods": probabilities["methods"],
        },
        "baselines": found["baselines"],
        "look": found.get("second_look"),
    }


def _short(figures: Mapping[str, Any]) -> dict[str, float]:
    """Three of the `calibration_figures`, without their intervals."""
    return {"accuracy": figures["accuracy"]["rate"]} | {
        name: figures[name]["value"] for name in ("log_loss", "calibration_error")
    }


# The pages


def write_pages(found: Sequence[Record]) -> None:
    """Write the tables into the pages, between their marks."""
    for page, texts in pages(found).items():
        fill(page, texts)


def pages(found: Sequence[Record]) -> dict[Path, dict[str, str]]:
    """The tables of each page, by their marks."""
    return {
        PREDICT: {
            "methods": methods_table(found),
            "calibration": calibration_table(found),
            "second look": looks_table(found),
        },
        EVALUATE: {"votes": votes_table(found), "orders": orders_table(found), "unseen": unseen_table(found)},
        BASELINES: {"asked": asked_table(found)},
    }


def of(found: Sequence[Record], name: str) -> list[Record]:
    return [one for one in found if one["policy"] == name]


GREEDY, VOTE, TESTED = at("greedy"), at("vote"), at("n")


def spread(runs: Sequence[Record], figure: Figure, digits: int = 1, scale: float = 100) -> str:
    """Median, and range over the seeds if there are several."""
    values = [scale * figure(one) for one in runs]
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{median(values):.{digits}f}{ends}"


def against(
    runs: Sequence[Record], figure: Figure, other: Figure, images: Callable[[Record], int] = TESTED
) -> list[str]:
    """A rate less another of the same images (`less`). `images`: how many."""
    return less([figure(one) for one in runs], [other(one) for one in runs], [images(one) for one in runs])


def made(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    return table(head, lines) if lines else "Not measured."


def votes_table(found: Sequence[Record]) -> str:
    lines = []
    for name in ("thinks", "closed"):
        if runs := of(found, name):
            figures = [spread(runs, GREEDY), spread(runs, VOTE), *against(runs, VOTE, GREEDY)]
            lines.append([name, *figures, len(runs)])
    return made(("policy", "greedy, %", "vote of 8, %", "vote less greedy, points", "p", "seeds"), lines)


def orders_table(found: Sequence[Record]) -> str:
    runs, lines = of(found, "closed"), []
    if runs:
        figures: list[Figure] = [
            GREEDY,
            at("orders", "mean"),
            at("orders", "same"),
            partial(_favoured, "first"),
            partial(_favoured, "last"),
        ]
        lines.append([*(spread(runs, figure) for figure in figures), len(runs)])
    head = ("data set's order, %", "mean of four others, %", "the same answer in all, %")
    return made(
        (*head, *(f"{place} listed: answers less images, points" for place in ("first", "last")), "seeds"), lines
    )


def _favoured(place: str, one: Record) -> float:
    return float(one["orders"][place]["answers"] - one["orders"][place]["images"])


def unseen_table(found: Sequence[Record]) -> str:
    runs, lines = of(found, "closed without eight and nine"), []
    if runs:
        lines.append([*(spread(runs, at("parts", name)) for name in ("seen", "unseen")), len(runs)])
    return made(("eight seen classes, %", "two unseen classes, %", "seeds"), lines)


def methods_table(found: Sequence[Record]) -> str:
    runs, lines = of(found, "closed"), []
    for method, words in METHODS.items() if runs else ():
        accuracy, loss = (at("probabilities", "methods", method, figure) for figure in ("accuracy", "log_loss"))
        lines.append([words, spread(runs, accuracy), spread(runs, loss, 3, 1), len(runs)])
    return made(("method", "accuracy, %", "log-loss", "seeds"), lines)


def calibration_table(found: Sequence[Record]) -> str:
    """Each policy before and after a temperature was fitted, and averaged over its votes if it thinks."""
    lines = []
    for name in ("closed", "thinks"):
        runs = of(found, name)
        for kind in ("unfitted", "fitted", "votes") if runs else ():
            if all(one["probabilities"][kind] for one in runs):
                lines.append([name, *_calibration_cells(runs, kind), len(runs)])
    head = ("policy", "temperature", "most probable is right, %", "calibration error, %", "log-loss")
    return made((*head, "answers with 95 % right, %", "seeds"), lines)


def _calibration_cells(runs: Sequence[Record], kind: str) -> list[str]:
    temperature = "1" if kind == "unfitted" else spread(runs, at("probabilities", "temperature"), 2, 1)
    right, error, loss = (at("probabilities", kind, figure) for figure in ("accuracy", "calibration_error", "log_loss"))
    coverage = spread(runs, at("probabilities", "coverage")) if kind == "fitted" else ""
    words = temperature + ", mean over 8 reasonings" * (kind == "votes")
    return [words, spread(runs, right), spread(runs, error), spread(runs, loss, 2, 1), coverage]


def looks_table(found: Sequence[Record]) -> str:
    lines = []
    for name, policy in POLICIES.items():
        runs = of(found, name)
        for look in sorted(policy.looks) if runs else ():
            if look:
                second, among = (at("looks", str(look), key, "rate") for key in ("strict", "in_options"))
                pair = against(runs, second, GREEDY)
                lines.append(
                    [name, look, spread(runs, GREEDY), spread(runs, second), *pair, spread(runs, among), len(runs)]
                )
    head = ("policy", "options", "greedy, %", "second look, %", "second look less greedy, points", "p")
    return made((*head, "right class among them, %", "seeds"), lines)


def asked_table(found: Sequence[Record]) -> str:
    runs, lines = of(found, "thinks"), []
    if runs:
        lines.append(["**the policy**", spread(runs, GREEDY), "", "", len(runs)])
    for name in (name for names in ASKED.values() for name in names):
        if runs and all(name in one["baselines"] for one in runs):
            own = at("baselines", name)
            lines.append([NAMES[name], spread(runs, own), *against(runs, GREEDY, own), len(runs)])
    return made(("", "test accuracy, %", "policy less it, points", "p", "seeds"), lines)


if __name__ == "__main__":
    sys.exit(main())
