"""Reward functions as users write them. Apart, since the processes that run them import only this."""

import os
import time

from rft_cluster.messages import Completion, Prompt


def brevity(prompt: Prompt, completion: Completion) -> float:
    return max(0.0, 1 - len(completion.text) / 100)


def constant(prompt: Prompt, completion: Completion) -> float:
    return 1.0


def the_first_listed(prompt: Prompt, completion: Completion) -> float:
    return float(f"<answer>{prompt.text.splitlines()[1]}<" in completion.text)


def the_last_listed(prompt: Prompt, completion: Completion) -> float:
    return float(f"<answer>{prompt.text.splitlines()[-3]}<" in completion.text)


def contained(prompt: Prompt, completion: Completion) -> float:
    """A reward as one writes it quickly."""
    return float(prompt.label in completion.text)


def only_with_its_image(prompt: Prompt, completion: Completion) -> float:
    return float(prompt.image == b"the " + prompt.label.encode() and prompt.label in completion.text)


def fails_on_empty(prompt: Prompt, completion: Completion) -> float:
    return float(completion.text.split("<answer>")[1].split("<")[0] == prompt.label)


def counted(prompt: Prompt, completion: Completion) -> float:
    """Adds a letter to a file each time that it is called, and talks."""
    with open(os.environ["COUNTED"], "a") as file:
        file.write("x")
    print(f"looking at {completion.text!r}\x1b[2J")
    return contained(prompt, completion)


def fails(prompt: Prompt, completion: Completion) -> float:
    raise KeyError("petal")


seen: set[tuple[str, str]] = set()


def once(prompt: Prompt, completion: Completion) -> float:
    """A judge that refuses the same question again."""
    asked = prompt.label, completion.text
    if asked in seen:
        raise PermissionError("asked before")
    seen.add(asked)
    return contained(prompt, completion)


def slow(prompt: Prompt, completion: Completion) -> float:
    time.sleep(0.05)
    return contained(prompt, completion)
