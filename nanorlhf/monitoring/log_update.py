"""Step 7 of train_ppo.py: what an update leaves behind. Metrics, alarms, and now and then samples and a trace."""

from torch import Tensor

from nanorlhf import parallel
from nanorlhf.data.tldr import Post
from nanorlhf.data.tokenizer import Tokenizer
from nanorlhf.errors import check
from nanorlhf.evaluation.hacks import Alarms
from nanorlhf.models import Policy
from nanorlhf.monitoring import monitor
from nanorlhf.ppo import Experience
from nanorlhf.rollout import Summary
from nanorlhf.run.run import Run
from nanorlhf.storage.jsonl import append, finite


def log_update(
    run: Run, update: int, policy: Policy, tokenizer: Tokenizer, posts: list[Post], summaries: list[Summary], said,
    episode: Experience, totals: dict[str, Tensor], checked: dict[str, float], alarms: Alarms,
    rates: tuple[float, float], times: tuple[float, float, float, float],
) -> None:  # fmt: skip
    """Writes metrics.jsonl and, every --sample_every updates, samples.jsonl and trace.jsonl. Raises UserError where the
    KL is above --stop_kl.

    args: posts, summaries: of the batch, B each; said: train_ppo.Scored; totals: sums over the optimizer steps of what
    train_ppo.learn returns; checked: the pre-flight's metrics; rates: of policy and critic; times: seconds of a clock
    when the update began, had sampled, had scored and had learned
    """
    cfg, e, (lr, critic_lr), (began, rolled_out, scored, learned) = run.cfg, episode, rates, times
    R, K, warming = cfg.response_length, len(cfg.reward_model), update < cfg.critic_warmup
    queries = [sequence[:-R] for sequence in e.sequences]
    finished = [query + sequence[len(query) : len(query) + summary.tokens]
                for query, sequence, summary in zip(queries, e.sequences, summaries, strict=True)]  # fmt: skip
    look = cfg.sample_every and (update == 0 or (update + 1) % cfg.sample_every == 0)  # closer than at others
    metrics = (
        monitor.objective(e.scores, e.logprobs, e.kl, e.action_mask, cfg.kl_coef, e.full_kl)
        | monitor.ensemble(said.member_scores)
        | monitor.learning(totals, cfg.num_ppo_epochs * cfg.num_minibatches, e.action_mask)
        | monitor.critic(e.values, e.returns, e.raw_advantages, e.action_mask, e.value_mask)
        | monitor.texts(summaries, posts, e.scores, said.entropy, e.action_mask)
        | {"lr": lr, "critic_lr": critic_lr, "episode": (update + 1) * cfg.batch_size}
        | {"time/rollout": rolled_out - began, "time/score": scored - rolled_out, "time/learn": learned - scored}
        | monitor.speed(
            policy.config, e.sequences, finished, R, cfg.num_ppo_epochs, learned - began, run.device, warming, K
        )
        | (monitor.diversity(policy, tokenizer, queries, R, cfg.temperature, cfg.seed) if look else {})
        | checked
    )
    run.log(update + 1, metrics)
    for alarm in alarms(metrics):
        run.say(alarm)
    kl, most = metrics["objective/kl"], cfg.stop_kl
    fix = "go on with --resume, from the checkpoint before, and a higher one, or begin again with more --kl_coef"
    check(most is None or kl <= most, "objective/kl", f"{kl:.4g}", f"at most --stop_kl {most}", fix)
    if look and parallel.first():
        names = "logprobs kl values rewards advantages action_mask value_mask".split()
        first = {name: getattr(e, name)[0] for name in names} | {"ref_logprobs": said.ref_logprobs[0]}  # (R,) each
        row = monitor.trace(tokenizer, posts[0], e.responses[0], **first)
        append(run.folder / "trace.jsonl", [finite({"step": update + 1, "score": e.scores[0]} | row)])
        rows = [
            {"title": p.title, "post": p.post, "response": s.text, "score": x, "kl": k}
            for p, s, x, k in zip(posts, summaries, e.scores.tolist(), e.kl.sum(1).tolist(), strict=True)
        ]
        run.samples(update + 1, rows)
