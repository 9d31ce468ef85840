"""Rows of nested Arrow columns: what `to_pylist` has, row by row."""

from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets_for_tests import make_choices, make_sample
from tests.tasks_for_tests import SCHEMAS
from tracekit.read.arrow_rows import column_reader
from tracekit.read.tables import index_schema
from tracekit.records import encode_record

_SPEC = pa.struct(
    [
        pa.field("name", pa.string()),
        pa.field("shape", pa.list_(pa.int64())),
        pa.field("positions", pa.list_(pa.list_(pa.int64()))),
        pa.field("num_keys", pa.int64()),
        pa.field("share", pa.float64()),
        pa.field("is_packed", pa.bool_()),
    ]
)
_WHOLE = st.integers(-(2**63), 2**63 - 1) | st.none()
_ROWS = st.lists(
    st.none()
    | st.lists(
        st.none()
        | st.fixed_dictionaries(
            {
                "name": st.none() | st.text(max_size=3),
                "shape": st.none() | st.lists(_WHOLE, max_size=3),
                "positions": st.none() | st.lists(st.none() | st.lists(_WHOLE, max_size=2), max_size=2),
                "num_keys": _WHOLE,
                "share": st.none() | st.floats(allow_nan=False),
                "is_packed": st.none() | st.booleans(),
            }
        ),
        max_size=3,
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=_ROWS, start=st.integers(0, 3))
def test_every_row_is_what_to_pylist_gives_also_of_a_slice_and_with_nulls_anywhere(rows: list[Any], start: int):
    column = pa.array(rows, type=pa.list_(_SPEC)).slice(start)
    read = column_reader(column)
    assert [read(row) for row in range(len(column))] == column.to_pylist()


@pytest.mark.parametrize("kind", [pa.large_list(pa.int32()), pa.list_(pa.large_string()), pa.list_(pa.binary())])
def test_types_that_other_writers_choose_are_read_too(kind: pa.DataType):
    values = {pa.large_string(): ["a", "b"], pa.binary(): [b"a", b"b"]}.get(kind.value_type, [1, 2])
    column = pa.array([values, None, []], type=kind)
    read = column_reader(column)
    assert [read(row) for row in range(3)] == column.to_pylist() == [values, None, []]


def test_the_entries_of_real_records_are_read_as_they_were_written():
    for made in (make_sample("000000", sites=("hidden_states", "attentions", "topk_ids")), make_choices("000001")):
        schema = index_schema(SCHEMAS[made.record.task_name()])
        fields = msgspec.json.decode(encode_record(made.record))
        column = pa.array([fields["tensors"]], type=schema.field("tensors").type)
        assert column_reader(column)(0) == fields["tensors"]
