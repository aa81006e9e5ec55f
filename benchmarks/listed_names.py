"""What listing the classes in the question costs: ten names, and 200, on a CPU, in the type that it computes in.

    python -m benchmarks.listed_names [--repeats 5]

A group of 8 completions of 14 tokens about a photograph of 448 x 448 pixels, through the model of `models.py`, as in
`learner_forward`: each completion with its own copy of image and list, against the learner's packed row, which has both
once. Processor seconds of forward and backward on one thread, in turns. Then P(class): seconds for one image, with a
spelling of each name in small and in capital letters. Writes `results/listed_names.json` and its table in
docs/performance.md.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.common import CACHE, Usage, machine, parsed, read_result, spread, write_result
from benchmarks.learner_forward import SIDE, Sides, child, timed
from benchmarks.models import bench_images, bench_model
from benchmarks.report import PAGE, fill, shown, table
from rft_cluster.common.hardware import native_dtype
from rft_cluster.config import ModelSection
from rft_cluster.data.archive import flower_classes
from rft_cluster.model.class_logprobs import ClassScorer
from rft_cluster.prompts import render_template

COUNTS = (10, 200)
GROUP_SIZE, ANSWER_TOKENS = 8, 14
WAYS = ("plain", "packed")


def names_listed(count: int) -> list[str]:
    """So many names of flowers; there are 102, and the rest are their dwarfs."""
    flowers = flower_classes()
    return [*flowers, *(f"dwarf {flower}" for flower in flowers)][:count]


def question(count: int) -> str:
    return render_template("closed", "flower", names_listed(count))


def group(count: int, repeats: int) -> dict[str, Any]:
    """The seconds of each way in each round, and tokens of its rows."""
    sides = Sides(getattr(torch, native_dtype("cpu")), question(count), ANSWER_TOKENS)
    sides.read(1, GROUP_SIZE, SIDE)
    usage, rounds = Usage(), []
    for _ in range(repeats + 1):
        found = {}
        for way in WAYS:
            sides.model.zero_grad(set_to_none=True)
            found[way] = timed(usage, partial(sides.step, way))["cpu"]
        rounds.append(found)
    ((samples,), row) = sides.groups, sides.parts["packed"][0].input_ids.shape[1]
    rounds = rounds[1:]  # the first warms up
    return {
        "prompt_tokens": len(samples[0].prompt_token_ids),
        "tokens": {"plain": sum(len(one.prompt_token_ids) + len(one.token_ids) for one in samples), "packed": row},
        "seconds": {way: spread([one[way] for one in rounds]) for way in WAYS},
        "times_as_fast": spread([one["plain"] / one["packed"] for one in rounds]),
    }


def scored(count: int, repeats: int) -> dict[str, Any]:
    """Seconds of P(class) for one image, by the clock; the image is encoded the first time, which warms up."""
    path, names = str(bench_model(CACHE)), names_listed(count)
    scorer = ClassScorer(ModelSection(path=path, min_pixels=SIDE**2, max_pixels=SIDE**2), "cpu")
    scorer.load(path)
    image = sorted(bench_images(CACHE, SIDE).rglob("*.png"))[0].read_bytes()
    answers = [f"{form}</answer>" for name in names for form in (name, name.capitalize())]
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        scorer.logprobs(image, question(count), "<answer>", answers)
        times.append(time.perf_counter() - began)
    return {"answers": len(answers), "seconds": spread(times[1:])}


def listed_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        own, tokens = row["group"], row["group"]["tokens"]
        seconds = [shown(own["seconds"][way]) for way in WAYS]
        cells = [row["names"], own["prompt_tokens"], tokens["plain"], tokens["packed"], *seconds]
        lines.append([*cells, shown(own["times_as_fast"]), row["score"]["answers"], shown(row["score"]["seconds"])])
    head = ("Names", "Tokens of a prompt", "of a group, plain", "packed", "Processor seconds, plain", "packed")
    return table((*head, "Times as fast", "Answers scored", "Seconds"), lines)


def main() -> None:
    repeats = parsed(__doc__, repeats=5).repeats
    rows = [
        {"names": count, "group": child(group, count, repeats), "score": child(scored, count, repeats)}
        for count in COUNTS
    ]
    write_result("listed_names", {"machine": machine(), "rows": rows})
    written = listed_table(read_result("listed_names")["rows"])
    fill(PAGE, {"listed": written})
    print(written)


if __name__ == "__main__":
    main()
