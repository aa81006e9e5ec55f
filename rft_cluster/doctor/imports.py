"""Import packages one after the other: python -m rft_cluster.doctor.imports torch vllm

Prints a line of JSON about each, whose values are texts.
"""

import importlib
import json
import sys
import time
from types import ModuleType

from rft_cluster.common.text import printable

MOST = 300  # characters of an error


def told_of(name: str) -> dict[str, str]:
    """Import a package. `error`: one line, empty if it can be imported."""
    began = time.monotonic()
    try:
        module = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - not swallowed: whatever it is, the user is told
        return {"name": name, "error": f"{type(error).__name__}: {printable(str(error))[:MOST]}"}
    return {"name": name, "error": "", "seconds": str(time.monotonic() - began), **_of_torch(name, module)}


def _of_torch(name: str, module: ModuleType) -> dict[str, str]:
    """The versions of CUDA and NCCL that torch was built with; empty texts for a build without."""
    if name != "torch":
        return {}
    cuda = module.version.cuda or ""
    nccl = ".".join(map(str, module.cuda.nccl.version())) if module.distributed.is_nccl_available() else ""
    return {"cuda": cuda, "nccl": nccl}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(told_of(name)), flush=True)
