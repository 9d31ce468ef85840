"""Local files as rows: JSON lines, CSV, TSV, Parquet, CoNLL-U and plain text, by suffix.

A table knows how many rows it has and decodes only those that are asked for. A row that cannot be decoded says where it
is and what is wrong; whether that stops a run is decided elsewhere. Nothing here knows any task's columns.
"""

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from builders.kit.cells import SourceRow, untyped
from builders.kit.literals import check_characters
from tracekit.errors import SourceError
from tracekit.format.shards import sha256_file

__all__ = ["SUFFIXES", "BadRow", "Reader", "Table", "open_file"]

_BATCH_ROWS = 1024
_MAX_LINE_BYTES = 1 << 28
"""Longest line of a text file and longest cell of a CSV file: 256 MiB, several times which is in memory at once."""
_DELIMITERS = ";\t|"
"""What may stand between the cells of a CSV file whose header has no comma."""
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class BadRow(NamedTuple):
    """A row that is no row of columns: where it is and what is wrong."""

    where: str
    why: str


Reader = Callable[[range], Iterator[SourceRow | BadRow]]


class Table(NamedTuple):
    """An opened source: its rows are counted and none is decoded. `read` gives the rows of a window."""

    id: str
    revision: str
    subset: str | None
    num_rows: int
    read: Reader


def open_file(path: Path, *, header_names: Collection[str] = ()) -> Table:
    """Open a local file by its suffix; the first line of a TSV file is a header where it has one of `header_names`."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise SourceError(f"{str(path)!r} is {kind}; give a file, or org/name@main for the Hub dataset of that name")
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise SourceError(f"{str(path)!r} has suffix {path.suffix!r}; expected a file with one of {' '.join(_OPENERS)}")
    try:
        if not path.stat().st_size:
            raise SourceError(f"{path.name} is empty; expected at least one row; use another --source")
        if opener is _open_tsv and _has_header(path, header_names):
            return _open_csv(path, "\t")
        return opener(path)
    except OSError as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error.strerror or error}; use another --source") from error


def _file_table(path: Path, *, num_rows: int, read: Reader) -> Table:
    return Table(path.name, f"sha256:{sha256_file(path)}", None, num_rows, read)


def _decode_row(
    index: int, where: str, decode: Callable[[], dict[str, Any]], *, is_untyped: bool = False
) -> SourceRow | BadRow:
    try:
        return SourceRow(index, where, decode(), is_untyped)
    except ValueError as error:
        return BadRow(where, str(error))


def _open_parts(
    path: Path,
    parts: Callable[[Path], Iterator[tuple[int, Any]]],
    decode: Callable[[Any], dict[str, Any]],
    *,
    is_untyped: bool = False,
) -> Table:
    """A text file as a table; `parts` are its rows before they are decoded, each with the number of its first line."""

    def read(window: range) -> Iterator[SourceRow | BadRow]:
        for index, (line, part) in zip(window, islice(parts(path), window.start, window.stop), strict=True):
            yield _decode_row(index, f"{path.name} line {line}", partial(decode, part), is_untyped=is_untyped)

    return _file_table(path, num_rows=sum(1 for _ in parts(path)), read=read)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file with their numbers from 1."""
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(_MAX_LINE_BYTES + 1)
            if not line:
                return
            if number == 1 and line.startswith(_BYTE_ORDER_MARKS):
                raise SourceError(f"{path.name} begins with a byte order mark; expected UTF-8 without one; save it so")
            if len(line) > _MAX_LINE_BYTES:
                raise SourceError(
                    f"{path.name} line {number} is longer than {_MAX_LINE_BYTES} bytes; write shorter lines, or Parquet"
                )
            yield number, line


def _decode_text(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {line[error.start]:#04x} at byte column {error.start + 1}; expected UTF-8") from error
    if "\0" in text:
        raise ValueError(f"a NUL byte at column {text.index(chr(0)) + 1}; expected text")
    return text


def _check_columns(where: str, names: list[str]) -> None:
    if not all(names) or len(set(names)) < len(names):
        raise SourceError(f"{where}: columns {names}; expected a name for each, and each name once; rename them")


# JSON lines


def _open_jsonl(path: Path) -> Table:
    return _open_parts(path, _filled_lines, _decode_object)


def _filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in _lines(path) if line.strip())


def _decode_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line."""
    text = _decode_text(line).rstrip("\r\n")
    try:
        data = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON at column {error.colno}: {error.msg}; expected one JSON object a line") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply; expected one JSON object a line") from error
    if not isinstance(data, dict):
        how = ", as pandas writes with to_json(orient='records', lines=True)" if isinstance(data, list) else ""
        raise ValueError(f"{text:.40} is no JSON object; expected one JSON object a line{how}")
    if "\\u" in text:
        check_characters(data)
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object; expected each name once")
    return found


# CSV


def _open_csv(path: Path, delimiter: str = ",") -> Table:
    line, header = next(_csv_records(path, delimiter), (1, [""]))
    if delimiter == "," and len(header) == 1 and (others := [one for one in _DELIMITERS if one in header[0]]):
        return _open_csv(path, others[0])
    names = _named(header)
    _check_columns(f"{path.name} line {line}", names)

    def records(path: Path) -> Iterator[tuple[int, list[str]]]:
        return islice(_csv_records(path, delimiter), 1, None)

    return _open_parts(path, records, partial(_pair, names), is_untyped=True)


def _named(header: list[str]) -> list[str]:
    """The header, with the name that pandas reads for the column without one in front: the index that it writes."""
    return ["Unnamed: 0", *header[1:]] if len(header) > 1 and not header[0] else header


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank lines, header first, each with the number of its first line.

    A fault here leaves no way to tell where the next record starts, so it is never skipped.
    """
    csv.field_size_limit(_MAX_LINE_BYTES)  # of this process; 131,072 characters otherwise
    reader = csv.reader(_csv_lines(path), strict=True, delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, repr(delimiter))
            expected = f'expected cells between {what}, in " where they hold {what}, quotes or line ends'
            raise SourceError(f"{path.name} line {line}: {error}; {expected}; fix it or use JSONL") from error
        if cells:
            yield line, cells


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield _decode_text(line)
        except ValueError as error:
            raise SourceError(f"{path.name} line {number}: {error}; save it as UTF-8") from error


def _pair(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells; expected {len(header)}, one for each of {', '.join(header)}")
    return {name: untyped(cell) for name, cell in zip(header, cells, strict=True)}


# TSV: with a header as CSV, else raw lines in which a quote is a character


def _has_header(path: Path, names: Collection[str]) -> bool:
    """Whether the first line names columns: one of them at least is known, and none stands twice."""
    line = next((line for _, line in _filled_lines(path)), b"")
    cells = [cell.strip().strip('"') for cell in line.decode(errors="replace").split("\t")]
    return not set(cells).isdisjoint(names) and len(set(cells)) == len(cells)


def _open_tsv(path: Path) -> Table:
    return _open_parts(path, _filled_lines, _decode_cells, is_untyped=True)


def _decode_cells(line: bytes) -> dict[str, Any]:
    cells = _decode_text(line).rstrip("\r\n").split("\t")
    return {str(number): cell for number, cell in enumerate(cells, start=1)}


# CoNLL-U: read here, for the package `conllu` also splits at two spaces and takes lines with too few columns

_CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def _open_conllu(path: Path) -> Table:
    return _open_parts(path, _sentences, _decode_sentence)


def _sentences(path: Path) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
    """The runs of lines between blank ones, each line with its number, each run with that of its first line."""
    for is_blank, lines in groupby(_lines(path), lambda one: not one[1].strip()):
        if not is_blank:
            block = list(lines)
            yield block[0][0], block


def _decode_sentence(lines: list[tuple[int, bytes]]) -> dict[str, Any]:
    """Comments `# name = value` by name, the first of each name, and the columns as lists."""
    comments: dict[str, Any] = {}
    words: list[list[str]] = []
    for number, line in lines:
        try:
            text = _decode_text(line).rstrip("\r\n")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if text.startswith("#"):
            name, equals, value = text[1:].partition("=")
            if equals:
                comments.setdefault(name.strip(), value.strip())
            continue
        words.append(text.split("\t"))
        if len(words[-1]) != len(_CONLLU_COLUMNS):
            raise ValueError(f"line {number}: {len(words[-1])} columns between tabs; expected the 10 of CoNLL-U")
    if not words:
        raise ValueError("a sentence without words; expected a line of 10 columns for each")
    return comments | {name: [cells[i] for cells in words] for i, name in enumerate(_CONLLU_COLUMNS)}


# Raw text


def _open_text(path: Path) -> Table:
    return _open_parts(path, _lines, _decode_line)


def _decode_line(line: bytes) -> dict[str, Any]:
    text = _decode_text(line)
    return {"line": text[:-2] + "\n" if text.endswith("\r\n") else text}


# Parquet


def _open_parquet(path: Path) -> Table:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path.name, file.schema_arrow.names)
            return _file_table(path, num_rows=file.metadata.num_rows, read=partial(_read_parquet, path))
    except pa.ArrowException as error:
        raise _parquet_error(path, error) from error


def _read_parquet(path: Path, window: range) -> Iterator[SourceRow | BadRow]:
    """Only the row groups that hold rows of the window are read."""
    group_start = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                group_stop = group_start + file.metadata.row_group(group).num_rows
                if group_start < window.stop and group_stop > window.start:
                    index = group_start
                    for batch in file.iter_batches(row_groups=[group], batch_size=_BATCH_ROWS):
                        first = max(window.start - index, 0)
                        wanted = batch.slice(first, max(window.stop - index - first, 0))
                        for offset, data in enumerate(_exact(wanted).to_pylist(), start=index + first):
                            yield SourceRow(offset, f"{path.name} row {offset}", data)
                        index += batch.num_rows
                group_start = group_stop
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _parquet_error(path, error) from error


def _exact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same with 32-bit floats as the shortest decimals that they are written as: 0.1, not 0.10000000149011612."""
    for place, field in enumerate(batch.schema):
        if pa.types.is_float32(field.type):
            batch = batch.set_column(place, field.name, batch.column(place).cast(pa.string()).cast(pa.float64()))
    return batch


def _parquet_error(path: Path, error: Exception) -> SourceError:
    return SourceError(f"{path.name} cannot be read as Parquet: {error}; copy or write it again, or use JSONL")


_OPENERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".json": _open_jsonl,
    ".parquet": _open_parquet,
    ".csv": _open_csv,
    ".tsv": _open_tsv,
    ".conllu": _open_conllu,
    ".txt": _open_text,
    ".raw": _open_text,
    ".tokens": _open_text,
}

SUFFIXES = tuple(_OPENERS)
"""Suffixes of the files that are understood."""
