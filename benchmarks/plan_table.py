"""Write the table of models and cards into docs/gpus.md, between its marks. Nothing is measured.

    python -m benchmarks.plan_table

Each cell is a plan (`rft_cluster/plan`) of the recipe on Flower102: 16 prompts with 8 completions, images of 432
tokens, 16 of them of 512. `flower102_1gpu` on one GPU, `flower102` on eight.
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from rft_cluster.common.files import write_text
from rft_cluster.config import Config, load_config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.advice import cures
from rft_cluster.plan.cards import CARDS, Card
from rft_cluster.plan.estimate import make_plan
from rft_cluster.plan.memory import GIB
from rft_cluster.plan.work import Prompts

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "gpus.md"
MODELS = {"Qwen2-VL-2B": "qwen2_vl_2b.json", "Qwen2-VL-7B": "qwen2_vl_7b.json"}
LORA = ["model.lora.rank=64", "model.lora.alpha=128"]
TRAINED: dict[str, list[str]] = {"all weights": [], "adapters": LORA}
GPUS = {"1": "flower102_1gpu", "8": "flower102"}
FLOWERS = Prompts.of([PromptLength(512, 90)] * 16 + [PromptLength(432, 90)] * 392)
SPLITS = {"train": FLOWERS, "validation": Prompts.of([]), "test": Prompts.of([])}
LETTERS = {"micro_batch_tokens": "R", "gradient_checkpointing": "C", "cpu_offload": "O", "gpu_memory": "G"}
START, END = "<!-- models and cards -->", "<!-- end of models and cards -->"


def shapes_of(model: str) -> Shapes:
    file = HERE / MODELS[model]
    return Shapes.of(json.loads(file.read_text())["config"], file)


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


def rows() -> Iterator[list[str]]:
    """The table's rows, the head first: a card's, for each model, what is trained of it, and the number of GPUs."""
    cases = list(product(MODELS, TRAINED, GPUS))
    yield ["card", *(f"{model}, {trained}, {gpus} GPU{'s' * (gpus != '1')}" for model, trained, gpus in cases)]
    yield ["---"] * (1 + len(cases))
    runs = [(shapes_of(model), load_config(GPUS[gpus], TRAINED[trained])) for model, trained, gpus in cases]
    for card in CARDS.values():
        yield [card.name, *(cell(shapes, config, card) for shapes, config in runs)]


def table() -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows())


def page(text: str) -> str:
    """`text` with the table of today between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def main() -> None:
    write_text(PAGE, page(PAGE.read_text()))


if __name__ == "__main__":
    main()
