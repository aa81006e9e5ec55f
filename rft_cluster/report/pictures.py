"""Find the pictures of a run: its own thumbnails, else the images of its data set, else say why there are none."""

import os
from collections.abc import Sequence
from pathlib import Path

from rft_cluster.common.errors import UserError
from rft_cluster.config import load_run_config
from rft_cluster.data import load_dataset
from rft_cluster.run.history import History
from rft_cluster.run.thumbnails import read_thumbnails, thumbnails, wanted

# What a page does not use, and what would have to be confirmed: it runs code, or connects.
UNUSED = ("rewards", "scoring", "algorithm", "prompt", "run.sinks", "data.manifest", "cluster.address",
          "cluster.interface", "model.trust_remote_code")  # fmt: skip


def find_pictures(history: History, overrides: Sequence[str], from_data: bool) -> tuple[dict[str, bytes], str]:
    """Thumbnails by SHA-256, and why images lack one: empty if none does.

    `overrides`: as in `data.path=FOLDER`, where the images are now. `from_data`: read the data set for those that the
    run's folder lacks. Nothing is downloaded.
    """
    entries = [entry for own in (history.manifest or {"splits": {}})["splits"].values() for entry in own]
    hashes = {entry["sha256"] for entry in entries}
    found = {sha256: content for sha256, content in read_thumbnails(history.folder).items() if sha256 in hashes}
    missing = ""
    if len(found) < len(hashes) and from_data and not (found and not overrides):
        try:
            found |= _of_data(history.folder, overrides)
        except UserError as error:
            missing = f" The data set could not be read: {error}"
    if len(found) >= len(hashes):
        return found, ""
    return found, f"{len(hashes) - len(found)} of {len(hashes)} images are shown without a picture.{missing}"


def _of_data(run: Path, overrides: Sequence[str]) -> dict[str, bytes]:
    """Raises UserError if the images are not there, are others, or are read by a function that nobody has confirmed."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    config = load_run_config(run, run / "config.yaml", list(overrides), without=UNUSED)
    own = {"manifest": run / "manifest.json", "download": config.data.download and "data.download=true" in overrides}
    dataset = load_dataset(config.data.model_copy(update=own), config.run.seed)
    return thumbnails(wanted(dataset), dataset.images)
