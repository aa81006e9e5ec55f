"""All code that depends on the model: its families, its encoder, the trained policy, and the tiny model of the demo.
Imports `data` and `prompts`."""
