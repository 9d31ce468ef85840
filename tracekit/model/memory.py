"""Memory of devices: how full they are, and whether an error says that they are.

On CUDA the share is that of the whole device, whoever uses it. On the CPU it is the host's, 1 - MemAvailable / MemTotal
of /proc/meminfo. On other devices, and where there is no /proc/meminfo, it cannot be known. Of several devices, the
fullest counts.
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size

__all__ = ["MemoryReader", "is_out_of_memory", "memory_reader", "num_fitting"]

_OUT_OF_MEMORY = (
    "error: out of memory",  # CUDA and HIP, where a context finds no room, as on a device that others fill
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",  # a mapped checkpoint
    "std::bad_alloc",
)
"""What RuntimeErrors say of missing memory, beside what accelerate knows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a batch did not fit, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = " ".join(map(str, error.args))
    return should_reduce_batch_size(RuntimeError(said)) or any(part in said for part in _OUT_OF_MEMORY)


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
