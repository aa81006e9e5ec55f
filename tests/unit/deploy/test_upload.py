"""A folder full of secrets, packed by Ray's own code: none of them travels, and all that a job needs does."""

import fnmatch
import importlib.util
import itertools
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

ROOT = Path(__file__).parents[3]
CANARY = "canary-3f9b"
FOLDERS = ["", "my", "my/deep/folder", "rft_cluster", "configs", "photos/rose"]
HIDDEN = [".env", ".env.local", ".netrc", ".aws/credentials", ".ssh/id_ed25519", ".kube/config", ".git/config"]
KEYS = ["server.pem", "server.key", "x.p12", "x.pfx", "putty.ppk", "id_rsa", "id_rsa.pub", "id_ed25519", "id_ecdsa.old"]
OTHERS = ["kubeconfig.yaml", "vault.kdbx", "terraform.tfstate", "prod.env", "prod.env.bak", "_netrc"]
WORDS = ["secret", "token", "credential", "password", "passwd", "passphrase", "apikey", "api_key", "api-key",
         "service-account", "service_account"]  # fmt: skip
SUFFIXES = ["", "s", ".txt", ".json", ".yaml", ".yml", ".csv", ".toml", ".ini"]
NOTES = ["NOTES", "notes.md", "Notes.txt", "diary.md", "todo", "TODO.txt", "letter.docx", "paper.pdf", "tries.ipynb",
         "run.log", "my.sqlite3"]  # fmt: skip
NEEDED = [
    *("my_reward.py", "my/data_of_mine.py", "mine.yaml", "my/template.txt", "aliases.yaml", "labels.csv"),
    *("photos/rose/1.jpg", "photos/musical notes/2.jpg", "photos/rapid_monkey.jpg", "configs/keyboards.yaml"),
    *("rft_cluster/token_count.py", "rft_cluster/deep/secret_santa.py"),
]


@pytest.fixture(scope="module")
def upload():
    spec = importlib.util.spec_from_file_location("upload", ROOT / "deploy" / "upload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def secrets() -> list[str]:
    """Names of every kind, in every writing that people use, in every folder."""
    words = [f"{word}{suffix}" for word, suffix in itertools.product(WORDS, SUFFIXES)]
    words += [f"{before}{word}{suffix}" for before in ("my_", "prod-", "aws") for word in WORDS for suffix in SUFFIXES]
    cases = [*words, *map(str.upper, words), *map(str.title, words), *NOTES, "SERVER.PEM", "Server.Key"]
    chosen = random.Random(0)
    return [str(Path(chosen.choice(FOLDERS), name)) for name in cases] + [
        str(Path(folder, name)) for folder in FOLDERS for name in (*HIDDEN, *KEYS, *OTHERS)
    ]


def test_no_secret_travels_and_all_code_does(upload, tmp_path: Path):
    folder = tmp_path / "project"
    for name in (*secrets(), *NEEDED):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY if name not in NEEDED else "needed")
    packed = upload.pack(folder, tmp_path / "package.zip")
    with ZipFile(tmp_path / "package.zip") as package:
        files = [name for name in packed if not name.endswith("/")]
        leaked = [name for name in files if CANARY in package.read(name).decode()]
    assert leaked == []
    assert set(NEEDED) <= set(packed)
    named = upload.left_out(folder, packed)
    assert {"id_rsa", "server.pem", "photos/rose/prod.env"} <= set(named), "they are said"
    assert not set(named) & set(NEEDED)


def test_the_project_itself_travels_whole(upload, tmp_path: Path):
    packed = set(upload.pack(ROOT, tmp_path / "package.zip"))
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "rft_cluster").rglob("*") if path.suffix in (".py", ".txt")
    }
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert sources | configs | {"pyproject.toml"} <= packed
    assert not [name for name in packed if name.startswith((".", "tests", "docs", "runs"))]


def test_skypilot_leaves_the_same_here_and_takes_all_code():
    """It has patterns of its own, without exceptions; a file of the package that they name would be missing there."""
    ours = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["excludes"]
    theirs = [line for line in (ROOT / ".skyignore").read_text().splitlines() if not line.startswith("#")]
    assert theirs == [pattern for pattern in ours if pattern != "*.md" and not pattern.startswith("!")]
    code = [path for folder in ("rft_cluster", "configs", "deploy") for path in (ROOT / folder).rglob("*")]
    files = [path for path in code if path.is_file() and "__pycache__" not in path.parts]
    assert not [path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in theirs)]


@cache
def as_docker_reads(pattern: str) -> "re.Pattern[str]":
    parts = re.findall(r"\*\*/|\*|\?|\[[^]]*\]|.", pattern)
    meaning = {"**/": "(.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, part if part[0] == "[" else re.escape(part)) for part in parts))


def stays_out_of_an_image(lines: list[str]) -> Callable[[str], bool]:
    """Whether Docker leaves a path out: the last line that matches it or a folder above it decides."""

    def left_out(name: str) -> bool:
        paths = [name, *(str(folder) for folder in Path(name).parents if folder.name)]
        matching = [line for line in lines if any(map(as_docker_reads(line.removeprefix("!")).fullmatch, paths))]
        return bool(matching) and not matching[-1].startswith("!")

    return left_out


def test_no_secret_reaches_an_image_and_all_code_does():
    """Whatever of a folder of the user's reaches a build lies in one of these."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    ours = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["excludes"]
    theirs = [pattern if pattern.startswith("!") else f"**/{pattern.rstrip('/')}" for pattern in ours]
    assert lines[-len(theirs) - 1 :] == [*theirs, "!README.md"]
    left_out = stays_out_of_an_image(lines)
    folders = ["deploy", "rft_cluster", "configs", "benchmarks"]
    hidden = [f"{folder}/{name}" for folder, name in zip(itertools.cycle(folders), secrets(), strict=False)]
    assert [name for name in (*secrets(), *hidden) if not left_out(name)] == []
    needed = [name for name in NEEDED if name.startswith(tuple(folders))]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    code = [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts and path.suffix != ".md"]
    assert len(needed) == 3 and len(code) > 100
    assert [name for name in (*needed, *code, "pyproject.toml", "README.md") if left_out(name)] == []
