"""Map-style loading beside .npy: 40 samples of 8 MB, one random row at a time, everything in the page cache.

    tracekit                  tracekit.load_dataset, every field, hidden states (31, T, 576) and attention (30, 9, T, T)
    npy                       the same arrays as .npy members of a WebDataset tar, read by `datasets` with
                              with_format("numpy"), which hands them back as float32
    ..., hidden states        the same without attention, which tracekit has to unpack from its causal half

One byte of every page of what is handed back is added up, for all alike, so that the bytes are really there. Another
process writes the files and makes the Arrow files of `datasets`: what writing leaves behind in memory would make
reading look cheaper than it is in a program that only reads.
"""

import io
import json
import multiprocessing
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy as np

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
from benchmarks.reading import touch
from benchmarks.samples import make_samples, total_bytes
from tests.datasets_for_tests import Made, write_dataset
from tracekit.read.loading import load_dataset
from tracekit.tensors import unpack_causal

NUM_SAMPLES = 40
_SITES = ("hidden_states", "attentions")
_HIDDEN = ", hidden states"
_NUM_READS = {"tracekit": 60, "npy": 6, f"tracekit{_HIDDEN}": 400, f"npy{_HIDDEN}": 12}
"""Random rows in one measurement, so that each takes a comparable time."""


def write_all(root: Path) -> None:
    """Write the samples both ways, and have `datasets` make its Arrow files of both."""
    samples = make_samples(NUM_SAMPLES)
    say(f"loading: {NUM_SAMPLES} samples, {total_bytes(samples) / 1e9:.2f} GB of tensors, attention packed")
    write_dataset(root / "tracekit", {"train-00000": samples})
    with tarfile.open(root / "npy.tar", "w") as tar:
        for made in samples:
            _add(tar, f"{made.record.key}.json", json.dumps(msgspec.to_builtins(made.record)).encode())
            for site, array in _whole(made).items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                _add(tar, f"{made.record.key}.{site}.npy", buffer.getvalue())
    open_all(root)


def open_all(root: Path) -> dict[str, Any]:
    """Every variant as a map-style dataset."""
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    npy = datasets.load_dataset("webdataset", data_files={"train": str(root / "npy.tar")}, split="train")
    columns = [f"{site}.npy" for site in _SITES]
    return {
        "tracekit": load_dataset(root / "tracekit", split="train"),
        "npy": npy.with_format("numpy"),
        f"tracekit{_HIDDEN}": load_dataset(root / "tracekit", split="train", sites=_SITES[:1]),
        f"npy{_HIDDEN}": npy.remove_columns(columns[1]).with_format("numpy"),
    }


def check_agreement(loaded: Mapping[str, Any]) -> dict[str, str]:
    """That both hand back the same values; the dtypes they come in."""
    dtypes: dict[str, str] = {}
    for number in (0, NUM_SAMPLES - 1):
        ours, theirs = loaded["tracekit"][number], loaded["npy"][number]
        for site in _SITES:
            assert np.array_equal(ours[site], theirs[f"{site}.npy"]), f"row {number}: {site} differs"
            dtypes[site] = f"{ours[site].dtype} by tracekit, {theirs[f'{site}.npy'].dtype} by npy"
    return dtypes


def read_rows(dataset: Any, count: int, seed: int) -> int:
    """Read rows at random; hands back what `touch` saw."""
    rng = random.Random(seed)
    rows = (dataset[rng.randrange(len(dataset))] for _ in range(count))
    return sum(touch(value) for row in rows for value in row.values() if isinstance(value, np.ndarray) and value.ndim)


def measure(loaded: Mapping[str, Any]) -> list[Round]:
    """Seconds a row, every variant in turn."""

    def reads(name: str) -> Callable[[int], object]:
        return lambda number: read_rows(loaded[name], _NUM_READS[name], number)

    for name in loaded:
        read_rows(loaded[name], NUM_SAMPLES // 10, 0)
    rounds = interleave({name: reads(name) for name in loaded}, num_rounds=7, max_seconds=120, min_rounds=3)
    return [
        {name: one._replace(seconds=one.seconds / _NUM_READS[name]) for name, one in found.items()} for found in rounds
    ]


def run() -> Mapping[str, Any]:
    """Measure, print and store."""
    root = Path(tempfile.mkdtemp(prefix="tracekit-loading-"))
    try:
        writer = multiprocessing.get_context("spawn").Process(target=write_all, args=(root,))
        writer.start()
        writer.join()
        assert writer.exitcode == 0, writer.exitcode
        loaded = open_all(root)
        dtypes = check_agreement(loaded)
        rounds = measure(loaded)
    finally:
        shutil.rmtree(root)
    ratios = [
        compare(f"one row{what}: tracekit / npy", rounds, f"tracekit{what}", f"npy{what}", target="<= 0.1")
        for what in ("", _HIDDEN)
    ]
    say(ratio_table("Loading map-style: times divided", ratios))
    milliseconds = {name: 1000 * _median(rounds, name) for name in rounds[0]}
    say(table("One random row", ["", "ms"], [[name, f"{value:.3f}"] for name, value in milliseconds.items()]))
    results = {"ratios": ratios, "row_ms": milliseconds, "dtypes": dtypes, "num_samples": NUM_SAMPLES}
    store_results("loading", results)
    return results


def _whole(made: Made) -> dict[str, np.ndarray]:
    """The tensors of a sample as everybody stores them: attention (L, H, T, T)."""
    num_tokens = len(made.record.token_ids)
    attention = unpack_causal(made.stored["attentions"], np.arange(num_tokens), num_tokens)
    return {"hidden_states": made.stored["hidden_states"], "attentions": attention}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _median(rounds: Sequence[Round], name: str) -> float:
    return float(np.median([one[name].seconds for one in rounds]))


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
