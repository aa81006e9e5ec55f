"""Helpers for every folder: errors, files, text, and the differences of CPUs and GPUs. Imports no other folder."""
