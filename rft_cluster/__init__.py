import sys

from rft_cluster.common import stopping

if sys.argv[:1] == ["-m"]:  # `python -m rft_cluster.NAME` is about to load a command, which takes seconds
    stopping.end_quietly()
