"""One post from text to gradient, with the real numbers, beside the code that makes them.

    python -m docs.walk        writes docs/walk.md, walk.html, walk.ipynb, their figures, and docs/kl_estimators.md

This script in cells is the page: comments are its prose, every number comes from the run. Nothing here is an
implementation; what runs, and what is shown, are the functions that train_ppo.py calls. The models are the embedded
checkpoints of the tiny world, on a CPU.
"""

# %%
import copy
import os
import sys
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: how long a CPU thread waits awake for the others
ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "train_ppo.py").exists())
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.nn.functional as F
from mutations import MUTATIONS
from planting import planted

import train_ppo
from docs.walking import figures, fused
from docs.walking.book import Book, Table
from docs.walking.numbers import digits, fixed, row, total
from kernels import linear_cross_entropy
from kernels.kl import kl_reference
from kernels.linear import linear_fp32
from kernels.linear_ppo_loss import _loss_rows
from kernels.sample_head import sample
from nanorlhf import losses, ppo
from nanorlhf.data import tldr
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.models import Policy, ScalarModel, critic_from, response_kl
from nanorlhf.optim import AdamW
from nanorlhf.packing import Packed, pack
from nanorlhf.rollout import generate, uniforms
from nanorlhf.run.config import parse
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.run import read_metrics
from nanorlhf.storage.checkpoint import load_policy, load_scalar
from nanorlhf.tiny.world import make_comparison, make_post

book = Book(ROOT / "docs" / "walk.py", "The walk: one post from text to gradient")
PAPER = ["--num_ppo_epochs", "4", "--num_minibatches", "1"]  # as in the paper, whatever the preset says
cfg = parse(train_ppo.Config, train_ppo.PRESETS, train_ppo.__doc__, ["--preset", "tiny", *PAPER])
R, T = cfg.response_length, cfg.temperature
FAULTS = {mutation.name: mutation for mutation in MUTATIONS}
interpreter = fused.start()  # for station 12


def shown(token: int) -> str:
    """A token as one can see it: its blanks as ␣."""
    if token in (tokenizer.bos_id, tokenizer.eos_id):
        return "<BOS>" if token == tokenizer.bos_id else "<EOS>"
    return tokenizer.decode([token]).replace(" ", "␣").replace("\n", "⏎") or f"<{token}>"


def quoted(tokens: list[int]) -> str:
    return " ".join(f"`{shown(token)}`" for token in tokens)


# %% [markdown]
# # The walk: one post from text to gradient
#
# One post of the [tiny world](tiny_world.md), a small Reddit whose truth is known, goes through everything that RLHF
# with PPO does to it: tokens, supervised fine-tuning, reward model, rollout, rewards, advantages, loss, gradient, one
# step of the optimizer. Every number in the tables and answers below was computed as the page was made, by the
# functions shown beside them. `python -m docs.walk` makes these pages again, and a test compares.
#
# Three forms of the same page: [walk.md](walk.md), walk.html (open it from a clone: point at a token and it lights up
# at every station), and [walk.ipynb](walk.ipynb), to change things and see.
#
# **Where we are in training.** The policy is the embedded PPO checkpoint, so it differs from its reference, the SFT
# model, and KL is not zero. The critic is as new as in the first update of `train_ppo.py`: it *is* the reward model,
# and has learned nothing about unfinished summaries yet. The walk then makes one update with a small batch.
#
# | step of [train_ppo.py](../train_ppo.py) | stations |
# |---|---|
# | 1. read posts | [1](#1-text-becomes-ids), [2](#2-many-posts-one-row) |
# | 2. load four models | made in [3](#3-supervised-fine-tuning-the-next-token) (SFT) and [4](#4-the-reward-model-one-number) (reward model) |
# | 3. rollout | [5](#5-rollout-five-likely-tokens-and-a-random-number) |
# | 4. score | [6](#6-what-counts-the-masks), [7](#7-score-and-kl) |
# | 5. rewards and advantages | [8](#8-rewards), [9](#9-advantages), [10](#10-whitening) |
# | 6. learn | [11](#11-ratio-clip-and-loss), [12](#12-the-gradient-by-hand), [13](#13-one-step-of-adamw), [14](#14-the-clipped-objective) |
#
# Dimensions: B sequences, N packed tokens, R response tokens, V vocabulary. L is the index of a response's first EOS.
# Details in brackets are the paper's, U for the steps of its code ([the ledger](details.md)); L + 1 and the like are
# explained where they come up.

# %%
tokenizer = load_tokenizer(EMBEDDED / "sft")
base, sft, policy = (load_policy(EMBEDDED / stage) for stage in ("base", "sft", "ppo"))
reference = load_policy(EMBEDDED / "sft").requires_grad_(False)
reward_model = load_scalar(EMBEDDED / "rm").requires_grad_(False)
critic = critic_from(reward_model).requires_grad_(True)

B = 24
posts = [make_post("valid", i) for i in range(B)]  # the first held-out posts
queries = [tldr.encode_query(tokenizer, p.subreddit, p.title, p.post, cfg.max_query_length) for p in posts]
responses, sampled_logprobs = generate(policy, queries, R, T, seed=cfg.seed)  # (B, R) each
last = ppo.last_token(responses, tokenizer.eos_id)  # (B,)
stops = (responses == tokenizer.eos_id).any(1) & (last < R - 2) & (last >= 4)
mine = int(stops.int().argmax())  # the first whose response stops, with room behind it: the post that is walked
assert stops[mine], "no response of the batch stops with room behind it: is this policy trained?"
post, query, response, L = posts[mine], queries[mine], responses[mine], int(last[mine])
names = [shown(token) for token in response.tolist()]  # R tokens

shapes = dict(
    queries=f"{B} token lists", responses=f"({B}, {R})", logprobs=f"({B}, {R})", ref_logprobs=f"({B}, {R})",
    scores=f"({B},)", values=f"({B}, {R})", rewards=f"({B}, {R})",
)  # fmt: skip
book.figure("walk_pipeline", figures.pipeline(shapes), "The four models of PPO and what flows between them")

# %% [markdown]
# ## 1. Text becomes ids
#
# A post is put into a fixed frame that ends in `TL;DR:` without a space; the space belongs to the response
# [details 2.1, 2.3, 3]. BOS (beginning of sequence) opens the query, and EOS (end of sequence) closes the response. PAD, which
# fills up rows in other code, is not needed here. Ids are joined as they are and never decoded and encoded again. A
# query over the limit loses the end of its *post*, never its title or its `TL;DR:` [detail 2.2].

# %%
reference_response = tldr.encode_response(tokenizer, post.summary)
short = len(query) - 12
cut, kept = tldr.fit_query(tokenizer, post.subreddit, post.title, post.post, short)
book.code(tldr.format_query, tldr.encode_response, tldr.fit_query)
book.say(
    f"""
    The post that we follow (`{post.id}`): **{post.title}** {post.post}

    Its author's summary: *{post.summary}*
    """
)
book.table(
    ["", "ids", "begins", "ends"],
    [
        ["query", f"{len(query)}", quoted(query[:7]), quoted(query[-7:])],
        [f"the same, at most {short} ids", f"{len(cut)}", quoted(cut[:7]), quoted(cut[-7:])],
        [
            "author's response",
            f"{len(reference_response)}",
            quoted(reference_response[:5]),
            quoted(reference_response[-4:]),
        ],
    ],
    note=f"Of the {len(post.post)} characters of the post, {kept} stay at {short} ids.",
)


# %%
@torch.no_grad()
def mean_logprob(query: list[int], response: list[int]) -> float:
    """Mean log-prob of the response's tokens under the SFT model, at temperature 1."""
    logits = sft.logits([query + response])[0][-len(response) - 1 : -1]  # (T, V) before each of them
    return F.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).mean().item()


with planted(FAULTS["space_after_tldr"]):
    faulty = tldr.encode_query(tokenizer, post.subreddit, post.title, post.post, cfg.max_query_length)
book.question(
    "space_after_tldr",
    """The frame ends in `TL;DR: ` with a space, and the response still brings its own. Which ids change, and what does the SFT
    model say of the author's summary now?""",
    Table(
        ["", "last ids of the query", "mean log-prob of a response token"],
        [
            [name, " ".join(map(str, ids[-4:])) + ": " + quoted(ids[-4:]), fixed(mean_logprob(ids, reference_response))]
            for name, ids in (("as it should be", query), ("with the fault", faulty))
        ],
    ),
    """One id at the end of the query, right where the summary begins. Nothing crashes; but the model has never seen that
    place in training. [The planted faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 2. Many posts, one row
#
# Sequences of different lengths are put one after the other into a single row: no padding, so no padding bugs.
# Positions restart at 0, and `cu_seqlens` tells attention where it may not look across [detail 5: the paper pads
# instead; the results are the same]. What must be right here is the shift by one: the hidden state that *predicts*
# response token t is that of the token before it. Nobody reads the others, so behind the attention of the last layer
# only these rows go on.
#
# *Our response* is what the policy will write in station 5; it is here already to show where its tokens stand.

# %%
two = [queries[0] + responses[0].tolist(), query + response.tolist()] if mine else [query + response.tolist(),
       queries[1] + responses[1].tolist()]  # fmt: skip
packed_two = pack(two)
which = two.index(query + response.tolist())
rows_of_response = packed_two.response_rows(R)  # (2, R)
book.code(pack, Packed.response_rows)
book.table(
    ["", "value"],
    [
        ["lengths", str(list(packed_two.lengths))],
        ["tokens (N,)", f"N = {len(packed_two.tokens)}, of which {packed_two.filling} are filling that nobody reads"],
        ["cu_seqlens (B+1,)", str(packed_two.cu_seqlens.tolist())],
        [
            "positions at the seam",
            "... " + " ".join(map(str, packed_two.positions[packed_two.lengths[0] - 3 :][:6].tolist())) + " ...",
        ],
        ["rows that predict our response", f"{rows_of_response[which, 0]} to {rows_of_response[which, -1]}"],
        [
            "token in the first of them",
            f"`{shown(packed_two.tokens[rows_of_response[which, 0]].item())}`, the last of the query",
        ],
    ],
    note="Two posts of the batch, ours among them.",
)

# %%
everything = [q + r for q, r in zip(queries, responses.tolist(), strict=True)]
packed = pack(everything)
action_mask, value_mask = ppo.action_mask(responses, tokenizer.eos_id), ppo.value_mask(responses, tokenizer.eos_id)
with torch.no_grad():
    logprobs, entropy = policy.response_logprobs(packed, responses, T)  # (B, R) each
    with planted(FAULTS["state_off_by_one"]):
        shifted, _ = policy.response_logprobs(packed, responses, T)
book.question(
    "state_off_by_one",
    """The rows are read one too late, at the token itself. Which is larger, the log-prob of our response as it should
    be or with the fault, and by how much?""",
    Table(
        ["token", "log-prob", "with the fault"],
        [[f"`{names[t]}`", fixed(logprobs[mine, t]), fixed(shifted[mine, t])] for t in range(5)]
        + [["*all up to EOS*", fixed(logprobs[mine, : L + 1].sum()), fixed(shifted[mine, : L + 1].sum())]],
        [*range(5), None],
    ),
    """The fault asks how likely a token is *after itself*. The most frequent bug of re-implementations, and one that
    trains on quietly: [what it looks like in a run](bugs.md#2-state-and-action-are-off-by-one).""",
)

# %% [markdown]
# ## 3. Supervised fine-tuning: the next token
#
# The base model becomes the SFT model by predicting each next token of query and summary [detail 9]. The loss of a
# sequence is the mean of `-log p` over its tokens; with p the softmax of the logits z, its gradient is the simplest
# of the three we shall meet:
#
# ```
# d loss / d z_label = w (p_label - 1)
# d loss / d z_other = w p_other
# ```
#
# w is the token's weight: 1 / (labels of the sequence x sequences). It pushes the label's logit up by what is missing
# to 1 and all others down by their own share.

# %%
one = pack([query + reference_response])


@torch.no_grad()
def sft_loss(model: Policy) -> float:
    labels, counts = losses.next_token_labels(one)
    weights = losses.sequence_mean_weights(one, counts, sequences=1)
    return linear_cross_entropy(model.hidden(one), model.head_weight, labels, weights).item()


labels, counts = losses.next_token_labels(one)
weights = losses.sequence_mean_weights(one, counts, sequences=1)
with torch.no_grad():
    logits = linear_fp32(sft.hidden(one), sft.head_weight)  # (N, V)
logits.requires_grad_()
(weights * F.cross_entropy(logits, labels, reduction="none")).sum().backward()
p = logits.detach().softmax(-1).gather(1, labels[:, None])[:, 0]  # (N,) of the labels
first = len(query) - 1  # the row that predicts the first token of the summary
book.code(losses.next_token_labels, losses.sequence_mean_weights)
book.table(
    ["label", "p of the label", "by hand: w (p - 1)", "by autograd"],
    [
        [
            f"`{shown(labels[i].item())}`",
            fixed(p[i]),
            *row([1000 * weights[i] * (p[i] - 1), 1000 * logits.grad[i, labels[i]]]),
        ]
        for i in range(first, first + 5)
    ],
    note=f"The first tokens of the author's summary under the SFT model. Gradients in thousandths; w = 1/{int(counts.sum())}.",
)
book.say(f"Loss on this post: {fixed(sft_loss(base))} by the base model, {fixed(sft_loss(sft))} by the SFT model.")

# %%
with planted(FAULTS["labels_not_shifted"]):
    unshifted = sft_loss(sft)
book.question(
    "labels_not_shifted",
    """The label of each token is the token itself. Is the loss of the trained model larger or smaller now? And that of a
    model which is *trained* with the fault?""",
    f"""Of the trained model it is {fixed(unshifted)} in place of {fixed(sft_loss(sft))}: it was never asked for the token
    that it has just read. But a model trained with the fault gets to 0, because copying its input is the easiest task
    there is. A loss that falls too fast is a symptom. [The planted faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 4. The reward model: one number
#
# The SFT model without its output layer and with a linear one that gives one number, read at EOS [details 10 to 12].
# It learns from pairs of summaries of one post, of which a person (here a simulated annotator) chose one: with the
# margin d = score of the chosen - score of the rejected summary, the loss is `-log sigmoid(d)`, and
#
# ```
# d loss / d chosen score   = sigmoid(d) - 1
# d loss / d rejected score = 1 - sigmoid(d)
# ```
#
# The same shape as before: what is missing to certainty. Only the difference counts, so the zero of the scores is
# arbitrary; after training they are shifted such that the authors' summaries have mean 0 [detail 15].

# %%
pair = make_comparison("valid1", 0)
about = pair["info"]
pair_query = tldr.encode_query(tokenizer, about["subreddit"], about["title"], about["post"], cfg.max_query_length)
chosen, rejected = (pair["summaries"][i]["text"] for i in (pair["choice"], 1 - pair["choice"]))
pair_scores = reward_model.scores([pair_query + tldr.encode_response(tokenizer, text) for text in (chosen, rejected)])
leaf = pair_scores.clone().requires_grad_()
losses.bradley_terry_loss(leaf[:1], leaf[1:]).backward()
sigma = torch.sigmoid(pair_scores[0] - pair_scores[1]).item()
book.code(losses.bradley_terry_loss, ScalarModel.last_scores)
book.table(
    ["", "head", "minus the shift: score", "d loss / d score by hand", "by autograd", "summary"],
    [
        [
            who,
            fixed(score + reward_model.score_shift),
            fixed(score),
            fixed(by_hand, 4),
            fixed(gradient, 4),
            text.strip(),
        ]
        for who, score, by_hand, gradient, text in zip(
            ("chosen", "rejected"), pair_scores, (sigma - 1, 1 - sigma), leaf.grad, (chosen, rejected), strict=True
        )
    ],
    note=f"The first held-out comparison. Margin {fixed(pair_scores[0] - pair_scores[1])}, sigmoid {fixed(sigma)}, loss "
    f"{fixed(-np.log(sigma))}; the shift is {fixed(reward_model.score_shift)}.",
)
right = pair_scores[0] > pair_scores[1]
book.say(
    """The reward model agrees with the annotator here, who errs at times too.""" if right else
    """The reward model disagrees with the annotator here, who errs at times, as it does."""
)  # fmt: skip

# %%
leaf = pair_scores.clone().requires_grad_()
with planted(FAULTS["bradley_terry_swapped"]):
    swapped = losses.bradley_terry_loss(leaf[:1], leaf[1:])
    swapped.backward()
healthy_loss = losses.bradley_terry_loss(pair_scores[:1], pair_scores[1:])
book.question(
    "bradley_terry_swapped",
    "Chosen and rejected change places in the loss. How do the two losses differ, exactly?",
    f"""{fixed(swapped.item())} in place of {fixed(healthy_loss)}: `-log sigmoid(-d) = -log sigmoid(d) + d`, so by the
    margin. The gradient of the chosen score becomes {fixed(leaf.grad[0], 4)}: it is pushed *down*. Such a model ends with an accuracy
    as far below one half as it should be above. [The planted faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 5. Rollout: five likely tokens and a random number
#
# The policy writes R tokens for each query, whether it has stopped or not, at temperature T: logits are divided by T
# before the softmax, nothing is cut off and nothing forbidden [detail 23.1]. A token is drawn with one uniform number
# u. Put the probabilities of the whole vocabulary end to end, in the order of the ids; the token whose stretch holds
# u is it. u depends on (seed, episode, t) alone, so that a rollout can be repeated.

# %%
u = uniforms(cfg.seed, list(range(B)), R)  # (B, R)
with torch.no_grad():
    hidden = policy.response_hidden(packed, R).view(B, R, -1)[mine]  # (R, D)
    logits = linear_fp32(hidden, policy.head_weight)  # (R, V) before each token of our response
at = int(entropy[mine, : L + 1].argmax())  # where the policy was least sure
cold, warm = (logits[at] / T).softmax(-1), logits[at].softmax(-1)  # (V,)
ends = cold.double().cumsum(0)
chosen_token = int(response[at])
five = cold.topk(5).indices.tolist()
listed = five + ([] if chosen_token in five else [chosen_token])
book.code(uniforms, sample)
book.table(
    ["token", "p at T = 1", f"p at T = {T}", "its stretch", ""],
    [
        [f"`{shown(i)}`", digits(warm[i], 3), digits(cold[i], 3), f"{fixed(ends[i] - cold[i], 4)} to {fixed(ends[i], 4)}",
         "drawn" if i == chosen_token else ""]
        for i in listed
    ],
    note=f"Token {at} of our response, where the policy is least sure: entropy {fixed(entropy[mine, at])} nats. "
    f"u = {fixed(u[mine, at], 4)}.",
)  # fmt: skip
book.say(
    f"""
    The whole response, {R} tokens, as sampled: {quoted(response.tolist())}

    What people see: *{tokenizer.decode(response[:L].tolist()).strip()}*
    """
)

# %%
with planted(FAULTS["top_p_inherited"]):
    narrow, narrow_logprobs = generate(policy, queries, R, T, seed=cfg.seed)
with torch.no_grad():
    _, narrow_entropy = policy.response_logprobs(
        pack([q + r for q, r in zip(queries, narrow.tolist(), strict=True)]), narrow, T
    )
narrow_mask = ppo.action_mask(narrow, tokenizer.eos_id)
differ = (narrow != responses)[action_mask].float().mean().item()
book.question(
    "top_p_inherited",
    """The sampler inherits a `top_p` from some default. Real top-p cuts off the *least likely* tokens; our fault of one line, cruder,
    cuts off those at the end of the row: u only reaches over its first 0.9. The log-probs that it reports are still those of the
    full softmax. Which numbers give it away?""",
    Table(
        ["over the batch", "as it should be", "with the fault"],
        [
            ["tokens that differ", "", f"{differ:.0%}"],
            [
                "mean log-prob of a drawn token",
                fixed(sampled_logprobs[action_mask].mean()),
                fixed(narrow_logprobs[narrow_mask].mean()),
            ],
            [
                "minus mean entropy, its expectation",
                fixed(-entropy[action_mask].mean()),
                fixed(-narrow_entropy[narrow_mask].mean()),
            ],
        ],
    ),  # fmt: skip
    """A drawn token's log-prob is minus the entropy on average: the two lines should agree up to noise. With the fault the
    drawn tokens are likelier than they should be. No log-prob is wrong, so nothing of station 11 shows it; but what is
    averaged over draws, as the KL of station 7, is not what it claims to be. [What to look for](bugs.md).""",
)

# %% [markdown]
# ## 6. What counts: the masks
#
# The critic guesses at each token how much reward is still to come: the *value* V. The *advantage* (station 9) is how
# much better it went than that guess, and the policy makes tokens with a positive one likelier.
#
# The policy answers for its tokens up to and with the first EOS: `action_mask`, t <= L. Values are trained one state
# further, t <= L + 1, because value t belongs to the state *before* token t: value L + 1 is that of the finished
# response. Masks come from EOS, never from PAD [details 23.2 and U5].

# %%
slots = torch.arange(R) == min(L + 1, R - 1)
book.code(ppo.last_token, ppo.action_mask, ppo.value_mask)
book.figure(
    "walk_masks",
    figures.strip(
        names,
        [
            ("action_mask", action_mask[mine].tolist(), "on"),
            ("value_mask", value_mask[mine].tolist(), "on"),
            ("KL penalty", action_mask[mine].tolist(), "down"),
            ("score", slots.tolist(), "up"),
        ],
        [f"L = {L}: the first EOS. What stands behind it was sampled and does not count."],
    ),
    "action mask and value mask of the response, and where KL penalty and score are paid",
)
book.say(
    f"In the batch, {int(action_mask.sum())} of {B * R} sampled tokens count as actions, {int(value_mask.sum())} states have a value."
)

# %%
with planted(FAULTS["eos_is_no_action"]):
    without_eos = ppo.action_mask(responses, tokenizer.eos_id)
book.question(
    "eos_is_no_action",
    "`<` in place of `<=`: EOS is no action any more. How many tokens of the batch are lost, and what does the policy lose with them?",
    f"""{int(action_mask.sum() - without_eos.sum())} of {int(action_mask.sum())} tokens: one in each of the {B} responses. Small, but they
    are all of one kind, the decision to stop, which is now neither rewarded nor punished. No curve shows it:
    [bugs.md](bugs.md#8-eos-is-no-action).""",
)

# %% [markdown]
# ## 7. Score and KL
#
# Four models look at the same response. The reward model reads it up to EOS and gives one score; a response without
# EOS gets -1 in its place [detail 23.3]. Policy and reference give each token a log-prob, both at temperature T.
# Their difference on the token that was drawn is `k1`: a sample of the KL divergence between the two models, right on
# average and noisy, below 0 whenever the reference likes the token more. The exact KL, over the whole vocabulary, is
# never below 0. More on its estimators: [kl_estimators.md](kl_estimators.md).

# %%
finished = [s[: len(s) - R + int(end) + 1] for s, end in zip(everything, last, strict=True)]
raw_scores = reward_model.scores(finished)  # (B,)
scores = ppo.apply_missing_eos(raw_scores, responses, tokenizer.eos_id, cfg.missing_eos_score)  # (B,)
with torch.no_grad():
    exact_kl, _, ref_logprobs = response_kl(policy, reference, packed, responses, T)  # (B, R) each
    values = torch.where(value_mask, critic.response_values(packed, R), 0.0)  # (B, R)
kl = torch.where(action_mask, logprobs - ref_logprobs, 0.0)  # (B, R), k1
exact_kl = torch.where(action_mask, exact_kl, 0.0)
book.code(ppo.apply_missing_eos, Policy.response_logprobs, kl_reference)
head = raw_scores[mine] + reward_model.score_shift
book.say(
    f"""Score of our response: {fixed(head)} at EOS, minus the shift {fixed(reward_model.score_shift)}: **{fixed(scores[mine])}**. In the batch
    {int((~stops & ~(responses == tokenizer.eos_id).any(1)).sum())} of {B} responses have no EOS."""
)
actions = range(L + 1)
book.table(
    ["t", "token", "policy", "reference", "k1", "exact KL"],
    [
        [str(t), f"`{names[t]}`", *row([logprobs[mine, t], ref_logprobs[mine, t], kl[mine, t], exact_kl[mine, t]])]
        for t in actions
    ]
    + [
        [
            "",
            "*sum*",
            *row(
                [logprobs[mine, : L + 1].sum(), ref_logprobs[mine, : L + 1].sum(), kl[mine].sum(), exact_kl[mine].sum()]
            ),
        ]
    ],
    [*actions, None],
    note=f"Mean of the sums over the batch: k1 {fixed(kl.sum(1).mean())}, exact {fixed(exact_kl.sum(1).mean())} nats a response. "
    f"{int((kl[action_mask] < -0.0005).sum())} of {int(action_mask.sum())} k1 are below -0.0005; more are below 0 by less.",
)

# %%
with torch.no_grad(), planted(FAULTS["kl_of_reference_to_policy"]):
    other_kl, _, _ = response_kl(policy, reference, packed, responses, T)
other_kl = torch.where(action_mask, other_kl, 0.0)
book.question(
    "kl_of_reference_to_policy",
    "Policy and reference change places inside the logarithm of the exact KL. What happens to its sign?",
    f"""Each token's number is exactly negated: the sum of our response becomes {fixed(other_kl[mine].sum())} in place of
    {fixed(exact_kl[mine].sum())}. It is *not* the divergence in the other direction, which would need the reference's
    probabilities in front. An exact KL below 0 is always a bug; a k1 below 0 is not. [The planted
    faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 8. Rewards
#
# Each token pays `kl_coef` times its k1. The score is added once, at L + 1, one step *after* EOS: the state that it
# belongs to, the finished response, has a value of its own [detail U6].

# %%
rewards = ppo.token_rewards(scores, kl, responses, tokenizer.eos_id, cfg.kl_coef)  # (B, R)
states = range(L + 2)
book.code(ppo.token_rewards)
book.table(
    ["t", "token", "k1", f"-{cfg.kl_coef:g} k1", "score", "reward"],
    [
        [str(t), f"`{names[t]}`", fixed(kl[mine, t]) if t <= L else "", fixed(-cfg.kl_coef * kl[mine, t]) if t <= L else "",
         fixed(scores[mine]) if t == L + 1 else "", fixed(rewards[mine, t])]
        for t in states
    ],
    states,
    note=f"The row sums to score - {cfg.kl_coef:g} KL = {fixed(scores[mine])} - {cfg.kl_coef:g} x {fixed(kl[mine].sum())} = "
    f"{fixed(rewards[mine].sum())}. The token at L + 1 was sampled and does not count; its slot is used.",
)  # fmt: skip


# %%
def with_fault(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and raw advantages of the batch with a fault in."""
    with planted(FAULTS[name]):
        wrong = ppo.token_rewards(scores, kl, responses, tokenizer.eos_id, cfg.kl_coef)
        return wrong, ppo.gae(wrong, values, cfg.gamma, cfg.lam)[0]


raw_advantages, returns = ppo.gae(rewards, values, cfg.gamma, cfg.lam)  # (B, R) each
three = {name: with_fault(name) for name in ("score_at_eos", "kl_sign", "score_on_every_token")}


def moved(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many of the numbers of our response differ in what the page shows."""
    return int(((a - b)[mine, : L + 2].abs() > 0.0005).sum())


book.question(
    "score_at_eos",
    f"""The score is put at EOS instead of one step after. Which rewards of our response move, and does the sum of the row? (And
    which of the {L + 2} advantages: that is for when you have read station 9.) Then two more: the penalty has the wrong sign (`kl_sign`); the score is added to the whole row
    (`score_on_every_token`).""",
    Table(
        ["", "reward at L", "reward at L + 1", "sum of the row", "advantages that move", "advantage at L"],
        [
            [
                name,
                *row([r[mine, L], r[mine, L + 1], r[mine].sum()]),
                f"{moved(a, raw_advantages)} of {L + 2}",
                fixed(a[mine, L]),
            ]
            for name, (r, a) in {"as it should be": (rewards, raw_advantages), **three}.items()
        ],
    ),
    f"""With the score at EOS the sum is the same and two rewards move, but all advantages do. The state after EOS, whose value
    says {fixed(values[mine, L + 1])}, is now followed by nothing: its advantage is minus its value. At L the reward has
    grown by the score, and lambda times that value is lost: here the two nearly cancel, because this critic says just the
    score there. A critic that is never trained there says anything. The other two are in bugs.md:
    [the sign](bugs.md#3-the-kl-penalty-has-the-wrong-sign) and [the whole row](bugs.md#5-the-score-stands-on-every-token).""",
)

# %% [markdown]
# ## 9. Advantages
#
# How much better did it go than the critic thought? That is computed from the last slot backwards (Schulman et al.
# 2016, eq. 16; gamma 1 and lambda 0.95 [detail 20]):
#
# ```
# delta_t = reward_t + gamma V_(t+1) - V_t
# A_t     = delta_t + gamma lambda A_(t+1)
# return_t = A_t + V_t
# ```
#
# delta asks how much better one step went than the critic's two guesses around it; the return is what the critic is
# trained towards. With lambda 0 only the next step and the critic's word for all the rest count; with lambda 1 only
# what really happened; 0.95 lies between.
#
# The critic begins as the reward model, so V at L + 1 *is* the score, and the last delta is 0: an identity that the
# pre-flight of `train_ppo.py`, its checks before the first step, looks at. At other tokens the reward model's output
# means nothing yet [detail 13], and the first advantages are mostly the critic's own errors.

# %%
book.code(ppo.gae)
lines = []
for t in (L + 1, L, L - 1):
    after = values[mine, t + 1] if t + 1 < R else 0.0
    delta = rewards[mine, t] + cfg.gamma * after - values[mine, t]
    next_advantage = raw_advantages[mine, t + 1] if t + 1 < R else 0.0
    lines += [
        f"delta_{t} = {total([rewards[mine, t], after, -values[mine, t]])} = {fixed(delta)}",
        f"A_{t}     = {fixed(delta)} + {cfg.gamma * cfg.lam:g} x {fixed(next_advantage)} = {fixed(raw_advantages[mine, t])}",
    ]
book.say("The last three, written out (reward + V of the next state - V):\n\n```\n" + "\n".join(lines) + "\n```")
book.table(
    ["t", "token", "reward", "value", "advantage", "return"],
    [[str(t), f"`{names[t]}`", *row(x[mine, t] for x in (rewards, values, raw_advantages, returns))] for t in states],
    states,
)
advantages = ppo.masked_whiten(raw_advantages, action_mask)  # (B, R)
book.figure(
    "walk_strip",
    figures.bars(
        names[: L + 2],
        [
            ("reward", rewards[mine, : L + 2].tolist(), ""),
            ("value", values[mine, : L + 2].tolist(), "value"),
            ("advantage", raw_advantages[mine, : L + 2].tolist(), ""),
        ],
    ),
    "reward, value and advantage of each token of the response",
)

# %%
with planted(FAULTS["gae_without_lambda"]):
    undamped, _ = ppo.gae(rewards, values, cfg.gamma, cfg.lam)
book.question(
    "gae_without_lambda",
    "Lambda is forgotten, that is, it is 1. Which advantage stays the same, and what do the others become?",
    Table(
        ["t", "token", "advantage", "with the fault", "rewards from here on, minus V"],
        [
            [
                str(t),
                f"`{names[t]}`",
                *row([raw_advantages[mine, t], undamped[mine, t], rewards[mine, t:].sum() - values[mine, t]]),
            ]
            for t in states
        ],
        states,
    ),
    """The last one stays, and with this critic, whose last delta is 0, that of EOS too. Every advantage is now the whole
    of the future rewards minus the critic's guess: without bias, and with all the noise of the future in it. [The planted faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 10. Whitening
#
# Advantages are shifted and scaled to mean 0 and deviation 1 over the tokens that count, those of the whole batch
# together [detail 25]. A token is reinforced if it did better than the batch's average, whatever the scale of the
# score.

# %%
mean = ppo.masked_mean(raw_advantages, action_mask)
deviation = ppo.masked_mean((raw_advantages - mean) ** 2, action_mask).sqrt()
book.code(ppo.masked_whiten)
book.say(f"Over the {int(action_mask.sum())} actions of the batch: mean {fixed(mean)}, deviation {fixed(deviation)}.")
book.table(
    ["t", "token", "advantage", "whitened"],
    [[str(t), f"`{names[t]}`", fixed(raw_advantages[mine, t]), fixed(advantages[mine, t])] for t in actions],
    actions,
    note=f"For example ({fixed(raw_advantages[mine, L])} - {fixed(mean)}) / {fixed(deviation)} = {fixed(advantages[mine, L])}.".replace(
        "- -", "+ "
    ),
)

# %%
with planted(FAULTS["whitening_unmasked"]):
    unmasked = ppo.masked_whiten(raw_advantages, action_mask)
flipped = ((unmasked * advantages) < 0)[action_mask].float().mean().item()
book.question(
    "whitening_unmasked",
    "The mean is taken over all slots, also those behind EOS, where advantages are 0. Which way do all whitened advantages shift?",
    f"""The mean of all slots is {fixed(raw_advantages.mean())} in place of {fixed(mean)}: the zeros behind EOS pull it towards 0. The
    whitened advantages then have mean {fixed(ppo.masked_mean(unmasked, action_mask))} in place of 0, and {flipped:.1%} of the tokens change
    their sign: they are pushed the wrong way. How many depends on how long the responses happen to be. [The planted
    faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 11. Ratio, clip and loss
#
# `ratio = exp(new log-prob - old log-prob)` says how much likelier the token has become since it was sampled. The
# loss is the mean over all actions of `max(-A ratio, -A clip(ratio, 0.8, 1.2))`: the clipped surrogate of Schulman et
# al. 2017, eq. 7, with a loss's sign. Before the first step the ratio is 1 everywhere, nothing is clipped, and the
# loss is minus the mean of the whitened advantages: 0. Its *gradient* is not.
#
# Two numbers say how far the policy has moved since it sampled: `clipfrac`, the share of tokens that the clip holds,
# and `approxkl`, half the mean squared log-ratio. approxkl is between the policy before and after, and is not the KL
# to the reference of station 7.

# %%
n = action_mask.sum()
with torch.no_grad():
    new_logprobs, _ = policy.response_logprobs(packed, responses, T)
loss, stats = ppo.policy_loss(new_logprobs, logprobs, advantages, action_mask, cfg.cliprange)
book.code(ppo.policy_loss)
book.table(
    ["t", "token", "A", "ratio", "-A ratio", "share of the loss"],
    [
        [str(t), f"`{names[t]}`", fixed(advantages[mine, t]), fixed((new_logprobs - logprobs)[mine, t].exp()),
         fixed(-advantages[mine, t]), fixed(-advantages[mine, t] / n, 5)]
        for t in actions
    ],
    actions,
    note=f"The sum over all {int(n)} actions of the batch is the loss: {fixed(loss, 4)}; clipped: {stats['clipfrac'].item():.0%}.",
)  # fmt: skip

# %%
halves = [slice(0, B // 4), slice(B // 4, B)]
size = [int(action_mask[half].sum()) for half in halves]


def first_quarter_weight() -> float:
    """Weight of a token of the first quarter of the batch in the sum of two microbatches' losses."""
    leaf = logprobs.clone().requires_grad_()
    sum(
        ppo.policy_loss(leaf[h], logprobs[h], advantages[h], action_mask[h], cfg.cliprange, denominator=n)[0]
        for h in halves
    ).backward()
    return (-leaf.grad[halves[0]] / advantages[halves[0]])[action_mask[halves[0]]].median().item()


healthy_weight = first_quarter_weight()
with planted(FAULTS["microbatch_means"]):
    faulty_weight = first_quarter_weight()
book.question(
    "microbatch_means",
    f"""The batch is split into two microbatches, of {size[0]} and {size[1]} actions, and each takes its *own* mean. How much does a token of
    the smaller one weigh now?""",
    f"""{digits(faulty_weight, 4)}, that is 1/{size[0]}, in place of {digits(healthy_weight, 4)}, 1/{int(n)}: {fixed(faulty_weight / healthy_weight, 2)}
    times as much. With equal microbatches the factor would only be their number; with unequal ones, tokens in small microbatches
    count for more, and the gradient depends on where the memory made you cut. [The planted
    faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 12. The gradient by hand
#
# log p = z / T - log sum exp(z / T), so its derivative by the logit of the sampled token is (1 - p) / T. The chain
# rule through the ratio gives, where the ratio is not clipped,
#
# ```
# d loss / d z = -A ratio (1 - p) / (T n)
# ```
#
# with n all actions of the minibatch. Read it: a good token (A > 0) gets its logit pushed up, less when it is nearly
# certain already. The Triton kernel computes loss and gradient in one go (it is *fused*), while it still holds the
# logits: `grad`, in its last lines.

# %%
leaf = logits[: L + 1].clone().requires_grad_()  # (L+1, V): the logits before our actions
ours = response[: L + 1]


def logit_gradient() -> torch.Tensor:
    """d loss / d logit of the sampled tokens of our response, by autograd through ppo.policy_loss."""
    leaf.grad = None
    new = (leaf / T).log_softmax(-1).gather(1, ours[:, None])[:, 0]
    mask = torch.ones(1, L + 1, dtype=torch.bool)
    old, A = logprobs[mine : mine + 1, : L + 1], advantages[mine : mine + 1, : L + 1]
    ppo.policy_loss(new[None], old, A, mask, cfg.cliprange, denominator=n)[0].backward()
    return leaf.grad.gather(1, ours[:, None])[:, 0]


autograd = logit_gradient()
A, p = advantages[mine, : L + 1], logprobs[mine, : L + 1].exp()
by_hand = -A * (1 - p) / (T * n)
kernel = fused.gradient_of_logits(
    interpreter,
    logits[: L + 1],
    ours,
    logprobs[mine, : L + 1],
    A,
    torch.full((L + 1,), 1 / int(n)),
    temperature=T,
    cliprange=cfg.cliprange,
).gather(1, ours[:, None])[:, 0]
scale = by_hand.abs().max()
assert (by_hand - autograd).abs().max() < 1e-4 * scale and not (by_hand - kernel).abs().max() > 1e-4 * scale
micro = 1e6  # the numbers are small: in millionths
book.code(getattr(_loss_rows, "fn", _loss_rows))  # Triton keeps the function in `fn`
book.table(
    ["t", "token", "A", "p", "by hand", "autograd", "fused kernel"],
    [
        [
            str(t),
            f"`{names[t]}`",
            fixed(A[t]),
            fixed(p[t], 4),
            *row(micro * torch.stack((by_hand[t], autograd[t], kernel[t])), 2),
        ]
        for t in actions
    ],
    actions,
    note=f"In millionths. T = {T}, n = {int(n)}, ratio 1. The kernel ran in Triton's interpreter, on the CPU.",
)

# %%
with planted(FAULTS["ratio_inverted"]):
    upside_down, _ = ppo.policy_loss(new_logprobs, logprobs, advantages, action_mask, cfg.cliprange)
    inverted = logit_gradient()
strongest = int(by_hand.abs().argmax())
book.question(
    "ratio_inverted",
    "old / new in place of new / old. What does the loss say before the first step? And the gradient?",
    f"""The loss is {fixed(upside_down, 4)} as before: every ratio is 1, either way up. The gradient of `{names[strongest]}`, the
    strongest of our response, is {fixed(micro * inverted[strongest], 2)} in place of {fixed(micro * autograd[strongest], 2)} millionths: each has
    the opposite sign, and the policy unlearns. A loss proves nothing about its gradient. [The planted
    faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 13. One step of AdamW
#
# Policy and critic share one optimizer and one step [detail 22]. Adam divides the gradient by its own size, so in the
# first step nearly every weight moves by about the learning rate, against the sign of its gradient; eps = 1e-5,
# larger than usual, holds back the weights whose gradient is tiny [detail 20]. With g the clipped gradient of a
# weight w, the first step is
#
# ```
# w <- w (1 - lr x 0.01) - lr g / (|g| + eps)
# ```
#
# where 0.01 is the weight decay.

# %%
fresh = copy.deepcopy((policy.state_dict(), critic.state_dict()))


def begin() -> AdamW:
    """Policy and critic as they were before any step, and a new optimizer."""
    for model, state in zip((policy, critic), fresh, strict=True):
        model.load_state_dict(state)
    return AdamW([policy, critic], lr=cfg.lr)


def learn() -> dict[str, float]:
    """Both losses of the batch and their gradients: step 6 of train_ppo.py, in one microbatch."""
    loss, new, _, clipfrac = policy.response_ppo_loss(
        packed, responses, logprobs, advantages, action_mask / n, T, cfg.cliprange
    )
    value_loss, _ = ppo.value_loss(critic.response_values(packed, R), values, returns, value_mask, cfg.cliprange_value)
    (loss + cfg.vf_coef * value_loss).backward()
    _, stats = ppo.policy_loss(new, logprobs, advantages, action_mask, cfg.cliprange)
    found = {"loss": loss, "clipfrac": clipfrac, "approxkl": stats["approxkl"], "value loss": value_loss}
    return {name: value.item() for name, value in found.items()} | {"new_logprobs": new}


def one_step() -> tuple[torch.Tensor, float, float, torch.Tensor]:
    """The first step -> gradient of the head before clipping, the weight of `spot` before and after, all gradients' norm."""
    optimizer = begin()
    learn()
    gradient, before = policy.head_weight.grad[spot].item(), policy.head_weight[spot].item()
    norm = optimizer.step(cfg.lr, cfg.max_grad_norm).item()
    return gradient, before, policy.head_weight[spot].item(), norm


spot = int(response[0]), 0  # the weight we watch: of the head's row for our first token, column 0
gradient, before, after, norm = one_step()
clipped = gradient * min(1.0, cfg.max_grad_norm / (norm + 1e-6))
expected = before * (1 - cfg.lr * 0.01) - cfg.lr * clipped / (abs(clipped) + 1e-5)
assert abs(expected - after) < 1e-3 * cfg.lr + 1e-7 * abs(before), (expected, after)
with torch.no_grad():
    stepped, _ = policy.response_logprobs(packed, responses, T)
book.code(AdamW.step, AdamW.__init__)
book.table(
    ["", "value"],
    [
        ["norm of all gradients", f"{digits(norm, 3)}, clipped to {cfg.max_grad_norm:g} in this preset"],
        ["gradient of the weight, then clipped", f"{digits(gradient, 3)}, {digits(clipped, 3)}"],
        ["weight before", fixed(before, 6)],
        ["after, by hand", fixed(expected, 6)],
        ["after, as the optimizer left it", fixed(after, 6)],
    ],
    note=f"The weight: head, row of `{names[0]}`, column 0. Learning rate {cfg.lr:g}; the default, for Llama-3.2-1B, is {train_ppo.Config().lr:g}.",
)
book.table(
    ["t", "token", "A", "log-prob before", "after", "ratio"],
    [
        [
            str(t),
            f"`{names[t]}`",
            fixed(A[t]),
            *row([logprobs[mine, t], stepped[mine, t], (stepped - logprobs)[mine, t].exp()]),
        ]
        for t in actions
    ],
    actions,
    note="All tokens share the same weights, so not every one moves as its A asks. Of those of the batch with |A| above 1, "
    f"{((stepped - logprobs) * advantages > 0)[action_mask & (advantages.abs() > 1)].float().mean().item():.0%} do.",
)

# %%
healthy_approxkl = ppo.policy_loss(stepped, logprobs, advantages, action_mask, cfg.cliprange)[1]["approxkl"].item()
with planted(FAULTS["adam_eps"]):
    _, _, after_1e8, _ = one_step()
with torch.no_grad():
    stepped_1e8, _ = policy.response_logprobs(packed, responses, T)
approxkl_1e8 = ppo.policy_loss(stepped_1e8, logprobs, advantages, action_mask, cfg.cliprange)[1]["approxkl"].item()
book.question(
    "adam_eps",
    "eps is 1e-8, the default of every library, in place of 1e-5. Which weights notice?",
    f"""Those whose gradient is not much larger than 1e-5. Ours moved by {digits(after - before, 3)}, and with the fault by
    {digits(after_1e8 - before, 3)}. Together they change how far the policy goes: approxkl after this one step is {fixed(approxkl_1e8, 4)} in place of
    {fixed(healthy_approxkl, 4)}. [The planted faults](details.md#the-planted-faults).""",
)

# %% [markdown]
# ## 14. The clipped objective
#
# The batch is used for several epochs, and the ratio leaves 1. The objective (the loss, negated) is drawn here for
# A > 0 and A < 0 in units of |A|. Where the line is flat a token has no gradient: it has been pushed far enough
# already. It is flat on one side only: a token that has moved the *wrong* way is always pulled back.


# %%
def epochs() -> list[dict]:
    """The epochs of one update from the start -> what `learn` saw in each, before its step."""
    optimizer = begin()
    seen = []
    for _ in range(cfg.num_ppo_epochs):
        seen.append(learn())
        optimizer.step(cfg.lr, cfg.max_grad_norm)
    return seen


seen = epochs()
late = (seen[-1]["new_logprobs"] - logprobs).exp()  # (B, R): the ratio that the last epoch met
dots = [(r, a) for r, a in zip(late[action_mask].tolist(), advantages[action_mask].tolist(), strict=True)]
own = [(t, late[mine, t].item(), A[t].item()) for t in actions]
book.figure(
    "walk_clip", figures.clipping(dots, cfg.cliprange, own),
    "the clipped objective against the ratio, with the tokens of the batch on it",
)  # fmt: skip
book.say(
    f"""Dots: the {int(n)} tokens of the batch as epoch {cfg.num_ppo_epochs} met them; the larger ones are our response. Band: ratios within
    {cfg.cliprange:g} of 1. Ratios outside the axis are drawn at its end."""
)
book.table(
    ["epoch", "policy loss", "clipped tokens", "approxkl", "value loss"],
    [
        [str(i + 1), fixed(e["loss"], 4), f"{e['clipfrac']:.1%}", fixed(e["approxkl"], 4), fixed(e["value loss"])]
        for i, e in enumerate(seen)
    ],
    note="As each epoch met it, before its step. The first has ratio 1 everywhere."
    + (
        " The first step made the policy's loss worse: the batch is small, and Adam's first step moves nearly every weight by the whole "
        "learning rate, however small its gradient."
        if seen[1]["loss"] > seen[0]["loss"]
        else ""
    ),
)

# %% [markdown]
# The critic learns from the same batch, towards the returns, by half the mean squared error; its new value is clipped
# too, to within 0.2 of the old one, and the larger of the two errors counts [detail 20]. So the loss cannot fall far
# in one update, even where the values do.

# %%
book.code(ppo.value_loss)
with torch.no_grad():
    learned = critic.response_values(packed, R)[mine]
book.table(
    ["t", "token", "value before the update", "after it", "return"],
    [[str(t), f"`{names[t]}`", *row([values[mine, t], learned[t], returns[mine, t]])] for t in states],
    states,
    note="Value loss of our response alone: "
    + ", ".join(
        f"{fixed(float(ppo.value_loss(v[None], values[[mine]], returns[[mine]], value_mask[[mine]], clip)[0]))} {when}"
        for v, clip, when in (
            (values[mine], cfg.cliprange_value, "before"),
            (learned, cfg.cliprange_value, "after"),
            (learned, 1e9, "after, had nothing been clipped"),
        )
    )
    + ".",
)

# %%
with planted(FAULTS["fused_policy_min"]):
    wrong = epochs()
begin()  # policy and critic as they were
book.question(
    "fused_policy_min",
    "`min` in place of `max`, copied from a formula that is maximised. What changes in the first epoch? And in the last?",
    Table(
        ["epoch", "approxkl", "with the fault", "clipped tokens", "with the fault"],
        [
            [
                str(i + 1),
                fixed(a["approxkl"], 4),
                fixed(b["approxkl"], 4),
                f"{a['clipfrac']:.1%}",
                f"{b['clipfrac']:.1%}",
            ]
            for i, (a, b) in enumerate(zip(seen, wrong, strict=True))
        ],
    ),
    """In the first epoch nothing: both branches are equal at ratio 1. Then clipping removes the gradient that pulls a token back
    and keeps the one that pushes it further, so nothing holds the policy near the one that sampled. [What it looks like in a
    run](bugs.md#6-min-in-place-of-max-in-the-policy-loss).""",
)

# %% [markdown]
# ## Where an update's time goes
#
# The same steps, as the run that made the embedded policy recorded them.

# %%
metrics = read_metrics(EMBEDDED / "ppo") if (EMBEDDED / "ppo" / "metrics.jsonl").exists() else []
phases = [(name, median(r[f"time/{name}"] for r in metrics)) for name in ("rollout", "score", "learn")]
book.figure("walk_time", figures.durations(phases), "median seconds of rollout, scoring and learning in an update")
book.say(
    f"""Medians of {len(metrics)} updates of {train_ppo.PRESETS["tiny"].get("batch_size", cfg.batch_size)} episodes, on the CPU that made the
    embedded policy. Scoring is four forward passes; learning is {cfg.num_ppo_epochs} epochs of a forward and a backward pass, for policy
    and critic. On a GPU with a large model the shares are others: [speed.md](speed.md)."""
)

# %% [markdown]
# ## Where to go from here
#
# - [kl_estimators.md](kl_estimators.md): k1, k2, k3 and the exact KL; KL in the reward or in the loss.
# - [bugs.md](bugs.md): what eight faults look like in a run. [traps.md](traps.md): the sixty traps of the field.
# - [details.md](details.md): every detail of the paper, its line, its test.
# - [train_ppo.py](../train_ppo.py): these stations as a program.

# %% [hidden]
if __name__ == "__main__":
    from docs.walking.write import write

    write(book, names[: L + 2])
