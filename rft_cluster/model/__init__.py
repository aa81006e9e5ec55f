"""All code that depends on Qwen2-VL: its encoder, the trained policy, and the tiny model of the demo. Imports
`data` and `prompts`."""
