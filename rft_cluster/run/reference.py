"""Write the page of all figures of a step: python -m rft_cluster.run.reference > docs/metrics.md"""

import ast
import inspect
from collections.abc import Iterator
from typing import get_type_hints

from rft_cluster.config.reference import documented_fields, table_row
from rft_cluster.run import metrics
from rft_cluster.run.metrics import KEYS, StepStats

HEAD = """# The figures of a step

```bash
tail -1 runs/NAME/metrics.jsonl
```

`metrics.jsonl` has one object a step, with these keys. A key is missing if the step has no such figure: the learners'
figures in a step without an update, `activation_gib` on CPUs. The former rows of steps that were
done again are in `redone-DATE/`. While a run goes on, Prometheus has the same figures: [series.md](series.md).

"""
TAIL = """
Your own function can get the same figures as a `StepStats` (`rft_cluster/run/metrics.py`). Its fields have the names of
the keys; `reward_parts`, `failures` and `seconds` are mappings by NAME:

```python
# my_sinks.py
def csv(stats):
    with open("rewards.csv", "a") as file:
        print(stats.step, stats.reward, stats.reward_parts["accuracy"], sep=",", file=file)
```
```bash
python -m rft_cluster.launch --config digits 'run.sinks=[my_sinks:csv]'
```

A sink runs in the driver between two steps, so it should be quick. An exception ends the run, so a sink that sends
figures elsewhere should catch network errors. A step that is replayed after a fault is not sent to it again. One
that is generated again is sent with its new figures.
"""


def page() -> str:
    """The page in Markdown: one row for each field of `StepStats`, from its type and docstring."""
    rows = "\n".join(table_row(f"`{key}`", unit, meaning) for key, unit, meaning in step_fields())
    return f"{HEAD}| key | unit | |\n|---|---|---|\n{rows}\n{TAIL}"


def step_fields() -> Iterator[tuple[str, str, str]]:
    """(key in `metrics.jsonl`, unit, meaning) of each field."""
    tree = ast.parse(inspect.getsource(metrics))
    (source,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == StepStats.__name__)
    hints = get_type_hints(StepStats, include_extras=True)
    for name, annotation, meaning in documented_fields(source):
        key = KEYS.get(name, name)
        yield f"{key}/NAME" if "Mapping" in annotation else key, hints[name].__metadata__[0], meaning


if __name__ == "__main__":
    print(page(), end="")
