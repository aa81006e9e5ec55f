import os
import sys

from rft_cluster.common import stopping

# OpenMP's threads sleep while they wait for each other. They would spin, and take the cores from the thread that they
# wait for: with three other programs on two cores small layers then ran 100 times as slowly. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Intel's OpenMP runtime, where it is preloaded, binds each forked child to the first core, also when the child becomes
# another program: all of a Ray that a process starts after its first parallel loop, actors included, then shared one
# core. Read at that first loop.
os.environ.setdefault("KMP_AFFINITY", "none")

# What Ray would print beside our own words about a lost actor or node: guesses at length, and 20 lines of a C++ stack.
# Read when Ray is imported.
RAYLETS_WORDS = (
    r"\AA worker died or was killed while executing|\AThe node with node id: .* has been marked dead|"
    r"\ARaylet is terminated"
)
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", RAYLETS_WORDS)

if sys.argv[:1] == ["-m"]:  # `python -m rft_cluster.NAME` is about to load a command, which takes seconds
    stopping.end_quietly()
