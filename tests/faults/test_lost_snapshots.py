"""The learners' node is lost, and with it their snapshots in memory: the checkpoint serves."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.launched import command, has_done, start
from tests.faults.table import Row
from tests.faults.test_lost_actors import ends_as_if_undisturbed, survives
from tests.integration.conftest import BIN
from tests.integration.head import ADDRESS, running_head, session_of, wait_until


@contextmanager
def node(environment: dict[str, str], log: Path, cpus: int) -> Iterator[subprocess.Popen]:
    """Another node of the head's cluster, when it has joined."""
    words = [BIN / "ray", "start", f"--address={ADDRESS}", "--block", f"--num-cpus={cpus}", "--disable-usage-stats",
             "--object-store-memory=100000000"]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(), 60, "a node has joined")
        yield process
    finally:
        lose(process)


def lose(node: subprocess.Popen) -> None:
    """End a node as a power cut does."""
    for process in session_of(node.pid):
        process.kill()
    node.wait()


@pytest.mark.timeout(900)
def test_learners_whose_snapshots_are_gone_with_their_node_go_on_from_the_checkpoint(
    undisturbed, tmp_path, tiny_model, token_environment
):
    overrides = ["learners.cpus=1", "cluster.snapshot_every=1", "cluster.start_timeout=120"]
    with running_head(token_environment, tmp_path, cpus=1) as environment:  # no room for the learners
        variables = environment | {"RAY_ADDRESS": ADDRESS}
        logs = tmp_path / "one.log", tmp_path / "other.log"
        with node(environment, logs[0], cpus=3) as one, node(environment, logs[1], cpus=3) as other:
            launch = start(command(tmp_path, "mine", tiny_model, *overrides), tmp_path / "mine", **variables)
            launch.token = Path(environment["RAY_AUTH_TOKEN_PATH"])
            launch.until(has_done(6), "step 6")
            learner = launch.actors()["learner-0"]
            (theirs,) = (node for node in (one, other) if os.getsid(learner) == node.pid)
            found, lost, warning = survives(launch, lambda: lose(theirs))
            assert "learner-0" in warning and "learner-1" in warning, warning
            assert "goes on after step 4 of 12" in launch.text()
            ends_as_if_undisturbed(launch, undisturbed)
    Row(25, "learners and their snapshots gone with their node", "after step 6", found, lost, True, True).write()
