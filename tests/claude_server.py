"""A local HTTP server that speaks as much of the Claude API as the judge uses, and misbehaves on request."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NOW = "2026-11-22T00:00:00Z"
EXPIRED = {"type": "expired"}


def message(text: str, stop_reason: str = "end_turn") -> dict:
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": stop_reason,
        "stop_sequence": None, "content": [{"type": "text", "text": text}],
        "usage": {"input_tokens": 100, "output_tokens": 20},
    }  # fmt: skip


def prefer(letter: str) -> dict:
    return message(json.dumps({"comparison": "because", "preferred": letter}))


class ClaudeServer:
    """`answer(prompt) -> message` decides. `faults` is a list of (status, headers, body) or "hang", taken one by one
    before an answer is given. `asked` and `answered` are the prompts received and answered, `batches` what was sent."""

    def __init__(self, answer):
        self.answer, self.faults, self.asked, self.answered = answer, [], [], []
        self.batches: dict[str, list] = {}
        self.batch_result = lambda i, prompt: {"type": "succeeded", "message": self.answer(prompt)}
        self.deleted, self.archived = set(), set()  # ids of batches without results, by 404 or by a null address
        self.lose_batch_reply = False  # the batch is accepted and the reply never arrives
        self.hold = threading.Event()  # answers wait for it
        self.hold.set()
        self.hold_after = None  # from this many answers on, nothing is answered any more
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that were killed hang up
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _batch(self, batch_id: str, status: str) -> dict:
        counts = dict.fromkeys(("canceled", "errored", "expired", "succeeded"), 0)
        counts["processing"] = 0 if status == "ended" else len(self.batches[batch_id])
        if status == "ended":
            counts["succeeded"] = len(self.batches[batch_id])
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {
            "id": batch_id, "type": "message_batch", "processing_status": status, "request_counts": counts,
            "created_at": created, "expires_at": NOW, "ended_at": None, "archived_at": None,
            "cancel_initiated_at": None,
            "results_url": None if batch_id in self.archived else f"{self.url}/v1/messages/batches/{batch_id}/results",
        }  # fmt: skip

    def _handler(server):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def reply(self, status: int, body: str, headers: dict | None = None) -> None:
                data = body.encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path.endswith("/batches"):
                    batch_id = f"msgbatch_{len(server.batches)}"
                    server.batches[batch_id] = body["requests"]
                    if server.lose_batch_reply:
                        time.sleep(30)
                        return
                    self.reply(200, json.dumps(server._batch(batch_id, "in_progress")))
                    return
                with server._lock:
                    prompt = body["messages"][0]["content"]
                    server.asked.append(prompt)
                    server.last_request = body
                    fault = server.faults.pop(0) if server.faults else None
                    if server.hold_after is not None and len(server.answered) >= server.hold_after:
                        server.hold.clear()
                if fault == "hang":
                    time.sleep(3)
                    return
                if fault:
                    self.reply(fault[0], fault[2], fault[1])
                    return
                server.hold.wait(20)
                with server._lock:
                    server.answered.append(prompt)
                self.reply(200, json.dumps(server.answer(prompt)))

            def do_GET(self):
                if self.path.split("/")[-1] in server.deleted:
                    error = {"type": "not_found_error", "message": "no such batch"}
                    self.reply(404, json.dumps({"type": "error", "error": error}))
                elif self.path.endswith("/results"):
                    requests = server.batches[self.path.split("/")[-2]]
                    lines = [
                        {"custom_id": r["custom_id"],
                         "result": server.batch_result(i, r["params"]["messages"][0]["content"])}
                        for i, r in enumerate(requests)
                    ]  # fmt: skip
                    self.reply(200, "".join(json.dumps(line) + "\n" for line in reversed(lines)))
                elif "/batches/" in self.path:
                    self.reply(200, json.dumps(server._batch(self.path.split("/")[-1], "ended")))
                else:
                    every = [server._batch(batch_id, "ended") for batch_id in reversed(server.batches)]
                    self.reply(200, json.dumps({"data": every, "has_more": False, "first_id": None, "last_id": None}))

        return Handler
