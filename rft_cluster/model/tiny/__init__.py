"""`model.path: tiny`: a small, real Qwen2-VL, built and warm-started on this machine for one data set."""
