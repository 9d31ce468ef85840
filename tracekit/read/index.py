"""The index of a dataset folder: which rows there are, and where the bytes of each lie.

A finished configuration is indexed from its Parquet files, an open one (a plan and sidecars, no manifest yet) from its
sidecars. Shards are reached through `ShardBytes` alone: mapped, or by ranges on the Hub. Nothing here knows what the
bytes are read for.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracekit.cache import RangeCache
from tracekit.console import say
from tracekit.errors import CorruptShardError, DatasetError, TracekitError
from tracekit.format.checksums import Pieces
from tracekit.format.journal import read_journal
from tracekit.format.layout import Layout, choose_config, config_names, inside
from tracekit.format.manifest import (
    Manifest,
    Plan,
    Sidecar,
    SplitInfo,
    TensorSummary,
    Verification,
    read_manifest,
    read_plan,
    read_schema,
    read_struct,
    shard_names,
)
from tracekit.format.shards import sha256_file, size_fault
from tracekit.hub import HubPath
from tracekit.read.arrow_rows import Reader, column_reader
from tracekit.read.remote import ByteRange, RemoteShards, open_remote
from tracekit.read.tables import (
    CHECKSUMS,
    INDEX_COLUMNS,
    OLD_NAMES,
    SHARD,
    TENSOR_INDEX,
    records_table,
    tensor_summaries,
)
from tracekit.records import Record, RecordSchema, check_schema
from tracekit.task import record_type_of, the_task

__all__ = [
    "Folder",
    "MappedShards",
    "Shard",
    "ShardBytes",
    "TablePart",
    "open_folder",
    "schema_of",
    "shard_codes",
    "together",
]

_ENTRY_COLUMNS = (
    "tensors",
    TENSOR_INDEX,
    "token_ids",
    "prompt_length",
    "last_prompt_index",
    "first_answer_index",
    "last_answer_index",
)
_told: set[str] = set()  # of what it was said that its bytes are unchecked


class Shard(NamedTuple):
    """One shard: where it lies, its place in the dataset, and the size it must have."""

    path: Path
    split: str
    number: int
    num_bytes: int


class ShardBytes(Protocol):
    """Where the bytes of shards come from."""

    def view(self, shard: Path, offset: int, size: int, pieces: Pieces | None, /) -> memoryview:
        """Bytes `[offset, offset + size)` of a shard, of the sample that has these pieces."""
        ...

    def prefetch(self, ranges: Sequence[ByteRange], /) -> None:
        """Get ready to view these."""
        ...

    def release(self, shard: Path, /) -> None:
        """Let go of one shard: it is not read again soon. What was handed out of it stays valid."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class MappedShards:
    """Bytes of shards on this disk. Each is mapped when first read and stays so; no file stays open.

    With `is_checked` every piece is checked when it is first read. Without, reading is as fast as memory, and
    `tracekit verify` is what finds damage.
    """

    def __init__(self, shards: Iterable[Shard], *, is_checked: bool = False) -> None:
        self._sizes = {shard.path: shard.num_bytes for shard in shards}
        self._maps: dict[Path, memoryview] = {}
        self._is_checked = is_checked
        self._right: dict[Path, set[tuple[int, int]]] = {}

    def view(self, shard_path: Path, offset: int, size: int, pieces: Pieces | None) -> memoryview:
        """Bytes `[offset, offset + size)` of a shard, read-only.

        Raises:
            DatasetError: the shard is missing.
            CorruptShardError: the shard has not the size it should have, ends before these bytes, or is damaged there.
        """
        mapped = self._maps.get(shard_path)
        if mapped is None:
            mapped = self._maps[shard_path] = self._map(shard_path)
        if offset < 0 or size < 0 or offset + size > len(mapped):
            raise CorruptShardError(
                f"{shard_path}: bytes {offset} to {offset + size} are asked for, the shard has {len(mapped)}. "
                "Run `tracekit verify` on the dataset"
            )
        if self._is_checked and pieces is not None:
            self._check(shard_path, mapped, pieces.widened(offset, offset + size), pieces)
        return mapped[offset : offset + size]

    def _check(self, shard: Path, mapped: memoryview, span: tuple[int, int], pieces: Pieces) -> None:
        """Check whole pieces, where this was not done before."""
        right = self._right.setdefault(shard, set())
        if span in right:
            return
        damage = pieces.damaged(span[0], mapped[slice(*span)])
        if damage is not None:
            raise CorruptShardError(f"{damage}. Run `tracekit verify`, then fetch or make the shard again")
        right.add(span)

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        """Nothing to do: the shards are here."""

    def release(self, shard: Path) -> None:
        """Let go of one shard's map; it is mapped again when read again."""
        self._maps.pop(shard, None)
        self._right.pop(shard, None)

    def close(self) -> None:
        """Let go of every map; memory is returned once no array uses it."""
        self._maps.clear()

    def _map(self, path: Path) -> memoryview:
        try:
            # Arrow, because Python's mmap keeps a file descriptor for as long as the map lives
            with pa.memory_map(str(path)) as file:
                buffer = file.read_buffer(file.size())
        except OSError as error:
            raise DatasetError(
                f"shard {path} cannot be read ({error.strerror or 'not there'}): {_where_sent(path)}"
            ) from error
        if buffer.size != self._sizes[path]:
            fault = size_fault(path, self._sizes[path])
            raise CorruptShardError(
                f"{path} has {fault}. Run `tracekit verify` on the dataset, then fetch or make the shard again"
            )
        return memoryview(buffer)


def _where_sent(path: Path) -> str:
    """What to do about a shard that is not here."""
    root = path.parents[2]
    entries = read_journal(root).get(path.relative_to(root).as_posix())
    if not entries:
        return "was it freed or not downloaded? `tracekit verify` lists what is missing"
    where = f"hf://datasets/{entries[-1].repo}@{entries[-1].version}"
    return f"it was sent to the Hub and deleted here; once that version is released, TraceStore({where!r}) reads it"


class TablePart:
    """The rows of one split of one folder: a Parquet file, or a table in memory. Can be used from several threads."""

    def __init__(self, source: pq.ParquetFile | pa.Table, path: Path | None = None) -> None:
        self._source: Any = source
        self._path = path
        self._lock = threading.Lock()  # a ParquetFile must not be read by two threads at once
        self._groups: dict[int, dict[str, Reader]] = {}
        self._whole_group: tuple[int, pa.Table] | None = None
        if isinstance(source, pq.ParquetFile):
            groups = range(source.metadata.num_row_groups)
            self.schema, lengths = source.schema_arrow, [source.metadata.row_group(i).num_rows for i in groups]
        else:
            self.schema, lengths = source.schema, [source.num_rows]
        old = OLD_NAMES if SHARD not in self.schema.names else {}
        self._new_of = {stored: name for name, stored in old.items()}
        self._old_of = old
        names = [self._new_of.get(name, name) for name in self.schema.names]
        self.schema = pa.schema([one.with_name(name) for one, name in zip(self.schema, names, strict=True)])
        self._stops: list[int] = np.cumsum(lengths).tolist()

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns of every row."""
        if isinstance(self._source, pa.Table):
            return self._source.select(columns)
        with self._lock, _readable(self._path):
            return self._named(self._source.read(columns=self._stored(columns)))

    def _stored(self, columns: Iterable[str]) -> list[str]:
        return [self._old_of.get(name, name) for name in columns]

    def _named(self, table: pa.Table) -> pa.Table:
        """A table of schema 1.x with the columns' names of today."""
        return table.rename_columns([self._new_of.get(name, name) for name in table.column_names])

    def entry(self, row: int) -> dict[str, Any]:
        """The entry columns of one row, `num_tokens` in place of the tokens."""
        number, place = self._place(row)
        with self._lock, _readable(self._path):
            group = self._groups.get(number)
            if group is None:
                group = self._groups[number] = self._read_group(number)
            return {name: read(place) for name, read in group.items()}

    def record(self, row: int) -> dict[str, Any]:
        """One row with all its columns."""
        if isinstance(self._source, pa.Table):
            return self._source.slice(row, 1).to_pylist()[0]
        number, place = self._place(row)
        with self._lock, _readable(self._path):
            if self._whole_group is None or self._whole_group[0] != number:
                self._whole_group = (number, self._named(self._source.read_row_group(number)))
            return self._whole_group[1].slice(place, 1).to_pylist()[0]

    def release(self, row: int) -> None:
        """Let go of the entries that were read with this row's; reading them again is another read of the file."""
        if not isinstance(self._source, pa.Table):
            self._groups.pop(self._place(row)[0], None)

    def close(self) -> None:
        """Close the file."""
        if not isinstance(self._source, pa.Table):
            self._source.close()

    def _place(self, row: int) -> tuple[int, int]:
        """The row group that holds a row, and the row's place in it."""
        number = bisect_right(self._stops, row)
        return number, row - (self._stops[number - 1] if number else 0)

    def _read_group(self, number: int) -> dict[str, Reader]:
        columns = [name for name in (*_ENTRY_COLUMNS, CHECKSUMS) if name in self.schema.names]
        if isinstance(self._source, pa.Table):
            group = self._source.select(columns)
        else:
            group = self._named(self._source.read_row_group(number, columns=self._stored(columns)))
        num_tokens = pc.call_function("list_value_length", [group["token_ids"]])
        group = group.drop_columns("token_ids").append_column("num_tokens", num_tokens)
        return {name: column_reader(group[name].combine_chunks()) for name in group.column_names}


class Folder(NamedTuple):
    """One configuration of one folder, opened."""

    description: Manifest | Plan
    """Its manifest; of an open one its plan."""
    config: str
    schema: RecordSchema
    """Of its records as they are stored."""
    record_type: type[Record]
    """As what its records are read."""
    splits: list[SplitInfo]
    shards: list[Shard]
    parts: list[TablePart]
    tensors: list[TensorSummary]
    verification: Verification
    is_open: bool
    bytes_of: ShardBytes


def open_folder(path: Path | HubPath, config: str | None, *, check: bool = False) -> Folder:
    """Open one configuration of a folder, finished or not, or of a published dataset.

    What is read of a published dataset is always checked against its checksums; of a folder with `check`.
    """
    if isinstance(path, HubPath):
        remote = open_remote(path, config)
        folder = _open_finished(Layout(remote.root, remote.config))
        folder = folder._replace(bytes_of=RemoteShards(remote, RangeCache()))
    else:
        layout = Layout(path, choose_config(config_names(path), config, path))
        folder = (_open_finished if layout.manifest.exists() else _open_unfinished)(layout, check=check)
    if not check_schema(folder.description.schema_version, where=path) and str(path) not in _told:
        _told.add(str(path))
        version = folder.description.schema_version
        say(f"{path} has schema {version}, without checksums: what is read is unchecked. `tracekit verify` checks it")
    return folder


def _open_finished(layout: Layout, *, check: bool = False) -> Folder:
    """A configuration with a manifest: its rows are in Parquet files."""
    manifest = read_manifest(layout)
    columns = {CHECKSUMS} if check_schema(manifest.schema_version, where=layout.manifest) else set()
    schema = schema_of(layout, manifest.task)
    if check:
        _check_tables(layout, manifest)
    shards = [Shard(layout.shard(one.name), one.split, one.number, one.num_bytes) for one in manifest.shards]
    return Folder(
        description=manifest,
        config=layout.config,
        schema=schema,
        record_type=record_type_of(manifest.task, schema),
        splits=manifest.splits,
        shards=shards,
        parts=[_open_part(layout.records_table(one.name), one.num_samples, columns) for one in manifest.splits],
        tensors=manifest.tensors,
        verification=manifest.verification,
        is_open=False,
        bytes_of=MappedShards(shards, is_checked=check),
    )


def _open_unfinished(layout: Layout, *, check: bool = False) -> Folder:
    """A configuration without a manifest: its rows are in the sidecars of those shards that are done."""
    plan = read_plan(layout)
    has_checksums = check_schema(plan.schema_version, where=layout.plan)
    schema = schema_of(layout, plan.task)
    by_split: dict[str, list[Sidecar]] = {}
    for name in shard_names(layout, plan):
        if layout.sidecar(name).exists():
            split = name.rpartition("-")[0]
            by_split.setdefault(split, []).append(read_struct(layout.sidecar(name), Sidecar))
    shards = [
        Shard(layout.shard(one.name), split, one.number, one.num_bytes)
        for split, sidecars in by_split.items()
        for one in sidecars
    ]
    splits = [
        SplitInfo(
            name=split,
            num_samples=sum(len(one.samples) for one in sidecars),
            num_bytes=sum(one.num_bytes for one in sidecars),
        )
        for split, sidecars in by_split.items()
    ]
    tables = [records_table(schema, sidecars) for sidecars in by_split.values()] or [records_table(schema, [])]
    return Folder(
        description=plan,
        config=layout.config,
        schema=schema,
        record_type=record_type_of(plan.task, schema),
        splits=splits,
        shards=shards,
        parts=[TablePart(table if has_checksums else table.drop_columns(CHECKSUMS)) for table in tables],
        tensors=tensor_summaries(one for sidecars in by_split.values() for one in sidecars),
        verification=together(one.verification for sidecars in by_split.values() for one in sidecars),
        is_open=True,
        bytes_of=MappedShards(shards, is_checked=check),
    )


def schema_of(layout: Layout, task: str) -> RecordSchema:
    """The schema of a configuration's records: the one that lies in the dataset. A run of schema 1.x that is not
    finished has none; its task's own is taken.

    Raises:
        DatasetError: it describes no records or those of another task, or there is none and the task is not installed.
    """
    if layout.schema.exists():
        schema = read_schema(layout)
        if schema.task != task:
            raise DatasetError(f"{layout.schema} is of the task {schema.task!r}, expected {task!r}")
        return schema
    found = the_task(task, where=layout.root, to_do=f"a dataset without {layout.schema.name}")
    return RecordSchema.of(found.record).without_added()


@contextmanager
def _readable(path: Path | None) -> Iterator[None]:
    """Name the file where Arrow cannot read what is in it."""
    try:
        yield
    except TracekitError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(
            f"record table {path} cannot be read: {error}. Run `tracekit verify` on the dataset"
        ) from error


def _check_tables(layout: Layout, manifest: Manifest) -> None:
    """Compare the record tables with their SHA-256.

    Raises:
        CorruptShardError: one is another than the manifest's.
    """
    for file in manifest.files:
        if not file.path.startswith("records/") or not file.path.endswith(".parquet"):
            continue
        path = inside(layout.root, file.path)
        if not path.exists() or path.stat().st_size != file.num_bytes or sha256_file(path) != file.sha256:
            raise CorruptShardError(
                f"record table {path} is damaged: its SHA-256 is not the manifest's. Fetch or make it again"
            )


def _open_part(path: Path, num_samples: int, columns: Set[str]) -> TablePart:
    """Open a record table and check its columns and its length."""
    with _readable(path):
        table = pq.ParquetFile(path, memory_map=True)
        num_rows = table.metadata.num_rows
    part = TablePart(table, path)
    schema = part.schema
    missing = {"key", SHARD, *INDEX_COLUMNS, *_ENTRY_COLUMNS, *columns} - {*schema.names}
    if missing:
        raise DatasetError(f"{path} is not a record table of tracekit: it has no column {', '.join(sorted(missing))}")
    kinds = {"key": pa.string(), SHARD: pa.string(), **dict.fromkeys(INDEX_COLUMNS, pa.int64())}
    for name, kind in kinds.items():
        if (found := schema.field(name).type) != kind:
            raise DatasetError(f"{path} is not a record table of tracekit: column {name!r} is {found}, expected {kind}")
    if num_rows != num_samples:
        raise DatasetError(
            f"{path} has {num_rows} rows, its manifest says {num_samples}. Run `tracekit verify` on the dataset"
        )
    return part


def together(verifications: Iterable[Verification]) -> Verification:
    """What all replays together showed."""
    whole = Verification.nothing()
    for one in verifications:
        whole = whole.with_more(one)
    return whole


def shard_codes(names: pa.ChunkedArray, code_of: Mapping[str, int]) -> np.ndarray:
    """Shard names as numbers."""
    encoded = names.combine_chunks().dictionary_encode()
    found: Any = encoded.dictionary.to_pylist()
    unknown = [name for name in found if name not in code_of]
    if unknown:
        raise DatasetError(f"a record table names shards that the manifest does not: {', '.join(unknown[:3])}")
    return np.array([code_of[name] for name in found], dtype=np.int64)[encoded.indices.to_numpy()]
