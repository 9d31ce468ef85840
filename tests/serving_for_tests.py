"""Servers for tests: in a thread of this process, or as a process of their own."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.processes_for_tests import start
from tracekit.config import CaptureConfig, ModelConfig, PromptConfig
from tracekit.format.manifest import Verification
from tracekit.serve.growing import GrowingDataset
from tracekit.serve.server import LoggingServer
from tracekit.serve.settings import ServerSettings
from tracekit.task import TracedSample

ROOT = Path(__file__).parent.parent


def new_server(out: Path, model: Path, /, **settings: Any) -> LoggingServer:
    """A server of a checkpoint, at a free port, not entered yet."""
    return LoggingServer(
        out,
        model=ModelConfig(model=str(model), device="cpu"),
        capture=CaptureConfig(sites=("hidden_states",), num_replays=1),
        prompt=PromptConfig(),
        settings=ServerSettings(**{"port": 0} | settings),
    )


@contextmanager
def serving(out: Path, model: Path, /, **settings: Any) -> Iterator[LoggingServer]:
    """A server at work in a thread; leaving stops it in peace."""
    with new_server(out, model, **settings) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def hold_writing(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Make samples wait before they are written: until the first event is set; the second says that one waits."""
    opened, writing = threading.Event(), threading.Event()
    original = GrowingDataset.add

    def slow(self: GrowingDataset, samples: Sequence[TracedSample], verification: Verification | None) -> None:
        writing.set()
        opened.wait(60)
        original(self, samples, verification)

    monkeypatch.setattr(GrowingDataset, "add", slow)
    return opened, writing


def client_of(url: str, api_key: str = "none") -> openai.OpenAI:
    """The official client; it gives up at once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=120)


def post(url: str, body: Any, path: str = "chat/completions", **further: Any) -> httpx.Response:
    """A request by hand; `body` is bytes, or JSON."""
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"Content-Type": "application/json"} | further.pop("headers", {})
    return httpx.post(f"{url}/v1/{path}", **content, headers=headers, timeout=120, **further)


def ask(url: str, text: str = "Why?", **further: Any) -> httpx.Response:
    """A short chat request by hand."""
    headers = further.pop("headers", {})
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0} | further
    return post(url, body, headers=headers)


class ServerProcess:
    """`tracekit serve` as a process of its own."""

    def __init__(self, out: Path, model: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        command = ["-m", "tracekit.cli", "serve", "--model", model, "--out", out, "--port", "0", "--device", "cpu"]
        said = (out.parent / f"{out.name}.stderr").open("ab")
        self.process = start(*command, *flags, env=environment, stderr=said)
        assert self.process.stdout is not None
        self.said = ""
        while not re.search(r"try +curl", self.said):
            line = self.process.stdout.readline()
            assert line, (out.parent / f"{out.name}.stderr").read_text()
            self.said += line
        self.url = re.findall(r"address +(\S+)/v1\n", self.said)[0]

    def end(self, signal_number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=60)
