"""Shows a run in TensorBoard and W&B. Imports `run`, `classification` and `data`; never torch."""
