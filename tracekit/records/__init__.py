"""The records: what is known of one sample besides its tensors. A contract; see SCHEMA_VERSION.

A record is one JSON object, written by msgspec, tagged by `task`. Rules that keep Arrow and pandas from losing
anything: every key is always present, no maps with data-dependent keys (lists of structs instead), floats carry a
decimal point and are finite, null stands only where a field is declared `| None`. There is no clock, no absolute path
and no machine state in a record: the same run gives the same bytes.

Readers ignore fields that they do not know and fill in those that are missing; writers do neither. A task brings its
own record type; here is what all of them share, and msgspec. pyarrow is imported when a table's schema is asked for.
"""

import json
import re
from functools import cache
from typing import Any, TypeVar

import msgspec

from tracekit.errors import UNREADABLE, CorruptShardError, DatasetError
from tracekit.records.base import (
    NOTHING_GENERATED,
    SCHEMA_VERSION,
    GenerationSettings,
    ModelInfo,
    Record,
    Span,
    check_schema,
)
from tracekit.records.message import Message
from tracekit.records.outcome import LARGE_SHARE, About, Mean, Number, Outcome, accuracy, answered, outcome_fault
from tracekit.records.responses import AnsweredRecord, ResponseRecord, SampledAnswer
from tracekit.records.schema import RecordSchema, field_docs, schema_differences, too_large

__all__ = [
    "LARGE_SHARE",
    "NOTHING_GENERATED",
    "SCHEMA_VERSION",
    "About",
    "AnsweredRecord",
    "GenerationSettings",
    "Mean",
    "Message",
    "ModelInfo",
    "Number",
    "Outcome",
    "Record",
    "RecordSchema",
    "ResponseRecord",
    "SampledAnswer",
    "Span",
    "accuracy",
    "answered",
    "check_schema",
    "decode_record",
    "encode_record",
    "field_docs",
    "outcome_fault",
    "schema_differences",
    "task_of",
]

StructT = TypeVar("StructT", bound=msgspec.Struct)

_MAY_BE_LARGE = re.compile(rb"[0-9]{19}")
"""What an integer past 64 bits has in JSON; few records do, and only those are looked through."""


class _Tag(msgspec.Struct):
    """Just the tag of a record."""

    task: str


def encode_record(record: Record) -> bytes:
    """Encode a record as JSON, as it is read back: an integer in a field of floats is a float.

    Raises:
        DatasetError: a field has a value that is none of its type, or none of JSON: an integer past 64 bits, a float
            that is not finite, a number of numpy, a dictionary for a Struct.
    """
    try:
        data = msgspec.json.encode(record)
    except (TypeError, ValueError) as error:  # of text without UTF-8, and of integers of 4300 digits
        field = next(name for name in record.__struct_fields__ if not _is_encoded(getattr(record, name)))
        raise DatasetError(f"record {record.key!r}: its field `{field}` cannot be stored: {error}") from error
    try:
        read = decode_record(data, type(record), where=f"record {record.key!r}")
    except CorruptShardError as error:
        said = str(error).replace(" - at `$.", " in its field `")  # a field's path is no setting's
        is_null = "got `null`" in said and not _is_finite(record)
        raise DatasetError(said + "; a float that is not finite is stored as null" * is_null) from error
    if read != record:
        values = ((name, getattr(record, name), getattr(read, name)) for name in record.__struct_fields__)
        field, value, other = next(one for one in values if one[1] != one[2])
        raise DatasetError(
            f"record {record.key!r}: its field `{field}` is {value!r:.200}, and would be read back as {other!r:.200}; "
            "give a value of the field's type, finite where it is a number"
        )
    return msgspec.json.encode(read)


def _is_encoded(value: Any) -> bool:
    """Whether JSON has a form of a value."""
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_finite(record: Record) -> bool:
    """Whether every float of a record is finite."""
    try:
        json.dumps(msgspec.to_builtins(record), allow_nan=False)
    except ValueError:
        return False
    return True


def decode_record(data: bytes | memoryview, record_type: type[StructT], *, where: str = "record") -> StructT:
    """Decode and check one record.

    Raises:
        CorruptShardError: not JSON, another task, a field that is missing or of the wrong type, or an integer past 64
            bits, which no table holds.
    """
    try:
        record: StructT = _decoder(record_type).decode(data)
    except UNREADABLE as error:
        raise CorruptShardError(f"{where}: {error}") from error
    if _MAY_BE_LARGE.search(data):
        path = too_large(msgspec.to_builtins(record), "$")
        if path is not None:
            raise CorruptShardError(f"{where}: an integer past 64 bits - at `{path}`")
    return record


def task_of(data: bytes | memoryview, *, where: str = "record") -> str:
    """Name of the task that a record is of.

    Raises:
        CorruptShardError: it is no record.
    """
    try:
        return msgspec.json.decode(data, type=_Tag).task
    except UNREADABLE as error:
        raise CorruptShardError(f"{where}: {error}") from error


@cache
def _decoder(record_type: type[Any]) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(record_type)
