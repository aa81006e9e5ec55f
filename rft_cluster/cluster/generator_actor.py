"""The generator as an actor. The class has the role's name, because the dashboard shows it."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from rft_cluster.cluster.exporter import Exporter
from rft_cluster.common.network import exactly, interface_of
from rft_cluster.generator import generator
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.messages import Group, Images, Prompt, Sampling, WeightRecord


class Generator(generator.Generator):
    """A generator that logs its calls. (In a command's own process these lines would mix with the answers.)"""

    def __init__(
        self, options: EngineOptions, images: Images, interface: str | None, labels: Mapping[str, str]
    ) -> None:
        """
        Args:
            interface: of this host to the others; None for the one with the address that Ray uses.
            labels: of the engine's series.
        """
        if options.hardware.transfer == "nccl":
            # On a host with several interfaces NCCL would take its first, which learner 0 may not reach. NCCL reads the
            # variable once a process; an engine's worker processes inherit it.
            os.environ["NCCL_SOCKET_IFNAME"] = exactly(interface or interface_of(ray.util.get_node_ip_address()))
        super().__init__(options, images)
        Exporter(self.stats.read, labels).start()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        started = time.monotonic()
        groups = super().generate(prompts, sampling, version)
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(len(completion.token_ids) for completion in completions)
        seconds = time.monotonic() - started
        cut = sum(completion.finish_reason == "length" for completion in completions)
        print(
            f"generate: version {version}, {len(completions)} completions, {tokens} tokens, {seconds:.1f} s",
            flush=True,
        )
        if 2 * cut > len(completions):
            print(
                f"WARNING: {cut} of {len(completions)} completions were cut at {sampling.max_tokens} tokens: raise "
                f"sampling.max_tokens, or ask for shorter answers in the prompt",
                flush=True,
            )
        return groups

    def load_weights(self, update_info: dict[str, Any], version: int, data: Any = None) -> None:
        started = time.monotonic()
        super().load_weights(update_info, version, data)
        print(f"transfer: version {version} loaded, {time.monotonic() - started:.1f} s", flush=True)

    def verify_weights(self, version: int, *digests: Mapping[str, int]) -> WeightRecord:
        started = time.monotonic()
        record = super().verify_weights(version, *digests)
        seconds = time.monotonic() - started
        print(f"verify: version {version} holds the learners' weights, {seconds:.1f} s", flush=True)
        return record
