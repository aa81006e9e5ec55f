"""The data set Oxford 102 Flowers, of the official archive in `data.path` or, with `data.download`, in the cache.

The official splits are kept: the shots are drawn from `trnid` (10 images a class), validation images from `valid`, test
images from `tstid`. Few-shot work since CoOp (arXiv 2109.01134) divides the images otherwise; its test list has 2,463.
"""

from pathlib import Path

from rft_cluster.config import DataSection
from rft_cluster.data.archive import flower_classes, open_archive, open_splits
from rft_cluster.data.assemble import assemble
from rft_cluster.data.dataset import FewShotDataset
from rft_cluster.data.manifest import read_manifest
from rft_cluster.data.official import official_archive
from rft_cluster.data.reading import Unread


def load_flower102(config: DataSection, seed: int) -> FewShotDataset:
    """The few-shot splits of the archive. Example ids are paths in it.

    Raises:
        UserError: the archive is not complete (see `open_archive`) or cannot be fetched (see `official_archive`),
            `data.classes` differs from the 102 names, too many images are asked for, or a chosen one cannot be decoded.
    """
    where = (official_archive() if takes_official(config) else config.path, "data.path", config.max_bytes)
    parts = open_splits(*where)
    if config.manifest and not _follows(config.manifest, parts):
        parts = {"train": open_archive(*where)}
    return assemble("flower102", parts, flower_classes(), config, seed)


def _follows(file: Path, parts: dict[str, Unread]) -> bool:
    """Return True if a manifest has the official splits' images in these splits; older ones may have them in others."""
    named = read_manifest(file)["splits"]
    ids = {role: {example.example_id for example in part.examples} for role, part in parts.items()}
    return all(entry["id"] in ids[role] for role, entries in named.items() for entry in entries)


def takes_official(config: DataSection) -> bool:
    """Return True if images come from the official archive in the cache: no path says where another copy is."""
    if config.source == "flower102":
        return config.download and config.path is None
    return config.download and config.held_out is None and config.validation + config.test > 0
