"""The house rules, held against the source: what may import what, and a few things that are never written."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rft_cluster

ROOT = Path(rft_cluster.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the top down (see the design): a module imports from its own layer or from below.
LAYERS = {
    "entry": ["launch", "evaluate", "compare", "predict", "sweep"],
    "loop": ["train", "tracker", "prepare"],
    "cluster": ["cluster", "actors", "rollouts"],
    "roles": ["generator", "scorer", "learner"],
    "torch": [
        "engine",
        "weights",
        "receivers",
        "loader",
        "digests",
        "qwen2vl",
        "shared_prefix",
        "batching",
        "checkpoint",
        "loss",
        "tiny",
        "rendezvous",
    ],
    "pure": [
        "advantages",
        "rewards",
        "prompts",
        "data",
        "baselines",
        "evaluation",
        "plan",
        "answers",
        "card",
        "figures",
        "redteam",
    ],
    "base": ["messages", "config", "errors", "hardware", "files", "lookup", "text"],
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
HEIGHT = {layer: height for height, layer in enumerate(reversed(LAYERS))}
# Modules of these never import each other: each entry and each role stands alone.
APART = ("entry", "roles")
HEAVY = {"torch", "torchvision", "transformers", "tokenizers", "qwen_vl_utils", "ray", "vllm"}
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
            if node.module == "rft_cluster":
                names = [f"rft_cluster.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(file, node.lineno, name, id(node) in inside)


SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
TREES = {file: ast.parse(source) for file, source in SOURCES.items()}
IMPORTS = [found for file, tree in TREES.items() for found in imports_in(tree, file)]
MODULE_OF = {file: Path(file).parts[0].removesuffix(".py") for file in TREES if file != "__init__.py"}


def listed(violations: list[str]) -> str:
    return "\n" + "\n".join(violations)


def test_the_walk_sees_imports_of_every_form():
    source = "import ray.util\nfrom rft_cluster import plan, loss\nfrom torch import nn\ndef f():\n    import vllm\n"
    found = [(one.name, one.lazy) for one in imports_in(ast.parse(source), "x.py")]
    assert found == [
        *(("ray.util", False), ("rft_cluster.plan", False), ("rft_cluster.loss", False), ("torch", False)),
        ("vllm", True),
    ]
    assert len(IMPORTS) > 100


def test_every_module_has_a_layer():
    unknown = sorted(set(MODULE_OF.values()) - set(LAYER_OF))
    assert not unknown, f"give {unknown} a layer in this test and in the design"


def test_imports_go_downward_only():
    violations = []
    for found in IMPORTS:
        if found.package != "rft_cluster":
            continue
        importer, imported = MODULE_OF[found.file], part(found.name)
        if importer == imported or not {importer, imported} <= set(LAYER_OF):
            continue
        ours, theirs = LAYER_OF[importer], LAYER_OF[imported]
        if HEIGHT[theirs] > HEIGHT[ours]:
            violations.append(f"{found}: {ours} lies below {theirs}")
        elif ours == theirs and ours in APART:
            violations.append(f"{found}: modules of '{ours}' stand alone")
    assert not violations, listed(violations)


def test_pure_and_base_modules_import_nothing_heavy_even_lazily():
    violations = [
        str(found)
        for found in IMPORTS
        if found.package in HEAVY and LAYER_OF.get(MODULE_OF[found.file]) in ("pure", "base")
    ]
    assert not violations, listed(violations)


def test_three_files_import_ray():
    files = ("actors.py", "rollouts.py", "cluster.py")
    violations = [str(found) for found in IMPORTS if found.package == "ray" and found.file not in files]
    assert not violations, listed(violations)


def test_vllm_is_imported_by_five_modules_and_never_by_the_driver():
    violations = [
        str(found)
        for found in IMPORTS
        if (
            found.package == "vllm"
            and found.file not in ("generator.py", "engine.py", "receivers.py", "loader.py", "weights.py")
        )
        # Only receivers.py and its loader import it when they are imported, and who imports that one does so lazily.
        or (found.package == "vllm" and found.file not in ("receivers.py", "loader.py") and not found.lazy)
        or (found.name.startswith("rft_cluster.receivers") and not found.lazy)
        or (found.name.startswith("rft_cluster.loader") and found.file != "receivers.py" and not found.lazy)
    ]
    assert not violations, listed(violations)


def test_no_file_is_longer_than_400_lines():
    long = {file: lines for file, source in SOURCES.items() if (lines := len(source.splitlines())) > 400}
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
    """Whether it catches everything, does not end in `raise`, and says no reason for that."""
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
