"""What training on other images costs on those that a policy could read already: GRPO against SFT (`evaluation.also`).

    python -m benchmarks.forgetting                 every seed that is due; stop it at any time
    python -m benchmarks.forgetting --seeds 41,42   some of them; a second command may do others meanwhile
    python -m benchmarks.forgetting --seeds ""      the table of docs/evaluate.md anew, from what was measured

A seed is three trainings as a user types them, in `~/.cache/rft_cluster/benchmarks/forgetting`: GRPO on digits; then,
from the model that it exported, GRPO and SFT (`baselines: [sft]`) on other digits, whose scans are inverted and turned,
for as many steps. Both are asked about the first digits before and after. No scan is in both sets. The seeds were fixed
before the first run.
"""

import io
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from benchmarks.classifier import against, command, spread
from benchmarks.common import CACHE, ROOT, in_turn, machine, parsed, read_result, write_result
from benchmarks.report import at, fill, table
from rft_cluster.common.errors import exit_code
from rft_cluster.data.digits import scans
from rft_cluster.model.tiny.conditions import RECIPE_VERSION
from rft_cluster.run.answers import read_answers
from rft_cluster.run.lock import locked

NAME, PAGE = "forgetting", ROOT / "docs" / "evaluate.md"
FOLDER = CACHE / NAME / f"tiny-{RECIPE_VERSION}"
SEEDS = (41, 42, 43, 44, 45)
STEPS = 80
TURN = 15  # degrees
# Reinforcement learning and SFT then write the same layout: SFT teaches no reasoning.
SAME = ["prompt.template=answer_only", "data.source=folder", "data.shots=4", f"schedule.steps={STEPS}"]
AGAIN = ["baselines=[sft]"]  # of the second training
ASKED = [SAME, AGAIN, TURN]  # all that a record depends on but the seed, as JSON has it
WAYS = {"GRPO": "", "SFT": "baselines/sft"}  # to the folder within the second run's

Record = Mapping[str, Any]


def main() -> int:
    options = parsed(__doc__, seeds=[str(seed) for seed in SEEDS])
    return exit_code(lambda: work([int(seed) for seed in options.seeds if seed]))


def work(seeds: Sequence[int]) -> None:
    """Measure the seeds that are due, then write the table."""
    for seed in seeds:
        if seed not in {one["seed"] for one in records()}:
            keep(measured(seed))
            for folder in folders(seed):
                shutil.rmtree(folder)
    fill(PAGE, {"forgotten": forgotten_table(records())})


def records() -> list[dict[str, Any]]:
    """Those that were measured with the settings and the small model of today."""
    found: list[dict[str, Any]] = (read_result(NAME) or {"runs": []})["runs"]
    return [one for one in found if (one["tiny"], one["asked"]) == (RECIPE_VERSION, ASKED)]


def keep(record: dict[str, Any]) -> None:
    """Add a record to the results; several commands may do so, one after the other."""
    with in_turn(FOLDER):
        runs = sorted([*records(), record], key=lambda one: int(one["seed"]))
        write_result(NAME, {"machine": machine(), "runs": runs})


def measured(seed: int) -> dict[str, Any]:
    """Both trainings of a seed, begun or gone on with."""
    (first, second, known, other), began = folders(seed), time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with locked(FOLDER / f"{seed}.lock"):
        write_digits(known, other)
        _launch(first, seed, f"data.path={known}")
        tested = f"manifest={first / 'manifest.json'}"  # the test images of the first training
        also = [f"evaluation.also.{key}" for key in ("source=folder", f"path={known}", "subject=digit", tested)]
        _launch(second, seed, f"model.path={first / 'model'}", f"data.path={other}", *AGAIN, *also)
        here = machine()
        record = {
            "seed": seed,
            "asked": ASKED,
            "tiny": RECIPE_VERSION,
            **{name: here[name] for name in ("commit", "processor", "dtype")},
            "seconds": round(time.monotonic() - began),
            "ways": {name: rates(second, second / folder) for name, folder in WAYS.items()},
        }
    return record


def folders(seed: int) -> tuple[Path, Path, Path, Path]:
    """Of the first training and of the second, of the images of either."""
    first, second, known, other = (FOLDER / f"{name}_{seed}" for name in ("first", "second", "known", "other"))
    return first, second, known, other


def write_digits(known: Path, other: Path) -> None:
    """Write every second scan into `known` as it is, and the rest into `other`, inverted and turned."""
    for place, scan in enumerate(scans()):
        picture = Image.open(io.BytesIO(scan.image))
        if changed := place % 2:
            picture = ImageOps.invert(picture.rotate(TURN, Image.Resampling.BICUBIC))
        file = (other if changed else known) / scan.label / f"{place:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)


def _launch(run: Path, seed: int, *overrides: str) -> None:
    place = [f"run.seed={seed}", f"run.folder={run.parent}", f"run.name={run.name}", "schedule.evaluate_every=0"]
    command(run, "launch", "--config", "digits", "--resume=auto", *SAME, *overrides, *place)


def rates(start: Path, run: Path) -> dict[str, Any]:
    """Accuracies, 0 to 1, and numbers of images: on the images that are trained (`new`), on the first ones (`known`).

    `start`: the run whose record of step 0 is that of the policy before both.
    """
    found = {}
    for name, split in (("new", "test"), ("known", "also")):
        before, after = (
            [one.strict for one in read_answers(folder, step, split)] for folder, step in ((start, 0), (run, STEPS))
        )
        found[name] = {"n": len(after), "before": sum(before) / len(before), "after": sum(after) / len(after)}
    return found


def forgotten_table(found: Sequence[Record]) -> str:
    lines = []
    for way in WAYS if found else ():
        cells: list[Any] = [way]
        for images in ("new", "known"):
            before, after, n = (at("ways", way, images, key) for key in ("before", "after", "n"))
            cells += [spread(found, before), spread(found, after), *against(found, after, before, n)]
        lines.append([*cells, len(found)])
    head = [f"{images}: {cell}" for images in ("new images", "known ones") for cell in ("before, %", "after, %")]
    heads = ("trained by", *head[:2], "difference, points", "p", *head[2:], "difference, points", "p", "seeds")
    return table(heads, lines) if lines else "Not measured."


if __name__ == "__main__":
    sys.exit(main())
