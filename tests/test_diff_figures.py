"""The pictures of a difference: PNG files, the same bytes every time, and none without numbers."""

from pathlib import Path

import matplotlib as mpl
import pytest

from tests.introspection_for_tests import Noise, Question, write_passes
from tests.test_diff import A, B
from tests.test_figures import chunks
from tracekit.diff import Difference, diff
from tracekit.diff_figures import draw_difference
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


def test_missing_matplotlib_is_said_with_the_command(difference: Difference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'tracekit-llm\[publish\]'"):
        draw_difference(difference)
