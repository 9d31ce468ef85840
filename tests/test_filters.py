"""Filters choose rows by paths into the record, several must all hold, and what means nothing is refused with help."""

from pathlib import Path

import pytest

from tests.introspection_for_tests import Question, write_passes
from tracekit.errors import ConfigError
from tracekit.read.filters import parse_filter, rows_where
from tracekit.read.store import TraceStore

QUESTIONS = [
    Question(probs=(0.7, 0.1, 0.1, 0.1), parsed="A", confident=95.0),
    Question(probs=(0.2, 0.6, 0.1, 0.1), parsed="B", confident=70.0, subject="law"),
    Question(probs=(0.4, 0.3, 0.2, 0.1), parsed=None, confident=30.0, subject=None),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("level=0.1", (["level"], 0.1)),
        ("subject=law", (["subject"], "law")),
        ("model.adapter=null", (["model", "adapter"], None)),
        ('a="1"', (["a"], "1")),
        ("a=b=c", (["a"], "b=c")),
    ],
)
def test_filters_are_paths_and_json_values(text: str, expected: tuple[list[str], object]):
    assert parse_filter(text) == expected


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ([], [0, 1, 2]),
        (["subject=law"], [1]),
        (["subject=null"], [2]),
        (["is_correct=true"], [0]),
        (["temperature=1"], [0, 1, 2]),
        (["model.id=test/model", "parsed_answer=B"], [1]),
        (["correct_answer_letter=A", "subject=history"], [0]),
        (["options.1.text=thing b of 2"], [2]),
    ],
)
def test_filters_choose_rows(tmp_path: Path, where: list[str], rows: list[int]):
    write_passes(tmp_path, QUESTIONS, ["mcq"])
    with TraceStore(tmp_path) as store:
        assert rows_where(store, where) == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("subject", "'subject' is no filter; expected field=value"),
        ("=law", "is no filter"),
        ("subjct=law", r"records have no field 'subjct'; did you mean subject\?$"),
        ("adapter=null", r"records have no field 'adapter'; did you mean model.adapter"),
        ("zzz=1", "records have no field 'zzz'; fields: task, schema_version"),
        (
            "subject=physics",
            r"no sample of mcq passes the filter 'subject=physics'; values there: \"history\", \"law\"",
        ),
        ("is_correct=1", "no sample of mcq passes"),
        ("model.name=x", "has 'name', where there is id, revision"),
        ("options.first=x", "has 'first', where there is a number"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(tmp_path: Path, where: str, message: str):
    write_passes(tmp_path, QUESTIONS, ["mcq"])
    with TraceStore(tmp_path) as store, pytest.raises(ConfigError, match=message):
        rows_where(store, [where])
