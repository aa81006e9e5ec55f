"""Reward functions as users have them, which do what completions say. Their processes import only this."""

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from rft_cluster.messages import Completion, Example, ImageRef, Prompt
from rft_cluster.rewards import RewardPrompt

EXAMPLE = Example(ImageRef("photos/a.png", "9f86d081"), "rose", ("rosa",))
PROMPT = RewardPrompt("train/3/0", EXAMPLE, "Which flower?", 0, b"an image")


def completion_of(text: str) -> Completion:
    return Completion([1, 2], [-0.1, -0.2], text, "stop", 3)


def obeys(prompt: Prompt, completion: Completion):
    """Does what the completion says."""
    match completion.text.split():
        case ["raise"]:
            raise KeyError("petal")
        case ["exit"]:
            sys.exit("enough")
        case ["hang"]:
            time.sleep(3600)
        case ["native"]:
            ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock: no Python thread runs meanwhile
        case ["die"]:
            os._exit(7)
        case ["segfault"]:
            ctypes.string_at(0)
        case ["die", "later"]:
            subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -9 {os.getpid()}"])
        case ["print", word]:
            print(word)
        case ["spawn", path]:
            child = subprocess.Popen(["sleep", "3600"])
            Path(path).write_text(str(child.pid))
            time.sleep(3600)
        case ["nothing"]:
            return None
        case ["text"]:
            return "0.5"
        case ["list"]:
            return [0.5]
        case ["number", value]:
            return float(value)
        case ["whole"]:
            return 10**400
        case ["true"]:
            return True
        case ["pid"]:
            return os.getpid()
        case ["prompt"]:
            return float(prompt == PROMPT and completion == completion_of("prompt"))
    return 0.25


def moody(prompt: Prompt, completion: Completion) -> float:
    """Fails as the completion says."""
    match completion.text:
        case "raise":
            raise KeyError("petal")
        case "nan":
            return float("nan")
        case "die":
            os._exit(7)
        case "hang":
            time.sleep(3600)
    return 0.5


# --- async, and batches

running = most = 0


async def judge(prompt: Prompt, completion: Completion) -> float:
    global running, most
    running += 1
    most = max(most, running)
    try:
        return await _obey(*completion.text.split())
    finally:
        running -= 1


async def _obey(verb: str, *values: str) -> float:
    match verb:
        case "wait":
            await asyncio.sleep(float(values[0]))
        case "cancelled":  # leaves a file when it is
            try:
                await asyncio.sleep(3600)
            finally:
                os.close(os.open(values[0], os.O_CREAT))
        case "stubborn":  # has a value after its cancellation
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        case "retry":  # for ever, whatever happens
            while True:
                with suppress(BaseException):
                    await asyncio.sleep(3600)
        case "count":  # a letter in a file each time that it is asked
            with open(values[0], "a") as file:
                file.write("x")
            await asyncio.sleep(0.2)
            return 0.5
        case "block":
            await asyncio.sleep(0.1)
            time.sleep(3600)
        case "die":
            await asyncio.sleep(0.1)
            os._exit(7)
        case "raise":
            raise KeyError("petal")
        case "exit":
            raise SystemExit("enough")
        case "pid":
            return os.getpid()
        case "most":
            return most
    return 0.25


def batch(prompts: list[Prompt], completions: list[Completion]) -> list[float]:
    """The size of the batch, or what the completions say."""
    texts = [completion.text for completion in completions]
    assert len(prompts) == len(texts)
    if "raise" in texts:
        raise KeyError("petal")
    if "hang" in texts:
        time.sleep(3600)
    if "short" in texts:
        return [1.0]
    sizes = [prompt.seed + float(len(texts)) for prompt in prompts]
    return [float("nan") if text == "nan" else size for text, size in zip(texts, sizes, strict=True)]


async def concurrent_batch(prompts: list[Prompt], completions: list[Completion]) -> list[float]:
    values = await asyncio.gather(*(judge(*pair) for pair in zip(prompts, completions, strict=True)))
    return [value + len(completions) for value in values]


class Called:
    async def __call__(self, prompt: Prompt, completion: Completion) -> float:
        return 0.75


called = Called()


def wrapped(*arguments):
    return judge(*arguments)
