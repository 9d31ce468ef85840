"""diff: the same run twice is all zero, what was changed is found and counted, what does not align is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.datasets_for_tests import MODEL, make_sample, write_dataset
from tests.degradation_for_tests import make_damaged
from tests.hub_for_tests import TestHub
from tests.introspection_for_tests import BINS, Noise, Question, entropy, make_pass, write_passes
from tests.publishing_for_tests import REPO, publish, tell
from tracekit.analysis.diff import AnswerChange, ConfigDifference, Difference, diff
from tracekit.analysis.diff_table import difference_lines
from tracekit.errors import ConfigError, DatasetError

PASSES = ["mcq", "self_confidence", "other_confidence"]
FLAT = (0.4, 0.3, 0.2, 0.1)
A = [
    Question(probs=(0.7, 0.1, 0.1, 0.1), parsed="A", confident=95.0),
    Question(probs=(0.2, 0.6, 0.1, 0.1), parsed="B", confident=70.0),
    Question(probs=(0.1, 0.1, 0.7, 0.1), parsed="C", right="C", confident=85.0),
    Question(probs=FLAT, parsed=None, confident=30.0),
    Question(probs=FLAT, parsed="A", confident=50.0),
]
B = [
    A[0]._replace(parsed="C", probs=(0.1, 0.1, 0.7, 0.1)),  # right to wrong
    A[1]._replace(parsed="A", probs=(0.6, 0.2, 0.1, 0.1)),  # wrong to right
    A[2]._replace(confident=15.0),
    A[3]._replace(parsed="A"),  # parsed now
    A[4]._replace(parsed="C", probs=(0.1, 0.2, 0.4, 0.3)),  # right to wrong, as the first
]


def only(found: Difference, config: str = "mcq") -> ConfigDifference:
    (one,) = [one for one in found.configs if one.config == config]
    return one


def shift(one: ConfigDifference, name: str) -> Any:
    (found,) = [shift for shift in one.shifts if shift.name == name]
    return found


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_passes(tmp_path_factory.mktemp("a") / "a", A)


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_passes(tmp_path_factory.mktemp("b") / "b", B, noise=Noise(layer=2))


@pytest.fixture(scope="module")
def changed(a: Path, b: Path) -> Difference:
    return diff(a, b)


def test_the_same_run_twice_is_all_zero(a: Path, tmp_path: Path):
    found = diff(a, write_passes(tmp_path / "again", A))
    assert [one.config for one in found.configs] == sorted(PASSES)
    for one in found.configs:
        assert (one.num_common, one.num_only_a, one.num_only_b) == (5, 0, 0)
        assert one.a == one.b
        assert {(moved.shift, moved.shift_std) for moved in one.shifts} == {(0.0, 0.0)}
        assert one.answers is not None
        assert one.answers.num_changed == 0
        assert one.answers.confusions == []
        assert one.activations_note is None
        parts = [
            part for site in one.activations for layer in site.layers for part in (layer.prompt, layer.last_prompt)
        ]
        assert {(part.cosine, part.norm_change, part.relative_difference) for part in parts} == {(1.0, 0.0, 0.0)}


def test_changed_answers_are_counted(changed: Difference):
    answers = only(changed).answers
    assert answers is not None
    assert (answers.num_changed, answers.num_right_to_wrong, answers.num_wrong_to_right) == (4, 2, 1)
    assert answers.confusions == [
        AnswerChange(a="A", b="C", count=2),
        AnswerChange(a="B", b="A", count=1),
        AnswerChange(a=None, b="A", count=1),
    ]


def test_accuracy_is_over_the_questions_that_were_judged_on_both_sides(changed: Difference):
    one = only(changed)  # the fourth, which b got right, is judged in b alone
    assert one.num_judged_both == 4
    assert (one.a.num_judged, one.a.num_unjudged, one.a.num_without_answer, one.a.accuracy) == (4, 1, 1, 0.75)
    assert (one.b.num_judged, one.b.num_unjudged, one.b.num_without_answer, one.b.accuracy) == (5, 0, 0, 0.5)
    assert (one.a.accuracy_most_probable, one.b.accuracy_most_probable) == (0.8, 0.6)
    assert only(changed, "self_confidence").a.accuracy_most_probable is None


def test_entropy_and_confidence_shift_by_hand(changed: Difference):
    steps = np.array([entropy(y.probs) - entropy(x.probs) for x, y in zip(A, B, strict=True)])
    found = shift(only(changed), "entropy")
    assert found.num == 5
    assert found.shift == pytest.approx(steps.mean(), abs=1e-12)
    assert found.shift_std == pytest.approx(steps.std(), abs=1e-12)
    assert sum(found.histogram.counts) == 5
    assert found.mean_b - found.mean_a == pytest.approx(found.shift, abs=1e-12)
    stated = shift(only(changed, "self_confidence"), "confidence")
    assert stated.shift == pytest.approx(-0.7 / 5)


def test_calibration_of_both_sides_by_hand(changed: Difference):
    own = only(changed).a.calibration
    assert own is not None
    assert own.num == 5  # the most probable letter is judged where nothing parsed, too
    assert own.brier == pytest.approx((0.3**2 + 0.6**2 + 0.3**2 + 0.6**2 + 0.6**2) / 5)
    stated = only(changed, "self_confidence")
    assert stated.a.calibration is not None
    assert stated.b.calibration is not None
    assert (stated.a.calibration.num, stated.b.calibration.num) == (5, 5)
    assert stated.a.calibration_note is None
    assert stated.a.calibration.brier == pytest.approx((0.05**2 + 0.7**2 + 0.15**2 + 0.7**2 + 0.5**2) / 5)
    assert stated.b.calibration.brier == pytest.approx((0.95**2 + 0.3**2 + 0.85**2 + 0.7**2 + 0.5**2) / 5)
    assert stated.a.accuracy is None  # this pass judges no answers of its own
    assert stated.a.num_unjudged == 0


def test_where_nothing_parsed_confidence_is_calibrated_and_the_most_probable_letter_compared(tmp_path: Path):
    for name, questions in (("a", A), ("b", B)):
        write_passes(tmp_path / name, [one._replace(parsed=None) for one in questions])
    found = diff(tmp_path / "a", tmp_path / "b", sites=[])
    for one in found.configs:
        assert one.a.calibration is not None
        assert (one.a.calibration.num, len(one.a.calibration.bins)) == (5, 10)
    mcq = only(found)
    assert mcq.answers is not None
    assert (mcq.answers.num, mcq.answers.num_changed) == (0, 0)
    assert mcq.most_probable is not None
    assert (mcq.most_probable.num_changed, mcq.most_probable.num) == (3, 5)
    assert (mcq.most_probable.num_right_to_wrong, mcq.most_probable.num_wrong_to_right) == (2, 1)
    lines = difference_lines(found)
    assert "  answers changed: none parsed in either" in lines
    assert "  most probable letter changed: 3 of 5; right to wrong 2, wrong to right 1" in lines
    assert "    A to C: 2, B to A: 1" in lines
    assert "  most probable bin changed: 1 of 5" in lines  # of confidence nothing is right or wrong


def test_calibration_is_over_what_both_sides_can_calibrate(a: Path, tmp_path: Path):
    write_passes(tmp_path, A[:3], ["mcq"])
    write_passes(tmp_path, A, ["self_confidence"])
    one = only(diff(a, tmp_path, sites=[]), "self_confidence")
    assert one.a.calibration is not None
    assert one.a.calibration == one.b.calibration
    assert one.a.calibration.num == 3
    assert one.a.calibration_note == "2 of 5 samples left out: not judged in both"
    write_passes(tmp_path / "alone", A, ["self_confidence"])
    one = only(diff(a, tmp_path / "alone", sites=[]), "self_confidence")
    assert one.a.calibration is not None
    assert (one.a.calibration.num, one.b.calibration) == (5, None)
    assert "no configuration 'mcq'" in str(one.b.calibration_note)


def test_confidence_in_oneself_is_compared_with_confidence_in_others(tmp_path: Path):
    write_passes(tmp_path, A, ["mcq", "self_confidence"])
    others = [one._replace(confident=15.0) for one in A]
    write_passes(tmp_path, others, ["other_confidence"], prompt_ids=(1, 2, 3, 9, 9, 9), instruction_sha256="3" * 64)
    found = diff(tmp_path, tmp_path, config=("self_confidence", "other_confidence"))
    one = only(found, "self_confidence, other_confidence")
    moved = shift(one, "confidence")
    assert (moved.mean_a, moved.mean_b) == (pytest.approx(0.66), pytest.approx(0.15))
    assert moved.shift == pytest.approx(-0.51)
    (note,) = one.notes
    assert "self_confidence in a and other_confidence in b" in note
    layer = one.activations[0].layers[0]
    assert (layer.prompt.num_positions, layer.last_prompt.num_positions) == (0, 5)
    assert one.activations_note is not None
    assert "5 of 5 prompts are other tokens" in one.activations_note
    assert (one.a.calibration_against, one.b.calibration_against) == (
        "the most probable letter",
        "the most probable letter (this model's own answers)",
    )
    lines = difference_lines(found)
    assert "  calibration of b      against the most probable letter (this model's own answers)" in lines
    assert any(
        line.startswith("  expected confidence (from probabilities)          0.66        0.15") for line in lines
    )


def test_passes_that_do_not_ask_alike_are_refused_with_what_can_be_compared(a: Path, tmp_path: Path):
    with pytest.raises(DatasetError, match=r'prompt_type is "mcq" in a'):
        diff(a, a, config=("mcq", "self_confidence"))
    write_passes(tmp_path, A, ["other_confidence"], bins=BINS[:4])
    with pytest.raises(DatasetError, match=r"bins is .*bins"):
        diff(a, tmp_path, config=("self_confidence", "other_confidence"))


def test_stated_confidence_is_compared_where_both_outputs_named_a_bin(tmp_path: Path):
    write_passes(tmp_path / "a", A, ["self_confidence"])
    write_passes(tmp_path / "b", A, ["self_confidence"], parsed_answer="C")
    moved = shift(only(diff(tmp_path / "a", tmp_path / "b", sites=[]), "self_confidence"), "stated_confidence")
    assert (moved.num, moved.mean_a, moved.mean_b) == (5, pytest.approx(0.66), pytest.approx(0.15))


def test_what_differs_beside_the_model_is_noted(a: Path, tmp_path: Path):
    settings = make_pass(0, A[0]).record.generation
    changes = {
        "instruction_sha256": "3" * 64,
        "generation": msgspec.structs.replace(settings, do_sample=True, temperature=0.5, max_new_tokens=99),
    }
    coarse = msgspec.structs.replace(MODEL, dtype="bfloat16", quantization="nf4")
    made = [make_pass(number, one, **changes) for number, one in enumerate(A)]
    made = [one._replace(record=msgspec.structs.replace(one.record, model=coarse)) for one in made]
    write_dataset(tmp_path, {"train-00000": made}, config="mcq", is_finished=False)
    found = diff(a, tmp_path, sites=[])
    assert only(found).num_common == 5
    assert only(found).notes == [
        "b is not finished: 5 samples so far",
        "model.dtype is float32 in a, bfloat16 in b",
        "model.quantization is null in a, nf4 in b",
        f"generation.do_sample is {str(settings.do_sample).lower()} in a, true in b",
        f"generation.max_new_tokens is {settings.max_new_tokens} in a, 99 in b",
        f"generation.temperature is {settings.temperature} in a, 0.5 in b",
        "instruction_sha256 is 222222222222... in a, 333333333333... in b",
    ]
    assert "  note                  b is not finished: 5 samples so far" in difference_lines(found)
    assert only(diff(a, a, sites=[])).notes == []


def test_negative_layers_count_from_the_last(a: Path, b: Path):
    one = only(diff(a, b, layers=[0, -1]))
    assert {site.site: [layer.layer for layer in site.layers] for site in one.activations} == {
        "hidden_states": [0, 3],
        "resid_embed": [None],
        "resid_post_mlp": [0, 2],
    }
    assert one.activations_note is None
    assert only(diff(a, b, layers=[-9])).activations_note == "no layer -9 in both"


def test_histograms_of_shifts_hold_zero_and_no_empty_half(changed: Difference):
    histogram = shift(only(changed, "self_confidence"), "confidence").histogram
    assert (histogram.edges[0], histogram.edges[-1]) == (pytest.approx(-0.7), 0.0)
    assert sum(histogram.counts) == 5
    still = shift(only(changed), "allowed_mass").histogram
    assert (still.edges[0], still.edges[-1], sum(still.counts)) == (-1.0, 1.0, 5)


def test_two_levels_of_damage_are_compared_by_prompt(tmp_path: Path):
    answers = {0.0: ("4", True, False), 0.2: ("??", False, True)}
    made = [
        make_damaged(prompt, group=group, level=level, generated_answer=text, is_correct=right, is_truncated=cut)
        for group in ("attn", "mlp")
        for level, (text, right, cut) in answers.items()
        for prompt in ("p", "q")
    ]
    write_dataset(tmp_path, {"train-00000": made}, config="degradation")
    group = "damage.group=mlp"
    found = diff(tmp_path, tmp_path, where_a=["damage.level=0", group], where_b=["damage.level=0.2", group])
    one = only(found, "degradation")
    assert (one.num_common, one.aligned_by, one.num_judged_both) == (2, "question, damage.group, repeat", 2)
    assert (one.a.accuracy, one.b.accuracy) == (1.0, 0.0)
    assert one.answers is not None
    assert (one.answers.num_changed, one.answers.num_right_to_wrong) == (2, 2)
    assert shift(one, "truncated_share").shift == 1.0
    assert shift(one, "entropy").mean_a == 0.5  # the token without a finite entropy is skipped
    assert one.notes == ["damage.level is 0.0 in a, 0.2 in b"]
    every = only(diff(tmp_path, tmp_path, sites=[]), "degradation")
    assert (every.aligned_by, every.num_common) == ("question, damage.level, damage.group, repeat", 8)


def test_levels_are_compared_over_all_groups_and_repeats_and_groups_over_all_repeats(tmp_path: Path):
    made = [
        make_damaged(prompt, group=group, level=level, repeat=repeat)
        for group in ("attn", "mlp")
        for level in (0.0, 0.2, 0.3, 0.4)
        for repeat in range(3)
        for prompt in ("p", "q")
    ]
    write_dataset(tmp_path, {"train-00000": made}, config="degradation")

    def compared(where_a: list[str], where_b: list[str]) -> ConfigDifference:
        return only(diff(tmp_path, tmp_path, where_a=where_a, where_b=where_b, sites=[]), "degradation")

    levels = compared(["damage.level=0"], ["damage.level=0.2"])
    assert (levels.aligned_by, levels.num_common) == ("question, damage.group, repeat", 12)
    assert (levels.num_only_a, levels.num_only_b) == (0, 0)
    assert levels.notes == ["damage.level is 0.0 in a, 0.2 in b"]
    groups = compared(["damage.group=attn"], ["damage.group=mlp"])
    assert (groups.aligned_by, groups.num_common) == ("question, damage.level, repeat", 24)
    assert groups.notes == ["damage.group is attn in a, mlp in b"]
    level = ["damage.level=0.2"]
    repeats = compared(["repeat=0", "damage.group=mlp", *level], ["repeat=2", "damage.group=mlp", *level])
    assert (repeats.aligned_by, repeats.num_common) == ("question, damage.level, damage.group", 2)
    of_one = compared(["repeat=0", *level], ["repeat=2", "damage.group=mlp", *level])
    assert (of_one.num_common, of_one.num_only_a, of_one.num_only_b) == (2, 2, 0)


def test_slices_of_other_questions_say_what_filters_are_for(tmp_path: Path):
    made = [make_pass(number, one, subject="law" if number else "art") for number, one in enumerate(A)]
    write_dataset(tmp_path, {"train-00000": made}, config="mcq")
    message = (
        "No question is in both selections, of 1 samples of a and 4 of b. Filters are for slices of the same "
        "questions, such as two levels of damage: --where-a damage.level=0 --where-b damage.level=0.2"
    )
    with pytest.raises(DatasetError, match=message):
        diff(tmp_path, tmp_path, where_a=["subject=art"], where_b=["subject=law"])


def test_noise_on_one_layer_is_seen_from_that_layer_on(changed: Difference):
    for one in changed.configs:
        hidden = one.activations[0].layers
        assert [layer.prompt.relative_difference == 0 for layer in hidden] == [True, True, False, False]


def test_samples_that_one_side_alone_has_are_counted(a: Path, tmp_path: Path):
    found = diff(a, write_passes(tmp_path / "less", A[:3], ["mcq"]), sites=[])
    assert (only(found).num_common, only(found).num_only_a, only(found).num_only_b) == (3, 2, 0)
    assert found.configs_only_a == ["other_confidence", "self_confidence"]
    assert found.configs_only_b == []
    assert only(found).activations == []
    assert only(found).activations_note == "no site was asked for"
    assert only(diff(tmp_path / "less", a, sites=[])).num_only_b == 2


def test_keys_do_not_matter_where_questions_are_the_same(a: Path, tmp_path: Path):
    made = [make_pass(number, one) for number, one in enumerate(A)]
    moved = [one._replace(record=msgspec.structs.replace(one.record, key=f"{9 - i:06d}")) for i, one in enumerate(made)]
    write_dataset(tmp_path / "moved", {"train-00000": moved}, config="mcq")
    found = only(diff(a, tmp_path / "moved"))
    assert (found.num_common, found.aligned_by, shift(found, "entropy").shift_std) == (5, "question", 0.0)
    assert found.activations[0].layers[0].prompt.relative_difference == 0


def test_samples_of_repeated_questions_align_by_key(tmp_path: Path):
    made = [make_pass(number, one) for number, one in enumerate(A)]
    same = [one._replace(record=msgspec.structs.replace(one.record, question_id="q")) for one in made]
    write_dataset(tmp_path / "x", {"train-00000": same}, config="mcq")
    found = only(diff(tmp_path / "x", tmp_path / "x", sites=[]))
    assert (found.aligned_by, found.num_common) == ("key", 5)


def test_two_slices_of_one_dataset(tmp_path: Path):
    sliced = []
    for offset, questions, level in ((0, A, 1.0), (5, B, 0.5)):
        for number, one in enumerate(questions):
            made = make_pass(number, one, temperature=level)
            key = f"{number + offset:06d}"
            sliced.append(made._replace(record=msgspec.structs.replace(made.record, key=key)))
    write_dataset(tmp_path, {"train-00000": sliced}, config="mcq")
    found = diff(tmp_path, tmp_path, where_a=["temperature=1"], where_b=["temperature=0.5"])
    assert only(found).num_common == 5
    assert only(found).aligned_by == "question"
    assert only(found).answers is not None
    assert only(found).answers.num_changed == 4  # pyright: ignore[reportOptionalMemberAccess]
    assert found.b.where == ["temperature=0.5"]
    with pytest.raises(ConfigError, match="no sample of mcq passes the filter 'temperature=7'"):
        diff(tmp_path, tmp_path, where_a=["temperature=7"])


def test_configurations_of_other_names_are_compared_when_named(a: Path, tmp_path: Path):
    made = [make_pass(number, one, config="tuned") for number, one in enumerate(B)]
    write_dataset(tmp_path, {"train-00000": made}, config="tuned")
    assert diff(a, tmp_path, config=("mcq", "tuned"), sites=[]).configs[0].config == "mcq, tuned"
    with pytest.raises(DatasetError, match=r"has mcq, .*has tuned\. "):
        diff(a, tmp_path)
    with pytest.raises(DatasetError, match="holds no configuration 'tuned'"):
        diff(a, tmp_path, config="tuned")
    with pytest.raises(ConfigError, match="3 configurations were named"):
        diff(a, tmp_path, config=("a", "b", "c"))


def test_different_tasks_are_refused(a: Path, tmp_path: Path):
    write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    with pytest.raises(DatasetError, match=r"'introspection'.*'trivia_qa'"):
        diff(a, tmp_path, config=("mcq", "trivia_qa"))


def test_no_sample_in_common_is_refused(a: Path, tmp_path: Path):
    made = [make_pass(number, A[0]) for number in (7, 8)]
    write_dataset(tmp_path, {"train-00000": made}, config="mcq")
    with pytest.raises(DatasetError, match=r"mcq: .*question_id .*'q0' and 'q7'"):
        diff(a, tmp_path)


def test_slices_that_repeat_questions_say_what_to_do(tmp_path: Path):
    made = [make_pass(number, one, subject=str(number // 2)) for number, one in enumerate(A[:4])]
    same = [one._replace(record=msgspec.structs.replace(one.record, question_id="q")) for one in made]
    write_dataset(tmp_path, {"train-00000": same}, config="mcq")
    with pytest.raises(DatasetError, match=r"question_id .*--where-a .*--where-b"):
        diff(tmp_path, tmp_path, where_a=['subject="0"'], where_b=['subject="1"'])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_text": "Another?"}, r'question_text .*number 0\?" in a .*"Another\?" in b'),
        ({"correct_answer_letter": "D"}, 'correct_answer_letter is "A" in a and "D" in b'),
        ({"input_sha256": "f" * 64}, r"input_sha256 is \w+\.\.\. in a and ffffffffffff\.\.\. in b"),
    ],
)
def test_the_same_question_asked_otherwise_is_refused_and_named(a: Path, tmp_path: Path, changes: dict, message: str):
    write_passes(tmp_path, A, ["mcq"], **changes)
    with pytest.raises(DatasetError, match=f"sample '000000' of a and '000000' of b are of question 'q0'.*{message}"):
        diff(a, tmp_path)


def test_a_model_of_another_shape_still_has_its_records_compared(a: Path, tmp_path: Path):
    found = only(diff(a, write_passes(tmp_path, B, ["mcq"], d_model=4)))
    assert found.activations == []
    assert "hidden_states is 8 wide in a and 4 in b" in str(found.activations_note)
    assert found.answers is not None
    assert found.answers.num_changed == 4


def test_sites_that_are_no_vectors_are_refused(a: Path):
    with pytest.raises(ConfigError, match=r"'attentions'.*: hidden_states"):
        diff(a, a, sites=["attentions"])


def test_a_folder_that_is_not_there_is_refused(a: Path):
    with pytest.raises(DatasetError, match="no such folder"):
        diff(a, "/nowhere")


def test_another_task_reports_what_it_has(tmp_path: Path):
    for name, answer, right in (("a", "Paris", True), ("b", "Rome", False)):
        made = make_sample("000000", sites=("hidden_states",))
        record = msgspec.structs.replace(
            made.record, generated_answer=answer, is_correct=right, token_entropies=[0.25 if right else 0.75]
        )
        write_dataset(tmp_path / name, {"train-00000": [made._replace(record=record)]})
    found = only(diff(tmp_path / "a", tmp_path / "b"), "trivia_qa")
    assert found.answers is not None
    assert (found.answers.num_changed, found.answers.num_right_to_wrong, found.answers.confusions) == (1, 1, [])
    assert shift(found, "entropy").shift == 0.5
    assert found.a.calibration_note == "the task states no confidence"
    assert found.activations[0].layers[0].prompt.cosine == 1


def test_a_published_dataset_is_compared_with_the_folder_it_was_made_of(
    finished: Path, tmp_path: Path, xet_hub: TestHub
):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    publish(xet_hub, folder, "v1.0.0")
    xet_hub.log()
    there = f"hf://datasets/{REPO}@v1.0.0"
    first, second, third = tell(
        xet_hub, ["diff", folder, there, "--json"], ["show", there, "--stats", "--json"], ["show", there]
    )
    assert (first.code, second.code, third.code) == (0, 0, 0), first.err + second.err + third.err
    assert "12 in validation" in third.out
    one = only(msgspec.json.decode(first.out, type=Difference), "trivia_qa")
    assert one.num_common == 12
    assert {moved.shift for moved in one.shifts} == {0.0}
    assert {layer.prompt.relative_difference for site in one.activations for layer in site.layers} == {0.0}
    assert one.activations[0].site == "hidden_states"
    assert json.loads(second.out)[0]["num_samples"] == 12
    fetched = [request for request in xet_hub.log() if "/_cdn/" in request.path]
    assert fetched
    assert all(request.range for request in fetched), "a whole file was fetched"


def test_the_result_is_json_and_comes_back(changed: Difference):
    data = msgspec.json.encode(changed)
    assert msgspec.json.decode(data, type=Difference) == changed
    assert "NaN" not in json.dumps(json.loads(data))


def test_the_table_is_readable_at_a_glance(changed: Difference):
    text = "\n".join(difference_lines(changed))
    assert "mcq (introspection): 5 samples in common, aligned by question; only in a 0, only in b 0" in text
    lines = text.splitlines()
    assert f"  {'accuracy (4 judged in both)':42s}        0.75         0.5       -0.25" in lines
    assert f"  {'accuracy of the most probable letter':42s}         0.8         0.6        -0.2" in lines
    assert f"  {'judged':42s}           4           5          +1" in lines
    assert f"  {'nothing parsed':42s}           1           0          -1" in lines
    assert "  calibration against the most probable letter" in lines
    assert "    ECE (10 bins of equal width)  " in text
    assert "  answers changed: 4 of 5; right to wrong 2, wrong to right 1" in lines
    assert "    A to C: 2, B to A: 1, (none) to A: 1" in lines
    assert "  hidden_states                          25 prompt positions                      5 last positions" in text
    rows = [line.split() for line in lines]
    assert ["0", "1", "0", "0", "1", "0", "0"] in rows
    assert max(map(len, lines)) <= 120


def test_of_many_layers_the_table_shows_some_with_first_and_last(tmp_path: Path):
    write_passes(tmp_path, A[:1], ["mcq"], num_layers=40, sites=["hidden_states"])
    lines = difference_lines(diff(tmp_path, tmp_path))
    numbers = [int(line.split()[0]) for line in lines if line.strip() and line.split()[0].isdecimal()]
    assert (len(numbers), numbers[0], numbers[-1]) == (12, 0, 40)


def test_configurations_that_one_side_alone_has_are_named(a: Path, tmp_path: Path):
    lines = difference_lines(diff(a, write_passes(tmp_path, A, ["mcq"]), sites=[]))
    assert "only a has              other_confidence, self_confidence" in lines
