"""Records: strict decoding, Arrow types that follow from the Structs, and documentation of every field."""

import math
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from tests.sample_records import record_of, trivia_record
from tests.tasks_for_tests import RECORD_TYPES, SCHEMAS
from tracekit.errors import CorruptShardError, DatasetError
from tracekit.records import Record, RecordSchema, decode_record, encode_record, field_docs, task_of

TRIVIA = RECORD_TYPES["trivia_qa"]


def test_a_record_survives_the_round_trip():
    record = trivia_record()
    assert decode_record(encode_record(record), TRIVIA) == record
    assert task_of(encode_record(record)) == "trivia_qa"


def test_every_key_is_always_there_and_floats_have_a_point():
    raw = msgspec.json.decode(encode_record(trivia_record()))
    names = [field.name for field in msgspec.structs.fields(RECORD_TYPES["trivia_qa"])]
    assert list(raw) == ["task", *names]
    assert b'"f1":1.0' in encode_record(trivia_record(f1=1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_not_finite_is_an_error(value: float):
    with pytest.raises(DatasetError, match="not finite"):
        encode_record(trivia_record(token_logprobs=[0.0, value]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f1": math.nan}, "`float`, got `null` in its field `f1`"),
        ({"beam_score": math.nan}, "`beam_score` is nan, and would be read back as None"),
        ({"beam_score": -math.inf}, "`beam_score` is -inf"),
        ({"f1": 2**80 + 1}, "`f1` is 1208925819614629174706177, and would be read back as 1.2"),
        ({"f1": 10**400}, "out of range"),
        ({"f1": None}, "`float`, got `null` in its field `f1`$"),
        ({"prompt": 5}, "`str`, got `int` in its field `prompt`$"),
        ({"seed": 10**5000}, "its field `seed` cannot be stored: .*4300 digits"),
        ({"token_ids": [10**5000]}, "its field `token_ids` cannot be stored: .*4300 digits"),
        ({"spans": [{"name": "user", "start": 0, "stop": 3}]}, r"`spans` is \[\{'name'.* read back as \[Span\("),
        ({"tokens": ("a", "b")}, r"`tokens` is \('a', 'b'\), and would be read back as \['a', 'b'\]"),
    ],
)
def test_a_value_of_another_type_than_its_field_is_named_with_the_record(changes: dict[str, Any], message: str):
    record = trivia_record(**changes)
    with pytest.raises(DatasetError, match=f"^record '{record.key}': .*{message}"):
        encode_record(record)


def test_an_integer_in_a_field_of_floats_is_stored_as_a_float():
    assert b'"f1":1.0}' in encode_record(trivia_record(f1=1))
    assert b'"f1":1.2089258196146292e24}' in encode_record(trivia_record(f1=2**80))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("question"), "missing required field `question`"),
        (lambda r: r.update(extra=1), "unknown field `extra`"),
        (lambda r: r.update(prompt_length="3"), r"Expected `int`, got `str` - at `\$.prompt_length`"),
        (lambda r: r.update(task="poetry"), r"Invalid value 'poetry' - at `\$.task`"),
        (lambda r: r["tensors"][0].update(shape=[1.5]), r"\$.tensors\[0\].shape\[0\]"),
    ],
)
def test_a_record_that_breaks_the_contract_is_named(change, message: str):
    raw = msgspec.json.decode(encode_record(trivia_record()))
    change(raw)
    with pytest.raises(CorruptShardError, match=message):
        decode_record(msgspec.json.encode(raw), SCHEMAS["trivia_qa"].strict_type, where="here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"key": 1}'])
def test_what_is_no_record_is_an_error(data: bytes):
    with pytest.raises(CorruptShardError, match="here"):
        decode_record(data, TRIVIA, where="here")
    with pytest.raises(CorruptShardError, match="here"):
        task_of(data, where="here")


@pytest.mark.parametrize("task", RECORD_TYPES)
def test_arrow_takes_a_record_and_gives_it_back(task: str):
    raw = msgspec.json.decode(encode_record(record_of(task)))
    table = pa.Table.from_pylist([raw], schema=RecordSchema.of(RECORD_TYPES[task]).arrow)
    assert table.to_pylist() == [raw]


@pytest.mark.parametrize("task", RECORD_TYPES)
def test_arrow_and_json_schema_declare_the_same_fields_and_nulls(task: str):
    schema = RecordSchema.of(RECORD_TYPES[task]).document
    properties = schema["$defs"][RECORD_TYPES[task].__name__]["properties"]
    arrow = RecordSchema.of(RECORD_TYPES[task]).arrow
    assert set(arrow.names) == set(properties)
    for name, spec in properties.items():
        can_be_null = any(option.get("type") == "null" for option in spec.get("anyOf", []))
        assert arrow.field(name).nullable == can_be_null, name


def test_every_field_of_every_record_is_documented():
    for record_type in RECORD_TYPES.values():
        docs = field_docs(record_type)
        for field in msgspec.structs.fields(record_type):
            assert len(docs.get(field.name, "")) > 4, field.name


def test_no_field_is_a_map():
    for record_type in RECORD_TYPES.values():
        for field in RecordSchema.of(record_type).arrow:
            assert not pa.types.is_map(field.type)


def test_the_common_fields_come_first():
    common = [field.name for field in msgspec.structs.fields(Record)]
    for record_type in RECORD_TYPES.values():
        assert [field.name for field in msgspec.structs.fields(record_type)][: len(common)] == common


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_an_integer_that_no_table_holds_is_neither_written_nor_read(value: int):
    with pytest.raises(DatasetError, match=r"an integer past 64 bits in its field `seed`"):
        encode_record(trivia_record(seed=value))
    data = encode_record(trivia_record(seed=41)).replace(b'"seed":41', f'"seed":{value}'.encode())
    with pytest.raises(CorruptShardError, match=r"here: an integer past 64 bits - at `\$\.seed`"):
        decode_record(data, TRIVIA, where="here")


def test_the_largest_integers_and_long_numbers_in_texts_are_kept():
    record = trivia_record(seed=2**63 - 1, prompt="1234567890123456789012345")
    assert decode_record(encode_record(record), TRIVIA) == record
