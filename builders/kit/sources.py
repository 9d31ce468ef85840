"""Rows of a source, whichever kind it is: the task's dataset on the Hub, another one, a local file, or the sample.

    default                              the task's own dataset
    sample                               the few rows packaged beside the builder
    rows.jsonl  .ndjson .json            one JSON object a line, UTF-8; blank lines are not rows
    rows.parquet                         columns by name
    rows.csv                             a header line, then cells between commas (or ; | tabs, as the header has them)
    rows.tsv                             the same between tabs, where the first line names a column that the task reads;
                                         else raw: columns `1`, `2`, ...; no header, no quoting, no blank lines
    rows.conllu                          a sentence a row: comments (`sent_id`, `text`), and ten columns as lists
    rows.txt  .raw .tokens               a line a row, with its line feed, in `line`; blank lines are rows
    org/name[:subset][@revision]         a dataset on the Hub

A builder hands over a pure function from row to example and gets its examples, plus what the manifest says of the data.
builders/kit/cells.py says what a value means. `--question-column` and the like say which columns are read.
This module knows nothing of any task's columns. It runs no code that comes with the data.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from builders.kit.cells import ROLES, Columns, SourceRow
from builders.kit.files import SUFFIXES, BadRow, Table, open_file
from tracekit.config import FileSource
from tracekit.errors import SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.task import Examples

if TYPE_CHECKING:
    import datasets

__all__ = ["HubSource", "SourceRow", "read_examples"]

ExampleT = TypeVar("ExampleT")

_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<subset>[^@]+))?(?:@(?P<revision>.+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INSTEAD = "or use --source FILE or --source sample"


class HubSource(NamedTuple):
    """Address of a dataset on the Hub."""

    id: str
    """`org/name`."""
    subset: str | None
    """Its configuration; None where it has but one."""


def read_examples(
    config: FileSource,
    *,
    default: HubSource,
    sample: Path,
    parse: Callable[[SourceRow], ExampleT],
    columns: Columns = MappingProxyType({}),
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
        columns: The columns that `parse` reads, by role: which of `--question-column` and the like have a meaning.

    Raises:
        SourceError: the source is missing, cannot be reached or read, is empty or has no row left after `offset`; a row
            is malformed and `on_bad_row` is `error`; or every row was skipped.
    """
    named = _named(config, columns)
    known = {name for names in [*columns.values(), *named.values()] for name in names if not name.isdecimal()}
    table = _open(config, default=default, sample=sample, header_names=known)
    window = _window(table, config)
    examples: list[ExampleT] = []
    skipped: list[str] = []
    for row in table.read(window):
        try:
            if isinstance(row, BadRow):
                raise SourceError(row.why)
            examples.append(parse(_with_named(row, named, config)))
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


def _named(config: FileSource, columns: Columns) -> Columns:
    """The columns that the configuration names, by role."""
    named: dict[str, Sequence[str]] = {}
    for role, setting in ROLES.items():
        given = getattr(config, setting, None)
        if not given:
            continue
        if role == "answer" and role not in columns and not getattr(config, "label_column", None):
            role = "label"
        assert role in columns, f"the task has a setting {setting!r} and reads no such column"
        named[role] = (given,) if isinstance(given, str) else given
    return named


def _with_named(row: SourceRow, named: Columns, config: FileSource) -> SourceRow:
    """The row, with what the configuration says of its columns.

    Raises:
        SourceError: a column that is named is not there.
    """
    for role, names in named.items():
        for name in names:
            if name not in row.data:
                setting = ROLES[role] if getattr(config, ROLES[role], None) else ROLES["answer"]
                flag = f"--{setting.replace('_', '-')}"
                raise SourceError(f"no column {name!r}, given by {flag}; columns: {', '.join(row.data)}")
    return row._replace(named=named, label_start=getattr(config, "label_start", None))


def _window(table: Table, config: FileSource) -> range:
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


def _open(config: FileSource, *, default: HubSource, sample: Path, header_names: Collection[str]) -> Table:
    """Open what `config.source` names."""
    source = config.source
    if source == "default":
        return _open_hub(default, None, config.split)
    if source == "sample":
        return open_file(sample)
    # Not Path's: they raise on an unknown user and on a name too long, and take "" for the working directory.
    path = os.path.expanduser(source)  # noqa: PTH111
    if os.path.exists(path):  # noqa: PTH110
        return open_file(Path(path), header_names=header_names)
    if source.startswith((".", "/", "~")) or Path(source).suffix.lower() in SUFFIXES:
        raise SourceError(f"no such file: {source!r}; give an existing file, org/name for the Hub, or --source sample")
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SourceError(
            f"source {source!r} is neither a file nor a dataset on the Hub; expected `default`, `sample`, a file "
            f"({' '.join(SUFFIXES)}) or org/name[:subset][@revision]"
        )
    return _open_hub(HubSource(match["id"], match["subset"]), match["revision"], config.split)


# The Hub


def _open_hub(hub: HubSource, revision: str | None, split: str) -> Table:
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
    return Table(hub.id, commit, hub.subset, rows.num_rows, partial(_read_hub, rows, where))


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


def _read_hub(rows: "datasets.Dataset", where: str, window: range) -> Iterator[SourceRow | BadRow]:
    for index, data in zip(window, rows.select(window), strict=True):
        assert isinstance(data, dict), type(data)
        yield SourceRow(index, f"{where} row {index}", data)


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
