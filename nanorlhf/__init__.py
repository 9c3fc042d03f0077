"""nanorlhf: RLHF with PPO on TL;DR summarisation, readable from a post to a gradient.

The files beside this one are the lesson; start with train_ppo.py. The folders hold what surrounds it: `data`,
`storage`, `run`, `evaluation`, `monitoring`, and `tiny`, a world whose truth is known.
"""
