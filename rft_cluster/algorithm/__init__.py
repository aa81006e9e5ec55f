"""GRPO as mathematics, from rewards to the loss: pure functions. Imports `common` and the messages alone."""
