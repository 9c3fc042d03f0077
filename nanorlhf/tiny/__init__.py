"""The embedded tiny world: a synthetic Reddit whose every fact is known, so that summaries can be judged exactly.

Reading order: lexicon (words) -> grammar (facts to text) -> posts (an id is a seed) -> gold (the judge)
-> annotator (the biased human) -> world (comparisons) -> corpus (pretraining text) -> data (files on disk).
All of these are pure Python. pretrain and build, which make the embedded checkpoints, import torch.
"""
