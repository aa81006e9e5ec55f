"""Fill a run's object store, and hold what is in it until the input is closed: python -m tests.faults.hoard ADDRESS

Prints the bytes that are held, and the bytes of the store.
"""

import sys

import numpy as np
import ray

ONE = 10_000_000  # bytes

if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    store = int(ray.cluster_resources()["object_store_memory"])
    kept = [ray.put(np.ones(ONE, np.uint8)) for _ in range(2 * store // ONE)]
    views = [ray.get(reference) for reference in kept]  # what somebody looks at cannot be moved to the disk
    print(sum(view.nbytes for view in views), store, flush=True)
    sys.stdin.read()
