"""Kills in what is fetched and in what is paid for, from servers on this machine.

    download     of posts and comparisons: the end is byte for byte what was served; a file that is whole is not asked
                 for again, and of one that is not only what is missing
    judge        questions to Claude: nothing is asked twice whose answer was stored

A kill comes at a random moment, or before a file operation; then the same command is started again, until it is
through.
"""

import json
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import anthropic  # noqa: F401  before the fork: a child would import it again each time
from claude_server import ClaudeServer, prefer
from file_server import Server, small_set

from faults.process import Process, send, watch
from nanorlhf.data import download
from nanorlhf.data.tldr import Post
from nanorlhf.evaluation.claude import ClaudeJudge
from nanorlhf.evaluation.judge import Pair
from nanorlhf.storage.jsonl import read_jsonl


class Fetch:
    """Trials of one command. A subclass has `name`, `work` (what the process does), `result` (what must be the same
    in the end), `before` (what is stored at a start) and `check` (what was asked for since, given that)."""

    def __init__(self, seed: int):
        self.random, self.counts, self.failures = random.Random(f"{self.name} {seed}"), Counter(), []
        self.folder = Path(self.name)
        self.begin()
        began = time.monotonic()
        process = Process(self.work, counter=f"{self.name}.operations")
        assert process.wait() == 0, process.said
        self.seconds = time.monotonic() - began
        self.operations = int(Path(f"{self.name}.operations").read_text(encoding="utf-8"))
        self.expected = self.result()

    def kills(self, number: int) -> None:
        while (left := number - self.counts[f"{self.name}_kills"]) > 0:
            self.trial(min(left, self.random.randint(1, 4)))

    def trial(self, most: int) -> None:
        """The command is started, and killed up to so many times in a row, until it is through."""
        shutil.rmtree(self.folder)
        kills, status = [], 137
        while status == 137:
            stored = self.before()
            if len(kills) == most:
                what, process = "", Process(self.work)
                status = process.wait()
            elif self.random.random() < 0.5:
                n = self.random.randint(1, self.operations)
                what, process = f"before operation {n}", Process(self.work, kill_before=n)
                status = process.wait()
            else:
                moment = self.random.uniform(0, self.seconds)
                what, process = f"after {moment:.3f} s", Process(self.work)
                watch(moment, lambda: None)
                status = send(process, signal.SIGKILL)
            kills += [what] * (status == 137)
            if wrong := self.check(stored):
                self.failures.append(f"{self.name}, kills {kills}: {wrong}")
        survived = status == 0 and self.result() == self.expected
        if not survived:
            self.failures.append(f"{self.name}, kills {kills}: exit status {status}: {process.said[-600:]}")
        self.counts[f"{self.name}_kills"] += len(kills)
        self.counts[f"{self.name}_trials"] += bool(kills)  # without one it was through before
        self.counts[f"{self.name}_survived"] += survived and bool(kills)


class Download(Fetch):
    name = "download"

    def begin(self) -> None:
        self.server = Server(small_set(), pause=0.002)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        download.PIECE = 1024  # so that a file of a few kilobytes is cut in the middle, too
        download._pause = lambda failures: 0.01

    def work(self) -> None:
        download.main(["--data", str(self.folder), "--source", self.server.url])

    def result(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def before(self) -> dict[str, int | None]:
        """Name in the folder -> bytes that are there of a file that is not whole, None of a whole one."""
        self.server.seen.clear()
        found = {}
        for path in self.folder.rglob("*.json*"):
            whole = path.suffix != ".partial"
            found[path.name.removesuffix(".partial")] = None if whole else path.stat().st_size
        return found

    def check(self, stored: dict[str, int | None]) -> str | None:
        for path, asked in self.server.seen:
            name = path.split("/")[-1]
            size = stored.get(name, 0)
            if size is None:
                return f"{name} was whole and is asked for again"
            if size and asked != f"bytes={size}-":
                return f"{name} had {size} bytes and is asked for from {asked}"
            self.counts["download_resumed_in_a_file"] += bool(size)
        return None


class Questions(Fetch):
    name = "judge"

    def begin(self) -> None:
        posts = [Post(f"p{i}", "r", f"title {i}", f"post {i}", "s") for i in range(20)]
        self.pairs = [Pair(post, f"one {post.id}", f"the other {post.id}" * (i % 3)) for i, post in enumerate(posts)]
        self.server = ClaudeServer(self.answer)
        self.asked: list[str] = []
        judge = self.judge()
        questions = [question for pair in self.pairs for question in judge._questions(pair)]
        self.text = {q.key(judge.model, judge.prompt_hash): q.text(judge.prompt) for q in questions}

    def answer(self, prompt: str) -> dict:
        """The longer one, after a moment."""
        self.asked.append(prompt)
        threading.Event().wait(0.02)
        a, b = (re.search(f"<summary_{seat}>\n(.*?)\n</summary_{seat}>", prompt, re.S)[1] for seat in "ab")
        return prefer("A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie")

    def judge(self) -> ClaudeJudge:
        client = {"base_url": self.server.url, "api_key": "none", "timeout": 20.0, "max_retries": 0}
        return ClaudeJudge(cache_file=self.folder / "cache.jsonl", yes=True, client_options=client)

    def work(self) -> None:
        verdicts = [judgement.verdict for judgement in self.judge().compare(self.pairs)]
        (self.folder / "verdicts.json").write_text(json.dumps(verdicts), encoding="utf-8")

    def result(self) -> tuple[str, dict[str, str]]:
        answers = read_jsonl(self.folder / "cache.jsonl", having="kind")[1:]
        return (self.folder / "verdicts.json").read_text(encoding="utf-8"), {
            row["key"]: row["preferred"] for row in answers
        }

    def before(self) -> set[str]:
        """The questions whose answers are stored."""
        self.asked.clear()
        cache = self.folder / "cache.jsonl"
        lines = cache.read_bytes().split(b"\n")[:-1] if cache.exists() else []
        return {self.text[row["key"]] for row in map(json.loads, lines) if row["kind"] == "answer"}

    def check(self, stored: set[str]) -> str | None:
        again = stored.intersection(self.asked)
        return f"{len(again)} questions were asked again, {sorted(again)[0]!r} for one" if again else None
