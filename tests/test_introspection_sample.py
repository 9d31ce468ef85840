"""The packaged questions of introspection: their form; neither letter nor length gives an answer away."""

import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import builders

PATH = Path(builders.__file__).parent / "introspection" / "introspection.jsonl"
LETTERS = list("ABCD")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_every_row_has_the_same_keys_in_the_same_order(rows: list[dict[str, Any]]):
    for row in rows:
        assert list(row) == ["id", "subject", "question", "options", "answer"], row
        assert list(row["options"]) == LETTERS, row
        texts = [row["id"], row["subject"], row["question"], *row["options"].values()]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts), row
        assert row["answer"] in LETTERS, row


def test_ids_count_from_one(rows: list[dict[str, Any]]):
    assert [row["id"] for row in rows] == [f"intro-{number:03d}" for number in range(1, 81)]


def test_eight_subjects_take_turns_with_ten_questions_each(rows: list[dict[str, Any]]):
    subjects = [row["subject"] for row in rows[:8]]
    assert len(set(subjects)) == 8
    assert [row["subject"] for row in rows] == subjects * 10


def test_no_question_stands_twice(rows: list[dict[str, Any]]):
    questions = {re.sub(r"\W+", " ", row["question"]).casefold() for row in rows}
    assert len(questions) == len(rows)


def test_the_options_of_a_question_differ(rows: list[dict[str, Any]]):
    for row in rows:
        assert len({text.casefold() for text in row["options"].values()}) == 4, row["id"]


def test_right_answers_are_spread_evenly_over_the_letters(rows: list[dict[str, Any]]):
    assert Counter(row["answer"] for row in rows) == dict.fromkeys(LETTERS, 20)
    for start in range(0, len(rows), 20):
        counts = Counter(row["answer"] for row in rows[start : start + 20])
        assert all(4 <= counts[letter] <= 6 for letter in LETTERS), (start, counts)
    for subject in {row["subject"] for row in rows}:
        counts = Counter(row["answer"] for row in rows if row["subject"] == subject)
        assert all(1 <= counts[letter] <= 4 for letter in LETTERS), (subject, counts)


def test_no_letter_is_right_more_than_three_times_running(rows: list[dict[str, Any]]):
    runs = [len(list(same)) for _, same in groupby(row["answer"] for row in rows)]
    assert max(runs) <= 3


def test_the_length_of_an_option_says_little_of_its_truth(rows: list[dict[str, Any]]):
    longest = 0
    for row in rows:
        right = len(row["options"][row["answer"]])
        lengths = [len(text) for letter, text in row["options"].items() if letter != row["answer"]]
        assert min(lengths) - 12 <= right <= max(lengths) + 12, row["id"]
        longest += right > max(lengths)
    assert longest <= len(rows) * 0.35


def test_every_form_of_question_occurs(rows: list[dict[str, Any]]):
    questions = [row["question"] for row in rows]
    firsts = Counter(question.split()[0].casefold() for question in questions)
    assert all(firsts[word] >= 3 for word in ("what", "where", "when", "who", "how", "why", "which")), firsts
    assert sum(not question.endswith("?") for question in questions) >= 5
    assert sum("NOT" in question.split() for question in questions) >= 5
    assert sum(bool(re.search(r"most likely|usually|best describe", question)) for question in questions) >= 5
