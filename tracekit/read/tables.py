"""The record tables: every record of a split as one Parquet file and as one small tar.

    records/<config>/<split>.parquet   the record's fields, then where its bytes are:
        shard_name       shard that holds the sample, without its ending
        json_offset, json_size, tensors_offset, tensors_size, data_offset     bytes in that shard
        tensor_index     list of {name, offset, size}: each tensor in the payload's data part
        checksums        the sample's packed checksums, see tracekit.format.checksums; since schema 2.0
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
from tracekit.records import RECORD_TYPES, arrow_schema

__all__ = [
    "INDEX_COLUMNS",
    "index_schema",
    "records_table",
    "tensor_summaries",
    "write_records_table",
    "write_records_tar",
]

INDEX_COLUMNS = ("json_offset", "json_size", "tensors_offset", "tensors_size", "data_offset")


def index_schema(task: str) -> pa.Schema:
    """Schema of the table of a task's records."""
    entry = pa.struct([pa.field("name", pa.string()), pa.field("offset", pa.int64()), pa.field("size", pa.int64())])
    schema = arrow_schema(RECORD_TYPES[task])
    schema = schema.append(pa.field("shard_name", pa.string(), nullable=False))
    for name in INDEX_COLUMNS:
        schema = schema.append(pa.field(name, pa.int64(), nullable=False))
    schema = schema.append(pa.field("tensor_index", pa.list_(entry), nullable=False))
    return schema.append(pa.field("checksums", pa.binary(), nullable=False))


def records_table(task: str, sidecars: Iterable[Sidecar]) -> pa.Table:
    """All records of these shards with their byte index, sorted by key.

    Raises:
        DatasetError: what a sidecar holds are no records of this task.
    """
    rows: list[dict[str, Any]] = []
    name = ""
    try:
        for sidecar in sidecars:
            name = sidecar.name
            for record, index in zip(sidecar.records, sidecar.samples, strict=True):
                row = msgspec.json.decode(record, type=dict[str, Any])
                row["shard_name"] = sidecar.name
                row["tensor_index"] = msgspec.to_builtins(index.tensors)
                row["checksums"] = index.checksums
                for column in INDEX_COLUMNS:
                    row[column] = getattr(index, column)
                rows.append(row)
        rows.sort(key=lambda row: row["key"])
        return pa.Table.from_pylist(rows, schema=index_schema(task))
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


def write_records_table(path: Path, task: str, sidecars: Iterable[Sidecar]) -> None:
    """Write the Parquet file of these shards, a row group a shard; whole or not at all."""
    with (
        whole_or_not(path) as temporary,
        pq.ParquetWriter(temporary, index_schema(task), compression="zstd") as writer,
    ):
        for sidecar in sidecars:
            writer.write_table(records_table(task, [sidecar]))


def write_records_tar(path: Path, sidecars: Iterable[Sidecar]) -> None:
    """Write the records of these shards as a tar of `<key>.json`; whole or not at all."""
    with whole_or_not(path) as temporary, temporary.open("wb") as file:
        for sidecar in sidecars:
            pairs = zip(sidecar.samples, sidecar.records, strict=True)
            for index, raw in sorted(pairs, key=lambda pair: pair[0].key):
                record = bytes(raw)
                file.write(tar_header(index.key + JSON_SUFFIX, len(record)) + record + bytes(-len(record) % 512))
        file.write(bytes(1024))
