"""The only folder that knows that an answer is a class name: answers, votes, intervals, baselines, red team, the
export's card. Imports `data`, `prompts` and `rewards`."""
