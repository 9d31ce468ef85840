"""Sources: rows of files and of the Hub, which rows are read, and what is said when something is wrong."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import httpx2
import huggingface_hub
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import builders.kit.files
from builders.kit.sources import HubSource, SourceRow, read_examples
from tracekit.config import FileSource
from tracekit.errors import SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.task import Examples

SAMPLE = Path(__file__).parents[1] / "builders/trivia_qa/trivia_qa.jsonl"
TRIVIAQA = Path(__file__).parents[2] / "shared/data/triviaqa/triviaqa_300.jsonl"
DEFAULT = HubSource("org/name", "one")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INSTEAD = "or use --source FILE or --source sample"


def parse_question(row: SourceRow) -> str:
    """A parse like a builder's: names what it expected."""
    question = row.data.get("question")
    if not isinstance(question, str):
        raise SourceError(f"question is {question!r}; expected text")
    return question


def read(source: str | Path, **settings: Any) -> Examples[str]:
    config = FileSource(source=str(source), **settings)
    return read_examples(config, default=DEFAULT, sample=SAMPLE, parse=parse_question)


def read_rows(source: str | Path, **settings: Any) -> list[SourceRow]:
    config = FileSource(source=str(source), **settings)
    return read_examples(config, default=DEFAULT, sample=SAMPLE, parse=lambda row: row).examples


def error_of(source: str | Path, **settings: Any) -> str:
    with pytest.raises(SourceError) as caught:
        read(source, **settings)
    return str(caught.value)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(folder: Path, suffix: str, questions: list[str]) -> Path:
    """The same rows in any of the formats."""
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"question": questions}), path, row_group_size=3)
    elif suffix == ".csv":
        path.write_text("question\n" + "".join(f"{question}\n" for question in questions))
    else:
        path.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    return path


# Which source


def test_sample_is_the_packaged_file() -> None:
    examples, info = read("sample", limit=1)
    assert examples == ["What is the capital city of France?"]
    digest = hashlib.sha256(SAMPLE.read_bytes()).hexdigest()
    assert info == SourceInfo(
        id="trivia_qa.jsonl",
        revision=f"sha256:{digest}",
        subset=None,
        split="validation",
        num_rows=72,
        num_used=1,
        skipped=[],
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix.lower(), [f"q{n}" for n in range(10)])
    path = path.rename(path.with_suffix(suffix))
    examples, info = read(path, offset=2, limit=5, split="dev")
    assert examples == ["q2", "q3", "q4", "q5", "q6"]
    assert (info.id, info.split, info.num_rows, info.num_used, info.subset) == (path.name, "dev", 10, 5, None)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path, ".jsonl", ["q"])
    assert read("~/rows.jsonl").examples == ["q"]


@pytest.mark.parametrize(
    "source", ["none.jsonl", "./none", "/none/at/all", "~/none", "~nobody-here/x", "/a\0b", "org/none.CSV", "../x:y@z"]
)
def test_missing_file_is_named(source: str) -> None:
    expected = f"no such file: {source!r}; give an existing file, org/name for the Hub, or --source sample"
    assert error_of(source) == expected


@pytest.mark.parametrize(
    "source", ["trivia_qa", "a/b/c", "org/name:", "org/name@", "", "org name/x", "-x/y", "ö/x", "a" * 5000]
)
def test_what_is_neither_file_nor_hub_id_is_refused(source: str) -> None:
    assert error_of(source) == (
        f"source {source!r} is neither a file nor a dataset on the Hub; expected `default`, `sample`, a file "
        "(.jsonl .ndjson .json .parquet .csv .tsv .conllu .txt .raw .tokens) or org/name[:subset][@revision]"
    )


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.pkl", b"x")
    assert error_of(path) == (
        f"{str(path)!r} has suffix '.pkl'; expected a file with one of .jsonl .ndjson .json .parquet .csv .tsv .conllu "
        ".txt .raw .tokens"
    )


def test_folder_is_refused_and_the_hub_dataset_of_its_name_is_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert error_of("org/name") == (
        "'org/name' is a folder; give a file, or org/name@main for the Hub dataset of that name"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl", ["q"])
    path.chmod(0)
    assert error_of(path) == f"{str(path)!r} cannot be read: Permission denied; use another --source"


# Which rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    suffix=st.sampled_from([".jsonl", ".parquet", ".csv"]),
    num_rows=st.integers(1, 12),
    offset=st.integers(0, 11),
    limit=st.none() | st.integers(1, 14),
)
def test_offset_and_limit_are_a_slice(
    tmp_path: Path, suffix: str, num_rows: int, offset: int, limit: int | None
) -> None:
    questions = [f"q{n}" for n in range(num_rows)]
    path = write_rows(tmp_path, suffix, questions)
    if offset >= num_rows:
        assert error_of(path, offset=offset, limit=limit) == (
            f"{path.name} has {num_rows} rows, so --offset {offset} leaves none; "
            f"use an offset of at most {num_rows - 1}"
        )
        return
    rows = read_rows(path, offset=offset, limit=limit)
    stop = None if limit is None else offset + limit
    assert [row.data["question"] for row in rows] == questions[offset:stop]
    assert [row.index for row in rows] == list(range(num_rows))[offset:stop]


def test_blank_lines_are_no_rows_but_are_counted_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '\n{"question": "a"}\n \t\r\n\n{"question": "b"}')
    rows = read_rows(path)
    assert [(row.index, row.where) for row in rows] == [(0, "rows.jsonl line 2"), (1, "rows.jsonl line 5")]


def test_line_separators_inside_a_json_text_end_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"question": "a\u2028b\x85c"}\n{"question": "d"}\n')
    assert [(row.where, row.data["question"]) for row in read_rows(path)] == [
        ("rows.jsonl line 1", "a\u2028b\x85c"),
        ("rows.jsonl line 2", "d"),
    ]


def test_csv_records_over_several_lines_are_named_by_their_first(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", 'question,n\r\n"a\r\nb ""c"", d",1\r\n\r\ne,2\r\n')
    assert [(row.where, row.data) for row in read_rows(path)] == [
        ("rows.csv line 2", {"question": 'a\r\nb "c", d', "n": "1"}),
        ("rows.csv line 5", {"question": "e", "n": "2"}),
    ]


def test_parquet_rows_keep_their_types_and_are_named_by_index(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "aliases": [["x"], None], "answer": [{"value": "y"}] * 2}), path)
    assert read_rows(path, offset=1) == [
        SourceRow(1, "rows.parquet row 1", {"question": "b", "aliases": None, "answer": {"value": "y"}})
    ]


def test_parquet_row_groups_larger_than_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": [str(n) for n in range(5000)]}), path, row_group_size=2500)
    assert read(path, offset=1000, limit=3000).examples == [str(n) for n in range(1000, 4000)]


def test_rows_outside_the_window_are_not_decoded(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", b'{bad\n{"question": "a"}\n\xff\n')
    assert read(path, offset=1, limit=1).examples == ["a"]


# Files as people have them


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_cells_may_be_long(tmp_path: Path, suffix: str) -> None:
    long = "word, " * 50_000
    frame = pd.DataFrame({"question": [long, "b"]})
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    columns = {"question": ("question",)}
    config = FileSource(source=str(path))
    found = read_examples(config, default=DEFAULT, sample=SAMPLE, parse=parse_question, columns=columns)
    assert found.examples == [long, "b"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_files_between_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    frame = pd.DataFrame({"question": ["a, b; c|d\te", 'say "x"\nplease'], "n": [1, 2]})
    frame.to_csv(tmp_path / "rows.csv", index=False, sep=delimiter, lineterminator="\r\n")
    assert read(tmp_path / "rows.csv").examples == list(frame["question"])


def test_the_index_that_pandas_writes_is_a_column(tmp_path: Path) -> None:
    pd.DataFrame({"question": ["a", "b"]}).to_csv(tmp_path / "rows.csv")
    assert [row.data for row in read_rows(tmp_path / "rows.csv")] == [
        {"Unnamed: 0": "0", "question": "a"},
        {"Unnamed: 0": "1", "question": "b"},
    ]


def test_a_tsv_file_has_a_header_where_it_names_a_column_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.tsv", 'question\tn\n"a\tb ""c"""\t1\n')
    assert read_rows(path)[0].data == {"1": "question", "2": "n"}
    columns = {"question": ("question",)}
    config = FileSource(source=str(path))
    found = read_examples(config, default=DEFAULT, sample=SAMPLE, parse=parse_question, columns=columns)
    assert found.examples == ['a\tb "c"']


def test_a_line_that_is_too_long_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders.kit.files, "_MAX_LINE_BYTES", 100)
    path = write(tmp_path, "rows.jsonl", '{"question": "a"}\n{"question": "' + "b" * 100 + '"}\n')
    assert error_of(path) == "rows.jsonl line 2 is longer than 100 bytes; write shorter lines, or Parquet"
    path = write(tmp_path, "rows.csv", 'question\n"' + "b\n" * 100 + '"\n')
    assert error_of(path).startswith("rows.csv line 2: field larger than field limit (100)")


# Malformed rows


BAD_LINES = [
    (b'{"question": "a" "b"}', "bad JSON at column 18: Expecting ',' delimiter; expected one JSON object a line"),
    ('{"é🐎": }'.encode(), "bad JSON at column 8: Expecting value; expected one JSON object a line"),
    (b'{"question": "a"', "bad JSON at column 17: Expecting ',' delimiter; expected one JSON object a line"),
    (b'{"question": "a"} {}', "bad JSON at column 19: Extra data; expected one JSON object a line"),
    (
        b'["question"]',
        '["question"] is no JSON object; expected one JSON object a line, as pandas writes with '
        "to_json(orient='records', lines=True)",
    ),
    (b"null", "null is no JSON object; expected one JSON object a line"),
    (b"[" * 200_000, "JSON nested too deeply; expected one JSON object a line"),
    (b'{"question": "caf\xe9"}', "byte 0xe9 at byte column 18; expected UTF-8"),
    (b'{"question": "a\0"}', "a NUL byte at column 16; expected text"),
    (b'{"question": "\\ud83d"}', r"'\ud83d' is half a character; expected whole ones (surrogates in pairs)"),
    (b'{"question": 1}', "question is 1; expected text"),
    (b'{"question": "a", "question": "b"}', "the name 'question' stands twice in one object; expected each name once"),
    (b"{}", "question is None; expected text"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_malformed_line_stops_the_run(tmp_path: Path, line: bytes, why: str) -> None:
    path = write(tmp_path, "rows.jsonl", b'{"question": "a"}\n\n' + line + b"\n")
    assert error_of(path) == f"rows.jsonl line 3: {why}; fix it or pass --on-bad-row skip"


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_malformed_line_is_skipped_and_reported(tmp_path: Path, line: bytes, why: str) -> None:
    path = write(tmp_path, "rows.jsonl", line + b'\n{"question": "a"}\n')
    examples, info = read(path, on_bad_row="skip")
    assert examples == ["a"]
    assert (info.num_rows, info.num_used, info.skipped) == (2, 1, [f"rows.jsonl line 1: {why}"])


def test_huge_number_is_a_malformed_row(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"question": ' + "1" * 5000 + "}\n")
    assert re.match(r"rows\.jsonl line 1: Exceeds the limit .*; fix it or pass --on-bad-row skip$", error_of(path))


def test_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", r'{"question": "\ud83d\ude00"}')
    assert read(path).examples == ["😀"]


def test_skipped_rows_count_towards_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"question": "a"}\n{}\n{"question": "b"}\n')
    examples, info = read(path, on_bad_row="skip", limit=2)
    assert (examples, info.num_used, len(info.skipped)) == (["a"], 1, 1)


def test_all_rows_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"question": "a"}\n{}\n[]\n')
    assert error_of(path, on_bad_row="skip", offset=1) == (
        "rows.jsonl: all 2 rows read, of 3, were malformed and skipped; the first: "
        "rows.jsonl line 2: question is None; expected text; fix them or use another --source"
    )


def test_a_bug_in_parse_is_not_taken_for_a_malformed_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl", ["q"])
    with pytest.raises(KeyError):
        read_examples(
            FileSource(source=str(path), on_bad_row="skip"),
            default=DEFAULT,
            sample=SAMPLE,
            parse=lambda row: row.data["answer"],
        )


def test_ragged_csv_row(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "question,n\na,1\nb\nc,1,2\n")
    assert error_of(path) == (
        "rows.csv line 3: 1 cells; expected 2, one for each of question, n; fix it or pass --on-bad-row skip"
    )
    assert read(path, on_bad_row="skip").source.skipped == [
        "rows.csv line 3: 1 cells; expected 2, one for each of question, n",
        "rows.csv line 4: 3 cells; expected 2, one for each of question, n",
    ]


def test_csv_without_the_column_that_a_task_needs(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "query\na\n")
    assert error_of(path) == ("rows.csv line 2: question is None; expected text; fix it or pass --on-bad-row skip")


# Malformed files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty; expected at least one row; use another --source"),
        ("a.csv", b"", "a.csv is empty; expected at least one row; use another --source"),
        ("a.parquet", b"", "a.parquet is empty; expected at least one row; use another --source"),
        ("a.jsonl", b" \n\n", "a.jsonl has no rows; expected at least one; use another --source"),
        ("a.csv", b"question\n", "a.csv has no rows; expected at least one; use another --source"),
        (
            "a.jsonl",
            b"\xef\xbb\xbf{}\n",
            "a.jsonl begins with a byte order mark; expected UTF-8 without one; save it so",
        ),
        (
            "a.csv",
            "question\na\n".encode("utf-16"),
            "a.csv begins with a byte order mark; expected UTF-8 without one; save it so",
        ),
        (
            "a.csv",
            b"a,a\n1,2\n",
            "a.csv line 1: columns ['a', 'a']; expected a name for each, and each name once; rename them",
        ),
        (
            "a.csv",
            b"\na,\n1,2\n",
            "a.csv line 2: columns ['a', '']; expected a name for each, and each name once; rename them",
        ),
        (
            "a.csv",
            b"\n\n",
            "a.csv line 1: columns ['']; expected a name for each, and each name once; rename them",
        ),
        ("a.csv", b"a\nb\nc\xff\n", "a.csv line 3: byte 0xff at byte column 2; expected UTF-8; save it as UTF-8"),
        ("a.csv", b"a\nb\0\n", "a.csv line 2: a NUL byte at column 2; expected text; save it as UTF-8"),
        (
            "a.csv",
            b'a,b\n1,2\n3,"4\n5,6\n',
            'a.csv line 3: unexpected end of data; expected cells between commas, in " where they hold commas, quotes '
            "or line ends; fix it or use JSONL",
        ),
        (
            "a.csv",
            b'a,b\n1,"2"x\n',
            "a.csv line 2: ',' expected after '\"'; expected cells between commas, in \" where they hold commas, "
            "quotes or line ends; fix it or use JSONL",
        ),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_malformed_file(tmp_path: Path, name: str, content: bytes, message: str, on_bad_row: str) -> None:
    assert error_of(write(tmp_path, name, content), on_bad_row=on_bad_row) == message


def test_empty_parquet(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".parquet", [])
    assert error_of(path) == "rows.parquet has no rows; expected at least one; use another --source"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.99])
def test_truncated_parquet(tmp_path: Path, share: float) -> None:
    path = write_rows(tmp_path, ".parquet", [str(n) for n in range(100)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    message = error_of(path)
    assert message.startswith("rows.parquet cannot be read as Parquet: ")
    assert message.endswith("; copy or write it again, or use JSONL")


def test_parquet_with_damaged_data(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".parquet", [str(n) for n in range(100)])
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    assert error_of(path).startswith("rows.parquet cannot be read as Parquet: ")


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["q", "q"]), path)
    assert error_of(path) == (
        "rows.parquet: columns ['q', 'q']; expected a name for each, and each name once; rename them"
    )


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`org/name` on a pretended Hub: a folder that the real `load_dataset` loads, and a commit for each revision."""
    folder = tmp_path / "hub"
    configs = "".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {subset}/{split}.jsonl\n" for split in ("train", "validation"))
        for subset in ("one", "two")
    )
    for subset in ("one", "two"):
        (folder / subset).mkdir(parents=True)
        for split in ("train", "validation"):
            questions = [f"{subset} {split} {n}" for n in range(5)]
            write_rows(folder / subset, ".jsonl", questions).rename(folder / subset / f"{split}.jsonl")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    load = datasets.load_dataset

    def load_from_folder(path: str, name: str | None, *, split: str, revision: str, keep_in_memory: bool) -> Any:
        assert (path, keep_in_memory) == ("hf://datasets/org/name", False)
        rows = load(str(folder), name, split=split, cache_dir=str(tmp_path / "cache"))
        # From the Hub, the folder of the cached copy is named for its commit.
        copy = tmp_path / "cache" / revision / "rows.arrow"
        copy.parent.mkdir(exist_ok=True)
        return datasets.Dataset.from_file(str(shutil.copy(rows.cache_files[0]["filename"], copy)))

    def dataset_info(self: object, repo_id: str, *, revision: str | None) -> huggingface_hub.DatasetInfo:
        assert repo_id == "org/name"
        sha = {None: COMMIT, "main": COMMIT, "refs/pr/1": "1" * 40}[revision]
        return huggingface_hub.DatasetInfo(id=repo_id, sha=sha, tags=[], downloads=0, likes=0)

    monkeypatch.setattr(datasets, "load_dataset", load_from_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return folder


def test_default_is_the_hub_dataset_at_its_commit(hub: Path) -> None:
    examples, info = read("default", offset=1, limit=2)
    assert examples == ["one validation 1", "one validation 2"]
    assert info == SourceInfo(
        id="org/name", revision=COMMIT, subset="one", split="validation", num_rows=5, num_used=2, skipped=[]
    )


@pytest.mark.parametrize(
    ("source", "commit"),
    [("org/name:two", COMMIT), ("org/name:two@refs/pr/1", "1" * 40), (f"org/name:two@{'2' * 40}", "2" * 40)],
)
def test_hub_id_with_subset_and_revision(hub: Path, source: str, commit: str) -> None:
    examples, info = read(source, split="train")
    assert examples == [f"two train {n}" for n in range(5)]
    assert (info.id, info.subset, info.revision, info.num_rows) == ("org/name", "two", commit, 5)


def test_hub_rows_are_named_by_subset_split_and_index(hub: Path) -> None:
    row = read_rows("default", offset=4)[0]
    assert row == SourceRow(4, "org/name one validation row 4", {"question": "one validation 4"})


def test_only_the_rows_asked_for_are_taken_from_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[range] = []
    select = datasets.Dataset.select
    monkeypatch.setattr(datasets.Dataset, "select", lambda self, rows: (selected.append(rows), select(self, rows))[1])
    read("default", offset=1, limit=3)
    assert selected == [range(1, 4)]


def test_malformed_hub_row(hub: Path) -> None:
    (hub / "one/validation.jsonl").write_text('{"question": "a"}\n{"question": null}\n')
    assert error_of("default") == (
        "org/name one validation row 1: question is None; expected text; fix it or pass --on-bad-row skip"
    )


def test_unknown_split_lists_the_splits(hub: Path) -> None:
    assert error_of("default", split="test") == (
        "Hub dataset 'org/name' subset 'one' split 'test': Unknown split \"test\". Should be one of "
        f"['train', 'validation']; choose with --source org/name:SUBSET and --split SPLIT, {INSTEAD}"
    )


def test_unknown_subset_lists_the_subsets(hub: Path) -> None:
    assert error_of("org/name:three") == (
        "Hub dataset 'org/name' subset 'three' split 'validation': BuilderConfig 'three' not found. Available: "
        f"['one', 'two']; choose with --source org/name:SUBSET and --split SPLIT, {INSTEAD}"
    )


def test_missing_subset_lists_the_subsets(hub: Path) -> None:
    assert error_of("org/name") == (
        "Hub dataset 'org/name' split 'validation': Config name is missing. Please pick one among the available "
        f"configs: ['one', 'two']; choose with --source org/name:SUBSET and --split SPLIT, {INSTEAD}"
    )


def test_copy_of_another_commit_in_the_cache_is_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: load(*args, **kwargs | {"revision": "3" * 40})
    )
    assert error_of("default") == (
        f"Hub dataset 'org/name': expected commit {COMMIT}, got the copy of {'3' * 40} from the cache, as `datasets` "
        "does where the Hub does not answer; try again with network, or use --source "
        f"org/name:one@{'3' * 40}"
    )


def http_error(kind: type[HfHubHTTPError], status: int, message: str) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/api/datasets/org/name")
    return kind(message, response=httpx2.Response(status, request=request))


LOG_IN = "check the name; where it is private or gated, accept its terms and log in with `hf auth login`"
OFFLINE = "check the network and HF_HUB_OFFLINE, name a commit downloaded before (org/name:one@COMMIT)"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(RepositoryNotFoundError, 401, "401\n\nlong text"), f"not found, or not open to you; {LOG_IN}"),
        (http_error(GatedRepoError, 403, "403\n\nlong text"), f"not found, or not open to you; {LOG_IN}"),
        (
            http_error(RevisionNotFoundError, 404, "404"),
            "no revision None; leave @revision out for the newest",
        ),
        (
            http_error(HfHubHTTPError, 503, "503 Server Error.\nBusy."),
            "503 Server Error. Busy; try again, log in anew with `hf auth login`",
        ),
        (httpx2.ConnectError("no name"), f"the Hub cannot be reached: no name; {OFFLINE}"),
        (httpx2.ReadTimeout("slow"), f"the Hub cannot be reached: slow; {OFFLINE}"),
        (ConnectionError("gone"), f"the Hub cannot be reached: gone; {OFFLINE}"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_error_says_what_to_do(hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    assert error_of("default") == f"Hub dataset 'org/name' subset 'one' split 'validation': {message}, {INSTEAD}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub."),
            f"Dataset 'org/name' is a gated dataset on the Hub; {LOG_IN}",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found name.py"),
            "Dataset scripts are no longer supported, but found name.py; try again, log in anew with `hf auth login`",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_loading_error_says_what_to_do(
    hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert error_of("default") == f"Hub dataset 'org/name' subset 'one' split 'validation': {message}, {INSTEAD}"


def test_no_network(tmp_path: Path) -> None:
    # In a process of its own: the libraries read HF_HUB_OFFLINE when they are imported.
    code = f"""
from pathlib import Path
from builders.kit.sources import HubSource, read_examples
from tracekit.config import FileSource
from tracekit.errors import SourceError
for source in ("default", "org/name:one@{COMMIT}"):
    try:
        read_examples(FileSource(source=source), default=HubSource("org/name", "one"), sample=Path(), parse=print)
    except SourceError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    start = "Hub dataset 'org/name' subset 'one' split 'validation': the Hub cannot be reached: "
    by_name, by_commit = done.stdout.splitlines()
    assert all(line.startswith(start) and line.endswith(f"; {OFFLINE}, {INSTEAD}") for line in (by_name, by_commit))


def test_datasets_is_imported_only_for_the_hub() -> None:
    code = f"""
import sys
from pathlib import Path
from builders.kit.sources import HubSource, read_examples
from tracekit.config import FileSource
default = HubSource("org/name", None)
read_examples(FileSource(source="sample"), default=default, sample=Path({str(SAMPLE)!r}), parse=str)
assert not {{"datasets", "huggingface_hub"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# Real data


@pytest.mark.skipif(not TRIVIAQA.exists(), reason=f"{TRIVIAQA} is not here")
def test_real_triviaqa_rows() -> None:
    rows = read_rows(TRIVIAQA, offset=290, limit=100)
    assert [row.index for row in rows] == list(range(290, 300))
    assert rows[0].where == "triviaqa_300.jsonl line 291"
    assert all(row.data["context"].endswith("\nAnswer:") and row.data["aliases"] for row in rows)


@pytest.mark.skipif(not TRIVIAQA.exists(), reason=f"{TRIVIAQA} is not here")
def test_real_triviaqa_rows_survive_csv_and_parquet(tmp_path: Path) -> None:
    lines = read_rows(TRIVIAQA)
    pq.write_table(pa.Table.from_pylist([row.data for row in lines]), tmp_path / "rows.parquet")
    assert [row.data for row in read_rows(tmp_path / "rows.parquet")] == [row.data for row in lines]
    datasets.Dataset.from_list([{"context": row.data["context"]} for row in lines]).to_csv(tmp_path / "rows.csv")
    assert [row.data["context"] for row in read_rows(tmp_path / "rows.csv")] == [row.data["context"] for row in lines]
