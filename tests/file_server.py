"""A server of files on this machine that cuts, lies, refuses and dawdles, and a small set such as OpenAI publishes."""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nanorlhf.data import download

ROW = {"id": "t3_1", "subreddit": "cats", "title": "My cat", "post": "It hates me. " * 30, "summary": "cat hates me"}
LINES = b"".join(json.dumps(ROW | {"id": f"t3_{n}"}).encode() + b"\n" for n in range(500))


class Server(ThreadingHTTPServer):
    """`files`: path -> content. `faults`: what becomes of the next requests, in turn: a status; ("cut", bytes);
    ("size", bytes): a wrong Content-Length; ("stall", bytes): no more until `go_on`; ("bytes", content): something
    else; None: nothing. `seen`: (path, range) of each request. pause: seconds between pieces of 4 KiB."""

    def __init__(self, files, ranges=True, md5=True, pause=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.md5, self.pause = files, ranges, md5, pause
        self.faults, self.seen, self.go_on = [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that was killed hangs up: no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.seen.append((self.path, asked))
        fault = server.faults.pop(0) if server.faults else None
        content = server.files.get(self.path)
        if isinstance(fault, int) or content is None:
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kind, value = fault or (None, None)
        content = value if kind == "bytes" else content
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(value if kind == "size" else len(body)))
        if server.md5:
            whole = base64.b64encode(hashlib.md5(server.files[self.path]).digest()).decode()
            self.send_header("x-ms-blob-content-md5" if start else "Content-MD5", whole)
        self.end_headers()
        body = body[:value] if kind in ("cut", "size", "stall") else body
        step = 4096 if server.pause else max(len(body), 1)
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            time.sleep(server.pause)
        if kind == "stall":
            self.wfile.flush()
            server.go_on.wait(120)
        self.close_connection = kind in ("cut", "size", "stall")


def small_set(put=setattr) -> dict[str, bytes]:
    """path -> content; the numbers of rows that download.py expects are put in place."""
    put(download, "POSTS", {"train": 3, "valid": 2, "test": 1})
    put(download, "COMPARISONS", {"train": 2 * len(download.BATCHES), "valid": len(download.BATCHES)})
    lines = LINES.splitlines(keepends=True)
    files = {f"/datasets/tldr_3_filtered/{s}.jsonl": b"".join(lines[:n]) for s, n in download.POSTS.items()}
    for batch in download.BATCHES:
        summaries = [{"text": " a", "policy": "ref"}, {"text": " b", "policy": "sup4"}]
        row = {"info": ROW, "summaries": summaries, "choice": 0, "worker": "w", "batch": batch, "extra": {}}
        rows = [row | {"split": split} for split in ("train", "train", "valid1")]
        files[f"/dataset/comparisons/{batch}.json"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return files
