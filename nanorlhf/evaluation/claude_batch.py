"""The Message Batches API: half the price, answers within minutes to a day, at most 24 hours.

    ask_in_batches(client, requests, cache, say)        requests: {key: parameters of a message}

A batch outlives the process that sent it. Before it is sent, the cache notes that it will be; afterwards its id. So a
run that was killed finds its batch again and asks nothing twice: by id, or, where the kill came between the two notes,
among the newest batches of the account. What expired or was cancelled unanswered goes into a new batch, and so does a
batch whose results the API no longer has (it keeps them for 29 days) or shows to another key only.
"""

import time
from collections.abc import Callable

from nanorlhf.errors import UserError
from nanorlhf.evaluation.claude_cache import Cache, read_reply

REQUESTS_A_BATCH = 10_000  # the API takes 100,000, or 256 MB
ROUNDS = 3  # times a question is sent before we give up on it
POLL_S = 20.0
CLOCK_SKEW_S = 120.0


def ask_in_batches(
    client, requests: dict[str, dict], cache: Cache, say: Callable[[str], None], poll_s: float = POLL_S
) -> None:
    """Answers every request into the cache. Raises UserError for requests that the API refuses or never answers."""
    from anthropic import NotFoundError

    for batch_id in _under_way(client, cache):
        say(f"claude  batch {batch_id} was sent earlier: collecting it")
        try:
            _collect(client, batch_id, cache, say, poll_s)
        except NotFoundError:
            _give_up(batch_id, cache, say)
    for _ in range(ROUNDS):
        open_keys = [key for key in requests if key not in cache.answers]
        for start in range(0, len(open_keys), REQUESTS_A_BATCH):
            keys = open_keys[start : start + REQUESTS_A_BATCH]
            _collect(client, _send(client, keys, requests, cache, say), cache, say, poll_s)
    if left := sum(key not in cache.answers for key in requests):
        raise UserError(
            f"{left} of {len(requests)} questions came back unanswered from {ROUNDS} batches: the same command sends "
            "them again; answers so far are kept"
        )


def _send(client, keys: list[str], requests: dict[str, dict], cache: Cache, say) -> str:
    cache.note(state="sending", first_key=keys[0], requests=len(keys), time=time.time())
    batch = client.messages.batches.create(requests=[{"custom_id": key, "params": requests[key]} for key in keys])
    cache.note(state="sent", id=batch.id)
    say(f"claude  batch {batch.id}: {len(keys):,} questions; this run may be stopped and started again meanwhile")
    return batch.id


def _under_way(client, cache: Cache) -> list[str]:
    """Ids of the batches that were sent and not yet collected; one whose id was lost to a kill is looked up."""
    sent = [note["id"] for note in cache.batches if note["state"] == "sent"]
    done = {note["id"] for note in cache.batches if note["state"] in ("collected", "gone")}
    if cache.batches and cache.batches[-1]["state"] == "sending":
        lost = cache.batches[-1]
        for batch in client.messages.batches.list(limit=20).data:
            count = sum(getattr(batch.request_counts, name) for name in type(batch.request_counts).model_fields)
            recent = batch.created_at.timestamp() > lost["time"] - CLOCK_SKEW_S
            if recent and count == lost["requests"] and batch.id not in sent:
                cache.note(state="sent", id=batch.id)
                sent.append(batch.id)
                break
    return [batch_id for batch_id in sent if batch_id not in done]


def _give_up(batch_id: str, cache: Cache, say) -> None:
    cache.note(state="gone", id=batch_id)
    say(f"claude  batch {batch_id} is gone: deleted, archived or of another key; what it left open is sent again")


def _collect(client, batch_id: str, cache: Cache, say, poll_s: float) -> None:
    """Waits until the batch has ended and keeps its answers."""
    last = None
    while (batch := client.messages.batches.retrieve(batch_id)).processing_status != "ended":
        if batch.request_counts.processing != last:
            last = batch.request_counts.processing
            say(f"claude  batch {batch_id}: {last:,} questions open")
        time.sleep(poll_s)
    if batch.results_url is None:  # archived: the SDK would raise an error of no particular kind
        return _give_up(batch_id, cache, say)
    counts = {"succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    refused = None
    for line in client.messages.batches.results(batch_id):
        counts[line.result.type] += 1
        if line.result.type == "succeeded":
            if line.custom_id not in cache.answers:
                cache.keep(line.custom_id, read_reply(line.result.message))
        elif line.result.type == "errored" and line.result.error.error.type == "invalid_request_error":
            refused = line.result.error.error.message
    cache.note(state="collected", id=batch_id)
    say(f"claude  batch {batch_id}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items() if n))
    if refused:
        raise UserError(
            f"the Claude API refuses {counts['errored']} questions ({refused}): choose another --judge_model"
        )
