import json

import pytest

from rft_cluster import compare


@pytest.fixture
def files(tmp_path):
    for name, strict in (("one", [True, False]), ("two", [True, True])):
        rows = [{"id": str(i), "label": "x", "strict": s, "voted": "x"} for i, s in enumerate(strict)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"predictions": rows}))
    return tmp_path


def test_folders_or_files_are_compared(files, capsys):
    assert compare.main([str(files / "one"), str(files / "two" / "evaluation.json")]) == 0
    shown = capsys.readouterr()
    assert "matched by id and label alone" in shown.err
    first, _ = shown.out.splitlines()
    assert first.startswith("greedy: second - first +50.0 points")
    assert first.endswith("only in the second 1 of 2 images")
    assert compare.main([str(files / "one"), str(files / "two"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["greedy"]["only_second"] == 1


@pytest.mark.parametrize(("content", "message"), [("[", "not JSON"), ("[]", "no evaluation"), (None, "No such file")])
def test_what_is_no_evaluation_is_explained(files, capsys, content, message):
    other = files / "other.json"
    if content is not None:
        other.write_text(content)
    assert compare.main([str(files / "one"), str(other)]) == 2
    assert message in capsys.readouterr().err
