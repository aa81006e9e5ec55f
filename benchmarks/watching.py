"""What it costs to be watched, against a step.

    python -m benchmarks.watching [--steps 4] [--prompts 2300] [--rounds 30]

In the driver: a real run of the digits with steps of half a minute. Timed are the seconds that the loop waits for those
who watch (trackers, and the records that only they need), and the processor time of their threads: the export to Ray,
TensorBoard, `activity.json`. In an engine: the same prompts with vLLM's figures and without, in turns.
"""

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.common import CACHE, machine, parsed, spread, write_result
from rft_cluster import launch
from rft_cluster.cluster.exporter import Exporter
from rft_cluster.cluster.metrics import RunMetrics
from rft_cluster.config import load_config
from rft_cluster.generator.generator import Generator
from rft_cluster.generator.vllm_options import EngineOptions
from rft_cluster.messages import Sampling
from rft_cluster.prompts import make_prompts
from rft_cluster.run import activity
from rft_cluster.run.records import read_rows
from rft_cluster.run.task import base_model_path, prepare
from rft_cluster.tracking.background import Background
from rft_cluster.tracking.tensorboard import TensorBoard

# Methods of the loop's thread, then of threads beside it; TensorBoard's are called in Background's.
WATCHERS: list[tuple[Any, str, str]] = [
    *((RunMetrics, method, "series") for method in ("step", "phase", "evaluation")),
    *((Background, method, "handing over to TensorBoard") for method in ("step", "rollouts", "evaluation")),
    (Exporter, "export", "export to Ray"),
    *((TensorBoard, method, "TensorBoard") for method in ("step", "rollouts", "evaluation")),
    (activity, "write_text", "activity.json"),
]


class Costs:
    """Seconds spent in functions, by name: that the loop waits for, and of the processor."""

    def __init__(self) -> None:
        self.waited: dict[str, float] = defaultdict(float)
        self.worked: dict[str, float] = defaultdict(float)

    def time(self, owner: Any, function: str, name: str) -> None:
        own: Callable[..., Any] = getattr(owner, function)

        def timed(*arguments: Any, **named: Any) -> Any:
            began, used = time.monotonic(), time.thread_time()
            try:
                return own(*arguments, **named)
            finally:
                self.worked[name] += time.thread_time() - used
                if threading.current_thread() is threading.main_thread():
                    self.waited[name] += time.monotonic() - began

        setattr(owner, function, timed)


def main() -> None:
    options = parsed(__doc__, steps=4, prompts=2300, rounds=30, name="watching")
    engine = engine_seconds(options.rounds)
    run = run_costs(options.steps, options.prompts)
    write_result(options.name, {"machine": machine(), "prompts": options.prompts, "run": run, "engine": engine})
    print(f"{run}\n{engine}")


def run_costs(steps: int, prompts: int) -> dict[str, Any]:
    """Of a step of a real run: its seconds, and the shares of them that the loop waits and that the threads work."""
    overrides = [
        f"run.folder={CACHE / 'run'}",
        "run.name=watching",
        f"schedule.steps={steps}",
        f"schedule.prompts_per_step={prompts}",
        "optimizer.warmup_steps=0",
        "schedule.stop_when_stuck=0",
        "data.validation=0",
        "data.test=20",
    ]
    config = load_config("digits", overrides)
    shutil.rmtree(config.run_folder, ignore_errors=True)
    costs = Costs()
    for owner, function, name in WATCHERS:
        costs.time(owner, function, name)
    assert launch.main(["--config", "digits", *overrides]) == 0, "the run did not end as it should"
    rows = read_rows(config.run_folder / "metrics.jsonl")
    seconds = [sum(value for key, value in row.items() if key.startswith("seconds/")) for row in rows]
    whole = sum(seconds)
    return {
        "step_seconds": spread(seconds),
        "loop_waits_share": sum(costs.waited.values()) / whole,
        "threads_share_of_a_core": sum(costs.worked.values()) / whole,
        "waited_ms_a_step": {name: 1000 * value / steps for name, value in sorted(costs.waited.items())},
        "processor_ms_a_step": {name: 1000 * value / steps for name, value in sorted(costs.worked.items())},
    }


def engine_seconds(rounds: int) -> dict[str, Any]:
    """Seconds of the same completions with vLLM's figures and without, in turns, and the share that they add."""
    config = load_config("digits", ["run.seed=0"])
    task = prepare(config)
    generator = Generator(EngineOptions.of_run(base_model_path(config, task, None), config), task.dataset.images)
    generator.serve_checkpoint(0)
    prompts = make_prompts(task.dataset.test[:48], task.text, "train", 0, 0)
    sampling = Sampling(config.sampling.group_size, 1.0, config.sampling.max_tokens)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 2):
        for counted in (True, False) if number % 2 else (False, True):
            _count(generator, counted)
            began = time.monotonic()
            generator.generate(prompts, sampling, 0)
            if number >= 2:  # the caches are full
                seconds[counted].append(time.monotonic() - began)
    return {
        "with": spread(seconds[True]),
        "without": spread(seconds[False]),
        "added_share": median(seconds[True]) / median(seconds[False]) - 1,
        "added_share_of_the_fastest": min(seconds[True]) / min(seconds[False]) - 1,
    }


def _count(generator: Generator, counted: bool) -> None:
    """Let vLLM make its figures, or not, as `disable_log_stats` would."""
    engine = generator._engine

    def switch() -> None:
        engine.engine_core.engine_core.scheduler.log_stats = counted
        engine.logger_manager = generator.stats if counted else None

    generator._on_thread(switch)


if __name__ == "__main__":
    main()
