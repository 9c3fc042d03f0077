"""PPO a second time, as slowly and plainly as it can be written: float64, one sequence at a time, lists and loops.

Nothing of nanorlhf is used, and there are no masks, no packing, no batches and no library optimizer here: a response is
the list of its tokens up to the first EOS, and every sum is a loop. tests/test_parity.py runs one update of
train_ppo.py and this one from the same files and compares losses, metrics, gradient norm and every weight afterwards.
Sources: Huang et al. 2024 for the details, Schulman et al. 2016 eq. 16 (GAE) and 2017 eq. 7 (PPO), Loshchilov & Hutter
2019 (AdamW). Weights are dictionaries under Hugging Face's names.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rope_angles(config: dict, head_dim: int) -> list[float]:
    """Angle per position of each coordinate pair, with Llama 3's scaling when config.json asks for it."""
    angles = [config["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    scaling = config.get("rope_scaling")
    if not scaling:
        return angles
    old = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    scaled = []
    for angle in angles:
        wavelength = 2 * math.pi / angle
        if wavelength < old / high:
            scaled.append(angle)
        elif wavelength > old / low:
            scaled.append(angle / factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * angle / factor + smooth * angle)
    return scaled


def hidden_states(w: Weights, config: dict, tokens: list[int]) -> Tensor:
    """Llama's hidden states after the final norm, (T, D) float64, for one sequence."""
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    T, half = len(tokens), head_dim // 2
    turn = torch.tensor([[t * angle for angle in rope_angles(config, head_dim)] for t in range(T)], dtype=torch.float64)
    cos, sin = turn.cos(), turn.sin()  # (T, Dh/2)
    future = torch.ones(T, T).triu(1).bool()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)

    x = w["model.embed_tokens.weight"][torch.tensor(tokens)]  # (T, D)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        y = norm(x, f"{p}.input_layernorm.weight")
        q, k, v = (y @ w[f"{p}.self_attn.{name}_proj.weight"].T for name in "qkv")
        outputs = []
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            shared = head // (heads // kv_heads)
            theirs = slice(shared * head_dim, (shared + 1) * head_dim)
            weights = rotate(q[:, own]) @ rotate(k[:, theirs]).T / math.sqrt(head_dim)
            outputs.append(weights.masked_fill(future, -math.inf).softmax(-1) @ v[:, theirs])
        x = x + torch.cat(outputs, dim=1) @ w[f"{p}.self_attn.o_proj.weight"].T
        y = norm(x, f"{p}.post_attention_layernorm.weight")
        gate, up = y @ w[f"{p}.mlp.gate_proj.weight"].T, y @ w[f"{p}.mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{p}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight")


def log_distributions(w: Weights, c: dict, query: list[int], response: list[int], temperature: float) -> list[Tensor]:
    """The log-probs of all tokens, (V,), before each response token."""
    hidden = hidden_states(w, c, query + response)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    found = []
    for t in range(len(response)):
        logits = head @ hidden[len(query) + t - 1] / temperature  # the state before the token
        found.append(logits - logits.logsumexp(0))
    return found


def response_logprobs(w: Weights, c: dict, query: list[int], response: list[int], temperature: float) -> list[Tensor]:
    every = log_distributions(w, c, query, response, temperature)
    return [log_p[token] for log_p, token in zip(every, response, strict=True)]


def values_before(w: Weights, c: dict, query: list[int], tokens: list[int], states: int) -> list[Tensor]:
    """V of the state before each of the first `states` response positions."""
    hidden = hidden_states(w, c, query + tokens)
    return [w["score.weight"][0] @ hidden[len(query) + t - 1] + w["score.bias"][0] for t in range(states)]


def rollout(policy, reference, critic, reward_model, config, queries, responses, hp: SimpleNamespace) -> list:
    """What is known of each episode before the update: tokens that count, log-probs, values, rewards, advantages."""
    episodes = []
    for query, raw in zip(queries, responses, strict=True):
        R, stops = len(raw), hp.eos_id in raw
        tokens = raw[: raw.index(hp.eos_id) + 1] if stops else raw
        states = min(len(tokens) + 1, R)  # the state after EOS has a value too, where there is room for it
        with torch.no_grad():
            ours, theirs = (log_distributions(w, config, query, tokens, hp.temperature) for w in (policy, reference))
            logprobs, ref = ([p[token].item() for p, token in zip(d, tokens, strict=True)] for d in (ours, theirs))
            full_kl = [(p.exp() * (p - q)).sum().item() for p, q in zip(ours, theirs, strict=True)]
            values = [x.item() for x in values_before(critic, config, query, tokens, states)]
            hidden = hidden_states(reward_model, config, query + tokens)
            score = (reward_model["score.weight"][0] @ hidden[-1]).item() - hp.score_shift
        score = score if stops else hp.missing_eos_score
        kl = [a - b for a, b in zip(logprobs, ref, strict=True)]
        penalised = full_kl if hp.kl_estimator == "full" else kl
        rewards = [-hp.kl_coef * x for x in penalised] + [0.0] * (states - len(tokens))
        rewards[-1] += score
        episodes.append(
            SimpleNamespace(query=query, tokens=tokens, R=R, states=states, logprobs=logprobs, values=values,
                            score=score, kl=kl, full_kl=full_kl, penalised=penalised,
                            rewards=rewards)
        )  # fmt: skip
    if hp.whiten_rewards:
        every = [x for e in episodes for x in e.rewards]
        mean = sum(every) / len(every)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
        for e in episodes:
            e.rewards = [(x - mean) / deviation + mean for x in e.rewards]
    for e in episodes:
        following = e.values[1:] + [0.0]
        deltas = [r + hp.gamma * nxt - v for r, nxt, v in zip(e.rewards, following, e.values, strict=True)]
        e.advantages = [
            sum((hp.gamma * hp.lam) ** (k - t) * deltas[k] for k in range(t, e.states)) for t in range(e.states)
        ]
        e.returns = [a + v for a, v in zip(e.advantages, e.values, strict=True)]
        e.advantages = e.advantages[: len(e.tokens)]
    every = [a for e in episodes for a in e.advantages]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every) + 1e-8)
    for e in episodes:
        e.advantages = [(a - mean) / deviation for a in e.advantages]
    return episodes


def number(x: Tensor | float) -> float:
    return x.item() if isinstance(x, Tensor) else x


def losses(policy: Weights, critic: Weights, config: dict, minibatch: list, hp: SimpleNamespace):
    """(policy loss, value loss, clipfrac, approxkl, mean ratio) of a minibatch: means over its tokens and states."""
    policy_terms, value_terms, clipped, squares, ratios = [], [], [], [], []
    for e in minibatch:
        new_logprobs = response_logprobs(policy, config, e.query, e.tokens, hp.temperature)
        for new, old, advantage in zip(new_logprobs, e.logprobs, e.advantages, strict=True):
            ratio = (new - old).exp()
            inside = min(max(ratio.item(), 1 - hp.cliprange), 1 + hp.cliprange)
            held = inside if inside != ratio.item() else ratio
            objective = min(advantage * ratio, advantage * held, key=number)
            policy_terms.append(-objective)
            clipped.append(float(number(advantage * held) < number(advantage * ratio)))
            squares.append(0.5 * (new - old).item() ** 2)
            ratios.append(ratio.item())
        new_values = values_before(critic, config, e.query, e.tokens, e.states)
        for new, old, target in zip(new_values, e.values, e.returns, strict=True):
            inside = min(max(new.item(), old - hp.cliprange_value), old + hp.cliprange_value)
            held = inside if inside != new.item() else new
            value_terms.append(max((new - target) ** 2, (held - target) ** 2, key=number))
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    return mean(policy_terms), 0.5 * mean(value_terms), mean(clipped), mean(squares), mean(ratios)


def adam_state(policy: Weights, critic: Weights) -> SimpleNamespace:
    """What AdamW remembers from step to step: two moments a parameter and the number of steps."""
    first, second = ([torch.zeros_like(p) for p in (*policy.values(), *critic.values())] for _ in range(2))
    return SimpleNamespace(first=first, second=second, steps=0)


def update(policy, critic, config, episodes, orders, adam, lr: float, hp: SimpleNamespace) -> dict[str, float]:
    """All optimizer steps of one update, in place. orders: for each epoch, its minibatches of episode numbers."""
    parameters = [*policy.values(), *critic.values()]
    logged = {name: [] for name in ("policy", "value", "clipfrac", "approxkl", "ratio", "grad_norm")}
    for minibatches in orders:
        for numbers in minibatches:
            adam.steps += 1
            for p in parameters:
                p.requires_grad_().grad = torch.zeros_like(p)
            found = losses(policy, critic, config, [episodes[i] for i in numbers], hp)
            (found[0] + hp.vf_coef * found[1]).backward()
            norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in parameters))
            scale = min(1.0, hp.max_grad_norm / (norm + 1e-6)) if hp.max_grad_norm else 1.0
            with torch.no_grad():
                for p, m, v in zip(parameters, adam.first, adam.second, strict=True):
                    g = p.grad * scale
                    p -= lr * 0.01 * p  # decoupled weight decay
                    m += (1 - 0.9) * (g - m)
                    v += (1 - 0.999) * (g * g - v)
                    p -= lr * (m / (1 - 0.9**adam.steps)) / ((v / (1 - 0.999**adam.steps)).sqrt() + 1e-5)
            for name, value in zip(logged, [*found, norm], strict=True):
                logged[name].append(number(value))
    return {name: sum(values) / len(values) for name, values in logged.items()}
