"""Watch a run in a terminal: `python -m rft_cluster.watch RUN_DIR`."""
