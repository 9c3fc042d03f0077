"""nanorlhf: RLHF with PPO on TL;DR summarisation, readable from a post to a gradient. Start with train_ppo.py."""
