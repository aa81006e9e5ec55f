from rft_cluster.cluster.generator_actor import Generator
from rft_cluster.cluster.handles import TASKS
from rft_cluster.learner.learner import Learner
from rft_cluster.rewards.scorer import Scorer


def test_a_call_is_named_after_the_class_that_has_the_method():
    """Ray makes the title of the actor's process of it; a frozen process is found by the class in its title."""
    classes = {kind.__name__: kind for kind in (Generator, Learner, Scorer)}
    for method, name in TASKS.items():
        kind, phase = name.split(".")
        assert callable(getattr(classes[kind], method)) and phase
