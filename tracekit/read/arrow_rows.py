"""Entries of a row group: nested Arrow columns taken apart once, so that one row of them costs microseconds.

    list<int>    offsets | 0 | 3 | 5 |   values | 1 | 12 | 16 | 2 | 4 |       row 1 is [2, 4]
    string       codes   | 0 | 0 | 1 |   texts  | "dense" | "causal" |        each text is kept once

Arrow makes a Python value of a nested row by way of a scalar for every leaf, which takes longer than all else that is
done to read a sample.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["Reader", "column_reader"]

Reader: TypeAlias = Callable[[int], Any]
"""Gives the plain value of a row: what `to_pylist` has there."""


def column_reader(column: pa.Array) -> Reader:
    """What reads single rows of a column, nested or not."""
    read = _reader(column)
    if not column.null_count:
        return read
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    return lambda row: None if is_null[row] else read(row)


def _reader(column: Any) -> Reader:
    """As `column_reader`, of a column whose nulls have been seen to."""
    kind = column.type
    if pa.types.is_struct(kind):
        fields = [(field.name, column_reader(column.field(i))) for i, field in enumerate(kind)]
        return lambda row: {name: read(row) for name, read in fields}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _list_reader(column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = column.dictionary_encode()
        texts, codes = encoded.dictionary.to_pylist(), encoded.indices.fill_null(0).to_numpy()
        return lambda row: texts[codes[row]]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _numbers(column).item
    return column.to_pylist().__getitem__


def _list_reader(column: Any) -> Reader:
    """Reader of a column of lists."""
    offsets, inner = column.offsets.to_numpy(), column.values
    if pa.types.is_integer(inner.type) and not inner.null_count:
        values = _numbers(inner)
        return lambda row: values[offsets[row] : offsets[row + 1]].tolist()
    read = column_reader(inner)
    return lambda row: [read(i) for i in range(offsets[row], offsets[row + 1])]


def _numbers(column: Any) -> np.ndarray:
    """A column of numbers, anything where it is null."""
    return (pc.fill_null(column, 0) if column.null_count else column).to_numpy()
