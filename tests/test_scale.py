"""The dataset of the size benchmark is a real one, and what reads it in a process of its own tells the truth."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cold import CONFIG, LAYER, SITE, read_store, walk
from benchmarks.scale import finish_ratios, memory_ratios, write
from tracekit.read.store import TraceStore
from tracekit.read.verifier import verify

NUM_SAMPLES = 300
"""A whole shard and a part of one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale") / "dataset"
    written = write(out, NUM_SAMPLES)
    assert written["write_seconds"] > 0
    assert written["mib_after_finish"] >= written["mib_after_write"] >= written["mib_before"] > 0
    return out


def test_the_dataset_is_finished_and_verifies(folder: Path) -> None:
    report = verify(folder)
    assert report.problems == []
    with TraceStore(folder) as store:
        assert (len(store), store.is_open) == (NUM_SAMPLES, False)
        assert store.info().configs == [CONFIG]
        assert [len(list(store.shard(number))) for number in (0, 1)] == [256, 44]
        first, last = store[0].tensor(SITE, layer=LAYER), store[-1].tensor(SITE, layer=LAYER)
        assert first.shape == last.shape == (12, 16)
        assert (first != last).any()


def test_a_reader_tells_times_and_memory_on_the_way(folder: Path) -> None:
    found = read_store(str(folder))
    assert min(found["open_seconds"], found["first_by_key_ms"], found["first_by_number_ms"]) > 0
    walked = found["iterate"]
    assert walked["microseconds_per_sample"] > 0
    assert list(walked["mib"]) == ["10%", "50%", "100%"]


def test_a_walk_that_misses_samples_is_no_measurement() -> None:
    with pytest.raises(AssertionError, match=r"\(2, 3\)"):
        walk([1, 2], 3, lambda sample: sample)


def test_the_reader_imports_nothing_that_reading_does_not_need() -> None:
    code = "import sys, benchmarks.cold; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'tracekit')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_memory_that_grows_and_finishing_that_slows_down_are_not_met() -> None:
    (flat, growing) = memory_ratios(
        {
            "a": {"iterate": {"mib": {"10%": {"all": 100.0}, "100%": {"all": 101.0}}}},
            "b": {"iterate": {"mib": {"10%": {"all": 100.0}, "100%": {"all": 200.0}}}},
            "no walk": {"mib": {}},
        }
    )
    assert (flat.is_met, growing.is_met, growing.median) == (True, False, 2.0)
    times, memory = finish_ratios(
        {
            10: {"finish_seconds": 1.0, "mib_after_finish": 100.0},
            100: {"finish_seconds": 20.0, "mib_after_finish": 150.0},
        }
    )
    assert (times.median, times.is_met, memory.median) == (2.0, False, 1.5)
