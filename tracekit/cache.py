"""The folder in which tracekit keeps what it can make or fetch again: `$TRACEKIT_CACHE`, or the user's own cache.

    <cache>/models/                     converted demo models
    <cache>/ranges/<sha256>/<start>-<stop>    bytes of published shards, named by the shard's SHA-256

Ranges are named by content, so versions and repositories that share a shard share them. A range is there whole or not
at all. Whenever a tenth of the limit was written, the least recently used ones beyond the limit are let go.
"""

import os
from pathlib import Path

from tracekit.layout import PARTIAL_SUFFIX

__all__ = ["RangeCache", "cache_folder"]

MAX_RANGE_BYTES = 20 * 10**9
"""Bytes of shards that are kept; `TRACEKIT_CACHE_BYTES` says otherwise."""


def cache_folder(kind: str) -> Path:
    """Folder of one kind of cached things."""
    root = os.environ.get("TRACEKIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "tracekit" / kind


class RangeCache:
    """Byte ranges of files that are named by their SHA-256."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder("ranges")
        self._known: dict[str, list[tuple[int, int]]] = {}
        self._limit = int(os.environ.get("TRACEKIT_CACHE_BYTES") or MAX_RANGE_BYTES)
        self._num_unchecked = self._limit  # what other processes left is looked at first

    def read(self, sha256: str, start: int, stop: int) -> bytes | None:
        """Bytes `[start, stop)`, from any range that holds them; None where none does."""
        for first, last in self._ranges(sha256):
            if first <= start and stop <= last:
                path = self._path(sha256, first, last)
                try:
                    with path.open("rb") as file:
                        file.seek(start - first)
                        data = file.read(stop - start)
                    os.utime(path)
                except OSError:  # another process has let it go
                    continue
                if len(data) == stop - start:
                    return data
        return None

    def has(self, sha256: str, start: int, stop: int) -> bool:
        """Whether some range holds these bytes."""
        return any(first <= start and stop <= last for first, last in self._ranges(sha256))

    def write(self, sha256: str, start: int, data: bytes) -> None:
        """Keep bytes; a full disk is no error here, the bytes are just not kept."""
        self._num_unchecked += len(data)
        if self._num_unchecked > self._limit // 10:
            self._num_unchecked = 0
            self._trim(len(data))
        path = self._path(sha256, start, start + len(data))
        temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            return
        self._ranges(sha256).append((start, start + len(data)))

    def _path(self, sha256: str, start: int, stop: int) -> Path:
        return self._folder / sha256 / f"{start}-{stop}"

    def _ranges(self, sha256: str) -> list[tuple[int, int]]:
        """Ranges of one file; listed once, then kept up to date by `write`."""
        if sha256 not in self._known:
            found: list[tuple[int, int]] = []
            folder = self._folder / sha256
            for path in folder.iterdir() if folder.is_dir() else ():
                start, dash, stop = path.name.partition("-")
                if dash and start.isdigit() and stop.isdigit() and path.stat().st_size == int(stop) - int(start):
                    found.append((int(start), int(stop)))
            self._known[sha256] = found
        return self._known[sha256]

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
            path.unlink(missing_ok=True)
            self._known.pop(path.parent.name, None)
            total -= size
