"""The journal of what was sent to the Hub: one line a file, appended once the Hub has it.

    <out>/hub/<owner>--<name>.jsonl     {"path", "num_bytes", "sha256", "branch"}

It lies beside the dataset and is not published. With it a shard may be deleted here (`--free-local`) and still counts
as made: its sidecar says what it was, the journal where it went.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tracekit.layout import Layout

__all__ = ["Sent", "is_sent", "read_journal", "sent_shards", "write_journal"]


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """One file that the Hub has."""

    repo: str
    """Repository, `owner/name`."""
    branch: str
    """Branch it was committed to."""
    path: str
    """Path in the dataset."""
    num_bytes: int
    """Size."""
    sha256: str
    """SHA-256."""


class _Made(msgspec.Struct):
    """The one field of a sidecar that is needed here; the records in it are skipped."""

    sha256: str


def write_journal(root: Path, entries: Sequence[Sent]) -> None:
    """Append entries, all of one repository; on return they survive a crash."""
    if not entries:
        return
    path = root / "hub" / f"{entries[0].repo.replace('/', '--')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
    with path.open("ab", buffering=0) as file:
        if file.tell() and not _ends_with_newline(path):  # torn by a crash: the torn line stays a line of its own
            data = b"\n" + data
        file.write(data)
        os.fsync(file.fileno())


def read_journal(root: Path) -> dict[str, list[Sent]]:
    """Everything that was sent from a folder, by path. Lines torn by a crash do not count."""
    entries: dict[str, list[Sent]] = {}
    for path in sorted((root / "hub").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = msgspec.json.decode(line, type=Sent)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            entries.setdefault(entry.path, []).append(entry)
    return entries


def is_sent(journal: dict[str, list[Sent]], path: str, sha256: str) -> Sent | None:
    """The last entry of this file with this content; None where there is none."""
    return next((entry for entry in reversed(journal.get(path, [])) if entry.sha256 == sha256), None)


def sent_shards(layout: Layout) -> set[str]:
    """Names of the shards that the Hub has exactly as their sidecars say."""
    names: set[str] = set()
    for path, entries in read_journal(layout.root).items():
        folder, _, file = path.rpartition("/")
        name = file.removesuffix(".tar")
        if folder != f"data/{layout.config}" or not layout.sidecar(name).exists():
            continue
        made = msgspec.json.decode(layout.sidecar(name).read_bytes(), type=_Made)
        if any(entry.sha256 == made.sha256 for entry in entries):
            names.add(name)
    return names


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
