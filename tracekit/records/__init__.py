"""The records: what is known of one sample besides its tensors. A contract; see SCHEMA_VERSION.

A record is one JSON object, written by msgspec, tagged by `task`. Rules that keep Arrow and pandas from losing
anything: every key is always present, no maps with data-dependent keys (lists of structs instead), floats carry a
decimal point and are finite, null stands only where a field is declared `| None`. There is no clock, no absolute path
and no machine state in a record: the same run gives the same bytes.

Readers ignore fields that they do not know and fill in those that are missing; writers do neither. A task brings its
own record type; here is what all of them share, and msgspec. pyarrow is imported when a table's schema is asked for.
"""

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
    Tallied,
    check_schema,
)
from tracekit.records.message import Message
from tracekit.records.outcome import LARGE_SHARE, About, Mean, Number, Outcome, accuracy, answered, outcome_fault
from tracekit.records.responses import AnsweredRecord, ResponseRecord, SampledAnswer
from tracekit.records.schema import RecordSchema, field_docs, schema_differences

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
    "Tallied",
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
    """Encode a record as JSON.

    Raises:
        DatasetError: a value cannot be represented, as an integer past 64 bits, a number of numpy, or a float that is
            not finite where null is not declared.
    """
    try:
        data = msgspec.json.encode(record)
    except (TypeError, UnicodeEncodeError) as error:
        field = next(name for name in record.__struct_fields__ if not _is_encoded(getattr(record, name)))
        raise DatasetError(f"record {record.key!r}: its field `{field}` cannot be stored: {error}") from error
    try:
        decode_record(data, type(record))
    except CorruptShardError as error:
        said = str(error).replace(" - at `$.", " in its field `")  # a field's path is no setting's
        raise DatasetError(f"record {record.key!r} does not survive a round trip (not finite?): {said}") from error
    return data


def _is_encoded(value: Any) -> bool:
    """Whether JSON has a form of a value."""
    try:
        msgspec.json.encode(value)
    except (TypeError, UnicodeEncodeError):
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
        path = _too_large(msgspec.to_builtins(record), "$")
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


def _too_large(value: Any, path: str) -> str | None:
    """Where an integer does not fit 64 bits, sign included; None where all do."""
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else path
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(f"{path}.{name}", one) for name, one in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{number}]", one) for number, one in enumerate(value)]
    return next((found for name, one in items if (found := _too_large(one, name)) is not None), None)
