"""Reading beside other formats: 200 samples of 8 MB, everything in the page cache.

    one layer    hidden states of one layer of one sample, at random
    full scan    every tensor of every sample, in stored order

One byte of every page of what is handed back is added up, for all formats alike, so that the bytes are really there.
What each format is, stands in benchmarks/formats.py.
"""

import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
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
_PAGE = 4096
_UNPACKED = "TraceStore, attention unpacked"
_NUM_READS = {"TraceStore": 20_000, "npy": 4_000, "LMDB": 100, "tar + npy": 100, "Zarr": 40, "pickle": 1}
"""Random reads in one measurement, so that each takes a comparable time."""


def touch(array: np.ndarray) -> int:
    """Add up one byte of every page."""
    return int(array.reshape(-1).view(np.uint8)[::_PAGE].sum())


def read_layers(store: Format, keys: Sequence[str], count: int, seed: int) -> None:
    """Read layers at random."""
    rng = random.Random(seed)
    for _ in range(count):
        touch(store.layer(rng.choice(keys), rng.randrange(NUM_HIDDEN)))


def scan(arrays: Iterable[np.ndarray]) -> None:
    """Read everything."""
    for array in arrays:
        touch(array)


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


def measure_scans(stores: Mapping[str, Format]) -> list[Round]:
    """Seconds a scan, every format in turn."""

    def scans(name: str) -> Any:
        return lambda number: scan(stores[name].scan())

    ours = stores["TraceStore"]
    assert isinstance(ours, TracekitFormat)
    variants = {name: scans(name) for name in stores}
    variants[_UNPACKED] = lambda number: scan(ours.scan_unpacked())
    say("\nfull scan")
    return interleave(variants, num_rounds=5, max_seconds=100, min_rounds=3)


def write_all(root: Path) -> tuple[dict[str, Format], list[str], int]:
    """Every format with the same samples, opened; their keys; and bytes of the tensors."""
    samples = make_samples(NUM_SAMPLES)
    stores: dict[str, Format] = {}
    for kind in FORMATS:
        started = time.perf_counter()
        store, folder = kind(), root / kind.name.replace(" ", "")
        folder.mkdir()
        store.write(folder, samples)
        store.open(folder)
        stores[kind.name] = store
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"  wrote {kind.name}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")
    return stores, [made.record.key for made in samples], total_bytes(samples)


def run() -> Mapping[str, Any]:
    """Measure, print and store."""
    root = Path(tempfile.mkdtemp(prefix="tracekit-reading-"))
    try:
        stores, keys, num_bytes = write_all(root)
        say(f"reading: {NUM_SAMPLES} samples, {num_bytes / 1e9:.2f} GB of tensors")
        for store in stores.values():
            scan(store.scan())
        absolute = time_layers(root / "TraceStore", keys)
        layer_rounds, scan_rounds = measure_layers(stores, keys), measure_scans(stores)
        for store in stores.values():
            store.close()
    finally:
        shutil.rmtree(root)
    ratios = _ratios("one layer", layer_rounds, "TraceStore") + _ratios("full scan", scan_rounds, "TraceStore")
    ratios += _ratios("full scan", scan_rounds, _UNPACKED)
    say(ratio_table("Reading: times divided", ratios))
    rows = [[name, f"{value:.4f}"] for name, value in absolute.items()]
    say(table(f"TraceStore, one layer (target: warm median <= {LAYER_TARGET_MS} ms)", ["", "ms"], rows))
    results = {"ratios": ratios, "one_layer": absolute, "num_bytes": num_bytes, "num_samples": NUM_SAMPLES}
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
