#!/usr/bin/env bash
# Makes the environment in .venv: EXTRAS=cpu,dev (default) or gpu,dev or gpu,flash,dev. Called by make.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${EXTRAS:-cpu,dev}
say() { printf '[setup] %s\n' "$*"; }

say "environment in .venv with $("${PYTHON:-python3}" --version), extras: $extras"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
say "uv, which installs the rest in well under a minute once its cache is warm"
.venv/bin/python -m pip install --quiet 'uv>=0.8,<1'

# uv does not read pip's configuration, which may name a folder of wheels.
options=()
links=$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)
for link in $links; do options+=(--find-links "$link"); done
if [[ ",$extras," == *,cpu,* ]] && ! ls ${links:-/nowhere}/torch-*+cpu*.whl >/dev/null 2>&1; then
  # The CPU builds of torch and torchvision; from PyPI they would bring gigabytes of CUDA.
  options+=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
say "packages of pyproject.toml"
.venv/bin/uv pip install --quiet --python .venv/bin/python "${options[@]}" --editable ".[$extras]"
.venv/bin/python deploy/repair_environment.py
say "done"
