"""An OpenAI-compatible server for one test: a thread on the loopback; the test decides every answer.

The last message of a request says what happens to it: `echo ...` is answered with `...`; the other words are in
`_Handler._special`. What was asked is kept in `TestEndpoint.requests`.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["KEY", "TestEndpoint"]

KEY = "sk-fake-0123456789abcdef"
"""The key that the server wants."""


class TestEndpoint:
    """A running server. `refuses` are fields that it answers 400 to, `wants_key` whether it looks at the key."""

    __test__ = False

    def __init__(self, *, refuses: tuple[str, ...] = (), wants_key: bool = True, says: Callable[[str], str] = str):
        self.refuses, self.wants_key, self.says = refuses, wants_key, says
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.seen: Counter[str] = Counter()
        self.num_open = self.max_open = 0
        self.pause_seconds = 0.0
        self.lock = threading.Lock()
        self._released = threading.Event()
        endpoint = self

        class Handler(_Handler):
            def setup(self) -> None:
                self.endpoint = endpoint
                super().setup()

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """What a client has as OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def asked(self) -> list[str]:
        """The last message of every request, in order."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def hang(self) -> None:
        """Wait until the server is closed."""
        self._released.wait(60)

    def close(self) -> None:
        """Stop; requests that hang are let go."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    endpoint: TestEndpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.endpoint.lock:
            self.endpoint.requests.append(body)
            self.endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.endpoint.times.append(time.monotonic())
            self.endpoint.seen[text] += 1
            count = self.endpoint.seen[text]
            self.endpoint.num_open += 1
            self.endpoint.max_open = max(self.endpoint.max_open, self.endpoint.num_open)
        try:
            time.sleep(self.endpoint.pause_seconds)
            self._answer(body, text, count)
        finally:
            with self.endpoint.lock:
                self.endpoint.num_open -= 1

    def _answer(self, body: dict[str, Any], text: str, count: int) -> None:
        given = self.headers.get("Authorization", "")
        if self.endpoint.wants_key and given != f"Bearer {KEY}":
            return self._refuse(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}")
        for name in self.endpoint.refuses:
            if name in body:
                why = "Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return self._refuse(400, f"Unsupported parameter: '{name}' is not supported. {why}", param=name)
        if text == "mute" and "response_format" in body:
            return self._refuse(400, "I cannot do that")
        if text == "echo no model":
            return self._refuse(404, "The model `tiny` does not exist")
        special = self._special(text, count)
        return special() if special is not None else self._complete(self.endpoint.says(text.removeprefix("echo ")))

    def _special(self, text: str, count: int) -> Callable[[], None] | None:
        if text.endswith(" once") and count > 1:
            return None
        return {
            "limited once": lambda: self._refuse(429, "slow down", headers={"Retry-After": "1"}),
            "limited": lambda: self._refuse(429, "You exceeded your current quota"),
            "fails once": lambda: self._refuse(500, "oh"),
            "fails": lambda: self._refuse(500, "oh"),
            "too long": lambda: self._refuse(400, "This model's maximum context length is 8 tokens"),
            "forbidden": lambda: self._refuse(403, f"No access with {KEY}"),
            "hangs": self.endpoint.hang,
            "torn": lambda: self._send_bytes(200, b'{"choices": [{"mess'),
            "page": lambda: self._send_bytes(200, b"<html>hello</html>", kind="text/html"),
            "empty": lambda: self._send(200, {"choices": []}),
            "uncounted": lambda: self._complete("uncounted", usage=False),
            "filtered": lambda: self._complete(None, finish_reason="content_filter"),
            "refused": lambda: self._complete(None, refusal="I will not."),
            "hangs up": self._hang_up,
        }.get(text)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _complete(
        self, text: str | None, *, usage: bool = True, finish_reason: str = "stop", refusal: str | None = None
    ) -> None:
        message = {"role": "assistant", "content": text, "refusal": refusal}
        data: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        }
        if usage:
            data["usage"] = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        self._send(200, data)

    def _refuse(
        self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        error = {"message": message, "type": "error", "param": param, "code": None}
        self._send(status, {"error": error}, headers or {})

    def _send(self, status: int, data: object, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(data).encode(), headers=headers)

    def _send_bytes(
        self, status: int, data: bytes, *, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
