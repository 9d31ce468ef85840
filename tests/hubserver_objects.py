"""Large files of the test Hub: Git LFS objects by SHA-256, and the Xet storage that clients upload to by default.

A xorb is a file of compressed chunks, one after the other:

    version u8 | compressed length u24 | scheme u8 | raw length u24 | compressed bytes

and then a footer, unused here.

A shard says which chunks of which xorbs make a file. After a header of 48 bytes come file blocks of 48-byte rows:

    file hash 32 | flags u32 | number of terms u32 | 8 unused
    term, repeated:    xorb hash 32 | flags u32 | raw bytes u32 | first chunk u32 | end chunk u32
    verification rows, as many as terms, where flag 31 is set
    SHA-256 of the file 32 | 16 unused, where flag 30 is set
    32 bytes 0xff end the list

Files are rebuilt here without the client's library, so a client that uploads nonsense is noticed.
"""

import hashlib
import struct
import threading
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

__all__ = ["Objects", "Term", "decode_chunk", "hash_file"]

SHARD_HEADER = 48
SHARD_ROW = 48
HAS_VERIFICATION = 1 << 31
HAS_SHA256 = 1 << 30


class Term(NamedTuple):
    """Chunks `start` to `end` of one xorb: `size` bytes of a file."""

    xorb: str
    size: int
    start: int
    end: int


def xet_hex(data: bytes) -> str:
    """The 32 bytes of a Xet hash as the addresses spell them: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode_chunk(scheme: int, data: bytes, raw_size: int) -> bytes:
    """The bytes of one chunk: stored, LZ4, or LZ4 of the bytes grouped by their position modulo 4."""
    if scheme == 0:
        return data
    raw = pa.decompress(data, decompressed_size=raw_size, codec="lz4", asbytes=True)
    if scheme == 1:
        return raw
    assert scheme == 2, scheme
    out, start = bytearray(raw_size), 0
    for k in range(4):
        stop = start + (raw_size + 3 - k) // 4
        out[k::4] = raw[start:stop]
        start = stop
    return bytes(out)


class Objects:
    """A folder with LFS objects and xorbs, and the tables that the uploaded shards fill."""

    def __init__(self, root: Path) -> None:
        self.lfs = root / "lfs"
        self.cas = root / "cas"
        self.lfs.mkdir(parents=True)
        self.cas.mkdir(parents=True)
        self.lock = threading.RLock()
        self.xet_files: dict[str, list[Term]] = {}
        self.xet_by_sha256: dict[str, str] = {}
        self.offsets: dict[str, list[int]] = {}

    def add_shard(self, data: bytes) -> list[str]:
        """Take the files of an uploaded shard; returns the hashes of xorbs it needs and that were never uploaded."""
        files: dict[str, list[Term]] = {}
        at = SHARD_HEADER
        while data[at : at + 32] != b"\xff" * 32:
            file = xet_hex(data[at : at + 32])
            flags, num_terms = struct.unpack_from("<II", data, at + 32)
            at += SHARD_ROW
            terms = []
            for _ in range(num_terms):
                _flags, size, start, end = struct.unpack_from("<IIII", data, at + 32)
                terms.append(Term(xet_hex(data[at : at + 32]), size, start, end))
                at += SHARD_ROW
            files[file] = terms
            if flags & HAS_VERIFICATION:
                at += SHARD_ROW * num_terms
            if flags & HAS_SHA256:
                with self.lock:
                    self.xet_by_sha256[xet_hex(data[at : at + 32])] = file
                at += SHARD_ROW
        with self.lock:
            self.xet_files.update(files)
        return sorted({t.xorb for terms in files.values() for t in terms if not (self.cas / t.xorb).exists()})

    def chunk_offsets(self, xorb: str) -> list[int]:
        """Where the chunks of a xorb begin, and where the last one ends."""
        with self.lock:
            if xorb not in self.offsets:
                data, at, offsets = (self.cas / xorb).read_bytes(), 0, [0]
                while at < len(data) and data[at] == 0:
                    at += 8 + int.from_bytes(data[at + 1 : at + 4], "little")
                    offsets.append(at)
                self.offsets[xorb] = offsets
            return self.offsets[xorb]

    def read_term(self, term: Term) -> bytes:
        """The file bytes of a term, decompressed."""
        data, offsets, parts = (self.cas / term.xorb).read_bytes(), self.chunk_offsets(term.xorb), []
        for chunk in range(term.start, term.end):
            at, end = offsets[chunk], offsets[chunk + 1]
            raw_size = int.from_bytes(data[at + 5 : at + 8], "little")
            parts.append(decode_chunk(data[at + 4], data[at + 8 : end], raw_size))
        return b"".join(parts)

    def size(self, sha256: str) -> int | None:
        """Bytes of an object, or None if it was not uploaded."""
        path = self.lfs / sha256
        if path.exists():
            return path.stat().st_size
        file = self.xet_by_sha256.get(sha256)
        return None if file is None else sum(term.size for term in self.xet_files[file])

    def rebuild(self, sha256: str) -> bool:
        """Have the object as a file, made of its xorbs if need be. False if the bytes do not hash to `sha256`."""
        path = self.lfs / sha256
        if path.exists():
            return True
        partial = self.lfs / f"{sha256}.{threading.get_ident()}"
        with partial.open("wb") as file:
            for term in self.xet_files[self.xet_by_sha256[sha256]]:
                file.write(self.read_term(term))
        if hash_file(partial) != sha256:
            partial.unlink()
            return False
        partial.rename(path)
        return True

    def add(self, data: bytes) -> str:
        """Store an object without a client; returns its SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.lfs / sha256).write_bytes(data)
        return sha256
