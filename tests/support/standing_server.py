"""A server that answers what an SGLang server says of itself, and whether it knows a token; it generates nothing.

What of this the real one does, tests/rollout/test_remote.py and tests/test_ablations.py see to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Standing:
    """What it says; may be changed while it runs."""

    url: str = ""
    model: str = "models/qwen"
    weights: str = "default"
    tokenizer: str = ""
    vocabulary: int = 49152

    def answer(self, path: str, body: dict) -> tuple[int, object]:
        """Status and content."""
        if path == "/generate":
            known = body["token_ids_logprob"][0] < self.vocabulary
            return (200, {}) if known else (400, {"error": "token id beyond the vocabulary"})
        model = {"model_path": self.model, "model_type": "qwen3", "is_generation": True}
        return 200, {
            "/server_info": {"tp_size": 1, "device": "cpu"},
            "/model_info": {**model, "weight_version": self.weights, "tokenizer_path": self.tokenizer},
            "/v1/models": {"data": [{"max_model_len": 4096}]},
        }[path]


@contextmanager
def standing() -> Iterator[Standing]:
    """One that runs until the block is left."""
    says = Standing()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, content = says.answer(self.path, json.loads(self.rfile.read(length) or "{}"))
            payload = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    says.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield says
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
