"""The generator as an actor. The class has the role's name, because the dashboard shows it."""

import time
from collections.abc import Sequence

from rft_cluster.generator import generator
from rft_cluster.messages import Group, Prompt, Sampling


class Generator(generator.Generator):
    """A generator that logs its calls. (In a command's own process these lines would mix with the answers.)"""

    seconds: float  # that the last call of `generate` took

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        started = time.monotonic()
        groups = super().generate(prompts, sampling, version)
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(len(completion.token_ids) for completion in completions)
        self.seconds = time.monotonic() - started
        print(f"version {version}: {len(completions)} completions, {tokens} tokens, {self.seconds:.1f} s", flush=True)
        return groups
