"""One HTTP request to the test Hub: bodies in and out, counted; faults; the log. It knows routes only by name."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hubserver_state import Hub, HubError, Repo, Request

__all__ = ["CutError", "RequestHandler", "Route", "route"]

BLOCK = 1 << 16


class CutError(ConnectionError):
    """The connection is to end here."""


class Route:
    """Methods, an address pattern and the name of the handler's function; groups of the pattern are its arguments."""

    def __init__(self, methods: str, pattern: str, name: str) -> None:
        self.methods, self.pattern, self.name = methods.split(), re.compile(pattern), name


def route(methods: str, pattern: str, name: str) -> Route:
    """A row of the route table; `{repo}`, `{rev}` and `{hash}` stand for what addresses have there."""
    parts = {"{repo}": r"(?P<repo_id>[^/]+/[^/]+)", "{rev}": r"(?P<rev>[^/]+)", "{hash}": r"(?P<name>[0-9a-f]{64})"}
    for short, long in parts.items():
        pattern = pattern.replace(short, long)
    return Route(methods, pattern, name)


class RequestHandler(BaseHTTPRequestHandler):
    """Reads requests, answers them by the table `routes` and writes the log."""

    protocol_version = "HTTP/1.1"
    # headers and body go out as two writes: without this the second waits for an acknowledgement, 40 ms a request
    disable_nagle_algorithm = True
    hub: ClassVar[Hub]
    routes: ClassVar[list[Route]] = []

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the log is for tests."""

    @property
    def base(self) -> str:
        """The server as this client addresses it."""
        return f"http://{self.headers.get('Host')}"

    # request body

    def read_body(self, sink: Callable[[bytes], object]) -> None:
        """Stream the request's body into `sink`, up to where a fault cuts it."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            blocks = self.chunked_blocks()
        else:
            blocks = self.sized_blocks(int(self.headers.get("Content-Length") or 0))
        for block in blocks:
            self.received += len(block)
            sink(block)
            if self.cut_request is not None and self.received >= self.cut_request:
                raise CutError
        self.has_read_body = True

    def chunked_blocks(self) -> Iterator[bytes]:
        """A body in chunks."""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def sized_blocks(self, left: int) -> Iterator[bytes]:
        """A body of known size."""
        while left:
            block = self.rfile.read(min(left, BLOCK))
            if not block:
                raise CutError
            left -= len(block)
            yield block

    def body(self) -> bytes:
        """The whole body."""
        data = bytearray()
        self.read_body(data.extend)
        return bytes(data)

    def json_body(self) -> dict[str, Any]:
        """The body as JSON."""
        return json.loads(self.body() or b"{}")

    # response

    def respond(self, status: int, headers: Mapping[str, str], size: int, blocks: Iterable[bytes]) -> None:
        """Write a response whose body has `size` bytes, up to where a fault cuts it."""
        if self.lose_response:
            self.status = "lost"
            raise CutError
        self.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        if not self.has_read_body:
            # the unread body would be taken for the next request
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        for block in blocks:
            kept = block if self.cut_response is None else block[: self.cut_response - self.sent]
            self.wfile.write(kept)
            self.sent += len(kept)
            if self.sent == self.cut_response:
                raise CutError

    def send(self, status: int, answer: Any = None, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON, or with no body."""
        data = b"" if answer is None else json.dumps(answer).encode()
        self.respond(status, {"Content-Type": "application/json", **(headers or {})}, len(data), [data])

    def send_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """Answer with a file, or with the range of it that was asked for."""
        size, status, extra = path.stat().st_size, 200, {}
        first, last = 0, size - 1
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted and (wanted[1] or wanted[2]):
            if wanted[1]:
                first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            else:
                first = max(0, size - int(wanted[2]))
            if first > last:
                return self.send(416, None, {"Content-Range": f"bytes */{size}"})
            status, extra = 206, {"Content-Range": f"bytes {first}-{last}/{size}"}
        fixed = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        self.respond(status, {**headers, **extra, **fixed}, last - first + 1, file_blocks(path, first, last + 1))

    def hang_up(self) -> None:
        """End the connection without another byte."""
        self.close_connection = True
        if self.status != "lost":
            self.status = "drop"
        # the client may have been first
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # one request from end to end

    def handle_any(self) -> None:
        """Answer one request and log it."""
        started = time.monotonic()
        self.has_read_body = not (self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"))
        self.received = self.sent = 0
        self.status: int | str = "error"
        self.lose_response = False
        self.cut_request: int | None = None
        self.cut_response: int | None = None
        url = urlsplit(self.path)
        self.address, self.query = url.path, {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.hub.idle:
            self.hub.in_flight += 1
        try:
            self.hub.call_watches(self.command, self.path)
            if not self.meet_fault():
                self.dispatch()
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self.try_send_error(error, {"X-Error-Message": error.message, **code})
        except ConnectionError:
            self.hang_up()
        finally:
            has_token = bool(self.headers.get("Authorization"))
            numbers = self.status, self.received, self.sent, self.headers.get("Range"), has_token
            with self.hub.idle:
                seconds = time.monotonic() - started
                self.hub.log.append(Request(self.command, self.path, *numbers, seconds, started))
                self.hub.in_flight -= 1
                self.hub.idle.notify_all()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def try_send_error(self, error: HubError, headers: Mapping[str, str]) -> None:
        """Answer with an error, unless a fault or the client ends the connection first."""
        try:
            self.send(error.status, {"error": error.message}, headers)
        except ConnectionError:
            self.hang_up()

    def meet_fault(self) -> bool:
        """Let the next fault take effect; True if the request ends with it."""
        fault = self.hub.next_fault(self.command, self.path)
        if fault is None:
            return False
        if fault.action == "drop":
            if fault.after is None:
                raise CutError
            if fault.where == "request":
                self.cut_request = fault.after
            else:
                self.cut_response = fault.after
        elif fault.action == "status":
            self.send(fault.status, {"error": "injected"}, fault.headers)
            return True
        elif fault.action == "lose_response":
            self.lose_response = True
        else:
            time.sleep(fault.seconds)
        return False

    def dispatch(self) -> None:
        """Call the function of the first route that fits."""
        for row in self.routes:
            match = row.pattern.fullmatch(self.address)
            if match and self.command in row.methods:
                arguments = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                return getattr(self, row.name)(**arguments)
        self.hub.unrouted.append(f"{self.command} {self.path}")
        self.missing()
        return None

    def sink(self) -> None:
        """Take anything."""
        self.body()
        self.send(200, {})

    def missing(self) -> None:
        """There is nothing at this address."""
        if not self.has_read_body:
            self.body()
        self.send(404, {"error": "not found"})

    # who is asking

    def user(self) -> str | None:
        """The user of the token, None without a token; a wrong token is refused."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer":
            return None
        if token not in self.hub.tokens:
            raise HubError(401, None, "Invalid username or password.")
        return self.hub.tokens[token]

    def known_user(self) -> str:
        """The user of the token, which must be there."""
        user = self.user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        return user

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        """A repository that this user may read, or write."""
        user, repo = self.user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user is None):
            raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and self.known_user() and repo_id.split("/")[0] not in (user, "org"):
            raise HubError(403, None, "You don't have the rights to create a commit on this repo")
        return repo


def file_blocks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes `start` to `stop` of a file."""
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(BLOCK, stop - start))):
            start += len(block)
            yield block
