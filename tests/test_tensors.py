"""The wire form of tensors: round trips, alignment, safetensors' own reader, and damage that is noticed."""

import json

import ml_dtypes
import msgspec
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tracekit.errors import CorruptShardError, DatasetError
from tracekit.tensors import (
    DTYPES,
    TensorSpec,
    choice_spans,
    choices_problem,
    decode,
    encode,
    is_companion,
    num_packed,
    pack_indices,
    positions_of,
    read_header,
    site_of,
    unpack_causal,
)

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def any_bytes_as(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An array of any bit patterns, NaN and infinities among them."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return (raw & 1).astype(np.bool_).reshape(shape) if dtype == np.bool_ else raw.view(dtype).reshape(shape)


@given(
    st.dictionaries(
        NAMES,
        st.builds(any_bytes_as, st.sampled_from(list(DTYPES.values())), SHAPES, st.integers(0, 1000)),
        max_size=6,
    )
)
def test_what_goes_in_comes_out_bit_by_bit(tensors: dict[str, np.ndarray]):
    payload = encode(tensors)
    data = payload.tobytes()
    decoded = decode(data)
    assert decoded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert decoded[name].dtype == array.dtype
        assert decoded[name].shape == array.shape
        assert decoded[name].tobytes() == array.tobytes()
    assert len(data) == payload.size
    for entry in payload.places:
        start = payload.data_offset + entry.offset
        assert data[start : start + entry.size] == tensors[entry.name].tobytes()


@given(st.dictionaries(st.sampled_from("abcdef"), hnp.arrays(np.float32, SHAPES), min_size=1))
def test_the_order_of_the_dictionary_does_not_change_the_bytes(tensors: dict[str, np.ndarray]):
    assert encode(tensors).tobytes() == encode(dict(reversed(tensors.items()))).tobytes()


def test_safetensors_itself_reads_the_payload_and_we_read_its():
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5), "c": torch.tensor(1.5)}
    ours = encode(
        {
            "a": tensors["a"].view(torch.int16).numpy().view(ml_dtypes.bfloat16),
            "b": tensors["b"].numpy(),
            "c": np.float32(1.5).reshape(()),
        }
    ).tobytes()
    for name, value in safetensors.torch.load(ours).items():
        assert torch.equal(value, tensors[name])
    theirs = safetensors.torch.save(tensors)
    assert decode(theirs)["a"].tobytes() == tensors["a"].view(torch.int16).numpy().tobytes()


def test_every_tensor_is_aligned_to_its_dtype_and_the_data_to_64():
    payload = encode({"x": np.zeros(3, np.int8), "y": np.zeros(5, np.float32), "z": np.zeros(1, np.int64)})
    assert payload.data_offset % 64 == 0
    sizes = {"x": 1, "y": 4, "z": 8}
    assert all(entry.offset % sizes[entry.name] == 0 for entry in payload.places)


def test_decoding_copies_nothing():
    data = encode({"a": np.arange(1000.0)}).tobytes()
    assert np.shares_memory(decode(data)["a"], np.frombuffer(data, np.uint8))


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_packing_keeps_the_causal_half_of_any_rows(length: int, start: int, stop: int):
    start, stop = min(start, length), min(stop, length)
    full = np.tril(np.random.default_rng(length).random((2, length, length)))
    rows = np.arange(start, max(start, stop))
    packed = full.reshape(2, -1)[:, pack_indices(rows, length)]
    assert packed.shape[-1] == num_packed(rows)
    np.testing.assert_array_equal(unpack_causal(packed, rows, length), full[:, rows])


def test_positions_are_ranges_in_order():
    assert positions_of([[2, 4], [7, 8]]).tolist() == [2, 3, 7]


def test_a_dtype_without_wire_form_is_refused_by_name():
    with pytest.raises(DatasetError, match="complex128"):
        encode({"a": np.zeros(1, complex)})


def damaged(change) -> bytes:
    payload = encode({"a": np.zeros((2, 2), np.float32)}).tobytes()
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload[8 + size :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        ((2**40).to_bytes(8, "little") + b"{}", "claims"),
        ((2).to_bytes(8, "little") + b"[]", "cannot be read"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "cannot be read"),
        (damaged(lambda h: h["a"].update(dtype="F99")), "F99"),
        (damaged(lambda h: h["a"].update(shape=[2, 3])), r"\[2, 3\] in 16 bytes"),
        (damaged(lambda h: h["a"].update(shape=[-2, -2])), r"\[-2, -2\]"),
        (damaged(lambda h: h["a"].update(data_offsets=[4, 20])), "starts at byte 4, expected 0"),
        (damaged(lambda h: h["a"].pop("dtype")), "missing required field"),
        (encode({"a": np.zeros(4)}).tobytes()[:-1], "tensors end"),
        (encode({"a": np.zeros(4)}).tobytes() + b"x", "tensors end"),
    ],
)
def test_damage_is_named(data: bytes, message: str):
    with pytest.raises(CorruptShardError, match=message):
        decode(data, where="here")


def test_safetensors_metadata_is_passed_over():
    data = safetensors.numpy.save({"a": np.zeros(2)}, metadata={"format": "pt"})
    assert read_header(data).entries.keys() == {"a"}


def test_choices_lie_where_their_lengths_and_squares_say():
    spec = TensorSpec(
        name="x",
        dtype="float32",
        shape=[2, 5, 4],
        axes=["L", "T", "D"],
        layers=[0, 1],
        positions=[[0, 5]],
        layout="dense",
        num_keys=0,
        choice_offsets=[0, 2, 5],
    )
    assert choice_spans(spec) == [slice(0, 2), slice(2, 5)]
    assert choices_problem(spec) is None
    attention = msgspec.structs.replace(spec, shape=[2, 4, 13], axes=["L", "H", "S"], layout="full")
    assert choice_spans(attention) == [slice(0, 4), slice(4, 13)]
    assert choices_problem(attention) is None
    plain = msgspec.structs.replace(spec, choice_offsets=[])
    assert (choice_spans(plain), choices_problem(plain)) == ([], None)
    assert choices_problem(msgspec.structs.replace(spec, shape=[2, 6, 4])) == (
        "axis T is 6, its choice_offsets [0, 2, 5] say 5"
    )


def test_the_site_of_a_tensor_is_its_name_without_a_layer():
    assert [site_of(name) for name in ("keys", "keys.12", "keys.scales", "keys.12.scales")] == ["keys"] * 4
    assert [is_companion(name) for name in ("keys", "keys.12", "keys.scales", "keys.12.scales")] == [0, 0, 1, 1]
