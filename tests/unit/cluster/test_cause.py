"""Reports of Ray 2.60 on dead actors, as they were printed, and what is told of them."""

import traceback
from types import SimpleNamespace

import pytest
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
    WorkerCrashedError,
)

from rft_cluster.cluster import cause, handles
from rft_cluster.cluster.cause import cause_of, killed_for_memory, killed_in_container, of_kernel
from rft_cluster.cluster.handles import wait_for
from rft_cluster.common.errors import ClusterError, EngineFailed, UserError

HEAD = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Learner\n\tactor_id: 4786\n\tpid: 7337\n"
    "\tname: learner-0\n\tnamespace: 5c61acf4\n\tip: 10.0.0.3\n"
)
GUESSES = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
OUT_OF_MEMORY = (
    "4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.3, ID: 62e6) was "
    "22.41GB used / 23.54GB total (95.2% used)\nOOM kill reason: Memory usage exceeded threshold\n"
)
UNAVAILABLE = (
    "The actor 2dce8e3795b53072a143b5b402000000 is unavailable: The actor is temporarily unavailable: RpcError: RPC "
    "error: failed to connect to all addresses; last error: UNKNOWN: ipv4:10.77.0.3:15697: Failed to connect to remote "
    "host: Connection refused rpc_code: 14. The task may or may not have been executed on the actor."
)
UNEXPLAINED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: \n\tactor_id: a24ec911c335f5e22f04\n"
)
EXITED = (
    f"{HEAD}The actor is dead because its worker process has died. Worker exit type: USER_ERROR Worker exit detail: x"
)
UNSCHEDULABLE = (
    "The task is not schedulable: The node specified via NodeAffinitySchedulingStrategy doesn't exist any more or is "
    "infeasible, and soft=False was specified. lease_id=0a00, name=write_shards"
)
FAILED = (
    "The actor died because of an error raised in its creation task, \x1b[36mray::Learner.__init__()\x1b[39m\nTypeError"
)


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (HEAD + GUESSES, "its process (7337 on 10.0.0.3) was killed, or crashed. Often there is no memory left: "),
        (
            HEAD + "The actor is dead because its node has died. Node Id: 3f",
            "its process (7337 on 10.0.0.3) is gone with",
        ),
        (
            HEAD + "The actor is dead because it was killed by `ray.kill`.",
            "(7337 on 10.0.0.3): it was killed by `ray.kill`",
        ),
        ("The actor is dead because its node has died. Node Id: 3f", "its process is gone with its node"),
        (UNAVAILABLE, "its process on 10.77.0.3 answers no more: "),
        (UNSCHEDULABLE, "its node is gone"),
        (UNEXPLAINED, "its process is gone, or its node is"),
        (
            OUT_OF_MEMORY,
            "its process was killed by Ray, because its host was low on memory: 22.4 of 23.5 GiB were used",
        ),
        (FAILED, FAILED),
        (EXITED, "Worker exit type: USER_ERROR"),
    ],
)
def test_one_line_says_what_is_known(report, told):
    line = cause_of(report, ask=lambda pid, host: "")
    assert told in line
    assert report in (FAILED, EXITED) or "\n" not in line


def test_the_kernel_of_its_host_is_asked_why_a_process_ended():
    asked = []

    def ask(pid: int, host: str) -> str:
        asked.append((pid, host))
        return "was killed by the kernel: out of memory, 21.4 of 24.0 GiB"

    assert cause_of(HEAD + GUESSES, ask) == (
        "its process (7337 on 10.0.0.3) was killed by the kernel: out of memory, 21.4 of 24.0 GiB. Its last words are "
        "in Ray's logs there, worker-*-7337.err"
    )
    assert asked == [(7337, "10.0.0.3")]


# Of Linux 6.18, shortened: a process of a container with a limit, then one of the whole host.
LOG = """\
[50595.618507] memory: usage 8388608kB, limit 8388608kB, failcnt 63
[50595.618663] oom-kill:constraint=CONSTRAINT_MEMCG,oom_memcg=/job,task_memcg=/job,task=ray::Learner,pid=41,uid=0
[50595.618705] Memory cgroup out of memory: Killed process 41 (ray::Learner) total-vm:221368kB, anon-rss:8000000kB, \
file-rss:6648kB, shmem-rss:0kB, UID:0 pgtables:176kB oom_score_adj:0
[50700.120000] oom-kill:constraint=CONSTRAINT_NONE,global_oom,task_memcg=/job,task=ray::Generator,pid=42,uid=0
[50700.120044] Out of memory: Killed process 42 (ray::Generator) total-vm:29344896kB, anon-rss:22439526kB, \
file-rss:28kB, shmem-rss:400kB, UID:0 pgtables:176kB oom_score_adj:0
"""


@pytest.mark.parametrize(
    ("pid", "told"),
    [
        (41, "was killed by the kernel: out of memory, 7.6 of 8.0 GiB"),
        (42, "was killed by the kernel: out of memory, 21.4 of 24.0 GiB"),
        (4, ""),
        (43, ""),
    ],
)
def test_the_kernel_s_log_names_the_process_its_memory_and_the_limit(pid, told):
    assert killed_for_memory(LOG, pid, 24 * 2**30) == told


@pytest.mark.parametrize(
    ("groups", "limits", "kills", "told"),
    [
        ("0::/", {"": "25769803776"}, 2, "which has 24.0 GiB, the kernel has killed 2 processes for memory so far"),
        (
            "0::/job/step",
            {"job": "8589934592", "job/step": "max"},
            1,
            "which has 8.0 GiB, the kernel has killed 1 proc",
        ),
        ("0::/", {"": "25769803776"}, 0, ""),
        ("0::/", {"": "max"}, 3, ""),
        ("4:memory:/job", {}, 3, ""),  # version 1
    ],
)
def test_a_container_s_counters_hint_at_its_memory(tmp_path, groups, limits, kills, told):
    for folder, limit in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.events").write_text(f"low 0\nmax 12\noom {kills}\noom_kill {kills}\n")
    line = killed_in_container(tmp_path, groups)
    assert told in line
    assert bool(line) is bool(told)


def died_of(mistake: Exception) -> ActorDiedError:
    """The error of a call to an actor whose constructor raised this, as Ray makes it."""
    try:
        try:
            raise ValueError("no available memory\nfor the cache")
        except ValueError as error:
            raise mistake from error
    except (UserError, TypeError) as error:
        return ActorDiedError.from_task_error(RayTaskError("Generator.__init__", traceback.format_exc(), error))


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (UserError("a generator is out of memory:\nlower it"), UserError, r"^a generator is out of memory:\nlower it$"),
        (TypeError("no such argument"), ClusterError, r"^one died while 'starting': (.|\n)*no such argument"),
    ],
)
def test_a_users_mistake_that_a_constructor_finds_is_told_as_such(monkeypatch, mistake, kind, message):
    """It is not the loss of an actor, after which all would start again, to the same end."""
    death = died_of(mistake)
    monkeypatch.setattr(handles.ray, "get", lambda *_, **__: (_ for _ in ()).throw(death))
    with pytest.raises(kind, match=message):
        wait_for({"call": "one"}, 1, "starting")


@pytest.mark.parametrize(
    "loss",
    [
        ObjectLostError("4786", None, ""),
        OwnerDiedError("4786", None, ""),
        NodeDiedError("gone"),
        WorkerCrashedError(),
        OutOfMemoryError(OUT_OF_MEMORY),
    ],
)
@pytest.mark.parametrize("of_an_argument", [False, True])
def test_an_answer_that_was_lost_with_its_node_is_a_loss_too(monkeypatch, loss, of_an_argument):
    """After which the actors start again: that of an actor which had answered before it died is no error of its own."""
    error = RayTaskError("score", "Traceback", loss).as_instanceof_cause() if of_an_argument else loss
    monkeypatch.setattr(handles.ray, "get", lambda *_, **__: (_ for _ in ()).throw(error))
    monkeypatch.setattr(handles.ray, "wait", lambda calls, **_: (calls, []))
    with pytest.raises(ClusterError, match=r"^generator-1 died while 'generate': .") as lost:
        wait_for({"call": "generator-1"}, 1, "generate")
    assert "Traceback" not in str(lost.value)


@pytest.mark.parametrize(
    ("cause", "kind", "waited"),
    [
        ("gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.3]:40725", ClusterError, 65),
        ("size mismatch", RuntimeError, 5),
    ],
)
def test_a_rank_that_lost_its_peer_waits_for_the_news_that_the_peer_s_node_is_gone(monkeypatch, cause, kind, waited):
    """Ray knows of a node after up to 64 s; the connections of its processes may break at once."""
    now = [0.0]

    def get(calls, timeout):
        if calls == "gone" and now[0] < 64:
            raise GetTimeoutError
        raise NodeDiedError("its node has died") if calls == "gone" else cut.as_instanceof_cause()

    def wait(calls, num_returns, timeout):
        now[0] += timeout
        return calls[:1], calls[1:]

    cut = RayTaskError("update", f"Traceback\nRuntimeError: {cause}", RuntimeError(cause))
    monkeypatch.setattr(handles.ray, "get", get)
    monkeypatch.setattr(handles.ray, "wait", wait)
    monkeypatch.setattr(handles, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(kind) as error:
        wait_for({"cut": "learner-0", "gone": "learner-1"}, 100, "update")
    assert now[0] == pytest.approx(waited, abs=1)
    assert kind is RuntimeError or error.value.lost == {"learner-1"}


def test_a_generator_whose_engine_failed_is_lost(monkeypatch):
    broken = RayTaskError("generate", "Traceback", EngineFailed("its engine failed (RuntimeError: Executor failed.)"))
    answers = {"well": None, "broken": broken.as_instanceof_cause()}

    def get(calls, timeout):
        for call in [calls] if isinstance(calls, str) else calls:
            if answers[call]:
                raise answers[call]

    monkeypatch.setattr(handles.ray, "get", get)
    with pytest.raises(ClusterError, match=r"^generator-1: its engine failed \(RuntimeError") as lost:
        wait_for({"well": "generator-0", "broken": "generator-1"}, 1, "generate")
    assert lost.value.lost == {"generator-1"}


def test_a_kernel_that_may_not_be_asked_says_nothing(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000")  # without memory.events beside it
    monkeypatch.setattr(cause, "CGROUPS", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert of_kernel(2**22 + 1) == ""
