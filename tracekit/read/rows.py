"""The rows of a store: keys, where each sample's bytes lie, and the columns of the record tables.

Rows stand folder by folder, split by split, by key. Keys and offsets are read when opened; tensor entries are read a
row group at a time, when one of its samples is.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracekit.errors import ConfigError, DatasetError, SampleNotFoundError
from tracekit.read.byte_ranges import SampleRow, choice_number, extent_of, find_place, make_row
from tracekit.read.index import Folder, TablePart, shard_codes
from tracekit.read.remote import ByteRange
from tracekit.read.tables import CHECKSUMS, INDEX_COLUMNS, SHARD, TENSOR_INDEX
from tracekit.tensors import site_of

__all__ = ["Rows", "ranges_of"]

_CACHED_ROWS = 4096
_NOT_IN_RECORDS = {*INDEX_COLUMNS, SHARD, TENSOR_INDEX, CHECKSUMS}


class Rows:
    """All rows of some opened folders.

    Raises:
        DatasetError: the same key twice, or record tables that contradict their manifests.
    """

    def __init__(self, folders: Sequence[Folder], *, where: str) -> None:
        self.shards = [shard for folder in folders for shard in folder.shards]
        self._parts = [part for folder in folders for part in folder.parts]
        self._is_closed = False
        try:
            self._read_index(folders, where)
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"a record table in {where} holds text that is not UTF-8: {error}. Run `tracekit verify` on the dataset"
            ) from error
        self._cached_row = lru_cache(maxsize=_CACHED_ROWS)(self._read_row)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._number_of

    def close(self) -> None:
        """Let go of all tables; nothing more can be read."""
        self._is_closed = True
        self._cached_row.cache_clear()
        for part in self._parts:
            part.close()

    def number(self, key: str) -> int:
        """Row of a key.

        Raises:
            SampleNotFoundError: no such key; the message names the nearest ones.
        """
        number = self._number_of.get(key)
        if number is None:
            raise SampleNotFoundError(_no_key(key, self.keys))
        return number

    def row(self, key: str) -> SampleRow:
        """Where a sample's bytes lie.

        Raises:
            SampleNotFoundError: no such key.
            DatasetError: closed, or the table's entry contradicts itself.
        """
        return self._cached_row(self.number(key))

    def record_fields(self, key: str) -> dict[str, Any]:
        """The fields of a sample's record, from the record table."""
        number = self.number(key)
        part, first = self._part_of(number)
        return {name: value for name, value in part.record(number - first).items() if name not in _NOT_IN_RECORDS}

    def release(self, number: int) -> None:
        """Let go of the entries that were read with a row's: those of its shard."""
        part, first = self._part_of(number)
        part.release(number - first)

    def shard_of(self, number: int) -> Path:
        """The shard that holds a row."""
        return self.shards[self._shard_codes[number]].path

    @property
    def schema(self) -> pa.Schema:
        """Columns of the records, without those that say where bytes are: all that any folder has."""
        joined = _joined([part.schema.empty_table() for part in self._parts]).schema
        return pa.schema([field for field in joined if field.name not in _NOT_IN_RECORDS])

    def table(self, names: Sequence[str] | None = None) -> pa.Table:
        """These columns of every row; all of the records' by default. What a folder's records do not have is null."""
        self._check_open()
        wanted = self.schema.names if names is None else names
        tables = [part.read([name for name in wanted if name in part.schema.names]) for part in self._parts]
        return _joined(tables).select(wanted)

    def with_prompt(self, sha256: str) -> np.ndarray:
        """Rows whose rendered prompt, or user's text, has this SHA-256."""
        rendered, user_text = self._hashes
        return np.flatnonzero((rendered == sha256) | (user_text == sha256))

    def in_shard(self, number: int, split: str | None) -> list[int]:
        """Rows of one shard in the order of its tar; of several folders, of each folder's shard in turn.

        Raises:
            ConfigError: there are several splits and none was named.
            SampleNotFoundError: no such shard or split.
        """
        splits = sorted({shard.split for shard in self.shards})
        if split is None and len(splits) > 1:
            raise ConfigError(f"shard {number} of which split? Name one with `split`: {', '.join(splits)}")
        wanted = splits[0] if split is None and splits else split
        codes = [i for i, one in enumerate(self.shards) if (one.split, one.number) == (wanted, number)]
        if not codes:
            numbers = ", ".join(f"{one.split} {one.number}" for one in self.shards[:20])
            raise SampleNotFoundError(f"no shard {number} in split {wanted!r}; shards: {numbers or 'none yet'}")
        rows = [np.flatnonzero(self._shard_codes == code) for code in codes]
        return [int(row) for found in rows for row in found[np.argsort(self._offsets["_json_offset"][found])]]

    @cached_property
    def _hashes(self) -> list[np.ndarray]:
        return [column.to_numpy() for column in self.table(("prompt_sha256", "input_sha256")).columns]

    def _read_index(self, folders: Sequence[Folder], where: str) -> None:
        """Keys, shards and offsets of all rows, as arrays."""
        tables: list[pa.Table] = []
        codes: list[np.ndarray] = []
        num_shards = 0
        for folder in folders:
            code_of = {shard.path.stem: num_shards + i for i, shard in enumerate(folder.shards)}
            num_shards += len(folder.shards)
            for part in folder.parts:
                tables.append(part.read(("key", SHARD, *INDEX_COLUMNS)))
                empty = [name for name in tables[-1].column_names if tables[-1][name].null_count]
                if empty:
                    raise DatasetError(
                        f"a record table in {where} has rows without {empty[0]}; run `tracekit verify` on the dataset"
                    )
                codes.append(shard_codes(tables[-1][SHARD], code_of))
        table = pa.concat_tables(tables)
        self._part_stops: list[int] = np.cumsum([len(one) for one in tables]).tolist()
        self._shard_codes = np.concatenate(codes)
        self._offsets: dict[str, np.ndarray] = {name: table[name].to_numpy() for name in INDEX_COLUMNS}
        keys: Any = table["key"].to_pylist()
        self.keys: list[str] = keys
        self._number_of = dict(zip(self.keys, range(len(self.keys)), strict=True))
        if len(self._number_of) < len(self.keys):
            twice = next(key for row, key in enumerate(self.keys) if self._number_of[key] != row)
            raise DatasetError(
                f"key {twice!r} is there twice in {where}; "
                + ("read the folders separately" if len(folders) > 1 else "run `tracekit verify` on the dataset")
            )

    def _read_row(self, number: int) -> SampleRow:
        """Entries of one row, from its part's table."""
        part, first = self._part_of(number)
        entry = part.entry(number - first)
        offsets = {name[1:]: int(column[number]) for name, column in self._offsets.items()}
        return make_row(self.keys[number], self.shards[self._shard_codes[number]].path, entry, offsets)

    def _part_of(self, number: int) -> tuple[TablePart, int]:
        """The part that holds a row, and its first row."""
        self._check_open()
        part = bisect_right(self._part_stops, number)
        return self._parts[part], self._part_stops[part - 1] if part else 0

    def _check_open(self) -> None:
        if self._is_closed:
            raise DatasetError("the store is closed; open it again to read")


def ranges_of(
    row: SampleRow, sites: Sequence[str] | None, layers: Sequence[int] | None, choice: int | None = None
) -> Iterator[ByteRange]:
    """Bytes of these sites and layers of one sample, of one choice where they lie together; of all by default.

    Raises:
        SampleNotFoundError: a site that is stored has no such layer or choice.
        ConfigError: `choice` for a site that has none.
    """
    for stored in row.tensors.values():
        site = site_of(stored.spec.name)
        if sites is not None and site not in sites:
            continue
        is_sparse = stored.layout == "sparse"
        for suffix, one in stored.companions.items():
            if suffix in ("scales", "token_scales", "counts") or layers is None:
                yield ByteRange(row.shard, one.start, one.start + one.num_bytes)
        if is_sparse and layers is None:
            yield ByteRange(row.shard, stored.start, stored.start + stored.num_bytes)
        if is_sparse:  # where a layer's weights lie, the counts will tell
            continue
        where = f"{site} of sample {row.key!r}"
        number = None if choice is None else choice_number(stored, choice, where=where)
        entries: list[int | None] = [None]
        if layers is not None and stored.spec.layers:
            wanted = {layer for one in layers for layer in find_place(row, site, one).layers}
            entries = [entry for entry, layer in enumerate(stored.spec.layers) if layer in wanted]
        for entry in entries:
            extent = extent_of(stored, entry=entry, choice=number)
            yield ByteRange(row.shard, extent.start, extent.start + extent.num_bytes)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one after the other, also where records of some have fields that others do not have."""
    if all(one.schema.equals(tables[0].schema) for one in tables):
        return pa.concat_tables(tables)
    kinds = [pa.schema([(field.name, _nullable(field.type)) for field in one.schema]) for one in tables]
    pairs = zip(tables, kinds, strict=True)
    return pa.concat_tables([one.cast(kind) for one, kind in pairs], promote_options="permissive")


def _nullable(kind: pa.DataType) -> pa.DataType:
    """The same type, null allowed everywhere inside."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _nullable(field.type)) for field in kind])
    return pa.list_(_nullable(kind.value_type)) if pa.types.is_list(kind) else kind


def _no_key(key: str, keys: Sequence[str]) -> str:
    """Message for a key that is not there."""
    if not keys:
        return f"no sample {key!r}; the dataset has no sample yet"
    ordered = sorted(keys)
    place = bisect_left(ordered, key)
    near = ", ".join(repr(one) for one in ordered[max(place - 2, 0) : place + 2])
    return f"no sample {key!r}; {len(keys)} samples from {ordered[0]!r} to {ordered[-1]!r}, nearest: {near}"
