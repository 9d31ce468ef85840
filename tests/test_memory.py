"""The memory watch: decisions by share, and what follows from them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from builders.degradation.memory_watch import MemoryWatch, decide
from tracekit.errors import MemoryPressureError
from tracekit.model.memory import MemoryReader, memory_reader


class Fake:
    """A device whose readings are written down beforehand."""

    def __init__(self, readings: Sequence[float]) -> None:
        self.readings = list(readings)
        self.num_released = 0
        self.slept: list[float] = []

    def watch(self, max_batch_size: int = 40) -> MemoryWatch:
        def release() -> None:
            self.num_released += 1

        reader = MemoryReader("memory of fake", lambda: self.readings.pop(0), release)
        return MemoryWatch(reader, max_batch_size=max_batch_size, sleep=self.slept.append)


@pytest.mark.parametrize(
    ("share", "decision"),
    [
        (0.0, "grow"),
        (0.399, "grow"),
        (0.40, "go on"),
        (0.90, "go on"),
        (0.901, "warn"),
        (0.95, "warn"),
        (0.951, "stop"),
        (1.0, "stop"),
    ],
)
def test_what_follows_from_a_share(share: float, decision: str) -> None:
    assert decide(share) == decision


def test_nothing_is_said_while_there_is_room(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake([0.2, 0.9])
    watch = fake.watch()
    watch.check()
    watch.check()
    assert (fake.slept, fake.num_released, capsys.readouterr().err) == ([], 0, "")


def test_a_warning_is_said_once_a_level_and_every_batch_waits(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake([0.92] * 6)
    watch = fake.watch()
    watch.start_level()
    watch.check()
    watch.check()
    said = "tracekit: memory of fake: 92.0% used, above 90%; pausing after every batch\n"
    assert capsys.readouterr().err == said
    watch.start_level()
    watch.check()
    assert capsys.readouterr().err == said
    assert fake.slept == [1.0, 1.0, 1.0]


def test_memory_that_is_nearly_full_stops() -> None:
    fake = Fake([0.97, 0.96])
    with pytest.raises(MemoryPressureError) as caught:
        fake.watch().check()
    assert str(caught.value) == (
        "memory of fake: 96.0% used, above 95%. What is finished is saved; run the same command again when less "
        "lies beside it on the device, or with a smaller --batch-size"
    )
    assert (fake.num_released, fake.slept) == (1, [])


@pytest.mark.parametrize(("after", "slept"), [(0.5, []), (0.93, [1.0])])
def test_what_is_only_kept_for_later_is_given_back_before_a_reading_counts(after: float, slept: list[float]) -> None:
    fake = Fake([0.99, after])
    fake.watch().check()
    assert (fake.num_released, fake.slept) == (1, slept)


@pytest.mark.parametrize(
    ("share", "before", "after"),
    [(0.39, 5, 10), (0.39, 30, 40), (0.39, 40, 40), (0.4, 5, 5), (0.99, 5, 5), (0.1, 50, 50)],
)
def test_a_batch_grows_where_there_is_plenty_up_to_the_maximum(share: float, before: int, after: int) -> None:
    assert Fake([share]).watch(40).grown(before) == after


def test_the_host_is_watched_by_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       1000 kB\nMemFree:          10 kB\nMemAvailable:    250 kB\nHugePages_Total: 0\n"
    )
    watch = MemoryWatch(memory_reader(torch.device("cpu"), meminfo=meminfo), max_batch_size=4)
    assert watch.used_share() == 0.75
    assert watch.note == "watching host memory"
    meminfo.write_text("MemTotal:       1000 kB\nMemAvailable:    20 kB\n")
    with pytest.raises(MemoryPressureError, match=r"^host memory: 98\.0% used"):
        watch.check()


def test_where_nothing_can_be_read_the_watch_is_off_and_says_so(tmp_path: Path) -> None:
    watch = MemoryWatch(memory_reader(torch.device("cpu"), meminfo=tmp_path / "none"), max_batch_size=40)
    assert watch.note == "the memory watch is off: no reading of memory of cpu"
    assert watch.used_share() is None
    watch.check()
    assert watch.grown(5) == 5
    mps = MemoryWatch(memory_reader(torch.device("mps")), max_batch_size=40)
    assert mps.note == "the memory watch is off: no reading of memory of mps"


def test_a_cuda_device_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (25, 100) if device.index == 1 else (100, 100))
    watch = MemoryWatch(memory_reader(torch.device("cuda:1")), max_batch_size=40)
    assert (watch.used_share(), watch.note) == (0.75, "watching memory of cuda:1")
