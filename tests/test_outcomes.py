"""Outcomes: the table names fields that exist, filters choose rows, and confidence is judged by the pass mcq."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.datasets_for_tests import make_choices, make_sample, write_dataset
from tests.introspection_for_tests import Question, make_pass, write_passes
from tracekit.errors import ConfigError
from tracekit.outcomes import FIELDS, Outcomes, calibration_of, parse_filter, read_outcomes, rows_where
from tracekit.records import RECORD_TYPES
from tracekit.remote import list_configs
from tracekit.store import TraceStore

QUESTIONS = [
    Question(probs=(0.7, 0.1, 0.1, 0.1), parsed="A", confident=95.0),
    Question(probs=(0.2, 0.6, 0.1, 0.1), parsed="B", confident=70.0, subject="law"),
    Question(probs=(0.4, 0.3, 0.2, 0.1), parsed=None, confident=30.0, subject=None),
]


def outcomes(root: Path, config: str = "mcq", where: tuple[str, ...] = ()) -> Outcomes:
    with TraceStore(root, config=config) as store:
        return read_outcomes(store, list_configs(root), config, where)


@pytest.mark.parametrize("task", FIELDS)
def test_the_table_names_fields_that_the_records_have(task: str):
    fields, known = FIELDS[task], set(RECORD_TYPES[task].__struct_fields__)
    named = [fields.verdict, fields.answer, fields.probs, fields.probs_verdict, *fields.same, *fields.confidences]
    assert {name for name in named if name} | {field for _, field in fields.numbers} <= known


def test_the_answers_of_the_pass_mcq(tmp_path: Path):
    found = outcomes(write_passes(tmp_path, QUESTIONS))
    assert found.verdicts == [True, False, None]
    assert found.answers == ["A", "B", None]
    assert found.confidences.tolist() == [0.7, 0.6, 0.4]
    assert found.confidence_verdicts == [True, False, True]
    assert found.numbers["confidence"].tolist() == [0.7, 0.6, 0.4]
    assert found.questions == [("q0", 0), ("q1", 0), ("q2", 0)]


@pytest.mark.parametrize("config", ["self_confidence", "other_confidence"])
def test_stated_confidence_is_judged_by_the_pass_mcq(tmp_path: Path, config: str):
    found = outcomes(write_passes(tmp_path, QUESTIONS), config)
    assert found.confidences.tolist() == [0.95, 0.7, 0.3]
    assert found.confidence_verdicts == [True, False, None]
    calibration, note = calibration_of(found)
    assert calibration is not None
    assert (calibration.num, calibration.accuracy) == (2, 0.5)
    assert calibration.brier == pytest.approx((0.05**2 + 0.7**2) / 2)
    assert note == "1 of 3 samples left out: no judged answer"
    assert not found.has_verdicts


def test_without_the_pass_mcq_calibration_is_none_and_says_why(tmp_path: Path):
    found = outcomes(write_passes(tmp_path, QUESTIONS, ["self_confidence"]), "self_confidence")
    assert calibration_of(found) == (
        None,
        "the dataset has no configuration 'mcq' that says whether the model is right",
    )


def test_a_named_configuration_is_judged_by_its_own_pass(tmp_path: Path):
    for name in ("mcq", "self_confidence"):
        made = [make_pass(i, one, name, config=f"tuned-{name}") for i, one in enumerate(QUESTIONS)]
        write_dataset(tmp_path, {"train-00000": made}, config=f"tuned-{name}")
    assert outcomes(tmp_path, "tuned-self_confidence").confidence_verdicts == [True, False, None]


def test_a_question_that_was_answered_twice_judges_nothing(tmp_path: Path):
    made = [make_pass(i, QUESTIONS[0]) for i in range(2)]
    twice = [one._replace(record=msgspec.structs.replace(one.record, question_id="q0")) for one in made]
    write_dataset(tmp_path, {"train-00000": twice}, config="mcq")
    write_dataset(tmp_path, {"train-00000": [make_pass(0, QUESTIONS[0], "self_confidence")]}, config="self_confidence")
    calibration, note = calibration_of(outcomes(tmp_path, "self_confidence"))
    assert calibration is None
    assert note == "configuration 'mcq' answers a question several times; choose one with a filter"
    chosen = outcomes(tmp_path, "self_confidence", ("key=000000",))
    assert chosen.confidence_verdicts == [True]  # the filter chooses in the pass mcq too


def test_a_filter_of_a_confidence_pass_leaves_the_judgements_alone(tmp_path: Path):
    write_passes(tmp_path, QUESTIONS)
    found = outcomes(tmp_path, "self_confidence", ("parsed_answer=F",))
    assert found.questions == [("q1", 0)]
    assert found.confidence_verdicts == [False]


def test_lists_are_averaged_and_tasks_without_confidence_say_so(tmp_path: Path):
    write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    found = outcomes(tmp_path, "trivia_qa")
    assert found.numbers["entropy"].tolist() == [0.5]
    assert "confidence" not in found.numbers
    assert calibration_of(found) == (None, "the task states no confidence")


def test_options_of_an_encoder_have_confidence(tmp_path: Path):
    write_dataset(tmp_path, {"train-00000": [make_choices("000000")]}, config="csqa_mcq")
    found = outcomes(tmp_path, "csqa_mcq")
    np.testing.assert_allclose(found.confidences, [1 / 3])
    assert found.confidence_verdicts == [True]


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
        ("subjct=law", "records have no field 'subjct'; fields: .*subject"),
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
