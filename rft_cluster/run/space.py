"""The disk that a run needs."""

import math

from rft_cluster.config import Config
from rft_cluster.run.asking import most_rounds

EXPORT, MASTER, MOMENTS = 2, 4, 8  # bytes a parameter on disk: BF16, FP32, two in FP32
JOURNALLED = 32  # bytes a token in the journal, with its log-probability and its text
RECORDS = 50 * 10**6  # bytes for a run's other files


def disk_bytes(config: Config, parameters: int) -> int:
    """Bytes of a run on disk: its checkpoints with one more while it is written, three models in BF16, the journal and
    records."""
    # With LoRA a checkpoint has the base in BF16, and adapters of negligible size.
    checkpoint = (EXPORT if config.model.lora else MASTER + MOMENTS) * parameters
    models = checkpoint * (config.schedule.keep_checkpoints + 1) + 3 * EXPORT * parameters
    return models + journal_bytes(config) + RECORDS


def journal_bytes(config: Config) -> int:
    """Bytes of the journal at most. It has the steps since the oldest checkpoint, and completions of full length."""
    schedule, sampling = config.schedule, config.sampling
    apart = math.ceil(60 * schedule.save_minutes)  # at most one step a second
    apart = min(apart, schedule.save_every) if schedule.save_every else apart
    steps = min(schedule.steps, apart * (schedule.keep_checkpoints + 1))
    tokens = config.completions * sampling.max_tokens + config.model.max_prompt_tokens
    return JOURNALLED * steps * most_rounds(schedule) * schedule.prompts_per_step * tokens
