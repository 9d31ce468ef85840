"""Cells: every dialect of a value in every role and every form of file gives the same value, or is refused by name."""

import csv
import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builders.introspection import questions as mcq_questions
from builders.kit import csqa_questions
from builders.kit.cells import Cells, SourceRow
from builders.kit.columns import ChoiceSource, QuestionSource
from builders.kit.sources import read_examples
from builders.trivia_qa import task as trivia_qa
from tracekit.errors import SourceError
from tracekit.task import Examples

TEXTS = ["Mars", "O'Neil", 'the "red" one', "Earth, too"]
FORMS = ("csv", "tsv", "jsonl", "parquet", "hub.csv", "memory")
MISSING = [None, float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), Decimal("nan")]


def write(path: Path, form: str, row: dict[str, Any]) -> str:
    """One row as the usual programs write it; `hub.csv` is what `Dataset.to_csv` writes."""
    name = str(path / f"rows.{form.rpartition('.')[2]}")
    if form in ("csv", "tsv"):
        pd.DataFrame([row]).to_csv(name, index=False, sep="\t" if form == "tsv" else ",")
    elif form == "jsonl":
        Path(name).write_text(json.dumps(row) + "\n")
    elif form == "parquet":
        pd.DataFrame([row]).to_parquet(name)
    else:
        datasets.Dataset.from_list([row]).to_csv(name)
    return name


def read(parse: Callable[[SourceRow], Any], columns: Any, source: str, **settings: Any) -> Examples[Any]:
    config = (ChoiceSource if "choices" in columns else QuestionSource)(source=source, **settings)
    return read_examples(config, default=trivia_qa.SOURCE, sample=Path(), parse=parse, columns=columns)


def read_one(module: Any, folder: Path, form: str, row: dict[str, Any], **settings: Any) -> Any:
    """The example that a builder makes of a row, through a file or (`memory`) straight away."""
    if form == "memory":
        return module.parse_row(SourceRow(0, "here", row))
    return read(module.parse_row, module.COLUMNS, write(folder, form, row), **settings).examples[0]


class Dialect(NamedTuple):
    """A way to write a list of texts."""

    write: Callable[[list[str]], Any]
    forms: tuple[str, ...] = FORMS


LISTS = {
    "native": Dialect(list),
    "json": Dialect(json.dumps),
    "python": Dialect(repr, ("csv", "tsv", "jsonl", "parquet", "memory")),
    "numpy": Dialect(lambda texts: str(np.array(texts, object)), ("csv", "tsv", "jsonl", "parquet", "memory")),
    "array": Dialect(lambda texts: np.array(texts, object), ("csv", "tsv", "parquet", "memory")),
    "scalars": Dialect(lambda texts: [np.str_(text) for text in texts], ("csv", "tsv", "memory")),
    "tuple": Dialect(tuple, ("csv", "tsv", "jsonl", "memory")),
}
LIST_CASES = [(name, form) for name, dialect in LISTS.items() for form in dialect.forms]


@pytest.mark.parametrize(("name", "form"), LIST_CASES)
@pytest.mark.parametrize("column", ["answers", "aliases", "answer"])
def test_a_list_of_answers(tmp_path: Path, name: str, form: str, column: str):
    row = {"question": "Which?", column: LISTS[name].write(TEXTS)}
    assert read_one(trivia_qa, tmp_path, form, row).answers == TEXTS


@pytest.mark.parametrize(("name", "form"), LIST_CASES)
@pytest.mark.parametrize("module", [mcq_questions, csqa_questions])
def test_a_list_of_options(tmp_path: Path, name: str, form: str, module: Any):
    row = {"question": "Which?", "choices": LISTS[name].write(TEXTS), "answer": "B"}
    found = read_one(module, tmp_path, form, row)
    assert [(choice.label, choice.text) for choice in found.choices] == list(zip("ABCD", TEXTS, strict=True))
    assert found.label_idx == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spell", [dict, json.dumps, repr])
@pytest.mark.parametrize("labels", ["ABCD", "1234"])
def test_options_in_an_object(tmp_path: Path, form: str, spell: Callable[[Any], Any], labels: str):
    choices = spell({"text": TEXTS, "label": list(labels)})
    found = read_one(mcq_questions, tmp_path, form, {"question": "Which?", "choices": choices, "answerKey": labels[2]})
    assert [choice.text for choice in found.choices] == TEXTS
    assert found.label_idx == 2


@pytest.mark.parametrize("form", FORMS)
def test_the_nested_forms_of_the_originals(tmp_path: Path, form: str):
    asked = {"stem": "Where?", "choices": [{"label": "A", "text": "bank"}, {"label": "B", "text": "it's"}]}
    found = read_one(csqa_questions, tmp_path, form, {"id": "q", "question": asked, "answerKey": "B"})
    assert (found.question, [choice.text for choice in found.choices], found.label_idx) == (
        "Where?",
        ["bank", "it's"],
        1,
    )
    answer = {"value": "Sinclair Lewis", "aliases": ["Harry Sinclair Lewis", "Lewis"], "type": "Entity"}
    found = read_one(trivia_qa, tmp_path, form, {"question": "Who?", "answer": answer})
    assert found.answers == ["Sinclair Lewis", "Harry Sinclair Lewis", "Lewis"]
    squad = {"text": ["1969", "July 1969"], "answer_start": [3, 5]}
    assert read_one(trivia_qa, tmp_path, form, {"question": "When?", "answers": squad}).answers == ["1969", "July 1969"]


NUMBERS = {
    "integer": (17, FORMS),
    "whole float": (17.0, FORMS),
    "numpy integer": (np.int64(17), ("csv", "tsv", "parquet", "memory")),
    "numpy float": (np.float32(17), ("csv", "tsv", "parquet", "memory")),
    "text": ("17", FORMS),
    "decimal": (Decimal("17.00"), ("parquet", "memory")),
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, (_, forms) in NUMBERS.items() for form in forms])
def test_a_whole_number_is_an_integer_in_every_role(tmp_path: Path, name: str, form: str):
    number = NUMBERS[name][0]
    found = read_one(trivia_qa, tmp_path, form, {"question": "Q?", "answer": number, "id": number})
    assert (found.answers, found.example_id) == (["17"], "17")
    row = {"question": "Q?", **dict.fromkeys("ABCD", number), "answer": "A", "id": number}
    found = read_one(mcq_questions, tmp_path, form, row)
    assert ([choice.text for choice in found.choices], found.example_id) == (["17"] * 4, "17")
    found = read_one(csqa_questions, tmp_path, form, row | {"answerKey": "B"})
    assert ([choice.text for choice in found.choices], found.example_id) == (["17"] * 4, "17")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("label", "index"), [(2.0, 2), (2, 2), ("2", 2), ("c", 2), ("C", 2)])
def test_a_label_is_a_letter_or_a_whole_number(tmp_path: Path, form: str, label: Any, index: int):
    row = {"question": "Q?", "choices": TEXTS, "answer": label}
    assert read_one(mcq_questions, tmp_path, form, row).label_idx == index


def test_a_column_with_gaps_is_read_as_the_one_without(tmp_path: Path):
    frame = pd.DataFrame(
        {"question": ["a?", "b?", "c?"], "answer": [1969, None, 3.5], "id": [17, None, 18], "aliases": ["x", "y", None]}
    )
    for form in ("csv", "tsv", "jsonl", "parquet"):
        path = tmp_path / f"rows.{form}"
        writer = {"jsonl": frame.to_json, "parquet": frame.to_parquet}.get(form, frame.to_csv)
        options = {"jsonl": {"orient": "records", "lines": True}, "tsv": {"sep": "\t"}}.get(form, {})
        writer(path, **options)
        found = read(trivia_qa.parse_row, trivia_qa.COLUMNS, str(path)).examples
        assert [one.answers for one in found] == [["1969", "x"], ["y"], ["3.5"]], form
        assert [one.example_id for one in found] == ["17", "row-1", "18"], form


@pytest.mark.parametrize("missing", [*MISSING, "", [], {}], ids=lambda value: f"{type(value).__name__} {value}")
def test_what_is_missing_is_missing_in_every_role(missing: Any):
    with pytest.raises(SourceError, match=r"no answer"):
        trivia_qa.parse_row(SourceRow(0, "here", {"question": "Q?", "answer": missing}))
    with pytest.raises(SourceError, match=r"no question"):
        trivia_qa.parse_row(SourceRow(0, "here", {"question": missing, "answer": "x"}))
    found = (
        trivia_qa.parse_row(SourceRow(7, "here", {"question": "Q?", "answer": ["x", missing], "id": missing}))
        if (not isinstance(missing, list | dict))
        else trivia_qa.parse_row(SourceRow(7, "here", {"question": "Q?", "answer": "x", "id": missing}))
    )
    assert (found.answers, found.example_id) == (["x"], "row-7")
    row = {"question": "Q?", "choices": TEXTS, "answer": missing}
    assert mcq_questions.parse_row(SourceRow(0, "here", row)).label_idx is None
    assert csqa_questions.parse_row(SourceRow(0, "here", row)).label_idx is None
    row = {"question": "Q?", **dict(zip("ABCD", TEXTS, strict=True)), "options": missing, "answer": "A"}
    assert mcq_questions.parse_row(SourceRow(0, "here", row)).label_idx == 0
    with pytest.raises(SourceError, match=r"an option|column 'C' holds no option"):
        mcq_questions.parse_row(SourceRow(0, "here", row | {"C": missing}))
    with pytest.raises(SourceError, match=r"an option"):
        mcq_questions.parse_row(SourceRow(0, "here", {"question": "Q?", "choices": [*TEXTS[:3], missing]}))


@pytest.mark.parametrize("word", ["nan", "NaN", "<NA>", "NaT"])
def test_a_missing_value_of_pandas_is_missing_in_csv_and_a_text_in_json(tmp_path: Path, word: str):
    row = {"question": "Q?", "answer": word, "aliases": "x", "id": word}
    found = read_one(trivia_qa, tmp_path, "csv", row)
    assert (found.answers, found.example_id) == (["x"], "row-0")
    found = read_one(trivia_qa, tmp_path, "jsonl", row)
    assert (found.answers, found.example_id) == ([word, "x"], word)


def test_two_sets_of_options_that_differ_are_refused():
    row = {"question": "Q?", "choices": TEXTS, "answer": "A"}
    letters = dict(zip("ABCD", TEXTS, strict=True))
    for parse in (mcq_questions.parse_row, csqa_questions.parse_row):
        assert parse(SourceRow(0, "here", row | letters)).label_idx == 0
        assert parse(SourceRow(0, "here", letters | {"question": "Q?", "answer": "B"})).label_idx == 1
        with pytest.raises(SourceError, match=r"columns A B C D hold other options than 'choices'.*--choices-columns"):
            parse(SourceRow(0, "here", row | letters | {"C": "other"}))
        named = SourceRow(0, "here", row | letters | {"C": "other"}, named={"choices": ("choices",)})
        assert parse(named).label_idx == 0


def test_a_row_without_id_does_not_take_the_id_of_another(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("id,question,answer\n1.0,Why?,x\n,What?,y\n nan ,Who?,z\n")
    found = read(trivia_qa.parse_row, trivia_qa.COLUMNS, str(path)).examples
    assert [one.example_id for one in found] == ["1", "row-1", "row-2"]


@pytest.mark.parametrize(
    ("cell", "text"), [("9007199254740993.0", "9007199254740993"), ("007.0", "007.0"), ("-0.0", "0"), ("-5.0", "-5")]
)
def test_a_whole_float_in_a_text_keeps_all_its_digits(tmp_path: Path, cell: str, text: str):
    assert read_one(trivia_qa, tmp_path, "csv", {"question": "Q?", "answer": cell}).answers == [text]


@pytest.mark.parametrize("value", [2.0**53, -(2.0**53), 2.0**53 + 2])
def test_a_float_whose_last_digit_may_be_lost_is_refused(value: float):
    with pytest.raises(SourceError, match="is not exact"):
        trivia_qa.parse_row(SourceRow(0, "here", {"question": "Q?", "answer": value}))


@pytest.mark.parametrize("word", ["None", "NA", "null", "N/A", "-", "2.50", "007", "1e5"])
@pytest.mark.parametrize("form", FORMS)
def test_other_words_are_texts(tmp_path: Path, form: str, word: str):
    row = {"question": "Q?", "choices": [word, "b", "c", "d"], "answer": "A"}
    assert read_one(mcq_questions, tmp_path, form, row).choices[0].text == word
    assert read_one(trivia_qa, tmp_path, form, {"question": "Q?", "answer": word}).answers == [word]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (2.5, "2.5"),
        (np.float32(0.1), "0.1"),
        (Decimal("2.50"), "2.50"),
        (datetime.date(1969, 7, 20), "1969-07-20"),
        (pd.Timestamp("1969-07-20"), "1969-07-20"),
        (pd.Timestamp("1969-07-20 20:17"), "1969-07-20T20:17:00"),
        (b"Gr\xc3\xb6\xc3\x9fe", "Größe"),
        (-3.0, "-3"),
    ],
    ids=str,
)
def test_values_of_other_types_are_read_as_text(value: Any, text: str):
    assert trivia_qa.parse_row(SourceRow(0, "here", {"question": "Q?", "answer": value})).answers == [text]


def test_floats_of_32_bits_are_read_as_they_are_written(tmp_path: Path):
    frame = pd.DataFrame(
        {"question": ["Q?"] * 3, "answer": np.array([0.1, 17, np.nan], np.float32), "aliases": ["x"] * 3}
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    found = read(trivia_qa.parse_row, trivia_qa.COLUMNS, str(tmp_path / "rows.parquet")).examples
    assert [one.answers for one in found] == [["0.1", "x"], ["17", "x"], ["x"]]


@pytest.mark.parametrize("value", [1e20, float("inf"), -1e300, b"\xff", [["a"], ["b"]], {"x": "a"}], ids=str)
def test_values_without_an_exact_text_are_refused(value: Any):
    with pytest.raises(SourceError, match=r"answer|UTF-8"):
        trivia_qa.parse_row(SourceRow(0, "here", {"question": "Q?", "answer": value}))


@pytest.mark.parametrize("cell", ["['Paris', 'City of", "['a' 'b', 'c']", "[Paris, City of Paris]", "{'value': }"])
@pytest.mark.parametrize(("module", "column"), [(trivia_qa, "answers"), (mcq_questions, "options")])
def test_a_list_that_cannot_be_read_is_refused_with_row_and_column(tmp_path: Path, cell: str, module: Any, column: str):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", column], ["ok?", '["a", "b", "c", "d"]'], ["Q?", cell]])
    with pytest.raises(SourceError, match=rf"rows\.csv line 3: column '{column}': .*looks like a list.*write JSON"):
        read(module.parse_row, module.COLUMNS, str(path))


@pytest.mark.attack
@pytest.mark.parametrize("depth", [100, 500, 900, 100_000])
def test_a_value_that_is_nested_deeply_is_a_malformed_row(tmp_path: Path, depth: int):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Q?", "answer": ' + "[" * depth + '"\\u00e9"' + "]" * depth + "}\n")
    with pytest.raises(SourceError, match=r"rows\.jsonl line 1: .*nested"):
        read(trivia_qa.parse_row, trivia_qa.COLUMNS, str(path))


@pytest.mark.parametrize("form", FORMS)
def test_a_text_in_a_list_is_no_number(tmp_path: Path, form: str):
    row = {"question": "Which version?", "answers": ["2.0", "2.00"]}
    assert read_one(trivia_qa, tmp_path, form, row).answers == ["2.0", "2.00"]


def test_a_question_is_never_read_as_a_list():
    for question in ("['a'", "[1, 2] is which type?", "{x}", "17.0"):
        assert (
            trivia_qa.parse_row(SourceRow(0, "here", {"question": question, "answer": "x"}, True)).question == question
        )
        row = {"question": question, "choices": TEXTS}
        assert csqa_questions.parse_row(SourceRow(0, "here", row, True)).question == question


# Columns by hand


def test_columns_are_named_by_hand(tmp_path: Path):
    path = tmp_path / "rows.tsv"
    path.write_text("Q\tgold\tkey\tquestion\nWho?\t['a', 'b']\t5.0\tnot this\n")
    (found,) = read(
        trivia_qa.parse_row,
        trivia_qa.COLUMNS,
        str(path),
        question_column="Q",
        answer_column="gold",
        id_column="key",
    ).examples
    assert (found.question, found.answers, found.example_id) == ("Who?", ["a", "b"], "5")


@pytest.mark.parametrize("module", [mcq_questions, csqa_questions])
@pytest.mark.parametrize("setting", ["label_column", "answer_column"])
def test_options_are_named_by_hand(tmp_path: Path, module: Any, setting: str):
    path = tmp_path / "rows.csv"
    path.write_text("ask,first,second,third,fourth,right,answer\nWho?,a,b,c,d,B,zzz\n")
    names = ("first", "second", "third", "fourth")
    settings: dict[str, Any] = {"question_column": "ask", "choices_columns": names, setting: "right"}
    (found,) = read(module.parse_row, module.COLUMNS, str(path), **settings).examples
    assert ([choice.text for choice in found.choices], found.label_idx) == (list("abcd"), 1)
    path.write_text("ask,all,right\nWho?,\"['a', 'b', 'c', 'd']\",C\n")
    settings["choices_columns"] = ("all",)
    assert read(module.parse_row, module.COLUMNS, str(path), **settings).examples[0].label_idx == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, suffix: str):
    path = tmp_path / f"rows.{suffix}"
    row = {"question": "Q?", "answer": "x"}
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text("question,answer\nQ?,x\n" if suffix == "csv" else json.dumps(row))
    message = r"no column 'answers', given by --answer-column; columns: question, answer"
    for on_bad_row in ("error", "skip"):
        with pytest.raises(SourceError, match=message):
            read(trivia_qa.parse_row, trivia_qa.COLUMNS, str(path), answer_column="answers", on_bad_row=on_bad_row)


# Options in columns

NAMES = ["choice{}", "choice_{}", "Choice {}", "option{}", "ending{}", "sol{}", "op{}"]


@pytest.mark.parametrize("name", NAMES)
def test_options_in_numbered_columns_from_zero(name: str):
    row = {"question": "Q?"} | {name.format(number): text for number, text in enumerate(TEXTS)}
    for answer, index in ((2, 2), ("2", 2), (2.0, 2), ("C", 2), ("0", 0)):
        found = mcq_questions.parse_row(SourceRow(0, "here", row | {"answer": answer}))
        assert ([choice.text for choice in found.choices], found.label_idx) == (TEXTS, index)
        assert csqa_questions.parse_row(SourceRow(0, "here", row | {"answer": answer})).label_idx == index


@pytest.mark.parametrize("name", ["option_{}", "opt{}", "op{}", "choice{}", "{}"])
@pytest.mark.parametrize("letters", ["abcd", "ABCD"])
def test_options_in_lettered_columns(name: str, letters: str):
    row = {"question": "Q?", "answer": "C"} | {name.format(a): text for a, text in zip(letters, TEXTS, strict=True)}
    for module in (mcq_questions, csqa_questions):
        found = module.parse_row(SourceRow(0, "here", row))
        assert ([choice.text for choice in found.choices], found.label_idx) == (TEXTS, 2)


@pytest.mark.parametrize("name", ["choice{}", "option{}", "sol{}"])
@pytest.mark.parametrize("module", [mcq_questions, csqa_questions])
def test_options_in_columns_from_one_need_letters_or_a_start(name: str, module: Any):
    row = {"question": "Q?"} | {name.format(number): text for number, text in enumerate(TEXTS, start=1)}
    assert module.parse_row(SourceRow(0, "here", row | {"answer": "B"})).label_idx == 1
    with pytest.raises(SourceError, match=r"columns count options from 1; pass --label-start 0 or 1"):
        module.parse_row(SourceRow(0, "here", row | {"answer": 1}))
    for start in (0, 1):
        assert module.parse_row(SourceRow(0, "here", row | {"answer": 1}, label_start=start)).label_idx == 1 - start


def test_options_in_two_sets_of_columns_or_with_a_gap_are_refused():
    lettered, numbered = dict(zip("ABCD", TEXTS, strict=True)), {f"choice{n}": text for n, text in enumerate(TEXTS)}
    with pytest.raises(SourceError, match=r"columns A B C D and choice0 .*--choices-columns"):
        mcq_questions.parse_row(SourceRow(0, "here", {"question": "Q?", **lettered, **numbered}))
    empty = dict.fromkeys(numbered, None)
    assert (
        mcq_questions.parse_row(SourceRow(0, "here", {"question": "Q?", **lettered, **empty})).choices[3].text
        == TEXTS[3]
    )
    del numbered["choice2"]
    with pytest.raises(SourceError, match=r"with a gap"):
        mcq_questions.parse_row(SourceRow(0, "here", {"question": "Q?", **numbered}))


@pytest.mark.parametrize("names", ["ABCDE", [f"choice{n}" for n in range(5)], [f"option{n}" for n in range(1, 6)]])
@pytest.mark.parametrize("module", [mcq_questions, csqa_questions])
def test_an_empty_column_before_another_option_is_refused(names: Any, module: Any):
    row = {"question": "Q?", **dict(zip(names, [*TEXTS, None], strict=True))}
    assert [
        one.text for one in module.parse_row(SourceRow(0, "here", row)).choices
    ] == TEXTS  # fewer options: empty at the end
    for answer in (2, 3, "D"):  # whichever it is, it would count other options
        gap = {"question": "Q?", **dict(zip(names, [*TEXTS[:2], "", *TEXTS[2:]], strict=True)), "answer": answer}
        with pytest.raises(SourceError, match=f"column '{names[2]}' holds no option, and '{names[4]}' after it"):
            module.parse_row(SourceRow(0, "here", gap, label_start=0))


def test_an_object_of_numbered_options_is_in_the_order_of_its_numbers():
    options = {str(number): f"option {number}" for number in range(1, 12)}
    row = {"question": "Q?", "choices": options | {"12": None}, "answer": "10"}
    found = csqa_questions.parse_row(SourceRow(0, "here", row))
    assert ([one.label for one in found.choices], found.label_idx) == (list(options), 9)


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize("module", [mcq_questions, csqa_questions])
def test_a_list_of_options_has_either_name(name: str, module: Any):
    assert module.parse_row(SourceRow(0, "here", {"question": "Q?", name: TEXTS, "answer": "C"})).label_idx == 2


@pytest.mark.parametrize("module", [mcq_questions, csqa_questions])
def test_questions_whose_answers_are_in_another_column_are_told_of(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = write(tmp_path, "jsonl", {"question": "Q?", "choices": TEXTS, "cop": 2})
    assert module.read_questions(ChoiceSource(source=name)).examples[0].label_idx is None
    assert "1 of 1 questions have no right answer in" in (said := capsys.readouterr().err)
    assert "--label-column" in said
    config = ChoiceSource(source=name, label_column="cop", label_start=0)
    assert module.read_questions(config).examples[0].label_idx == 2
    assert "no right answer" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "row", "flag"),
    [
        (trivia_qa, {"Question": "Q?", "Answer": "x"}, "--question-column"),
        (trivia_qa, {"question": "Q?", "Answer": "x"}, "--answer-column"),
        (mcq_questions, {"question": "Q?", "distractor1": "x"}, "--choices-column"),
        (csqa_questions, {"ctx": "Q?", "endings": ["x", "y"]}, "--question-column"),
        (csqa_questions, {"question": "Q?", "choices": TEXTS, "answer": "2"}, "--label-start 0 or 1"),
        (mcq_questions, {"question": "Q?", "choices": TEXTS, "answer": "4"}, "--label-start 0 or 1"),
    ],
)
def test_a_table_with_names_of_its_own_is_refused_with_the_flag(module: Any, row: dict[str, Any], flag: str):
    with pytest.raises(SourceError, match=flag):
        module.parse_row(SourceRow(0, "here", row))


def test_numbers_may_count_from_one():
    for answer, index in ((1, 0), ("4", 3), (2.0, 1)):
        row = {"question": "Q?", "choices": TEXTS, "answer": answer}
        assert mcq_questions.parse_row(SourceRow(0, "here", row, label_start=1)).label_idx == index
    with pytest.raises(SourceError, match=r"the answer is 0; .*a number 1 to 4, counted from 1"):
        mcq_questions.parse_row(SourceRow(0, "here", {"question": "Q?", "choices": TEXTS, "answer": 0}, label_start=1))


def test_a_role_without_columns_is_none_of_a_row():
    cells = Cells(SourceRow(3, "here", {"a": 1}), {"id": ("a",)})
    assert (cells.identity(), cells.has_role("a"), cells.listed) == ("1", True, "a")


@pytest.mark.parametrize("form", ["csv", "tsv"])
@pytest.mark.parametrize("empty", ["()", "( )", "[]", "{}"])
def test_an_empty_list_is_no_answer(tmp_path: Path, form: str, empty: str):
    with pytest.raises(SourceError, match="no answer"):
        read_one(trivia_qa, tmp_path, form, {"question": "Which?", "answers": empty})
