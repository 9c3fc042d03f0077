"""What Claude answered, kept: a message read into a verdict, and the file of verdicts that no kill can lose."""

import json
from pathlib import Path
from threading import Lock

from nanorlhf.errors import UserError
from nanorlhf.storage.jsonl import append, read_jsonl, write_whole

PREFERRED = ("A", "B", "tie")


def read_reply(message) -> dict:
    """A Message of the SDK -> {"preferred": "A", "B", "tie" or None, "why": what is wrong with a None, ...}."""
    answer = {"preferred": None, "why": None, "comparison": ""}
    answer |= {"input_tokens": message.usage.input_tokens, "output_tokens": message.usage.output_tokens}
    if message.stop_reason in ("refusal", "max_tokens"):
        return answer | {"why": message.stop_reason}
    text = "".join(block.text for block in message.content if block.type == "text")
    try:
        reply = json.loads(text)
    except json.JSONDecodeError:
        return answer | {"why": "no JSON", "comparison": text}
    if not isinstance(reply, dict) or reply.get("preferred") not in PREFERRED:
        return answer | {"why": "no verdict", "comparison": text}
    return answer | {"preferred": reply["preferred"], "comparison": str(reply.get("comparison", ""))}


class Cache:
    """Answers by key in an append-only file whose first line names the model and the prompt they belong to.

    Raises UserError for a file of another model or prompt, or of something else, and leaves it as it is.
    """

    def __init__(self, path: Path, model: str, prompt_hash: str):
        self.path, self.header = Path(path), {"kind": "judge", "model": model, "prompt_sha256": prompt_hash}
        self.answers: dict[str, dict] = {}
        self.batches: list[dict] = []  # what claude_batch.py noted, in order
        self._lock = Lock()
        if not self.path.exists():
            return
        rows, content = read_jsonl(self.path, having="kind"), self.path.read_bytes()
        if not rows and not json.dumps(self.header).encode().startswith(content):  # not our first line, cut by a kill
            raise UserError(f"judge cache {self.path} is no such file: name another with --judge_cache")
        header = rows[0] if rows else self.header
        for name in self.header:
            if header.get(name) != self.header[name]:
                raise UserError(
                    f"judge cache {self.path} has {name} {header.get(name)!r}, expected {self.header[name]!r}: "
                    "name another file with --judge_cache, or leave the flag out"
                )
        if not content.endswith(b"\n"):  # a kill cut the last line short
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.answers = {row["key"]: row for row in rows if row["kind"] == "answer"}
        self.batches = [row for row in rows if row["kind"] == "batch"]

    def keep(self, key: str, answer: dict) -> None:
        self._append({"kind": "answer", "key": key} | answer)
        self.answers[key] = answer

    def note(self, **batch) -> None:
        self._append({"kind": "batch"} | batch)
        self.batches.append(batch)

    def _append(self, row: dict) -> None:
        with self._lock:
            if not self.path.exists() or not self.path.stat().st_size:  # or a kill came before its first line was whole
                self.path.parent.mkdir(parents=True, exist_ok=True)
                append(self.path, [self.header])
            append(self.path, [row])
