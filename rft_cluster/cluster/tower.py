"""Features of the starting model's vision tower, or of an image encoder, for the baselines on a run's images.

An actor of its own computes them from the model's files, with the device of one learner, when the run's actors have
ended: no step waits for it, it takes no memory from them, the weights in the learners have changed by then, and the
driver may be on a node without a GPU. It ends with its work. What is on the driver's disk is not computed again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rft_cluster.cluster.alone import alone
from rft_cluster.cluster.handles import wait_for
from rft_cluster.cluster.nodes import everywhere
from rft_cluster.common.errors import ClusterError, UserError, described
from rft_cluster.common.progress import with_progress
from rft_cluster.config import Config
from rft_cluster.model.feature_cache import cache_file, encoder_cache_file, image_key, read_rows, write_rows
from rft_cluster.model.image_encoder import ImageEncoder
from rft_cluster.model.tower import VisionTower

CACHE = Path("~/.cache/rft_cluster/features")
MOST_SECONDS = 15 * 60  # a baseline is worth no more; a 2B model on a few CPU cores needs seconds an image
TRIED_SECONDS = 20.0  # after which the rest is estimated

Look = Callable[[bytes], np.ndarray]


Seeing = type[VisionTower] | type[ImageEncoder]
NAMES: dict[Seeing, str] = {VisionTower: "the vision tower", ImageEncoder: "the image encoder"}


def features_of(
    config: Config, path: str, images: Mapping[str, bytes], seeing: Seeing = VisionTower
) -> tuple[Mapping[str, np.ndarray] | None, str]:
    """A vector [values] FP32 for each image by its SHA-256, from the vision tower of the model in `path`, or from the
    image encoder there.

    Returns (None, the reason) if there is none: a finished run does not fail for its baselines.
    """
    try:
        return _features(config, path, images, seeing), ""
    except (UserError, ClusterError, OSError) as error:
        return None, described(error)


def _features(config: Config, path: str, images: Mapping[str, bytes], seeing: Seeing) -> dict[str, np.ndarray]:
    named = cache_file if seeing is VisionTower else encoder_cache_file
    file = named(CACHE.expanduser(), path, config)
    rows = read_rows(file)
    # As they are looked at: shrunk to the policy's limits, and 16-bit values as the configuration shows them.
    keys = {sha256: image_key(image) for sha256, image in images.items()}
    shown = {keys[sha256]: image for sha256, image in images.items()}
    if missing := sorted(shown.keys() - rows.keys()):
        print(f"for comparison, {NAMES[seeing]} looks at {len(missing)} images", flush=True)
        with _started(config, path, seeing) as look:
            rows |= look_at(missing, shown, look, NAMES[seeing])
        try:
            write_rows(file, rows)
        except OSError as error:  # the features are here all the same
            print(f"WARNING: these features cannot be kept, so a resumed run computes them again: {described(error)}")
    return {sha256: rows[key] for sha256, key in keys.items()}


def look_at(
    wanted: Sequence[str],
    images: Mapping[str, bytes],
    look: Look,
    who: str = NAMES[VisionTower],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, np.ndarray]:
    """The vectors of the images `wanted`, by SHA-256; prints how far it is. `who`: looks, for people.

    Raises:
        UserError: it would take more than `MOST_SECONDS`.
    """
    rows, started = dict[str, np.ndarray](), clock()
    for done, sha256 in enumerate(with_progress(wanted, f"images seen by {who}")):
        seconds = clock() - started
        if done and seconds > TRIED_SECONDS and (whole := seconds / done * len(wanted)) > MOST_SECONDS:
            raise UserError(
                f"{who} would need {whole / 60:.0f} minutes for {len(wanted)} images on this device, and "
                f"gets {MOST_SECONDS // 60}: use fewer (data.test), or a GPU"
            )
        rows[sha256] = look(images[sha256])
    return rows


@contextmanager
def _started(config: Config, path: str, seeing: Seeing) -> Iterator[Look]:
    """Start the actor, and end it with the context."""
    threads, name = max(1, int(config.learners.cpus)), NAMES[seeing].removeprefix("the ").replace(" ", "-")
    with alone(config, name, seeing, everywhere(path), config, threads) as actor:
        yield lambda image: wait_for({actor.features.remote(image): name}, config.cluster.step_timeout, "features")[0]
