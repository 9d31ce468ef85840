"""What is said to the person at the terminal: on stderr, above whatever progress bar is there, and in a run's log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from tracekit.ranks import this_rank

__all__ = ["heard", "logged", "note", "now", "out", "printable", "printable_json", "say"]

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters, C0 and C1 with DEL, and what is shown of them."""
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that make a terminal show a text in another order."""
_WITHOUT_BYTES = range(0xD800, 0xE000)
"""Halves of characters, as in the name of a file that is not UTF-8: they cannot be written."""
_IN_JSON = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *_REORDERING, *_WITHOUT_BYTES)}
_SHOWN = {**_IN_JSON, **_CONTROLS}

_MAX_WAITING = 1000
"""Lines that a log keeps while its file cannot be written."""

_logs: list["_Log"] = []
_listeners: list[list[str]] = []


class _Log:
    """A log file; what is said while it cannot be written waits."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._waiting: list[str] = []

    def open(self, path: Path) -> None:
        """From here on lines go to this file, UTF-8, at its end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._write()

    def add(self, text: str) -> None:
        """Take in what was said."""
        self._waiting.append(f"{now()} {text}\n")
        self._write()

    def _write(self) -> None:
        """Write what waits. Where the disk is full or the folder is gone it waits on: the terminal has shown it."""
        if self._path is None:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write("".join(self._waiting).encode())
        except OSError:
            del self._waiting[:-_MAX_WAITING]
        else:
            self._waiting = []


def printable(text: str) -> str:
    """A text as it may go to a terminal: control characters but line feeds and tabs as `\\x1b`, so that none works."""
    return text.translate(_SHOWN)


def printable_json(text: str) -> str:
    """JSON as it may go to a terminal: the same JSON, with control characters as `\\u009b`."""
    return text.translate(_IN_JSON)


def out(text: str = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print, on stdout unless another file is given; names in it may come from a stranger's data."""
    print(printable(text), file=file, flush=flush)


def now() -> str:
    """The time for a log: ISO 8601, local with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def say(text: str) -> None:
    """Say one line, to the log too."""
    text = printable(text)
    rank = this_rank()
    who = f"tracekit[{rank.number}]" if rank.world_size > 1 else "tracekit"
    for listener in _listeners:
        listener.append(text)
    tqdm.write(f"{who}: {text}", file=sys.stderr)
    note(text)


def note(text: str) -> None:
    """Write one line to the log alone."""
    for log in _logs:
        log.add(text)


@contextmanager
def logged() -> Iterator[Callable[[Path], None]]:
    """While open, what is said is kept, and written to a file once one is named."""
    log = _Log()
    _logs.append(log)
    try:
        yield log.open
    finally:
        _logs.remove(log)


@contextmanager
def heard() -> Iterator[list[str]]:
    """While open, what is said is added to a list too, for whoever has another terminal."""
    listener: list[str] = []
    _listeners.append(listener)
    try:
        yield listener
    finally:
        _listeners.remove(listener)
