"""The record tables: every record of a split as one Parquet file and as one small tar.

    records/<config>/<split>.parquet   the record's fields, then where its bytes are:
        _shard           shard that holds the sample, without its ending
        _json_offset, _json_size, _tensors_offset, _tensors_size, _data_offset     bytes in that shard
        _tensor_index    list of {name, offset, size}: each tensor in the payload's data part
        _checksums       the sample's packed checksums, see tracekit.format.checksums
                         schema 1.x has `shard_name` for `_shard`, no checksums, and no other `_`
    records/<config>/<split>.tar       <key>.json members only, for `datasets` and its viewer

Both are made from sidecars alone, one shard in memory at a time, and are sorted by key: shards follow the source's
order, and each is sorted as it is written.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from tracekit.errors import DatasetError
from tracekit.format.checksums import specs_of
from tracekit.format.layout import whole_or_not
from tracekit.format.manifest import Sidecar, TensorSummary
from tracekit.format.shards import JSON_SUFFIX, tar_header
from tracekit.records import RecordSchema

__all__ = [
    "CHECKSUMS",
    "INDEX_COLUMNS",
    "OLD_NAMES",
    "SHARD",
    "TENSOR_INDEX",
    "index_schema",
    "records_table",
    "tensor_summaries",
    "write_records_table",
    "write_records_tar",
]

SHARD, TENSOR_INDEX, CHECKSUMS = "_shard", "_tensor_index", "_checksums"
INDEX_COLUMNS = ("_json_offset", "_json_size", "_tensors_offset", "_tensors_size", "_data_offset")
OLD_NAMES = {name: name[1:] for name in (*INDEX_COLUMNS, TENSOR_INDEX)} | {SHARD: "shard_name"}
"""What columns are called in tables of schema 1.x."""


def index_schema(schema: RecordSchema) -> pa.Schema:
    """Schema of the table of records."""
    entry = pa.struct([pa.field("name", pa.string()), pa.field("offset", pa.int64()), pa.field("size", pa.int64())])
    columns = schema.arrow.append(pa.field(SHARD, pa.string(), nullable=False))
    for name in INDEX_COLUMNS:
        columns = columns.append(pa.field(name, pa.int64(), nullable=False))
    columns = columns.append(pa.field(TENSOR_INDEX, pa.list_(entry), nullable=False))
    return columns.append(pa.field(CHECKSUMS, pa.binary(), nullable=False))


def records_table(schema: RecordSchema, sidecars: Iterable[Sidecar]) -> pa.Table:
    """All records of these shards with their byte index, sorted by key.

    Raises:
        DatasetError: what a sidecar holds are no records of this schema.
    """
    rows: list[dict[str, Any]] = []
    added = {field.name: field.default for field in schema.fields if not field.is_required}
    name = ""
    try:
        for sidecar in sidecars:
            name = sidecar.name
            for record, index in zip(sidecar.records, sidecar.samples, strict=True):
                row = added | msgspec.json.decode(record, type=dict[str, Any])
                row[SHARD] = sidecar.name
                row[TENSOR_INDEX] = msgspec.to_builtins(index.tensors)
                row[CHECKSUMS] = index.checksums
                for column in INDEX_COLUMNS:
                    row[column] = getattr(index, column[1:])
                rows.append(row)
        rows.sort(key=lambda row: row["key"])
        return pa.Table.from_pylist(rows, schema=index_schema(schema))
    except (msgspec.DecodeError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise DatasetError(f"the sidecar of shard {name} holds records that do not fit a table: {error}") from error


def tensor_summaries(sidecars: Iterable[Sidecar]) -> list[TensorSummary]:
    """What the samples of these shards store, added up by name."""
    summaries: dict[str, TensorSummary] = {}
    for sidecar in sidecars:
        for record, sample in zip(sidecar.records, sidecar.samples, strict=True):
            sizes = {place.name: place.size for place in sample.tensors}
            for spec in specs_of(record):
                so_far = summaries[spec.name].num_bytes if spec.name in summaries else 0
                summaries[spec.name] = TensorSummary(
                    name=spec.name,
                    dtype=spec.dtype,
                    axes=spec.axes,
                    layout=spec.layout,
                    num_bytes=so_far + sizes[spec.name],
                )
    return list(summaries.values())


def write_records_table(path: Path, schema: RecordSchema, sidecars: Iterable[Sidecar]) -> None:
    """Write the Parquet file of these shards, a row group a shard; whole or not at all."""
    with (
        whole_or_not(path) as temporary,
        pq.ParquetWriter(temporary, index_schema(schema), compression="zstd") as writer,
    ):
        for sidecar in sidecars:
            writer.write_table(records_table(schema, [sidecar]))


def write_records_tar(path: Path, sidecars: Iterable[Sidecar]) -> None:
    """Write the records of these shards as a tar of `<key>.json`; whole or not at all."""
    with whole_or_not(path) as temporary, temporary.open("wb") as file:
        for sidecar in sidecars:
            pairs = zip(sidecar.samples, sidecar.records, strict=True)
            for index, raw in sorted(pairs, key=lambda pair: pair[0].key):
                record = bytes(raw)
                file.write(tar_header(index.key + JSON_SUFFIX, len(record)) + record + bytes(-len(record) % 512))
        file.write(bytes(1024))
