"""Distances of activations: nothing of the same run, what was done where it was done, and no number out of nothing."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.datasets_for_tests import make_choices, make_sample, write_dataset
from tests.introspection_for_tests import Noise, Question, write_passes
from tracekit.analysis.diff import diff
from tracekit.analysis.diff_table import difference_lines
from tracekit.analysis.distances import COMPARED_SITES, Distances, compare_activations, distance
from tracekit.read.store import TraceStore

QUESTIONS = [Question()] * 3
KEYS = [(f"{i:06d}", f"{i:06d}") for i in range(3)]


def compare(a: Path, b: Path, **options) -> Distances:
    with TraceStore(a) as first, TraceStore(b) as second:
        return compare_activations(first, second, KEYS[: len(first)], **options)


def pair(tmp_path: Path, *, of_a: dict | None = None, **of_b) -> Distances:
    """Two datasets of the pass mcq that differ in these options."""
    a = write_passes(tmp_path / "a", QUESTIONS, ["mcq"], **(of_a or {}))
    return compare(a, write_passes(tmp_path / "b", QUESTIONS, ["mcq"], **of_b))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_same_vectors_lie_nowhere_apart(dtype: type):
    vectors = np.random.default_rng(0).normal(size=(50, 64)).astype(dtype)
    vectors[3] = 0
    same = distance(vectors, vectors)
    assert (same.cosine, same.norm_change, same.relative_difference, same.num_positions) == (1.0, 0.0, 0.0, 50)


def test_distances_by_hand():
    a = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    b = np.array([[6.0, 8.0], [0.0, 1.0]], np.float32)
    found = distance(a, b)
    assert found.cosine == pytest.approx((1 + 0) / 2)
    assert found.norm_change == pytest.approx((1 + 0) / 2)
    assert found.relative_difference == pytest.approx((1 + np.sqrt(2)) / 2)


def test_a_tiny_step_is_seen_in_float64():
    a = np.ones((4, 512), np.float32)
    b = a.copy()
    b[:, 0] += np.float32(1e-6)
    found = distance(a, b)
    assert found.relative_difference == pytest.approx(float(b[0, 0] - a[0, 0]) / np.sqrt(512), rel=1e-6)
    assert found.cosine is not None
    assert found.cosine <= 1


def test_values_that_are_not_finite_and_lone_zeros_are_left_out_and_counted():
    a = np.ones((4, 2))
    b = a.copy()
    a[0, 0], b[1, 1], b[2] = np.nan, np.inf, 0
    found = distance(a, b)
    assert (found.num_positions, found.num_left_out, found.cosine) == (1, 3, 1.0)
    nothing = distance(a[:1], b[:1])
    assert (nothing.cosine, nothing.norm_change, nothing.relative_difference) == (None, None, None)


def test_noise_is_seen_from_its_layer_on_and_not_before(tmp_path: Path):
    found = pair(tmp_path, noise=Noise(layer=2))
    assert found.notes == []
    assert [site.site for site in found.sites] == ["hidden_states", "resid_embed", "resid_post_mlp"]
    for site, first in (("hidden_states", 2), ("resid_post_mlp", 1)):
        (layers,) = [one.layers for one in found.sites if one.site == site]
        for layer in layers:
            assert layer.layer is not None
            for part in (layer.prompt, layer.last_prompt):
                if layer.layer < first:
                    assert (part.cosine, part.norm_change, part.relative_difference) == (1.0, 0.0, 0.0)
                else:
                    assert part.relative_difference is not None
                    assert part.cosine is not None
                    assert 0.03 < part.relative_difference < 0.3
                    assert 0.9 < part.cosine < 1
        assert (layers[0].prompt.num_positions, layers[0].last_prompt.num_positions) == (15, 3)


def test_numbers_are_those_of_the_arrays(tmp_path: Path):
    found = pair(tmp_path, noise=Noise(layer=0, scale=0.5))
    a, b = (
        TraceStore(tmp_path / name).stack("hidden_states", layer=2, tokens="last_prompt").values for name in ("a", "b")
    )
    part = found.sites[0].layers[2].last_prompt
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    assert part.cosine == pytest.approx(((a * b).sum(1) / (norms[0] * norms[1])).mean(), rel=1e-5)
    assert part.norm_change == pytest.approx(((norms[1] - norms[0]) / norms[0]).mean(), rel=1e-4)
    assert part.relative_difference == pytest.approx((np.linalg.norm(b - a, axis=1) / norms[0]).mean(), rel=1e-5)


def test_answers_of_other_lengths_do_not_matter(tmp_path: Path):
    a = write_passes(tmp_path / "a", [Question(answer_tokens=2)] * 2, ["mcq"])
    b = write_passes(tmp_path / "b", [Question(answer_tokens=5)] * 2, ["mcq"])
    found = compare(a, b)
    assert {layer.prompt.num_positions for site in found.sites for layer in site.layers} == {10}


def test_prompts_of_other_tokens_are_compared_at_the_last_position_only(tmp_path: Path):
    found = pair(tmp_path, prompt_ids=(1, 2, 3, 4, 5, 6))
    assert found.notes == [
        "3 of 3 prompts are other tokens in b than in a: of these the last prompt position alone was compared"
    ]
    assert {layer.prompt.num_positions for site in found.sites for layer in site.layers} == {0}
    assert {layer.last_prompt.num_positions for site in found.sites for layer in site.layers} == {3}


def test_positions_that_both_kept_are_compared(tmp_path: Path):
    found = pair(tmp_path, of_a={"kept": (2, 7)}, kept=(0, 4))
    layer = found.sites[0].layers[0]
    assert (layer.prompt.num_positions, layer.last_prompt.num_positions) == (6, 0)
    assert layer.prompt.relative_difference == 0


def test_runs_that_kept_no_prompt_position_say_so(tmp_path: Path):
    found = pair(tmp_path, of_a={"kept": (5, 7)}, kept=(5, 7))
    assert found.notes == ["no prompt position was kept on both sides; run with --tokens prompt, all or last"]


def test_what_one_side_alone_has_is_named(tmp_path: Path):
    found = pair(tmp_path, of_a={"sites": ("hidden_states", "resid_embed")}, sites=("hidden_states",))
    assert [site.site for site in found.sites] == ["hidden_states"]
    assert found.notes == ["only a has resid_embed"]


def test_layers_can_be_chosen(tmp_path: Path):
    a = write_passes(tmp_path / "a", QUESTIONS, ["mcq"])
    found = compare(a, a, layers=[1, 3], sites=["hidden_states"])
    assert [layer.layer for layer in found.sites[0].layers] == [1, 3]
    assert compare(a, a, layers=[7]).notes[0].startswith("no layer 7 in both")


def test_nothing_in_common_says_what_is_needed(tmp_path: Path):
    found = pair(tmp_path, of_a={"sites": ()})
    assert found.sites == []
    assert found.notes[0].startswith(f"no activations in common: both need one of {', '.join(COMPARED_SITES)}")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"d_model": 4}, "activations cannot be compared: hidden_states is 8 wide in a and 4 in b"),
        ({"num_layers": 5}, "activations cannot be compared: the model of a has 3 layers, that of b 5"),
    ],
)
def test_models_of_other_shapes_are_refused(tmp_path: Path, options: dict, note: str):
    found = pair(tmp_path, **options)
    assert found.sites == []
    assert found.notes == [note]


def test_layers_stored_apart_and_choices_are_read_too(tmp_path: Path):
    apart = make_sample(
        "000000", sites=("resid_post_mlp",), heads_by_layer={"resid_post_mlp": [1] * 3}, dtype="bfloat16"
    )
    assert set(apart.stored) == {f"resid_post_mlp.{layer}" for layer in range(3)}
    write_dataset(tmp_path / "a", {"train-00000": [apart]})
    write_dataset(tmp_path / "c", {"train-00000": [make_choices("000000")]}, config="csqa_mcq")
    for name, num_positions in (("a", 5), ("c", 9)):
        found = compare(tmp_path / name, tmp_path / name)
        layers = [layer for site in found.sites for layer in site.layers]
        assert {(one.prompt.cosine, one.prompt.num_positions) for one in layers} == {(1.0, num_positions)}


@pytest.mark.parametrize(("kept", "is_alone"), [([[4, 5]], True), ([[3, 5]], False), ([[4, 9]], True)])
def test_data_that_kept_one_position_says_so_once(tmp_path: Path, kept: list[list[int]], is_alone: bool):
    for name in ("a", "b"):
        samples = [make_sample(f"{i:06d}", kept=kept) for i in range(3)]
        write_dataset(tmp_path / name, {"train-00000": samples})
    difference = diff(tmp_path / "a", tmp_path / "b")
    text = "\n".join(difference_lines(difference))
    note = "both sides keep only the last position of each prompt, so nothing else was compared"
    assert text.count(note) == is_alone
    assert text.count("last positions") == 1
    assert text.count("prompt positions") == (not is_alone)
    num_columns = 3 if is_alone else 6
    first = next(line for line in text.splitlines() if line.startswith("  0 "))
    assert len(first.split()) == 1 + num_columns
