"""The doctor of this machine, and of the same machine with four things broken."""

import json
import os
import shutil
import subprocess
import sys

import pytest

DOCTOR = [sys.executable, "-m", "rft_cluster.doctor"]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR")}


def test_a_good_machine_passes_and_nothing_is_written(tmp_path):
    words = [*DOCTOR, "--config", "digits", f"run.folder={tmp_path}", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=CLEAN, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert {name: one for name, one in findings.items() if one["status"] == "error"} == {}
    assert {"python", "ray", "gpu", "disk", "network", "data", "import torch", "import vllm"} <= findings.keys()
    assert not list(tmp_path.iterdir()), "it writes nothing"


def test_each_broken_part_is_named_with_its_cure(tmp_path):
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a /dev/shm of its own needs root and unshare")
    broken = tmp_path / "torch-2.9.1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Name: torch\nVersion: 2.9.1\n")
    (tmp_path / "vllm.py").write_text("import no_such_module_of_vllm\n")
    environment = CLEAN | {"PYTHONPATH": str(tmp_path), "RAY_TMPDIR": f"/tmp/{'x' * 90}"}
    tiny = "mount -t tmpfs -o size=16m tmpfs /dev/shm"
    words = ["unshare", "--mount", "sh", "-ec", f'{tiny}; exec "$@"', "sh", *DOCTOR]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    bad = {
        line[:20].strip(): line[20:] for line in done.stdout.splitlines() if line[20:28].strip() in ("error", "warning")
    }
    assert bad.keys() == {"torch", "shared memory", "ray", "import vllm"}, done.stdout
    assert bad["torch"].startswith("error    2.9.1 (tried: ")
    assert bad["torch"].endswith(": make setup")
    assert bad["shared memory"].startswith("warning  /dev/shm has 17 MB free, and Ray's object store takes ")
    assert bad["ray"].endswith("export RAY_TMPDIR=/tmp, or another short path")
    assert (
        "No module named 'no_such_module_of_vllm'. See system above, or install anew: make setup" in bad["import vllm"]
    )
    assert done.stdout.splitlines()[-1].startswith("3 errors and 1 warning: ")
