"""The Claude judge against a local server that speaks the API: what it asks, and what it makes of the answers."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from claude_server import EXPIRED, ClaudeServer, message, prefer

from nanorlhf.data.tldr import Post
from nanorlhf.errors import UserError
from nanorlhf.evaluation import claude, claude_batch
from nanorlhf.evaluation.claude import MODEL, ClaudeJudge
from nanorlhf.evaluation.judge import LOSS, TIE, UNPARSED, WIN, Pair, order_effects

ROOT = Path(__file__).parent.parent


def seats(prompt: str) -> tuple[str, str]:
    return tuple(re.search(f"<summary_{s}>\n(.*?)\n</summary_{s}>", prompt, re.S)[1] for s in "ab")


def longer(prompt: str) -> dict:
    """A judge with an opinion that does not depend on the order."""
    a, b = seats(prompt)
    return prefer("A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie")


@pytest.fixture
def server():
    running = ClaudeServer(longer)
    yield running
    running.hold.set()
    running.close()


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    """judge(...) -> a ClaudeJudge that talks to the server and keeps its cache in tmp_path."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test-key")
    monkeypatch.setattr(claude_batch, "POLL_S", 0.01)

    def make(**options):
        client = {"base_url": server.url, "timeout": 20.0} | options.pop("client_options", {})
        options = {"cache_file": tmp_path / "cache.jsonl", "yes": True, "say": lambda line: None} | options
        return ClaudeJudge(client_options=client, **options)

    return make


def pairs(n: int) -> list[Pair]:
    """n pairs that `ours` wins, loses and ties in turn by length."""
    ours = ["longest of all", "x", "same length"]
    return [Pair(Post(f"p{i}", "r", f"t{i}", f"post {i}", "s"), ours[i % 3], "Same length") for i in range(n)]


def verdicts(judgements) -> list[str]:
    return [judgement.verdict for judgement in judgements]


# --- what it asks


def test_the_default_model_is_listed_by_the_sdk_not_deprecated_and_has_a_price():
    from anthropic.resources.messages.messages import DEPRECATED_MODELS
    from anthropic.types import Model

    listed = {name for part in get_args(Model) for name in get_args(part)}
    assert MODEL in listed and MODEL not in DEPRECATED_MODELS
    assert set(claude.PRICES) <= listed - set(DEPRECATED_MODELS) and MODEL in claude.PRICES


def test_every_pair_is_asked_in_both_orders_with_the_answer_constrained_and_no_sampling_parameter(judge, server):
    assert verdicts(judge().compare(pairs(3))) == [WIN, LOSS, TIE]
    assert sorted(map(seats, server.asked))[:2] == [("Same length", "longest of all"), ("Same length", "same length")]
    assert len(server.asked) == 6
    request = server.last_request
    assert request["output_config"]["format"]["schema"]["properties"]["preferred"]["enum"] == ["A", "B", "tie"]
    assert not {"temperature", "top_p", "top_k"} & set(request) and request["model"] == MODEL


def test_a_judge_that_always_says_a_gives_one_half_and_is_found_out(judge, server):
    server.answer = lambda prompt: prefer("A")
    judgements = judge().compare(pairs(6))
    assert verdicts(judgements) == [TIE] * 6
    assert order_effects(judgements) == {"first_seat": 1.0, "swap_agreement": 0.0, "unparsed": 0}


def test_a_judge_without_a_liking_for_a_seat_shows_none(judge):
    judgements = judge().compare([*pairs(6), Pair(Post("p", "r", "t", "post", "s"), "same", "same")])
    assert order_effects(judgements) == {"first_seat": 0.5, "swap_agreement": 1.0, "unparsed": 0}


def test_two_equal_summaries_are_a_tie_and_cost_nothing(judge, server):
    post = Post("p", "r", "t", "post", "s")
    judgements = judge().compare([Pair(post, "same", " same ")])
    assert verdicts(judgements) == [TIE] and server.asked == []
    assert math.isnan(order_effects(judgements)["swap_agreement"])  # nobody was asked, so nobody agreed


def test_a_post_cannot_fill_in_the_prompt(judge, server):
    post = Post("p", "r", "{summary_b}", "I say {post} and {summary_a}", "s")
    judge().compare([Pair(post, "one one", "two")])
    assert all("I say {post} and {summary_a}" in prompt and "TITLE: {summary_b}" in prompt for prompt in server.asked)


# --- answers it cannot use


@pytest.mark.parametrize(
    "reply, why",
    [
        (message('{"comparison": "cut off', stop_reason="max_tokens"), "max_tokens"),
        (message('{"comparison": "cut off'), "no JSON"),
        (message("", stop_reason="refusal"), "refusal"),
        (message('{"comparison": "x", "preferred": "A."}'), "no verdict"),
        (message("[]"), "no verdict"),
    ],
)
def test_an_answer_that_cannot_be_parsed_is_counted_and_never_guessed(judge, server, reply, why):
    server.answer = lambda prompt: reply if "t1\n" in prompt else longer(prompt)
    asked = judge()
    judgements = asked.compare(pairs(3))
    assert verdicts(judgements) == [WIN, UNPARSED, TIE]
    assert order_effects(judgements)["unparsed"] == 1 and asked.about()["unparsed"] == {why: 2}


# --- failures on the way


def test_rate_limits_server_errors_and_timeouts_are_retried(judge, server):
    error = json.dumps({"type": "error", "error": {"type": "x", "message": "busy"}})
    server.faults = [(429, {"retry-after": "0.7"}, error), (500, {}, error), (529, {}, error), "hang"]
    began = time.monotonic()
    assert verdicts(judge(client_options={"timeout": 2.0}).compare(pairs(3))) == [WIN, LOSS, TIE]
    assert server.faults == [] and len(set(server.asked)) == 6
    assert len(server.asked) >= 6 + 4 and time.monotonic() - began > 0.7  # what retry-after asked for


@pytest.mark.parametrize(
    "fault, said",
    [
        ((401, {}, '{"type": "error", "error": {"type": "authentication_error", "message": "bad key"}}'), "bad key"),
        ((200, {}, '{"id": "msg_1", "type": "mess'), "JSONDecodeError"),
    ],
)
def test_a_failure_that_stays_ends_in_a_sentence_and_keeps_the_answers(
    judge, server, tmp_path, fault, said, monkeypatch
):
    monkeypatch.setattr(claude, "CONCURRENT", 1)
    judge().compare(pairs(1))
    server.faults = [None, *[fault] * 9]  # the first of the four new questions is answered
    with pytest.raises(
        UserError, match=f"the Claude API failed .*{said}.* 1 of 4 answers are kept in .*goes on from there"
    ):
        judge().compare(pairs(3))
    server.faults = []
    before = len(server.asked)
    assert verdicts(judge().compare(pairs(3))) == [WIN, LOSS, TIE]
    assert len(server.asked) == before + 3  # what was answered was not asked again


# --- money


def test_a_second_run_costs_nothing_and_needs_no_key(judge, server, monkeypatch):
    first = judge().compare(pairs(6))
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    asked = len(server.asked)
    again = judge(yes=False)
    assert again.compare(pairs(6)) == first and len(server.asked) == asked
    assert again.about()["answers"] == 12 and again.about()["input_tokens"] == 1200


def test_nothing_is_sent_before_the_cost_is_agreed_to(judge, server, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))
    with pytest.raises(
        UserError, match=r"would send 6 questions to .* for about \$0.0\d, 8 at a time: agree with --yes"
    ):
        judge(yes=False).compare(pairs(3))
    with pytest.raises(UserError, match="at half price"):
        judge(yes=False, batch=True).compare(pairs(3))
    assert server.asked == []


def test_a_missing_key_is_one_sentence(judge, server, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(UserError, match="ANTHROPIC_API_KEY is not set"):
        judge().compare(pairs(1))


def test_a_batch_is_estimated_at_half_price(judge):
    questions = [q for pair in pairs(30) for q in judge()._questions(pair)]
    assert judge(batch=True).estimate(questions) == pytest.approx(judge().estimate(questions) / 2)
    assert judge(model="a-model-of-tomorrow", cache_file=None).estimate(questions) is None


@pytest.mark.parametrize("changes", [{"model": "claude-opus-5-5"}, {"prompt_file": Path(__file__)}])
def test_a_cache_of_another_model_or_prompt_is_refused_and_left_alone(judge, tmp_path, changes):
    judge().compare(pairs(1))
    before = (tmp_path / "cache.jsonl").read_bytes()
    with pytest.raises(UserError, match="judge cache .* expected .*--judge_cache"):
        judge(**changes)
    assert (tmp_path / "cache.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["my notes", '{"kind": "judge", "model": "m"}', "my notes\n", "\n"])
def test_a_file_that_is_no_cache_is_refused_and_left_alone(judge, tmp_path, content):
    (tmp_path / "cache.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="cache.jsonl"):
        judge().compare(pairs(1))
    assert (tmp_path / "cache.jsonl").read_text(encoding="utf-8") == content


def test_a_cache_line_cut_by_a_kill_is_dropped_and_asked_again(judge, server, tmp_path):
    judge().compare(pairs(3))
    path = tmp_path / "cache.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    judge().compare(pairs(3))
    assert len(server.asked) == 7 and len(path.read_bytes().splitlines()) == 7
    judge().compare(pairs(3))  # and what was written then can be read
    assert len(server.asked) == 7


@pytest.mark.parametrize("left", [0, 10])
def test_a_cache_whose_first_line_was_cut_by_a_kill_is_begun_again(judge, server, tmp_path, left):
    path = tmp_path / "cache.jsonl"
    judge().compare(pairs(1))
    path.write_bytes(path.read_bytes()[:left])
    judge().compare(pairs(1))
    asked = len(server.asked)
    judge().compare(pairs(1))  # and can be read
    assert asked == len(server.asked) == 4


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_claude import pairs
from nanorlhf.evaluation import claude_batch
from nanorlhf.evaluation.claude import ClaudeJudge
claude_batch.POLL_S = 0.01
judge = ClaudeJudge(Path({cache!r}), yes=True, batch={batch}, client_options=dict(base_url={url!r}, api_key="k"))
print([judgement.verdict for judgement in judge.compare(pairs(12))])
"""


def start(server, tmp_path, batch=False) -> subprocess.Popen:
    program = PROGRAM.format(
        root=str(ROOT), tests=str(ROOT / "tests"), cache=str(tmp_path / "cache.jsonl"), url=server.url, batch=batch
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, encoding="utf-8")


def wait_until(true, timeout=30.0) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_a_run_that_is_killed_asks_nothing_twice_that_was_answered(server, tmp_path):
    server.hold_after = 10
    process = start(server, tmp_path)
    cache = tmp_path / "cache.jsonl"
    wait_until(lambda: not server.hold.is_set() and cache.exists())
    wait_until(lambda: len(cache.read_bytes().splitlines()) == 1 + len(server.answered))
    answered = list(server.answered)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    server.hold_after = None
    server.asked.clear()
    server.hold.set()
    again = start(server, tmp_path)
    assert again.communicate(timeout=60)[0].splitlines()[-1] == str([WIN, LOSS, TIE] * 4)
    new = [prompt for prompt in server.asked if prompt not in answered]
    assert len(answered) >= 10 and len(new) == 24 - len(answered)
    assert set(server.asked).isdisjoint(answered)


# --- batches


def test_a_batch_gives_the_answers_of_single_requests(judge, server):
    assert verdicts(judge(batch=True).compare(pairs(6))) == [WIN, LOSS, TIE] * 2
    assert [len(requests) for requests in server.batches.values()] == [12] and server.asked == []


def test_what_a_batch_left_to_expire_is_sent_again_and_nothing_else(judge, server):
    succeeded = server.batch_result
    server.batch_result = lambda i, prompt: EXPIRED if len(server.batches) == 1 and i >= 6 else succeeded(i, prompt)
    assert verdicts(judge(batch=True).compare(pairs(6))) == [WIN, LOSS, TIE] * 2
    first, second = server.batches.values()
    assert [r["custom_id"] for r in second] == [r["custom_id"] for r in first][6:]


def test_a_batch_that_never_answers_ends_in_a_sentence(judge, server):
    server.batch_result = lambda i, prompt: EXPIRED
    with pytest.raises(UserError, match="2 of 2 questions came back unanswered from 3 batches"):
        judge(batch=True).compare(pairs(1))


def test_a_batch_whose_requests_are_refused_says_why(judge, server):
    error = {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "no such model"},
        "request_id": None,
    }
    server.batch_result = lambda i, prompt: {"type": "errored", "error": error}
    with pytest.raises(UserError, match=r"refuses 2 questions \(no such model\)"):
        judge(batch=True).compare(pairs(1))
    assert len(server.batches) == 1


@pytest.mark.parametrize("lost", ["deleted", "archived"])
def test_a_batch_whose_results_are_gone_is_sent_again(judge, server, tmp_path, lost):
    """Deleted, or asked for with another key: 404. Older than 29 days: there, but without results."""
    judge(batch=True).compare(pairs(3))
    path = tmp_path / "cache.jsonl"
    lines = [
        line
        for line in path.read_text(encoding="utf-8").splitlines()
        if '"answer"' not in line and "collected" not in line
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")  # as if it had been killed while it waited
    getattr(server, lost).update(server.batches)
    said = []
    assert verdicts(judge(batch=True, say=said.append).compare(pairs(3))) == [WIN, LOSS, TIE]
    assert len(server.batches) == 2 and any("msgbatch_0 is gone" in line for line in said)
    assert verdicts(judge(batch=True).compare(pairs(3))) == [WIN, LOSS, TIE] and len(server.batches) == 2


@pytest.mark.parametrize("reply_lost", [False, True])
def test_a_killed_run_finds_its_batch_again(server, tmp_path, reply_lost):
    """Killed while the batch was being worked on, or before it even knew the batch's id."""
    server.lose_batch_reply = reply_lost
    if not reply_lost:
        server.batch_result = lambda i, prompt: time.sleep(60)  # results never come
    process = start(server, tmp_path, batch=True)
    cache = tmp_path / "cache.jsonl"
    wait_until(
        lambda: (
            len(server.batches) == 1 and len(cache.read_text(encoding="utf-8").splitlines()) == (2 if reply_lost else 3)
        )
    )
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    server.lose_batch_reply = False
    server.batch_result = lambda i, prompt: {"type": "succeeded", "message": longer(prompt)}
    assert start(server, tmp_path, batch=True).communicate(timeout=60)[0].splitlines()[-1] == str([WIN, LOSS, TIE] * 4)
    assert len(server.batches) == 1  # nothing was sent twice
