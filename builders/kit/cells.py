"""Cells: what a value of a row means, whichever file it is from. Every builder reads its columns here.

    in the row                                          is read as
    null, NaN, NaT, pandas.NA                           missing
    an empty cell; in CSV and TSV also nan NaN NaT <NA> missing, as pandas writes it; NA, None and null are texts there
    1969.0                                              1969, also in the text of a CSV cell; no float from 2**53 on
    True                                                "True", as CSV has it
    2020-01-01 00:00:00 (a date of Parquet)             "2020-01-01"
    numpy and pandas values, decimals, bytes            the texts and numbers that they hold
    a text that is a list or an object, where one of    the list or object (builders.kit.literals); what cannot be
    read is those may be                                        refused, and so is `a, b` in brackets without quotes

Each task names its columns by role. `--question-column` and the like put other names in the place of the task's own.
"""

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from builders.kit.literals import is_structured, read_structure
from tracekit.errors import SourceError

__all__ = ["ROLES", "Cells", "Columns", "SourceRow", "untyped"]

Columns = Mapping[str, Sequence[str]]
"""Names of columns by role, those that are looked at first in front."""

ROLES = {
    "question": "question_column",
    "answer": "answer_column",
    "choices": "choices_columns",
    "label": "label_column",
    "text": "text_column",
    "id": "id_column",
}
"""What a column may be to a task, and the setting of a source that names it."""

_MISSING = (None, "", [], {})
_MISSING_TEXTS = frozenset(("nan", "NaN", "NaT", "<NA>"))
_WHOLE = re.compile(r"-?(?:0|[1-9]\d*)\.0", re.ASCII)
"""A whole float as programs write it: `007.0` is none."""
_MAX_EXACT = 2**53
_MAX_DEPTH = 64
_PARTS_OF_ANSWERS = ("value", "text", "aliases")


class SourceRow(NamedTuple):
    """One row of a source."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.index is not missed
    """Row in the source, from 0; blank lines are not rows."""
    where: str
    """For messages: `rows.jsonl line 17` (lines from 1) or `org/name subset split row 17` (rows from 0)."""
    data: dict[str, Any]
    """Columns by name."""
    is_untyped: bool = False
    """Whether the file has texts alone, so that numbers and missing values are written as texts (CSV, TSV)."""
    named: Columns = MappingProxyType({})
    """Columns that the configuration names, by role."""
    label_start: int | None = None
    """Number of the first option in answers that are numbers, where the configuration says it."""


def untyped(text: str) -> str | None:
    """A cell of a file that has texts alone; None where it is the mark of a missing value."""
    return None if text.strip() in _MISSING_TEXTS else text


class Cells:
    """The cells of one row, by role."""

    def __init__(self, row: SourceRow, columns: Columns) -> None:
        self._row, self._columns = row, {**columns, **row.named}
        self.label_start = row.label_start
        read = _typed if row.is_untyped else _plain
        self.data: dict[str, Any] = {name: read(value) for name, value in row.data.items()}

    @property
    def listed(self) -> str:
        """The names of all columns, for messages."""
        return ", ".join(map(str, self.data))

    def listed_for(self, role: str) -> str:
        """The names of all columns; and the flag that names one, where none of them is a role's."""
        is_known = role not in ROLES or any(name in self.data for name in self.names(role))
        return self.listed if is_known else f"{self.listed}; name one by --{ROLES[role].replace('_', '-')}"

    def names(self, role: str) -> Sequence[str]:
        """The columns that have a role."""
        return self._columns[role]

    def named(self, role: str) -> Sequence[str]:
        """The columns that the configuration names for a role."""
        return self._row.named.get(role, ())

    def has_role(self, name: str) -> bool:
        """Whether a column has a role of its own."""
        return any(name in names for names in self._columns.values())

    def first(self, role: str) -> tuple[str, Any]:
        """Name and value of the first column of a role that is not missing; the value is None where all are."""
        names = self.names(role)
        return next(
            ((name, self.data[name]) for name in names if self.data.get(name) not in _MISSING), (names[0], None)
        )

    def text(self, role: str, *, what: str) -> str:
        """The text of a role, as it stands.

        Raises:
            SourceError: nothing is there, a blank text, or no text.
        """
        texts = (self._row.data.get(name) for name in self.names(role))  # as they stand: `17.0` is a text here
        value = next((one for one in texts if isinstance(one, str) and one.strip()), None)
        if value is None:
            _, value = self.first(role)
            names = list(map(repr, self.names(role)))
            where = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
            raise SourceError(
                f"no {what}; expected a text in {where}, found {value!r}; columns: {self.listed_for(role)}"
            )
        return value

    def identity(self) -> str:
        """The source's own id, else the number of the row: `row-7` where others of the source may have an id `7`."""
        name, value = self.first("id")
        is_named = any(name in self.data for name in self.names("id"))
        return self.scalar(name, value) or (f"row-{self._row.index}" if is_named else str(self._row.index))

    def scalar(self, name: str, value: Any) -> str | None:
        """One value as text, or None where it is missing.

        Raises:
            SourceError: it is a list, an object, or a number that a float cannot hold.
        """
        if isinstance(value, float):
            if math.isinf(value) or (value.is_integer() and abs(value) >= _MAX_EXACT):
                raise SourceError(f"column {name!r}: the float {value!r} is not exact; write an integer or a text")
            return str(int(value)) if value.is_integer() else repr(value)
        if isinstance(value, str):
            return value.strip() or None
        if value is None or isinstance(value, bool | int):
            return None if value is None else str(value)
        raise SourceError(f"column {name!r}: expected one value, found {str(value)[:80]!r}")

    def structure(self, name: str, value: Any) -> Any:
        """A list or object as it is, or the one that a text holds; any other value as it is.

        Raises:
            SourceError: a text begins like one and cannot be read.
        """
        if not isinstance(value, str) or not is_structured(value):
            return value
        try:
            return _plain(read_structure(value.strip()))
        except ValueError as error:
            raise SourceError(
                f"column {name!r}: {value.strip()[:60]!r} looks like a list or an object, but cannot be read: {error}; "
                'write JSON, as ["Paris", "City of Paris"]'
            ) from error

    def answers(self) -> list[str]:
        """Everything that the columns of role `answer` hold, in order, each once.

        Raises:
            SourceError: there is none, or a value is no text and no number.
        """
        found = [
            text
            for name in self.names("answer")
            for value in self._parts(name, self.structure(name, self.data.get(name)))
            if (text := self.scalar(name, value)) is not None
        ]
        if not found:
            names = ", ".join(map(repr, self.names("answer")))
            listed = self.listed_for("answer")
            raise SourceError(
                f"no answer; expected a text, a list or {{'value', 'aliases'}} in {names}; columns: {listed}"
            )
        return list(dict.fromkeys(found))

    def _parts(self, name: str, value: Any) -> list[Any]:
        """The single values of an answer."""
        if isinstance(value, list):
            return [part for one in value for part in (self._parts(name, one) if isinstance(one, dict) else [one])]
        if not isinstance(value, dict):
            return [value]
        parts = [value[part] for part in _PARTS_OF_ANSWERS if part in value]
        if value and not parts:
            raise SourceError(
                f"column {name!r}: an object with {', '.join(value)}; expected 'value', 'aliases' or 'text'"
            )
        return [one for part in parts for one in (part if isinstance(part, list) else [part])]


def _typed(text: Any) -> Any:
    """A cell of a file that has texts alone: a whole number where it is written as a whole float."""
    return int(text.strip()[:-2]) if isinstance(text, str) and _WHOLE.fullmatch(text.strip()) else text


def _plain(value: Any, depth: int = 0) -> Any:
    """A value of any library as None, a bool, a number, a text, a list or an object of such."""
    if depth > _MAX_DEPTH:
        raise SourceError(f"a value is nested deeper than {_MAX_DEPTH} levels; expected a table")
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one, depth + 1) for name, one in value.items()}
    if isinstance(value, np.str_ | np.datetime64):
        value = str(value)
        return None if value == "NaT" else value
    if isinstance(value, np.generic):
        value = float(str(value)) if isinstance(value, np.floating) else value.item()  # float32: 0.1, not 0.10000000149
    if type(value).__name__ == "NAType" or (isinstance(value, float | Decimal | datetime.datetime) and value != value):
        return None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, datetime.datetime) and value.tzinfo is None and value.time() == datetime.time():
        value = value.date()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return _decoded(value) if isinstance(value, bytes) else value


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{value[:20]!r} is no text in UTF-8; write the column as text") from error
