"""Reading beside other formats: 200 samples of 8 MB, everything in the page cache.

    one layer    hidden states of one layer of one sample, at random, from what is open and has been read before
    full scan    open, read every tensor of every sample in stored order, close

One byte of every page of what is handed back is added up, for all formats alike, so that the bytes are really there.
What each format is, stands in benchmarks/formats.py. Another process writes the files: memory that writing leaves
behind would make it cheaper to read into new arrays than it is in a program that only reads.
"""

import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.formats import FORMATS, Format, TracekitFormat
from benchmarks.measure import (
    Ratio,
    Round,
    compare,
    interleave,
    parse_arguments,
    percentile,
    ratio_table,
    say,
    store_results,
    table,
)
from benchmarks.samples import NUM_HIDDEN, make_samples, total_bytes

NUM_SAMPLES = 200
LAYER_TARGET_MS = 0.05
_KEYS = [f"{number:06d}" for number in range(NUM_SAMPLES)]
_PAGE = 4096
_UNPACKED = "TraceStore, attention unpacked"
_NUM_READS = {"TraceStore": 50_000, "npy": 6_000, "LMDB": 400, "tar + npy": 400, "Zarr": 100, "pickle": 1}
"""Random reads in one measurement, so that each takes a comparable time."""


def touch(array: np.ndarray) -> int:
    """Add up one byte of every page."""
    return int(array.reshape(-1).view(np.uint8)[::_PAGE].sum())


def read_layers(store: Format, keys: Sequence[str], count: int, seed: int) -> None:
    """Read layers at random."""
    rng = random.Random(seed)
    for _ in range(count):
        touch(store.layer(rng.choice(keys), rng.randrange(NUM_HIDDEN)))


def scan(kind: type[Format], folder: Path) -> int:
    """Open, read everything, close; hands back what `touch` saw."""
    store = kind()
    store.open(folder)
    seen = sum(touch(array) for array in store.scan())
    store.close()
    return seen


def scan_unpacked(folder: Path) -> int:
    """The same with tracekit, attention as (L, H, T, T)."""
    store = TracekitFormat()
    store.open(folder)
    seen = sum(touch(array) for array in store.scan_unpacked())
    store.close()
    return seen


def time_layers(folder: Path, keys: Sequence[str]) -> dict[str, float]:
    """Milliseconds of tracekit's single reads: the first of each sample after opening, then warm ones."""
    rng = random.Random(41)
    store = TracekitFormat()
    store.open(folder)
    first = [_milliseconds(store, key, rng.randrange(NUM_HIDDEN)) for key in rng.sample(keys, len(keys))]
    warm = [_milliseconds(store, rng.choice(keys), rng.randrange(NUM_HIDDEN)) for _ in range(20_000)]
    store.close()
    return {
        "first_of_a_sample_median_ms": statistics.median(first),
        "warm_median_ms": statistics.median(warm),
        "warm_p99_ms": percentile(warm, 0.99),
    }


def _milliseconds(store: Format, key: str, layer: int) -> float:
    started = time.perf_counter()
    touch(store.layer(key, layer))
    return 1000 * (time.perf_counter() - started)


def measure_layers(stores: Mapping[str, Format], keys: Sequence[str]) -> list[Round]:
    """Seconds a read, every format in turn."""

    def reads(name: str) -> Any:
        return lambda number: read_layers(stores[name], keys, _NUM_READS[name], number)

    say("\none layer (times of many reads together)")
    rounds = interleave({name: reads(name) for name in stores}, num_rounds=7, max_seconds=60, min_rounds=3)
    return [
        {name: one._replace(seconds=one.seconds / _NUM_READS[name]) for name, one in found.items()} for found in rounds
    ]


def measure_scans(root: Path) -> list[Round]:
    """Seconds a scan, every format in turn."""

    def scans(kind: type[Format]) -> Any:
        return lambda number: scan(kind, folder_of(root, kind))

    variants = {kind.name: scans(kind) for kind in FORMATS}
    variants[_UNPACKED] = lambda number: scan_unpacked(folder_of(root, TracekitFormat))
    say("\nfull scan")
    return interleave(variants, num_rounds=5, max_seconds=90, min_rounds=3)


def folder_of(root: Path, kind: type[Format]) -> Path:
    """Folder of a format."""
    return root / kind.name.replace(" ", "")


def write_all(root: Path) -> None:
    """Write the same samples in every format."""
    samples = make_samples(NUM_SAMPLES)
    say(f"reading: {NUM_SAMPLES} samples, {total_bytes(samples) / 1e9:.2f} GB of tensors")
    for kind in FORMATS:
        started = time.perf_counter()
        folder = folder_of(root, kind)
        folder.mkdir()
        kind().write(folder, samples)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"  wrote {kind.name}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


def open_all(root: Path) -> dict[str, Format]:
    """Every format, opened, after everything was read once; sees that all hand back the same."""
    stores: dict[str, Format] = {}
    layers: list[np.ndarray] = []
    sizes: set[int] = set()
    for kind in FORMATS:
        store = stores[kind.name] = kind()
        store.open(folder_of(root, kind))
        layers.append(store.layer(_KEYS[-1], NUM_HIDDEN - 1))
        sizes.add(sum(array.nbytes + 0 * touch(array) for array in store.scan()))
    assert len(sizes) == 1, sizes
    assert all(np.array_equal(layer, layers[0]) for layer in layers), "formats hand back different values"
    return stores


def run() -> Mapping[str, Any]:
    """Measure, print and store."""
    root = Path(tempfile.mkdtemp(prefix="tracekit-reading-"))
    try:
        writer = multiprocessing.get_context("spawn").Process(target=write_all, args=(root,))
        writer.start()
        writer.join()
        assert writer.exitcode == 0, writer.exitcode
        stores = open_all(root)
        absolute = time_layers(folder_of(root, TracekitFormat), _KEYS)
        layer_rounds = measure_layers(stores, _KEYS)
        for store in stores.values():
            store.close()
        scan_rounds = measure_scans(root)
    finally:
        shutil.rmtree(root)
    ratios = _ratios("one layer", layer_rounds, "TraceStore") + _ratios("full scan", scan_rounds, "TraceStore")
    ratios += _ratios("full scan", scan_rounds, _UNPACKED)
    say(ratio_table("Reading: times divided", ratios))
    rows = [[name, f"{value:.4f}"] for name, value in absolute.items()]
    say(table(f"TraceStore, one layer (target: warm median <= {LAYER_TARGET_MS} ms)", ["", "ms"], rows))
    results = {"ratios": ratios, "one_layer": absolute, "num_samples": NUM_SAMPLES}
    store_results("reading", results)
    return results


def _ratios(what: str, rounds: Sequence[Round], ours: str) -> list[Ratio]:
    """Every other format's time divided by ours."""
    target = ">= 1" if ours == "TraceStore" else ""
    others = [name for name in rounds[0] if not name.startswith("TraceStore")]
    return [compare(f"{what}: {name} / {ours}", rounds, name, ours, target=target) for name in others]


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
