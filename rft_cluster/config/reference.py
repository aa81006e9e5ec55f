"""Write the page of all config keys: python -m rft_cluster.config.reference > docs/configuration.md"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import asdict

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rft_cluster.config import data, model, sections, training
from rft_cluster.config.sections import Config

MODULES = (model, data, training, sections)
HEAD = """# All settings

```bash
python -m rft_cluster.launch --config digits schedule.steps=40 run.name=short --dry-run
```

In a file a section is a block of YAML (`schedule: {steps: 40}`); on the command line it is `section.key=value`. A key
without a default must be set. `configs/` has complete files. `runs/NAME/config.yaml` has every key of a run.

Text is read as written: `data.path=my photos #1` only needs quotes for the shell. Lists and mappings are in YAML:
`'data.classes=[no, yes, 01]'`, `'data.aliases={no: [negative]}'`. A name with a special character of YAML is quoted
there (`["#1", yes]`), as in a file. `null` means none, if the key allows it. In paths `~` and `$HOME` mean the home
folder.
"""


def page() -> str:
    """Markdown: a table for each section, from the types, ranges, defaults and docstrings of its class."""
    classes = {
        node.name: node
        for module in MODULES
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ClassDef)
    }
    parts = [HEAD]
    for section, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows = "\n".join(_rows(classes, kind.__name__, section))
            text = f"| key | default | values | |\n|---|---|---|---|\n{rows}"
        else:  # rewards: the keys are names of functions
            text = next(text for key, _, text in documented_fields(classes["Config"]) if key == section)
            text += f" Default: `{_shown(field.get_default())}`."
        parts.append(f"## {section}\n\n{text}\n")
    return "\n".join(parts)


def _rows(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[str]:
    """One row a key, followed by the rows of a nested section."""
    own: type[BaseModel] = next(vars(module)[name] for module in MODULES if name in vars(module))
    for key, annotation, text in documented_fields(classes[name]):
        field = own.model_fields[key]
        default = "" if field.is_required() else f"`{_shown(field.get_default())}`"
        values = ", ".join(filter(None, (_type(annotation), _limits(field))))
        yield table_row(f"`{prefix}.{key}`", default, values, text)
        if (inner := annotation.split(" | ")[0]) in classes:
            yield from _rows(classes, inner, f"{prefix}.{key}")


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def documented_fields(section: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Name, type and docstring of each key, as in the source."""
    body = section.body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation), _docstring(following)


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


SIGNS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def _limits(field: FieldInfo) -> str:
    """`Field(4, ge=1, le=16384)` -> at least 1, at most 16 384."""
    shown = []
    for limit in field.metadata:
        if type(limit) in SIGNS:
            name, sign = SIGNS[type(limit)]
            number = asdict(limit)[name]
            shown.append(f"{sign} {f'{number:,}'.replace(',', ' ') if isinstance(number, int) else f'{number:g}'}")
    return ", ".join(shown)


TYPES = {
    **{"str": "text", "int": "whole number", "float": "number", "bool": "true, false"},
    **{"FilePath": "path", "PathText": "path or name", "None": "null"},
}


def _type(annotation: str) -> str:
    """The type in the user's words."""
    return " or ".join(map(_kind, annotation.split(" | ")))


def _kind(name: str) -> str:
    if name.startswith("Literal["):
        words = ast.literal_eval(f"({name.removeprefix('Literal[').removesuffix(']')},)")
        return ", ".join(f"`{word}`" for word in words)
    return TYPES.get(name, "section" if name.endswith("Section") else f"`{name}`")


def _shown(value: object) -> str:
    """The value in YAML."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


if __name__ == "__main__":
    print(page(), end="")
