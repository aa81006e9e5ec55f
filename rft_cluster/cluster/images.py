"""A run's images in Ray's object store, by hash."""

from collections.abc import Mapping

import numpy as np
import ray


class StoredImages:
    """Encoded images by `ImageRef.sha256`. The driver makes it once a run; every actor gets a copy of the references.

    A process fetches an image when it first needs it. All processes of a host read the same memory of the object store,
    and each other host receives an image once.
    """

    def __init__(self, images: Mapping[str, bytes]) -> None:
        self._references = {sha256: ray.put(np.frombuffer(data, np.uint8)) for sha256, data in images.items()}
        self._fetched: dict[str, np.ndarray] = {}  # views into the object store's memory

    def __getitem__(self, sha256: str) -> bytes:
        if sha256 not in self._fetched:
            self._fetched[sha256] = ray.get(self._references[sha256])
        return self._fetched[sha256].tobytes()
