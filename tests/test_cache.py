"""The cache of byte ranges: what is in it, what another process put there, what is let go, and disks that are full."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tracekit.cache import RangeCache, cache_folder
from tracekit.errors import ConfigError

DATA = bytes(range(256)) * 4
ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def cache(tmp_path: Path) -> RangeCache:
    return RangeCache(tmp_path / "ranges")


def names(folder: Path) -> set[str]:
    """Every file under a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_was_written_is_read_and_nothing_else(cache: RangeCache):
    assert cache.read(ONE, 100, 200) is None
    assert not cache.has(ONE, 100, 200)
    cache.write(ONE, 100, DATA[100:200])
    assert cache.has(ONE, 100, 200)
    assert cache.read(ONE, 100, 200) == DATA[100:200]
    assert cache.read(TWO, 100, 200) is None


@pytest.mark.parametrize(("start", "stop"), [(100, 101), (120, 180), (199, 200), (150, 150)])
def test_a_part_of_a_range_is_there(cache: RangeCache, start: int, stop: int):
    cache.write(ONE, 100, DATA[100:200])
    assert cache.has(ONE, start, stop)
    assert cache.read(ONE, start, stop) == DATA[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(99, 101), (150, 201), (0, 10), (200, 210), (99, 201)])
def test_what_lies_only_partly_in_a_range_is_not(cache: RangeCache, start: int, stop: int):
    cache.write(ONE, 100, DATA[100:200])
    cache.write(ONE, 300, DATA[300:400])
    assert not cache.has(ONE, start, stop)
    assert cache.read(ONE, start, stop) is None


def test_another_process_finds_the_ranges(tmp_path: Path):
    RangeCache(tmp_path).write(ONE, 100, DATA[100:200])
    fresh = RangeCache(tmp_path)
    assert fresh.read(ONE, 110, 120) == DATA[110:120]


def test_files_that_are_no_whole_range_do_not_count(tmp_path: Path):
    folder = tmp_path / ONE
    folder.mkdir()
    (folder / "0-100").write_bytes(DATA[:50])  # cut short
    (folder / "100-200.77.partial").write_bytes(DATA[100:200])
    (folder / "notes").write_bytes(b"")
    (folder / "-5").write_bytes(b"")
    cache = RangeCache(tmp_path)
    assert not cache.has(ONE, 0, 100)
    assert cache.read(ONE, 0, 100) is None
    assert cache.read(ONE, 100, 200) is None


def test_a_range_that_another_process_has_let_go_or_cut_is_read_as_not_there(cache: RangeCache, tmp_path: Path):
    cache.write(ONE, 0, DATA[:100])
    path = tmp_path / "ranges" / ONE / "0-100"
    path.write_bytes(DATA[:40])
    assert cache.read(ONE, 0, 100) is None
    path.unlink()
    assert cache.read(ONE, 0, 100) is None
    cache.write(ONE, 0, DATA[:100])
    assert cache.read(ONE, 0, 100) == DATA[:100]


def test_no_temporary_file_stays(cache: RangeCache, tmp_path: Path):
    cache.write(ONE, 0, DATA[:100])
    cache.write(ONE, 0, DATA[:100])
    assert names(tmp_path) == {f"ranges/{ONE}/0-100"}


# ---------------------------------------------------------------- limit


def old_ranges(folder: Path) -> None:
    """Four ranges of 100 bytes; the one at 200 was used last, then those at 0, 300, 100."""
    earlier = RangeCache(folder)
    for start, age in ((0, 20), (100, 40), (200, 10), (300, 30)):
        sha256 = ONE if start < 200 else TWO
        earlier.write(sha256, start, DATA[start : start + 100])
        os.utime(folder / sha256 / f"{start}-{start + 100}", (1_000_000_000 - age, 1_000_000_000 - age))


def test_the_least_recently_used_ranges_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_ranges(tmp_path)
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "250")
    cache = RangeCache(tmp_path)
    cache.write(ONE, 500, DATA[500:510])
    assert names(tmp_path) == {f"{ONE}/0-100", f"{TWO}/200-300", f"{ONE}/500-510"}
    assert not cache.has(ONE, 100, 200)
    assert cache.read(ONE, 0, 100) == DATA[:100]
    assert cache.read(ONE, 500, 510) == DATA[500:510]


def test_reading_a_range_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_ranges(tmp_path)
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "110")
    cache = RangeCache(tmp_path)
    assert cache.read(ONE, 150, 160) == DATA[150:160]
    cache.write(TWO, 500, DATA[500:510])
    assert names(tmp_path) == {f"{ONE}/100-200", f"{TWO}/500-510"}


def test_nothing_goes_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_ranges(tmp_path)
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "410")
    RangeCache(tmp_path).write(ONE, 500, DATA[500:510])
    assert len(names(tmp_path)) == 5


def test_a_process_that_goes_on_writing_stays_near_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "500")
    cache = RangeCache(tmp_path)
    for start in range(0, 1000, 20):
        cache.write(ONE, start, DATA[start : start + 20])
        assert 20 * len(names(tmp_path)) <= 550
        assert cache.read(ONE, start, start + 20) == DATA[start : start + 20]
    assert 20 * len(names(tmp_path)) >= 400


def test_reading_alone_lets_nothing_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_ranges(tmp_path)
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "1")
    assert RangeCache(tmp_path).read(ONE, 0, 100) == DATA[:100]
    assert len(names(tmp_path)) == 4


# ---------------------------------------------------------------- disks


def test_a_full_disk_is_no_error(cache: RangeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    cache.write(ONE, 0, DATA[:100])
    monkeypatch.setattr(Path, "write_bytes", full)
    cache.write(ONE, 100, DATA[100:200])
    assert cache.read(ONE, 100, 200) == DATA[100:200], "kept in memory, so that it is not fetched again"
    assert cache.has(ONE, 120, 180)
    assert RangeCache(tmp_path / "ranges").read(ONE, 100, 200) is None
    assert cache.read(ONE, 0, 100) == DATA[:100]
    assert names(tmp_path) == {f"ranges/{ONE}/0-100"}


def test_a_folder_that_cannot_be_made_is_no_error_and_memory_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tracekit.cache.MAX_MEMORY_BYTES", 250)
    (tmp_path / "file").write_bytes(b"in the way")
    cache = RangeCache(tmp_path / "file")
    for start in (0, 100, 200):
        cache.write(ONE, start, DATA[start : start + 100])
    assert cache.read(ONE, 0, 100) is None, "the oldest goes first"
    assert not cache.has(ONE, 0, 100)
    assert cache.read(ONE, 110, 190) == DATA[110:190]
    assert cache.read(ONE, 150, 250) is None
    assert cache.read(TWO, 100, 200) is None
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_ranges(tmp_path)
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "1")
    cache = RangeCache(tmp_path)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    for place, name in ((os, "utime"), (Path, "unlink"), (Path, "write_bytes"), (Path, "mkdir")):
        monkeypatch.setattr(place, name, refuse)
    assert cache.read(ONE, 0, 100) == DATA[:100]
    cache.write(ONE, 500, DATA[500:510])
    assert len(names(tmp_path)) == 4
    assert cache.read(ONE, 0, 100) == DATA[:100]


def test_a_range_that_goes_while_the_folder_is_listed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old_ranges(tmp_path)
    real = Path.stat

    def gone(self: Path, **options: bool) -> os.stat_result:
        if self.name == "100-200":
            raise FileNotFoundError(self)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", gone)
    cache = RangeCache(tmp_path)
    assert cache.read(ONE, 0, 100) == DATA[:100]
    assert not cache.has(ONE, 100, 200)


def test_threads_that_write_and_let_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", "300")
    cache = RangeCache(tmp_path)

    def work(number: int) -> None:
        start = number % 20 * 50
        cache.write(ONE, start, DATA[start : start + 50])
        assert cache.read(ONE, start, start + 50) in (None, DATA[start : start + 50])

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(work, range(400))) == [None] * 400
    assert all(path.stat().st_size == 50 and path.suffix == "" for path in (tmp_path / ONE).iterdir())


@pytest.mark.parametrize("limit", ["20GB", "-1", "1e9", " 5"])
def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str):
    monkeypatch.setenv("TRACEKIT_CACHE_BYTES", limit)
    with pytest.raises(ConfigError) as caught:
        RangeCache(tmp_path)
    assert str(caught.value) == f"TRACEKIT_CACHE_BYTES is {limit!r}, expected a number of bytes, as 20000000000"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TRACEKIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/tracekit/ranges"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tracekit/ranges"),
        ({"TRACEKIT_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/tracekit/ranges"),
        ({"TRACEKIT_CACHE": "~/c"}, "/home/me/c/tracekit/ranges"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("TRACEKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder("ranges") == Path(expected)


# ---------------------------------------------------------------- damage


def test_what_is_dropped_is_in_no_range_that_held_it(cache: RangeCache, tmp_path: Path):
    for start, stop in ((0, 100), (50, 150), (90, 300), (200, 210)):
        cache.write(ONE, start, DATA[start:stop])
    cache.write(TWO, 0, DATA[:300])
    cache.drop(ONE, 92, 99)
    assert names(tmp_path) == {f"ranges/{ONE}/200-210", f"ranges/{TWO}/0-300"}
    assert cache.read(ONE, 92, 99) is None
    assert cache.read(ONE, 200, 210) == DATA[200:210]
    cache.write(ONE, 92, DATA[92:99])
    assert cache.read(ONE, 92, 99) == DATA[92:99]


def test_what_memory_keeps_is_dropped_too(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"in the way")
    cache = RangeCache(tmp_path / "file")
    cache.write(ONE, 0, DATA[:100])
    cache.write(ONE, 200, DATA[200:300])
    cache.drop(ONE, 10, 20)
    assert not cache.has(ONE, 10, 20)
    assert cache.has(ONE, 200, 300)


def test_a_range_is_synced_before_it_takes_its_name(cache: RangeCache, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("name"), replace(self, target))[1])
    cache.write(ONE, 0, DATA[:100])
    assert events == ["sync", "name"]
