"""All code that treats an answer as a class name: answers, votes, intervals, baselines, red team, the export's card.
Imports `data`, `prompts` and `rewards`."""
