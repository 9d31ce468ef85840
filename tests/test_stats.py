"""stats: accuracy, calibration, confidence and failures of a run whose answers are known, and what other tasks have."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.trivia_qa.record import TriviaQARecord
from tests.datasets_for_tests import make_choices, make_sample, write_dataset
from tests.introspection_for_tests import BINS, Question, write_passes
from tracekit.analysis.showing import stats_lines
from tracekit.analysis.stats import ConfigStats, Count, Lengths, LetterCount, SubjectAccuracy, stats
from tracekit.errors import DatasetError
from tracekit.format.layout import write_atomic
from tracekit.format.manifest import read_manifest, to_bytes
from tracekit.records import About, Outcome

QUESTIONS = [
    Question(probs=(0.7, 0.1, 0.1, 0.1), parsed="A", confident=95.0),
    Question(probs=(0.2, 0.6, 0.1, 0.1), parsed="B", confident=70.0, subject="law"),
    Question(probs=(0.4, 0.3, 0.2, 0.1), parsed=None, confident=70.0),
    Question(probs=(0.1, 0.1, 0.75, 0.05), parsed="C", right="C", confident=5.0 + 2.5, subject="law", answer_tokens=4),
    Question(probs=(0.1, 0.1, 0.75, 0.05), parsed=None, right="C", confident=95.0, subject=None),
]


class Edges(msgspec.Struct, frozen=True, kw_only=True):
    """A bin of confidence."""

    label: str
    low: float
    high: float
    midpoint: float


class GuessRecord(TriviaQARecord, frozen=True, kw_only=True, tag="trivia_qa"):
    """A record of a stranger's task with as much null as its fields may hold."""

    probs: list[float | None] | None
    bins: list[Edges] | None
    percent: float | None


HALVES = [Edges(label="A", low=0, high=50, midpoint=25), Edges(label="B", low=50, high=100, midpoint=75)]


def guesses(root: Path, bins: list[Edges] | None, outcome: Outcome) -> ConfigStats:
    """Stats of three answers whose distributions have holes."""
    made = [make_sample(key) for key in "abc"]
    rows = zip(made, ([0.75, None], None, [0.25, 0.5, 0.25]), (30.0, None, 80.0), strict=True)
    guessed: Any = [
        one._replace(
            record=msgspec.convert(
                msgspec.to_builtins(one.record) | {"probs": probs, "bins": bins, "percent": percent},
                GuessRecord,
                from_attributes=True,
            )
        )
        for one, probs, percent in rows
    ]
    layout = write_dataset(root, {"train-00000": guessed})
    about = About(outcome=outcome.but(answer="generated_answer", correct="is_correct"))
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(read_manifest(layout), about=about)))
    (found,) = stats(root)
    assert stats_lines(found)
    return found


def test_distributions_with_nulls_and_of_unequal_lengths_count_as_far_as_they_go(tmp_path: Path):
    outcome = Outcome(probs="probs", most_probable_correct="is_correct")
    found = guesses(tmp_path, None, outcome)
    assert found.calibration is not None
    assert (found.calibration.num, found.calibration.mean_confidence) == (2, 0.625)
    assert sum(one.num_expected for one in found.confidence) == 2


@pytest.mark.parametrize(("probs", "means"), [("probs", [0.5, 0.5]), (None, [None, None])])
def test_bins_are_told_with_and_without_distributions(tmp_path: Path, probs: str | None, means: list[float | None]):
    found = guesses(tmp_path, HALVES, Outcome(probs=probs, bins="bins", confidences=["percent"]))
    assert [(one.num_expected, one.mean_probability) for one in found.confidence] == list(
        zip([1, 1], means, strict=True)
    )


def test_samples_without_bins_are_told_by_tenths(tmp_path: Path):
    found = guesses(tmp_path, None, Outcome(bins="bins", confidences=["percent"]))
    assert [one.num_expected for one in found.confidence] == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConfigStats]:
    return {one.config: one for one in stats(write_passes(tmp_path_factory.mktemp("stats"), QUESTIONS))}


def test_every_configuration_by_name(found: dict[str, ConfigStats]):
    assert list(found) == ["mcq", "other_confidence", "self_confidence"]
    for one in found.values():
        assert (one.task, one.num_samples, one.models, one.is_open) == ("introspection", 5, ["test/model"], False)
        assert one.num_bytes > 0


def test_accuracy_of_what_was_parsed_and_of_the_most_probable_letter(found: dict[str, ConfigStats]):
    mcq = found["mcq"]
    assert (mcq.num_judged, mcq.accuracy, mcq.accuracy_most_probable) == (3, pytest.approx(2 / 3), 0.8)
    assert mcq.num_without_answer == 2
    assert mcq.failures == [Count(value="no letter in the output", count=2)]
    assert mcq.subjects == [
        SubjectAccuracy(subject="history", num=2, accuracy=1.0),
        SubjectAccuracy(subject="law", num=2, accuracy=0.5),
    ]


def test_letters_show_a_preferred_position(found: dict[str, ConfigStats]):
    assert found["mcq"].letters == [
        LetterCount(letter="A", num_answered=1, num_most_probable=2, num_right=3),
        LetterCount(letter="B", num_answered=1, num_most_probable=1, num_right=0),
        LetterCount(letter="C", num_answered=1, num_most_probable=2, num_right=2),
    ]


def test_own_confidence_by_tenths(found: dict[str, ConfigStats]):
    bars = found["mcq"].confidence
    assert [bar.label for bar in bars][:2] == ["0 to 10 %", "10 to 20 %"]
    assert [bar.num_expected for bar in bars] == [0, 0, 0, 1, 0, 1, 1, 2, 0, 0]
    assert {bar.num_answered for bar in bars} == {None}


def test_stated_confidence_by_the_bins_that_were_asked_for(found: dict[str, ConfigStats]):
    one = found["self_confidence"]
    assert [bar.label for bar in one.confidence] == [f"{bin.label}  {bin.text()}" for bin in BINS]  # as samples have it
    assert (one.confidence[0].label, one.confidence[-1].label) == ("A  under 5 %", "H  over 90 %")
    assert [bar.num_expected for bar in one.confidence] == [0, 1, 0, 0, 0, 2, 0, 2]
    assert [bar.num_answered for bar in one.confidence] == [0, 1, 0, 0, 0, 2, 0, 2]
    assert [bar.mean_probability for bar in one.confidence] == [0, 0.2, 0, 0, 0, 0.4, 0, 0.4]
    assert one.calibration is not None
    assert one.calibration.num == 5  # by the most probable letter: A, B wrong, A, C, C
    assert one.calibration.brier == pytest.approx((0.05**2 + 0.7**2 + 0.3**2 + 0.925**2 + 0.05**2) / 5)
    assert one.calibration.auroc == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert one.calibration_note is None
    assert (one.accuracy, one.accuracy_most_probable, one.subjects) == (None, None, [])


def test_lengths_count_prompts_and_answers(found: dict[str, ConfigStats]):
    assert found["mcq"].prompt_tokens == Lengths(shortest=5, mean=5.0, longest=5)
    assert found["mcq"].answer_tokens == Lengths(shortest=2, mean=2.4, longest=4)


def test_means_of_the_tasks_numbers(found: dict[str, ConfigStats]):
    means = {mean.name: mean for mean in found["mcq"].means}
    assert set(means) == {"entropy", "allowed_mass", "logit_margin", "confidence"}
    assert means["confidence"].mean == pytest.approx((0.7 + 0.6 + 0.4 + 0.75 + 0.75) / 5)
    assert (means["entropy"].unit, means["allowed_mass"].unit) == ("nats", "")
    assert any(line.startswith("  mean entropy, nats ") for line in stats_lines(found["mcq"]))
    assert (means["allowed_mass"].mean, means["allowed_mass"].std) == (0.5, 0.0)


def test_stated_confidence_stands_beside_the_expected(tmp_path: Path):
    write_passes(tmp_path, QUESTIONS, ["self_confidence"], parsed_answer="C")
    (one,) = stats(tmp_path)
    means = {mean.name: mean for mean in one.means}
    assert (means["stated_confidence"].num, means["stated_confidence"].mean) == (5, pytest.approx(0.15))
    assert means["confidence"].mean == pytest.approx((95 + 70 + 70 + 7.5 + 95) / 500)
    lines = stats_lines(one)
    at = lines.index("  expected confidence (from probabilities) 0.675  (std 0.32)")
    assert lines[at + 1] == "  stated confidence (bin of the output)    0.15  (of 5 parsed, std 0)"


def test_stated_confidence_is_of_what_was_parsed(tmp_path: Path):
    write_passes(tmp_path, QUESTIONS, ["self_confidence"], parsed_answer=None)
    (one,) = stats(tmp_path)
    assert "stated_confidence" not in {mean.name for mean in one.means}
    assert "  stated confidence (bin of the output)    -  (none parsed)" in stats_lines(one)


def test_what_confidence_is_held_against_is_said(found: dict[str, ConfigStats]):
    letter = "the most probable letter"
    assert [found[name].calibration_against for name in ("mcq", "self_confidence")] == [letter, letter]
    assert found["other_confidence"].calibration_against == f"{letter} (this model's own answers)"
    assert f"  calibration against {letter} (this model's own answers)" in stats_lines(found["other_confidence"])


def test_one_configuration_alone_and_none_of_this_name(tmp_path: Path):
    write_passes(tmp_path, QUESTIONS[:1], ["mcq", "self_confidence"])
    assert [one.config for one in stats(tmp_path, config="mcq")] == ["mcq"]
    with pytest.raises(DatasetError, match="holds no configuration 'mqc'; it holds: mcq, self_confidence"):
        stats(tmp_path, config="mqc")


def test_other_tasks_have_what_they_say(tmp_path: Path):
    write_dataset(tmp_path / "t", {"train-00000": [make_sample("000000"), make_sample("000001")]})
    (one,) = stats(tmp_path / "t")
    assert (one.accuracy, one.num_judged, one.calibration, one.confidence, one.letters) == (0.0, 2, None, [], [])
    assert one.answer_tokens == Lengths(shortest=4, mean=4.0, longest=4)
    assert {mean.name for mean in one.means} == {"entropy", "logprob", "f1"}
    write_dataset(tmp_path / "c", {"train-00000": [make_choices("000000")]}, config="csqa_mcq")
    (one,) = stats(tmp_path / "c")
    assert (one.accuracy, one.accuracy_most_probable) == (1.0, None)
    assert one.letters == [LetterCount(letter="A", num_answered=1, num_most_probable=None, num_right=1)]
    assert one.calibration is not None


def test_a_run_that_is_not_finished_and_one_without_samples(tmp_path: Path):
    write_dataset(tmp_path / "open", {"train-00000": [make_sample("000000")]}, is_finished=False)
    (one,) = stats(tmp_path / "open")
    assert (one.is_open, one.num_samples, one.metrics) == (True, 1, [])
    assert stats_lines(one)[0].endswith("not finished")
    write_dataset(tmp_path / "empty", {}, planned=["train-00000"], is_finished=False)
    (one,) = stats(tmp_path / "empty")
    assert (one.num_samples, one.accuracy, one.prompt_tokens) == (0, None, None)
    assert stats_lines(one)


def test_the_result_is_json_and_comes_back(found: dict[str, ConfigStats]):
    for one in found.values():
        assert msgspec.json.decode(msgspec.json.encode(one), type=ConfigStats) == one


def test_the_text_says_it_all(found: dict[str, ConfigStats]):
    text = "\n".join(stats_lines(found["mcq"]))
    assert "  accuracy                                 0.6667  of 3 judged answers" in text
    assert "  accuracy of the most probable letter     0.8\n" in text
    assert "  nothing parsed                           2  (no letter in the output: 2)" in text
    assert "  calibration against the most probable letter\n    ECE 0.400 (10 bins of equal width), Brier" in text
    assert " over 5\n" in text
    assert "  samples by probability of the most probable letter\n    0 to 10 %" in text
    assert "expected" not in text
    assert "    70 to 80 %   ########............      2" in text
    assert "    A  #######.............      1               2       3" in text
    assert "    law      ##########.......... 0.500  of 2" in text
    stated = "\n".join(stats_lines(found["self_confidence"]))
    assert "expected in bin" in stated
    assert "    F  60 to 80 %  ########............      2         2       0.400" in stated
    assert "answers by letter" not in stated
    assert max(map(len, text.splitlines())) <= 100
