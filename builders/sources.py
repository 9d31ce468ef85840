"""Rows of a source, whichever kind it is: the task's dataset on the Hub, another one, a local file, or the sample.

    default                              the task's own dataset
    sample                               the few rows packaged beside the builder
    rows.jsonl  .ndjson .json            one JSON object a line, UTF-8; blank lines are not rows
    rows.parquet                         columns by name
    rows.csv                             a header line, then cells; every value is text
    org/name[:subset][@revision]         a dataset on the Hub

A builder hands over a pure function from row to example and gets its examples, plus what the manifest says of the data.
This module knows nothing of any task's columns. It runs no code that comes with the data.
"""

import codecs
import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tracekit.config import SourceConfig
from tracekit.errors import SourceError
from tracekit.manifest import SourceInfo
from tracekit.shards import sha256_file

if TYPE_CHECKING:
    import datasets

__all__ = ["Examples", "HubSource", "Row", "read_examples"]

ExampleT = TypeVar("ExampleT")

_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<subset>[^@]+))?(?:@(?P<revision>.+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INSTEAD = "or use --source FILE or --source sample"
_BATCH_ROWS = 1024
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class HubSource(NamedTuple):
    """Address of a dataset on the Hub."""

    id: str
    """`org/name`."""
    subset: str | None
    """Its configuration; None where it has but one."""


class Row(NamedTuple):
    """One row of a source."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.index is not missed
    """Row in the source, from 0; blank lines are not rows."""
    where: str
    """For messages: `rows.jsonl line 17` (lines from 1) or `org/name subset split row 17` (rows from 0)."""
    data: dict[str, Any]
    """Columns by name."""


class Examples(NamedTuple, Generic[ExampleT]):
    """What came of a source."""

    examples: list[ExampleT]
    """The examples, in the order of the source."""
    info: SourceInfo
    """The data, for the manifest."""


class _BadRow(NamedTuple):
    """A row that is no row of columns: where it is and what is wrong."""

    where: str
    why: str


_Reader = Callable[[range], Iterator[Row | _BadRow]]


class _Table(NamedTuple):
    """An opened source: its rows are counted and none is decoded. `read` gives the rows of a window."""

    id: str
    revision: str
    subset: str | None
    num_rows: int
    read: _Reader


def read_examples(
    config: SourceConfig, *, default: HubSource, sample: Path, parse: Callable[[Row], ExampleT]
) -> Examples[ExampleT]:
    """Read the rows that the configuration asks for and make an example of each.

    `offset` and `limit` count rows of the source: `limit` rows after the first `offset`, malformed ones among them, so
    skipped rows leave fewer examples than `limit`. No other row is decoded.

    Args:
        config: Which data, how much of it, and what a malformed row does.
        default: The task's own dataset.
        sample: File with the packaged sample.
        parse: Makes an example of a row; says of a malformed one, in a ValueError, what was wrong and what was
            expected. It need not say where.

    Raises:
        SourceError: the source is missing, cannot be reached or read, is empty or has no row left after `offset`; a row
            is malformed and `on_bad_row` is `error`; or every row was skipped.
    """
    table = _open(config, default=default, sample=sample)
    window = _window(table, config)
    examples: list[ExampleT] = []
    skipped: list[str] = []
    for row in table.read(window):
        try:
            if isinstance(row, _BadRow):
                raise SourceError(row.why)
            examples.append(parse(row))
        except ValueError as error:
            if config.on_bad_row == "error":
                raise SourceError(f"{row.where}: {error}; fix it or pass --on-bad-row skip") from error
            skipped.append(f"{row.where}: {error}")
    if not examples:
        raise SourceError(
            f"{table.id}: all {len(window)} rows read, of {table.num_rows}, were malformed and skipped; the first: "
            f"{skipped[0]}; fix them or use another --source"
        )
    info = SourceInfo(
        id=table.id,
        revision=table.revision,
        subset=table.subset,
        split=config.split,
        num_rows=table.num_rows,
        num_used=len(examples),
        skipped=skipped,
    )
    return Examples(examples, info)


def _window(table: _Table, config: SourceConfig) -> range:
    """The rows to read."""
    if not table.num_rows:
        raise SourceError(f"{table.id} has no rows; expected at least one; use another --source")
    if config.offset >= table.num_rows:
        raise SourceError(
            f"{table.id} has {table.num_rows} rows, so --offset {config.offset} leaves none; "
            f"use an offset of at most {table.num_rows - 1}"
        )
    stop = table.num_rows if config.limit is None else min(table.num_rows, config.offset + config.limit)
    return range(config.offset, stop)


def _open(config: SourceConfig, *, default: HubSource, sample: Path) -> _Table:
    """Open what `config.source` names."""
    source = config.source
    if source == "default":
        return _open_hub(default, None, config.split)
    if source == "sample":
        return _open_file(sample)
    # Not Path's: they raise on an unknown user and on a name too long, and take "" for the working directory.
    path = os.path.expanduser(source)  # noqa: PTH111
    if os.path.exists(path):  # noqa: PTH110
        return _open_file(Path(path))
    if source.startswith((".", "/", "~")) or Path(source).suffix.lower() in _OPENERS:
        raise SourceError(f"no such file: {source!r}; give an existing file, org/name for the Hub, or --source sample")
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SourceError(
            f"source {source!r} is neither a file nor a dataset on the Hub; expected `default`, `sample`, a file "
            f"({' '.join(_OPENERS)}) or org/name[:subset][@revision]"
        )
    return _open_hub(HubSource(match["id"], match["subset"]), match["revision"], config.split)


def _open_file(path: Path) -> _Table:
    """Open a local file by its suffix."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise SourceError(f"{str(path)!r} is {kind}; give a file, or org/name@main for the Hub dataset of that name")
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise SourceError(f"{str(path)!r} has suffix {path.suffix!r}; expected a file with one of {' '.join(_OPENERS)}")
    try:
        if not path.stat().st_size:
            raise SourceError(f"{path.name} is empty; expected at least one row; use another --source")
        return opener(path)
    except OSError as error:
        raise SourceError(f"{str(path)!r} cannot be read: {error.strerror or error}; use another --source") from error


def _file_table(path: Path, *, num_rows: int, read: _Reader) -> _Table:
    return _Table(path.name, f"sha256:{sha256_file(path)}", None, num_rows, read)


def _decode_row(index: int, where: str, decode: Callable[[], dict[str, Any]]) -> Row | _BadRow:
    try:
        return Row(index, where, decode())
    except ValueError as error:
        return _BadRow(where, str(error))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(_BYTE_ORDER_MARKS):
                raise SourceError(f"{path.name} begins with a byte order mark; expected UTF-8 without one; save it so")
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


def _open_jsonl(path: Path) -> _Table:
    return _file_table(path, num_rows=sum(1 for _ in _json_lines(path)), read=partial(_read_jsonl, path))


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in _lines(path) if line.strip())


def _read_jsonl(path: Path, window: range) -> Iterator[Row | _BadRow]:
    lines = islice(_json_lines(path), window.start, window.stop)
    for index, (number, line) in zip(window, lines, strict=True):
        yield _decode_row(index, f"{path.name} line {number}", partial(_decode_object, line))


def _decode_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line."""
    text = _decode_text(line).rstrip("\r\n")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON at column {error.colno}: {error.msg}; expected one JSON object a line") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply; expected one JSON object a line") from error
    if not isinstance(data, dict):
        raise ValueError(f"{text:.40} is no JSON object; expected one JSON object a line")
    if "\\u" in text:  # "\ud800" is JSON but half a character, which no tokenizer and no file takes
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"{half!r} is half a character; expected whole ones (surrogates in pairs)") from error
    return data


# CSV


def _open_csv(path: Path) -> _Table:
    records = _csv_records(path)
    line, header = next(records, (1, [""]))
    _check_columns(f"{path.name} line {line}", header)
    return _file_table(path, num_rows=sum(1 for _ in records), read=partial(_read_csv, path))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank lines, header first, each with the number of its first line.

    A fault here leaves no way to tell where the next record starts, so it is never skipped.
    """
    reader = csv.reader(_csv_lines(path), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            expected = 'expected cells between commas, in " where they hold commas, quotes or line ends'
            raise SourceError(f"{path.name} line {line}: {error}; {expected}; fix it or use JSONL") from error
        if cells:
            yield line, cells


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield _decode_text(line)
        except ValueError as error:
            raise SourceError(f"{path.name} line {number}: {error}; save it as UTF-8") from error


def _read_csv(path: Path, window: range) -> Iterator[Row | _BadRow]:
    records = _csv_records(path)
    _, header = next(records)
    for index, (line, cells) in zip(window, islice(records, window.start, window.stop), strict=True):
        yield _decode_row(index, f"{path.name} line {line}", partial(_pair, header, cells))


def _pair(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells; expected {len(header)}, one for each of {', '.join(header)}")
    return dict(zip(header, cells, strict=True))


# Parquet


def _open_parquet(path: Path) -> _Table:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path.name, file.schema_arrow.names)
            return _file_table(path, num_rows=file.metadata.num_rows, read=partial(_read_parquet, path))
    except pa.ArrowException as error:
        raise _parquet_error(path, error) from error


def _read_parquet(path: Path, window: range) -> Iterator[Row | _BadRow]:
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
                        for offset, data in enumerate(wanted.to_pylist(), start=index + first):
                            yield Row(offset, f"{path.name} row {offset}", data)
                        index += batch.num_rows
                group_start = group_stop
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _parquet_error(path, error) from error


def _parquet_error(path: Path, error: Exception) -> SourceError:
    return SourceError(f"{path.name} cannot be read as Parquet: {error}; copy or write it again, or use JSONL")


# The Hub


def _open_hub(hub: HubSource, revision: str | None, split: str) -> _Table:
    """Load one split of a dataset on the Hub at a resolved commit."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    try:
        commit = _resolve_commit(hub.id, revision)
        # hf:// keeps datasets from taking a folder of that name in the working directory instead.
        address = f"hf://datasets/{hub.id}"
        rows = datasets.load_dataset(address, hub.subset, split=split, revision=commit, keep_in_memory=False)
    except (DatasetsError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _hub_error(hub, revision, split, error) from error
    _check_commit(rows, hub, commit)
    where = " ".join(part for part in (hub.id, hub.subset, split) if part)
    return _Table(hub.id, commit, hub.subset, rows.num_rows, partial(_read_hub, rows, where))


def _resolve_commit(hub_id: str, revision: str | None) -> str:
    """The commit that a branch or tag stands for now; a commit is taken as it is, so that it works without network."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(hub_id, revision=revision).sha
    assert commit is not None, f"the Hub gave no commit for {hub_id}"
    return commit


def _check_commit(rows: "datasets.Dataset", hub: HubSource, commit: str) -> None:
    """Refuse rows of another commit.

    Where the Hub does not answer, `datasets` takes the newest copy in its cache, whatever its commit
    (https://github.com/huggingface/datasets/issues/7928). What a copy is of, only the name of its folder says.
    """
    others = {Path(file["filename"]).parent.name for file in rows.cache_files} - {commit}
    if others:
        raise SourceError(
            f"Hub dataset {hub.id!r}: expected commit {commit}, got the copy of {min(others)} from the cache, as "
            f"`datasets` does where the Hub does not answer; try again with network, or use --source "
            f"{_address(hub)}@{min(others)}"
        )


def _address(hub: HubSource) -> str:
    return f"{hub.id}:{hub.subset}" if hub.subset else hub.id


def _read_hub(rows: "datasets.Dataset", where: str, window: range) -> Iterator[Row | _BadRow]:
    for index, data in zip(window, rows.select(window), strict=True):
        assert isinstance(data, dict), type(data)
        yield Row(index, f"{where} row {index}", data)


def _hub_error(hub: HubSource, revision: str | None, split: str, error: Exception) -> SourceError:
    """What the libraries said, in one line, and what to do about it."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        httpx,
    )

    said = " ".join(str(error).partition("\nExample of usage")[0].split())
    if isinstance(error, RevisionNotFoundError):
        said, advice = f"no revision {revision!r}", "leave @revision out for the newest"
    elif isinstance(error, (RepositoryNotFoundError, DatasetNotFoundError)):
        said = "not found, or not open to you" if isinstance(error, RepositoryNotFoundError) else said
        advice = "check the name; where it is private or gated, accept its terms and log in with `hf auth login`"
    elif isinstance(error, (ConnectionError, httpx.TransportError)):
        said = f"the Hub cannot be reached: {said}"
        advice = f"check the network and HF_HUB_OFFLINE, name a commit downloaded before ({_address(hub)}@COMMIT)"
    elif isinstance(error, ValueError) and not isinstance(error, httpx.HTTPError):
        advice = f"choose with --source {hub.id}:SUBSET and --split SPLIT"
    else:
        advice = "try again, log in anew with `hf auth login`"
    subset = f" subset {hub.subset!r}" if hub.subset else ""
    return SourceError(f"Hub dataset {hub.id!r}{subset} split {split!r}: {said.rstrip('.')}; {advice}, {_INSTEAD}")


_OPENERS: dict[str, Callable[[Path], _Table]] = {
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".json": _open_jsonl,
    ".parquet": _open_parquet,
    ".csv": _open_csv,
}
