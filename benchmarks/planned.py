"""The cases in which the plan is compared with real processes, and the plan's figures for them. Imports no torch.

`plan.py` measures the cases, `plan_table.py` shows both.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rft_cluster.config import Config, load_config
from rft_cluster.model.image_size import PromptLength
from rft_cluster.model.shapes import Shapes
from rft_cluster.plan.cards import Card
from rft_cluster.plan.estimate import make_plan
from rft_cluster.plan.memory import GIB, activations, compute_size, learner_parts, state, total
from rft_cluster.plan.seconds import learning, step_seconds
from rft_cluster.plan.work import Prompts, Row, fullest_row, learner_share

HERE = Path(__file__).parent
MODELS = {"Qwen2-VL-2B": "qwen2_vl_2b.json", "Qwen2-VL-7B": "qwen2_vl_7b.json"}

# A learner at the 2B's widths: two micro-batches of two groups, an image of 512 tokens each.
GROUPS, GROUP_SIZE, LENGTH, LIMIT, IMAGE = 4, 8, 53, 2100, 512
LORA = ["model.lora.rank=64", "model.lora.alpha=128"]
KINDS = {
    "all weights": [],
    "gradient checkpointing": ["learners.gradient_checkpointing=true"],
    "adapters of rank 64": LORA,
}
LOADED, UPDATED = "weights and reference", "and moments, after an update"
KEPT, PEAK = "kept by a forward", "peak of an update"


def shapes_of(model: str) -> Shapes:
    """The sizes of a model by its published configuration."""
    file = HERE / MODELS[model]
    return Shapes.of(json.loads(file.read_text())["config"], file)


def learner_config(kind: str, *overrides: str) -> Config:
    return load_config("digits", [
        f"schedule.prompts_per_step={GROUPS}", "learners.count=1", "learners.prompt_cache_gib=0",
        f"learners.micro_batch_tokens={LIMIT}", "cluster.dtype=bfloat16", *KINDS[kind], *overrides,
    ])  # fmt: skip


def learner_row(prompt_tokens: int) -> Row:
    """One of the two micro-batches."""
    return fullest_row([PromptLength(IMAGE, prompt_tokens - IMAGE)] * GROUPS, GROUP_SIZE, LENGTH, LIMIT)


def planned_memory(kind: str, layers: int, blocks: int, prompt_tokens: int) -> dict[str, float]:
    """GiB of a learner with so many text layers and vision blocks, by part."""
    shapes = replace(shapes_of("Qwen2-VL-2B"), layers=layers, vision_layers=blocks)
    config, row = learner_config(kind), learner_row(prompt_tokens)
    parts, own = learner_parts(shapes, config, row, GROUPS // 2), state(shapes, config)
    kept, root = activations(shapes, config, row), compute_size(config) * shapes.root
    planned = {
        LOADED: own.weights + own.reference,
        UPDATED: total(parts, "generate"),
        KEPT: kept.text + kept.vision + root,  # the root stays gathered until the backward
        PEAK: total(parts, "learn"),
    }
    return {part: held / GIB for part, held in planned.items()}


def speed_config(*overrides: str) -> Config:
    return load_config(str(HERE / "speed.yaml"), ["data.path=photos", "cluster.dtype=bfloat16", *overrides])


def planned_learn(case: dict[str, Any]) -> float:
    """Processor seconds of an update on one thread. `case`: the model, the card of one thread, and a prompt."""
    config = speed_config("model.path=model")
    prompt = PromptLength(**case["prompt"])
    own = learner_share(config, prompt, config.sampling.max_tokens)
    return learning(Shapes(**case["shapes"]), config, Card(**case["card"]), own).seconds


def planned_digits(case: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The digits: GiB of all processes, and seconds of a step by phase."""
    config = load_config("digits", [f"cluster.dtype={case['dtype']}"])
    shapes, card, prompt = Shapes(**case["shapes"]), Card(**case["card"]), PromptLength(**case["prompt"])
    prompts = {"train": Prompts.of([prompt] * 40), "validation": Prompts.of([]), "test": Prompts.of([])}
    found = step_seconds(shapes, config, card, prompt, case["completion_tokens"])
    phases = {"generate": found.generate, "learn": found.learn, "transfer": found.transfer}
    return make_plan(config, shapes, prompts, card).fullest / GIB, {**phases, "a step": found.step}


def case(shapes: Shapes, card: Card, prompt: PromptLength) -> dict[str, Any]:
    """What a plan of seconds depends on, for the record."""
    return {"shapes": asdict(shapes), "card": asdict(card), "prompt": asdict(prompt)}
