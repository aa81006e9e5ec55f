"""A run's folder as a run leaves it, for pages: two classes, six images, two steps, two evaluations.

`words` are put wherever a data set, a model or a file name may say something.
"""

from dataclasses import replace
from pathlib import Path

from rft_cluster.classification.report import summarise
from rft_cluster.data.dataset import FewShotDataset, LabelledImage
from rft_cluster.messages import Completion, Group, Reward
from rft_cluster.prompts import Question, make_prompts
from rft_cluster.run.folder import RunFolder
from rft_cluster.run.task import Task
from rft_cluster.run.thumbnails import archive, thumbnails, wanted
from tests.unit.run.begun import config, picture
from tests.unit.run.steps import stats

COLOURS = ("red", "yellow", "blue", "green", "white", "black")
SETTINGS = ("schedule.steps=2", "schedule.prompts_per_step=2", "sampling.group_size=2", "optimizer.warmup_steps=0")
ADVANTAGES = [[0.5, -0.5], [0.0, 0.0]]


def dataset(words: str) -> FewShotDataset:
    labels = [f"{words} {name}".strip() for name in ("rose", "tulip")]
    images = [
        LabelledImage(f"{colour} {words}".strip(), picture(colour), labels[i % 2]) for i, colour in enumerate(COLOURS)
    ]
    return FewShotDataset.of(f"photos {words}", labels, images[:2], [], images[2:], [])


def answered(prompts, labels: list[str], words: str) -> list[Group]:
    texts = [f"<think>{words}</think><answer>{label}</answer>" for label in labels]
    return [
        Group(prompt, [1], [Completion([5, 6], [-0.5, -0.5], text, "stop", 0) for text in texts]) for prompt in prompts
    ]


def written(folder: Path, words: str = "", name: str = "mine") -> Path:
    """The folder of a run of two steps: half of the completions are right, and none of the second class's rewards."""
    data = dataset(words)
    settings = config(folder, *SETTINGS)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"name": name})})
    run = RunFolder(settings, Task(data, Question(f"Which flower? {words}")), 0)
    for step in (0, 1, 2):
        if step:
            prompts = make_prompts(data.batch(0, step - 1, 2), "Which flower?", "train", step - 1, 0)
            groups = answered(prompts, data.classes, words)
            rewards = [[reward(group.prompt.label == label) for label in data.classes] for group in groups]
            rewards[1][1] = Reward(None, {"format": 1.0}, {"accuracy": f"no answer {words}"})
            run.log_rollouts(step, groups, rewards, ADVANTAGES, None)
            run.log_step(replace(stats(step), step=step))
        if step in (0, 2):
            prompts = make_prompts(data.test, "Which flower?", "test", step, 0)
            groups = [group for p in prompts for group in answered([p], [p.label if step else data.classes[0]], words)]
            run.log_evaluation(summarise(step, "test", groups), groups)
    (run.path / "thumbnails.zip").write_bytes(archive(thumbnails(wanted(data), data.images)))
    (run.path / "log.txt").write_text(
        f"2026-01-02 03:04:00  $ python -m rft_cluster.launch --config {words}\n"
        f"2026-01-02 03:04:10  WARNING: generator died {words}\n"
        f"2026-01-02 03:04:10  generator starts afresh (1 of 3 times without a new step) {words}\n"
        f"2026-01-02 03:05:00  step 2/2\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    return run.path


def reward(right: bool) -> Reward:
    return Reward(1.0 + right, {"format": 1.0, "accuracy": float(right)})
