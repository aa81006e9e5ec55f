"""Faster imports of large libraries, which take most of a process's start."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# If installed, transformers imports these for assisted decoding and the losses of detectors, vLLM for audio and
# tracing. Nothing here uses them, and they take a third of the time.
UNUSED = ("sklearn", "scipy", "pandas", "opentelemetry")


@contextmanager
def light_imports() -> Iterator[None]:
    """Hide the modules in `UNUSED` from imports within this context, unless they are imported already.

    Garbage collection is off meanwhile, and later collections skip the objects made here: imports make a million
    objects that live as long as the process, and scanning them again and again takes a fifth of the time.
    """
    hidden, known = [name for name in UNUSED if name not in sys.modules], len(sys.modules)
    collected = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's own sign for "not installed"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if len(sys.modules) > known:
            gc.freeze()
            atexit.register(gc.unfreeze)  # otherwise triton reports these objects as leaks at the exit
        if collected:
            gc.enable()
