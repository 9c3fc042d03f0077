"""A hub on this machine: the endpoints huggingface_hub asks for a model's files, with faults on request."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(files: dict[str, bytes], model_id: str = "someone/llama", faults: dict[str, list] | None = None):
    """Serve `files` as the model; yields (address, requests seen). faults: path in the model, or "api" -> what becomes
    of its next GETs, in turn: a status, "gated", "damaged" (one byte is another), or a number of bytes after which the
    connection is cut."""
    seen, faults = [], {path: list(todo) for path, todo in (faults or {}).items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status=200, body=b"", headers=(), cut=None, size=None):
            self.send_response(status)
            for name, value in {"Content-Length": size or len(body), **dict(headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

        def refused(self, path) -> bool:
            """Answers for a fault that is a status; leaves a cut to the caller."""
            todo = faults.get(path)
            if not todo or self.command == "HEAD" or not (todo[0] == "gated" or todo[0] in range(400, 600)):
                return False
            fault = todo.pop(0)
            gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            self.answer(403 if fault == "gated" else fault, headers=gated if fault == "gated" else ())
            return True

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            seen.append((self.command, path, self.headers.get("Range")))
            api, resolve = f"/api/models/{model_id}", f"/{model_id}/resolve/{COMMIT}/"
            if path.startswith(api):
                if self.refused("api"):
                    return
                if "/tree/" in path:
                    rows = [{"type": "file", "path": name, "size": len(content), "oid": etag(name, content)}
                            for name, content in files.items()]  # fmt: skip
                    self.answer(body=json.dumps(rows).encode())
                else:
                    siblings = [{"rfilename": name} for name in files]
                    about = {"id": model_id, "modelId": model_id, "sha": COMMIT, "siblings": siblings, "private": False}
                    self.answer(body=json.dumps(about).encode())
            elif path.startswith(resolve) and (name := path.removeprefix(resolve)) in files:
                if self.refused(name):
                    return
                content = files[name]
                todo = faults.get(name) if self.command == "GET" else None
                cut = todo.pop(0) if todo else None
                body = content[:-1] + bytes([content[-1] ^ 1]) if cut == "damaged" else content
                cut = None if cut == "damaged" else cut
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.answer(206 if start else 200, body[start:], headers, cut)
            else:
                self.answer(404, headers={"X-Error-Code": "EntryNotFound" if model_id in path else "RepoNotFound"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(name: str, content: bytes) -> str:
    """As on the hub: SHA-256 of large files, git's hash of small ones."""
    return (hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1)(content).hexdigest()
