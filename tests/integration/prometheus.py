"""Debian's Prometheus beside a Ray head, with the configuration that users get."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.head import ROOT, wait_until

CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"  # in that configuration: of the newest Ray on the machine


@dataclass(frozen=True)
class Prometheus:
    address: str

    def ask(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.address}/api/v1/{path}?{query}", timeout=20) as answer:
            found = json.load(answer)["data"]
        return found["result"]

    def at(self, query: str, moment: float) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each answer to a query."""
        return [(one["metric"], float(one["value"][1])) for one in self.ask("query", query=query, time=moment)]


def is_here() -> bool:
    return shutil.which("prometheus") is not None


@contextmanager
def running_prometheus(discovery: Path, folder: Path) -> Iterator[Prometheus]:
    """Prometheus that asks every two seconds, and waits as long for an answer, until it is ended.

    `discovery`: the file of the head's session.
    """
    text = CONFIG.read_text().replace(DISCOVERY, str(discovery)).replace(": 10s", ": 2s")
    assert str(discovery) in text and "10s" not in text, "the configuration is no longer as this test knows it"
    config = folder / "prometheus.yml"
    config.write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={listen}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(["prometheus", *words], stdout=log, stderr=log)
    try:
        found = Prometheus(f"http://{listen}")
        wait_until(lambda: _answers(found), 30, "Prometheus answers")
        yield found
    finally:
        process.terminate()
        process.wait(30)


def _answers(prometheus: Prometheus) -> bool:
    try:
        return bool(prometheus.ask("query", query="up", time=time.time()))
    except OSError:
        return False
