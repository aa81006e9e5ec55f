"""Real runs that lose something. `make faults` runs all of these tests; those marked slow are part of `make slow`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.launched import STARTED, check_records, command, finish
from tests.faults.table import markdown, read
from tests.integration.conftest import config, dataset, prompts, tiny_model, token_environment

__all__ = ["config", "dataset", "prompts", "tiny_model", "token_environment"]  # fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("faults")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Of a test that fails, too."""
    yield
    for launch in STARTED:
        launch.kill_all()
    STARTED.clear()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny_model: str) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    finish(command(folder, "whole", tiny_model), folder / "whole")
    check_records(folder / "whole")
    return folder / "whole"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if rows := read():
        terminalreporter.section("faults")
        terminalreporter.write_line(markdown(rows))
