"""A folder full of secrets, packed by Ray's own code: none of them travels, and all that a job needs does."""

import fnmatch
import glob
import importlib.util
import itertools
import os
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
TOKENS = ["hf_token2", "token_prod.json", "token-july", "TOKEN.copy", "tokenInfo.json", "my_tokenfile", "token.txt.bak",
          "tokenizer_token.json", "all_tokens_map.json", "added_tokens.json.txt"]  # fmt: skip
NOTES = ["NOTES", "notes.md", "Notes.txt", "diary.md", "todo", "TODO.txt", "letter.docx", "paper.pdf", "tries.ipynb",
         "run.log", "my.sqlite3"]  # fmt: skip
NEEDED = [
    *("my_reward.py", "my/data_of_mine.py", "mine.yaml", "my/template.txt", "aliases.yaml", "labels.csv"),
    *("photos/rose/1.jpg", "photos/musical notes/2.jpg", "photos/rapid_monkey.jpg", "configs/keyboards.yaml"),
    *("rft_cluster/token_count.py", "rft_cluster/deep/secret_santa.py"),
    *("token_length.py", "my/my_tokens.py", "my/Token.py", "my/tokenizer/vocab.json", "configs/tokenizer.yaml"),
    *("models/mine/tokenizer.json", "models/mine/tokenizer_config.json", "models/mine/tokenizer.model"),
]
# Of a model, too. SkyPilot's patterns can have no exceptions, and in Docker's they would let such files in everywhere.
EXCEPTIONS = ["models/mine/special_tokens_map.json", "models/mine/added_tokens.json"]


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
    cases = [*words, *map(str.upper, words), *map(str.title, words), *TOKENS, *NOTES, "SERVER.PEM", "Server.Key"]
    chosen = random.Random(0)
    return [str(Path(chosen.choice(FOLDERS), name)) for name in cases] + [
        str(Path(folder, name)) for folder in FOLDERS for name in (*HIDDEN, *KEYS, *OTHERS)
    ]


def test_no_secret_travels_and_all_code_does(upload, tmp_path: Path):
    folder = tmp_path / "project"
    needed = [*NEEDED, *EXCEPTIONS]
    hidden = ["runs/mine/model/added_tokens.json", "my/secrets/special_tokens_map.json", "tests/token_length.py"]
    for name in (*secrets(), *hidden, *needed):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY if name not in needed else "needed")
    packed = upload.pack(folder, tmp_path / "package.zip")
    with ZipFile(tmp_path / "package.zip") as package:
        files = [name for name in packed if not name.endswith("/")]
        leaked = [name for name in files if CANARY in package.read(name).decode()]
    assert leaked == []
    assert set(needed) <= set(packed)
    named = upload.left_out(folder, packed)
    assert {"id_rsa", "server.pem", "photos/rose/prod.env"} <= set(named), "they are said"
    assert not set(named) & set(needed)


def test_code_that_stays_here_is_always_named(upload):
    """Its absence shows on the cluster only. Of others some are."""
    names = [f"{number}.key" for number in range(20)]
    some = [*names[: upload.LISTED]]
    assert upload.listed(names) == ", ".join([*some, "and 12 more"])
    names[15] = "my/secret_reward.py"
    assert upload.listed(names) == ", ".join(["my/secret_reward.py", *some, "and 11 more"])
    assert upload.listed(names[14:]) == ", ".join(["my/secret_reward.py", "14.key", *names[16:]])


def test_the_project_itself_travels_whole(upload, tmp_path: Path):
    packed = set(upload.pack(ROOT, tmp_path / "package.zip"))
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "rft_cluster").rglob("*") if path.suffix in (".py", ".txt")
    }
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert sources | configs | {"pyproject.toml"} <= packed
    assert not [name for name in packed if name.startswith((".", "tests", "docs", "runs"))]


def test_skypilot_leaves_the_same_here_and_takes_all_code():
    """It has the same patterns, without exceptions; a file of the package that they name would be missing there."""
    ours = yaml.safe_load((ROOT / "deploy" / "runtime_env.yaml").read_text())["excludes"]
    theirs = [line for line in (ROOT / ".skyignore").read_text().splitlines() if not line.startswith("#")]
    assert theirs == [pattern for pattern in ours if pattern != "*.md" and not pattern.startswith("!")]
    code = [path for folder in ("rft_cluster", "configs", "deploy") for path in (ROOT / folder).rglob("*")]
    files = [path for path in code if path.is_file() and "__pycache__" not in path.parts]
    assert not [path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in theirs)]


def test_skypilot_takes_no_secret(tmp_path: Path):
    """It looks for its patterns by `glob` (sky/data/storage_utils.py)."""
    needed = [name for name in NEEDED if Path(name).name != "secret_santa.py"]
    for name in (*secrets(), *needed):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    lines = [line for line in (ROOT / ".skyignore").read_text().splitlines() if not line.startswith("#")]
    found = {name.rstrip("/") for line in lines for name in glob.glob(f"**/{line}", root_dir=tmp_path, recursive=True)}

    def stays(name: str) -> bool:
        return bool({name, *map(str, Path(name).parents)} & found)

    assert [name for name in secrets() if not stays(name) and not name.endswith(".md")] == []
    assert [name for name in needed if stays(name)] == []


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
    ours = [pattern for pattern in ours if pattern.lstrip("!") not in map(os.path.basename, EXCEPTIONS)]
    theirs = [pattern if pattern.startswith("!") else f"**/{pattern.rstrip('/')}" for pattern in ours]
    theirs = [pattern.replace("[!", "[^") for pattern in theirs]
    assert lines[-len(theirs) - 1 :] == [*theirs, "!README.md"]
    left_out = stays_out_of_an_image(lines)
    folders = ["deploy", "rft_cluster", "configs", "benchmarks"]
    hidden = [f"{folder}/{name}" for folder, name in zip(itertools.cycle(folders), secrets(), strict=False)]
    assert [name for name in (*secrets(), *hidden) if not left_out(name)] == []
    needed = [name for name in NEEDED if name.startswith(tuple(folders))]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    code = [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts and path.suffix != ".md"]
    assert len(needed) == 4 and len(code) > 100
    model = [f"configs/{name}" for name in NEEDED if name.startswith("models")]
    assert [name for name in (*needed, *model, *code, "pyproject.toml", "README.md") if left_out(name)] == []
