"""One run: what is to be learned, checked before any actor starts, and its folder on disk. Imports `data`, `prompts`,
`algorithm`, `classification` and `model`."""
