"""Options of a multiple-choice row, wherever the row keeps them, and which of them is the right one.

    a list            ["Mars", "Jupiter", ...], [{"label": "A", "text": "Mars"}, ...]
    an object         {"text": [...], "label": [...]}, {"A": "Mars", ...}
    columns           A B C D; choice0 choice1 ..., option_a ..., opa ..., ending0 ..., sol1 sol2; or --choices-columns

The right option is named by its label, by a letter in order, or by a number in order. `--label-start` says whether
numbers count from 0 or from 1. Columns numbered from 1 do not say so: COPA's `choice1 choice2` go with 0 and 1,
Winogrande's `option1 option2` with 1 and 2.
"""

import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from builders.kit.cells import Cells, Columns
from tracekit.console import say
from tracekit.errors import SourceError

__all__ = ["Options", "label_index", "option_text", "options_of", "tell_unlabelled"]

_LETTERS = string.ascii_uppercase
_COLUMN = re.compile(
    r"(?P<stem>(?:choice|option|opt|op|ending|sol)[ _-]?)(?P<place>[a-z]|\d\d?)|(?P<letter>[a-z])",
    re.IGNORECASE | re.ASCII,
)


class Options(NamedTuple):
    """The options of a row, before anything is checked."""

    pairs: list[tuple[Any, Any]]
    """The source's own label of each, None where it has none, and its text."""
    start: int | None = None
    """Number in the name of the first column, where names of columns number the options."""


def options_of(cells: Cells, *, max_columns: int = 26) -> Options:
    """The options of a row; none where the row has none.

    Raises:
        SourceError: a text that should hold them cannot be read, labels and texts differ in number, or two sets of
            columns hold options.
    """
    names = cells.named("choices")
    if len(names) > 1:
        texts = [cells.data[name] for name in names]
        while texts and texts[-1] in (None, ""):
            texts.pop()
        return Options([(None, text) for text in texts])
    options = _from_choices(cells, max_columns)
    if not names and cells.first("choices")[1] is not None:
        _check_columns(cells, options)
    return options


def _from_choices(cells: Cells, max_columns: int) -> Options:
    """The options of one column, or of several that are lettered or numbered."""
    name, given = cells.first("choices")
    value = cells.structure(name, given)
    if isinstance(value, str) and not value.strip().isdecimal():
        raise SourceError(
            f"column {name!r} holds the options as {value.strip()[:60]!r}; expected a list or an object in JSON; write "
            "one, or a column for each option"
        )
    if value is None:
        return _from_columns(cells, max_columns)
    if isinstance(value, dict) and {"text", "label"} <= value.keys():
        labels, texts = (cells.structure(name, value[part]) for part in ("label", "text"))
        labels, texts = (one if isinstance(one, list) else [] for one in (labels, texts))
        if len(labels) != len(texts):
            raise SourceError(
                f"{max(len(labels), len(texts))} options: {len(labels)} labels and {len(texts)} texts, so that an "
                "option is None; expected a text for each label"
            )
        return Options(list(zip(labels, texts, strict=True)))
    if isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: (pair[0].isdecimal() and int(pair[0]), pair[0]))
        while pairs and pairs[-1][1] is None:  # Parquet gives every row the names of all
            pairs.pop()
        return Options(pairs)
    listed = value if isinstance(value, list) else []
    return Options([(one.get("label"), one.get("text")) if isinstance(one, dict) else (None, one) for one in listed])


def _from_columns(cells: Cells, max_columns: int) -> Options:
    """The options of columns that are lettered or numbered."""
    sets: dict[tuple[str, bool, bool], dict[int, str]] = {}
    for name in cells.data:
        match = _COLUMN.fullmatch(name)
        if match is None or cells.has_role(name):
            continue
        place, stem = match["place"] or match["letter"], match["stem"] or ""
        number = int(place) if place.isdecimal() else _LETTERS.index(place.upper())
        if number < max_columns or place.isdecimal():
            sets.setdefault((stem.lower(), place.isdecimal(), place.isupper()), {})[number] = name
    found = [
        (min(columns), is_numbered, columns)
        for (_, is_numbered, _), columns in sets.items()
        if len(columns) > 1
        and min(columns) <= is_numbered
        and any(not _is_empty(cells, name) for name in columns.values())
    ]
    if not found:
        return Options([])
    if len(found) > 1:
        names = " and ".join(" ".join(columns.values()) for _, _, columns in found)
        raise SourceError(f"columns {names} hold options; expected one set of columns; name it by --choices-columns")
    ((start, is_numbered, columns),) = found
    if max(columns) - start >= len(columns) or len(columns) > len(_LETTERS):
        raise SourceError(
            f"columns {' '.join(columns.values())} hold options, with a gap or more than {len(_LETTERS)}; expected all "
            "from the first on; name them by --choices-columns"
        )
    named = [name for _, name in sorted(columns.items())]
    while _is_empty(cells, named[-1]):
        named.pop()
    if empty := [name for name in named if _is_empty(cells, name)]:
        raise SourceError(
            f"column {empty[0]!r} holds no option, and {named[-1]!r} after it holds one; expected all from the first on"
        )
    pairs = [(letter, cells.data[name]) for letter, name in zip(_LETTERS, named, strict=False)]
    return Options(pairs, start if is_numbered else None)


def _check_columns(cells: Cells, options: Options) -> None:
    """Refuse columns A, B, ... that hold other options than the list beside them: a letter may mean either."""
    names = list(_LETTERS[: len(options.pairs)])
    beside = [cells.data.get(name) for name in names]
    if options.pairs and None not in beside and [*map(str, beside)] != [str(text) for _, text in options.pairs]:
        listed = cells.first("choices")[0]
        raise SourceError(
            f"columns {' '.join(names)} hold other options than {listed!r}; expected one set of options; name it by "
            "--choices-columns"
        )


def _is_empty(cells: Cells, name: str) -> bool:
    return cells.data[name] in (None, "")


def option_text(cells: Cells, value: Any, what: str) -> str:
    """An option's text, or its number as text.

    Raises:
        SourceError: it is missing, blank, or neither.
    """
    text = None if isinstance(value, bool | list | dict) else cells.scalar("choices", value)
    if text is None:
        raise SourceError(f"{what} {value!r}; expected a text")
    return text


def label_index(
    cells: Cells, options: Options, labels: Sequence[str], *, start: int | None, nothing: str
) -> int | None:
    """Number of the right option; None for the empty answer of an unlabelled split.

    Args:
        cells: The row.
        options: Its options.
        labels: Their labels.
        start: Where a task's numbers begin, unless the row or the configuration says it; None: numbers are no answers.
        nothing: How messages say that an answer may be empty.

    Raises:
        SourceError: the answer is none of the options, or a number that may count from 0 or from 1.
    """
    name, value = cells.first("label")
    if value is None:
        return None
    if cells.label_start is not None or options.start is not None:
        start = 0 if options.start == 0 else cells.label_start
    is_fraction = isinstance(value, float) and not value.is_integer()
    text = str(value) if is_fraction else cells.scalar(name, value) or ""
    upper = [label.upper() for label in labels]
    letters = _LETTERS[: len(labels)]
    is_lettered, is_numbered = bool(set(upper) & set(letters)), any(label.isdecimal() for label in labels)
    if text in labels:
        return labels.index(text)
    if text.upper() in upper:
        return upper.index(text.upper())
    if len(text) == 1 and text.upper() in letters and not is_lettered:
        return letters.index(text.upper())
    if text.isdecimal() and not is_numbered:
        if start is not None and 0 <= int(text) - start < len(labels):
            return int(text) - start
        if start is None and options.start == 1:
            raise SourceError(f"the answer is {value!r}, and columns count options from 1; pass --label-start 0 or 1")
    accepted = [f"one of {' '.join(labels)}"]
    accepted += [] if is_lettered else [f"a letter A to {letters[-1]}"]
    if start is not None and not is_numbered:
        accepted.append(f"a number {start} to {len(labels) - 1 + start}, counted from {start}")
    more = "; say where numbers count from: --label-start 0 or 1" if text.isdecimal() and not is_numbered else ""
    raise SourceError(f"the answer is {value!r}; expected {', or '.join(accepted)}{nothing}{more}; column {name!r}")


def tell_unlabelled(labels: Sequence[int | None], columns: Columns) -> None:
    """Say how many questions have no right answer: its column may have another name."""
    if num := labels.count(None):
        say(
            f"{num} of {len(labels)} questions have no right answer in {', '.join(map(repr, columns['label']))}, and "
            "will not be judged; --label-column names another column"
        )
