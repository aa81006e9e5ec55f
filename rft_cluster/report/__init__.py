"""The report of a run: one HTML file that needs nothing else. `python -m rft_cluster.report RUN_DIR`."""
