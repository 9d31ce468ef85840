"""Memory watch: how full a device is between batches, and what follows from it.

    used share      decision
    above 0.95      stop: what is done has been written; MemoryPressureError
    above 0.90      warn, once a level, and pause a second
    below 0.40      the batch may grow to twice its size, up to a maximum, between levels
    else            go on

On CUDA the share is that of the whole device, whoever uses it; what torch only keeps for later is given back before
anything above 0.90 is believed. On the CPU it is the host's, 1 - MemAvailable / MemTotal of /proc/meminfo.
On other devices, and where there is no /proc/meminfo, the watch is off and says so. Of several devices, the fullest
counts.
"""

import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from accelerate.utils.memory import should_reduce_batch_size

from tracekit.errors import MemoryPressureError
from tracekit.talk import say

__all__ = ["Decision", "MemoryReader", "MemoryWatch", "decide", "is_out_of_memory", "memory_reader", "num_fitting"]

Decision: TypeAlias = Literal["stop", "warn", "go on", "grow"]
"""What follows from a share."""

_STOP_ABOVE = 0.95
_WARN_ABOVE = 0.90
_GROW_BELOW = 0.40
_PAUSE_SECONDS = 1.0
_OUT_OF_MEMORY = (
    "error: out of memory",  # CUDA and HIP, where a context finds no room, as on a device that others fill
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",  # a mapped checkpoint
    "std::bad_alloc",
)
"""What RuntimeErrors say of missing memory, beside what accelerate knows."""


def decide(used_share: float) -> Decision:
    """What follows from a used share of memory, 0 to 1."""
    if used_share > _STOP_ABOVE:
        return "stop"
    if used_share > _WARN_ABOVE:
        return "warn"
    return "grow" if used_share < _GROW_BELOW else "go on"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a batch did not fit, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(part in str(error) for part in _OUT_OF_MEMORY)


class MemoryReader(NamedTuple):
    """How a device's memory is read."""

    name: str
    """What is watched, for messages."""
    read: Callable[[], float] | None
    """The used share now, 0 to 1; None where it cannot be known."""
    release: Callable[[], None]
    """Give back what is kept and not in use."""


def memory_reader(*devices: torch.device, meminfo: Path = Path("/proc/meminfo")) -> MemoryReader:
    """The reader of a device, or of the fullest of several, those left out that cannot be read."""
    readers = [_reader(device, meminfo) for device in devices]
    if len(readers) == 1:
        return readers[0]

    def release() -> None:
        for reader in readers:
            reader.release()

    reads = [reader.read for reader in readers if reader.read is not None]
    name = f"the fullest of {', '.join(reader.name for reader in readers)}"
    return MemoryReader(name, (lambda: max(read() for read in reads)) if reads else None, release)


def num_fitting(devices: Sequence[torch.device], run: Callable[[], object], *, share: float) -> int | None:
    """How often what `run` needs while it runs fits into a share of the free memory, on the device where it fits least
    often; None where no device can tell (CUDA can)."""
    watched = [device for device in devices if device.type == "cuda"]
    if not watched:
        return None
    torch.cuda.empty_cache()
    for device in watched:
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in watched]
    run()
    needed = [
        max(1, torch.cuda.max_memory_allocated(device) - was) for device, was in zip(watched, before, strict=True)
    ]
    free = [torch.cuda.mem_get_info(device)[0] for device in watched]
    return min(int(there * share / each) for there, each in zip(free, needed, strict=True))


def _reader(device: torch.device, meminfo: Path) -> MemoryReader:
    if device.type == "cuda":
        return MemoryReader(f"memory of {device}", lambda: _cuda_share(device), torch.cuda.empty_cache)
    if device.type == "cpu" and meminfo.exists():
        return MemoryReader("host memory", lambda: _host_share(meminfo), lambda: None)
    return MemoryReader(f"memory of {device}", None, lambda: None)


def _cuda_share(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def _host_share(meminfo: Path) -> float:
    """From lines like `MemAvailable:   12345678 kB`."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return 1 - available / total


class MemoryWatch:
    """Looks at a device's memory over a run.

    `note` says what is watched, or that nothing is, for the log.
    """

    def __init__(
        self, reader: MemoryReader, *, max_batch_size: int, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._reader, self._max_batch_size, self._sleep = reader, max_batch_size, sleep
        self._has_warned = False
        self.note = (
            f"watching {reader.name}" if reader.read else f"the memory watch is off: no reading of {reader.name}"
        )

    def used_share(self) -> float | None:
        """The used share now, 0 to 1; None where the watch is off."""
        return None if self._reader.read is None else self._reader.read()

    def start_level(self) -> None:
        """A level begins: the next warning is said again."""
        self._has_warned = False

    def check(self) -> None:
        """Look, to be called between batches when what they gave is written; warns and pauses where memory is short.

        Raises:
            MemoryPressureError: above 95 %.
        """
        share = self.used_share()
        if share is None or decide(share) not in ("stop", "warn"):
            return
        self._reader.release()
        share = self.used_share()
        assert share is not None
        if decide(share) == "stop":
            raise MemoryPressureError(
                f"{self._reader.name}: {share:.1%} used, above {_STOP_ABOVE:.0%}. What is finished is saved; run the "
                "same command again when less lies beside it on the device, or with a smaller --batch-size"
            )
        if decide(share) == "warn":
            if not self._has_warned:
                say(f"{self._reader.name}: {share:.1%} used, above {_WARN_ABOVE:.0%}; pausing after every batch")
                self._has_warned = True
            self._sleep(_PAUSE_SECONDS)

    def grown(self, batch_size: int) -> int:
        """The batch size of the next level: twice as large where memory is plentiful, at most the maximum; else as it
        is. The share is that of the level before, since torch keeps what a batch needed."""
        share = self.used_share()
        if share is None or decide(share) != "grow":
            return batch_size
        return max(batch_size, min(self._max_batch_size, 2 * batch_size))
