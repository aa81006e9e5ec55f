"""One thread, for torch and for NumPy's and SciPy's libraries: two would wait for each other on shared cores."""

import os

# Read when the libraries are loaded, so before anything imports them.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch

torch.set_num_threads(1)
