"""One run: its task, the checks before any actor starts, and its folder on disk. Imports `data`, `prompts`,
`algorithm`, `classification` and `model`."""
