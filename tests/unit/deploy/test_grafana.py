"""The dashboard and the page of series are made from the definitions, and Prometheus can read every query."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.grafana.make import DASHBOARD, NODE, PAGE, ROOT, dashboard_json, page, panels
from rft_cluster.cluster.metrics import SERIES

QUERIES = [query for panel in panels() for query in panel.queries.values()]


def test_the_files_are_what_the_definitions_make():
    again = "again: python deploy/grafana/make.py"
    assert DASHBOARD.read_text() == dashboard_json(), again
    assert PAGE.read_text() == page(), again


def test_every_series_has_a_panel_and_no_query_asks_for_another():
    asked = {name for query in QUERIES for name in re.findall(r"\bray_\w+", query)}
    assert asked == {series.exported for series in SERIES} | {*NODE}


def test_the_dashboard_has_every_panel_with_its_queries_and_no_two_overlap():
    board = json.loads(DASHBOARD.read_text())
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in shown] == [panel.title for panel in panels()]
    assert [target["expr"] for panel in shown for target in panel["targets"]] == QUERIES
    places = {
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    }
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in board["panels"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed: apt-get install prometheus"
)


@needs_promtool
def test_the_use_of_gpus_by_phase_from_series_as_ray_makes_them(tmp_path: Path):
    """Two GPUs, of which one does nothing while the learners work; each phase lasts a minute. Then the driver was
    killed, and the run goes on in another process."""
    (query,) = (panel.queries["{{phase}}"] for panel in panels() if panel.title == "GPU use by phase")
    gpu = 'ray_node_gpus_utilization{instance="a:1", GpuIndex="%d", WorkerId=""}'
    phase = 'ray_rft_phase{run="%s", phase="%s", WorkerId="%s"}'
    rules = {"groups": [{"name": "panels", "rules": [{"record": "use", "expr": query.replace("$run", "digits")}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    tests = {
        "rule_files": ["rules.yml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": gpu % 0, "values": "80 0 10"},
                    {"series": gpu % 1, "values": "60 90 30"},
                    {"series": phase % ("digits", "generate", "0a"), "values": "1 0 0"},
                    {"series": phase % ("digits", "learn", "0a"), "values": "0 1 1"},
                    {"series": phase % ("digits", "generate", "0b"), "values": "_ _ 1"},
                    {"series": phase % ("another", "evaluate", "0c"), "values": "1 1 1"},
                ],
                "promql_expr_test": [
                    {
                        "expr": "use",
                        "eval_time": at,
                        "exp_samples": [{"labels": f'use{{phase="{name}"}}', "value": value} for name in names],
                    }
                    for at, names, value in (
                        ("0m", ["generate"], 70),
                        ("1m", ["learn"], 45),
                        ("2m", ["generate", "learn"], 20),
                    )
                ],
            }
        ],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    words = ["promtool", "test", "rules", "tests.yml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_reads_every_query_and_the_configuration(tmp_path: Path):
    asked = [query.replace("$__rate_interval", "1m").replace("$run", "digits") for query in QUERIES]
    rules = [{"record": f"rule_{number}", "expr": query} for number, query in enumerate(asked)]
    file = tmp_path / "rules.yml"
    for broken in (False, True):
        rules[0]["expr"] += ")" * broken
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
        assert done.returncode == (1 if broken else 0), done.stdout + done.stderr
    config = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
