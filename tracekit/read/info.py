"""Info: what a store holds, summed up for people (`TraceStore.info`) and as plain values (`TraceStore.meta`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tracekit.format.manifest import SplitInfo, TensorSummary, Verification
from tracekit.hub import HubPath
from tracekit.read.index import Folder, together
from tracekit.records import ModelInfo

__all__ = ["StoreInfo", "meta_of", "sum_up"]


class StoreInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds."""

    paths: list[str]
    """The folders."""
    configs: list[str]
    """Configuration read of each folder."""
    task: str
    """Name of the task."""
    models: list[ModelInfo]
    """The models, each once."""
    splits: list[SplitInfo]
    """Splits."""
    num_samples: int
    """Samples."""
    num_bytes: int
    """Bytes of the shards."""
    tensors: list[TensorSummary]
    """What is stored of each sample."""
    verification: Verification
    """What replays showed while the data was made: the largest errors per site."""
    is_open: bool
    """True where the run is not finished: more samples may come."""


def sum_up(folders: Sequence[Folder], paths: Sequence[Path | HubPath], num_samples: int) -> StoreInfo:
    """What these folders hold together."""
    splits: dict[str, SplitInfo] = {}
    tensors: dict[tuple[str, str, str], TensorSummary] = {}
    for one in (split for folder in folders for split in folder.splits):
        before = splits.get(one.name, SplitInfo(name=one.name, num_samples=0, num_bytes=0))
        samples, num_bytes = before.num_samples + one.num_samples, before.num_bytes + one.num_bytes
        splits[one.name] = SplitInfo(name=one.name, num_samples=samples, num_bytes=num_bytes)
    for one in (tensor for folder in folders for tensor in folder.tensors):
        kind = (one.name, one.dtype, one.layout)
        num_bytes = one.num_bytes + (tensors[kind].num_bytes if kind in tensors else 0)
        tensors[kind] = msgspec.structs.replace(one, num_bytes=num_bytes)
    models = [folder.description.model for folder in folders]
    return StoreInfo(
        paths=[str(path) for path in paths],
        configs=[folder.config for folder in folders],
        task=folders[0].description.task,
        models=[model for i, model in enumerate(models) if model not in models[:i]],
        splits=list(splits.values()),
        num_samples=num_samples,
        num_bytes=sum(shard.num_bytes for folder in folders for shard in folder.shards),
        tensors=list(tensors.values()),
        verification=together(folder.verification for folder in folders),
        is_open=any(folder.is_open for folder in folders),
    )


def meta_of(folder: Folder) -> dict[str, Any]:
    """One folder's manifest, of an open one its plan with what is there so far, as plain values.

    `config task schema_version model source run device_type versions command` as the run began with, `splits tensors
    verification num_samples num_shards num_bytes is_open` as it is now.
    """
    stated = folder.description
    names = ("config", "task", "schema_version", "model", "source", "run", "device_type", "versions", "command")
    counts = {
        "splits": folder.splits,
        "tensors": folder.tensors,
        "verification": folder.verification,
        "num_samples": sum(split.num_samples for split in folder.splits),
        "num_shards": len(folder.shards),
        "num_bytes": sum(shard.num_bytes for shard in folder.shards),
        "is_open": folder.is_open,
    }
    return msgspec.to_builtins({**{name: getattr(stated, name) for name in names}, **counts})
