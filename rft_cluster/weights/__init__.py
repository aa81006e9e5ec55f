"""Weight transfer from learners to generators, and its verification. Imports `model`."""
