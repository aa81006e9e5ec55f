"""The list of checks itself: lines, records, going on, errors, what is missing. The checks here are made up."""

import io
import json
import re
import time
from dataclasses import replace

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check.checklist import Bench, Check, Line, Outcome, answer_of, once, run_checks
from rft_cluster.common import files
from rft_cluster.common.errors import UserError

ABOUT = {"device": "cpu", "size": "tiny", "gpus": [], "machine": {"commit": "abc"}}


class Made:
    """Checks that count their runs."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.outcome = Outcome(True, 0.25, "GiB", "roomy")

    def check(self, name: str) -> Check:
        def run(bench: Bench) -> Outcome:
            self.runs.append(name)
            return self.outcome

        return Check(name, "at most 1 GiB", run)


@pytest.fixture
def made() -> Made:
    return Made()


def run(folder, *checks, about=ABOUT, again=False):
    console = io.StringIO()
    bench = Bench(about["device"], "tiny", folder)
    lines = run_checks(checks, bench, folder / "made.json", about, again, console)
    return [line.result for line in lines], console.getvalue().splitlines()


def test_a_check_has_a_line_and_a_record(tmp_path, made):
    results, (line,) = run(tmp_path, made.check("memory"))
    assert results == ["pass"]
    assert re.fullmatch(r"pass  memory +0\.25 GiB  at most 1 GiB +\d\.\d s   roomy", line)
    record = json.loads((tmp_path / "made.json").read_text())
    assert record["machine"] == {"commit": "abc"}
    assert record["checks"]["memory"]["figure"] == 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


def test_a_second_call_goes_on_after_the_last_recorded_check(tmp_path, made):
    first, second = made.check("first"), made.check("second")
    made.outcome = replace(made.outcome, passed=False)
    run(tmp_path, first)
    made.outcome = replace(made.outcome, passed=True)
    results, lines = run(tmp_path, first, second)
    assert made.runs == ["first", "second"]
    assert results == ["fail", "pass"] and len(lines) == 2


@pytest.mark.parametrize(
    ("about", "again"), [(ABOUT, True), ({**ABOUT, "size": "true"}, False), ({**ABOUT, "machine": {}}, False)]
)
def test_records_of_other_code_or_another_size_do_not_count(tmp_path, made, about, again):
    run(tmp_path, made.check("first"))
    run(tmp_path, made.check("first"), about=about, again=again)
    assert made.runs == ["first", "first"]


def test_a_damaged_record_does_not_count(tmp_path, made):
    (tmp_path / "made.json").write_text('{"checks": {')
    run(tmp_path, made.check("first"))
    assert made.runs == ["first"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such head\nand more"), "ValueError: no such head"),
        (SystemExit("it ended"), "SystemExit: it ended"),
    ],
)
def test_an_error_fails_its_check_alone(tmp_path, made, capsys, error, said):
    def broken(bench: Bench) -> Outcome:
        raise error

    results, lines = run(tmp_path, Check("broken", "0", broken), made.check("next"))
    assert results == ["fail", "pass"]
    assert lines[0].endswith(said)
    assert "Traceback" in capsys.readouterr().err


def test_a_check_that_hangs_fails(made):
    slow = Check("slow", "0", lambda bench: time.sleep(2))
    started = time.monotonic()
    error = answer_of(slow, Bench("cpu", "tiny", None), deadline=0.05).exception()
    assert "no answer within 0 s" in str(error) and time.monotonic() - started < 1


def test_what_needs_more_gpus_is_skipped(tmp_path, made):
    check = replace(made.check("two"), gpus=2)
    one = {**ABOUT, "device": "cuda", "gpus": [{"name": "H100"}]}
    results, (line,) = run(tmp_path, check, about=one)
    assert (results, made.runs) == (["skip"], []) and line.endswith("needs 2 GPUs, finds 1")
    two = {**one, "gpus": one["gpus"] * 2}
    assert run(tmp_path, check, about=two)[0] == ["pass"]
    assert run(tmp_path, check)[0] == ["pass"], "CPUs stand for any number"


def test_what_a_cpu_lacks_is_skipped_there_alone(tmp_path, made):
    check = replace(made.check("sleep"), cpu_lacks="sleep mode")
    results, (line,) = run(tmp_path, check)
    assert (results, made.runs) == (["skip"], []) and line.endswith("a CPU lacks sleep mode")
    gpu = {**ABOUT, "device": "cuda", "gpus": [{"name": "H100"}]}
    assert run(tmp_path, check, about=gpu)[0] == ["pass"]


def test_what_checks_share_is_made_once_and_so_is_its_error(tmp_path):
    calls = []

    def make(bench):
        calls.append(bench.size)
        if bench.size == "true":
            raise ValueError("no memory")
        return object()

    shared = once(make)
    tiny, true = Bench("cpu", "tiny", tmp_path), Bench("cpu", "true", tmp_path)
    assert shared(tiny) is shared(tiny)
    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            shared(true)
    assert calls == ["tiny", "true"]


def test_what_hangs_is_waited_for_once(tmp_path):
    shared = once(lambda bench: time.sleep(2))
    check, bench = Check("slow", "0", shared), Bench("cpu", "tiny", tmp_path)
    errors = [answer_of(check, bench, deadline=0.05).exception(), answer_of(check, bench, deadline=1).exception()]
    assert list(map(str, errors)) == ["no answer within 0 s", "an earlier check still waits for the same"]


def test_without_a_gpu_one_line_and_exit_code_2(monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"finds no GPU here .*--device cpu"):
        command.main(["--tier", "learner"])


def test_a_folder_that_cannot_hold_the_models_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"gpu_check cannot be written .* export HOME="):
        command.check_room(Bench("cuda", "true", tmp_path / "file" / "gpu_check"))
    bench = Bench("cuda", "true", tmp_path / "gpu_check")
    monkeypatch.setattr(files, "_free", lambda folder: 10**9)
    with pytest.raises(UserError, match=r"need 10\.0 GB in .*gpu_check, but 1\.0 GB are free"):
        command.check_room(bench)
    command.check_room(replace(bench, size="tiny"))
    monkeypatch.setattr(command, "bytes_in", lambda folder: 9 * 10**9 + 1)  # the model is there already
    command.check_room(bench)


def test_a_gpu_without_nvidia_smi_is_named_and_not_skipped(monkeypatch):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "nvidia_gpus", lambda: [])
    with pytest.raises(UserError, match="torch finds a GPU, but nvidia-smi"):
        command.main(["--tier", "learner"])


@pytest.mark.parametrize(
    ("results", "code"),
    [(["pass", "pass"], 0), (["pass", "skip"], 0), (["skip"], 0), (["skip", "fail"], 1), (["fail"], 1)],
)
def test_the_exit_code_of_a_tier(monkeypatch, tmp_path, results, code):
    lines = [Line(result, None, "", "", 0.0, "") for result in results]
    monkeypatch.setattr(command, "in_a_process", lambda *_, **__: lines)
    assert command.tier_code("learner", Bench("cuda", "tiny", tmp_path), tmp_path, ABOUT, False) == code
    assert command.tier_code("learner", Bench("cpu", "tiny", tmp_path), tmp_path, ABOUT, False) == code


def test_fp32_is_fp32_whatever_the_image_sets(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(command, "in_a_process", lambda *_, environment: given.update(environment) or [])
    command.tier_code("learner", Bench("cuda", "true", tmp_path), tmp_path, ABOUT, False)
    assert given["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"


def test_a_tier_whose_process_died_has_failed_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def died(*_, **__):
        raise SystemExit("run_tier ended with exit code -11")

    monkeypatch.setattr(command, "in_a_process", died)
    options = ["--device", "cpu", "--tier", "learner", "learner", "--out", str(tmp_path)]
    assert command.main(options) == 1
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [f"learner: run_tier ended with exit code -11; {tmp_path}/learner.log"] * 2


@pytest.mark.parametrize(("codes", "whole"), [((0, 0), 0), ((0, 2), 2), ((2, 1), 1)])
def test_a_failure_counts_more_than_a_missing_thing(monkeypatch, tmp_path, codes, whole):
    answers, sizes = iter(codes), []

    def tier_code(tier, bench, *_):
        sizes.append(bench.size)
        return next(answers)

    monkeypatch.setattr(command, "tier_code", tier_code)
    options = ["--device", "cpu", "--tier", "learner", "several", "--out", str(tmp_path)]
    assert command.main(options) == whole
    assert set(sizes) == {"tiny"}, "a CPU has no room for the true size"


def test_a_tier_without_its_packages_is_not_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "vllm" else True)
    assert command.tier_code("generator", Bench("cpu", "tiny", tmp_path), tmp_path, ABOUT, False) == 2
    assert capsys.readouterr().out == "generator: not run, vllm missing: EXTRAS=gpu,dev make setup\n"
