"""The journal of what was sent to the Hub: one line a file, appended once the Hub has it.

    <out>/hub/<owner>--<name>.jsonl     {"path", "num_bytes", "sha256", "branch"}

It lies beside the dataset and is not published. With it a shard may be deleted here (`--free-local`) and still counts
as made: its sidecar says what it was, the journal where it went.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tracekit.errors import UNREADABLE, DatasetError
from tracekit.format.layout import Layout, files_inside, inside, read_whole

__all__ = ["Sent", "can_write_journal", "is_last", "is_sent", "read_journal", "sent_shards", "write_journal"]


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

    @property
    def version(self) -> str:
        """The version it was staged for; where it is once that is released."""
        return self.branch.removeprefix("staging/")


class _SidecarHash(msgspec.Struct):
    """The one field of a sidecar that is needed here; the records in it are skipped."""

    sha256: str


def write_journal(root: Path, entries: Sequence[Sent]) -> None:
    """Append entries, all of one repository; on return they survive a crash."""
    if not entries:
        return
    path = inside(root, f"hub/{entries[0].repo.replace('/', '--')}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
    with path.open("ab", buffering=0) as file:
        if file.tell() and not _ends_with_newline(path):  # torn by a crash: the torn line stays a line of its own
            data = b"\n" + data
        file.write(data)
        os.fsync(file.fileno())


def can_write_journal(root: Path) -> bool:
    """Whether a journal can be kept in a folder; a dataset may lie where nothing can be written."""
    try:
        probe = inside(root, "hub/writable.partial")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def read_journal(root: Path) -> dict[str, list[Sent]]:
    """Everything that was sent from a folder, by path. Lines torn by a crash do not count."""
    entries: dict[str, list[Sent]] = {}
    for path in files_inside(root, "hub", "*.jsonl"):
        for line in read_whole(path).splitlines():
            try:
                entry = msgspec.json.decode(line, type=Sent)
            except UNREADABLE:
                continue
            entries.setdefault(entry.path, []).append(entry)
    return entries


def is_sent(
    journal: dict[str, list[Sent]], path: str, sha256: str, *, repo: str | None = None, branch: str | None = None
) -> Sent | None:
    """The last entry of this file with this content, in this repository and branch if named; None where none is."""
    for entry in reversed(journal.get(path, [])):
        if entry.sha256 == sha256 and repo in (None, entry.repo) and branch in (None, entry.branch):
            return entry
    return None


def is_last(journal: dict[str, list[Sent]], path: str, sha256: str, repo: str) -> bool:
    """Whether the last entry of this path in a repository has this content."""
    entries = [entry for entry in journal.get(path, []) if entry.repo == repo]
    return bool(entries) and entries[-1].sha256 == sha256


def sent_shards(layout: Layout) -> set[str]:
    """Names of the shards that are not here because the Hub has them, exactly as their sidecars say."""
    names: set[str] = set()
    for path, entries in read_journal(layout.root).items():
        folder, _, file = path.rpartition("/")
        name = file.removesuffix(".tar")
        is_elsewhere = folder == f"data/{layout.config}" and not layout.shard(name).exists()
        if not is_elsewhere or not layout.sidecar(name).exists():
            continue
        path = layout.sidecar(name)
        try:
            made = msgspec.json.decode(read_whole(path), type=_SidecarHash)
        except UNREADABLE as error:
            raise DatasetError(f"{path} is not a tracekit sidecar: {error}") from error
        if any(entry.sha256 == made.sha256 for entry in entries):
            names.add(name)
    return names


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
