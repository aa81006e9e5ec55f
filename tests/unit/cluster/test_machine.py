"""Could a run start on this machine? What Ray would say later is said before, and in the words of the configuration."""

import os
from contextlib import nullcontext

import pytest
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import validate_socket_filepath

from rft_cluster.cluster import machine
from rft_cluster.cluster.gpus import Driver, Gpu
from rft_cluster.common.errors import UserError
from rft_cluster.config import Config

CPU = {"device": "cpu"}


def config(**sections) -> Config:
    base = {
        "run": {"name": "x"},
        "model": {"path": "tiny"},
        "data": {"source": "digits"},
        "schedule": {"steps": 1, "prompts_per_step": 1},
        "cluster": CPU,
    }
    return Config.model_validate({**base, **sections})


def on_gpus(learners: float = 1, generators: float = 1, count: int = 1, **sections) -> Config:
    return config(
        cluster={"device": "cuda"},
        learners={"gpus": learners, "count": count, **sections.pop("learner", {})},
        generators={"gpus": generators, "count": count},
        **sections,
    )


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "driver_here", lambda: Driver("580.65.06", 13000, [Gpu("H100", (9, 0), 80 * 10**9)]))


# --- Ray's sockets


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("letter", ["x", "é", "薔"])
@pytest.mark.parametrize("pid", [7, 12345, 4194303])
def test_a_folder_is_refused_where_ray_would_refuse_it(tmp_path, monkeypatch, name, letter, pid):
    monkeypatch.setattr(os, "getpid", lambda: pid)
    verdicts = []
    for length in range(1, 100):
        folder = f"/tmp/{letter * length}"
        monkeypatch.setenv("TMPDIR", "/tmp")
        monkeypatch.setenv(name, folder)
        monkeypatch.setattr(machine, "check_writable", lambda *_: None)
        session = f"session_2026-11-26_06-45-41_123456_{pid}"  # ray._private.node
        try:
            validate_socket_filepath(os.path.join(get_default_ray_temp_dir(), session, "sockets", "plasma_store"))
        except OSError:
            with pytest.raises(UserError, match=f"^{name} is .* bytes too long .*: export RAY_TMPDIR=/tmp"):
                machine.check_ray_folder(config().cluster)
            verdicts.append(False)
        else:
            machine.check_ray_folder(config().cluster)
            verdicts.append(True)
    assert True in verdicts
    assert verdicts == sorted(verdicts, reverse=True)


def test_the_cure_for_a_long_folder_works(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 87)
    with pytest.raises(UserError, match="export RAY_TMPDIR=/tmp"):
        machine.check_ray_folder(config().cluster)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    machine.check_ray_folder(config().cluster)


def test_a_folder_that_ray_cannot_write(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc/sys")
    with pytest.raises(UserError, match=r"/proc/sys/ray cannot be written.*export RAY_TMPDIR=FOLDER"):
        machine.check_ray_folder(config().cluster)


def test_a_home_that_ray_cannot_write_its_token_to(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/sys")
    with pytest.raises(UserError, match=r"/proc/sys/.ray cannot be written.*export HOME=FOLDER"):
        machine.check_ray_folder(config().cluster)
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.check_ray_folder(config().cluster)


@pytest.mark.parametrize(
    ("variables", "makes"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "token"}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "abc"}, False),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "token"}, False),
    ],
)
def test_a_home_matters_where_ray_makes_a_token(monkeypatch, variables, makes):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/proc/sys")
    with pytest.raises(UserError, match="Ray keeps its token there") if makes else nullcontext():
        machine.check_ray_folder(config().cluster)


# --- GPUs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shares", [(1, 1, 1), (2, 1, 1), (1, 1, 4), (0.5, 0.5, 1)])
def test_a_plan_for_gpus_on_a_machine_without_names_the_cpu(monkeypatch, shares, training):
    monkeypatch.setattr(machine, "_gpus", lambda: 0)
    with pytest.raises(UserError) as caught:
        machine.check_machine(on_gpus(*shares), training)
    cure = "cluster.device=cpu generators.gpus=0 learners.gpus=0"
    assert cure in str(caught.value)
    assert "to join a cluster, set RAY_ADDRESS" in str(caught.value)
    machine.check_machine(config(**{"learners": {"gpus": 0}, "generators": {"gpus": 0}, "cluster": CPU}), training)


@pytest.mark.parametrize(("has", "fits"), [(1, False), (2, True), (8, True)])
def test_a_plan_is_held_against_the_gpus_that_are_here(monkeypatch, has, fits):
    monkeypatch.setattr(machine, "_gpus", lambda: has)
    if fits:
        machine.check_machine(on_gpus())
    else:
        with pytest.raises(UserError, match="needs 2 GPUs, the cluster has 1"):
            machine.check_machine(on_gpus())


@pytest.mark.parametrize("training", [True, False])
def test_an_old_driver_is_named_before_anything_starts(monkeypatch, training):
    monkeypatch.setattr(machine, "_gpus", lambda: 2)
    monkeypatch.setattr(machine, "driver_here", lambda: Driver("570.124.06", 12080, []))
    with pytest.raises(
        UserError, match=r"^this machine has the NVIDIA driver 570\.124\.06, which runs CUDA up to 12\.8"
    ):
        machine.check_machine(on_gpus(), training)
    machine.check_machine(config())


def test_the_smallest_gpu_counts_and_parts_of_gpus_are_not_known(monkeypatch):
    gpus = [Gpu("H100", (9, 0), 80), Gpu("L4", (8, 9), 24)]
    monkeypatch.setattr(machine, "driver_here", lambda: Driver("580.65.06", 13000, gpus))
    assert machine.smallest_gpu() == ("L4", 24)
    monkeypatch.setattr(machine, "driver_here", lambda: Driver("580.65.06", 13000, []))
    assert machine.smallest_gpu()[1] > 10**15


def test_no_gpu_is_looked_for_where_none_is_planned(monkeypatch):
    monkeypatch.setattr(machine, "_gpus", lambda: pytest.fail("looked for"))
    monkeypatch.setattr(machine, "driver_here", lambda: pytest.fail("looked for"))
    machine.check_machine(config())


def test_gpus_are_counted_as_ray_counts_them():
    assert machine._gpus() == 0


@pytest.mark.parametrize("cores", [1, 2, 64])
@pytest.mark.parametrize("cpus", [0.5, 1, 4])
def test_cpus_are_a_note(monkeypatch, cores, cpus):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    note = machine.check_machine(config(learners={"cpus": cpus}, generators={"cpus": cpus}))
    assert bool(note) == (2 * cpus > cores)


@pytest.mark.parametrize("name", ["eth99", "", "LO", "lo:9", "127.0.0.1"])
def test_an_interface_that_is_not_here_is_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=r"^cluster.interface: .* \(there are .*\blo\b"):
        machine.check_machine(config(cluster={**CPU, "interface": name}))


def test_an_interface_that_is_here_will_do():
    assert machine.check_machine(config(cluster={**CPU, "interface": "lo"})) == machine.check_machine(config())


def test_a_cluster_that_is_joined_is_not_this_machine(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 87)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    machine.check_ray_folder(config().cluster)
    assert machine.check_machine(on_gpus()) == ""
