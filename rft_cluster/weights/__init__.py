"""How weights travel from learners to generators, and how their arrival is verified. Imports `model`."""
