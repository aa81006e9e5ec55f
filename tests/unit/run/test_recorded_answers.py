import re

import pytest

from rft_cluster.classification.report import Judged
from rft_cluster.common.errors import UserError
from rft_cluster.run.answers import answers_file, evaluated_step, read_answers, write_answers

JUDGED = [
    Judged("a\u2028b", "rose", "<answer>rose\u0085</answer>\n", "rose", strict=True, lenient=True, formatted=True),
    Judged("c", "tulip", "", None, strict=False, lenient=False, formatted=False),
]


def test_answers_are_read_back_as_they_were_written(tmp_path):
    write_answers(tmp_path, 80, "test", JUDGED)
    assert read_answers(tmp_path, 80, "test") == JUDGED
    assert evaluated_step(answers_file(tmp_path, 80, "test")) == 80
    assert read_answers(tmp_path, 80, "validation") == []


@pytest.mark.parametrize("line", ["{", "[]", '{"example_id": "a"}', '{"example_id": 3}'])
def test_a_damaged_line_is_named(tmp_path, line):
    write_answers(tmp_path, 80, "test", JUDGED)
    file = answers_file(tmp_path, 80, "test")
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{file}, line 3 is damaged: remove the file")):
        read_answers(tmp_path, 80, "test")


def test_nothing_outside_the_run_is_read(tmp_path):
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for run, split in ((theirs, "test"), (mine, "validation")):
        run.mkdir()
        write_answers(run, 80, split, JUDGED)
    (mine / "evaluations" / "step-000080-x").mkdir()
    outside = answers_file(theirs, 80, "test")
    assert outside.samefile(answers_file(mine, 80, "x/../../../theirs/evaluations/step-000080-test"))
    assert read_answers(mine, 80, "x/../../../theirs/evaluations/step-000080-test") == []
    answers_file(mine, 80, "test").symlink_to(outside)
    assert read_answers(mine, 80, "test") == []
