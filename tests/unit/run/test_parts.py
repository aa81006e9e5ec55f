import json

from rft_cluster.prompts import Question
from rft_cluster.run import parts


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / parts.FILE).read_text().splitlines()]


def test_a_part_is_recorded_once_and_again_when_something_differs(tmp_path, monkeypatch):
    parts.add_part(tmp_path, 0, Question("Which digit?"))
    parts.add_part(tmp_path, 40, Question("Which digit?"))
    assert [row["step"] for row in rows(tmp_path)] == [0]
    (first,) = rows(tmp_path)
    assert first["question"] == "Which digit?" and first["machine"]["cores"] > 0 and "torch" in first["versions"]
    monkeypatch.setattr(parts.platform, "python_version", lambda: "9.9.9")
    parts.add_part(tmp_path, 60, Question("Which digit?"))
    assert [(row["step"], row["python"]) for row in rows(tmp_path)] == [(0, first["python"]), (60, "9.9.9")]


def test_a_row_that_was_cut_is_dropped(tmp_path):
    parts.add_part(tmp_path, 0, Question("Which digit?"))
    with (tmp_path / parts.FILE).open("a") as file:
        file.write('{"step": 3, "ti')
    parts.add_part(tmp_path, 5, Question("Which flower?"))
    assert [row["step"] for row in rows(tmp_path)] == [0, 5]


def test_nvidia_s_own_files_name_driver_and_gpus(tmp_path, monkeypatch):
    """As NVIDIA's open kernel modules of branch 580 write them."""
    (tmp_path / "gpus" / "0000:17:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:17:00.0" / "information").write_text(
        "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1104\nGPU UUID: \t GPU-1\n"
    )
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)  Tue Sep 23\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    monkeypatch.setattr(parts, "NVIDIA", tmp_path)
    machine = parts.environment()["machine"]
    assert (machine["gpus"], machine["nvidia_driver"]) == (["NVIDIA H100 80GB HBM3"], "580.95.05")


def test_a_file_of_the_driver_that_may_not_be_read_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / "version").symlink_to("/proc/self/mem")  # a file that is there, and whose reading fails
    monkeypatch.setattr(parts, "NVIDIA", tmp_path)
    assert parts.environment()["machine"]["nvidia_driver"] is None
