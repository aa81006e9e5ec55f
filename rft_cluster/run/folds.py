"""Cross-validation (`data.folds`): one run a fold, one after the other, in `runs/NAME/fold-1`, `fold-2`, ...

For sets too small for a test split. Each run tests on its own fold and does not train on it. Every image is thus tested
once, by a model that has not seen it, and the result covers all images.
"""

from pathlib import Path
from typing import Any

from rft_cluster.classification.intervals import wilson
from rft_cluster.common.errors import UserError
from rft_cluster.common.files import write_json
from rft_cluster.config import Config
from rft_cluster.data.manifest import read_manifest
from rft_cluster.run.folder import read_evaluations

FOLDS_FILE = "folds.json"


def fold_configs(config: Config) -> list[Config]:
    """The configuration of each fold's run.

    Raises:
        UserError: `data.manifest` is set, which fixes the test images.
    """
    if config.data.manifest is not None:
        raise UserError("data.folds chooses the images, and so does data.manifest: leave one of them out")
    configs = []
    for fold in range(1, config.data.folds + 1):
        run = config.run.model_copy(update={"folder": config.run_folder, "name": f"fold-{fold}"})
        data = config.data.model_copy(update={"fold": fold})
        configs.append(config.model_copy(update={"run": run, "data": data}))
    return configs


def pool_folds(config: Config) -> dict[str, Any]:
    """Pool the results of all folds' finished runs: `right` of `n` images, with Wilson's interval.

    Raises:
        UserError: two runs tested the same image, because the data changed between them.
    """
    folders = [one.run_folder for one in fold_configs(config)]
    tested = [entry["id"] for folder in folders for entry in read_manifest(folder / "manifest.json")["splits"]["test"]]
    if len(set(tested)) < len(tested):
        raise UserError(
            f"the folds in {config.run_folder} test images twice: the data changed; choose another run.name"
        )
    finals = [read_evaluations(folder, "test")[-1] for folder in folders]
    rights = [round(final["accuracy_strict"] * final["n"]) for final in finals]
    right, n = sum(rights), sum(final["n"] for final in finals)
    return {
        "folds": [{"right": one, "n": final["n"]} for one, final in zip(rights, finals, strict=True)],
        "right": right,
        "n": n,
        "accuracy_strict": right / n,
        "interval": list(wilson(right, n)),
    }


def write_folds(config: Config) -> str:
    """Write `folds.json` into the run's folder. Returns a line for the console."""
    pooled = pool_folds(config)
    file: Path = config.run_folder / FOLDS_FILE
    write_json(file, pooled)
    low, high = (100 * end for end in pooled["interval"])
    each = ", ".join(f"{100 * fold['right'] / fold['n']:.1f}" for fold in pooled["folds"])
    return (
        f"{len(pooled['folds'])} folds together: test accuracy {100 * pooled['accuracy_strict']:.1f} % (95 % interval "
        f"{low:.1f} to {high:.1f}, {pooled['n']} images, each tested once by a model that had not seen it; folds: "
        f"{each} %)\nwritten: {file}. The model in each fold-N/model has learned from that fold's shots alone"
    )
