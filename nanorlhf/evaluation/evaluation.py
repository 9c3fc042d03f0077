"""The tables of an evaluation as numbers: which policies take part, what describes them, who beats whom."""

import re
from collections.abc import Sequence
from pathlib import Path

from nanorlhf.data.tldr import Post
from nanorlhf.errors import UserError
from nanorlhf.evaluation import hacks
from nanorlhf.evaluation.judge import OUTCOMES, UNPARSED, Judge, Judgement, Pair, order_effects
from nanorlhf.evaluation.metrics import (
    accuracy_interval,
    bootstrap_interval,
    length_controlled_interval,
    length_controlled_win_rate,
    length_fit,
    mean,
    mean_pairwise_edit_distance,
    rouge,
    win_rate,
    win_rate_by_length,
    words,
)  # fmt: skip
from nanorlhf.evaluation.summaries import Written
from nanorlhf.run.inputs import find_model

STAGES = ("base", "sft", "ppo")
REFERENCE = "reference"
# Columns of samples.jsonl, and "rm" among the models of metrics.json:
RESERVED = (REFERENCE, "step", "id", "subreddit", "title", "post", "rm", "samples", "disagreement")


def find_policies(flags: Sequence[str], preset: str) -> tuple[dict[str, tuple[Path, str]], dict[str, str]]:
    """{name: (folder, where it came from)} of --policy name=DIR ...; a bare base, sft or ppo is found as usual.

    Without flags: base, SFT and PPO, as far as they are there; then also {name: why} of those that are not. Raises
    UserError for one that was asked for and is not there.
    """
    found, missing = {}, {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        _check_name("policy", name, found)
        if not equals and name not in STAGES:
            raise UserError(f"policy {name} has no folder, expected {name}=DIR (bare names: {', '.join(STAGES)})")
        found[name] = find_model(name, folder if equals else None, f"policy {name}", preset)
    for stage in () if flags else STAGES:
        try:
            folder, origin = find_model(stage, None, f"policy {stage}=", preset)
        except UserError as error:
            missing[stage] = str(error)
            continue
        if folder.is_dir():
            found[stage] = folder, origin
        else:
            missing[stage] = f"{folder} is not there"
    return found, missing


def find_samples(flags: Sequence[str], taken: dict) -> dict[str, Path]:
    """{name: file} of --samples name=FILE ..."""
    found = {}
    for flag in flags:
        name, equals, path = flag.partition("=")
        _check_name("samples", name, taken | found)
        if not equals or not Path(path).is_file():
            raise UserError(f"samples {name}: {path or 'no file given'} is no file, expected name=FILE.jsonl")
        found[name] = Path(path)
    return found


def _check_name(flag: str, name: str, taken) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in RESERVED:
        raise UserError(f"--{flag} {name!r}: expected a name of letters, digits, ., - and _, not {', '.join(RESERVED)}")
    if name in taken:
        raise UserError(f"--{flag} {name}: there are two of this name, expected one: rename one")


def opponents(names: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: the last policy with each other one, then each with the references. The base model
    was never asked to summarise, so it plays only where it is alone."""
    players = [name for name in names if name != "base"] or list(names)
    last = players[-1]
    return [(last, other) for other in reversed(players[:-1])] + [(name, REFERENCE) for name in reversed(players)]


def describe(
    written: Written, posts: list[Post], scores: list[float] | None, gold: list[float] | None, stemmer: bool, progress
) -> dict[str, float]:
    """One column of the table of policies; what does not apply is left out. See `hacks.panel` for most names."""
    texts = written.texts
    row = rouge(texts, [post.summary for post in posts], stemmer, progress)
    row["loss"] = written.loss
    row |= hacks.panel(texts, posts, scores)
    if any(summary.tokens for summary in written.summaries):  # not of a file of texts
        row["tokens"] = mean([summary.tokens for summary in written.summaries])  # EOS included
        row["eos_rate"] = sum(summary.has_eos for summary in written.summaries) / len(texts)
    if written.samples:
        row["edit_distance"] = mean([mean_pairwise_edit_distance(group) for group in written.samples])
    row |= {"entropy": written.entropy, "score": mean(scores) if scores else None, "gold": mean(gold) if gold else None}
    return {name: value for name, value in row.items() if value is not None}


def describe_reference(posts: list[Post], scores: list[float] | None, gold: list[float] | None) -> dict[str, float]:
    row = hacks.panel([post.summary for post in posts], posts, scores)
    row |= {"score": mean(scores) if scores else None, "gold": mean(gold) if gold else None}
    return {name: value for name, value in row.items() if value is not None}


def compare(
    judge: Judge,
    posts: list[Post],
    texts: dict[str, list[str]],
    scores: dict[str, list[float]],
    seed: int,
    progress=lambda games, what: games,
) -> tuple[list[dict], dict[tuple[str, str], list[Judgement]]]:
    """A row of numbers for each pair of `opponents`, and the judgements they come from.

    The judge sees all pairs at once, so that one that costs money asks once.
    """
    games = opponents([name for name in texts if name != REFERENCE])
    pairs = [[Pair(p, a, b) for p, a, b in zip(posts, texts[x], texts[y], strict=True)] for x, y in games]
    every = judge.compare([pair for game in pairs for pair in game])
    n = len(posts)
    by_game = {game: every[i * n : (i + 1) * n] for i, game in enumerate(games)}
    walk = progress(games, what="intervals of win rates")
    return [_row(game, by_game[game], texts, scores, seed) for game in walk], by_game


def _row(game: tuple[str, str], judgements: list[Judgement], texts: dict, scores: dict, seed: int) -> dict:
    ours, theirs = game
    row = {"ours": ours, "theirs": theirs, "pairs": len(judgements)} | order_effects(judgements)
    readable = [i for i, judgement in enumerate(judgements) if judgement.verdict != UNPARSED]
    verdicts = [judgements[i].verdict for i in readable]
    row |= {"n": len(readable)} | dict(
        zip(("wins", "ties", "losses"), (verdicts.count(verdict) for verdict in OUTCOMES), strict=True)
    )
    if not readable:
        raise UserError(f"the judge gave no readable answer on {ours} vs {theirs}: see the cache for what it said")
    outcomes = [OUTCOMES[verdict] for verdict in verdicts]
    row |= {"rate": win_rate(row["wins"], row["ties"], row["losses"]), "interval": bootstrap_interval(outcomes, seed)}
    lengths = [[len(words(texts[side][i])) for i in readable] for side in game]
    row["length_controlled"] = length_controlled_win_rate(outcomes, *lengths)
    row["length_controlled_interval"] = length_controlled_interval(outcomes, *lengths, seed=seed)
    row["length_fit"] = length_fit(outcomes, *lengths)
    row["by_length"] = win_rate_by_length(outcomes, *lengths)
    if scores:
        decided = [(outcome, i) for outcome, i in zip(outcomes, readable, strict=True) if outcome != OUTCOMES["tie"]]
        agreed = sum((outcome > 0.5) == (scores[ours][i] > scores[theirs][i]) for outcome, i in decided)
        if decided:
            row["rm_agreement"] = agreed / len(decided)
            row["rm_agreement_interval"] = accuracy_interval(agreed, len(decided))
    return row


def disagreement(outcome: float | None, our_score: float, their_score: float) -> float:
    """How far judge and reward model are apart on a pair: the score gap where they name different winners, else 0 or
    less. 0 without a verdict."""
    return 0.0 if outcome is None else (1 - 2 * outcome) * (our_score - their_score)
