"""One thread: two would wait for each other where other work shares the cores."""

import torch

torch.set_num_threads(1)
