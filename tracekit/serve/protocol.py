"""The protocol: connections as uvicorn's h11 handles them, as many as there may be, none of them silent for ever."""

import asyncio
from functools import partial
from typing import Any

import h11
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tracekit.serve.forms import RequestError
from tracekit.serve.replies import error_body

__all__ = ["make_protocol"]

_HEAD_SECONDS = 10.0
"""How long a connection may take to send the head of a request."""
_REFUSED_SECONDS = 1.0
"""The same of a connection past the limit."""


def make_protocol(max_connections: int) -> "partial[Connection]":
    """What uvicorn makes of every connection."""
    return partial(Connection, max_connections=max_connections)


class Connection(H11Protocol):
    """One connection. Past the limit its requests are answered 503; one that sends no whole head is closed."""

    def __init__(self, *arguments: Any, max_connections: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._max_connections = max_connections
        self._head_seconds = _HEAD_SECONDS
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self.app, self._head_seconds = _too_many, _REFUSED_SECONDS
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or this side, has closed."""
        self._unwatch_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in OpenAI's form."""
        body = msgspec.json.encode(error_body(RequestError(msg, code="invalid_http")))
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_head(self) -> None:
        """Give a head that is not whole its time, from its first byte on; a request that is being answered has none."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_seconds, self._give_up)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and not self.transport.is_closing():
            self.transport.close()


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer to a request on a connection past the limit."""
    error = RequestError("too many connections (--max-connections); try again", status=503, code="too_many_connections")
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(error_body(error))})
