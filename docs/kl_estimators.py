"""k1, k2, k3 and the exact KL, on a real policy: docs/kl_estimators.md, made by `python -m docs.walk`."""

# %%
import torch
from mutations import MUTATIONS
from planting import planted

import train_ppo
from docs.walking.book import ROOT, Book, Table
from docs.walking.numbers import fixed, row
from kernels.kl import kl_reference
from kernels.linear import linear_fp32
from nanorlhf import ppo
from nanorlhf.data import tldr
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.packing import pack
from nanorlhf.rollout import generate
from nanorlhf.run.config import parse
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.tiny.world import make_post

book = Book(ROOT / "docs" / "kl_estimators.py", "KL estimators")

# %% [markdown]
# # KL estimators: k1, k2, k3, the exact one, and where to put them
#
# "Why is my KL negative?" "Which estimator should I use?" "In the reward or in the loss?" Four answers with the
# numbers of a real policy (the embedded PPO checkpoint) against its reference (SFT), made by `python -m docs.walk`.
# It belongs to [station 7 of the walk](walk.md#7-score-and-kl).
#
# p is the policy, q the reference, both at the sampling temperature; a token x is drawn from p, and r = q(x) / p(x).
#
# | name | from one token | what it is |
# |---|---|---|
# | k1 | `-log r` = log p(x) - log q(x) | what the paper and `train_ppo.py` subtract from the reward |
# | k2 | `(log r)^2 / 2` | never negative |
# | k3 | `r - 1 - log r` | never negative; k1 plus something whose mean is 0 |
# | exact | sum over the vocabulary of `p (log p - log q)` | `--kl_estimator full`; needs both distributions, not just one token |
#
# k1, k2 and k3 are Schulman's (*Approximating KL Divergence*, 2020).

# %%
cfg = parse(train_ppo.Config, train_ppo.PRESETS, train_ppo.__doc__, ["--preset", "tiny"])
R, T, B = cfg.response_length, cfg.temperature, 24
tokenizer = load_tokenizer(EMBEDDED / "sft")
policy, reference = load_policy(EMBEDDED / "ppo"), load_policy(EMBEDDED / "sft")
posts = [make_post("valid", i) for i in range(B)]
queries = [tldr.encode_query(tokenizer, p.subreddit, p.title, p.post, cfg.max_query_length) for p in posts]
responses, _ = generate(policy, queries, R, T, seed=cfg.seed)
mask = ppo.action_mask(responses, tokenizer.eos_id)  # (B, R)
packed = pack([q + r for q, r in zip(queries, responses.tolist(), strict=True)])
labels = responses[mask]  # (M,) all actions of the batch
with torch.no_grad():
    z, x = (  # (M, V) each: logits of policy and reference before each action, in float64 from here on
        linear_fp32(model.response_hidden(packed, R).view(B, R, -1)[mask], model.head_weight).double()
        for model in (policy, reference)
    )
logp, logq = (z / T).log_softmax(-1), (x / T).log_softmax(-1)
p = logp.exp()
log_r = logq - logp  # (M, V): of every token that could have been drawn
estimators = {"k1": -log_r, "k2": 0.5 * log_r**2, "k3": log_r.exp() - 1 - log_r}  # (M, V) each
exact = (p * -log_r).sum(-1)  # (M,)
assert torch.allclose(exact.float(), kl_reference(z, x, labels, T)[0].float(), atol=1e-5)

# %% [markdown]
# ## How good is one token's number?
#
# No sampling is needed to say: with the whole distribution at hand, mean and deviation over the draw of x are sums
# over the vocabulary, for each state of the batch.

# %%
mean = {name: (p * k).sum(-1) for name, k in estimators.items()}  # (M,): expectation at each state
variance = {name: (p * (k - mean[name][:, None]) ** 2).sum(-1) for name, k in estimators.items()}
drawn = {name: k.gather(1, labels[:, None])[:, 0] for name, k in estimators.items()}  # (M,)
book.code(kl_reference)
book.table(
    ["", "mean a token", "bias", "deviation of one token's", "below -0.0005 among those drawn", "batch: a response"],
    [
        [name, fixed(mean[name].mean(), 4), fixed((mean[name] - exact).mean(), 4), fixed(variance[name].mean().sqrt(), 3),
         f"{(drawn[name] < -0.0005).double().mean():.0%}", fixed(drawn[name].sum() / B)]
        for name in estimators
    ]
    + [["exact", fixed(exact.mean(), 4), "0", "0", "0%", fixed(exact.sum() / B)]],
    note=f"{int(mask.sum())} states of {B} responses; in nats. Deviation: root of the mean variance. The last column is what a run would log from this one batch.",
)  # fmt: skip
lowest = min(("k1", "k2", "k3"), key=lambda name: variance[name].mean().item())
book.say(
    f"""- **k1 and k3 have no bias; k2 has**, of {fixed((mean["k2"] - exact).mean() / exact.mean() * 100, 0)}% here: it is only right where the two
      models are close.
    - **The smallest deviation here is that of {lowest}.** k3 can only win where r stays moderate: where the policy has left a token that
      the reference likes, r is huge when it is drawn.
    - **A negative k1 is normal**, as the column says (more are below 0 by less); a negative mean over a large batch is not, and an exact KL below 0 is always a bug."""
)

# %%
shown = range(int(mask[0].sum()))
words = ["<EOS>" if i == tokenizer.eos_id else tokenizer.decode([i]).replace(" ", "␣") for i in responses[0].tolist()]
book.table(
    ["t", "token", "k1", "k2", "k3", "exact"],
    [[str(t), f"`{words[t]}`", *row([drawn["k1"][t], drawn["k2"][t], drawn["k3"][t], exact[t]])] for t in shown]
    + [["", "*sum*", *row([drawn[k][: len(shown)].sum() for k in drawn] + [exact[: len(shown)].sum()])]],
    note="The first response of the batch.",
)

# %% [markdown]
# ## In the reward or in the loss?
#
# The penalty that is wanted has the gradient of KL(p || q). With g = d log p(x) / d z, z the logits:
#
# **In the reward** (the paper, `train_ppo.py`) the number is a constant that makes the drawn token better or worse,
# and the policy gradient multiplies it with g. At the state where it is paid this gives, on average over the draw,
#
# ```
# k1      E[k1 g]     = gradient of KL(p || q)                          the one that was wanted
# k3      E[k3 g]     = gradient of KL(p || q) - gradient of KL(q || p)
# exact   E[KL g]     = 0               the same number for every token: nothing to choose
# ```
#
# And the return carries it back in time: with any of them, earlier tokens pay for the states that they lead to. With
# the exact KL (`--kl_estimator full`) that is all; the divergence at the token's own state is charged to those before
# it.
#
# **In the loss** (GRPO and others) the estimator itself is differentiated at the drawn token, which is another
# question (Tang and Munos 2025, [arXiv 2506.09477](https://arxiv.org/abs/2506.09477)):
#
# ```
# k1      E[g]                     = 0                          no penalty at all, only noise
# k2      E[(log p - log q) g]     = gradient of KL(p || q)     the one that was wanted
# k3      E[(1 - r) g]             = gradient of KL(q || p)     the other direction
# exact   nothing is drawn         = gradient of KL(p || q)     the one that was wanted
# ```
#
# And nothing is carried back: each token pays for its own state alone.
#
# Below all of these by autograd, at the state of the batch where the wanted gradient is largest; and their cosine
# with the wanted one, at this state and over all states of the batch.

# %%
steepness = (p * (-log_r - exact[:, None])).norm(dim=-1) / T  # (M,): norm of the gradient of KL(p || q), by hand
state = int(steepness.argmax())


def in_loss(name: str) -> torch.Tensor:
    """Mean over the draw of an estimator's gradient by the logits, (V,): the draw's own probability is held fixed."""
    leaf = z[state].clone().requires_grad_()
    log_r = logq[state] - (leaf / T).log_softmax(-1)
    k = {"k1": -log_r, "k2": 0.5 * log_r**2, "k3": log_r.exp() - 1 - log_r}[name]  # (V,): had token v been drawn
    return torch.autograd.grad((p[state] * k).sum(), leaf)[0]


def in_reward(k: torch.Tensor) -> torch.Tensor:
    """Mean over the draw of k d log p(x) / d logits, (V,); k (V,): what each token would be charged."""
    leaf = z[state].clone().requires_grad_()
    return torch.autograd.grad((p[state] * k * (leaf / T).log_softmax(-1)).sum(), leaf)[0]


def gradient_of_kl(forward: bool) -> torch.Tensor:
    """Gradient by the logits of KL(p || q), or of KL(q || p)."""
    leaf = z[state].clone().requires_grad_()
    new = (leaf / T).log_softmax(-1)
    kl = (new.exp() * (new - logq[state])).sum() if forward else (logq[state].exp() * (logq[state] - new)).sum()
    return torch.autograd.grad(kl, leaf)[0]


wanted, other = gradient_of_kl(forward=True), gradient_of_kl(forward=False)
reward = {name: in_reward(k[state]) for name, k in estimators.items()}
reward["exact"] = in_reward(exact[state].expand_as(p[state]))
loss = {name: in_loss(name) for name in estimators} | {"exact": wanted}
claims = [
    (reward["k1"], wanted), (reward["k3"], wanted - other), (reward["exact"], 0 * wanted),
    (loss["k1"], 0 * wanted), (loss["k2"], wanted), (loss["k3"], other),
]  # fmt: skip
assert all(torch.allclose(found, claimed, atol=1e-9) for found, claimed in claims)


def over_batch(k: torch.Tensor) -> torch.Tensor:
    """(M, V): what `in_reward` gives for each state, by hand: p (k - its mean) / T. k (M, V)."""
    return p * (k - (p * k).sum(-1, keepdim=True)) / T


q = logq.exp()
wanted_batch, other_batch = over_batch(-log_r), (p - q) / T  # gradients of KL(p || q) and of KL(q || p), (M, V)
assert torch.allclose(wanted_batch[state], wanted) and torch.allclose(other_batch[state], other)
batch = {f"{name} in the reward": over_batch(k) for name, k in estimators.items()}
batch |= {"k2 in the loss": wanted_batch, "k3 in the loss": other_batch, "exact in the loss": wanted_batch}
batch["**wanted**"] = wanted_batch


def cosine(a: torch.Tensor, b: torch.Tensor) -> str:
    return fixed((a * b).sum() / (a.norm() * b.norm()), 2)


most = wanted.abs().topk(3).indices.tolist()
pieces = [tokenizer.decode([i]).replace(" ", "␣") if i != tokenizer.eos_id else "<EOS>" for i in most]
every = {"**wanted**": wanted}
every |= {f"{name} in the reward": g for name, g in reward.items()} | {
    f"{name} in the loss": g for name, g in loss.items()
}
book.table(
    ["", *(f"by the logit of `{piece}`" for piece in pieces), "norm", "cosine", "over the batch"],
    [
        [
            name,
            *row(g[most]),
            fixed(g.norm()),
            cosine(g, wanted) if g.norm() > 1e-9 else "",
            cosine(batch[name], wanted_batch) if name in batch else "",
        ]
        for name, g in every.items()
    ]
    + [["p", *row(p[state, most]), "", "", ""], ["q", *row(q[state, most]), "", "", ""]],
    note=f"The exact KL of this state is {fixed(exact[state])} nats. The first two tokens hold "
    f"{p[state, most[:2]].sum():.0%} of p and {q[state, most[:2]].sum():.0%} of q. "
    "The more that is, the nearer does every gradient lie to one line, and the less a cosine of 1 says; that over the batch tells.",
)
book.say(
    """So: **in the reward, k1**, as in the paper: the only one with the whole gradient, at the token's own state and at those
    before it, at the price of noise. **In the loss, k2 or the exact one**, for the token's own state alone. k1 in the loss
    penalises nothing, k3 something else in either place."""
)

# %%
fault = next(mutation for mutation in MUTATIONS if mutation.name == "kl_of_reference_to_policy")
with planted(fault):
    negated = kl_reference(z, x, labels, T)[0]
book.question(
    "kl_of_reference_to_policy",
    "A log-ratio is written the wrong way round. Which of k1, k2, k3 and the exact KL could tell?",
    Table(
        ["mean over the drawn tokens", "as it should be", "log-ratio inverted"],
        [
            ["k1", fixed(drawn["k1"].mean(), 4), fixed(-drawn["k1"].mean(), 4)],
            ["k2", fixed(drawn["k2"].mean(), 4), fixed(drawn["k2"].mean(), 4)],
            ["k3", fixed(drawn["k3"].mean(), 4), fixed((drawn["k1"].exp() - 1 - drawn["k1"]).mean(), 4)],
            ["exact", fixed(exact.mean(), 4), fixed(negated.mean(), 4)],
        ],
    ),
    """k1 and the exact KL change their sign, and the mean tells. k2 is the same, and k3 stays positive: an estimator that is never
    negative hides the most common mistake. [What a wrong sign does to a run](bugs.md#3-the-kl-penalty-has-the-wrong-sign).""",
)
