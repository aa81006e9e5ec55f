"""A vLLM generator in a process of its own, and in this process the policy that sends it weights.

Neither Ray nor FSDP takes part: a check of the engine fails by the engine alone. The tier *shared* has all of them.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from benchmarks.common import SPAWN, changed_environment
from rft_cluster.algorithm import load_algorithm
from rft_cluster.common.hardware import hardware
from rft_cluster.config import Config
from rft_cluster.generator.vllm_options import EngineOptions, environment
from rft_cluster.learner.collate import collate
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Group, Images
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import load_reference, move_to
from rft_cluster.weights.shared_memory import SharedMemorySender
from rft_cluster.weights.source import PolicyWeights
from rft_cluster.weights.vllm_senders import IPCSender

if TYPE_CHECKING:
    from rft_cluster.generator.generator import Generator

LOUD = 32.0  # factor of the forbidden tokens' embeddings: without the ban most completions would have one
NORM = "model.language_model.norm.weight"


class Engine:
    """A `Generator` in a process of its own, which ends with this one. Methods are called by name."""

    def __init__(self, config: Config, images: Mapping[str, bytes], **options: Any) -> None:
        """Start the engine, and return when it is ready. `options`: of `vllm.LLM`, in place of the generator's."""
        self._pool = ProcessPoolExecutor(1, SPAWN)
        with changed_environment(environment(config.cluster.device)):
            started = self._pool.submit(_start, config, images, options)  # the process starts here
        try:
            self.features: dict[str, Any] = started.result()
            """Whether the engine has `async_scheduling`, and its mode of `cuda_graphs`."""
        except BaseException:
            self.end()  # it may hold memory that another engine needs
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the generator. Its exceptions are raised here."""
        return self._pool.submit(_call, method, arguments).result()

    def end(self) -> None:
        """End the process at once: an engine's threads never end, and its memory is free when the process is gone."""
        with suppress(BrokenProcessPool):
            self._pool.submit(os._exit, 0).result()


# In the engine's process

_generator: "Generator"


def _start(config: Config, images: Mapping[str, bytes], options: dict[str, Any]) -> dict[str, Any]:
    global _generator
    Thread(target=_end_with_parent, daemon=True).start()
    from rft_cluster.generator.generator import Generator

    if options:
        import vllm

        usual = vllm.LLM
        vllm.LLM = lambda **own: usual(**own | options)
    _generator = Generator(EngineOptions.of_run(config.model.path, config), images)
    chosen = _generator._engine.vllm_config
    return {
        "async_scheduling": chosen.scheduler_config.async_scheduling,
        "cuda_graphs": chosen.compilation_config.cudagraph_mode.name,
    }


def _call(method: str, arguments: Sequence[Any]) -> Any:
    return getattr(_generator, method)(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# In this process


class Policy:
    """The model's weights on the device, as a learner computes with them, and the sender's end of the transfer."""

    def __init__(self, config: Config, images: Images, engine: Engine) -> None:
        """Load the model and connect it with the engine. It forms a process group of one rank."""
        devices = hardware(config.cluster.device, config.cluster.dtype, config.shares_gpus)
        model, self._config, self._engine = config.model, config, engine
        self._device = torch.device(devices.device)
        self._encoder = PromptEncoder(model.path, model)
        self.forbidden = self._encoder.forbidden_token_ids
        self._prompts = PromptCache(self._encoder, images, capacity=float("inf"))
        how = (model.path, model, devices.attention, self.forbidden, config.sampling.temperature)
        self._policy = load_reference(*how)
        move_to(self._policy, devices.device, devices.dtype)
        self._version = 0
        self._connect(devices.transfer)

    def _connect(self, transfer: str) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        if not dist.is_initialized():
            meeting = f"file://{tempfile.mkdtemp(prefix='gpu_check_')}/alone"
            dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        weights = PolicyWeights(self._policy)
        self.sender = IPCSender(weights) if transfer == "ipc" else SharedMemorySender(weights, one_host=True)
        self._offer = self.sender.offer(1)
        self._engine.call("init_weight_transfer_engine", self._offer.init)
        self.sender.connect(self._forward)

    def _forward(self, payload: dict[str, Any]) -> None:
        self._engine.call("update_weights", payload)

    def send(self) -> int:
        """Bring the engine to the present weights, verified. Returns their version.

        Raises:
            WeightTransferError: other bytes arrived than were sent.
        """
        self._version += 1
        if self._offer.update is None:  # CUDA IPC: the sender makes the payloads while it sends
            self._engine.call("start_weight_update")
            self.sender.send()
            self._engine.call("finish_weight_update", self._version)
        else:
            self.sender.send()
            self._engine.call("load_weights", self._offer.update, self._version)
        self._engine.call("verify_weights", self._version, self.sender.digests())
        return self._version

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Within the context the policy is another one, in which forbidden tokens are the likeliest; the change is
        undone to the bit. Sends nothing."""
        parameters = dict(self._policy.model.named_parameters())
        norm, embedding = parameters[NORM], parameters["model.language_model.embed_tokens.weight"]
        with torch.no_grad():
            norm.mul_(0.5)  # powers of two: exact in BF16
            embedding[self.forbidden] *= LOUD
        try:
            yield
        finally:
            with torch.no_grad():
                norm.mul_(2.0)
                embedding[self.forbidden] /= LOUD

    @torch.no_grad()
    def logprob_gap(self, groups: Sequence[Group]) -> float:
        """Mean difference of the engine's log-probabilities and those of the packed forward, nats a token."""
        algorithm, total, tokens = load_algorithm(self._config), 0.0, 0
        for group in groups:
            samples = algorithm.samples([group], [[1.0] * len(group.completions)])
            batch = collate(samples, self._prompts, self._policy.prompt_positions).to(self._device)
            logprobs, _ = self._policy(**batch.inputs())
            total += float((logprobs - batch.generator_logprobs).abs().sum())
            tokens += len(batch.generator_logprobs)
        return total / tokens
