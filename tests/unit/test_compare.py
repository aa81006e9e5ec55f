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
    assert "matched by id and label only" in shown.err
    first, _ = shown.out.splitlines()
    assert first.startswith("greedy: second - first +50.0 points")
    assert first.endswith("only in the second 1 of 2 images")
    assert compare.main([str(files / "one"), str(files / "two"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["greedy"]["only_second"] == 1


KINDS = {"predictions": (), "id": str, "label": str, "strict": bool, "voted": str | None, "pixels": str}


@pytest.mark.parametrize("value", ["gone", None, 3, [], {}, True, "x"], ids=repr)
@pytest.mark.parametrize("key", KINDS)
def test_a_damaged_evaluation_is_one_message(files, capsys, key, value):
    row = {"id": "0", "label": "x", "strict": True, "voted": "x", "pixels": "0"}
    whole = {"predictions": [row, {**row, "id": "1"}]}
    owner = whole if key == "predictions" else row
    if value == "gone":
        del owner[key]
        right = key == "pixels"  # older evaluations have none
    else:
        owner[key] = value
        right = isinstance(value, KINDS[key])
    (files / "other.json").write_text(json.dumps(whole))
    code = compare.main([str(files / "other.json"), str(files / "other.json")])
    error = capsys.readouterr().err
    assert code == (0 if right else 2)
    assert right or error.startswith(f"error: {files / 'other.json'} is no evaluation")
    assert "Traceback" not in error


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"null", b"{}", b'{"predictions": [' + b"[" * 9999])
def test_a_file_that_is_no_evaluation(files, capsys, data):
    (files / "other.json").write_bytes(data)
    assert compare.main([str(files / "one"), str(files / "other.json")]) == 2
    assert "is no evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [("[", "Invalid JSON"), ("[]", "no evaluation"), (None, "No such file")]
)
def test_what_is_no_evaluation_is_explained(files, capsys, content, message):
    other = files / "other.json"
    if content is not None:
        other.write_text(content)
    assert compare.main([str(files / "one"), str(other)]) == 2
    assert message in capsys.readouterr().err
