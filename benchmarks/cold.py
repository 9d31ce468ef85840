"""A process of its own that reads a dataset and says what it took, as JSON: `python -m benchmarks.cold HOW FOLDER`.

    store     TraceStore: import, open, one sample by key and by number, then every sample in order
    stream    tracekit.load_dataset(..., streaming=True): every row
    plain     datasets.load_dataset(..., streaming=True): the first 10,000 rows, records and tensors as bytes
    map       tracekit.load_dataset: opened, and rows at random

Memory is what the kernel says of the process, after 10, 50 and 100 % of the samples: `anon` is its own, `all` includes
the pages of mapped files. Nothing is imported here that a reader does not need.
"""

import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CONFIG, SITE, LAYER = "trivia_qa", "hidden_states", 12
"""What benchmarks/scale.py writes."""
PLAIN_ROWS = 10_000
_SHARES = (0.1, 0.5, 1.0)


def memory() -> dict[str, float]:
    """MiB of this process in memory; nothing where the kernel does not tell (Linux does)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"anon": int(sizes["RssAnon"]) / 1024, "all": int(sizes["VmRSS"]) / 1024} if sizes else {}


def walk(samples: Iterable[Any], total: int, read: Callable[[Any], object]) -> dict[str, Any]:
    """Read them all; seconds a sample, and memory on the way."""
    marks = {max(1, int(share * total)): f"{share:.0%}" for share in _SHARES}
    found: dict[str, dict[str, float]] = {}
    started, count = time.perf_counter(), 0
    for count, sample in enumerate(samples, start=1):
        read(sample)
        if count in marks:
            found[marks[count]] = memory()
    assert count == total, (count, total)
    return {"microseconds_per_sample": 1e6 * (time.perf_counter() - started) / total, "mib": found}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def read_store(folder: str) -> dict[str, Any]:
    """TraceStore."""
    importing, kind = timed(lambda: importlib.import_module("tracekit").TraceStore)
    opening, store = timed(lambda: kind(folder))
    again, second = timed(lambda: kind(folder))
    second.close()
    key, number = store.keys[len(store) // 3], len(store) // 2
    by_key, _ = timed(lambda: store[key].hidden_states(layer=LAYER).sum())
    by_number, _ = timed(lambda: store[number].hidden_states(layer=LAYER).sum())
    walked = walk(store, len(store), lambda sample: (sample.record, sample.hidden_states(layer=LAYER).sum()))
    return {
        "import_seconds": importing,
        "open_seconds": opening,
        "open_again_seconds": again,
        "first_by_key_ms": 1000 * by_key,
        "first_by_number_ms": 1000 * by_number,
        "iterate": walked,
    }


def read_stream(folder: str) -> dict[str, Any]:
    """tracekit.load_dataset, streaming."""
    import tracekit

    total = len(tracekit.TraceStore(folder))
    opening, rows = timed(lambda: tracekit.load_dataset(folder, CONFIG, split="train", streaming=True))
    return {"open_seconds": opening, "iterate": walk(rows, total, lambda row: row[SITE].sum())}


def read_plain(folder: str) -> dict[str, Any]:
    """`datasets` alone, streaming."""
    import datasets

    total = min(PLAIN_ROWS, json.loads((Path(folder) / "manifest.json").read_bytes())["configs"][0]["num_samples"])
    opening, rows = timed(lambda: datasets.load_dataset(folder, CONFIG, split="train", streaming=True))
    return {"open_seconds": opening, "iterate": walk(rows.take(total), total, lambda row: len(row["json"]))}


def read_map(folder: str) -> dict[str, Any]:
    """tracekit.load_dataset, map-style: the first time `datasets` makes its copy of the records, then it has it."""
    import tracekit

    first, _ = timed(lambda: tracekit.load_dataset(folder, CONFIG, split="train"))
    again, rows = timed(lambda: tracekit.load_dataset(folder, CONFIG, split="train"))
    rng = random.Random(41)
    count = min(2000, len(rows))
    reading, _ = timed(lambda: [rows[rng.randrange(len(rows))][SITE].sum() for _ in range(count)])
    return {
        "open_first_seconds": first,
        "open_again_seconds": again,
        "random_row_microseconds": 1e6 * reading / count,
        "mib": memory(),
    }


HOW = {"store": read_store, "stream": read_stream, "plain": read_plain, "map": read_map}

if __name__ == "__main__":
    print(json.dumps(HOW[sys.argv[1]](sys.argv[2])))
