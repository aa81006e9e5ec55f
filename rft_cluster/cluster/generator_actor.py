"""The generator as an actor. The class has the role's name, because the dashboard shows it."""

import os
import time
from collections.abc import Mapping, Sequence

import ray

from rft_cluster.cluster.exporter import Exporter
from rft_cluster.generator import generator
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.learner.rendezvous import exactly, interface_of
from rft_cluster.messages import Group, Images, Prompt, Sampling


class Generator(generator.Generator):
    """A generator that logs its calls. (In a command's own process these lines would mix with the answers.)"""

    seconds: float  # that the last call of `generate` took

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
        self.seconds = time.monotonic() - started
        print(f"version {version}: {len(completions)} completions, {tokens} tokens, {self.seconds:.1f} s", flush=True)
        return groups
