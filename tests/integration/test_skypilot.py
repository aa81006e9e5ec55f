"""deploy/skypilot.yaml, read by SkyPilot itself, which is installed apart for that (300 MB) and asks no cloud."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import BIN

ROOT = Path(__file__).parents[2]
SKYPILOT = "skypilot==0.14.1"
READ = """
import json, sys
import sky
from sky.data.storage_utils import get_excluded_files
folder, *files = sys.argv[1:]
found = []
for file in files:
    try:
        task = sky.Task.from_yaml(file)
    except Exception as error:
        found.append(str(error))
        continue
    [machine] = task.resources
    [(place, storage)] = task.storage_mounts.items()
    on = [task.num_nodes, machine.use_spot, str(machine.cloud), machine.job_recovery]
    found.append([*on, place, storage.mode.value, task.run])
print(json.dumps([found, get_excluded_files(folder)]))
"""
SECRETS = [".env", "my/.env.local", ".ssh/id_rsa", "my/server.pem", "my/API_KEY.txt", "credentials.json", "my/prod.env"]
NEEDED = ["pyproject.toml", "README.md", "my_reward.py", "my/template.txt", "photos/rose/1.jpg"]
MISTAKES = {
    "num_nodes": "num_node",
    "use_spot": "use_spots",
    "infra": "infras",
    "workdir": "work_dir",
    "setup": "set_up",
    "store": "stores",
}


@pytest.mark.slow
def test_skypilot_reads_the_task_and_leaves_secrets_here(tmp_path: Path):
    text = (ROOT / "deploy" / "skypilot.yaml").read_text()
    files = [ROOT / "deploy" / "skypilot.yaml"]
    for right, wrong in MISTAKES.items():
        files.append(tmp_path / f"{wrong}.yaml")
        files[-1].write_text(text.replace(f"{right}:", f"{wrong}:", 1))
    folder = tmp_path / "project"
    for name in (*SECRETS, *NEEDED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".skyignore").write_bytes((ROOT / ".skyignore").read_bytes())
    script = tmp_path / "read.py"
    script.write_text(READ)
    apart = [BIN / "uv", "run", "--quiet", "--no-project", "--isolated", "--python", sys.executable, "--with", SKYPILOT]
    done = subprocess.run(
        [*apart, "python", script, folder, *files], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [task, *mistakes], excluded = json.loads(done.stdout.splitlines()[-1])
    *facts, command = task
    # `max_restarts_on_errors` is for all other codes, and a user's mistake (2) ends in the same way again.
    recovery = {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [3, 134, 137, 139, 143]}
    assert facts == [1, True, "AWS", recovery, "/runs", "MOUNT_CACHED"]
    assert "--resume=auto run.folder=/runs" in command
    for wrong, said in zip(MISTAKES.values(), mistakes, strict=True):
        assert wrong in said, "SkyPilot knows no such key"
    left = {name for name in SECRETS + NEEDED if {name, *map(str, Path(name).parents)} & set(excluded)}
    assert left == set(SECRETS)
