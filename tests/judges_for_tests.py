"""A client that replies from a script, and putting it in the place of real ones."""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tracekit.clients.client import OnReply, Reply, Request

__all__ = ["FakeClient", "install", "reply"]


def reply(text: str, *, error: str | None = None) -> Reply:
    return Reply(text=text, finish_reason="stop", num_input_tokens=1, num_output_tokens=1, error=error)


class FakeClient:
    """Replies by a function of the request; remembers every request."""

    def __init__(self, say: Callable[[Request], str | Reply], name: str = "org/judge@local") -> None:
        self.name, self._say = name, say
        self.asked: list[Request] = []
        self.is_closed = False

    def ask(self, requests: Sequence[Request], on_reply: OnReply = lambda place, one: None) -> list[Reply]:
        replies = []
        for place, request in enumerate(requests):
            self.asked.append(request)
            said = self._say(request)
            replies.append(said if isinstance(said, Reply) else reply(said))
            on_reply(place, replies[-1])
        return replies

    def close(self) -> None:
        self.is_closed = True


def install(monkeypatch: pytest.MonkeyPatch, client: FakeClient) -> list[dict[str, Any]]:
    """Make `open_client` give this client; what it is called with."""
    calls: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def open_client(spec: str, *, model: Any, settings: Any, cache: Path | None, desc: str) -> Iterator[FakeClient]:
        calls.append({"spec": spec, "model": model, "settings": settings, "cache": cache, "desc": desc})
        yield client

    module = types.ModuleType("tracekit.clients.opening")
    module.__dict__["open_client"] = open_client
    monkeypatch.setitem(sys.modules, "tracekit.clients.opening", module)
    return calls
