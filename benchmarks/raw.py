"""A step's work without a service: plain vLLM, a plain forward and backward, a plain copy, in one process.

It does the work of a careful script and nothing else: `LLM.generate` with our generator's sampling; the learner's own
shared-prefix model, reference model and loss with FP32 masters and AdamW, without FSDP, Ray or verification; and one
memcpy of the BF16 weights. The wall time of the service's step is compared with the sum of the three.
"""

import copy
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.turns import serve_steps
from rft_cluster.algorithm import load_algorithm
from rft_cluster.algorithm.loss import grpo_loss
from rft_cluster.common.hardware import hardware
from rft_cluster.common.lookup import find_function
from rft_cluster.common.reduce import reduced
from rft_cluster.config import Config
from rft_cluster.generator.engine_thread import Batch, group_of
from rft_cluster.generator.vllm_options import EngineOptions, load_engine, sampling_params
from rft_cluster.learner.collate import collate
from rft_cluster.learner.packing import split_work
from rft_cluster.learner.prompt_cache import PromptCache
from rft_cluster.messages import Completion, Group, Images, LossSums, Prompt, Reward, Sampling, TrainingSample
from rft_cluster.model.encoder import PromptEncoder
from rft_cluster.model.policy import PolicyModel, load_policy, load_reference, move_to
from rft_cluster.prompts import make_prompts
from rft_cluster.rewards import REWARDS
from rft_cluster.run.task import base_model_path, prepare


class RawGenerator:
    """`LLM.generate`, on an engine with the options that a `Generator` gives its own."""

    def __init__(self, config: Config, path: str, encoder: PromptEncoder, images: Images) -> None:
        self._images = images
        self._encoder, self._sampling = encoder, Sampling(**config.sampling.model_dump())
        self._llm = load_engine(EngineOptions.of_run(path, config), encoder.image_limits())
        self._llm.llm_engine.set_weight_version("0")

    def forget(self) -> None:
        """Drop all caches, as an update does."""
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def generate(self, prompts: Sequence[Prompt]) -> list[Any]:
        inputs = [
            {
                "prompt": self._encoder.chat(prompt.text),
                "multi_modal_data": {"image": self._encoder.image(self._images[prompt.example.image.sha256])},
            }
            for prompt in prompts
        ]
        stop, forbidden = self._encoder.stop_token_ids, self._encoder.forbidden_token_ids
        params = [sampling_params(self._sampling, prompt.seed, stop, forbidden) for prompt in prompts]
        return self._llm.generate(inputs, params, use_tqdm=False)


class RawLearner:
    """Forward, backward and update in plain torch. Where layers compute in BF16, a copy of the FP32 masters does."""

    def __init__(self, config: Config, path: str, encoder: PromptEncoder, images: Images, forbidden: list[int]) -> None:
        """`forbidden`: token ids that are out of the distribution."""
        self._config, self._prompts = config, PromptCache(encoder, images, capacity=0)
        how = (path, config.model, hardware("cpu").attention, forbidden, config.sampling.temperature)
        self._masters = load_policy(*how)
        self.policy, compute = self._masters, config.cluster.dtype
        if compute != "float32":
            self.policy = copy.deepcopy(self._masters)
            move_to(self.policy, "cpu", compute)
        self._reference: PolicyModel | None = None
        if config.algorithm.kl_beta:
            self._reference = load_reference(*how)
            move_to(self._reference, "cpu", compute)
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._masters.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    def _reward(self, prompt: Prompt, completion: Completion) -> Reward:
        weights = self._config.rewards
        parts = {name: find_function(name, REWARDS, "rewards")(prompt, completion) for name in weights}
        return Reward(sum(weights[name] * value for name, value in parts.items()), parts)

    def update(self, groups: Sequence[Group]) -> float:
        """One update. Returns the mean gap between the engine's log-probabilities and the learner's, in nats."""
        algorithm = load_algorithm(self._config)
        rewards = [[self._reward(group.prompt, one) for one in group.completions] for group in groups]
        sums = self.backward(algorithm.samples(groups, algorithm.advantages(rewards)))
        pairs = list(zip(self._masters.parameters(), self.policy.parameters(), strict=True))
        if self.policy is not self._masters:
            for master, computing in pairs:
                master.grad, computing.grad = computing.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters.parameters(), self._config.optimizer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.policy is not self._masters:
            with torch.no_grad():
                for master, computing in pairs:
                    computing.copy_(master)
        return sums.logprob_gap / sums.tokens

    def backward(self, samples: Sequence[TrainingSample]) -> LossSums:
        """The gradient of one update, in the policy's parameters."""
        sums = []
        ((micro_batches,),) = split_work(samples, 1, 1, self._config.learners.micro_batch_tokens)
        for work in micro_batches:
            batch = collate(work, self._prompts, self.policy.prompt_positions)
            reference = None
            if self._reference:
                with torch.no_grad():
                    reference = self._reference(**batch.inputs())[0]
            logprobs, _ = self.policy(**batch.inputs())
            terms = grpo_loss(logprobs, batch, logprobs, reference, self._config.algorithm)
            terms.loss.backward()
            sums.append(terms.sums)
        return reduced(sums)


def serve(connection: Connection, config: Config) -> None:
    """An arm (see turns.py): each step's prompts are those that the service has in it."""
    torch.set_flush_denormal(True)
    task = prepare(config)
    path = base_model_path(config, task)
    encoder = PromptEncoder(path, config.model)
    images = task.dataset.images
    generator = RawGenerator(config, path, encoder, images)
    learner = RawLearner(config, path, encoder, images, encoder.forbidden_token_ids)
    size = 2 * sum(parameter.numel() for parameter in learner.policy.parameters())  # bytes of the weights in BF16
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)

    def step(number: int) -> dict[str, Any]:
        examples = task.dataset.batch(config.run.seed, number, config.schedule.prompts_per_step)
        prompts = make_prompts(examples, task.text, "train", number, config.run.seed)
        generator.forget()
        times = [time.perf_counter()]
        outputs = generator.generate(prompts)
        times.append(time.perf_counter())
        batch = Batch(prompts, config.sampling.group_size, version=0, opening="")
        groups = [group_of(prompt, output, batch) for prompt, output in zip(prompts, outputs, strict=True)]
        gap = learner.update(groups)
        times.append(time.perf_counter())
        np.copyto(target, source)
        times.append(time.perf_counter())
        generate, learn, copied = (after - before for before, after in pairwise(times))
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        parts = {"generate": generate, "learn": learn, "copy": copied}
        return {"seconds": sum(parts.values()), **parts, "gap": gap, "tokens": tokens}

    serve_steps(connection, step)
