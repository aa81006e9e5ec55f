#!/usr/bin/env bash
# Makes the environment in .venv: EXTRAS=cpu,dev (default) or gpu,dev or gpu,flash,dev; PYTHON=/path/to/one to choose it.
# Called by make. Exit code 2: the machine lacks something, and one line has said what and what to type.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${EXTRAS:-cpu,dev}
uv='uv>=0.8,<1'
say() { printf '[setup] %s\n' "$*"; }

any=${PYTHON:-python3}
command -v "$any" >/dev/null || { say "there is no $any here: install Python 3 with its module venv" >&2; exit 2; }
python=$("$any" deploy/check_machine.py "$extras") || exit 2

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then # not there, interrupted, or its Python is gone
  if [[ "$python" == "uv "* ]]; then
    say "no Python that fits pyproject.toml is here ($(python3 --version)): uv brings one"
    bootstrap=$(mktemp -d)
    trap 'rm -rf "$bootstrap"' EXIT
    if ! bring=$(command -v uv); then
      python3 -m venv "$bootstrap"
      "$bootstrap/bin/python" -m pip install --quiet "$uv"
      bring=$bootstrap/bin/uv
    fi
    "$bring" venv --quiet --seed --clear --python "$(sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)" .venv || {
      say "uv could not bring one: ${python#uv }; then again: make setup" >&2
      exit 2
    }
  elif "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear .venv
  else # Debian's Python without its package venv, but uv is here
    uv venv --quiet --seed --clear --python "$python" .venv
  fi
fi
say "environment in .venv with $(.venv/bin/python --version), extras: $extras"
say "uv, which installs and compiles the rest in a minute once its cache is warm"
.venv/bin/python -m pip install --quiet "$uv"
say "packages of pyproject.toml"
.venv/bin/python deploy/install_packages.py "$extras"
.venv/bin/python deploy/repair_environment.py
say "done"
