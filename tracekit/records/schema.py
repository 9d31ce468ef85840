"""Records as others describe them: JSON Schema, Arrow types, and the docstring under each field."""

import ast
import inspect
import textwrap
import types
import typing
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_origin

import msgspec

from tracekit.records.base import Record

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["arrow_schema", "field_docs", "json_schema"]


def json_schema(record_type: type[Record]) -> dict[str, Any]:
    """JSON Schema of a record type, each field with its description."""
    schema = msgspec.json.schema(record_type)
    for struct in _structs_of(record_type):
        properties = schema["$defs"][struct.__name__]["properties"]
        for name, text in field_docs(struct).items():
            if name in properties:
                properties[name]["description"] = text
    return schema


def arrow_schema(record_type: type[Record]) -> "pa.Schema":
    """Arrow schema of a record type: `task`, then its fields in order."""
    import pyarrow as pa

    fields = [pa.field("task", pa.string(), nullable=False)]
    fields += [_arrow_field(field) for field in msgspec.structs.fields(record_type)]
    return pa.schema(fields)


@cache
def field_docs(struct: type) -> dict[str, str]:
    """The docstring under each field of a Struct, inherited ones first."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base is msgspec.Struct or not issubclass(base, msgspec.Struct):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef), base
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = str(text.value.value)
    return docs


def _arrow_field(field: msgspec.structs.FieldInfo) -> "pa.Field":
    import pyarrow as pa

    arrow_type, nullable = _arrow_type(field.type)
    return pa.field(field.encode_name, arrow_type, nullable=nullable)


def _arrow_type(annotation: Any) -> tuple["pa.DataType", bool]:
    """Arrow type of an annotation, and whether null is declared."""
    import pyarrow as pa

    if get_origin(annotation) in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in get_args(annotation) if argument is not type(None))
        return _arrow_type(inner)[0], True
    if get_origin(annotation) is list:
        return pa.list_(_arrow_type(get_args(annotation)[0])[0]), False
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return pa.struct([_arrow_field(field) for field in msgspec.structs.fields(annotation)]), False
    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return scalars[annotation], False


def _structs_of(record_type: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """A Struct and all Structs inside it."""
    found: list[type[msgspec.Struct]] = []
    waiting: list[Any] = [record_type]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
            if annotation not in found:
                found.append(annotation)
                waiting += [field.type for field in msgspec.structs.fields(annotation)]
        else:
            waiting += get_args(annotation)
    return found
