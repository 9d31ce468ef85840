"""Checksums: where tensors are cut, what a reader must fetch to check a range, and that any damage is found."""

import pickle
import zlib
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets_for_tests import VERIFICATION, make_choices, make_sample, write_dataset
from tracekit.errors import CorruptShardError, DatasetError
from tracekit.format.checksums import PIECE_BYTES, Pieces, checksums_of
from tracekit.format.manifest import SampleIndex, Sidecar, read_struct
from tracekit.format.shards import ShardWriter, index_of, iter_samples, read_sample
from tracekit.read.store import TraceStore
from tracekit.records import encode_record
from tracekit.tensors import Payload, TensorIndex, TensorSpec, encode

EVERY_SITE = ("hidden_states", "attentions", "queries", "keys", "values", "resid_embed", "topk_ids", "topk_logprobs")


def spec_of(name: str, axes: str, shape: list[int]) -> TensorSpec:
    layers = list(range(shape[0])) if axes[0] == "L" else []
    return TensorSpec(
        name=name,
        dtype="uint8",
        shape=shape,
        axes=list(axes),
        layers=layers,
        positions=[],
        layout="dense",
        num_keys=0,
        choice_offsets=[],
    )


def pieces_of(checksums: bytes, specs: list[TensorSpec], sizes: list[int], *, data_offset: int = 1000) -> Pieces:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    places = [TensorIndex(name=s.name, offset=o, size=n) for s, o, n in zip(specs, starts, sizes, strict=True)]
    return Pieces(checksums, record=(100, 110), data_offset=data_offset, places=places, specs=specs, where="shard: 'k'")


@pytest.mark.parametrize(
    ("axes", "shape", "borders"),
    [
        ("LTD", [3, 2, 5], [0, 10, 20, 30]),
        ("TD", [2, 5], [0, 10]),
        ("LTD", [1, 2, 5], [0, 10]),
        ("LTD", [2, PIECE_BYTES, 1], [0, PIECE_BYTES, 2 * PIECE_BYTES]),
        ("LT", [2, PIECE_BYTES + 1], [0, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 1, 2 * PIECE_BYTES + 2]),
        ("W", [PIECE_BYTES + 7], [0, PIECE_BYTES, PIECE_BYTES + 7]),
        ("LTD", [3, 0, 5], []),
        ("LTD", [0, 2, 5], []),
    ],
)
def test_a_tensor_is_cut_at_its_layers_and_every_mebibyte(axes: str, shape: list[int], borders: list[int]):
    size = int(np.prod(shape))
    num_pieces = 1 + max(len(borders) - 1, 0)
    pieces = pieces_of(bytes(4 * num_pieces), [spec_of("a", axes, shape)], [size])
    for start, stop in pairwise(borders):
        for at in {start, stop - 1, (start + stop) // 2}:
            assert pieces.widened(1000 + at, 1001 + at) == (1000 + start, 1000 + stop)
    if size:
        assert pieces.widened(1000, 1000 + size) == (1000, 1000 + size)
    assert pieces.widened(102, 103) == (100, 110)


def test_they_are_crc32_of_record_and_pieces_in_the_order_of_the_bytes():
    made = make_sample("000000", sites=("hidden_states", "resid_embed"), num_tokens=3)
    record, payload = encode_record(made.record), encode(made.stored)
    data = payload.tobytes()[payload.data_offset :]
    layer = len(data) // 5  # four layers and the embeddings
    expected = [zlib.crc32(record), *(zlib.crc32(data[i * layer :][:layer]) for i in range(5))]
    assert np.frombuffer(checksums_of(record, payload), "<u4").tolist() == expected


@given(data=st.data(), shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_range_is_found_damaged_exactly_where_it_is(data: st.DataObject, shapes: list[tuple[int, int]]):
    specs = [spec_of(f"t{i}", "LT", list(shape)) for i, shape in enumerate(shapes)]
    sizes = [layers * tokens for layers, tokens in shapes]
    whole = bytes(range(1, sum(sizes) + 1))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    places = [TensorIndex(name=s.name, offset=o, size=n) for s, o, n in zip(specs, starts, sizes, strict=True)]
    record = b'{"tensors":' + msgspec.json.encode(specs) + b"}"
    payload = Payload([b"h" * 8, *(whole[o : o + n] for o, n in zip(starts, sizes, strict=True))], 8, 8, places)
    pieces = pieces_of(checksums_of(record, payload), specs, sizes)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    first, last = (at - 1000 for at in pieces.widened(1000 + start, 1000 + stop))
    assert first <= start <= stop <= last
    assert pieces.damaged(1000 + first, memoryview(whole[first:last])) is None
    if last > first:
        at = data.draw(st.integers(first, last - 1))
        broken = bytearray(whole)
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
        name = next(s.name for s, o, n in zip(specs, starts, sizes, strict=True) if o <= at < o + n)
        assert f"shard: 'k': {name}, layer " in (pieces.damaged(1000 + first, memoryview(broken)[first:last]) or "")


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 12, 15, 17, 20])
def test_another_number_of_checksums_is_refused(num_bytes: int):
    pieces = pieces_of(bytes(num_bytes), [spec_of("a", "LT", [3, 5])], [15])
    with pytest.raises(DatasetError, match=rf"shard: 'k': {num_bytes} bytes of checksums, expected 16 for 4 pieces"):
        pieces.widened(1000, 1001)


def indexed(shard: Path) -> list[SampleIndex]:
    """What the bytes of a shard say."""
    with shard.open("rb") as file:
        return [index_of(one, *read_sample(file, one)) for one in iter_samples(file, where="shard")]


def test_a_shard_gives_the_index_that_its_writer_noted(tmp_path: Path):
    made = [
        make_sample("000000", sites=EVERY_SITE),
        make_sample("000001", sites=()),
        make_sample("000002", sites=EVERY_SITE, dtype="bfloat16", kept=[[2, 2]]),
        make_sample("000003", sites=("keys",), heads_by_layer={"keys": [2, 4, 1]}),
    ]
    layout = write_dataset(tmp_path, {"train-00000": made}, is_finished=False)
    sidecar = read_struct(layout.sidecar("train-00000"), Sidecar)
    assert sidecar.samples == indexed(layout.shard("train-00000"))
    assert all(len(one.checksums) >= 4 for one in sidecar.samples)
    assert sidecar == sidecar.with_checksum()


def test_a_resumed_shard_has_the_same_sidecar(tmp_path: Path):
    samples = [(one.record.key, encode_record(one.record), encode(one.stored)) for one in map(make_sample, "abc")]
    wanted = write_dataset(tmp_path / "a", {"train-00000": [*map(make_sample, "abc")]}, is_finished=False)
    layout = write_dataset(tmp_path / "b", {}, is_finished=False)
    layout.sidecar("train-00000").parent.mkdir(parents=True)
    for one in samples:
        with ShardWriter(layout, "train-00000", 0) as writer:
            writer.append([one], VERIFICATION)
    with ShardWriter(layout, "train-00000", 0) as writer:
        writer.finish()
    assert layout.sidecar("train-00000").read_bytes() == wanted.sidecar("train-00000").read_bytes()


@pytest.mark.attack
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_folder_is_checked_where_that_is_asked_for(tmp_path: Path, is_finished: bool):
    made = make_sample("000000", sites=EVERY_SITE)
    layout = write_dataset(tmp_path, {"train-00000": [made]}, is_finished=is_finished)
    shard = layout.shard("train-00000")
    whole = shard.read_bytes()
    index = indexed(shard)[0]
    for place in index.tensors:
        broken = bytearray(whole)
        broken[index.data_offset + place.offset + place.size - 1] ^= 64  # the last layer
        shard.write_bytes(broken)
        with TraceStore(tmp_path, check=True) as store:
            layers = store._row("000000").tensors[place.name].spec.layers
            if layers:
                store.tensor("000000", place.name, layer=layers[0])
            for _ in range(2):
                with pytest.raises(
                    CorruptShardError, match=rf"train-00000.tar: sample '000000': {place.name}.*damaged"
                ):
                    store.tensor("000000", place.name)
        with TraceStore(tmp_path) as store:  # mapped, as fast as memory: `verify` finds it
            store.tensor("000000", place.name)
    broken = bytearray(whole)
    broken[whole.index(b'"question":"What') + 14] ^= 1
    shard.write_bytes(broken)
    with TraceStore(tmp_path, check=True) as store, pytest.raises(CorruptShardError, match=r"its record .* is damaged"):
        store.record("000000")


def test_a_checked_store_reads_the_same_and_keeps_its_option(tmp_path: Path):
    write_dataset(tmp_path, {"train-00000": [make_choices("000000"), make_choices("000001")]}, config="csqa_mcq")
    plain, checked = TraceStore(tmp_path), pickle.loads(pickle.dumps(TraceStore(tmp_path, check=True)))  # noqa: S301 - our own
    assert checked._check
    for key in plain.keys:
        assert plain.record(key) == checked.record(key)
        for name, array in plain.tensors(key).items():
            np.testing.assert_array_equal(array, checked.tensors(key)[name])
    np.testing.assert_array_equal(
        plain.stack("hidden_states", layer=1).values, checked.stack("hidden_states", layer=1).values
    )
