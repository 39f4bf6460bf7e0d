"""A small OpenAI-shaped HTTP server on loopback, which responds as a test scripts it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(kw_only=True)
class Response:
    """An HTTP response; a string as body is sent as it is."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


def say(text: str | None, *, finish: str = "stop", top: dict[str, float] | None = None) -> Response:
    """A chat completion; `top` are log-probs of the first token's candidates."""
    choice: Body = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    if top is not None:
        candidates = [{"token": token, "logprob": value} for token, value in top.items()]
        choice["logprobs"] = {"content": [{**candidates[0], "top_logprobs": candidates}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    completion = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
    return Response(body={**completion, "choices": [choice], "usage": usage})


def refuse(status: int, message: str, **headers: str) -> Response:
    """An error, as servers say it."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status=status, body={"error": {"message": message}}, headers=headers)


class ChatServer(ThreadingHTTPServer):
    """Calls `respond(body)` for every chat completion, in any thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, respond: Callable[[Body], Response], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.respond = respond
        self.models: Response = Response(body={"object": "list", "data": [{"id": "m"}]})
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.active = 0
        self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("authorization"))
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            self._send(server.respond(body))
        finally:
            with server.lock:
                server.active -= 1

    def do_GET(self) -> None:
        self._send(self.server.models)

    def _send(self, response: Response) -> None:
        time.sleep(response.delay_s)
        raw = response.body if isinstance(response.body, str) else json.dumps(response.body)
        self.send_response(response.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw.encode())))
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(respond: Callable[[Body], Response], port: int = 0) -> Iterator[ChatServer]:
    """Start a server, and stop it at the end."""
    server = ChatServer(respond, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked(body: Body) -> str:
    """The text of a request's question."""
    return str(body["messages"][0]["content"])
