"""What trackers show of a run's records: curves by name, and which groups are drawn."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rft_cluster.classification.plots import draw_confusion
from rft_cluster.classification.report import Evaluation, Judged, confusion
from rft_cluster.data import FewShotDataset
from rft_cluster.run.metrics import StepStats
from rft_cluster.run.reference import step_fields
from rft_cluster.tracking.pictures import draw_group

TIMES = 10  # that groups are drawn in a run: as many pictures of a kind as TensorBoard shows
GROUPS = 4  # drawn at a time
NO_CURVE = ("step", "replayed")


@dataclass(frozen=True)
class Shown:
    """The images of a run, and when its groups are drawn. `steps`: `schedule.steps`."""

    dataset: FewShotDataset
    steps: int

    def pictures(self, step: int, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """The first groups of a step as PNG files; none if it is not this step's turn."""
        if step != 1 and step % max(1, self.steps // TIMES):
            return []
        return [draw_group(self._image(row["example_id"]), row) for row in rows[:GROUPS]]

    def confusion(self, evaluation: Evaluation, judged: Sequence[Judged]) -> bytes:
        """The confusion matrix as a PNG file."""
        title = f"{evaluation.split}, step {evaluation.step}"
        file = io.BytesIO()
        draw_confusion(confusion(judged, self.dataset.classes), title, file)
        return file.getvalue()

    def _image(self, example_id: str) -> bytes:
        (found,) = (example for example in self.dataset.train if example.example_id == example_id)
        return self.dataset.image(found)


def meanings() -> dict[str, str]:
    """What each curve of a step shows, with its unit, by name; a name that ends in `/NAME` is for all that begin so."""
    return {f"train/{key}": f"{meaning} Unit: {unit}." for key, unit, meaning in step_fields()}


def step_curves(stats: StepStats) -> dict[str, float]:
    """The figures of a step: `train/` and the key in `metrics.jsonl`."""
    return {f"train/{key}": value for key, value in stats.row().items() if key not in NO_CURVE}


def evaluation_curves(evaluation: Evaluation) -> dict[str, float]:
    """The figures of an evaluation: the split and the key in `eval.jsonl`."""
    row = asdict(evaluation)
    low, high = row.pop("interval")
    split = row.pop("split")
    rates = {key: value for key, value in row.items() if key not in ("step", "n")}
    return {f"{split}/{key}": value for key, value in {**rates, "interval_low": low, "interval_high": high}.items()}
