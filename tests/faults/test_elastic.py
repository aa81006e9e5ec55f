"""Generators that come and go in mid-run, with a node of a running cluster."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.launched import check_records, command, has_done, shows, start
from tests.faults.table import Row
from tests.faults.test_lost_actors import survives
from tests.integration.conftest import BIN
from tests.integration.head import ADDRESS, running_head, session_of

STEPS = 60


@contextmanager
def node(environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """Another node of the head's cluster, with room for one generator."""
    words = [BIN / "ray", "start", f"--address={ADDRESS}", "--block", "--num-cpus=1", "--disable-usage-stats",
             "--object-store-memory=100000000"]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        lose(process)


def lose(node: subprocess.Popen) -> None:
    """End a node as a power cut does."""
    for process in session_of(node.pid):
        process.kill()
    node.wait()


@pytest.mark.timeout(900)
def test_a_generator_comes_with_a_node_and_goes_with_it(tmp_path, tiny_model, token_environment):
    run = tmp_path / "mine"
    overrides = [f"schedule.steps={STEPS}", "generators.count=2", "generators.min=1", "cluster.start_timeout=120"]
    with running_head(token_environment, tmp_path) as environment:
        # The head has room for the learners and one generator.
        variables = environment | {"RAY_ADDRESS": ADDRESS}
        launch = start(command(tmp_path, "mine", tiny_model, *overrides), run, **variables)
        launch.token = Path(environment["RAY_AUTH_TOKEN_PATH"])
        launch.until(has_done(3), "step 3, with one generator")
        assert sum(name.startswith("generator") for name in launch.actors()) == 1
        with node(environment, tmp_path / "node.log") as other:
            launch.until(shows("is ready, and gets the weights"), "a generator comes", 120)
            assert sum(name.startswith("generator") for name in launch.actors()) == 2
            came = launch.steps()
            launch.until(has_done(came + 3), "three steps with two generators")
            found, lost, warning = survives(launch, lambda: lose(other))
            assert "generator-" in warning
        launch.ends(0)
    check_records(run, STEPS, evaluations=2 + STEPS // 5)
    Row(23, "a generator comes in mid-run", f"after step {came}", ledger=True).write()
    Row(23, "a generator goes with its node", f"after step {came + 3}", found, lost, ledger=True).write()
