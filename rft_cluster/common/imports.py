"""Large libraries, imported as quickly as they can be: a role's process spends most of its start on them."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Where these are installed, transformers imports them for assisted decoding and the losses of detectors, and vLLM for
# audio and tracing. Nothing here uses any of that, and they take a third of the time.
UNUSED = ("sklearn", "scipy", "pandas", "opentelemetry")


@contextmanager
def light_imports() -> Iterator[None]:
    """What is imported in here finds none of `UNUSED` that is not imported yet; afterwards they can be imported again.

    Meanwhile no garbage is collected, and what was made stays out of later collections: imports make a million objects
    that live as long as the process, and to look through them again and again takes a fifth of the time.
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
            atexit.register(gc.unfreeze)  # or triton lists at the end what it takes for leaks
        if collected:
            gc.enable()
