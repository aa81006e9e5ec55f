"""A generator on an engine that keeps what it is told, in place of vLLM's: for tests of states, in milliseconds."""

import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from some_prompt import some_prompt

from rft_cluster.config import load_config
from rft_cluster.data.images import image_sha256
from rft_cluster.generator import generator as module
from rft_cluster.generator.generator import Generator
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.messages import Augmentation
from rft_cluster.model import encoder as encoding

IMAGES = {image_sha256(image): image for image in (b"a picture", b"no picture")}
PROMPTS = [some_prompt(f"train/0/{i}", f"photos/{i}", b"a picture", seed=i) for i in range(3)]


class RecordingEngine:
    """The methods of vLLM's engine that generators use. Finishes requests while `writes` is set, in reverse order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.images: list[Any] = []  # of each request
        self.unfinished: dict[str, int] = {}  # request id -> completions
        self.writes = True
        self.breaks: Exception | None = None  # what the next step raises
        self.stamp = ""  # vLLM's weight version
        self.not_loaded: list[str] = []
        self.wrong: Exception | None = None  # what a verification raises
        self.worker = SimpleNamespace(weight_transfer_engine=self, model_runner=SimpleNamespace())
        self.model = SimpleNamespace()
        self.scheduled: dict[str, Any] = {}  # vLLM's requests, by its ids
        self.output_processor = SimpleNamespace()
        self.engine_core = SimpleNamespace(
            engine_core=SimpleNamespace(scheduler=SimpleNamespace(requests=self.scheduled))
        )

    def add_request(self, request_id: str, inputs: dict[str, Any], completions: int) -> None:
        self.unfinished[request_id] = completions
        self.images.append(inputs["multi_modal_data"]["image"])

    def abort_request(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.unfinished.pop(request_id, None)  # vLLM, too, ignores those that have just ended

    def step(self) -> list[Any]:
        time.sleep(0.001)
        if self.breaks:
            raise self.breaks
        if not self.writes:
            return []
        finished = [self._output(*request) for request in reversed(self.unfinished.items())]
        self.unfinished.clear()
        return finished

    def _output(self, request_id: str, completions: int) -> Any:
        span = SimpleNamespace(version=self.stamp, start=0, end=2)
        answer = SimpleNamespace(
            token_ids=[7, 8],
            logprobs=[{7: SimpleNamespace(logprob=-1.0)}, {8: SimpleNamespace(logprob=-2.0)}],
            text="seven",
            finish_reason="stop",
            weight_versions=[span],
        )
        return SimpleNamespace(
            request_id=request_id, finished=True, prompt_token_ids=[1, 2, 3], outputs=[answer] * completions
        )

    def collective_rpc(self, method: Any, kwargs: dict[str, Any] | None = None) -> list[Any]:
        if callable(method):
            return [method(self.worker)]
        self.calls.append((method, *(kwargs or {}).values()))
        return [None]

    def verify(self, digests: dict[str, int]) -> tuple[int, int]:
        if self.wrong:
            raise self.wrong
        return 22, 222

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.calls.append(("reset_prefix_cache", reset_running_requests))
        return True

    def reset_encoder_cache(self) -> None:
        self.calls.append("reset_encoder_cache")

    def set_weight_version(self, version: str) -> None:
        self.stamp = version

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", *tags))


class PlainEncoder:
    """Takes every picture but an empty one. A changed one is the picture and how."""

    def __init__(self, *arguments: Any) -> None:
        self.stop_token_ids: list[int] = []
        self.forbidden_token_ids: list[int] = []
        self.opening = ""

    def image_limits(self) -> dict[str, Any]:
        return {}

    def chat(self, text: str) -> str:
        return text

    def image(self, image: bytes, how: Augmentation | None = None) -> Any:
        if image == b"no picture":
            raise OSError("cannot identify image")
        return (image, how) if how else image


def generator_on(engine: RecordingEngine, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Generator:
    monkeypatch.setattr(encoding, "PromptEncoder", PlainEncoder)
    monkeypatch.setattr(module, "load_engine", lambda options, limits: SimpleNamespace(llm_engine=engine))
    monkeypatch.setattr(module, "sampling_params", lambda sampling, *others: sampling.group_size)
    return Generator(EngineOptions.of_run("model", load_config("digits", list(overrides))), IMAGES)
