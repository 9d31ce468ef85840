"""What the small files say of a shard, compared with the shard itself, value by value.

    shard.tar -> its sidecar, made again from its bytes    compared with sidecars/<config>/*.json
              -> its rows and records, made again of that  compared with records/<config>/<split>.parquet and .tar

One shard is in memory at a time. A difference is named by file, sample and field.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracekit.errors import CorruptShardError, DatasetError
from tracekit.format.layout import Layout
from tracekit.format.manifest import SampleIndex, Sidecar
from tracekit.format.shards import JSON_SUFFIX, Member, iter_members
from tracekit.read.tables import CHECKSUMS, OLD_NAMES, SHARD, records_table
from tracekit.records import RecordSchema

__all__ = ["SplitTables", "sidecar_problems"]


def sidecar_problems(where: str, stored: Sidecar, made: Sidecar, *, checksum: int | None) -> list[str]:
    """Where a sidecar is not the one that was made again from its shard, or was changed since it was written.
    `checksum` is that of its bytes; None before schema 2.0."""
    problems = [
        f"{where}: {field} is {getattr(stored, field)!r}, its shard says {getattr(made, field)!r}"
        for field in ("name", "number", "num_bytes", "sha256")
        if getattr(stored, field) != getattr(made, field)
    ]
    if stored.checksum != checksum:
        problems.append(f"{where}: its bytes are not those of its checksum; they were altered")
    if not len(stored.samples) == len(stored.records) == len(made.samples):
        counts = f"{len(stored.samples)} samples and {len(stored.records)} records"
        return [*problems, f"{where}: {counts}, its shard has {len(made.samples)} samples"]
    for one, other in zip(stored.samples, made.samples, strict=True):
        names = [name for name in SampleIndex.__struct_fields__ if getattr(one, name) != getattr(other, name)]
        problems += [f"{where}: {name} of sample {other.key!r} is not what its shard says" for name in names]
    for index, one, other in zip(made.samples, stored.records, made.records, strict=True):
        if bytes(one) != bytes(other):
            problems.append(f"{where}: the record of sample {index.key!r} is not what its shard says")
    return problems


class SplitTables:
    """The record table and the records tar of a split, compared with its shards in their order.

    A file that is not there is not compared: the manifest says whether it should be.
    """

    def __init__(self, layout: Layout, schema: RecordSchema, split: str, *, has_checksums: bool) -> None:
        self._schema, self._has_checksums = schema, has_checksums
        self._table, self._tar = layout.records_table(split), layout.records_tar(split)
        self._root = layout.root
        self._has_table = self._table.exists()
        self._parquet: pq.ParquetFile | None = None
        self._num_groups = self._done = 0
        self._members = self._read_tar() if self._tar.exists() else None

    def shard(self, made: Sidecar | None) -> list[str]:
        """What differs in the rows and members of the next shard; None where it cannot be read, and is passed over."""
        group = self._done
        self._done += 1
        problems: list[str] = []
        try:
            if self._has_table:
                problems += self._rows(group, made)
        except DatasetError as error:
            problems.append(str(error))
        except (OSError, ValueError, pa.ArrowException) as error:
            self._has_table = False
            problems.append(f"{self._name(self._table)}: cannot be read: {error}")
        if made is None:
            self._members = None  # where the next shard's begin is not known
        try:
            if self._members is not None and made is not None:
                problems += self._records(self._members, made)
        except CorruptShardError as error:
            self._members = None
            problems.append(str(error))
        return problems

    def rest(self) -> list[str]:
        """What is in these files after the last shard."""
        problems: list[str] = []
        if self._parquet is not None:
            self._parquet.close()
            if self._num_groups > self._done:
                problems.append(f"{self._name(self._table)}: {self._num_groups} row groups of {self._done} shards")
        try:
            if self._members is not None and (more := next(self._members, None)) is not None:
                problems.append(f"{self._name(self._tar)}: {more[0].name!r} is of no sample")
        except CorruptShardError as error:
            problems.append(str(error))
        return problems

    def _rows(self, group: int, made: Sidecar | None) -> list[str]:
        """Where the row group of a shard is not what the shard says."""
        where = self._name(self._table)
        if self._parquet is None:
            self._parquet = pq.ParquetFile(self._table)
            self._num_groups = self._parquet.metadata.num_row_groups
        if group >= self._num_groups:
            return [f"{where}: no row group of shard number {group}; the table has {self._num_groups}"]
        if made is None:
            return []
        return _differences(where, self._parquet.read_row_group(group), self._expected(made))

    def _expected(self, made: Sidecar) -> pa.Table:
        """The rows of a shard, made again."""
        expected = records_table(self._schema, [made])
        if self._has_checksums:
            return expected
        old = expected.drop_columns(CHECKSUMS)  # of schema 1.x
        return old.rename_columns([OLD_NAMES.get(name, name) for name in old.column_names])

    def _records(self, members: Iterator[tuple[Member, bytes]], made: Sidecar) -> list[str]:
        """Where the records tar is not what the shard says."""
        problems: list[str] = []
        pairs = zip(made.samples, made.records, strict=True)
        for index, record in sorted(pairs, key=lambda pair: pair[0].key):
            name, (member, data) = index.key + JSON_SUFFIX, next(members, (None, b""))
            if member is None or member.name != name:
                found = "nothing" if member is None else repr(member.name)
                raise CorruptShardError(f"{self._name(self._tar)}: {found} where {name!r} should be")
            if data != bytes(record):
                problems.append(
                    f"{self._name(self._tar)}: the record of sample {index.key!r} is not what its shard says"
                )
        return problems

    def _read_tar(self) -> Iterator[tuple[Member, bytes]]:
        """Members of the records tar, with their bytes."""
        with self._tar.open("rb") as file:
            for member in iter_members(file, where=self._name(self._tar)):
                file.seek(member.offset)
                yield member, file.read(member.size)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _differences(where: str, found: pa.Table, expected: pa.Table) -> list[str]:
    """Where rows differ, a line for each column: the first sample in which it does."""
    if len(found) != len(expected):
        shard: object = expected[_shard_column(expected)][0].as_py() if len(expected) else "an empty shard"
        return [f"{where}: {len(found)} rows of shard {shard}, which has {len(expected)} samples"]
    problems = [f"{where}: column {name!r} is missing" for name in _without(expected.column_names, found.column_names)]
    problems += [f"{where}: column {name!r} is unknown" for name in _without(found.column_names, expected.column_names)]
    for name in found.column_names:
        if name not in expected.column_names or found[name].equals(expected[name]):
            continue
        rows = zip(expected["key"].to_pylist(), found[name].to_pylist(), expected[name].to_pylist(), strict=True)
        key = next((key for key, one, other in rows if one != other), None)
        problems.append(
            f"{where}: column {name!r} is {found[name].type}, expected {expected[name].type}"
            if key is None
            else f"{where}: {name} of sample {key!r} is not what its shard says"
        )
    return problems


def _shard_column(table: pa.Table) -> str:
    return SHARD if SHARD in table.column_names else OLD_NAMES[SHARD]


def _without(names: Iterable[str], others: list[str]) -> list[str]:
    return [name for name in names if name not in others]
