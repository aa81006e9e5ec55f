"""Features of images on the driver's disk, by content, so that a resumed run or a sweep computes none twice.

One file for each model and way of looking, with a vector for each image by the SHA-256 of the bytes that were looked
at. Any of them may be removed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from rft_cluster.common.files import file_sha256
from rft_cluster.config import Config
from rft_cluster.model.folder import read_family
from rft_cluster.model.hub import Model, find_model

RECIPE = 2  # raise it when the same image gets other features
FILES = ("*.safetensors", "*.json")  # the weights, and what says how to use them


def cache_file(folder: Path, path: str, config: Config) -> Path:
    """The file in `folder` for the model that `path` names, as `config` shows images to it.

    Raises:
        UserError: the model cannot be found, or is of no known family.
    """
    model = find_model(path)
    limits = config.model.pixels(read_family(model.folder).side)
    return _file(folder, config, _digest(model), *limits)


def encoder_cache_file(folder: Path, path: str, config: Config) -> Path:
    """As `cache_file`, for the image encoder in `path`, which chooses the size of images itself."""
    return _file(folder, config, _digest(Model(Path(path))))


def _file(folder: Path, config: Config, digest: str, *limits: int) -> Path:
    looks = [RECIPE, *limits, config.cluster.device, config.cluster.dtype]
    name = hashlib.sha256(json.dumps([digest, *looks]).encode()).hexdigest()[:16]
    return folder / f"{name}.safetensors"


def _digest(model: Model) -> str:
    """Of the files' contents; of a hub model whose weights only the other nodes have, the hub's commit."""
    if model.missing:
        return model.folder.name
    files = sorted(file for pattern in FILES for file in model.folder.glob(pattern))
    return hashlib.sha256("".join(file.name + file_sha256(file) for file in files).encode()).hexdigest()


def image_key(image: bytes) -> str:
    """What the vector of an encoded image is kept by."""
    return hashlib.sha256(image).hexdigest()


def read_rows(file: Path) -> dict[str, np.ndarray]:
    """The vectors in a file, FP32 by SHA-256; none if it is missing, damaged or not to be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        return {}


def write_rows(file: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Replace the file. Runs that end together each write their own; the last one stays, and is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(save(dict(rows)))
        os.replace(temporary, file)
    except BaseException:  # a signal, too
        temporary.unlink(missing_ok=True)
        raise
