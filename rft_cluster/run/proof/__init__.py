"""The parts of a run's ledger: the checks of one step, of what a run keeps, and the account of its prompts."""
