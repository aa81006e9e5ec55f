"""deploy/skypilot.yaml: after which ends of a run its job starts again. tests/integration has it read by SkyPilot."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

TASK = yaml.safe_load((Path(__file__).parents[3] / "deploy" / "skypilot.yaml").read_text())


@pytest.mark.parametrize(
    ("end", "code"),
    [("exit 0", 0), ("exit 2", 2), ("exit 3", 3), ("exit 130", 130), ("exit 143", 143), ("kill -TERM $$", 143),
     ("kill -KILL $$", 137), ("kill -ABRT $$", 134), ("kill -SEGV $$", 139)],
)  # fmt: skip
def test_what_may_end_otherwise_the_next_time_starts_again(tmp_path: Path, end: str, code: int):
    """SkyPilot compares what Popen returns of such a shell. A signal is 128 and more only if that shell lives on."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\nulimit -c 0\n{end}\n")
    python.chmod(0o755)
    (tmp_path / "run.sh").write_text(TASK["run"])
    done = subprocess.run(
        "/bin/bash -i run.sh", shell=True, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
        check=False, start_new_session=True, env={**os.environ, "HOME": str(tmp_path), **TASK["envs"]},
    )  # fmt: skip
    assert done.returncode == code
    again = TASK["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert (code in again) == (code not in (0, 2, 130))
