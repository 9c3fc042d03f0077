"""What each policy wrote: generated once and stored, or read from a file that somebody else's model filled.

    write(folder, posts, plan, ...) -> Written          from a checkpoint; stored under runs/summaries and found again
    read_samples(file, name, posts) -> Written          from a JSONL file: one line a post, with id and summary

Stored summaries are found by what made them: the SHA-256 of the model's files, the posts with their references, the
plan and the code that generates. Another judge, another report or another run over the same checkpoint then generates
nothing.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import kernels
from nanorlhf import parallel
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import Post
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.losses import next_token_labels
from nanorlhf.models import Policy
from nanorlhf.packing import microbatches, pack
from nanorlhf.rollout import Summary, summarise
from nanorlhf.storage.checkpoint import check_folder, load_policy
from nanorlhf.storage.jsonl import append, read_jsonl

STORE = Path("runs/summaries")
PACKAGE = Path(__file__).parents[1]
LESSON = "rollout decoder models llama attention packing losses".split()
CODE = [PACKAGE / f"{name}.py" for name in LESSON]  # decides a summary, or the loss
DATA = "encoding tldr tokenizer tokenizer_json added_tokens".split()
CODE += [PACKAGE / "data" / f"{name}.py" for name in DATA] + [Path(__file__)]
CODE += sorted(Path(kernels.__file__).parent.glob("*.py"))


@dataclass(frozen=True)
class Plan:
    """How a policy is asked. Every policy has noise of its own: shared numbers would make similar policies write the
    same text, and count their agreement as ties."""

    temperature: float
    response_length: int
    max_query_length: int
    noise: int  # seed of the sampling
    samples: int  # several a post, for diversity and entropy
    sample_posts: int  # of the first so many posts
    sample_temperature: float


@dataclass
class Written:
    """A policy's summaries, one a post; and, where the policy itself was there, what only it can tell."""

    summaries: list[Summary]
    samples: list[list[str]] = field(default_factory=list)  # several of each of the first posts
    entropy: float | None = None  # nats a token at the samples' temperature: mean of -log p of what was sampled
    loss: float | None = None  # nats a token of the references, EOS included, given the post
    reused: bool = False

    @property
    def texts(self) -> list[str]:
        return [summary.text for summary in self.summaries]


def write(folder: Path, posts: list[Post], plan: Plan, device, dtype, microbatch_tokens: int, progress) -> Written:
    """The summaries of a checkpoint, from the store where they are, else generated and stored."""
    read = [[p.id, p.subreddit, p.title, p.post, p.summary] for p in posts]  # the summary decides the loss
    made_by = {
        "model": _fingerprint(folder),
        "posts": _hash(read),
        "code": _hash([p.read_text(encoding="utf-8") for p in CODE]),
    }
    made_by |= {"dtype": str(dtype).removeprefix("torch."), "device": device.type} | asdict(plan)
    path = STORE / f"{_hash(made_by)[:20]}.jsonl"
    if parallel.from_first(path.is_file):
        return _from_store(path)

    tokenizer = load_tokenizer(folder)
    check_folder(folder, tokenizer)
    policy = load_policy(folder, device, dtype, tokenizer)
    queries, references = encode_posts(posts, tokenizer, plan.max_query_length, progress)
    R = plan.response_length
    summaries = summarise(policy, tokenizer, queries, R, plan.temperature, plan.noise, progress=progress)
    asked = [query for query in queries[: plan.sample_posts] for _ in range(plan.samples)]
    sampled = []
    if asked:
        other_noise = ~plan.noise % 2**32  # than the summaries above
        sampled = summarise(policy, tokenizer, asked, R, plan.sample_temperature, other_noise, progress=progress)
    written = Written(summaries, loss=reference_loss(policy, queries, references, microbatch_tokens, progress))
    if sampled:
        written.samples = [
            [s.text for s in sampled[i : i + plan.samples]] for i in range(0, len(sampled), plan.samples)
        ]
        written.entropy = -sum(s.logprob for s in sampled) / sum(s.tokens for s in sampled)
    if parallel.first():
        _to_store(path, made_by, posts, written)
    parallel.barrier()  # the store holds it for all
    return written


@torch.no_grad()
def reference_loss(
    policy: Policy, queries: list[list[int]], references: list[list[int]], microbatch_tokens: int, progress
) -> float:
    """Mean over all reference tokens, EOS included, of -log p(token | post, tokens before), in nats."""
    sequences = [query + reference for query, reference in zip(queries, references, strict=True)]
    total = torch.zeros((), device=policy.head_weight.device)
    turns = microbatches([len(s) for s in sequences], microbatch_tokens)
    for group, here in progress(turns, what="loss on references"):
        packed = pack([sequences[i] for i in group], policy.head_weight.device)
        labels, counts = next_token_labels(packed)  # (N,), (N,)
        starts = torch.tensor([len(queries[i]) - 1 for i in group], device=counts.device)  # predicts the first token
        lengths = torch.tensor(packed.lengths, device=counts.device)
        start = torch.repeat_interleave(starts, lengths)
        start = torch.nn.functional.pad(start, (0, packed.filling))
        weights = (counts & (packed.positions >= start)).float()  # (N,)
        total += here * policy.cross_entropy(packed, labels, weights)
    return parallel.total(total).item() / sum(len(reference) for reference in references)


def read_samples(path: Path, name: str, posts: list[Post]) -> Written:
    """Summaries from a file: {"id": post id, "summary": text} a line, or our samples.jsonl with the policy's `name`.

    Raises UserError unless every post has exactly one. Lines of other posts are ignored where all posts are there.
    """
    texts: dict[str, str] = {}
    for row in read_jsonl(path, having="id"):
        text = row.get("summary", row.get(name))
        if not isinstance(text, str):
            got = f"{path} has no summary (or {name}) of post {row['id']}"
            raise UserError(f"samples {name}: {got}, expected text: mend the line")
        if row["id"] in texts:
            raise UserError(f"samples {name}: {path} has two summaries of post {row['id']}, expected one: remove one")
        texts[row["id"]] = text.strip()
    missing = [post.id for post in posts if post.id not in texts]
    if missing:
        raise UserError(
            f"samples {name}: {path} lacks {len(missing)} of the {len(posts)} posts (the first: {missing[0]}), "
            "expected all of them: is it of another data set or split? --num_posts evaluates fewer"
        )
    if not any(texts[post.id] for post in posts):
        raise UserError(f"samples {name}: all {len(posts)} summaries in {path} are blank, expected text: mend the file")
    summaries = [Summary(texts[post.id], tokens=0, has_eos=True) for post in posts]  # what a text file can say
    return Written(summaries)


def check_not_silent(name: str, texts: list[str]) -> None:
    """Raises UserError when a policy wrote not a single word."""
    if not any(text.strip() for text in texts):
        raise UserError(
            f"policy {name} wrote {len(texts)} empty summaries, expected text: its first token is EOS everywhere; "
            "was it trained with PAD equal to EOS?"
        )


def _to_store(path: Path, made_by: dict, posts: list[Post], written: Written) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "made_by": made_by, "entropy": written.entropy, "loss": written.loss}]
    for i, (post, summary) in enumerate(zip(posts, written.summaries, strict=True)):
        samples = {"samples": written.samples[i]} if i < len(written.samples) else {}
        rows.append({"step": 0, "id": post.id, **asdict(summary)} | samples)
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    append(draft, rows)
    draft.replace(path)  # all of it, or nothing


def _from_store(path: Path) -> Written:
    head, *rows = read_jsonl(path)
    samples = [row.pop("samples") for row in rows if "samples" in row]
    summaries = [Summary(row["text"], row["tokens"], row["has_eos"], row["logprob"]) for row in rows]
    return Written(summaries, samples, head["entropy"], head["loss"], reused=True)


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the files of a model folder that decide what it writes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".json", ".model")):
        if path.name in ("generation_config.json",):
            continue
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
