"""Write what the plan says into docs/gpus.md, between its marks: an example, models and cards, and how far it is off.

    python -m benchmarks.plan_table

The first two are computed (`rft_cluster/plan`), nothing is measured: the recipe on Flower102, 16 prompts with 8
completions, images of 432 tokens, 16 of them of 512. `flower102_1gpu` on one GPU, `flower102` on eight. The third is
what `benchmarks.plan` measured on a CPU.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.planned import LORA, MODELS, planned_digits, planned_learn, planned_memory, shapes_of
from benchmarks.report import table
from rft_cluster.common.files import write_text
from rft_cluster.config import Config, load_config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.advice import cures
from rft_cluster.plan.cards import CARDS, Card
from rft_cluster.plan.estimate import make_plan
from rft_cluster.plan.memory import GIB
from rft_cluster.plan.report import plan_lines
from rft_cluster.plan.work import Prompts

HERE = Path(__file__).parent
PAGE, MEASURED = HERE.parent / "docs" / "gpus.md", HERE / "results" / "plan.json"
TRAINED: dict[str, list[str]] = {"all weights": [], "adapters": LORA}
GPUS = {"1": "flower102_1gpu", "8": "flower102"}
FLOWERS = Prompts.of([PromptLength(512, 90)] * 16 + [PromptLength(432, 90)] * 392)
SPLITS = {"train": FLOWERS, "validation": Prompts.of([]), "test": Prompts.of([])}
LETTERS = {"micro_batch_tokens": "R", "gradient_checkpointing": "C", "cpu_offload": "O", "gpu_memory": "G"}


def example() -> str:
    """The plan of the recipe on one card."""
    config = load_config("flower102_1gpu", [])
    lines = plan_lines(config, shapes_of("Qwen2-VL-2B"), SPLITS, CARDS["h100"])
    return "\n".join(["```", *lines, "```"])


def models_and_cards() -> str:
    """A card's row has a cell for each model, what is trained of it, and the number of GPUs."""
    cases = list(product(MODELS, TRAINED, GPUS))
    head = ["card", *(f"{model}, {trained}, {gpus} GPU{'s' * (gpus != '1')}" for model, trained, gpus in cases)]
    runs = [(shapes_of(model), load_config(GPUS[gpus], TRAINED[trained])) for model, trained, gpus in cases]
    rows = ([card.name, *(cell(shapes, config, card) for shapes, config in runs)] for card in CARDS.values())
    return table(head, rows)


def cell(shapes: Shapes, config: Config, card: Card) -> str:
    """`yes, 64 GiB`, the fullest GPU's; or the fastest change that makes it fit, by letters, and what it takes then."""
    plan_of = partial(make_plan, shapes=shapes, prompts=SPLITS, card=card)
    plan = plan_of(config)
    if plan.fits:
        return f"yes, {plan.fullest / GIB:.0f} GiB"
    found = [cure for cure in cures(config, plan_of) if not cure.learns_less]
    if not found:
        return "no"
    keys = [override.partition("=")[0].rpartition(".")[2] for override in found[0].overrides.split()]
    return f"{''.join(sorted(LETTERS[key] for key in keys))}, {found[0].gib:.0f} GiB"


def planned_and_measured() -> str:
    """What `benchmarks.plan` recorded, beside today's plan."""
    rows = ([name, f"{planned:.3g}", f"{real:.3g}", f"{planned / real:.2f}"] for name, planned, real in compared())
    return table(["What", "Planned", "Measured", "Planned / measured"], rows)


def compared() -> Iterator[tuple[str, float, float]]:
    """(what, planned, measured) of every figure."""
    found = json.loads(MEASURED.read_text())
    memory, digits = found["memory"], found["digits"]
    for kind, real in memory["gib"].items():
        planned = planned_memory(kind, memory["layers"], memory["blocks"], real["prompt_tokens"])
        yield from ((f"GiB, {kind}: {part}", held, real[part]) for part, held in planned.items())
    for side, one in found["learn"].items():
        yield f"processor seconds of an update, images of {side} x {side}", planned_learn(one), one["seconds"]
    gib, phases = planned_digits(digits)
    yield "GiB of all processes on the digits", gib, digits["gib"]
    for phase, seconds in phases.items():
        yield f"seconds on the digits: {phase}", seconds, digits["seconds"][phase]


BLOCKS: dict[str, Callable[[], str]] = {
    "an example": example,
    "models and cards": models_and_cards,
    "planned and measured": planned_and_measured,
}


def page(text: str) -> str:
    """`text` with the blocks of today between their marks."""
    for name, block in BLOCKS.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}<!-- {name} -->\n{block()}\n<!-- end of {name} -->{after}"
    return text


def main() -> None:
    write_text(PAGE, page(PAGE.read_text()))


if __name__ == "__main__":
    main()
