"""Filters: `field=value` on the records of a configuration, as the command line takes them."""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from tracekit.errors import ConfigError
from tracekit.read.store import TraceStore

__all__ = ["dig", "parse_filter", "rows_where"]


def parse_filter(text: str) -> tuple[list[str], Any]:
    """Read `field=value`: the dotted path of a field of the record, and a JSON value; what is no JSON is a string.

    Raises:
        ConfigError: there is no `=`, or nothing before it.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"{text!r} is no filter; expected field=value, as subject=history or level=0.1")
    try:
        return path.split("."), json.loads(value)
    except json.JSONDecodeError:
        return path.split("."), value


def rows_where(store: TraceStore, where: Sequence[str]) -> list[int]:
    """Rows of the samples that all filters let through; all rows where there is no filter.

    A filter is `field=value`: a dotted path into the record (`level=0.1`, `model.adapter=null`, `options.0.label=A`)
    and the JSON value that has to be there. Numbers are equal as numbers, true is not 1.

    Raises:
        ConfigError: a filter cannot be read, names no field, or they let nothing through.
    """
    rows = list(range(len(store)))
    for text in where:
        path, wanted = parse_filter(text)
        try:
            values = store.columns(path[:1])[path[0]].to_pylist()
        except ConfigError as error:
            raise _no_field(store.schema, path, text) from error
        found = [dig(values[row], path[1:], where=f"the filter {text!r}") for row in rows]
        kept = [row for row, value in zip(rows, found, strict=True) if _is_same(value, wanted)]
        if not kept:
            there = ", ".join(name for name, _ in Counter(json.dumps(value) for value in found).most_common(5))
            name = ", ".join(store.info().configs)
            raise ConfigError(f"no sample of {name} passes the filter {text!r}; values there: {there or 'none'}")
        rows = kept
    return rows


def dig(value: Any, path: Sequence[str], *, where: str) -> Any:
    """What lies at a path inside a value; None below a null.

    Raises:
        ConfigError: a step that is not there; `where` says where the path was given.
    """
    for step in path:
        if value is None:
            return None
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            there = (
                ", ".join(value) if isinstance(value, dict) else "a number" if isinstance(value, list) else "nothing"
            )
            raise ConfigError(f"{where} has {step!r}, where there is {there}")
    return value


def _no_field(schema: pa.Schema, path: Sequence[str], text: str) -> ConfigError:
    """What to say of a filter whose first name is no field: the fields that are meant perhaps."""
    nested = list(_nested(schema))
    inside = [name for name in nested if name.split(".")[-1] == path[0]]
    near = difflib.get_close_matches(".".join(path), [*schema.names, *nested], n=3)
    meant = list(dict.fromkeys([*inside, *near]))
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"fields: {', '.join(schema.names)}"
    return ConfigError(f"the filter {text!r}: records have no field {path[0]!r}; {hint}")


def _nested(schema: pa.Schema) -> Iterator[str]:
    """Dotted names of what is inside the fields that are structs."""
    for field in schema:
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)


def _is_same(value: Any, wanted: Any) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
