"""A client that replies from a script, and putting it in the place of real ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tracekit.clients.client import ClientConfig, OnReply, Reply, Request
from tracekit.clients.responses import CachedClient
from tracekit.config import ModelConfig

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


def install(
    monkeypatch: pytest.MonkeyPatch, client: FakeClient, *, where: str = "tracekit.clients.by_name"
) -> list[dict[str, Any]]:
    """Make `open_client` of a module give this client behind the cache of replies; what it is called with."""
    calls: list[dict[str, Any]] = []

    def open_client(
        spec: str, *, model: ModelConfig, settings: ClientConfig, cache: Path | None, desc: str
    ) -> CachedClient:
        calls.append({"spec": spec, "model": model, "settings": settings, "cache": cache, "desc": desc})
        return CachedClient(client, cache, settings, desc=desc)

    monkeypatch.setattr(f"{where}.open_client", open_client)
    return calls
