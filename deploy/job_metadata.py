"""Print what Ray's dashboard shows beside a job: run, configuration and commit, as JSON. For deploy/submit.sh.

    python deploy/job_metadata.py flower102      # {"run": "flower102", "config": "flower102", "commit": "9f86d08"}

It reads the configuration, so a mistake in it is told before anything is uploaded.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def metadata(config: str, overrides: list[str]) -> dict[str, str]:
    """Raises UserError if the configuration is wrong."""
    from rft_cluster.config import load_config

    return {"run": load_config(config, overrides).run.name, "config": config, "commit": commit()}


def commit() -> str:
    """The commit of this folder, with "+" if files differ from it; "none" if it is no clone."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # without git
        return "none"
    return found.stdout.strip() if found.returncode == 0 else "none"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from rft_cluster.common.errors import exit_code

    sys.exit(exit_code(lambda: print(json.dumps(metadata(sys.argv[1], sys.argv[2:])))))


if __name__ == "__main__":
    main()
