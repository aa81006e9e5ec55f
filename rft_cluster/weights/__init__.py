"""How weights travel from learners to generators, and the proof that they arrived. Imports `model`."""
