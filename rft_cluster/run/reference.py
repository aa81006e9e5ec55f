"""All figures of a step as a page: python -m rft_cluster.run.reference > docs/metrics.md"""

import ast
import inspect
from collections.abc import Iterator
from typing import get_type_hints

from rft_cluster.config.reference import documented_fields, table_row
from rft_cluster.run import metrics
from rft_cluster.run.metrics import KEYS, StepStats

HEAD = """# What a step is measured by

```bash
tail -1 runs/NAME/metrics.jsonl
```

`metrics.jsonl` has an object a step with these keys. A key is left out where a step has no such figure: those of the
learners where there was no update, `activation_gib` on a CPU.

"""
TAIL = """
A function of your own gets the same figures as a `StepStats` (`rft_cluster/run/metrics.py`). Its fields have the names
of the keys; `reward_parts`, `failures` and `seconds` are mappings by NAME:

```python
# my_sinks.py
def csv(stats):
    with open("rewards.csv", "a") as file:
        print(stats.step, stats.reward, stats.reward_parts["accuracy"], sep=",", file=file)
```
```bash
python -m rft_cluster.launch --config digits 'run.sinks=[my_sinks:csv]'
```

It runs in the driver, between two steps, so it should be quick. What it raises ends the run: a sink that sends figures
elsewhere catches what may go wrong on the way.
"""


def page() -> str:
    """Markdown: a row for each field of `StepStats`, from its type and docstring."""
    rows = "\n".join(table_row(f"`{key}`", unit, meaning) for key, unit, meaning in step_fields())
    return f"{HEAD}| key | unit | |\n|---|---|---|\n{rows}\n{TAIL}"


def step_fields() -> Iterator[tuple[str, str, str]]:
    """Key in `metrics.jsonl`, unit and meaning of each field."""
    tree = ast.parse(inspect.getsource(metrics))
    (source,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == StepStats.__name__)
    hints = get_type_hints(StepStats, include_extras=True)
    for name, annotation, meaning in documented_fields(source):
        key = KEYS.get(name, name)
        yield f"{key}/NAME" if "Mapping" in annotation else key, hints[name].__metadata__[0], meaning


if __name__ == "__main__":
    print(page(), end="")
