"""Writing beside a raw write of the same bytes: about 1 GB, samples of 8 MB, batches of 8.

    tracekit         ShardWriter: payload encoding, tar, byte index, SHA-256, an fsync and a journal line a batch
    raw, 1 sync      the same bytes, one write a sample, one fsync at the end
    raw, batch sync  the same bytes, an fsync a batch
    sha256           hashing the same bytes, nothing written: no writer that hashes can be faster than this

The last file is removed right before the next is measured: memory that was just let go of is there to be used, while a
virtual machine may have to ask its host for other memory, which takes longer than the write.
"""

import cProfile
import hashlib
import os
import pstats
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import (
    Round,
    compare,
    interleave,
    parse_arguments,
    ratio_table,
    say,
    store_results,
    table,
)
from benchmarks.samples import make_samples, total_bytes
from tests.datasets_for_tests import Made
from tracekit.format.layout import Layout
from tracekit.format.shards import ShardWriter
from tracekit.records import encode_record
from tracekit.tensors import encode

NUM_SAMPLES = 128
BATCH_SIZE = 8
_POOL = 16
"""Samples that really differ; the others repeat them, so that memory stays small."""


class Prepared(NamedTuple):
    """What is written."""

    samples: list[Made]
    records: list[bytes]
    blobs: list[bytes]
    """The same as tar members and all, one a sample, for the raw writes."""

    @property
    def num_bytes(self) -> int:
        return sum(len(blob) for blob in self.blobs)


def prepare() -> Prepared:
    """Samples, their records, and their bytes."""
    pool = make_samples(_POOL)
    samples = [pool[number % _POOL] for number in range(NUM_SAMPLES)]
    records = [encode_record(sample.record) for sample in pool]
    blobs = [
        bytes(1024) + record + bytes(-len(record) % 512) + payload + bytes(-len(payload) % 512)
        for record, payload in zip(records, (encode(sample.stored).tobytes() for sample in pool), strict=True)
    ]
    return Prepared(
        samples, [records[n % _POOL] for n in range(NUM_SAMPLES)], [blobs[n % _POOL] for n in range(NUM_SAMPLES)]
    )


def write_tracekit(prepared: Prepared, folder: Path) -> None:
    """One shard through ShardWriter."""
    layout = Layout(folder, "bench")
    with ShardWriter(layout, "train-00000", 0) as writer:
        for start in range(0, NUM_SAMPLES, BATCH_SIZE):
            batch = range(start, start + BATCH_SIZE)
            writer.append([(f"{n:06d}", prepared.records[n], encode(prepared.samples[n].stored)) for n in batch])
        writer.finish()


def write_raw(prepared: Prepared, folder: Path, *, syncs_each_batch: bool) -> None:
    """The same bytes into one file."""
    with (folder / "raw.bin").open("wb", buffering=0) as file:
        for number, blob in enumerate(prepared.blobs, start=1):
            file.write(blob)
            if syncs_each_batch and number % BATCH_SIZE == 0:
                os.fsync(file.fileno())
        os.fsync(file.fileno())


def hash_all(prepared: Prepared) -> None:
    """SHA-256 of the same bytes."""
    digest = hashlib.sha256()
    for blob in prepared.blobs:
        digest.update(blob)


def measure(prepared: Prepared, folder: Path) -> list[Round]:
    """All variants in turn."""

    def clean(name: str) -> None:
        if name != "sha256":
            shutil.rmtree(folder)
            folder.mkdir()

    variants = {
        "tracekit": lambda number: write_tracekit(prepared, folder),
        "raw, 1 sync": lambda number: write_raw(prepared, folder, syncs_each_batch=False),
        "raw, batch sync": lambda number: write_raw(prepared, folder, syncs_each_batch=True),
        "sha256": lambda number: hash_all(prepared),
    }
    for name, work in variants.items():
        clean(name)
        work(0)
    return interleave(variants, num_rounds=9, max_seconds=240, min_rounds=5, before=clean)


_STAGES = {
    ("~", "<built-in method posix.fsync>"): "fsync",
    ("~", "<built-in method posix.writev>"): "write",
    ("~", "<method 'acquire' of '_thread.lock' objects>"): "waiting for the hash",
    ("shards.py", "tar_header"): "tar headers",
    ("tensors.py", "encode"): "payload encoding",
}
"""Functions whose time is taken from a profile of the writing thread, and what they stand for."""


def break_down(prepared: Prepared, folder: Path) -> dict[str, float]:
    """Where the writing thread's time goes, as shares."""
    profile = cProfile.Profile()
    profile.runcall(write_tracekit, prepared, folder)
    stats = pstats.Stats(profile)
    seconds = dict.fromkeys(_STAGES.values(), 0.0)
    for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        stage = _STAGES.get((file.rpartition("/")[2], function))
        if stage is not None:
            seconds[stage] += cumulative
    total = stats.total_tt  # type: ignore[attr-defined]
    seconds["everything else"] = total - sum(seconds.values())
    return {stage: part / total for stage, part in seconds.items()}


def run() -> Mapping[str, Any]:
    """Measure, print and store."""
    prepared = prepare()
    tensors = total_bytes(prepared.samples)
    say(f"writing: {NUM_SAMPLES} samples, {prepared.num_bytes / 1e9:.2f} GB, {tensors / 1e9:.2f} GB of it tensors")
    root = Path(tempfile.mkdtemp(prefix="tracekit-writing-"))
    try:
        folder = root / "out"
        folder.mkdir()
        rounds = measure(prepared, folder)
        shutil.rmtree(folder)
        folder.mkdir()
        shares = break_down(prepared, folder)
    finally:
        shutil.rmtree(root)
    ratios = [
        compare("throughput tracekit / raw, 1 sync", rounds, "raw, 1 sync", "tracekit", target=">= 0.8"),
        compare("throughput tracekit / raw, batch sync", rounds, "raw, batch sync", "tracekit", target=">= 0.8"),
        compare("throughput sha256 / raw, 1 sync", rounds, "raw, 1 sync", "sha256"),
        compare("throughput tracekit / sha256", rounds, "sha256", "tracekit"),
    ]
    say(ratio_table("Writing: bytes a second divided", ratios))
    say(table("Where the writing thread's time goes", ["stage", "share"], [[k, f"{v:.1%}"] for k, v in shares.items()]))
    results = {"ratios": ratios, "shares": shares, "num_bytes": prepared.num_bytes}
    store_results("writing", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
