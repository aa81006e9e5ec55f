"""The house rules, held against the source: what may import what, and a few things that are never written."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rft_cluster

ROOT = Path(rft_cluster.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module imports from its own folder and from those named here. `common`, `messages` and `config` are for all.
BASE = {"common", "messages", "config"}
MAY_IMPORT: dict[str, set[str]] = {
    "comparison": {"training", "data", "prompts", "classification", "run", "cluster", "model"},
    "warm_start": {"training", "classification", "run"},
    "training": {"train", "classification", "run", "cluster", "prompts"},
    "train": {"data", "prompts", "algorithm", "rewards", "classification", "run", "cluster"},
    "doctor": {"plan", "cluster", "run", "model", "data", "tracking"},
    "plan": {"cluster", "run", "model"},
    "watch": {"run", "report"},
    "report": {"run", "classification", "data", "prompts"},
    "tracking": {"run", "classification", "data"},
    "cluster": {"run", "generator", "learner", "rewards", "weights", "model"},
    "run": {"data", "prompts", "algorithm", "classification", "model"},
    "classification": {"data", "prompts", "rewards"},
    "learner": {"model", "weights", "algorithm"},
    "generator": {"model", "weights"},
    "weights": {"model"},
    "model": {"data", "prompts"},
    "rewards": {"prompts"},
    "algorithm": set(),
    "prompts": set(),
    "data": set(),
    "config": {"common"},
    "messages": {"common"},
    "common": set(),
}
# `python -m rft_cluster.NAME`: these import what they like but each other, and nobody imports them.
COMMANDS = {"__main__", "launch", "evaluate", "compare", "predict", "sweep"}
# Heavy packages belong to some folders alone; `torch` stands for all that comes with it.
ONLY = {
    "ray": {"cluster"},
    "vllm": {"generator", "weights"},
    "torch": {"algorithm", "model", "weights", "generator", "learner"},
    "torchvision": {"data", "model"},  # data: addresses and MD5s of Flower102, only when that is to be downloaded
}
WITH_TORCH = {"transformers", "tokenizers", "qwen_vl_utils", "peft"}
UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


@dataclass(frozen=True)
class Import:
    """`lazy`: inside a function, so not run when the importing module is imported."""

    file: str
    line: int
    name: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def part(name: str) -> str:
    """`rft_cluster.data.images` -> `data`; the folders' modules share a layer."""
    return name.split(".")[1]


def imports_in(tree: ast.AST, file: str) -> Iterator[Import]:
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: a relative import"
            names = [node.module]
            # `from rft_cluster.weights import receivers` names a module; that it may be a name in one does no harm.
            if node.module.split(".")[0] == "rft_cluster":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(file, node.lineno, name, id(node) in inside)


SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
TREES = {file: ast.parse(source) for file, source in SOURCES.items()}
IMPORTS = [found for file, tree in TREES.items() for found in imports_in(tree, file)]
MODULE_OF = {file: Path(file).parts[0].removesuffix(".py") for file in TREES if file != "__init__.py"}


def listed(violations: list[str]) -> str:
    return "\n" + "\n".join(violations)


def test_the_walk_sees_imports_of_every_form():
    ours = "from rft_cluster.model import policy, encoder\n"
    source = f"import ray.util\n{ours}from torch import nn\ndef f():\n    import vllm\n"
    found = [(one.name, one.lazy) for one in imports_in(ast.parse(source), "x.py")]
    assert found == [
        *(
            ("ray.util", False),
            ("rft_cluster.model.policy", False),
            ("rft_cluster.model.encoder", False),
            ("torch", False),
        ),
        ("vllm", True),
    ]
    assert len(IMPORTS) > 100


def may_import(importer: str, imported: str) -> bool:
    if importer in COMMANDS:
        return imported not in COMMANDS
    return imported == importer or imported in MAY_IMPORT[importer] | (
        BASE - {importer} if importer not in BASE else set()
    )


def test_every_folder_is_in_the_table():
    assert set(MODULE_OF.values()) == set(MAY_IMPORT) | COMMANDS


def test_the_table_goes_down():
    """Each folder imports only from those below it in the table, so there is no way round in a circle."""
    names = list(MAY_IMPORT)
    assert all(names.index(below) > names.index(name) for name, imports in MAY_IMPORT.items() for below in imports)


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("learner", "generator", False),
        ("generator", "learner", False),
        ("rewards", "learner", False),
        ("data", "rewards", False),
        ("common", "messages", False),
        ("launch", "predict", False),
        ("train", "launch", False),
        ("learner", "common", True),
        ("cluster", "generator", True),
        ("launch", "train", True),
    ],
)
def test_the_table_says_what_may_be_imported(importer: str, imported: str, expected: bool):
    assert may_import(importer, imported) is expected


def test_imports_follow_the_table():
    violations = [
        f"{found}, which {MODULE_OF[found.file]} may not"
        for found in IMPORTS
        if found.package == "rft_cluster"
        and found.file != "__init__.py"
        and not may_import(MODULE_OF[found.file], part(found.name))
    ]
    assert not violations, listed(violations)


def test_importing_the_package_costs_nothing():
    """Every command does, before it can say anything."""
    at_once = {"os", "sys", "rft_cluster.common.stopping"}
    assert {found.name for found in IMPORTS if found.file == "__init__.py"} == at_once
    assert {found.name for found in IMPORTS if found.file == "common/stopping.py"} <= {
        *("os", "signal", "time", "collections.abc", "contextlib", "types"),
    }


def test_heavy_packages_stay_in_their_folders():
    violations = []
    for found in IMPORTS:
        package = "torch" if found.package in WITH_TORCH else found.package
        if package in ONLY and MODULE_OF[found.file] not in ONLY[package]:
            violations.append(str(found))
    assert not violations, listed(violations)


def test_the_driver_never_imports_vllm():
    """Only the receivers import vLLM at module level, and other modules import the receivers lazily."""
    receiving = "weights/receivers.py"
    module = "rft_cluster." + receiving.removesuffix(".py").replace("/", ".")
    violations = [
        str(found)
        for found in IMPORTS
        if not found.lazy and found.file != receiving and (found.package == "vllm" or found.name.startswith(module))
    ]
    assert not violations, listed(violations)


def test_a_folder_of_the_package_imports_nothing_unasked():
    """A re-export in `cluster` would import Ray for a dry-run, one in `weights` vLLM in the driver."""
    public = {"data", "prompts", "rewards", "algorithm", "config"}
    violations = [
        str(found)
        for found in IMPORTS
        if found.file.endswith("/__init__.py")
        and found.file.split("/")[0] not in public
        and (found.file, found.name) != ("cluster/__init__.py", "os")  # for an environment variable of Ray's
    ]
    assert not violations, listed(violations)


def test_no_file_is_longer_than_400_lines():
    long = {file: lines for file, source in SOURCES.items() if (lines := len(source.splitlines())) > 400}
    assert not long


def test_no_function_is_longer_than_60_lines():
    long = {
        f"{file}: {node.name}": lines
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > 60
    }
    assert not long


def test_the_loop_fits_on_a_screen():
    (loop,) = [node for node in TREES["train.py"].body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert loop.end_lineno - loop.lineno + 1 <= 60


def test_no_attribute_has_a_silent_default():
    # getattr(x, "name", default) hides a misspelt or missing attribute.
    violations = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) + len(node.keywords) > 2
    ]
    assert not violations, listed(violations)


def swallows(handler: ast.ExceptHandler, source: str) -> bool:
    """Return True if a handler catches everything, does not end in `raise`, and gives no reason."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = {ast.unparse(one) if one else "" for one in caught}
    if "" in names:
        return True
    if not names & {"Exception", "BaseException"} or isinstance(handler.body[-1], ast.Raise):
        return False
    return "noqa: BLE001 - " not in source.splitlines()[handler.lineno - 1]


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        ("except:\n  raise", True),
        ("except Exception:\n  pass", True),
        ("except (ValueError, Exception):\n  pass", True),
        ("except BaseException:  # noqa: BLE001\n  pass", True),  # without the reason
        ("except BaseException:  # noqa: BLE001 - the caller raises it\n  pass", False),
        ("except Exception as error:\n  raise ValueError from error", False),
        ("except ValueError:\n  pass", False),
    ],
)
def test_a_handler_that_swallows_everything_is_seen(handler, expected):
    source = f"try:\n  pass\n{handler}\n"
    assert swallows(ast.parse(source).body[0].handlers[0], source) is expected


def test_no_handler_swallows_everything():
    violations = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and swallows(node, SOURCES[file])
    ]
    assert not violations, listed(violations)


def test_nothing_is_pickled():
    violations = [str(found) for found in IMPORTS if found.package in UNSAFE]
    violations += [
        f"{file}:{node.lineno} torch.{node.attr}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and ast.unparse(node.value) == "torch"
    ]
    assert not violations, listed(violations)


def test_the_page_shows_the_table():
    """docs/architecture.md is what people read; the table here is what holds."""
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    told = {
        folder: set() if may.strip() == "nothing else" else set(re.findall(r"`(\w+)`", may))
        for folders, may in rows
        for folder in re.findall(r"`(\w+)(?:/|\.py)`", folders)
    }
    assert told == {folder: may for folder, may in MAY_IMPORT.items() if folder not in ("messages", "config")}


def test_the_page_has_a_paragraph_for_each_folder_and_names_files_that_there_are():
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    paragraphs = dict(re.findall(r"^\*\*`([\w.]+)/?`\*\*:? (.*?)\n\n", page, re.MULTILINE | re.DOTALL))
    assert {name.removesuffix(".py") for name in paragraphs} == set(MAY_IMPORT)
    for name, text in paragraphs.items():
        folder = ROOT / name if (ROOT / name).is_dir() else ROOT
        missing = [file for file in re.findall(r"`(\w+\.py)`", text) if not (folder / file).exists()]
        assert not missing, f"{name}: {missing}"
