"""A target of SFT has no reward: nothing shows the 0 that is recorded in its place as one."""

import pytest

from rft_cluster.classification.answers import AnswerReader
from rft_cluster.messages import Completion, Group, LearnerStats
from rft_cluster.report.completions import Columns
from rft_cluster.run.debug import completion_line
from rft_cluster.run.rollouts import rollout_rows
from rft_cluster.run.targets import UNSCORED
from rft_cluster.tracking.pictures import worth
from rft_cluster.watch.answers import Group as Watched
from rft_cluster.watch.answers import answer_table
from tests.unit.some_prompt import some_prompt


@pytest.fixture
def row() -> dict:
    target = Completion([5, 6], [], "<answer>rose</answer>", "stop", 3)
    return rollout_rows([Group(some_prompt(), [1], [target])], [[UNSCORED]], [[1.0]], LearnerStats())[0]


def test_on_the_page(row):
    columns = Columns({}, {"rose": 0}, AnswerReader(["rose"], {}))
    columns.add(1, row)
    page = columns.page()
    assert page["advantage"] == [1.0] and "total" not in page


def test_in_pictures_the_terminal_and_debug_mode(row):
    assert worth(row["rewards"][0], 1.0) == "target"
    cells = list(answer_table([Watched.model_validate(row)]).columns[0].cells)
    assert cells == ["reward", "target"]
    assert completion_line(row, 0) == "a target of SFT  advantage +1.00  2 tokens  answered 'rose', the label"
