"""A Claude model as judge: it reads a post and two summaries and says which is better (N+ section 5.2, mended).

    ClaudeJudge(cache, ...).compare(pairs) -> judgements

What the paper's judge lacks: every pair is asked in both orders, so a liking for the first seat cancels and shows; a
tie is a possible answer; what cannot be parsed is counted, never guessed. The reply is constrained to SCHEMA.

Every answer is appended to the cache the moment it arrives, under a key of model, prompt and texts. So a second run
asks nothing, and a run that was killed asks only what was not answered yet. Nothing is sent before the cost was shown
and confirmed. Retries (429 with its retry-after, 5xx, timeouts) are the SDK's. Batches at half price: claude_batch.py.
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from nanorlhf.data.tldr import format_query
from nanorlhf.errors import UserError
from nanorlhf.evaluation.claude_batch import ask_in_batches
from nanorlhf.evaluation.claude_cache import PREFERRED, Cache, read_reply
from nanorlhf.evaluation.judge import LOSS, TIE, UNPARSED, WIN, Judgement, Pair

MODEL = "claude-sonnet-5-5"  # current and mid-priced; a test asks the SDK whether it still is
PRICES = {"claude-sonnet-5-5": (2.0, 10.0), "claude-opus-5-5": (4.0, 20.0)}  # USD a million tokens, in and out, 11/2026
BATCH_DISCOUNT = 0.5
PROMPT_FILE = Path(__file__).parent / "judge_prompt.txt"
SCHEMA = {
    "type": "object",
    "properties": {"comparison": {"type": "string"}, "preferred": {"type": "string", "enum": list(PREFERRED)}},
    "required": ["comparison", "preferred"],
    "additionalProperties": False,
}
MAX_TOKENS = 2048  # of a reply, the model's thinking included
EFFORT = "low"  # how long it thinks; sampling parameters are no longer accepted by current models
CHARACTERS_A_TOKEN, TOKENS_A_REPLY = 3.0, 250  # for the estimate only, and rather too dear than too cheap
CONCURRENT, RETRIES, TIMEOUT_S = 8, 8, 120.0


# --- questions and answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One request: a post and two summaries in one order."""

    post: str
    a: str
    b: str

    def text(self, prompt: str) -> str:
        """The prompt filled in, in one pass: a post that contains "{summary_a}" stays as it is."""
        parts = {"post": self.post, "summary_a": self.a, "summary_b": self.b}
        return re.sub(r"\{(post|summary_a|summary_b)\}", lambda match: parts[match[1]], prompt)

    def key(self, model: str, prompt_hash: str) -> str:
        return hashlib.sha256(json.dumps([model, prompt_hash, self.post, self.a, self.b]).encode()).hexdigest()


def outcome(preferred: str | None, ours: str) -> str:
    """WIN, TIE, LOSS or UNPARSED of the summary that stood in seat `ours`, "A" or "B"."""
    if preferred is None:
        return UNPARSED
    return TIE if preferred == "tie" else WIN if preferred == ours else LOSS


# --- the judge --------------------------------------------------------------------------------------------------------


@dataclass
class ClaudeJudge:
    """`compare` asks what the cache does not know, after showing the cost. `about()` is what the report says of it."""

    cache_file: Path | None = None  # default: runs/judge/<model>-<prompt>.jsonl
    model: str = MODEL
    batch: bool = False  # the Message Batches API: half the price, minutes to a day
    yes: bool = False  # spend without asking
    prompt_file: Path = PROMPT_FILE
    say: Callable[[str], None] = print
    progress: Callable = lambda items, what, total=None: items
    client_options: dict = field(default_factory=dict)  # base_url, api_key and so on, of the SDK's client
    name: str = "claude"

    def __post_init__(self):
        self.prompt = Path(self.prompt_file).read_text(encoding="utf-8")
        self.prompt_hash = hashlib.sha256(self.prompt.encode()).hexdigest()
        path = self.cache_file or Path("runs/judge") / f"{self.model}-{self.prompt_hash[:12]}.jsonl"
        self.cache = Cache(path, self.model, self.prompt_hash)
        self.used: dict[str, dict] = {}

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        both = [self._questions(pair) for pair in pairs]
        asked = {q.key(self.model, self.prompt_hash): q for qs in both for q in qs if q.a != q.b}
        missing = {key: question for key, question in asked.items() if key not in self.cache.answers}
        if missing:
            self._confirm(missing)
            self._ask(missing)
        self.used |= {key: self.cache.answers[key] for key in asked}

        def said(question: Question, ours: str) -> str:
            if question.a == question.b:
                return TIE  # the same text twice is not worth a question
            return outcome(self.used[question.key(self.model, self.prompt_hash)]["preferred"], ours)

        return [Judgement(said(a, "A"), said(b, "B"), asked=a.a != a.b) for a, b in both]

    def request(self, question: Question) -> dict:
        """The parameters of one message: no sampling parameters, which current models refuse."""
        return {
            "model": self.model,
            "max_tokens": MAX_TOKENS,
            "messages": [{"role": "user", "content": question.text(self.prompt)}],
            "output_config": {"effort": EFFORT, "format": {"type": "json_schema", "schema": SCHEMA}},
        }

    def estimate(self, questions: Sequence[Question]) -> float | None:
        """USD, roughly; None for a model whose price is not in PRICES."""
        if self.model not in PRICES:
            return None
        tokens_in = sum(len(question.text(self.prompt)) for question in questions) / CHARACTERS_A_TOKEN
        price_in, price_out = PRICES[self.model]
        dollars = (tokens_in * price_in + len(questions) * TOKENS_A_REPLY * price_out) / 1e6
        return dollars * (BATCH_DISCOUNT if self.batch else 1)

    def about(self) -> dict:
        """Model, prompt, and what the answers that were used said and cost, whenever they were bought."""
        answers = list(self.used.values())
        tokens = [sum(answer.get(name, 0) for answer in answers) for name in ("input_tokens", "output_tokens")]
        return {
            "model": self.model,
            "prompt_file": self.prompt_file.name,
            "prompt_sha256": self.prompt_hash,
            "answers": len(answers),
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
            "unparsed": dict(Counter(answer["why"] for answer in answers if answer["preferred"] is None)),
        }

    def _questions(self, pair: Pair) -> tuple[Question, Question]:
        post = format_query(pair.post.subreddit, pair.post.title, pair.post.post).removesuffix("TL;DR:").strip()
        ours, theirs = pair.ours.strip(), pair.theirs.strip()
        return Question(post, ours, theirs), Question(post, theirs, ours)

    def _confirm(self, missing: dict[str, Question]) -> None:
        """Says what it will cost; raises UserError unless somebody agrees."""
        dollars = self.estimate(list(missing.values()))
        cost = "at a price this version does not know" if dollars is None else f"for about ${dollars:.2f}"
        way = "in batches at half price" if self.batch else f"{CONCURRENT} at a time"
        plan = f"{len(missing):,} questions to {self.model} {cost}, {way}"
        if not self.yes and sys.stdin.isatty():
            self.yes = input(f"claude  {plan}. Spend it? [y/N] ").strip().lower() in ("y", "yes")
        if not self.yes:
            raise UserError(
                f"--judge claude would send {plan}: agree with --yes, or judge fewer posts with --num_posts"
            )
        if not (self.client_options.get("api_key") or os.environ.get("ANTHROPIC_API_KEY")):
            raise UserError(
                "ANTHROPIC_API_KEY is not set, expected a key of the Claude API: export it, or use --judge rm"
            )
        self.say(f"claude  {plan}")

    def _client(self):
        try:
            import anthropic
        except ImportError:
            raise UserError("--judge claude needs anthropic, which is not installed: pip install anthropic") from None
        return anthropic.Anthropic(**({"max_retries": RETRIES, "timeout": TIMEOUT_S} | self.client_options))

    def _ask(self, missing: dict[str, Question]) -> None:
        client = self._client()
        import anthropic

        try:
            if self.batch:
                requests = {key: self.request(question) for key, question in missing.items()}
                ask_in_batches(client, requests, self.cache, self.say)
            else:
                self._ask_concurrently(client, missing)
        except (anthropic.APIError, json.JSONDecodeError) as error:  # after the SDK's retries
            kept = sum(key in self.cache.answers for key in missing)
            raise UserError(
                f"the Claude API failed ({type(error).__name__}: {error}): {kept} of {len(missing)} answers are kept "
                f"in {self.cache.path}; the same command goes on from there"
            ) from error

    def _ask_concurrently(self, client, missing: dict[str, Question]) -> None:
        def ask(key: str, question: Question) -> None:
            self.cache.keep(key, read_reply(client.messages.create(**self.request(question))))

        with ThreadPoolExecutor(CONCURRENT) as pool:
            futures = [pool.submit(ask, key, question) for key, question in missing.items()]
            try:
                for future in self.progress(as_completed(futures), what="judging", total=len(futures)):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure: those under way are kept, no new ones are sent
