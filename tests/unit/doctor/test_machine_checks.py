"""The machine's checks, each with an environment that is broken for it, and what the command prints."""

import json
import os
import shutil
import socket
from collections import namedtuple

import pytest
from ray._private import utils

from rft_cluster.cluster.gpus import Driver, Gpu
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config, load_config
from rft_cluster.doctor import __main__ as command
from rft_cluster.doctor import machine
from rft_cluster.doctor.finding import Finding, finding_of
from rft_cluster.doctor.machine import check_this_machine

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * 2**30)
NVIDIA = Driver("580.65.06", 13000, [H100, H100])
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def found(name: str, device: str = "cpu", config: Config | None = None) -> Finding:
    """The finding of this name. Checks behind it are not made."""
    return next(finding for finding in check_this_machine(device, config) if finding.name == name)


def digits(*overrides: str) -> Config:
    return load_config("digits", list(overrides))


# One thing is broken at a time


@pytest.mark.parametrize(
    ("device", "driver", "status", "told"),
    [
        ("cpu", None, "ok", "none needed"),
        (
            "cpu",
            NVIDIA,
            "warning",
            "2 x NVIDIA H100 80GB HBM3 is not used by this environment, which is for CPUs: ",
        ),
        (
            "cuda",
            NVIDIA,
            "ok",
            "2 x NVIDIA H100 80GB HBM3 with 79.0 GiB, compute capability 9.0; driver 580.65",
        ),
        ("cuda", None, "error", "this machine has no NVIDIA driver: install one of branch 580 or newer"),
        ("cuda", Driver("550.54.14", 12040, [H100]), "error", "which runs CUDA up to 12.4"),
        ("cuda", Driver("580.65.06", 13000, [Gpu("Tesla V100", (7, 0), 1)]), "error", "compute capability 7.0"),
        ("cuda", Driver("580.65.06", 13000, []), "error", "none is visible: CUDA_VISIBLE_DEVICES is None"),
    ],
)
def test_gpus_and_their_driver(monkeypatch, device, driver, status, told):
    monkeypatch.setattr(machine, "driver_here", lambda: driver)
    gpu = found("gpu", device)
    assert gpu.status == status
    assert told in gpu.text


def test_a_dev_shm_that_is_too_small_for_ray(monkeypatch):
    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: 64 * 10**6)
    shm = found("shared memory")
    assert shm.status == "warning"
    assert shm.text.startswith("/dev/shm has 64 MB free, and Ray's object store takes ")
    assert "--shm-size=" in shm.text


def test_a_dev_shm_that_is_too_small_for_nccl(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # another Ray's object store is not known
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(64 * 10**6, 0, 64 * 10**6))
    assert found("shared memory", "cuda").status == "warning"
    assert "--shm-size=1g" in found("shared memory", "cuda").text
    assert found("shared memory", "cpu").status == "ok"


@pytest.mark.parametrize(("used", "status"), [(0.94, "ok"), (0.96, "warning")])
def test_a_full_disk(monkeypatch, used, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, int(used * 10**12), int((1 - used) * 10**12)))
    assert found("disk").status == status


def test_without_a_home_there_is_nothing_more_to_look_at(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    text = "this user has no home folder, where caches and Ray's token are kept: export HOME=FOLDER"
    assert list(check_this_machine("cpu", None)) == [Finding("home", "error", text)]


def test_an_interface_that_is_not_there():
    network = found("network", config=digits("cluster.interface=ib7"))
    assert network.status == "error"
    assert "cluster.interface: 'ib7' is no interface" in network.text


def test_an_address_that_no_interface_has(monkeypatch):
    monkeypatch.setattr(machine, "address_here", lambda: "192.0.2.99")
    assert "no network interface here has 192.0.2.99" in found("network").text


def test_a_host_that_cannot_reach_itself(monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    network = found("network")
    assert network.status == "error"
    assert "firewall" in network.text


def test_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    ray = found("ray")
    assert ray.status == "error"
    assert ray.text.startswith("no Ray cluster answers at '127.0.0.1:9': ")


def test_a_folder_that_ray_cannot_use(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 87)
    assert "export RAY_TMPDIR=/tmp" in found("ray").text


def test_libraries_that_are_missing_are_named_with_the_command_of_the_set_up(monkeypatch, tmp_path):
    script = tmp_path / "check_machine.py"
    text = machine.SCRIPT.read_text()
    assert '"libnuma.so.1"' in text
    script.write_text(text.replace('"libnuma.so.1"', '"libnuma.so.7"'))
    monkeypatch.setattr(machine, "SCRIPT", script)
    system = found("system")
    assert system.status == "error"
    assert system.text.startswith("this machine lacks libnuma.so.7 (for vLLM): ")
    monkeypatch.setattr(machine, "SCRIPT", tmp_path / "elsewhere.py")
    assert found("system").status == "warning"


def test_a_processor_without_bf16_is_told(monkeypatch):
    monkeypatch.setattr(machine, "native_dtype", lambda _: "float32")
    assert "computes in float32, as it has no BF16 instructions" in found("processor").text


@pytest.mark.parametrize(
    ("override", "name", "told"),
    [
        ("run.folder=/proc/runs", "run", "cannot be written"),
        ("cluster.start_timeout=5", "run", "cluster.start_timeout is 5 s"),
        ("tracking=[wandb]", "run", "tracking: "),
        ("model.path=no/such-model-here/at-all", "model", "there is no folder no/such-model-here/at-all"),
        ("prompt.template=no_such", "model", "no_such"),
        ("data.path=nowhere", "data", "nowhere does not exist"),
    ],
)
def test_a_configuration_that_cannot_run_here(monkeypatch, override, name, told):
    monkeypatch.setenv("NETRC", os.devnull)
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(key, raising=False)
    base = load_config("photos", ["data.path=photos", override])
    finding = found(name, config=base)
    assert finding.status == "error"
    assert told in finding.text


def test_a_plan_for_gpus_on_a_machine_without(monkeypatch):
    monkeypatch.setattr(machine, "driver_here", lambda: None)
    plan = found("plan", "cuda", load_config("digits_gpu", []))
    assert plan.status == "error"
    assert "join a cluster, set RAY_ADDRESS" in plan.text


def test_a_check_whose_package_is_missing_is_no_crash():
    def check() -> str:
        raise ModuleNotFoundError("No module named 'ray'")

    finding = finding_of("ray", check)
    assert finding.status == "error"
    assert "No module named 'ray'. Type: make setup" in finding.text


def test_a_defect_of_a_check_keeps_its_traceback():
    with pytest.raises(KeyError):
        finding_of("memory", lambda: {}["memory"])


# The command

GOOD, DOUBTFUL = Finding("gpu", "ok", "none"), Finding("disk", "warning", "96 % are used: free some space")
WRONG = Finding("ray", "error", "first line\nsecond line")


def run(monkeypatch, capsys, findings: list[Finding], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(command, "findings", lambda name, overrides: iter(findings))
    code = command.main([*arguments])
    return code, capsys.readouterr().out


def test_the_exit_code_is_1_with_an_error_alone(monkeypatch, capsys):
    code, output = run(monkeypatch, capsys, [GOOD, DOUBTFUL])
    assert (code, output.splitlines()[-1].split(":")[0]) == (0, "1 warning")
    code, output = run(monkeypatch, capsys, [GOOD])
    assert (code, output.splitlines()[-1].split(":")[0]) == (0, "all is well")
    code, output = run(monkeypatch, capsys, [GOOD, DOUBTFUL, WRONG])
    assert code == 1
    assert output == (
        "gpu                 ok       none\n"
        "disk                warning  96 % are used: free some space\n"
        "ray                 error    first line\n"
        "                             second line\n"
        "\n"
        "1 error and 1 warning: a run cannot start before the errors are cured\n"
    )


def test_with_json_one_object_has_all_findings(monkeypatch, capsys):
    code, output = run(monkeypatch, capsys, [GOOD, WRONG], "--json")
    assert code == 1
    assert json.loads(output) == {
        "findings": [
            {"name": "gpu", "status": "ok", "text": "none"},
            {"name": "ray", "status": "error", "text": "first line\nsecond line"},
        ],
        "errors": 1,
        "warnings": 0,
    }


@pytest.mark.parametrize(
    "arguments", [["schedule.steps=3"], ["--run", "x", "--json"], ["--run", "x", "--config", "digits"]]
)
def test_arguments_that_do_not_go_together_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2


def test_a_configuration_that_is_wrong_is_the_user_s_mistake(capsys):
    assert command.main(["--config", "digitz"]) == 2
    assert "digits" in capsys.readouterr().err


def test_what_a_check_prints_does_not_mix_with_the_findings(capsys):
    assert finding_of("data", lambda: print("reading") or "fine") == Finding("data", "ok", "fine")
    assert capsys.readouterr() == ("", "reading\n")


def test_every_launch_s_mistake_is_an_error_and_names_its_cure():
    def check() -> str:
        raise UserError("runs cannot be written: set run.folder to another")

    assert finding_of("run", check) == Finding("run", "error", "runs cannot be written: set run.folder to another")
