"""The pictures of a difference: PNG files, the same bytes every time, and none without numbers."""

from pathlib import Path

import matplotlib as mpl
import msgspec
import pytest
from matplotlib.figure import Figure

from tests.datasets_for_tests import MODEL, write_dataset
from tests.introspection_for_tests import Noise, Question, make_pass, write_passes
from tests.test_diff import A, B
from tests.test_figures import chunks
from tracekit.analysis.diff import Difference, diff
from tracekit.analysis.diff_figures import draw_difference
from tracekit.errors import ConfigError


@pytest.fixture(scope="module")
def difference(tmp_path_factory: pytest.TempPathFactory) -> Difference:
    folder = tmp_path_factory.mktemp("drawn")
    a = write_passes(folder / "a", A, ["mcq", "self_confidence"])
    return diff(a, write_passes(folder / "b", B, ["mcq", "self_confidence"], noise=Noise(layer=2)))


def test_pictures_of_activations_reliability_and_shifts(difference: Difference):
    drawn = draw_difference(difference)
    kinds = ["hidden_states", "resid_post_mlp", "reliability", "entropy-shift", "confidence-shift"]
    assert sorted(drawn) == sorted(f"{name}-{kind}.png" for name in ("mcq", "self_confidence") for kind in kinds)
    for png in drawn.values():
        found = dict(chunks(png))
        assert int.from_bytes(found[b"IHDR"][:4], "big") == 1200
        assert b"tEXt" not in found


def test_the_same_numbers_give_the_same_bytes_whatever_style_is_set(difference: Difference):
    first = draw_difference(difference)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert draw_difference(difference) == first


def test_the_same_run_twice_can_be_drawn(tmp_path: Path):
    write_passes(tmp_path, A, ["mcq"])
    assert "mcq-hidden_states.png" in draw_difference(diff(tmp_path, tmp_path))


def test_what_has_no_numbers_is_left_out(tmp_path: Path):
    write_passes(tmp_path, [Question()], ["self_confidence"], sites=["resid_embed"])
    drawn = draw_difference(diff(tmp_path, tmp_path))
    assert sorted(drawn) == ["self_confidence-confidence-shift.png", "self_confidence-entropy-shift.png"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The pictures that are drawn, before they become bytes."""
    drawn: list[Figure] = []
    monkeypatch.setattr("tracekit.analysis.diff_figures.png", lambda figure: drawn.append(figure) or b"")
    return drawn


def test_titles_name_the_models_in_short(tmp_path: Path, figures: list[Figure]):
    tuned = msgspec.structs.replace(MODEL, adapter="someone/lora-wiki@sha256:0")
    write_passes(tmp_path / "a", A, ["mcq"])
    made = [make_pass(number, one) for number, one in enumerate(B)]
    made = [one._replace(record=msgspec.structs.replace(one.record, model=tuned)) for one in made]
    write_dataset(tmp_path / "b", {"train-00000": made}, config="mcq")
    draw_difference(diff(tmp_path / "a", tmp_path / "b"))
    titles = [figure.axes[0].get_title(loc="left").splitlines() for figure in figures]
    assert len(titles) == 5
    assert {tuple(lines[1:]) for lines in titles} == {("mcq, 5 samples in common", "a: model", "b: model + lora-wiki")}
    assert ["Confidence against the most probable letter"] in [lines[:1] for lines in titles]


def test_titles_tell_slices_and_passes_of_one_model_apart(tmp_path: Path, figures: list[Figure]):
    write_passes(tmp_path, A)
    where = ["correct_answer_letter=A", "split=validation", "subject=history", "model.id=test/model"]
    found = diff(tmp_path, tmp_path, config=("self_confidence", "other_confidence"), where_b=where, sites=[])
    draw_difference(found)
    title = figures[0].axes[0].get_title(loc="left").splitlines()
    assert title[2] == "a: model (self_confidence)"
    assert title[3].startswith("b: model (other_confidence) where correct_answer_letter=A and split=v")
    assert title[3].endswith("...")


def test_shift_of_stated_confidence_is_in_percent_points_with_zero_in_sight(
    difference: Difference, figures: list[Figure]
):
    draw_difference(difference)
    axes = {figure.axes[0].get_title(loc="left").splitlines()[0]: figure.axes[0] for figure in figures}
    of_pass = axes["Shift of expected confidence"]
    assert of_pass.get_xlabel() == "expected confidence (percent points), b minus a"
    low, high = of_pass.get_xlim()
    assert low == pytest.approx(-73.5)
    assert high == pytest.approx(3.5)  # a bin beyond 0: no empty half


def test_missing_matplotlib_is_said_with_the_command(difference: Difference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'tracekit-llm\[publish\]'"):
        draw_difference(difference)
