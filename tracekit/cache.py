"""The folder in which tracekit keeps what it can make or fetch again: `$TRACEKIT_CACHE`, or the user's own cache.

    <cache>/models/                     converted demo models
    <cache>/ranges/<sha256>/<start>-<stop>    bytes of published shards, named by the shard's SHA-256

Ranges are named by content, so versions and repositories that share a shard share them. A range is synced before it
takes its name. Its reader checks its bytes, and drops a damaged range. Whenever a tenth of the limit was written, the
least recently used ones beyond the limit are let go.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

from tracekit.errors import ConfigError
from tracekit.format.layout import PARTIAL_SUFFIX

__all__ = ["RangeCache", "cache_folder"]

MAX_RANGE_BYTES = 20 * 10**9
"""Bytes of shards that are kept; `TRACEKIT_CACHE_BYTES` says otherwise."""

MAX_MEMORY_BYTES = 256 * 1024 * 1024
"""Bytes that a process keeps in memory where the cache cannot be written."""


def cache_folder(kind: str) -> Path:
    """Folder of one kind of cached things."""
    root = os.environ.get("TRACEKIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "tracekit" / kind


class RangeCache:
    """Byte ranges of files that are named by their SHA-256."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder("ranges")
        self._memory: dict[tuple[str, int], bytes] = {}
        self._known: dict[str, list[tuple[int, int]]] = {}
        limit = os.environ.get("TRACEKIT_CACHE_BYTES") or str(MAX_RANGE_BYTES)
        if not limit.isdecimal():
            raise ConfigError(f"TRACEKIT_CACHE_BYTES is {limit!r}, expected a number of bytes, as 20000000000")
        self._limit = int(limit)
        self._num_unchecked = self._limit  # what other processes left is looked at first

    def read(self, sha256: str, start: int, stop: int) -> bytes | None:
        """Bytes `[start, stop)`, from any range that holds them; None where none does."""
        for (name, first), data in list(self._memory.items()):
            if name == sha256 and first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        for first, last in self._ranges(sha256):
            if first <= start and stop <= last:
                path = self._path(sha256, first, last)
                try:
                    with path.open("rb") as file:
                        file.seek(start - first)
                        data = file.read(stop - start)
                except OSError:  # another process has let it go
                    continue
                if len(data) == stop - start:
                    with suppress(OSError):  # a cache that may only be read is used all the same
                        os.utime(path)
                    return data
        return None

    def has(self, sha256: str, start: int, stop: int) -> bool:
        """Whether some range holds these bytes."""
        kept = [(first, first + len(data)) for (name, first), data in list(self._memory.items()) if name == sha256]
        return any(first <= start and stop <= last for first, last in [*self._ranges(sha256), *kept])

    def write(self, sha256: str, start: int, data: bytes) -> None:
        """Keep bytes; a full disk is no error here, the bytes are just not kept."""
        self._num_unchecked += len(data)
        if self._num_unchecked > self._limit // 10:
            self._num_unchecked = 0
            self._trim(len(data))
        path = self._path(sha256, start, start + len(data))
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            self._remember(sha256, start, data)
            return
        self._ranges(sha256).append((start, start + len(data)))

    def drop(self, sha256: str, start: int, stop: int) -> None:
        """Forget every range that holds bytes `[start, stop)`: they were found to be damaged."""
        for name, first in list(self._memory):
            if name == sha256 and first <= start and stop <= first + len(self._memory[name, first]):
                self._memory.pop((name, first), None)
        for first, last in list(self._ranges(sha256)):
            if first <= start and stop <= last:
                with suppress(OSError):  # gone already, or a folder that may only be read
                    self._path(sha256, first, last).unlink()
                with suppress(ValueError):  # by another thread
                    self._ranges(sha256).remove((first, last))

    def _remember(self, sha256: str, start: int, data: bytes) -> None:
        """Keep a little in memory where the disk takes nothing, so that what was fetched ahead is not fetched again."""
        self._memory[sha256, start] = data
        while sum(len(kept) for kept in self._memory.values()) > MAX_MEMORY_BYTES:
            self._memory.pop(next(iter(self._memory)))

    def _path(self, sha256: str, start: int, stop: int) -> Path:
        return self._folder / sha256 / f"{start}-{stop}"

    def _ranges(self, sha256: str) -> list[tuple[int, int]]:
        """Ranges of one file; listed once, then kept up to date by `write`."""
        found = self._known.get(sha256)
        if found is None:
            found = []
            folder = self._folder / sha256
            for path in _files_in(folder):
                start, dash, stop = path.name.partition("-")
                if dash and start.isdigit() and stop.isdigit() and _size_of(path) == int(stop) - int(start):
                    found.append((int(start), int(stop)))
            self._known[sha256] = found
        return found

    def _trim(self, num_new: int) -> None:
        """Let go of the least recently used ranges beyond the limit, bytes about to be written included."""
        found: list[tuple[float, int, Path]] = []
        for path in self._folder.glob("*/*"):
            try:
                stat = path.stat()
            except OSError:  # another process has let it go
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in found) + num_new
        for _, size, path in sorted(found):
            if total <= self._limit:
                break
            with suppress(OSError):  # gone already, or a folder that may only be read
                path.unlink()
            self._known.pop(path.parent.name, None)
            total -= size


def _files_in(folder: Path) -> list[Path]:
    """Files of a folder; none where it is not there or may not be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _size_of(path: Path) -> int | None:
    """Size of a file; None where another process has let it go."""
    try:
        return path.stat().st_size
    except OSError:
        return None
