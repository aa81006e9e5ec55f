"""The roles as Ray actors: placement, start, calls, deadlines. The only folder that imports Ray, and the one that knows
all roles."""

import os

# Read when Ray is imported. Its own handler answers a SIGTERM in the middle of `ray.init` with a C++ stack.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
