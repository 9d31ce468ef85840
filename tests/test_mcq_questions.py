"""Questions with four options, in every form they come in; what is refused; and options in another order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.introspection.questions import McqQuestion, parse_row, read_questions, shuffled
from builders.kit.choices import Choice
from builders.kit.columns import ChoiceSource
from builders.kit.sources import SourceRow
from tracekit.errors import SourceError

TEXTS = ["Mars", "Jupiter", "Venus", "Earth"]
QUESTION = "Which planet is the largest?"
MMLU: dict[str, Any] = {"question": QUESTION, "subject": "astronomy", "choices": TEXTS, "answer": 1}
ARC: dict[str, Any] = {
    "id": "Mercury_1",
    "question": QUESTION,
    "choices": {"text": TEXTS, "label": list("ABCD")},
    "answerKey": "B",
}
ARC_NUMBERED = ARC | {"choices": {"text": TEXTS, "label": list("1234")}, "answerKey": "2"}
OPENBOOKQA: dict[str, Any] = {
    "id": "7-980",
    "question_stem": QUESTION,
    "choices": {"text": TEXTS, "label": list("ABCD")},
    "answerKey": "B",
}
MAPPING: dict[str, Any] = {
    "id": 12,
    "question": f" {QUESTION}\n",
    "options": {"B": "Jupiter", "A": " Mars", "D": "Earth", "C": "Venus"},
    "answer": "B",
}
LIST: dict[str, Any] = {"question": QUESTION, "options": TEXTS, "answer": "b"}
PAIRS: dict[str, Any] = {
    "question": QUESTION,
    "choices": [{"label": label, "text": text} for label, text in zip("ABCD", TEXTS, strict=True)],
    "answer": "B",
}
COLUMNS: dict[str, Any] = {"question": QUESTION, **dict(zip("ABCD", TEXTS, strict=True)), "answer": "1"}
AS_JSON: dict[str, Any] = {"question": QUESTION, "options": json.dumps(TEXTS), "answer": "B"}
AS_JSON_MAPPING: dict[str, Any] = {"question": QUESTION, "options": json.dumps(MAPPING["options"]), "answer": "B"}
FORMS = [MMLU, ARC, ARC_NUMBERED, OPENBOOKQA, MAPPING, LIST, PAIRS, COLUMNS, AS_JSON, AS_JSON_MAPPING]


def parsed(data: dict[str, Any]) -> McqQuestion:
    return parse_row(SourceRow(index=7, where="here", data=data))


def choices(texts: Sequence[str]) -> list[Choice]:
    return [Choice(label=label, text=text) for label, text in zip("ABCD", texts, strict=True)]


@pytest.mark.parametrize("data", FORMS)
def test_every_form_gives_the_same_question(data: dict[str, Any]):
    question = parsed(data)
    assert question.question == QUESTION
    assert question.choices == choices(TEXTS)
    assert (question.label_idx, question.correct_letter) == (1, "B")
    assert (question.index, question.order) == (7, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("data", "identity", "subject"),
    [
        (MMLU, "7", "astronomy"),
        (ARC, "Mercury_1", None),
        (MAPPING, "12", None),
        (LIST | {"id": ""}, "row-7", None),
        (LIST | {"id": 0}, "0", None),
        (LIST | {"subject": " "}, "7", None),
        (LIST | {"subject": " law "}, "7", "law"),
    ],
)
def test_id_and_subject_are_the_sources_own(data: dict[str, Any], identity: str, subject: str | None):
    question = parsed(data)
    assert (question.example_id, question.subject) == (identity, subject)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("A", "A"), ("d", "D"), (" c ", "C"), (0, "A"), (3, "D"), ("0", "A"), ("3", "D"), (2.0, "C"), (0.0, "A")],
)
def test_an_answer_is_a_letter_or_a_number_from_zero(answer: Any, letter: str):
    assert parsed(MMLU | {"answer": answer}).correct_letter == letter


@pytest.mark.parametrize(
    ("labels", "answer", "letter"),
    [
        ("1234", "1", "A"),
        ("1234", 4, "D"),
        ("1234", 4.0, "D"),
        ("1234", "B", "B"),
        ("0123", "1", "B"),
        ("DCBA", "D", "A"),
        ("DCBA", 0, "A"),
        ("abcd", "B", "B"),
        ("BCDE", "E", "D"),
    ],
)
def test_a_label_of_the_source_comes_before_a_number(labels: str, answer: Any, letter: str):
    question = parsed(ARC | {"choices": {"text": TEXTS, "label": list(labels)}, "answerKey": answer})
    assert question.correct_letter == letter
    assert question.choices == choices(TEXTS)


@pytest.mark.parametrize(
    "data",
    [
        ARC | {"answer": None},
        ARC | {"answer": ""},
        ARC | {"answer": None, "gold": None},
        ARC | {"options": None},
        ARC | {"options": ""},
        ARC | {"options": []},
        MAPPING | {"choices": None},
        COLUMNS | {"options": ""},
        COLUMNS | {"options": None, "choices": None, "answerKey": None},
        OPENBOOKQA | {"question": None},
        OPENBOOKQA | {"question": "", "query": None},
    ],
)
def test_null_and_empty_columns_of_merged_sets_are_passed_over(data: dict[str, Any]):
    question = parsed(data)
    assert question.question == QUESTION
    assert (question.choices, question.correct_letter) == (choices(TEXTS), "B")


def test_options_may_be_numbers():
    assert parsed(MMLU | {"choices": [1, 2.5, "3", -4]}).choices == choices(["1", "2.5", "3", "-4"])


@pytest.mark.parametrize("answer", [{"answer": ""}, {"answer": None}, {"answer": float("nan")}, {}])
def test_without_an_answer_a_question_is_unlabelled(answer: dict[str, Any]):
    question = parsed({key: value for key, value in MMLU.items() if key != "answer"} | answer)
    assert question.label_idx is None
    assert question.correct_letter is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MMLU | {"choices": [*TEXTS, "Pluto"]}, "5 options; expected four in 'options' or 'choices'"),
        (MMLU | {"choices": TEXTS[:3]}, "3 options; expected four"),
        (MMLU | {"choices": []}, "0 options; expected four"),
        (MMLU | {"choices": 4}, "0 options; expected four"),
        (MMLU | {"choices": None}, "0 options; expected four"),
        (ARC | {"choices": {"text": [*TEXTS, "Pluto"], "label": list("ABCDE")}}, "5 options"),
        (ARC | {"choices": {"text": [*TEXTS, "Pluto"], "label": list("ABCD")}}, "5 options"),
        (ARC | {"choices": {"text": TEXTS[:3], "label": list("ABC")}}, "3 options"),
        (ARC | {"choices": {"text": TEXTS[:3], "label": list("ABCD")}}, "an option is None; expected a text"),
        (ARC | {"choices": {"text": TEXTS, "label": list("AABC")}}, "options labelled A A B C; expected each label"),
        (ARC | {"choices": {"text": TEXTS, "label": list("BCDE")}, "answerKey": "A"}, "the answer is 'A'"),
        (MAPPING | {"options": {**MAPPING["options"], "E": "Pluto"}}, "5 options"),
        (COLUMNS | {"C": ""}, "column 'C' holds no option, and 'D' after it holds one"),
        (COLUMNS | {"E": "Pluto"}, "5 options; expected four"),
        (COLUMNS | {"C": " "}, "an option is ' '; expected a text"),
        (MMLU | {"choices": ["Mars", "", "Venus", "Earth"]}, "an option is ''; expected a text"),
        (MMLU | {"choices": ["Mars", None, "Venus", "Earth"]}, "an option is None"),
        (MMLU | {"choices": ["Mars", True, "Venus", "Earth"]}, "an option is True"),
        (PAIRS | {"choices": [{"label": label} for label in "ABCD"]}, "an option is None"),
        (
            AS_JSON | {"options": "A) Mars B) Jupiter"},
            "column 'options' holds the options as 'A) Mars B) Jupiter'; expected a list",
        ),
        (AS_JSON | {"options": "4"}, "0 options; expected four"),
        (MMLU | {"answer": 4}, "the answer is 4; expected one of A B C D, or a number 0 to 3, counted from 0; noth"),
        (MMLU | {"answer": "4"}, "the answer is '4'"),
        (MMLU | {"answer": -1}, "the answer is -1"),
        (MMLU | {"answer": "E"}, "the answer is 'E'"),
        (MMLU | {"answer": "AB"}, "the answer is 'AB'"),
        (MMLU | {"answer": "None"}, "the answer is 'None'"),
        (PAIRS | {"choices": [{"text": text} for text in TEXTS], "answer": "None"}, "the answer is 'None'"),
        (MMLU | {"answer": "Jupiter"}, "unlabelled; an option's text is not accepted"),
        (MMLU | {"answer": 4.0}, "the answer is 4.0"),
        (MMLU | {"answer": -1.0}, "the answer is -1.0"),
        (MMLU | {"answer": float("inf")}, "the answer is inf"),
        (
            ARC | {"choices": {"text": TEXTS, "label": list("WXYZ")}, "answerKey": "E"},
            "the answer is 'E'; expected one of W X Y Z, or a letter A to D, or a number 0 to 3, counted from 0; ",
        ),
        (MMLU | {"answer": 1.5}, "the answer is 1.5"),
        (MMLU | {"answer": True}, "the answer is True"),
        (MMLU | {"answer": " "}, "the answer is ' '"),
        (ARC_NUMBERED | {"answerKey": "5"}, "the answer is '5'; expected one of 1 2 3 4, or a letter A to D; nothing"),
        (ARC_NUMBERED | {"answerKey": 0}, "the answer is 0; expected one of 1 2 3 4"),
        (MMLU | {"question": " "}, "found ' '; columns: question"),
        (MMLU | {"question": 3}, "no question"),
        ({"choices": TEXTS, "answer": 1}, "found None; columns: choices, answer"),
    ],
)
def test_a_malformed_row_says_what_was_expected(data: dict[str, Any], message: str):
    with pytest.raises(SourceError) as caught:
        parsed(data)
    assert message in str(caught.value)


# Files


def write(path: Path, rows: Sequence[dict[str, Any]]) -> ChoiceSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ChoiceSource(source=str(path))


def test_a_json_lines_file_of_every_form_is_read(tmp_path: Path):
    rows = [row | {"id": f"q{number}"} for number, row in enumerate(FORMS)]
    found = read_questions(write(tmp_path / "rows.jsonl", rows))
    assert [one.example_id for one in found.examples] == [f"q{number}" for number in range(len(FORMS))]
    assert {one.correct_letter for one in found.examples} == {"B"}
    assert (found.source.num_rows, found.source.num_used, found.source.skipped) == (len(FORMS), len(FORMS), [])


def test_a_csv_file_with_columns_and_one_with_a_json_text_are_read(tmp_path: Path):
    columns = tmp_path / "columns.csv"
    columns.write_text(f"id,question,A,B,C,D,answer\nx,{QUESTION},Mars,Jupiter,Venus,Earth,b\ny,Two?,1,2,3,4,1\n")
    nested = tmp_path / "nested.csv"
    cell = json.dumps(TEXTS).replace('"', '""')
    nested.write_text(f'id,question,options,answer\nx,{QUESTION},"{cell}",1\nz,Unknown?,"{cell}",\n')
    for path, letters in ((columns, ["B", "B"]), (nested, ["B", None])):
        found = read_questions(ChoiceSource(source=str(path))).examples
        assert found[0].choices == choices(TEXTS)
        assert [one.correct_letter for one in found] == letters


def test_an_id_that_stands_twice_is_refused_or_skipped(tmp_path: Path):
    rows = [MMLU | {"id": "a"}, MMLU | {"id": "b"}, MMLU | {"id": "a", "question": "Again?"}, MMLU | {"id": "a"}]
    config = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        SourceError,
        match=r"row 2 \(counted from 0\): id 'a' is that of row 0 too; .* give each its own, or pass --on-bad-row skip",
    ):
        read_questions(config)
    found = read_questions(msgspec.structs.replace(config, on_bad_row="skip"))
    assert [(one.example_id, one.index, one.question) for one in found.examples] == [
        ("a", 0, QUESTION),
        ("b", 1, QUESTION),
    ]
    assert found.source.num_used == 2
    assert [line.split(": ", 1)[1][:25] for line in found.source.skipped] == ["id 'a' is that of row 0 t"] * 2


def test_an_id_that_is_the_row_of_another_stands_twice(tmp_path: Path):
    config = write(tmp_path / "rows.jsonl", [MMLU | {"id": 1}, MMLU])
    with pytest.raises(SourceError, match=r"row 1 \(counted from 0\): id '1' is that of row 0 too"):
        read_questions(config)


def test_a_malformed_row_is_skipped_beside_a_repeated_id(tmp_path: Path):
    rows = [MMLU | {"id": "a"}, MMLU | {"id": "b", "answer": 9}, MMLU | {"id": "a"}, MMLU | {"id": "c"}]
    config = msgspec.structs.replace(write(tmp_path / "rows.jsonl", rows), on_bad_row="skip")
    found = read_questions(config)
    assert [one.example_id for one in found.examples] == ["a", "c"]
    assert (found.source.num_rows, found.source.num_used, len(found.source.skipped)) == (4, 2, 2)


# Order


def questions(count: int) -> list[McqQuestion]:
    return [parsed(MMLU | {"id": f"q{number}", "answer": number % 4}) for number in range(count)]


def test_a_shuffled_question_has_the_same_options_and_the_right_letter_follows_its_text():
    for question in questions(50):
        mixed = shuffled(question, 3)
        assert sorted(mixed.order) == [0, 1, 2, 3]
        assert [choice.label for choice in mixed.choices] == list("ABCD")
        assert [choice.text for choice in mixed.choices] == [TEXTS[number] for number in mixed.order]
        assert question.label_idx is not None
        assert mixed.label_idx is not None
        assert mixed.choices[mixed.label_idx].text == TEXTS[question.label_idx]
        assert mixed.correct_letter == "ABCD"[mixed.label_idx]
        assert (mixed.question, mixed.example_id, mixed.index) == (question.question, question.example_id, 7)


def test_the_order_is_drawn_by_seed_and_id_alone():
    many = questions(200)
    orders = [tuple(shuffled(one, 3).order) for one in many]
    other_rows = [msgspec.structs.replace(one, index=99, question="Another?") for one in many]
    assert orders == [tuple(shuffled(one, 3).order) for one in other_rows]
    assert len(set(orders)) == 24
    assert orders != [tuple(shuffled(one, 4).order) for one in many]
    first = [order[0] for order in orders]
    assert all(30 < first.count(number) < 70 for number in range(4)), first


def test_order_counts_from_the_source_after_two_shuffles():
    for question in questions(10):
        twice = shuffled(shuffled(question, 3), 4)
        assert [choice.text for choice in twice.choices] == [TEXTS[number] for number in twice.order]
        assert twice.label_idx is not None
        assert twice.order[twice.label_idx] == question.label_idx


def test_an_unlabelled_question_stays_so():
    mixed = shuffled(parsed({**MMLU, "answer": None}), 3)
    assert mixed.label_idx is None
    assert mixed.correct_letter is None
    assert sorted(choice.text for choice in mixed.choices) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["slice_arc_easy_200", "slice_openbook_qa_200"])
def test_real_questions_are_read_whole(shared: Path, name: str):
    path = shared / "data/mcq" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = read_questions(ChoiceSource(source=str(path), on_bad_row="skip"))
    assert found.source.skipped == []
    for row, question in zip(rows, found.examples, strict=True):
        assert row["query"].endswith(question.question)
        assert not question.question.startswith("Question:")
        assert [choice.text for choice in question.choices] == [text.strip() for text in row["choices"]]
        assert question.label_idx == row["gold"]
