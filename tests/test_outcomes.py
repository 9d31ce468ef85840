"""Outcomes: the table names fields that exist, filters choose rows, and confidence is judged by the pass mcq."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.datasets_for_tests import make_choices, make_sample, write_dataset
from tests.degradation_for_tests import make_damaged
from tests.introspection_for_tests import Question, make_pass, write_passes
from tracekit.analysis.outcomes import Outcomes, calibration_of, read_outcomes
from tracekit.errors import ConfigError, DatasetError
from tracekit.format.layout import write_atomic
from tracekit.format.manifest import read_manifest, to_bytes
from tracekit.read.remote import list_configs
from tracekit.read.store import TraceStore
from tracekit.records import About, Outcome, answered

QUESTIONS = [
    Question(probs=(0.7, 0.1, 0.1, 0.1), parsed="A", confident=95.0),
    Question(probs=(0.2, 0.6, 0.1, 0.1), parsed="B", confident=70.0, subject="law"),
    Question(probs=(0.4, 0.3, 0.2, 0.1), parsed=None, confident=30.0, subject=None),
]


def outcomes(root: Path, config: str = "mcq", where: tuple[str, ...] = ()) -> Outcomes:
    with TraceStore(root, config=config) as store:
        return read_outcomes(store, list_configs(root), config, where)


def test_an_outcome_that_names_no_field_of_the_records_is_refused(tmp_path: Path):
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    plain = read_manifest(layout)
    about = About(outcome=Outcome(correct="is_right"))
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(plain, about=about)))
    with pytest.raises(DatasetError, match=r"'is_right' .correct., which is no field of TriviaQARecord"):
        outcomes(tmp_path, "trivia_qa")


def test_the_answers_of_the_pass_mcq(tmp_path: Path):
    found = outcomes(write_passes(tmp_path, QUESTIONS))
    assert found.verdicts == [True, False, None]
    assert found.answers == ["A", "B", None]
    assert found.confidences.tolist() == [0.7, 0.6, 0.4]
    assert found.confidence_verdicts == [True, False, True]
    assert found.numbers["confidence"].tolist() == [0.7, 0.6, 0.4]
    assert found.questions == [("q0", 0), ("q1", 0), ("q2", 0)]


@pytest.mark.parametrize("is_judged", [True, False])
def test_confidence_that_is_stated_beside_an_answer_is_judged_by_that_answer(tmp_path: Path, is_judged: bool):
    made = [make_sample(f"{number:06d}") for number in range(3)]
    stated = [90.0, 20.0, None]
    records = [
        msgspec.structs.replace(one.record, is_correct=right, beam_score=percent)
        for one, right, percent in zip(made, (True, False, True), stated, strict=True)
    ]
    samples = [one._replace(record=record) for one, record in zip(made, records, strict=True)]
    layout = write_dataset(tmp_path, {"train-00000": samples})
    outcome = answered(correct="is_correct" if is_judged else None, confidences=["beam_score"])
    about = About(outcome=outcome)
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(read_manifest(layout), about=about)))
    found = outcomes(tmp_path, "trivia_qa")
    np.testing.assert_array_equal(found.confidences, [0.9, 0.2, np.nan])
    assert found.confidence_name == "stated confidence"
    assert found.has_verdicts == is_judged
    calibration, note = calibration_of(found)
    if not is_judged:
        assert calibration is None
        return
    assert calibration is not None
    assert found.calibrated_against() == "the answer"
    assert calibration.brier == pytest.approx((0.1**2 + 0.2**2) / 2)
    assert note == "1 of 3 samples left out: no confidence or not judged"


def test_a_field_that_an_outcome_does_not_have_is_named_with_those_it_has():
    with pytest.raises(ConfigError, match=r"answered\(confidence=.*confidences"):
        answered(confidence="stated")


@pytest.mark.parametrize("config", ["self_confidence", "other_confidence"])
def test_stated_confidence_is_judged_by_the_pass_mcq(tmp_path: Path, config: str):
    found = outcomes(write_passes(tmp_path, QUESTIONS), config)
    assert found.confidences.tolist() == [0.95, 0.7, 0.3]
    assert found.confidence_verdicts == [True, False, True]  # by the most probable letter, parsed or not
    calibration, note = calibration_of(found)
    assert calibration is not None
    assert (calibration.num, calibration.accuracy, note) == (3, 2 / 3, None)
    assert calibration.brier == pytest.approx((0.05**2 + 0.7**2 + 0.7**2) / 3)
    assert not found.has_verdicts


def test_where_no_output_could_be_read_every_pass_is_calibrated(tmp_path: Path):
    write_passes(tmp_path, [one._replace(parsed=None) for one in QUESTIONS])
    for config in ("mcq", "self_confidence", "other_confidence"):
        calibration, note = calibration_of(outcomes(tmp_path, config))
        assert calibration is not None
        assert (calibration.num, calibration.accuracy, note) == (3, 2 / 3, None)


@pytest.mark.parametrize(
    ("config", "against"),
    [
        ("mcq", "the most probable letter"),
        ("self_confidence", "the most probable letter"),
        ("other_confidence", "the most probable letter (this model's own answers)"),
    ],
)
def test_what_calibration_is_against_is_named(tmp_path: Path, config: str, against: str):
    assert outcomes(write_passes(tmp_path, QUESTIONS), config).calibrated_against() == against


def test_questions_that_the_pass_mcq_did_not_ask_are_left_out_of_calibration(tmp_path: Path):
    write_passes(tmp_path, QUESTIONS[:2], ["mcq"])
    write_passes(tmp_path, QUESTIONS, ["self_confidence"])
    calibration, note = calibration_of(outcomes(tmp_path, "self_confidence"))
    assert calibration is not None
    assert (calibration.num, note) == (2, "1 of 3 samples left out: not judged")


def test_stated_confidence_is_the_midpoint_of_the_bin_that_the_output_named(tmp_path: Path):
    write_passes(tmp_path / "said", QUESTIONS, ["self_confidence"], parsed_answer="C")
    assert outcomes(tmp_path / "said", "self_confidence").numbers["stated_confidence"].tolist() == [0.15] * 3
    write_passes(tmp_path / "unread", QUESTIONS, ["self_confidence"], parsed_answer=None)
    assert "stated_confidence" not in outcomes(tmp_path / "unread", "self_confidence").numbers


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
    assert outcomes(tmp_path, "tuned-self_confidence").confidence_verdicts == [True, False, True]


def test_a_run_named_like_a_pass_is_judged_by_its_own_pass(tmp_path: Path):
    for name in ("mcq", "self_confidence"):
        config = f"self_confidence_run_{name}"
        made = [make_pass(i, one, name, config=config) for i, one in enumerate(QUESTIONS)]
        write_dataset(tmp_path, {"train-00000": made}, config=config)
    assert outcomes(tmp_path, "self_confidence_run_self_confidence").confidence_verdicts == [True, False, True]


def test_a_confidence_pass_of_any_name_says_why_nothing_judges_it(tmp_path: Path):
    made = [make_pass(0, QUESTIONS[0], "self_confidence", config="mine")]
    write_dataset(tmp_path, {"train-00000": made}, config="mine")
    _, note = calibration_of(outcomes(tmp_path, "mine"))
    assert note == "configuration 'mine' is not named ...self_confidence, so that its pass mcq is not known"


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


def test_of_a_damaged_model_what_is_not_finite_is_skipped(tmp_path: Path):
    one = make_damaged("p", level=0.25, perplexity=8.0)
    other = make_damaged("q", level=0.25, token_entropies=[None], is_truncated=False, is_correct=True)
    write_dataset(tmp_path, {"train-00000": [one, other]}, config="degradation")
    found = outcomes(tmp_path, "degradation")
    assert found.verdicts == [False, True]
    np.testing.assert_array_equal(found.numbers["entropy"], [0.5, np.nan])
    assert found.numbers["logprob"].tolist() == [-0.5, -0.5]
    assert found.numbers["truncated_share"].tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(found.numbers["perplexity"], [8.0, np.nan])
    assert found.conditions["damage.level"] == [0.25, 0.25]


def test_options_of_an_encoder_have_confidence(tmp_path: Path):
    write_dataset(tmp_path, {"train-00000": [make_choices("000000")]}, config="csqa_mcq")
    found = outcomes(tmp_path, "csqa_mcq")
    np.testing.assert_allclose(found.confidences, [1 / 3])
    assert found.confidence_verdicts == [True]
