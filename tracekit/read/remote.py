"""A published dataset, read where it is: the index is fetched once, then byte ranges of shards.

    list_configs    which configurations a dataset has, here or there
    open_remote     hf://datasets/owner/name@v1.0.0 -> a local folder with plans, manifests and record tables
    RemoteShards    bytes of its shards: from the cache, or by ranged requests, neighbours in one

The revision is resolved to a commit once, so a store never mixes two states of a branch. Nothing is read unchecked:

    manifest.json -> SHA-256 of each manifest -> SHA-256 of plan and record tables -> checksum of each piece of a shard
    summary of a label set -> SHA-256 of its labels
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tracekit.cache import RangeCache
from tracekit.errors import CorruptShardError, DatasetError
from tracekit.format.checksums import Pieces
from tracekit.format.layout import Layout, choose_config, config_names, files_inside, inside
from tracekit.format.manifest import Index, Manifest, read_manifest, read_struct
from tracekit.format.shards import sha256_file
from tracekit.hub import HubFile, HubPath, fetch
from tracekit.records import check_schema

__all__ = ["ByteRange", "Listing", "RemoteConfig", "RemoteShards", "check_files", "list_configs", "open_remote"]

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


class RemoteConfig(NamedTuple):
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
    pinned = path.at(root.name)  # the client names the folder for the commit
    listed = {one.name: one.manifest_sha256 for one in read_struct(inside(root, "manifest.json"), Index).configs}
    there = {one.stem for one in files_inside(root, "manifests", "*.json")}
    check_files(pinned, root, {f"manifests/{name}.json": listed.get(name, "") for name in there})
    return Listing(pinned, root, config_names(root))


def open_remote(path: HubPath, config: str | None) -> RemoteConfig:
    """Fetch the index of one configuration.

    Raises:
        HubError: no such repository or revision, or no connection.
        DatasetError: the repository is no tracekit dataset, or has no such configuration.
    """
    pinned, root, names = list_configs(path)
    assert isinstance(pinned, HubPath), pinned
    layout = Layout(root, choose_config(names, config, path))
    manifest = read_struct(layout.manifest, Manifest)
    check_schema(manifest.schema_version, where=path)
    tables = [layout.records_table(split.name).relative_to(root).as_posix() for split in manifest.splits]
    schema = layout.schema.relative_to(root).as_posix()
    fetch(pinned, [*tables, schema])
    sha256 = {file.path: file.sha256 for file in manifest.files}
    plan = layout.plan.relative_to(root).as_posix()
    check_files(pinned, root, {name: sha256.get(name, "") for name in (plan, schema, *tables)})
    return RemoteConfig(root, layout.config, pinned)


def check_files(path: HubPath, root: Path, expected: Mapping[str, str]) -> None:
    """Check the SHA-256 of fetched files; those that have another are fetched once more. Empty: the file is unknown.

    Raises:
        CorruptShardError: a file still has another one.
        HubError: the Hub cannot be reached.
    """
    wrong = dict(expected)
    for is_last in (False, True):
        wrong = {
            name: sha256
            for name, sha256 in wrong.items()
            if not (root / name).is_file() or sha256_file(root / name) != sha256
        }
        if wrong and not is_last:
            fetch(path, list(wrong), again=True)
    for name, sha256 in wrong.items():
        found = sha256_file(root / name) if (root / name).is_file() else "no such file"
        raise CorruptShardError(
            f"{name} of {path} is damaged: its SHA-256 is {found}, expected {sha256 or 'none'}. It was fetched twice: "
            "try again later, or tell the author of the dataset"
        )


class RemoteShards:
    """Bytes of a published configuration's shards.

    What was read is kept in `cache` (tracekit.cache). Can be used from several threads. `path` is the repository at
    its commit.
    """

    def __init__(self, remote: RemoteConfig, cache: RangeCache) -> None:
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

    def view(self, shard: Path, offset: int, size: int, pieces: Pieces | None) -> memoryview:
        """Bytes `[offset, offset + size)` of a shard, read-only; the pieces that hold them are read whole and checked.

        A cached range that is damaged is dropped and fetched again.

        Raises:
            CorruptShardError: the shard ends before these bytes, what was fetched is damaged, or the Hub holds another
                shard.
            HubError: the Hub cannot be reached.
        """
        start, stop = pieces.widened(offset, offset + size) if pieces and size else (offset, offset + size)
        num_bytes, sha256 = self._info[shard]
        if start < 0 or size < 0 or stop > num_bytes:
            raise CorruptShardError(f"{shard.name}: bytes {start} to {stop} are asked for, the shard has {num_bytes}")
        if size == 0:
            return memoryview(b"")
        data = self._cache.read(sha256, start, stop)
        if data is not None and pieces and pieces.damaged(start, memoryview(data)):
            self._cache.drop(sha256, start, stop)
            data = None
        if data is None:
            data = self._files[shard].read(start, stop)
            if pieces and (damage := pieces.damaged(start, memoryview(data))):
                raise CorruptShardError(f"{damage}. {self.path} sent it so: try again, or tell its author")
            self._cache.write(sha256, start, data)
        return memoryview(data)[offset - start : offset - start + size]

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Read ranges into the cache, several at once; neighbouring ones in one request. `view` checks them later.

        Raises: as `view`.
        """
        wanted = [one for one in ranges if not self._cache.has(self._info[one.shard][1], one.start, one.stop)]
        merged = merge_ranges(wanted)
        if not merged:
            return
        with ThreadPoolExecutor(max_workers=min(NUM_CONNECTIONS, len(merged))) as pool:
            for _ in pool.map(lambda one: self.view(one.shard, one.start, one.stop - one.start, None), merged):
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
