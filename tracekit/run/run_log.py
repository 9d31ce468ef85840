"""The run log: one line a computed batch, beside the dataset: when, how long, on what device.

logs/<config>.jsonl    {"time", "shard", "batch", "parts", "num_samples", "seconds", "device", ...}
"""

from collections.abc import Iterator
from typing import Annotated

import msgspec

from tracekit.errors import UNREADABLE
from tracekit.format.layout import Layout, read_whole
from tracekit.format.manifest import Sidecar, read_plan, read_struct

__all__ = ["LogLine", "batch_times", "log_lines"]


class LogLine(msgspec.Struct):
    """A line of the run log: one computed batch."""

    time: str
    shard: str
    batch: int
    parts: list[int]
    num_samples: Annotated[int, msgspec.Meta(ge=1)]
    seconds: float
    device: str
    used_memory_share: float | None = None


def log_lines(layout: Layout) -> Iterator[LogLine]:
    """The lines of the run log in order; what a crash cut short is left out: its batch was computed again."""
    for text in read_whole(layout.log).splitlines() if layout.log.exists() else []:
        try:
            yield msgspec.json.decode(text, type=LogLine)
        except UNREADABLE:
            continue


def batch_times(layout: Layout) -> dict[str, str]:
    """When each sample was made, by key, as the run log says it (ISO 8601, local time with offset).

    A sample has the time of its batch; of a batch that was computed twice, the last time. Samples that the log or the
    sidecars (which a downloaded dataset does not have) know nothing of are left out.

    Raises:
        DatasetError: no such plan.
    """
    times = {(line.shard, line.batch): line.time for line in log_lines(layout)}
    found: dict[str, str] = {}
    for shard in read_plan(layout).shards:
        if not layout.sidecar(shard.name).exists():
            continue
        keys = [sample.key for sample in read_struct(layout.sidecar(shard.name), Sidecar).samples]
        num_each = len(keys) // max(1, sum(map(len, shard.batches)))  # an example may make several samples
        start = 0
        for number, batch in enumerate(shard.batches):
            stop = start + num_each * len(batch)
            if (shard.name, number) in times:
                found |= dict.fromkeys(keys[start:stop], times[shard.name, number])
            start = stop
    return found
