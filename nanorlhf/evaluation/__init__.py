"""Did it get better, and may one believe it? Summaries, ROUGE and win rates with intervals, the judges, the reward
model's card, what a policy is up to (`hacks`), and the report."""
