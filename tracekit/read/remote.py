"""A published dataset, read where it is: the index is fetched once, then byte ranges of shards.

    list_configs    which configurations a dataset has, here or there
    open_remote     hf://datasets/owner/name@v1.0.0 -> a local folder with plans, manifests and record tables
    RemoteShards    bytes of its shards: from the cache, or by ranged requests, neighbours in one

The revision is resolved to a commit once, so a store never mixes two states of a branch.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tracekit.cache import RangeCache
from tracekit.errors import CorruptShardError, DatasetError
from tracekit.format.layout import Layout, choose_config, config_names, inside
from tracekit.format.manifest import read_manifest
from tracekit.hub import HubFile, HubPath, fetch

__all__ = ["ByteRange", "Listing", "Remote", "RemoteShards", "list_configs", "open_remote"]

MAX_GAP_BYTES = 64 * 1024
"""Neighbouring ranges with at most so much between them are read at once: a request costs more than these bytes."""
MAX_RANGE_BYTES = 16 * 1024 * 1024
"""Largest range of one request, so that several run side by side."""
NUM_CONNECTIONS = 8
"""Requests at the same time."""


class ByteRange(NamedTuple):
    """Bytes `[start, stop)` of a shard."""

    shard: Path
    start: int
    stop: int


class Remote(NamedTuple):
    """A published dataset, its index at hand."""

    root: Path
    """Local folder with plans, manifests and the record tables of the configuration; no shards."""
    config: str
    """The configuration."""
    path: HubPath
    """The repository at the commit that its revision named."""


class Listing(NamedTuple):
    """The configurations of a dataset, here or published."""

    path: Path | HubPath
    """The folder; of a published dataset the repository at the commit that its revision named."""
    root: Path
    """Local folder with its plans and manifests."""
    configs: list[str]
    """Names of the configurations, sorted; of a folder those that are not finished too."""


def list_configs(path: Path | HubPath) -> Listing:
    """Which configurations a dataset has.

    Raises:
        HubError: no such repository or revision, or no connection.
        DatasetError: no such folder, or it is no tracekit dataset.
    """
    if isinstance(path, Path):
        return Listing(path, path, config_names(path))
    root = fetch(path, ["manifest.json", "plans/*.json", "manifests/*.json", "labels/*/*.json"])
    if not inside(root, "manifest.json").exists():
        raise DatasetError(f"{path} is not a tracekit dataset: it holds no manifest.json")
    return Listing(path.at(root.name), root, config_names(root))  # the client names the folder for the commit


def open_remote(path: HubPath, config: str | None) -> Remote:
    """Fetch the index of one configuration.

    Raises:
        HubError: no such repository or revision, or no connection.
        DatasetError: the repository is no tracekit dataset, or has no such configuration.
    """
    pinned, _, names = list_configs(path)
    assert isinstance(pinned, HubPath), pinned
    chosen = choose_config(names, config, path)
    return Remote(fetch(pinned, [f"records/{chosen}/*.parquet"]), chosen, pinned)


class RemoteShards:
    """Bytes of a published configuration's shards.

    What was read is kept in `cache` (tracekit.cache). Can be used from several threads. `path` is the repository at
    its commit.
    """

    def __init__(self, remote: Remote, cache: RangeCache) -> None:
        manifest = read_manifest(Layout(remote.root, remote.config))
        self._cache = cache
        self.path = remote.path
        self._files: dict[Path, HubFile] = {}
        self._info: dict[Path, tuple[int, str]] = {}
        for shard in manifest.shards:
            local = Layout(remote.root, remote.config).shard(shard.name)
            name = local.relative_to(remote.root).as_posix()
            self._files[local] = HubFile(remote.path, name, num_bytes=shard.num_bytes, sha256=shard.sha256)
            self._info[local] = (shard.num_bytes, shard.sha256)

    def view(self, shard: Path, offset: int, size: int) -> memoryview:
        """Bytes `[offset, offset + size)` of a shard, read-only.

        Raises:
            CorruptShardError: the shard ends before these bytes, or the Hub holds another one.
            HubError: the Hub cannot be reached.
        """
        num_bytes, sha256 = self._info[shard]
        if offset < 0 or size < 0 or offset + size > num_bytes:
            raise CorruptShardError(
                f"{shard.name}: bytes {offset} to {offset + size} are asked for, the shard has {num_bytes}"
            )
        if size == 0:
            return memoryview(b"")
        data = self._cache.read(sha256, offset, offset + size)
        if data is None:
            data = self._files[shard].read(offset, offset + size)
            self._cache.write(sha256, offset, data)
        return memoryview(data)

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Read ranges into the cache, several at once; neighbouring ones in one request.

        Raises: as `view`.
        """
        wanted = [one for one in ranges if not self._cache.has(self._info[one.shard][1], one.start, one.stop)]
        merged = merge_ranges(wanted)
        if not merged:
            return
        with ThreadPoolExecutor(max_workers=min(NUM_CONNECTIONS, len(merged))) as pool:
            for _ in pool.map(lambda one: self.view(one.shard, one.start, one.stop - one.start), merged):
                pass

    def release(self, shard: Path) -> None:
        """Nothing is held: what was read lies in the cache."""

    def close(self) -> None:
        """Nothing is held open."""


def merge_ranges(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Ranges in order, neighbours joined where little lies between them, none of them twice."""
    merged: list[ByteRange] = []
    for one in sorted(set(ranges)):
        last = merged[-1] if merged else None
        if (
            last is not None
            and one.shard == last.shard
            and one.start <= last.stop + MAX_GAP_BYTES
            and one.stop - last.start <= max(MAX_RANGE_BYTES, last.stop - last.start)
        ):
            merged[-1] = last._replace(stop=max(last.stop, one.stop))
        else:
            merged.append(one)
    return merged
