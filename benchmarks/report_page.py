"""How fast the report of a large run opens and filters, in headless Chromium, and how large the file is.

    python -m benchmarks.report_page

Makes the folder of a run with 50,000 completions and 2,900 images, writes its report with the command, and opens the
file. A filter's time is from its call until the page is laid out with what was found. Goals: open in 2 s, filter in 0.1
s, 30 MB.
"""

import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.chromium import Chromium, find_chromium
from benchmarks.common import machine, parsed, spread, write_result
from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.common.files import write_json, write_text
from rft_cluster.config import load_config
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.data.manifest import manifest
from rft_cluster.run.answers import write_answers
from rft_cluster.run.folder import write_record
from rft_cluster.run.records import append, json_lines
from rft_cluster.run.thumbnails import archive, thumbnails, wanted

GOALS = {"open_seconds": 2.0, "filter_milliseconds": 100.0, "megabytes": 30.0}
CLASSES, SHOTS, TEST = 102, 4, 2463  # those of Flower102
GROUP, PROMPTS = 8, 50  # completions of a prompt, prompts of a step
LETTERS = random.Random(1)
# As many as a policy that describes flowers uses; fewer would compress better than real completions do.
WORDS = ["".join(LETTERS.choices("aeiourstnlmdpc", k=LETTERS.randint(2, 9))) for _ in range(2000)] + ["dark", "petals"]
FILTERS = {
    "class": "form.label.value = '7'",
    "answered": "form.answer.value = '3'",
    "reward": "form.reward.value = 'best'",
    "steps": "form.from.value = '40'; form.to.value = '60'",
    "text": "form.text.value = 'petals'",
    "text without a match": "form.text.value = 'no such words'",
    "all at once": "form.label.value = '7'; form.reward.value = 'less'; form.group.value = 'live'; "
    "form.text.value = 'dark'",
    "none": "",
}  # fmt: skip


def main() -> None:
    options = parsed(__doc__, completions=50_000, repeats=5)
    if not find_chromium():
        print("no Chromium on this machine: not measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "large"
        make_run(run, options.completions)
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", "rft_cluster.report", "--quick", str(run)], check=True)
        written = time.monotonic() - begun
        page = run / "report.html"
        opened = [open_seconds(page) for _ in range(options.repeats)]
        filtered = filter_milliseconds(page, options.repeats)
        result = {
            "machine": machine(),
            "goals": GOALS,
            "completions": options.completions,
            "images": CLASSES * SHOTS + TEST,
            "write_seconds": round(written, 2),
            "megabytes": round(page.stat().st_size / 1e6, 2),
            "open_seconds": spread(opened),
            "filter_milliseconds": {name: spread(times) for name, times in filtered.items()},
        }
    write_result("report_page", result)
    print(json.dumps(result, indent=1, default=vars))


def open_seconds(page: Path) -> float:
    """From the navigation until the first completions are on the page, in a browser that has just started."""
    with Chromium() as browser:
        begun = time.monotonic()
        browser.open(page)
        return time.monotonic() - begun


def filter_milliseconds(page: Path, repeats: int) -> dict[str, list[float]]:
    """Of each filter, until layout is done. The first text search is one of them: it makes the texts' lower case."""
    script = """(() => {{ const form = document.getElementById('filters'); form.reset();
      const begun = performance.now(); {set}; form.dispatchEvent(new Event('input'));
      document.body.offsetHeight; return performance.now() - begun; }})()"""
    with Chromium() as browser:
        browser.open(page)
        return {name: [browser.run(script.format(set=code)) for _ in range(repeats)] for name, code in FILTERS.items()}


def make_run(run: Path, completions: int) -> None:
    """A run's folder as a run leaves it, with photographs of noise and completions of 60 words."""
    chance = random.Random(0)
    classes = [f"flower {number:03d}" for number in range(CLASSES)]
    images = [LabelledImage(f"{classes[i % CLASSES]}/{i:05d}.jpg", photograph(i), classes[i % CLASSES])
              for i in range(CLASSES * SHOTS + TEST)]  # fmt: skip
    train, test = images[: CLASSES * SHOTS], images[CLASSES * SHOTS :]
    dataset = FewShotDataset.of("flowers", classes, train, [], test, [])
    steps = -(-completions // (GROUP * PROMPTS))
    config = load_config("digits", [f"run.folder={run.parent}", f"run.name={run.name}", f"schedule.steps={steps}"])
    (run / "rollouts").mkdir(parents=True)
    write_record(run, config)
    write_json(run / "manifest.json", manifest(dataset, 0))
    (run / "thumbnails.zip").write_bytes(archive(thumbnails(wanted(dataset), dataset.images)))
    left = completions // GROUP
    for step in range(1, steps + 1):
        groups = [
            group(chance, step, i, train[(step * PROMPTS + i) % len(train)], classes) for i in range(min(PROMPTS, left))
        ]
        left -= len(groups)
        write_text(run / "rollouts" / f"step-{step:06d}.jsonl", json_lines(groups))
        figures = {"reward": step / steps, "reward/format": 1.0, "kl": 0.1 * step / steps, "tokens": 40_000}
        append(run / "metrics.jsonl", {"step": step, **figures, "seconds/generate": 5.0, "seconds/learn": 7.0})
    for step in (0, steps):
        judged = [judged_answer(chance, one, classes, step / steps) for one in test]
        right = sum(one.strict for one in judged) / len(judged)
        write_answers(run, step, "test", judged)
        append(run / "eval.jsonl", vars_of(Evaluation(step, "test", right, right, 1.0, len(test), (right, right))))


def photograph(seed: int) -> bytes:
    """A JPEG whose thumbnail is as large as that of a flower: colours that change smoothly, and some noise."""
    random_state = np.random.default_rng(seed)
    coarse = Image.fromarray(random_state.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, dtype=np.int16) + random_state.integers(-28, 29, (224, 224, 3), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def group(chance: random.Random, step: int, index: int, image: LabelledImage, classes: list[str]) -> dict[str, Any]:
    labels = [image.label if chance.random() < 0.6 else chance.choice(classes) for _ in range(GROUP)]
    right = [float(label == image.label) for label in labels]
    return {
        "prompt_id": f"train/{step - 1}/{index}",
        "example_id": image.example_id,
        "label": image.label,
        "completions": [text(chance, label) for label in labels],
        "version_spans": [[[step - 1, 80]]] * GROUP,
        "rewards": [{"total": 1 + one, "parts": {"format": 1.0, "accuracy": one}, "failures": {}} for one in right],
        "advantages": [one - sum(right) / GROUP for one in right],
        "tokens": [chance.randint(60, 100) for _ in labels],
        "finish_reasons": ["stop" if chance.random() < 0.98 else "length" for _ in labels],
        "logprob_gaps": [round(chance.random() / 100, 8) for _ in labels],
        "why": [f"answered {label!r}, label {image.label!r}; format ok" for label in labels],
    }


def text(chance: random.Random, label: str) -> str:
    return f"<think>{' '.join(chance.choices(WORDS, k=60))}</think><answer>{label}</answer>"


def judged_answer(chance: random.Random, image: LabelledImage, classes: list[str], share: float) -> Judged:
    label = image.label if chance.random() < 0.1 + 0.7 * share else chance.choice(classes)
    right = label == image.label
    return Judged(image.example_id, image.label, text(chance, label), label, right, right, True)


def vars_of(evaluation: Evaluation) -> dict[str, Any]:
    return {name: getattr(evaluation, name) for name in Evaluation.__slots__}


if __name__ == "__main__":
    main()
