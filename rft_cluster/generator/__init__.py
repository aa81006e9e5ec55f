"""The role that writes completions: a vLLM engine in its own process. Imports `model` and `weights`, no other role."""
