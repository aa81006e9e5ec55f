"""TRL's GRPOTrainer on a configuration of this project: the same data, question, model, rewards and hyper-parameters.

    python -m benchmarks.trl_grpo [--config digits] [--overrides KEY=VALUE,...] [--vllm]     (needs the extra `bench`)

As an arm of a comparison it waits for its turns, see turns.py. What has no counterpart stays as TRL has it: warm-up
that begins at 0, the order of the images, log-probabilities without the vision tokens taken out, no importance weights
(TRL samples with the model that it trains). Gradient checkpointing, TRL's default, is off: it saves memory, which
nothing here lacks, for time. `--rows` completions go into one forward of the learning; `--weights` are `mixed` (FP32
weights, BF16 computation), `bf16` or `fp32`; with `--vllm` vLLM generates in the trainer's process.
"""

import io
import os
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import parsed
from rft_cluster.classification.report import summarise
from rft_cluster.common.lookup import find_function
from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset
from rft_cluster.generator.vllm_options import environment
from rft_cluster.messages import Completion, Group, Prompt
from rft_cluster.prompts import make_prompts
from rft_cluster.rewards import REWARDS
from rft_cluster.run.task import Task, base_model_path, prepare

EVALUATION_ROWS = 100


def trainer_arguments(config: Config, rows: int, weights: str, folder: str, vllm: bool = False) -> GRPOConfig:
    """The configuration in TRL's words. `rows`: completions in one forward of the learning."""
    completions = config.schedule.prompts_per_step * config.sampling.group_size
    return GRPOConfig(
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_max_model_length=config.max_model_tokens,
        output_dir=folder,
        seed=config.run.seed,
        use_cpu=True,
        bf16=weights == "mixed",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=completions // rows,
        num_generations=config.sampling.group_size,
        max_completion_length=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        top_p=1.0,
        top_k=config.sampling.top_k,
        beta=config.algorithm.kl_beta,
        use_bias_correction_kl=False,  # on by default: another gradient than the published k3's
        epsilon=config.algorithm.clip_low,
        epsilon_high=config.algorithm.clip_high,
        num_iterations=config.algorithm.updates_per_step,
        loss_type="grpo",
        reward_weights=list(config.rewards.values()),
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.optimizer.warmup_steps,
        adam_beta1=config.optimizer.betas[0],
        adam_beta2=config.optimizer.betas[1],
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        max_steps=config.schedule.steps,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def as_dataset(ours: FewShotDataset, text: str) -> Dataset:
    turn = [{"role": "user", "content": text}]
    rows = [
        {"prompt": turn, "image": {"bytes": ours.image(e), "path": None}, "example_id": e.example_id}
        for e in ours.train
    ]
    turns = [{"role": Value("string"), "content": Value("string")}]
    return Dataset.from_list(
        rows, features=Features({"prompt": turns, "image": Image(), "example_id": Value("string")})
    )


def as_trl_rewards(config: Config, prompts: dict[str, Prompt]) -> list[Any]:
    """The configured rewards as TRL calls them."""

    def wrapped(name: str, function: Any) -> Any:
        def reward(completions: Any, completion_ids: Any, example_id: list[str], **_: Any) -> list[float]:
            return [
                function(prompts[example], as_completion(ids, completion[0]["content"]))
                for completion, ids, example in zip(completions, completion_ids, example_id, strict=True)
            ]

        reward.__name__ = name
        return reward

    return [wrapped(name, find_function(name, REWARDS, "rewards")) for name in config.rewards]


def as_completion(token_ids: list[int], text: str) -> Completion:
    return Completion(token_ids, [0.0] * len(token_ids), text, "stop", 0)


class Steps(TrainerCallback):
    """Waits for its turn before each step, and says after it how long it took and, when it is due, the accuracy."""

    def __init__(self, connection: Connection, config: Config, task: Task, processor: Any) -> None:
        self._connection, self._config, self._task, self._processor = connection, config, task, processor

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._connection.send(None)
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        said: dict[str, Any] = {"seconds": time.perf_counter() - self._began}
        every = self._config.schedule.evaluate_every
        if every and state.global_step % every == 0:
            said["accuracy"] = self._accuracy(model)
        self._connection.send(said)
        if state.global_step < args.max_steps:
            self._wait()

    def _wait(self) -> None:
        try:
            self._connection.recv()
        except EOFError:  # the other end is done
            raise SystemExit from None
        self._began = time.perf_counter()

    @torch.no_grad()
    def _accuracy(self, model: Any) -> float:
        """Strict accuracy of greedy answers to the validation images, as a run of ours has it."""
        was_training = model.training
        model.eval()
        prompts = make_prompts(self._task.dataset.validation, self._task.text, "validation", 0, self._config.run.seed)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._task.text}]}]
        chat = self._processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        groups = []
        for start in range(0, len(prompts), EVALUATION_ROWS):
            part = prompts[start : start + EVALUATION_ROWS]
            files = [io.BytesIO(self._task.dataset.image(prompt.example)) for prompt in part]
            images = [PillowImage.open(file).convert("RGB") for file in files]
            inputs = self._processor(text=[chat] * len(part), images=images, return_tensors="pt", padding=True)
            length = inputs["input_ids"].shape[1]
            output = model.generate(**inputs, do_sample=False, max_new_tokens=self._config.sampling.max_tokens)
            texts = self._processor.batch_decode(output[:, length:], skip_special_tokens=True)
            groups += [Group(prompt, [], [as_completion([], text)]) for prompt, text in zip(part, texts, strict=True)]
        model.train(was_training)
        return summarise(0, "validation", groups).accuracy_strict


def make_trainer(
    config: Config, rows: int, weights: str, folder: str, vllm: bool = False, connection: Connection | None = None
) -> GRPOTrainer:
    """`connection`: waits for turns at its other end, see `Steps`."""
    task = prepare(config)
    path = base_model_path(config, task)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=dtype)
    if config.model.freeze_vision:
        model.model.visual.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(path, padding_side="left")
    prompts = {p.example_id: p for p in make_prompts(task.dataset.train, task.text, "train", 0, config.run.seed)}
    rewards = as_trl_rewards(config, prompts)
    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=trainer_arguments(config, rows, weights, folder, vllm),
        train_dataset=as_dataset(task.dataset, task.text),
        processing_class=processor,
        callbacks=[Steps(connection, config, task, processor)] if connection else [],
    )


def serve(connection: Connection, config: Config, weights: str, rows: int) -> None:
    """An arm (see turns.py)."""
    torch.set_flush_denormal(True)  # denormals slow a small model tenfold on CPUs
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(config, rows, weights, folder, connection=connection).train()


def main() -> None:
    options = parsed(__doc__, config="digits", overrides=[""], rows=8, weights="mixed", vllm=False)
    config = load_config(options.config, list(filter(None, options.overrides)))
    if options.vllm:
        os.environ.update(
            {**environment(config.cluster.device), "VLLM_CPU_KVCACHE_SPACE": str(config.generators.kv_cache_gib)}
        )
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(config, options.rows, options.weights, folder, options.vllm).train()


if __name__ == "__main__":
    main()
