"""The records: what is known of one sample besides its tensors. A contract; see SCHEMA_VERSION.

A record is one JSON object, written by msgspec, tagged by `task`. Rules that keep Arrow and pandas from losing
anything: every key is always present, no maps with data-dependent keys (lists of structs instead), floats carry a
decimal point and are finite, null stands only where a field is declared `| None`. There is no clock, no absolute path
and no machine state in a record: the same run gives the same bytes.

One file a task; this one knows them all, and msgspec. pyarrow is imported when a table's schema is asked for.
"""

import re
from typing import Any

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
from tracekit.records.csqa import Choice, CsqaMcqRecord, CsqaRecord
from tracekit.records.degradation import DamageInfo, DegradationRecord
from tracekit.records.introspection import ConfidenceBin, IntrospectionRecord
from tracekit.records.next_token import NextTokenRecord, Word
from tracekit.records.nonsense_entities import NonsenseEntitiesRecord
from tracekit.records.replay import ReplayRecord
from tracekit.records.schema import arrow_schema, field_docs, json_schema
from tracekit.records.serve import Message, ServeRecord
from tracekit.records.trivia_qa import SampledAnswer, TriviaQARecord
from tracekit.records.wiki_qa import WikiQARecord

__all__ = [
    "NOTHING_GENERATED",
    "RECORD_TYPES",
    "SCHEMA_VERSION",
    "Choice",
    "ConfidenceBin",
    "CsqaMcqRecord",
    "CsqaRecord",
    "DamageInfo",
    "DegradationRecord",
    "GenerationSettings",
    "IntrospectionRecord",
    "Message",
    "ModelInfo",
    "NextTokenRecord",
    "NonsenseEntitiesRecord",
    "Record",
    "ReplayRecord",
    "SampledAnswer",
    "ServeRecord",
    "Span",
    "Tallied",
    "TriviaQARecord",
    "WikiQARecord",
    "Word",
    "arrow_schema",
    "check_schema",
    "decode_record",
    "encode_record",
    "field_docs",
    "json_schema",
]

RECORD_TYPES: dict[str, type[Record]] = {
    "trivia_qa": TriviaQARecord,
    "next_token": NextTokenRecord,
    "csqa": CsqaRecord,
    "csqa_mcq": CsqaMcqRecord,
    "introspection": IntrospectionRecord,
    "degradation": DegradationRecord,
    "wiki_qa": WikiQARecord,
    "nonsense_entities": NonsenseEntitiesRecord,
    "serve": ServeRecord,
    "replay": ReplayRecord,
}
"""Record type of every task."""

_DECODERS = {task: msgspec.json.Decoder(record_type) for task, record_type in RECORD_TYPES.items()}


_MAY_BE_LARGE = re.compile(rb"[0-9]{19}")
"""What an integer past 64 bits has in JSON; few records do, and only those are looked through."""


class _Tag(msgspec.Struct):
    """Just the tag of a record."""

    task: str


def encode_record(record: Record) -> bytes:
    """Encode a record as JSON.

    Raises:
        DatasetError: a value cannot be represented, as an integer past 64 bits, or a float that is not finite where
            null is not declared.
    """
    data = msgspec.json.encode(record)
    try:
        decode_record(data)
    except CorruptShardError as error:
        raise DatasetError(f"record {record.key!r} does not survive a round trip (not finite?): {error}") from error
    return data


def decode_record(data: bytes | memoryview, *, where: str = "record") -> Record:
    """Decode and check one record.

    Raises:
        CorruptShardError: not JSON, an unknown task, a field that is missing, unknown or of the wrong type, or an
            integer past 64 bits, which no table holds.
    """
    try:
        task = msgspec.json.decode(data, type=_Tag).task
        if task not in _DECODERS:
            known = ", ".join(RECORD_TYPES)
            raise CorruptShardError(f"{where}: unknown task {task!r}; this tracekit knows: {known}. Upgrade tracekit?")
        record = _DECODERS[task].decode(data)
    except UNREADABLE as error:
        raise CorruptShardError(f"{where}: {error}") from error
    if _MAY_BE_LARGE.search(data):
        path = _too_large(msgspec.to_builtins(record), "$")
        if path is not None:
            raise CorruptShardError(f"{where}: an integer past 64 bits - at `{path}`")
    return record


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
