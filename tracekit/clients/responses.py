"""Responses that were paid for once: a client with a cache before it, and a count of what was asked.

    cache.jsonl     {"key", "client", "text", "finish_reason", "num_input_tokens", "num_output_tokens"}

One line a reply, appended as it comes; `key` is the SHA-256 of the client's name and the request. Errors are not kept.
A line torn by kill -9 is cut off before the next one is written; several processes may append to one file.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from tracekit.clients.client import (
    DEFAULT_SETTINGS,
    Client,
    ClientConfig,
    OnReply,
    Reply,
    Request,
    failed_reply,
    ignore_reply,
)
from tracekit.errors import UNREADABLE, ConfigError, NoSpaceError
from tracekit.format.layout import cut_torn_line, is_no_space

__all__ = ["CachedClient", "Usage"]

_BAR_DELAY_SECONDS = 1.0
"""A progress bar appears where asking takes longer."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a client, and what it took. A request is either asked or answered from the cache."""

    num_requests: int = 0
    """Requests that were settled."""
    num_asked: int = 0
    """Those that went to the model."""
    num_cached: int = 0
    """Those that the cache answered, or an equal request beside them."""
    num_failed: int = 0
    """Those that were asked and have no reply."""
    num_input_tokens: int = 0
    """Tokens of the prompts that were asked."""
    num_output_tokens: int = 0
    """Tokens of the replies to them."""

    def summary(self, settings: ClientConfig = DEFAULT_SETTINGS) -> str:
        """One line for people; with a cost where `settings` has prices."""
        failed = f", {self.num_failed} failed" * bool(self.num_failed)
        dollars = (self.num_input_tokens * settings.price_in + self.num_output_tokens * settings.price_out) / 1e6
        cost = f", ${dollars:,.4f}" if settings.price_in or settings.price_out else ""
        return (
            f"asked {self.num_requests:,} ({self.num_cached:,} from the cache{failed}), "
            f"{self.num_input_tokens:,} tokens in, {self.num_output_tokens:,} out{cost}"
        )


class CachedClient:
    """A client whose replies are kept in a file: what is there is not asked again. A context manager.

    `path` None keeps them as long as this object lives; `desc` stands before the progress bar. `usage` counts over the
    life of this object.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self, client: Client, path: Path | None, settings: ClientConfig = DEFAULT_SETTINGS, *, desc: str = "asking"
    ) -> None:
        self._client, self._settings, self._desc = client, settings, desc
        self._file = None if path is None else _File(path)
        self._known: dict[str, Reply] = {}
        self.name = client.name
        self.usage = Usage()

    def __enter__(self) -> "CachedClient":
        return self

    def __exit__(self, *of: object) -> None:
        self.close()

    @property
    def summary(self) -> str:
        """What was asked so far, in a line: `asked 120 (30 from the cache), 41,200 tokens in, 3,100 out`."""
        return self.usage.summary(self._settings)

    def ask(self, requests: Sequence[Request], on_reply: OnReply = ignore_reply) -> list[Reply]:
        """Replies in the order of the requests; those of the cache come first, `is_cached` set.

        Raises:
            ClientError: nothing can be asked; what was answered is in the cache.
            NoSpaceError: the disk is full; likewise.
        """
        if self._file is not None:
            self._known |= {line.key: _reply_of(line) for line in self._file.new_lines() if line.client == self.name}
        places: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            places.setdefault(_key(self.name, request), []).append(index)
        replies: dict[int, Reply] = {}
        with tqdm(total=len(requests), desc=self._desc, unit="request", delay=_BAR_DELAY_SECONDS) as bar:

            def settle(key: str, reply: Reply, *, is_cached: bool) -> None:
                self._count(reply, len(places[key]), is_cached=is_cached)
                for number, index in enumerate(places[key]):
                    replies[index] = msgspec.structs.replace(reply, is_cached=is_cached or number > 0)
                    on_reply(index, replies[index])
                bar.update(len(places[key]))

            asked: list[str] = []
            for key, indices in places.items():
                fault = _fault(requests[indices[0]])
                if key in self._known:
                    settle(key, self._known[key], is_cached=True)
                elif fault is not None:
                    settle(key, failed_reply(fault), is_cached=False)
                else:
                    asked.append(key)

            def take(number: int, reply: Reply) -> None:
                if reply.error is None:
                    self._keep(asked[number], reply)
                settle(asked[number], reply, is_cached=False)

            if asked:
                self._client.ask([requests[places[key][0]] for key in asked], take)
        return [replies[index] for index in range(len(requests))]

    def close(self) -> None:
        """Close the file, and let go of the model or the connections."""
        if self._file is not None:
            self._file.close()
        self._client.close()

    def _keep(self, key: str, reply: Reply) -> None:
        self._known[key] = reply
        if self._file is not None:
            self._file.append(
                _Line(
                    key=key,
                    client=self.name,
                    text=reply.text,
                    finish_reason=reply.finish_reason,
                    num_input_tokens=reply.num_input_tokens,
                    num_output_tokens=reply.num_output_tokens,
                )
            )

    def _count(self, reply: Reply, num_places: int, *, is_cached: bool) -> None:
        before, num_asked = self.usage, int(not is_cached)
        self.usage = Usage(
            num_requests=before.num_requests + num_places,
            num_asked=before.num_asked + num_asked,
            num_cached=before.num_cached + num_places - num_asked,
            num_failed=before.num_failed + (reply.error is not None),
            num_input_tokens=before.num_input_tokens + num_asked * reply.num_input_tokens,
            num_output_tokens=before.num_output_tokens + num_asked * reply.num_output_tokens,
        )


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the file."""

    key: str
    client: str
    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int


class _File:
    """The file of a cache, open for appending."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_read_bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"the cache of replies {str(path)!r} cannot be opened: {error.strerror}; give a file that "
                "can be written"
            ) from error

    def new_lines(self) -> list[_Line]:
        """Lines that came since the last call, by whichever process; a line that is no reply is left out."""
        lines = []
        with self._path.open("rb") as file:
            file.seek(self._num_read_bytes)
            for line in file:
                if not line.endswith(b"\n"):  # torn, or being written
                    break
                self._num_read_bytes += len(line)
                try:
                    lines.append(msgspec.json.decode(line, type=_Line))
                except UNREADABLE:
                    continue
        return lines

    def append(self, line: _Line) -> None:
        """Write one line; on return it survives the end of the process."""
        data = memoryview(msgspec.json.encode(line) + b"\n")
        fcntl.flock(self._number, fcntl.LOCK_EX)
        try:
            cut_torn_line(self._number)  # under the lock nobody writes: a torn line is of a process that was killed
            while data:
                data = data[os.write(self._number, data) :]
        except OSError as error:
            if not is_no_space(error):
                raise
            raise NoSpaceError(
                error.errno,
                f"the disk is full ({self._path}). Every reply before is kept; free some space and run again",
            ) from error
        finally:
            fcntl.flock(self._number, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file; nothing can be appended after that."""
        if self._number >= 0:
            os.close(self._number)
        self._number = -1


def _key(name: str, request: Request) -> str:
    """What tells requests apart: SHA-256 of the client's name and the request as canonical JSON."""
    canonical = json.dumps([name, msgspec.to_builtins(request)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _fault(request: Request) -> str | None:
    """Why a request cannot be asked of any model; None where it can."""
    for message in request.messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            return f"the {message.role} message is no valid Unicode at character {error.start}; mend the source"
    return None


def _reply_of(line: _Line) -> Reply:
    return Reply(
        text=line.text,
        finish_reason=line.finish_reason,
        num_input_tokens=line.num_input_tokens,
        num_output_tokens=line.num_output_tokens,
    )
