"""Choosing tokens and heads, and putting samples of different lengths together."""

import msgspec
import numpy as np
import pytest

from tracekit.errors import ConfigError, DatasetError, SampleNotFoundError
from tracekit.read.stacking import (
    Selected,
    TokenMarks,
    check_choice_tokens,
    expand_heads,
    is_single,
    one_choice,
    stack_choices,
    stack_layers,
    stack_samples,
    take_head,
    take_rows,
    take_single,
    token_positions,
)
from tracekit.tensors import TensorSpec, pack_indices, positions_of

MARKS = TokenMarks(num_tokens=8, prompt_length=3, last_prompt=2, first_answer=5, last_answer=6)
NO_ANSWER = MARKS._replace(first_answer=None, last_answer=None)


def _selected(array: np.ndarray, axes: str) -> Selected:
    return Selected(array, axes, [0], "site of sample 'a'")


def _spec(layout: str, positions: list[list[int]], num_keys: int = 0) -> TensorSpec:
    return TensorSpec(
        name="site",
        dtype="float32",
        shape=[],
        axes=[],
        layers=[0],
        positions=positions,
        layout=layout,
        num_keys=num_keys,
        choice_offsets=[],
    )


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (None, range(8)),
        ("all", range(8)),
        ("prompt", range(3)),
        ("answer", [5, 6]),
        ("last_prompt", [2]),
        ("first_answer", [5]),
        ("last_answer", [6]),
        (-8, [0]),
        (np.int32(7), [7]),
        (8, []),
        (-9, []),
        ([7, -1, 0], [7, 7, 0]),
        (slice(-2, None), [6, 7]),
        (slice(5, 99), [5, 6, 7]),
    ],
)
def test_tokens_stand_for_positions(tokens: object, positions: list[int]) -> None:
    assert token_positions(MARKS, tokens, where="x").tolist() == list(positions)


def test_an_empty_answer_gives_no_position() -> None:
    for tokens in ("answer", "first_answer", "last_answer"):
        assert token_positions(NO_ANSWER, tokens, where="x").tolist() == []
    assert token_positions(NO_ANSWER, "last_prompt", where="x").tolist() == [2]


def test_single_positions_are_told_from_many() -> None:
    assert all(is_single(tokens) for tokens in ("last_prompt", "first_answer", "last_answer", 3, -1, np.int64(3)))
    assert not any(is_single(tokens) for tokens in (None, "all", "prompt", "answer", [3], slice(3, 4), np.array([3])))


def test_a_position_past_the_end_is_an_error_among_several() -> None:
    with pytest.raises(SampleNotFoundError, match="x: no token 8; the sample has 8 tokens"):
        token_positions(MARKS, [0, 8], where="x")
    with pytest.raises(ConfigError, match="no tokens 'first'; expected last_prompt, first_answer"):
        token_positions(MARKS, "first", where="x")


def test_heads_of_a_group_are_counted_as_the_queries_are() -> None:
    array = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    keys = _selected(array, "KTE")
    assert take_head(keys, 1).array.tolist() == array[1].tolist()
    assert take_head(keys, 1).axes == "TE"
    for head, stored in enumerate([0, 0, 0, 1, 1, 1]):
        np.testing.assert_array_equal(take_head(keys, head, num_heads=6).array, array[stored])
        np.testing.assert_array_equal(expand_heads(keys, num_heads=6).array[head], array[stored])
    assert expand_heads(keys, num_heads=6).axes == "HTE"
    assert expand_heads(keys, num_heads=2).array is array
    with pytest.raises(SampleNotFoundError, match="site of sample 'a': no head -3; heads are 0 to 1"):
        take_head(keys, -3)
    with pytest.raises(ConfigError, match="has no heads; leave `head` and `expand_heads` out"):
        take_head(_selected(array, "LTD"), 0)


@pytest.mark.parametrize("positions", [None, [], [4], [1, 2], [5, 1], [2, 2]])
def test_packed_attention_gives_the_rows_asked_for(positions: list[int] | None) -> None:
    full = np.tril(np.random.default_rng(0).random((2, 6, 6)))
    kept = [[1, 3], [4, 6]]
    rows = positions_of(kept)
    packed = _selected(full.reshape(2, 36)[:, pack_indices(rows, 6)], "HS")
    taken = take_rows(packed, _spec("causal", kept, 6), None if positions is None else np.array(positions, np.int64))
    np.testing.assert_array_equal(taken.array, full[:, rows if positions is None else positions])
    assert taken.axes == "HTT"


def test_neighbouring_rows_are_a_view_and_scattered_ones_a_copy() -> None:
    array = np.arange(12.0).reshape(4, 3)
    selected, spec = _selected(array, "TD"), _spec("dense", [[2, 6]])
    assert np.shares_memory(take_rows(selected, spec, np.array([3, 4])).array, array)
    np.testing.assert_array_equal(take_rows(selected, spec, np.array([5, 2])).array, array[[3, 0]])
    with pytest.raises(SampleNotFoundError, match="position 6 was not kept; kept: 2 to 5"):
        take_rows(selected, spec, np.array([2, 6]))


def test_a_single_position_loses_its_axis() -> None:
    taken = take_single(_selected(np.ones((2, 1, 3)), "LTD"))
    assert (taken.array.shape, taken.axes) == ((2, 3), "LD")
    with pytest.raises(SampleNotFoundError, match=r"has no such token .*`stack` leaves such samples out by its mask"):
        take_single(_selected(np.ones((2, 0, 3)), "LTD"))


def test_padding_is_zero_and_masked() -> None:
    samples = [_selected(np.full((2, length, 3), length, np.float16), "LTD") for length in (2, 0, 4)]
    stacked = stack_samples(samples, ["a", "b", "c"], reduce="pad")
    assert stacked.values.shape == (3, 2, 4, 3)
    assert stacked.values.dtype == np.float16
    assert stacked.mask.tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    assert stacked.values.sum(axis=(1, 2, 3)).tolist() == [24, 0, 96]
    assert stacked.keys == ["a", "b", "c"]


def test_reduced_samples_without_a_token_are_zero() -> None:
    samples = [_selected(np.full((length, 3), 2, np.float16), "TD") for length in (1, 0)]
    single = stack_samples(samples, ["a", "b"], reduce="single")
    assert single.values.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert single.mask.tolist() == [True, False]
    mean = stack_samples(samples, ["a", "b"], reduce="mean")
    assert mean.values.dtype == np.float32
    assert mean.values.tolist() == [[2, 2, 2], [0, 0, 0]]
    nothing = stack_samples(samples[1:], ["b"], reduce="pad")
    assert nothing.values.shape == (1, 0, 3)
    assert nothing.mask.shape == (1, 0)


def test_samples_that_do_not_go_together_are_named() -> None:
    first = _selected(np.zeros((2, 3), np.float32), "TD")
    for other in (
        first._replace(array=np.zeros((2, 4), np.float32)),
        first._replace(array=np.zeros((2, 3), np.float16)),
        first._replace(layers=[1]),
    ):
        with pytest.raises(DatasetError, match=r"cannot stack .* with .*float32 D=3 layers=\[0\].*choose samples"):
            stack_samples([first, other], ["a", "b"], reduce="pad")


# ---------------------------------------------------------------- choices


def test_a_choice_is_a_sample_of_its_own() -> None:
    packed = np.arange(2 * 9).reshape(2, 9)  # the second of the choices [0, 2, 5]
    spec = msgspec.structs.replace(_spec("full", [[0, 5]]), choice_offsets=[0, 2, 5])
    selected, own = one_choice(_selected(packed, "HS"), spec, 1)
    assert (selected.axes, selected.array.tolist()) == ("HTT", packed.reshape(2, 3, 3).tolist())
    assert np.shares_memory(selected.array, packed)
    assert (own.positions, own.num_keys, own.choice_offsets) == ([[0, 3]], 3, [])
    dense = one_choice(_selected(np.ones((2, 4)), "TD"), msgspec.structs.replace(spec, layout="dense"), 0)
    assert (dense.selected.axes, dense.spec.positions, dense.spec.num_keys) == ("TD", [[0, 2]], 0)


def test_of_the_names_only_all_has_a_meaning_in_choices() -> None:
    for tokens in (None, "all", 0, -1, [0], slice(2)):
        check_choice_tokens(tokens, where="x")
    with pytest.raises(
        ConfigError, match=r"x holds choices, in which there are no tokens 'answer'; expected all, a pos"
    ):
        check_choice_tokens("answer", where="x")


def _attention(length: int) -> Selected:
    return _selected(np.full((2, length, length), length, np.float16), "HTT")


def test_choices_are_padded_and_masked_whatever_their_number() -> None:
    samples = [[_attention(1), _attention(3)], [_attention(2)]]
    stacked = stack_choices(samples, ["a", "b"], reduce="pad")
    assert stacked.values.shape == (2, 2, 2, 3, 3)
    assert stacked.values.dtype == np.float16
    assert stacked.mask.tolist() == [[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]
    assert stacked.values.sum(axis=(2, 3, 4)).tolist() == [[2, 54], [16, 0]]
    assert stacked.values[1, 0, 0].tolist() == [[2, 2, 0], [2, 2, 0], [0, 0, 0]]
    assert stacked.keys == ["a", "b"]
    even = stack_choices([samples[0], samples[0]], ["a", "b"], reduce="pad")
    assert even.values.shape == (2, 2, 2, 3, 3)
    assert even.values[1].tolist() == stacked.values[0].tolist()
    with pytest.raises(ConfigError, match="nothing to stack"):
        stack_choices([], [], reduce="pad")


def test_one_token_of_each_choice_is_stacked() -> None:
    dense = [[_selected(np.full((length, 2), length), "TD") for length in lengths] for lengths in ([1, 0], [1])]
    stacked = stack_choices(dense, ["a", "b"], reduce="single")
    assert stacked.values.tolist() == [[[1, 1], [0, 0]], [[1, 1], [0, 0]]]
    assert stacked.mask.tolist() == [[True, False], [True, False]]


def test_layers_are_put_together_in_their_order() -> None:
    layers = [_selected(np.full((2, 3), number), "TD")._replace(layers=[number]) for number in (4, 1)]
    whole = stack_layers(layers)
    assert (whole.axes, whole.layers, whole.array[:, 0, 0].tolist()) == ("LTD", [4, 1], [4, 1])
