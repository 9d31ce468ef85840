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

import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from tracekit.console import say
from tracekit.errors import MemoryPressureError
from tracekit.model.memory import MemoryReader

__all__ = ["Decision", "MemoryWatch", "decide"]

Decision: TypeAlias = Literal["stop", "warn", "go on", "grow"]
"""What follows from a share."""

_STOP_ABOVE = 0.95
_WARN_ABOVE = 0.90
_GROW_BELOW = 0.40
_PAUSE_SECONDS = 1.0


def decide(used_share: float) -> Decision:
    """What follows from a used share of memory, 0 to 1."""
    if used_share > _STOP_ABOVE:
        return "stop"
    if used_share > _WARN_ABOVE:
        return "warn"
    return "grow" if used_share < _GROW_BELOW else "go on"


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
