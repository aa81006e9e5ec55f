"""Ten classes of clothes as folders of PNG files: Fashion-MNIST (arXiv 1708.07747), real photographs to train on.

    sudo apt-get install dataset-fashion-mnist          # Debian's package
    python examples/fashion_folder.py clothes --per-class 60

The images come from the training file, chosen by the seed, and are enlarged from 28x28 to 56x56 pixels. A file is named
by its row there. Elsewhere than on Debian give `--source` the folder of the two published files
train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz.
"""

import argparse
import gzip
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SOURCE = Path("/usr/share/datasets/fashion-mnist")
SIDE = 56


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet, or empty")
    parser.add_argument("--per-class", type=int, default=60, help="images of each class, 1 to 6000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path, default=SOURCE, help="the folder of the two files")
    options = parser.parse_args(arguments)
    try:
        images, labels = (
            read_idx(options.source / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1")
        )
        written = write_folders(options.out, images, labels, options.per_class, options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {written} images in {len(CLASSES)} folders")
    return 0


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file: 2 zeros, the type (8: bytes), the number of sizes, 4 bytes a size, data."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. On Debian: apt-get install dataset-fashion-mnist. Elsewhere: download the two "
            f"training files from https://github.com/zalandoresearch/fashion-mnist and give their folder as --source"
        )
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        if (zeros, kind) != (0, 8):
            raise ValueError(f"it starts with {data[:4]!r}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (EOFError, struct.error, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path} is not the published file ({error}): get it again") from error


def write_folders(out: Path, images: np.ndarray, labels: np.ndarray, per_class: int, seed: int) -> int:
    """`images` [N, 28, 28] and `labels` [N], 0 to 9. Returns the number of files written."""
    fewest = min(int((labels == target).sum()) for target in range(len(CLASSES)))
    if not 1 <= per_class <= fewest:
        raise ValueError(f"--per-class is {per_class}: the file has 1 to {fewest} images for each class")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a new folder, or remove it first")
    for target, name in enumerate(CLASSES):
        rows = np.flatnonzero(labels == target)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for row in sorted(np.random.default_rng([seed, target]).permutation(rows)[:per_class]):
            Image.fromarray(images[row]).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{row:05d}.png")
    return per_class * len(CLASSES)


if __name__ == "__main__":
    sys.exit(main())
