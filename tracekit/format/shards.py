"""Shards: reproducible, crash-safe tar files of samples.

    <key>.json          | tar header | record             | zeros to 512 |
    <key>.safetensors   | tar header | safetensors payload| zeros to 512 |
    ... and two zero blocks at the end

Headers carry no time, no user and one mode, so equal samples give equal bytes. While a shard grows it lies beside its
journal, both named `*.partial`:

    journal     {"batch": 3, "size": 2, "asked": 4}        from batch 3 on, 2 examples run at once (memory ran out)
                {"batch": 3, "end": 81920}                 batch 3 is in the tar, synced, up to this byte

A batch is appended, synced, and then noted. A process that dies leaves at most an unnoted tail; the next one cuts it
off and goes on, and the bytes come out the same. The finished tar is renamed; its sidecar,
written last, means "done". The sidecar also holds the checksums of every sample (tracekit.format.checksums).
"""

import errno
import fcntl
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple, Self

import msgspec

from tracekit.errors import (
    UNREADABLE,
    CorruptShardError,
    DatasetError,
    NoSpaceError,
    ShardLockedError,
)
from tracekit.format.checksums import checksums_of
from tracekit.format.layout import Layout, is_no_space, is_same_file, sync_folder, write_atomic
from tracekit.format.manifest import (
    LayerNorms,
    SampleIndex,
    Sidecar,
    Verification,
    check_known,
    read_struct,
    shard_number,
    to_bytes,
)
from tracekit.storage import StorageLoss, added_up
from tracekit.tensors import Payload, TensorIndex, read_header

__all__ = [
    "JSON_SUFFIX",
    "TENSORS_SUFFIX",
    "Member",
    "RawSample",
    "ShardWriter",
    "discard_shard",
    "index_of",
    "iter_members",
    "iter_samples",
    "read_sample",
    "sha256_file",
    "size_fault",
]

JSON_SUFFIX = ".json"
TENSORS_SUFFIX = ".safetensors"
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_LFS_POINTER = b"version https://git-lfs.github.com/"
_CHUNK_BYTES = 1 << 20
_MAX_BUFFERS = 512  # writev takes 1024 at most on Linux and macOS


class Member(NamedTuple):
    """One file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


class RawSample(NamedTuple):
    """The two members of one sample in a tar."""

    key: str
    record: Member
    payload: Member


class JournalLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a journal."""

    batch: Annotated[int, msgspec.Meta(ge=0)]
    """Number of the batch in the shard."""
    size: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Most examples that run at once from here on; a line with an `end` speaks of the batches after it."""
    asked: int | None = None
    """Examples at once that the run asked for: `size` holds for as long as it asks for them."""
    end: int | None = None
    """Size of the tar with the whole batch in it."""
    verification: Verification | None = None
    """What replaying samples of the shard has shown, where more were replayed."""
    padding: int = 0
    """Padding of the most padded row that was replayed of the shard so far, tokens."""
    hidden_norms: LayerNorms | None = None
    """Norms of the batch's hidden states, where it has any."""
    losses: list[StorageLoss] = []
    """What storing the batch's tensors in smaller forms has cost."""


class ShardWriter:
    """Writes one shard, batch by batch; picks up where an earlier process stopped.

    Use as a context manager. `num_batches` says how many batches are already there, `size` how many examples of the
    next one run at once, and `padding` the most padding of a replayed row; `append` adds the next batch; `finish`
    closes the shard. Leaving the context without `finish` keeps what is there for the next process.

    Raises:
        ShardLockedError: another process is writing this shard.
        DatasetError: a file that no tracekit run left is in the way, or a later version began the shard.
        NoSpaceError: the disk is full; everything noted in the journal stays.
    """

    def __init__(self, layout: Layout, name: str, number: int) -> None:
        self._layout, self._name, self._number = layout, name, number
        self._partial = layout.partial_shard(name)
        self._journal_path = layout.journal(name)
        self._samples: list[SampleIndex] = []
        self._indexing: list[Future[SampleIndex]] = []
        self._records: list[bytes] = []
        self._size: tuple[int, int] | None = None
        self._sha = hashlib.sha256()
        self._hasher, self._indexer = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        self._hashed: list[Future[None]] = []
        self._end = 0
        self.is_done = False
        self.num_batches = 0
        self.padding = 0
        self.verification: Verification | None = None
        self.hidden_norms: LayerNorms | None = None
        self.losses: list[StorageLoss] = []

    def __enter__(self) -> Self:
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._journal = self._journal_path.open("ab", buffering=0)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before anything is touched
            self._open()
        except BlockingIOError as error:
            self._journal.close()
            raise ShardLockedError(f"another process is writing {self._partial}; wait for it, or stop it") from error
        except BaseException:
            self._journal.close()
            raise
        return self

    def _open(self) -> None:
        """Find out where the shard stands, holding its lock."""
        final, sidecar = self._layout.shard(self._name), self._layout.sidecar(self._name)
        if final.exists() and sidecar.exists():
            self.is_done = True
            self._journal_path.unlink(missing_ok=True)
            return
        if final.exists():  # died between the rename and the sidecar
            if not self._journal_path.stat().st_size:
                self._journal_path.unlink()
                raise DatasetError(f"{final} is there without its sidecar {sidecar}; move it away")
            final.replace(self._partial)
        sidecar.unlink(missing_ok=True)  # its shard is gone and is made again
        self._file = self._partial.open("r+b" if self._partial.exists() else "w+b", buffering=0)
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *of: object) -> None:
        self._hasher.shutdown(cancel_futures=True)
        self._indexer.shutdown(cancel_futures=True)
        self._journal.close()
        if not self.is_done:
            self._file.close()

    @property
    def num_samples(self) -> int:
        """Samples in the shard so far."""
        return len(self._samples)

    @property
    def is_in_place(self) -> bool:
        """Whether the files that are written still have their names: nobody has deleted or replaced them."""
        return is_same_file(self._file.fileno(), self._partial) and is_same_file(
            self._journal.fileno(), self._journal_path
        )

    def size(self, asked: int) -> int:
        """Most examples of the next batch that run at once: as the journal says, where it speaks of what is asked for;
        else as asked."""
        return self._size[0] if self._size is not None and self._size[1] == asked else asked

    def note_size(self, size: int, *, asked: int) -> None:
        """Note, before computing, that from the next batch on so many examples run at once."""
        if self._size != (size, asked):
            line = JournalLine(batch=self.num_batches, size=size, asked=asked)
            self._note(line)
            self._take_in(line)

    def append(
        self,
        samples: Sequence[tuple[str, bytes, Payload]],
        verification: Verification | None = None,
        hidden_norms: LayerNorms | None = None,
        losses: Sequence[StorageLoss] = (),
        *,
        padding: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Add the next batch: key, record and payload of each sample; on return it survives a crash.

        `verification` and `padding` are of rows of the batch that were replayed, `hidden_norms` and `losses` of the
        batch; they are added to what is known of the shard. `size` is how many examples run at once in the batches
        after it, and how many were asked for, where that changes.
        """
        try:
            for key, record, payload in samples:
                self._add(key, record, payload)
            self._sync()
            line = JournalLine(
                batch=self.num_batches,
                end=self._end,
                verification=verification and (self.verification or Verification.nothing()).with_more(verification),
                padding=max(padding, self.padding),
                hidden_norms=hidden_norms,
                losses=list(losses),
                size=size and size[0],
                asked=size and size[1],
            )
            self._note(line)
        except OSError as error:
            raise _no_space(error, self._partial) from error
        self.num_batches += 1
        self._take_in(line)

    def finish(self) -> Sidecar:
        """Close the tar, give it its name, and write its sidecar."""
        try:
            self._write([_END])
            self._sync()
            self._partial.replace(self._layout.shard(self._name))
            sync_folder(self._partial.parent)
            sidecar = Sidecar(
                name=self._name,
                number=self._number,
                num_bytes=self._end,
                sha256=self._sha.hexdigest(),
                samples=self._samples,
                records=[msgspec.Raw(record) for record in self._records],
                verification=self.verification or Verification.nothing(),
                hidden_norms=self.hidden_norms,
                losses=self.losses,
            )
            sidecar = sidecar.with_checksum()
            write_atomic(self._layout.sidecar(self._name), to_bytes(sidecar, compact=True))
        except OSError as error:
            raise _no_space(error, self._partial) from error
        self._journal_path.unlink()
        return sidecar

    def _add(self, key: str, record: bytes, payload: Payload) -> None:
        stored = RawSample(
            key,
            self._write_member(key + JSON_SUFFIX, [record], len(record)),
            self._write_member(key + TENSORS_SUFFIX, payload.buffers, payload.size),
        )
        self._records.append(record)
        self._indexing.append(self._indexer.submit(_index, stored, record, payload))

    def _write_member(self, name: str, buffers: Sequence[bytes | memoryview], size: int) -> Member:
        """Write one tar member; returns where its bytes are."""
        member = Member(name, self._end + _BLOCK, size)
        self._write([tar_header(name, size), *buffers, bytes(-size % _BLOCK)])
        return member

    def _write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Write, and have the hashing thread follow: hashing, like checksums, lets go of the GIL."""
        self._hashed.append(self._hasher.submit(_update, self._sha, buffers))
        left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while left:
            written = os.writev(self._file.fileno(), left[:_MAX_BUFFERS])
            self._end += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if left:
                left[0] = left[0][written:]

    def _sync(self) -> None:
        """Wait until everything written is on the disk, hashed, and indexed."""
        os.fsync(self._file.fileno())
        for hashed in self._hashed:
            hashed.result()
        self._samples += [indexed.result() for indexed in self._indexing]
        self._hashed.clear()
        self._indexing.clear()

    def _note(self, line: JournalLine) -> None:
        left = memoryview(msgspec.json.encode(line) + b"\n")
        while left:
            left = left[self._journal.write(left) :]
        os.fsync(self._journal.fileno())

    def _take_in(self, line: JournalLine) -> None:
        """Add up what a line says: the same in a process that writes it and in one that resumes."""
        if line.size is not None and line.asked is not None:
            self._size = (line.size, line.asked)
        self.padding = max(line.padding, self.padding)
        self.verification = line.verification or self.verification
        if line.hidden_norms is not None:
            so_far = self.hidden_norms
            self.hidden_norms = so_far.with_more(line.hidden_norms) if so_far else line.hidden_norms
        self.losses = added_up([*self.losses, *line.losses])

    def _resume(self) -> None:
        """Read the journal, cut the tar back to the last whole batch, and rebuild what is known of it.

        Raises:
            DatasetError: a later version wrote the journal; nothing is changed.
            CorruptShardError: the journal contradicts itself or the tar.
        """
        end = 0
        known = 0
        for line in self._journal_path.read_bytes().splitlines(keepends=True):
            try:
                entry = msgspec.json.decode(line, type=JournalLine) if line.endswith(b"\n") else None
            except UNREADABLE:
                entry = None
            if entry is None:  # torn by a crash or a full disk: what follows is not to be trusted
                break
            check_known(line, entry, where=self._journal_path)
            known += len(line)
            if entry.end is not None:
                if entry.batch != self.num_batches or entry.end < end:
                    raise CorruptShardError(
                        f"{self._journal_path}: batch {entry.batch} ends at byte {entry.end}, after {self.num_batches} "
                        f"batches to byte {end}; delete it and {self._partial}, and run again"
                    )
                end, self.num_batches = entry.end, entry.batch + 1
            self._take_in(entry)
        os.truncate(self._journal_path, known)
        if os.fstat(self._file.fileno()).st_size < end:
            raise CorruptShardError(f"{self._partial} is shorter than its journal says; delete both and run again")
        self._file.truncate(end)
        self._end = self._file.seek(end)
        with self._partial.open("rb") as file:
            for chunk in _chunks(file, end):
                self._sha.update(chunk)
            for sample in iter_samples(file, end=end, where=str(self._partial)):
                record, payload = read_sample(file, sample)
                self._records.append(record)
                self._samples.append(index_of(sample, record, payload))


def discard_shard(layout: Layout, name: str) -> int:
    """Delete a shard, finished or not; returns its samples.

    Raises:
        ShardLockedError: another process is writing it.
    """
    sidecar = layout.sidecar(name)
    paths = (sidecar, layout.shard(name), layout.partial_shard(name), layout.journal(name))
    if not any(path.exists() for path in paths):
        return 0
    num_samples = len(read_struct(sidecar, Sidecar).samples) if sidecar.exists() else 0
    with ShardWriter(layout, name, shard_number(name)) as writer:
        num_samples = num_samples or writer.num_samples
        for path in paths:  # the sidecar first: without it the shard is not done
            path.unlink(missing_ok=True)
    return num_samples


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte header of a tar member, the same for the same name and size."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def iter_members(file: BinaryIO, *, end: int | None = None, where: str) -> Iterator[Member]:
    """Members of a tar, in order; with `end`, of a tar that goes on growing there.

    Raises:
        CorruptShardError: not a tar, cut short, or a member that is no plain file of plain name.
    """
    file.seek(0, os.SEEK_END)
    total = file.tell()
    offset, stop = 0, total if end is None else end
    while offset < stop:
        file.seek(offset)
        block = file.read(_BLOCK)
        if block == bytes(_BLOCK) and end is None:
            if total - offset != len(_END) or file.read() != bytes(_BLOCK):
                raise CorruptShardError(f"{where}: bytes after the end mark at {offset}")
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise CorruptShardError(f"{where}: no tar header at byte {offset}: {error}") from error
        if info.type != tarfile.REGTYPE or "/" in info.name or "\\" in info.name or info.name.startswith("."):
            raise CorruptShardError(f"{where}: member {info.name!r} is not a plain file in the archive's root")
        if offset + _BLOCK + info.size > stop:
            raise CorruptShardError(f"{where}: cut short inside {info.name!r}")
        yield Member(info.name, offset + _BLOCK, info.size)
        offset += _BLOCK + info.size + -info.size % _BLOCK
    if end is None:
        raise CorruptShardError(f"{where}: cut short at byte {total}, the end mark is missing")


def iter_samples(file: BinaryIO, *, end: int | None = None, where: str) -> Iterator[RawSample]:
    """Samples of a shard: pairs of members with one key.

    Raises:
        CorruptShardError: as `iter_members`, or the members are not such pairs.
    """
    members = iter_members(file, end=end, where=where)
    for record in members:
        payload = next(members, None)
        key = record.name.removesuffix(JSON_SUFFIX)
        if payload is None or record.name != key + JSON_SUFFIX or payload.name != key + TENSORS_SUFFIX or "." in key:
            second = "nothing" if payload is None else repr(payload.name)
            raise CorruptShardError(
                f"{where}: expected <key>.json and <key>.safetensors, found {record.name!r}, {second}"
            )
        yield RawSample(key, record, payload)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_fault(path: Path, num_bytes: int) -> str | None:
    """What is wrong with a file that should have so many bytes; None where nothing is."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        found = file.seek(0, os.SEEK_END)
    if found == num_bytes:
        return None
    if start == _LFS_POINTER:
        return f"{found} bytes, a Git LFS pointer in place of the {num_bytes} bytes of the file; run `git lfs pull`"
    return f"{found} bytes, the manifest says {num_bytes}"


def read_sample(file: BinaryIO, sample: RawSample) -> tuple[bytes, bytes]:
    """Record and payload of a sample, as they stand in the tar."""
    file.seek(sample.record.offset)
    record = file.read(sample.record.size)
    file.seek(sample.payload.offset)
    return record, file.read(sample.payload.size)


def index_of(sample: RawSample, record: bytes, payload: bytes) -> SampleIndex:
    """The index of a sample, made from its bytes alone: equal to what its writer noted.

    Raises:
        CorruptShardError: the payload is not a whole, consistent one.
    """
    header = read_header(payload, where=sample.key)
    places = [
        TensorIndex(name=name, offset=entry.data_offsets[0], size=entry.data_offsets[1] - entry.data_offsets[0])
        for name, entry in header.entries.items()
    ]
    return _index(sample, record, Payload([payload], header.data_offset, len(payload), places))


def _index(sample: RawSample, record: bytes, payload: Payload) -> SampleIndex:
    return SampleIndex(
        key=sample.key,
        json_offset=sample.record.offset,
        json_size=sample.record.size,
        tensors_offset=sample.payload.offset,
        tensors_size=sample.payload.size,
        data_offset=sample.payload.offset + payload.data_offset,
        tensors=payload.places,
        checksums=checksums_of(record, payload),
    )


def _update(sha: "hashlib._Hash", buffers: Sequence[bytes | memoryview]) -> None:
    for buffer in buffers:
        sha.update(buffer)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    file.seek(0)
    while size > 0:
        chunk = file.read(min(size, _CHUNK_BYTES))
        yield chunk
        size -= len(chunk)


def _no_space(error: OSError, path: Path) -> OSError:
    if not is_no_space(error):
        return error
    why = "the disk is full" if error.errno == errno.ENOSPC else f"no more room ({os.strerror(error.errno or 0)})"
    return NoSpaceError(
        error.errno,
        f"{why} while writing {path}. Every finished batch is safe; free some space and run the same command again",
    )
