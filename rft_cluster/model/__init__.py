"""Everything that knows Qwen2-VL: its encoder, the policy that is trained, and the tiny one of the demo. Imports
`data` and `prompts`."""
