"""Where bytes lie: only those that hold what was asked for are read, and entries that contradict themselves are not."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.datasets_for_tests import D_MODEL, NUM_LAYERS, make_choices, make_sample, write_dataset
from tracekit.errors import ConfigError, DatasetError, SampleNotFoundError
from tracekit.format.checksums import Pieces
from tracekit.read.byte_ranges import SampleRow, StoredTensor, extent_of
from tracekit.read.index import open_folder
from tracekit.read.remote import ByteRange
from tracekit.read.rows import Rows, ranges_of
from tracekit.read.store import TraceStore
from tracekit.tensors import TensorSpec

ITEM = 4


def _stored(shape: list[int], axes: str, layout: str, offsets: list[int]) -> StoredTensor:
    spec = TensorSpec(
        name="site",
        dtype="float32",
        shape=shape,
        axes=list(axes),
        layers=list(range(shape[0])) if axes[0] == "L" else [],
        positions=[[0, offsets[-1]]],
        layout=layout,
        num_keys=0,
        choice_offsets=offsets,
    )
    return StoredTensor(spec, np.dtype(np.float32), 1000, int(np.prod(shape)) * ITEM, spec.layout)


def test_a_choice_of_a_layer_is_one_range() -> None:
    stored = _stored([3, 9, 2], "LTD", "dense", [0, 3, 5, 9])
    assert extent_of(stored, entry=None) == (1000, 216, (3, 9, 2), "LTD", ())
    assert extent_of(stored, entry=2) == (1144, 72, (9, 2), "TD", ())
    assert extent_of(stored, entry=2, choice=1) == (1144 + 24, 16, (2, 2), "TD", ())
    assert extent_of(stored, entry=None, choice=1) == (1000, 216, (3, 9, 2), "LTD", (slice(None), slice(3, 5)))


def test_a_choice_is_cut_out_where_heads_come_first() -> None:
    queries = _stored([3, 4, 9, 2], "LHTE", "dense", [0, 3, 5, 9])
    assert extent_of(queries, entry=1, choice=2) == (1288, 288, (4, 9, 2), "HTE", (slice(None), slice(5, 9)))
    attention = _stored([3, 4, 29], "LHS", "full", [0, 3, 5, 9])
    assert extent_of(attention, entry=0, choice=2) == (1000, 464, (4, 29), "HS", (slice(None), slice(13, 29)))
    embedding = _stored([9, 2], "TD", "dense", [0, 3, 5, 9])
    assert extent_of(embedding, entry=None, choice=0) == (1000, 24, (3, 2), "TD", ())


def _row(folder: Path) -> SampleRow:
    write_dataset(folder, {"train-00000": [make_choices("000000", sites=("hidden_states", "attentions"))]}, config="c")
    return Rows([open_folder(folder, None)], where="here").row("000000")


def test_ranges_are_those_that_will_be_read(tmp_path: Path) -> None:
    row = _row(tmp_path)
    start = row.tensors["hidden_states"].start
    layer, shard = 9 * D_MODEL * ITEM, row.shard
    ranges = list(ranges_of(row, ["hidden_states"], [0, -1], 1))
    assert ranges == [
        ByteRange(shard, start + at * layer + 3 * D_MODEL * ITEM, start + at * layer + 5 * D_MODEL * ITEM)
        for at in (0, NUM_LAYERS)
    ]
    whole = ByteRange(shard, start, start + (NUM_LAYERS + 1) * layer)
    assert list(ranges_of(row, ["hidden_states"], None, 1)) == list(ranges_of(row, ["hidden_states"], None)) == [whole]
    (one,) = ranges_of(row, ["attentions"], [1], 0)
    assert one == next(iter(ranges_of(row, ["attentions"], [1])))
    with pytest.raises(SampleNotFoundError, match="no choice 3; choices are 0 to 2"):
        list(ranges_of(row, None, [0], 3))
    write_dataset(tmp_path / "plain", {"train-00000": [make_sample("000000")]})
    plain = Rows([open_folder(tmp_path / "plain", None)], where="here").row("000000")
    with pytest.raises(ConfigError, match="hidden_states of sample '000000' has no choices"):
        list(ranges_of(plain, None, [0], 0))


def test_reading_a_choice_asks_for_its_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = _row(tmp_path)
    store, asked = TraceStore(tmp_path), []
    source = store._bytes_of[row.shard]
    view = source.view

    def noted(shard: Path, offset: int, size: int, pieces: Pieces | None) -> memoryview:
        asked.append(ByteRange(shard, offset, offset + size))
        return view(shard, offset, size, pieces)

    monkeypatch.setattr(source, "view", noted)
    for site, layer in (("hidden_states", 2), ("attentions", 0)):
        store.tensor("000000", site, layer=layer, choice=1)
        assert asked == list(ranges_of(row, [site], [layer], 1))
        asked.clear()


@pytest.mark.parametrize(("site", "head", "expand", "stored_head"), [
    ("attentions", 1, False, 1),
    ("attentions", -1, False, 3),
    ("queries", 2, False, 2),
    ("keys", 1, False, 1),
    ("keys", 1, True, 0),
    ("values", 3, True, 1),
])  # fmt: skip
def test_a_head_of_a_layer_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, head: int, expand: bool, stored_head: int
) -> None:
    made = make_sample("000000", sites=("attentions", "queries", "keys", "values"))
    write_dataset(tmp_path, {"train-00000": [made]})
    store, asked = TraceStore(tmp_path, check=True), []
    source = store._bytes_of[store._row("000000").shard]
    view = source.view

    def noted(shard: Path, offset: int, size: int, pieces: Pieces | None) -> memoryview:
        asked.append((offset, size))
        return view(shard, offset, size, pieces)

    monkeypatch.setattr(source, "view", noted)
    stored = store._row("000000").tensors[site]
    found = store.tensor("000000", site, layer=2, head=head, expand_heads=expand)
    np.testing.assert_array_equal(found, made.expected[site][2, stored_head])
    num_bytes = stored.num_bytes // stored.spec.shape[0] // stored.spec.shape[1]
    assert asked == [(stored.start + (2 * stored.spec.shape[1] + stored_head) * num_bytes, num_bytes)]
    with pytest.raises(SampleNotFoundError, match="no head 4; heads are 0 to 3"):
        store.tensor("000000", "attentions", layer=0, head=4)


@pytest.mark.parametrize(
    ("number", "change", "text"),
    [
        (0, {"choice_offsets": [0, 3, 5]}, r"positions \[\[0, 9\]\] and num_keys 0, expected \[\[0, 5\]\] and 0"),
        (0, {"choice_offsets": [1, 3, 9]}, r"choice_offsets \[1, 3, 9\], expected 0 and then larger"),
        (0, {"choice_offsets": [0, 3, 3, 9]}, r"choice_offsets \[0, 3, 3, 9\], expected 0 and then larger"),
        (0, {"choice_offsets": [0]}, r"choice_offsets \[0\], expected 0 and then larger"),
        (0, {"choice_offsets": [0, 3, 11], "positions": [[0, 11]]}, "names positions outside a text of 9"),
        (0, {"axes": ["L", "H", "D"]}, "layout 'dense' with axes .* expected dense with T, or full with S"),
        (1, {"choice_offsets": [0, 4, 5, 9]}, "axis S is 29, its choice_offsets .* say 33"),
        (1, {"layout": "causal"}, "layout 'causal' with axes"),
        (1, {"num_keys": 9}, "num_keys 9"),
        (1, {"choice_offsets": []}, "with 9 rows does not go with its"),
    ],
)
def test_choices_that_contradict_their_tensor_are_refused(
    tmp_path: Path, number: int, change: dict[str, Any], text: str
) -> None:
    one = make_choices("000000", sites=("hidden_states", "attentions"))
    specs = list(one.record.tensors)
    specs[number] = msgspec.structs.replace(specs[number], **change)
    wrong = one._replace(record=msgspec.structs.replace(one.record, tensors=specs))
    write_dataset(tmp_path, {"train-00000": [wrong]}, config="csqa_mcq")
    name = specs[number].name
    with pytest.raises(DatasetError, match=f"sample '000000': tensor '{name}'.*{text}.*Run `tracekit verify`"):
        TraceStore(tmp_path).hidden_states("000000")
