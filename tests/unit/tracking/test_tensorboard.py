"""What is written is read back by TensorBoard's own reader, the one that serves its pages."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util.tensor_util import make_ndarray

from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.messages import Completion
from rft_cluster.run.folder import RunFolder
from rft_cluster.tracking.figures import Shown
from rft_cluster.tracking.tensorboard import TensorBoard, completions_table
from tests.unit.run.begun import DATASET, TASK, config
from tests.unit.run.steps import group, stats
from tests.unit.tracking.events import curve, images, read

EVALUATION = Evaluation(0, "test", 0.5, 0.75, 1.0, 2, (0.1, 0.9))
JUDGED = [
    Judged("a", "rose", "<answer>rose</answer>", "rose", strict=True, lenient=True, formatted=True),
    Judged("b", "tulip", "<answer>rose</answer>", "rose", strict=False, lenient=False, formatted=True),
]
ROWS = [
    {
        "example_id": example_id,
        "label": label,
        "completions": ["<answer>rose</answer>", "?"],
        "rewards": [{"total": 2.0}, {"total": None}],
        "advantages": [0.7, None],
        "why": ["answered 'rose'; format ok", "masked: judge failed"],
    }
    for example_id, label in (("a", "rose"), ("b", "tulip"))
]


def tracker(run: Path, steps: int = 40) -> TensorBoard:
    return TensorBoard(run, Shown(DATASET, steps))


def logged(run: Path, first_step: int, last_step: int) -> None:
    """One part of a run, from its opening to its end."""
    board = tracker(run)
    board.begin(first_step)
    if first_step == 0:
        board.evaluation(EVALUATION, JUDGED)
    for step in range(first_step + 1, last_step + 1):
        board.rollouts(step, ROWS)
        board.step(stats(step, seconds={"generate": float(step + first_step)}))
    board.close()


def test_all_figures_of_steps_and_evaluations_are_curves(tmp_path):
    logged(tmp_path, 0, 2)
    found = read(tmp_path)
    row = stats(2, seconds={"generate": 2.0}).row()
    assert found.PluginTagToContent("scalars").keys() == {
        *(f"train/{key}" for key in row if key not in ("step", "replayed")),
        *(f"test/{key}" for key in ("accuracy_strict", "accuracy_lenient", "format_rate")),
        *("test/interval_low", "test/interval_high"),
    }
    for key in ("reward", "reward/accuracy", "kl", "seconds/generate", "tokens"):
        assert curve(found, f"train/{key}")[2] == pytest.approx(row[key], rel=1e-6)
    assert found.SummaryMetadata("train/kl").summary_description.endswith("Unit: nats a token.")
    assert found.SummaryMetadata("train/reward/accuracy").summary_description.startswith("The reward NAME")
    assert curve(found, "test/accuracy_strict") == {0: 0.5}
    assert curve(found, "test/interval_high") == {0: pytest.approx(0.9)}


def test_images_are_there_with_their_completions_and_the_confusion_matrix(tmp_path):
    logged(tmp_path, 0, 5)
    found = read(tmp_path)
    assert found.PluginTagToContent("images").keys() == {"rollouts/1", "rollouts/2", "test/confusion"}
    drawn = images(found, "rollouts/2")
    assert list(drawn) == [1, 4], "40 steps, 10 times: every fourth, and the first"
    assert drawn[4].getpixel((20, 20)) == (255, 255, 0), "the yellow image, tulip"
    assert np.array(images(found, "test/confusion")[0].convert("L")).std() > 10
    (text,) = make_ndarray(found.Tensors("rollouts")[-1].tensor_proto)
    assert "tulip" in text.decode() and "masked" in text.decode() and "2&#46;00 &#43;0&#46;70" in text.decode()


def test_a_resumed_run_has_every_step_once_with_the_figures_of_the_later_part(tmp_path):
    logged(tmp_path, 0, 7)
    logged(tmp_path, 4, 6)  # 5 to 7 are done again, 7 not yet
    found = read(tmp_path)
    assert curve(found, "train/seconds/generate") == {1: 1, 2: 2, 3: 3, 4: 4, 5: 9, 6: 10}
    assert list(images(found, "rollouts/1")) == [1, 4]
    assert curve(found, "test/accuracy_strict") == {0: 0.5}
    logged(tmp_path, 0, 1)
    assert curve(read(tmp_path), "train/seconds/generate") == {1: 1}


def test_a_record_that_a_crash_cut_is_passed_over(tmp_path):
    logged(tmp_path, 0, 3)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    logged(tmp_path, 2, 3)
    assert curve(read(tmp_path), "train/seconds/generate") == {1: 1, 2: 2, 3: 5}


def test_no_file_elsewhere_is_changed_through_a_link(tmp_path):
    (tmp_path / "theirs").mkdir()
    logged(tmp_path / "theirs", 0, 3)
    (theirs,) = (tmp_path / "theirs" / "tensorboard").iterdir()
    before = theirs.read_bytes()
    (tmp_path / "mine" / "tensorboard").mkdir(parents=True)
    (tmp_path / "mine" / "tensorboard" / theirs.name).symlink_to(theirs)
    logged(tmp_path / "mine", 1, 2)
    assert theirs.read_bytes() == before


HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://203.0.113.7/x.png) [y](javascript:alert(1))",
    "a | b | c\n\n# head",
    "**bold** `code` <img src=x onerror=alert(1)> &lt;b&gt;",
    "\x1b[31mred\u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_models_and_labels_stays_text_in_the_page_of_tensorboard(text):
    row = {"example_id": text, "label": text, "completions": [text], "rewards": [{"total": 1.0}]}
    row |= {"advantages": [0.5], "why": [text]}
    page = markdown_to_safe_html(completions_table([row]))
    assert set(re.findall(r"</?(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.count("<td>") == 5
    assert not re.search(r"[\x1b\u202e]", page)


PROGRAM = """
import sys
from pathlib import Path
from rft_cluster.classification.report import Evaluation, Judged
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.tracking.figures import Shown
from rft_cluster.tracking.start import TensorBoard

board = TensorBoard(Path(sys.argv[1]), Shown(FewShotDataset("none", ("rose",), (), (), (), (), {}), 1))
board.begin(0)
judged = [Judged("a", "rose", "", "rose", True, True, True)]
board.evaluation(Evaluation(0, "test", 1.0, 1.0, 1.0, 1, (0.2, 1.0)), judged)
board.close()
print(sorted({"torch", "tensorflow", "ray", "wandb"} & set(sys.modules)))
"""


def test_the_driver_needs_neither_torch_nor_wandb_for_it(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    assert list(images(read(tmp_path), "test/confusion")) == [0]


def test_a_run_s_folder_passes_on_what_it_records(tmp_path):
    board = TensorBoard(config(tmp_path).run_folder, Shown(DATASET, 80))
    run = RunFolder(config(tmp_path), TASK, 0, trackers=[board])
    answer = Completion([5], [-0.5], "<answer>rose</answer>", "stop", 0)
    asked = group(0, answer, answer)
    run.log_evaluation(EVALUATION, [asked])
    run.log_step(stats(1))
    board.close()
    found = read(run.path)
    assert curve(found, "train/reward") == {1: 0.75}
    assert list(images(found, "test/confusion")) == [0]
