"""Lists and objects in text cells: what pandas, numpy, datasets and JSON write is read as it was, or refused."""

import csv
import io
import json
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.kit.literals import is_structured, read_structure

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
VALUES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
STRUCTURES = st.lists(VALUES, max_size=5) | st.dictionaries(TEXTS, VALUES, max_size=4)


def cell_of(csv_text: str) -> str:
    """The last cell of the last record of a CSV file."""
    return list(csv.reader(io.StringIO(csv_text, newline="")))[-1][-1]


@given(value=STRUCTURES)
def test_json_and_python_are_read_as_they_were(value: Any):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)):
        assert is_structured(text)
        assert read_structure(text) == value


@given(texts=st.lists(TEXTS, min_size=1, max_size=20))
def test_a_list_of_texts_survives_pandas_and_numpy(texts: list[str]):
    for value in (texts, np.array([*texts, None], object)[:-1], [np.str_(text) for text in texts]):
        assert read_structure(cell_of(pd.DataFrame({"a": [value]}).to_csv(index=False))) == texts


@pytest.mark.parametrize("values", [[1, 2, 30], [1.5, -2.0], [True, False], [1969.0]])
def test_a_list_of_numbers_survives_numpy(values: list[Any]):
    assert read_structure(str(np.array(values))) == values


def test_what_a_dataset_writes_is_read_as_it_was():
    row = {
        "texts": ["Paris", "O'Neil", 'He said "x"', "two\nlines"],
        "one": ["Paris"],
        "object": {"text": ["bank", "mall"], "label": ["A", "B"]},
        "objects": [{"label": "A", "text": "bank"}, {"label": "B", "text": "it's"}],
        "numbers": [1, 2],
    }
    for name, value in row.items():
        buffer = io.BytesIO()
        datasets.Dataset.from_list([{name: value}]).to_csv(buffer)
        assert read_structure(cell_of(buffer.getvalue().decode())) == value


@pytest.mark.parametrize(
    "text", ["[sic] a title", "(I Can't Get No) Satisfaction", "('Tis the season)", "A [1]", "8", "", "print(['a'])"]
)
def test_ordinary_texts_are_no_structures(text: str):
    assert not is_structured(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("['a' 'b', 'c']", "some elements stand between commas and some do not"),
        ("['O''Neil']", "not expected"),
        ("['v' 'v' ... 'v' 'v']", "numpy left elements out"),
        (str(np.array(["v"] * 2000)), "numpy left elements out"),
        ("['Paris', 'City of Par", "no text in quotes"),
        ("['Paris', ", "cut off"),
        ('{"value": "Paris", ', "cut off"),
        ("[Paris, City of Paris]", "'Paris' is not expected"),
        ("[REDACTED]", "'REDACTED' is not expected"),
        ("[007]", "begins with 0"),
        ("{'a': 1, 'b'}", "not expected"),
        ("['\\ud83d']", "half a character"),
        ("['\\d']", "no text in quotes"),
        ("frozenset({'a', 'b'})", "not expected"),
        ("Index(['a', 'b'], dtype='object')", "not expected"),
        ("OrderedDict([('a', 1)])", "not expected"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, why: str):
    assert is_structured(text)
    with pytest.raises(ValueError, match=why):
        read_structure(text)


@pytest.mark.attack
@pytest.mark.parametrize(
    "text",
    [
        "[__import__('os').system('true')]",
        "[open('/etc/passwd').read()]",
        "[np.load('x')]",
        "[" * 200_000,
        "[" * 40 + "'a'" + "]" * 40,
        "{" * 40 + "}" * 40,
        "['a'" + " 'a" * 100_000,
        "[" + "9" * 10_000 + "]",
        "[1, 2, lambda: 0]",
        "array(array(array(",
    ],
)
def test_hostile_cells_are_refused_at_once(text: str):
    with pytest.raises(ValueError, match=r"not expected|nested|cut off|no text|digits"):
        read_structure(text)
