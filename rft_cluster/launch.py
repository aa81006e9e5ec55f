"""Train a classifier: python -m rft_cluster.launch --config digits [section.key=value ...] [--dry-run] [--resume]"""

import argparse
import os
import sys
import time
from pathlib import Path

from rft_cluster.config import Config, load_config
from rft_cluster.data import FewShotDataset, load_dataset
from rft_cluster.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 for a mistake of the user's. Defects keep their traceback."""
    parser = argparse.ArgumentParser(prog="python -m rft_cluster.launch", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or the bare name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the config")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    options = parser.parse_intermixed_args(arguments)
    try:
        launch(load_config(options.config, options.overrides), options.dry_run, options.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def launch(config: Config, dry_run: bool, resume: bool) -> None:
    """Check all that can be checked, then train. Nothing is written before the checks are over."""
    from rft_cluster.baselines import nearest_neighbour_and_regression
    from rft_cluster.plan import describe
    from rft_cluster.prompts import render_template
    from rft_cluster.rewards import load_rewards
    from rft_cluster.tracker import clock, first_step_of

    dataset = load_dataset(config.data, config.run.seed)
    template = render_template(config.prompt.template, config.prompt.subject, dataset.classes, problem=dataset.problem)
    load_rewards(config.rewards)
    first_step, _ = first_step_of(config, resume or dry_run)
    print(
        f"{dataset.name}: {len(dataset.classes)} classes, {len(dataset.train)} images to learn from, "
        f"{len(dataset.validation)} for validation, {len(dataset.test)} for the test",
        flush=True,
    )
    print(describe(config, len(dataset.train)), flush=True)
    if dry_run:
        if config.model.path != "tiny":
            from rft_cluster.qwen2vl import check_model_folder

            check_model_folder(config.model.path, config.max_model_tokens)
        _check_running_cluster(config)
        return
    if first_step >= config.schedule.steps and (config.run_folder / "model").exists():
        print(f"{config.run_folder} is complete: all {first_step} steps are done, and model/ is there")
        return

    start = time.monotonic()
    model_path = _model_path(config, dataset, template)
    _check_model(config, dataset, template, model_path)

    from rft_cluster.train import train

    print(f"starting the actors (model ready after {clock(time.monotonic() - start)})", flush=True)
    train(config, dataset, template, model_path, resume)
    for name, accuracy in nearest_neighbour_and_regression(dataset).items() if dataset.test else ():
        print(f"for comparison, {name} on the same {len(dataset.train)} images: test accuracy {100 * accuracy:.1f} %")
    print(
        f"done in {clock(time.monotonic() - start)}: {config.run_folder}/model holds the trained model",
        flush=True,
    )


def _model_path(config: Config, dataset: FewShotDataset, template: str) -> str:
    if config.model.path != "tiny":
        return config.model.path
    from rft_cluster.data.images import open_image
    from rft_cluster.tiny import ensure_tiny_model

    folder = ensure_tiny_model(
        Path("~/.cache/rft_cluster/tiny").expanduser(),
        images=[open_image(image) for image in dataset.pool],
        class_names=dataset.classes,
        prompt_text=template,
        pixels=config.model.max_pixels,
        seed=config.run.seed,
        report=lambda line: print(line, flush=True),
    )
    return str(folder)


def _check_model(config: Config, dataset: FewShotDataset, template: str, model_path: str) -> None:
    from rft_cluster.prompts import make_prompts
    from rft_cluster.qwen2vl import PromptEncoder, check_model_folder

    check_model_folder(model_path, config.max_model_tokens)
    encoder = PromptEncoder(
        model_path, config.model.min_pixels, config.model.max_pixels, config.model.trust_remote_code
    )
    examples = [*dataset.train, *dataset.validation, *dataset.test]
    encoder.check_lengths(make_prompts(examples, template, "check", 0, config.run.seed), config.model.max_prompt_tokens)


def _check_running_cluster(config: Config) -> None:
    """Hold the plan against the cluster that the run would join, where one is reachable."""
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        print("no cluster address is set: the run would start Ray on this machine")
        return
    from rft_cluster.cluster import check_cluster

    print(check_cluster(config))


if __name__ == "__main__":
    sys.exit(main())
