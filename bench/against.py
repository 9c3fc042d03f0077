"""Against what one would use instead, on a CPU: the tiny pipeline in nanorlhf, in transformers, and in TRL.

    python -m bench.against                              rollout, SFT step and PPO update, at 1 thread and at 2
    python -m bench.against --sft_model DIR --reward_model DIR --data DIR --batch_size 4 --rows 4 --work rollout sft
                                                         other models on real posts (preset smollm2): minutes each
    python -m bench.against ... --beside bf16            ours in bf16 in the place of transformers: does it pay here?
    python -m bench.against --trl_python VENV/bin/python     also TRL's PPOTrainer, from an environment that has it:
                                                         pip install "trl==1.12.0" "transformers>=5" (1.12 is the last
                                                         with a PPOTrainer, in trl.experimental)

Same embedded weights, posts, batch and number of epochs. The transformers side is written as its users write it: one
left-padded batch with an attention mask, `generate`, F.log_softmax over the logits of all positions, torch's AdamW,
microbatches of --rows sequences. Both take turns in one process, and figures are medians; log-probs of the same
responses are compared first, so that both compute the same. A PPO update here is scoring by four models and 4 epochs of
learning; rollout is timed alone, and TRL's update, which cannot be taken apart, is compared with the sum. Seconds
belong to the machine and its load; ratios come from one run, and those of CPU time stand also beside other jobs. One
JSON line last.
"""

import os

from nanorlhf.run.waiting import turns

os.environ.setdefault("GOMP_SPINCOUNT", turns())  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_ppo
import train_sft
from nanorlhf import ppo
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import check
from nanorlhf.models import critic_from
from nanorlhf.optim import AdamW
from nanorlhf.packing import split_by_tokens
from nanorlhf.ppo import Experience
from nanorlhf.rollout import generate
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.run.memory import keep_freed_memory
from nanorlhf.run.streams import as_command
from nanorlhf.storage.checkpoint import load_policy, load_scalar
from nanorlhf.tiny.data import ensure_world

TINY_SFT, TINY_RM = EMBEDDED / "sft", EMBEDDED / "rm"
EOS, PAD = 2, 0  # of the tiny world and of SmolLM2-135M-Instruct; what fills a padded batch is masked
WORK = ("rollout", "sft", "update")


class Batch(NamedTuple):
    queries: list[list[int]]
    with_summaries: list[list[int]]
    responses: Tensor  # (B, R)


class Ours:
    """The functions of the scripts."""

    def __init__(
        self, cfg: train_ppo.Config, sft_cfg: train_sft.Config, sft_model=TINY_SFT, reward_model=TINY_RM,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.cfg, self.sft_cfg = cfg, sft_cfg
        policy, reference, student = (load_policy(sft_model, dtype=dtype) for _ in range(3))
        reward_model = load_scalar(reward_model, dtype=dtype).requires_grad_(False)
        self.models = (
            policy,
            reference.requires_grad_(False),
            critic_from(reward_model).requires_grad_(True),
            reward_model,
        )
        self.optimizer, self.student = AdamW([policy, self.models[2]], lr=cfg.lr), student
        self.student_optimizer = AdamW([student], lr=sft_cfg.lr)

    def rollout(self, batch: Batch) -> Tensor:
        return generate(self.models[0], batch.queries, self.cfg.response_length, self.cfg.temperature)[0]

    def sft(self, batch: Batch) -> None:
        train_sft.learn(self.student, batch.with_summaries[: self.sft_cfg.batch_size], self.sft_cfg)
        self.student_optimizer.step(self.sft_cfg.lr, self.sft_cfg.max_grad_norm)

    def score(self, batch: Batch) -> train_ppo.Scored:
        self.sequences = [q + r for q, r in zip(batch.queries, batch.responses.tolist(), strict=True)]
        ends = (ppo.last_token(batch.responses, EOS) + 1).tolist()
        finished = [s[: len(q) + n] for s, q, n in zip(self.sequences, batch.queries, ends, strict=True)]
        return train_ppo.score(*self.models, self.sequences, finished, batch.responses, self.cfg)

    def update(self, batch: Batch) -> None:
        cfg, B = self.cfg, len(batch.queries)
        scored = self.score(batch)
        episode = experience(self.sequences, batch.responses, scored, cfg)
        for epoch in range(cfg.num_ppo_epochs):
            order = np.random.default_rng(epoch).permutation(B)
            for group in split_by_tokens([len(self.sequences[i]) for i in order], cfg.microbatch_tokens):
                train_ppo.learn(self.models[0], self.models[2], episode, order, order[group], cfg)
            self.optimizer.step(cfg.lr, cfg.max_grad_norm)


class Theirs:
    """The same with transformers, left-padded."""

    def __init__(
        self, cfg: train_ppo.Config, sft_cfg: train_sft.Config, rows: int, sft_model=TINY_SFT, reward_model=TINY_RM
    ):
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self.cfg, self.sft_cfg, self.rows = cfg, sft_cfg, rows
        language = lambda: AutoModelForCausalLM.from_pretrained(sft_model, dtype=torch.float32)  # noqa: E731
        scalar = lambda: AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)  # noqa: E731
        self.policy, self.reference, self.student = (language() for _ in range(3))
        self.critic, self.reward_model = scalar(), scalar()
        self.policy.generation_config.eos_token_id = None  # as ours: R tokens, whatever they are
        self.optimizer = torch.optim.AdamW([*self.policy.parameters(), *self.critic.parameters()], lr=cfg.lr, eps=1e-5)
        self.student_optimizer = torch.optim.AdamW(self.student.parameters(), lr=sft_cfg.lr, eps=1e-5)

    @torch.no_grad()
    def rollout(self, batch: Batch) -> Tensor:
        ids, mask = left_pad(batch.queries)
        R = self.cfg.response_length
        out = self.policy.generate(input_ids=ids, attention_mask=mask, max_new_tokens=R, min_new_tokens=R,
                                   do_sample=True, temperature=self.cfg.temperature, top_k=0, top_p=1.0,
                                   pad_token_id=PAD)  # fmt: skip
        return out[:, ids.shape[1] :]

    def sft(self, batch: Batch) -> None:
        sequences = batch.with_summaries[: self.sft_cfg.batch_size]
        for start in range(0, len(sequences), self.rows):
            ids, mask = left_pad(sequences[start : start + self.rows])
            logits = self.student(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
            logp = F.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
            counts = (mask[:, :-1] & mask[:, 1:]).float()  # no label for padding, none from it
            (-(logp * counts).sum(1) / counts.sum(1)).sum().div(len(sequences)).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.sft_cfg.max_grad_norm)
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()

    def logprobs(self, model, ids: Tensor, mask: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
        R = responses.shape[1]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits[:, -R - 1 : -1]
        all_logprobs = F.log_softmax(logits.float() / self.cfg.temperature, dim=-1)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        return all_logprobs.gather(-1, responses[..., None])[..., 0], entropy

    def values(self, ids: Tensor, mask: Tensor, R: int) -> Tensor:
        hidden = self.critic.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        return self.critic.score(hidden)[:, -R - 1 : -1, 0]

    @torch.no_grad()
    def score(self, batch: Batch) -> train_ppo.Scored:
        sequences = [q + r for q, r in zip(batch.queries, batch.responses.tolist(), strict=True)]
        self.ids, self.mask = left_pad(sequences)
        ends = ppo.last_token(batch.responses, EOS) - batch.responses.shape[1]  # from the end
        found = []
        for start in range(0, len(sequences), self.rows):
            part = slice(start, start + self.rows)
            ids, mask, responses = self.ids[part], self.mask[part], batch.responses[part]
            hidden = self.reward_model.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
            rewards = self.reward_model.score(hidden.last_hidden_state)[..., 0]
            scores = rewards.gather(1, (rewards.shape[1] + ends[part])[:, None])[:, 0]
            own = self.logprobs(self.policy, ids, mask, responses)
            reference, _ = self.logprobs(self.reference, ids, mask, responses)
            found.append((*own, reference, self.values(ids, mask, responses.shape[1]), scores))
        logprobs, entropy, reference, values, scores = (torch.cat(x) for x in zip(*found, strict=True))
        return train_ppo.Scored(logprobs, entropy, reference, None, values, scores)

    def update(self, batch: Batch) -> None:
        cfg, e = self.cfg, experience([], batch.responses, self.score(batch), self.cfg)
        actions, states = e.action_mask.sum(), e.value_mask.sum()
        for epoch in range(cfg.num_ppo_epochs):
            order = np.random.default_rng(epoch).permutation(len(batch.queries))
            for start in range(0, len(order), self.rows):
                rows = torch.from_numpy(order[start : start + self.rows])
                ids, mask = self.ids[rows], self.mask[rows]
                logprobs, _ = self.logprobs(self.policy, ids, mask, e.responses[rows])
                policy_loss, _ = ppo.policy_loss(logprobs, e.logprobs[rows], e.advantages[rows], e.action_mask[rows],
                                                 cfg.cliprange, denominator=actions)  # fmt: skip
                values = self.values(ids, mask, e.responses.shape[1])
                value_loss, _ = ppo.value_loss(values, e.values[rows], e.returns[rows], e.value_mask[rows],
                                               cfg.cliprange_value, denominator=states)  # fmt: skip
                (policy_loss + cfg.vf_coef * value_loss).backward()
            parameters = [*self.policy.parameters(), *self.critic.parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()


def left_pad(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids (B, T) int64, mask (B, T) int64: 1 on tokens."""
    T = max(len(s) for s in sequences)
    ids = torch.tensor([[PAD] * (T - len(s)) + s for s in sequences])
    return ids, torch.tensor([[0] * (T - len(s)) + [1] * len(s) for s in sequences])


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def experience(sequences: list[list[int]], responses: Tensor, scored: train_ppo.Scored, cfg) -> Experience:
    """Rewards and advantages, for both alike."""
    actions, states = ppo.action_mask(responses, EOS), ppo.value_mask(responses, EOS)
    values = torch.where(states, scored.values, 0.0)
    scores = ppo.apply_missing_eos(scored.raw_scores, responses, EOS, cfg.missing_eos_score)
    kl = torch.where(actions, scored.logprobs - scored.ref_logprobs, 0.0)
    advantages, returns = ppo.gae(ppo.token_rewards(scores, kl, responses, EOS, cfg.kl_coef), values, 1.0, cfg.lam)
    advantages = ppo.masked_whiten(advantages, actions)
    return Experience(sequences, responses, actions, states, scored.logprobs, values, advantages, returns)


def in_turn(sides: dict[str, object], work: str, batch: Batch, repeats: int) -> dict[str, float]:
    """Median seconds of `work` of each side, and of CPU time, the sides taking turns; the first turn warms up."""
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(repeats + 1):
        for name, side in sides.items():
            began, busy = time.perf_counter(), time.process_time()
            getattr(side, work)(batch)
            if turn:
                times[name].append(time.perf_counter() - began)
                times[f"{name}_cpu"].append(time.process_time() - busy)
    return {name: median(seconds) for name, seconds in times.items()}


def trl(args: argparse.Namespace, threads: int, batch: Batch, cfg: train_ppo.Config) -> dict:
    """Seconds of one update of TRL's PPOTrainer on the same queries, in the environment that has it."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(batch.queries, file)
        file.flush()
        fields = ("num_ppo_epochs", "response_length", "temperature", "kl_coef", "lam", "lr")
        settings = json.dumps({name: getattr(cfg, name) for name in fields})
        program = Path(__file__).with_name("trl_ppo.py")
        # -P: or bench/kernels.py would stand for the package that transformers looks for
        command = [args.trl_python, "-P", program, "--threads", str(threads), "--batch_size", str(len(batch.queries))]
        command += ["--rows", str(args.rows), "--settings", settings, "--queries", file.name]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"{program.name} ended with status {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_size", type=int, default=128, help="episodes of the rollout and the update")
    parser.add_argument("--rows", type=int, default=32, help="sequences in a microbatch of transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl_python", help="python of an environment with TRL")
    parser.add_argument("--sft_model", type=Path, default=TINY_SFT, help="another model than the tiny one")
    parser.add_argument("--reward_model", type=Path, default=TINY_RM, help="of the same kind, by train_rm.py")
    parser.add_argument("--data", type=Path, help="folder with tldr/train.jsonl [the tiny world]")
    parser.add_argument("--max_query_length", type=int, help="tokens of a query [the preset's]")
    parser.add_argument("--beside", choices=["transformers", "bf16"], default="transformers", help="what takes turns")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK, help="only these")
    args = parser.parse_args()
    keep_freed_memory()  # as our runs do; transformers gains as much
    preset = "tiny" if args.sft_model == TINY_SFT else "smollm2"
    changes = {"num_ppo_epochs": 4, "num_minibatches": 1, "batch_size": args.batch_size}  # an update as in the paper
    changes |= {"max_query_length": args.max_query_length} if args.max_query_length else {}
    cfg = train_ppo.Config(**train_ppo.PRESETS[preset] | changes)
    sft_cfg = train_sft.Config(**train_sft.PRESETS[preset] | {"batch_size": min(64, args.batch_size)})
    posts = load_posts(args.data or ensure_world("data/tiny"), "train")
    tokenizer = load_tokenizer(args.sft_model)
    check(tokenizer.eos_id == EOS, "EOS of --sft_model", tokenizer.eos_id, f"{EOS}, which this benchmark assumes")
    queries, summaries = encode_posts(posts[: args.batch_size], tokenizer, cfg.max_query_length)
    queries, summaries = list(queries), list(summaries)
    models = args.sft_model, args.reward_model
    ours = Ours(cfg, sft_cfg, *models)
    if args.beside == "bf16":
        theirs = Ours(cfg, sft_cfg, *models, dtype=torch.bfloat16)
    else:
        theirs = Theirs(cfg, sft_cfg, args.rows, *models)
    batch = Batch(queries, [q + s for q, s in zip(queries, summaries, strict=True)], None)
    batch = batch._replace(responses=ours.rollout(batch))
    mine, other = ours.score(batch), theirs.score(batch)
    apart = {
        name: (getattr(mine, name) - getattr(other, name)).abs().max().item() for name in ("logprobs", "ref_logprobs")
    }
    longest, total = max(map(len, queries)), sum(map(len, queries))
    tokens = {"packed": total + len(queries) * cfg.response_length,
              "padded": len(queries) * (longest + cfg.response_length)}  # fmt: skip
    print(f"{len(queries)} posts, preset {preset}, R {cfg.response_length}: {tokens['packed']:,} tokens packed, "
          f"{tokens['padded']:,} padded ({tokens['padded'] / tokens['packed']:.2f}x); log-probs apart by at most "
          f"{max(apart.values()):.1e}")  # fmt: skip
    print(f"\n| threads | | nanorlhf, s | {args.beside}, s | ratio | of CPU time |\n|---|---|---|---|---|---|")
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        row = {"threads": threads}
        for work in args.work:
            seconds = in_turn({"nanorlhf": ours, args.beside: theirs}, work, batch, args.repeats)
            ratio, busy = (seconds[f"{args.beside}{kind}"] / seconds[f"nanorlhf{kind}"] for kind in ("", "_cpu"))
            row[work] = seconds | {"ratio": ratio, "ratio_cpu": busy}
            print(f"| {threads} | {work} | {seconds['nanorlhf']:.3f} | {seconds[args.beside]:.3f} | {ratio:.2f} | "
                  f"{busy:.2f} |", flush=True)  # fmt: skip
        if args.trl_python:
            found = trl(args, threads, batch, cfg)
            if "seconds" in found:
                whole = row["rollout"]["nanorlhf"] + row["update"]["nanorlhf"]
                busy = row["rollout"]["nanorlhf_cpu"] + row["update"]["nanorlhf_cpu"]
                found |= {"nanorlhf": whole, "ratio": found["seconds"] / whole, "ratio_cpu": found["cpu"] / busy}
                print(f"| {threads} | rollout + update, TRL {found['trl']} | {whole:.3f} | {found['seconds']:.3f} | "
                      f"{found['ratio']:.2f} | {found['ratio_cpu']:.2f} |", flush=True)  # fmt: skip
            else:
                print(f"| {threads} | TRL | | {found['error']} | | |", flush=True)
            row["trl"] = found
        results.append(row)
    print(json.dumps({"bench": "against", "beside": args.beside, "torch": torch.__version__,
                      "batch_size": args.batch_size, "tokens": tokens, "logprobs_apart": max(apart.values()),
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    as_command(main)
