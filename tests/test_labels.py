"""Label sets: their files, a line cut by a crash, and the table that a store makes of them."""

from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from tests.datasets_for_tests import make_sample, write_dataset
from tracekit import TraceStore
from tracekit.analysis.showing import stats_lines
from tracekit.analysis.stats import stats
from tracekit.errors import DatasetError, SampleNotFoundError
from tracekit.format.labels import (
    Label,
    LabelSummary,
    Rate,
    append_labels,
    label_sets,
    mend_labels,
    rate_lines,
    read_labels,
    read_summaries,
    read_summary,
    summary_path,
    write_labels,
    write_summary,
)
from tracekit.format.layout import Layout
from tracekit.format.shards import sha256_file
from tracekit.read.labels import LABEL_SCHEMA
from tracekit.read.verifier import verify


def label(key: str, **changes: object) -> Label:
    made = Label(
        key=key,
        judged_sha256="0" * 64,
        is_abstention=False,
        verdict="correct",
        judge="rules",
        prompt_sha256="1" * 64,
        raw_outputs=["a", "b"],
        failure=None,
    )
    return msgspec.structs.replace(made, **changes)


def summary(**changes: object) -> LabelSummary:
    rate = Rate(name="refusal_rate", group=None, count=1, num=4, value=0.25, low=0.0, high=0.75)
    empty = Rate(name="correct_rate", group="domain=a", count=0, num=0, value=None, low=None, high=None)
    made = LabelSummary(
        name="rules-12345678",
        config="trivia_qa",
        judge="rules",
        prompt_sha256="1" * 64,
        settings={"what": "answers"},
        labels_sha256="2" * 64,
        num_samples=4,
        num_failures=1,
        is_open=False,
        rates=[rate, empty],
        definitions={"refusal_rate": "..."},
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = [make_sample(key) for key in ("a", "b", "c")]
    return write_dataset(tmp_path / "run", {"train-00000": made})


def test_labels_are_appended_and_read_back(tmp_path: Path):
    path = tmp_path / "labels" / "x.jsonl"
    append_labels(path, [label("b")])
    append_labels(path, [label("a"), label("b", verdict="incorrect")])
    assert read_labels(path) == [label("b", verdict="incorrect"), label("a")]
    write_labels(path, [label("a")])
    assert read_labels(path) == [label("a")]


def test_a_line_that_a_crash_cut_counts_as_not_written(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    append_labels(path, [label("a")])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert read_labels(path) == [label("a")]
    mend_labels(path)
    assert path.read_bytes() == whole
    mend_labels(tmp_path / "none.jsonl")


def test_a_whole_line_that_is_no_label_is_named(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    append_labels(path, [label("a")])
    path.write_bytes(path.read_bytes() + b'{"key": 3}\n')
    with pytest.raises(DatasetError, match=r"x\.jsonl line 2 is no label: Expected `str`, got `int` - at `\$\.key`"):
        read_labels(path)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_labels(tmp_path / "none.jsonl")


def test_summaries_are_read_back_and_shown(layout: Layout):
    assert read_summaries(layout) == []
    write_summary(layout, summary())
    assert read_summary(layout, "rules-12345678") == summary()
    assert read_summaries(layout) == [summary()]
    first, rate, empty = rate_lines(summary(is_open=True))
    assert first == "judged by rules (rules-12345678): 4 samples, 1 without a label, of a run that is not finished"
    assert rate.split() == ["refusal_rate", "0.250", "[0.000,", "0.750]", "1", "of", "4"]
    assert empty.split() == ["correct_rate,", "domain=a", "-", "of", "0"]


def test_stats_have_the_label_sets(layout: Layout):
    write_summary(layout, summary())
    (found,) = stats(layout.root)
    assert found.labels == [summary()]
    assert any("refusal_rate" in line and "1 of 4" in line for line in stats_lines(found))


def test_a_store_has_labels_in_row_order_and_null_where_there_is_none(layout: Layout):
    write_labels(
        layout.labels("rules-12345678"), [label("c"), label("a", is_abstention=True, verdict=None), label("z")]
    )
    with TraceStore(str(layout.root)) as store:
        table = store.labels()
        assert table.schema == LABEL_SCHEMA
        assert table["key"].to_pylist() == store.keys == ["a", "b", "c"]
        assert table["is_abstention"].to_pylist() == [True, None, False]
        assert table["verdict"].to_pylist() == [None, None, "correct"]
        assert table["raw_outputs"].to_pylist() == [["a", "b"], None, ["a", "b"]]
        assert store.labels("rules") == table == store.labels("rules-12345678")


def test_the_columns_are_the_fields_of_a_label():
    assert LABEL_SCHEMA.names == [field.name for field in msgspec.structs.fields(Label)]
    table = pa.Table.from_pylist([msgspec.to_builtins(label("a"))], schema=LABEL_SCHEMA)
    assert table.to_pylist() == [msgspec.to_builtins(label("a"))]


def test_several_sets_have_to_be_named_and_the_error_names_them(layout: Layout):
    for name in ("rules-1", "judge-2", "judge-3"):
        write_labels(layout.labels(name), [label("a", judge=name)])
    assert label_sets(layout) == ["judge-2", "judge-3", "rules-1"]
    with TraceStore(str(layout.root)) as store:
        assert store.labels("judge-2")["judge"].to_pylist()[0] == "judge-2"
        assert store.labels("r")["judge"].to_pylist()[0] == "rules-1"
        for name in (None, "judge", "other"):
            with pytest.raises(SampleNotFoundError, match="name one of: judge-2, judge-3, rules-1"):
                store.labels(name)


def test_a_dataset_that_nobody_judged_says_so(layout: Layout):
    with TraceStore(str(layout.root)) as store, pytest.raises(SampleNotFoundError, match="nobody has labelled"):
        store.labels()


def test_folders_read_as_one_have_the_labels_of_each(tmp_path: Path):
    folders = []
    for part, key in (("one", "a"), ("two", "b")):
        its = write_dataset(tmp_path / part, {"train-00000": [make_sample(key)]})
        write_labels(its.labels("rules-1"), [label(key, verdict="correct" if part == "one" else "incorrect")])
        folders.append(str(its.root))
    with TraceStore(folders) as store:
        assert store.labels("rules")["verdict"].to_pylist() == ["correct", "incorrect"]


def judged(layout: Layout, *keys: str) -> None:
    """A label set of these samples, with a summary that is its own."""
    path = layout.labels("rules-12345678")
    write_labels(path, [label(key) for key in keys])
    write_summary(layout, summary(labels_sha256=sha256_file(path), num_samples=len(keys), num_failures=0))


def problems_of(layout: Layout) -> list[str]:
    """What is wrong, but for the index, which this folder has not."""
    return [problem for problem in verify(layout.root).problems if "manifest.json cannot be read" not in problem]


def test_verify_finds_nothing_wrong_with_labels_that_are_right(layout: Layout):
    judged(layout, "a", "b", "c")
    append_labels(layout.labels("model-87654321"), [label("a")])  # not judged to the end
    assert problems_of(layout) == []


def test_verify_fails_on_labels_that_are_wrong(layout: Layout):
    path = layout.labels("rules-12345678")
    judged(layout, "a", "x", "y")
    assert problems_of(layout) == [
        "labels/trivia_qa/rules-12345678.jsonl: 2 labels are of no sample here, the first of 'x'"
    ]
    judged(layout, "a")
    append_labels(path, [label("b")])
    problem, _ = problems_of(layout)
    assert "its labels are not those of its summary" in problem
    judged(layout, "a", "b")
    true = read_summary(layout, "rules-12345678")
    wrong = msgspec.structs.replace(true.rates[0], value=0.5)
    for changes in ({"num_samples": 3}, {"num_failures": 1}, {"rates": [wrong]}):
        write_summary(layout, msgspec.structs.replace(true, **changes))
        (problem,) = problems_of(layout)
        assert "its summary says other counts or rates" in problem
    path.write_bytes(b"{}\n")
    (problem,) = problems_of(layout)
    assert "line 1 is no label" in problem
    path.unlink()
    (problem,) = problems_of(layout)
    assert "cannot be read" in problem
    judged(layout, "a")
    write_summary(layout, summary(labels_sha256=sha256_file(path), config="other"))
    (problem,) = problems_of(layout)
    assert "its summary is of 'rules-12345678' of 'other'" in problem
    summary_path(layout, "rules-12345678").write_text("[]")
    (problem,) = problems_of(layout)
    assert "rules-12345678.json" in problem
