"""Checks of a machine's GPUs, in tiers: `python -m benchmarks.gpu_check`."""
