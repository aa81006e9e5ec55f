"""The GPU kit's own logic: parts of a bounded size, and the look at what is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu_check.checklist import DEADLINE

KIT = Path(__file__).parents[3] / "deploy" / "gpu_kit"


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(KIT))
    import installed

    return installed


def test_parts_put_together_are_the_streams(tmp_path):
    streams = {"a": b"a" * 3_000_000, "b": b"b" * 500_000, "c": b"c" * 10}
    for name, content in streams.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, str(KIT / "parts.py"), str(tmp_path / "parts"), "2", "a", "b", "--", "c"]
    (tmp_path / "parts").mkdir()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = dict.fromkeys(streams, b"")
    for number in ("1", "2", "3"):
        part = tmp_path / "parts" / number
        pieces = [line.split() for line in (part / "pieces").read_text().splitlines()]
        assert sum((part / file).stat().st_size for file, *_ in pieces) <= 2 * 2**20
        for file, stream, start, _ in pieces:
            assert len(found[stream]) == int(start)
            found[stream] += (part / file).read_bytes()
    assert found == streams
    assert [line.split()[1] for line in (tmp_path / "parts" / "3" / "pieces").read_text().splitlines()] == ["c"]


def test_a_check_that_hangs_is_recorded_within_the_limit_of_its_tier():
    limits = re.findall(r"LIMIT:-(\d+)", (KIT / "step.sh").read_text())
    assert limits and all(float(limit) > DEADLINE for limit in limits)


def versions(monkeypatch, installed, **others):
    """All that is wanted is there, but for `others`: name -> version."""
    pinned = {name: pin for layer in ("learner", "ray", "vllm") for name, pin in installed.wanted(layer).items()}
    own = dict.fromkeys(installed.OWN + installed.BESIDE, "1.0") | {"torch": "2.11.0+cu130"}
    there = pinned | own | others
    monkeypatch.setattr(installed, "found", lambda name: (there[name], "/site"))


@pytest.mark.parametrize("tier", ["learner", "shared"])
def test_nothing_is_missing(monkeypatch, installed, tier):
    versions(monkeypatch, installed)
    assert installed.lacks(tier) == []


@pytest.mark.parametrize(
    ("tier", "others", "said"),
    [
        ("learner", {"torchvision": ""}, "torchvision: the machine's own is needed"),
        ("shared", {"scipy": "", "pandas": ""}, "pandas, scipy: the machine's own is needed"),
        ("learner", {"torch": "2.10.1"}, "torch 2.10.1 is none of 2.11 to 2.13"),
        ("learner", {"torch": "2.14.0"}, "torch 2.14.0 is none of 2.11 to 2.13"),
        (
            "learner",
            {"peft": "", "tqdm": ""},
            r"peft [\d.]+, tqdm [\d.]+: a part with the layer learner \(build.sh\) brings them",
        ),
        # Of the machine: it would ignore the image in silence.
        ("learner", {"transformers": "5.17.0"}, r"transformers 5\.19\.0: a part"),
        ("digits", {"ray": ""}, r"ray [\d.]+: a part with the layer ray"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, installed, tier, others, said):
    versions(monkeypatch, installed, **others)
    (line,) = installed.lacks(tier)
    assert re.match(said, line)


def test_the_learner_does_without_ray_and_vllm(monkeypatch, installed):
    versions(monkeypatch, installed, ray="", vllm="", scipy="")
    assert installed.lacks("learner") == []


def test_versions_are_shown_by_folder(monkeypatch, installed, capsys):
    there = {"torch": ("2.11.0", "/machine"), "peft": ("0.21.2", "/kit"), "tqdm": ("4.70.1", "/kit"), "ray": ("", "")}
    monkeypatch.setattr(installed, "found", there.get)
    installed.show(there)
    assert capsys.readouterr().out == "/machine: torch 2.11.0\n/kit: peft 0.21.2, tqdm 4.70.1\n"


def _commands_without(name, folder):
    """A PATH of this machine's commands but one. Of two with a name the first counts, as always."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for command in Path(place).glob("*"):
            if command.name != name and not (folder / command.name).is_symlink():
                (folder / command.name).symlink_to(command)
    return str(folder)


@pytest.mark.parametrize("unpacked_by", ["xz", "Python"])
def test_a_machine_that_keeps_no_bytecode_keeps_it_here(unpacked_by, tmp_path):
    """Else each process of a tier would compile anew what it imports. Not every machine has xz."""
    project = tmp_path / "project"
    (project / "deploy" / "gpu_kit").mkdir(parents=True)
    shutil.copy(KIT / "step.sh", project / "deploy" / "gpu_kit")
    part = tmp_path / "parts" / "1"
    (tmp_path / "parts").mkdir()
    with tarfile.open(tmp_path / "project.tar.xz", "w:xz") as stream:
        stream.add(project, ".")
    subprocess.run(
        [sys.executable, str(KIT / "parts.py"), str(part.parent), "2", "project.tar.xz"], cwd=tmp_path, check=True
    )
    shutil.copy(KIT / "on_device.sh", part)
    there = {**os.environ, "KIT": str(tmp_path / "kit"), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    if unpacked_by == "Python":
        there["PATH"] = _commands_without("xz", tmp_path / "commands")
    subprocess.run(["bash", str(part / "on_device.sh")], env=there, check=True, capture_output=True)
    look = f'. {tmp_path}/kit/env.sh; echo "$PYTHONPATH ${{PYTHONDONTWRITEBYTECODE-writes}}"'
    said = subprocess.run(["bash", "-c", look], env=there, check=True, capture_output=True, text=True).stdout
    assert said.split() == [f"{tmp_path}/kit/project:{tmp_path}/kit/site", "writes"]
