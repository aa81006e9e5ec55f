"""The families of models that can be trained, one file each. `known.py` finds a model's family by its config.json."""
