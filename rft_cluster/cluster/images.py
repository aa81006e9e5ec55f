"""A run's images in Ray's object store, where each process finds them by hash."""

from collections.abc import Mapping

import numpy as np
import ray


class StoredImages:
    """Encoded images by `ImageRef.sha256`. Made once a run by the driver; every actor gets a copy of its references.

    A process fetches an image when it first needs it. On the host that stores them it then reads the store's memory, so
    that ten actors hold no more than one; a host that does not is sent each image once.
    """

    def __init__(self, images: Mapping[str, bytes]) -> None:
        self._references = {sha256: ray.put(np.frombuffer(data, np.uint8)) for sha256, data in images.items()}
        self._fetched: dict[str, np.ndarray] = {}  # views of the store's memory

    def __getitem__(self, sha256: str) -> bytes:
        if sha256 not in self._fetched:
            self._fetched[sha256] = ray.get(self._references[sha256])
        return self._fetched[sha256].tobytes()
