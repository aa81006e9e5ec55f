"""Ray tasks that are bound to a node."""

from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_node(node: str, soft: bool = False, **others: Any) -> dict[str, Any]:
    """Options of a task on a node, by Ray's id of it, that claims none of its processors; and `others`.

    Ray gives no new task to a node that was told to leave. `soft`: then it takes another node.
    """
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=soft), **others}
