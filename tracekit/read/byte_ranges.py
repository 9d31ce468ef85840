"""Where the bytes of one sample lie: its tensors, checked, and the range that a layer or a choice of one takes.

    whole tensor (L, T, D)    | layer 0           | layer 1           | layer 2           |
    layer=1      (T, D)                           ^^^^^^^^^^^^^^^^^^^^^
    and choice=1 (T_c, D)                         | c0 |   c1   | c2  |
                                                       ^^^^^^^^^^ one range, nothing else is read

Where heads stand before tokens, (L, H, T, E) and attention (L, H, S), a choice is cut out of its layer's bytes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tracekit.errors import ConfigError, DatasetError, SampleNotFoundError
from tracekit.format.checksums import Pieces
from tracekit.read.remote import ByteRange
from tracekit.read.stacking import TokenMarks
from tracekit.read.tables import CHECKSUMS, TENSOR_INDEX
from tracekit.storage import companion_names, plain_spec, problem_of
from tracekit.tensors import (
    DTYPES,
    TensorIndex,
    TensorSpec,
    are_ranges,
    choice_spans,
    choices_problem,
    is_companion,
    num_packed,
    positions_of,
)

__all__ = [
    "Extent",
    "SampleRow",
    "StoredTensor",
    "choice_number",
    "extent_of",
    "find_place",
    "layers_of",
    "make_row",
    "num_query_heads",
]


class StoredTensor(NamedTuple):
    """One tensor of one sample, and where its bytes start in the shard."""

    spec: TensorSpec
    """What it is as it is handed out; as it is stored where it has no companions."""
    dtype: np.dtype
    """dtype of its bytes."""
    start: int
    num_bytes: int
    layout: str
    """Layout of its bytes."""
    companions: Mapping[str, "StoredTensor"] = MappingProxyType({})
    """Tensors that it is unpacked with, by the last part of their names (tracekit.storage)."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the array over its bytes."""
        is_flat = self.layout == "sparse"
        return (self.num_bytes // self.dtype.itemsize,) if is_flat else tuple(self.spec.shape)


class SampleRow(NamedTuple):
    """Everything that reading one sample needs."""

    key: str
    shard: Path
    json_offset: int
    json_size: int
    tensors: dict[str, StoredTensor]
    marks: TokenMarks
    pieces: Pieces | None
    """Its checksums; None before schema 2.0, which had none."""

    def widened(self, one: ByteRange) -> ByteRange:
        """A range of its bytes, widened to whole pieces, which alone can be checked."""
        if self.pieces is None:
            return one
        start, stop = self.pieces.widened(one.start, one.stop)
        return one._replace(start=start, stop=stop)


class _Indexed(msgspec.Struct, kw_only=True):
    """What a row of a record table must hold for its sample to be read."""

    tensors: list[TensorSpec]
    tensor_index: list[TensorIndex] = msgspec.field(name=TENSOR_INDEX)
    num_tokens: int
    prompt_length: int
    last_prompt_index: int
    first_answer_index: int | None
    last_answer_index: int | None
    checksums: bytes | None = msgspec.field(name=CHECKSUMS, default=None)


def make_row(key: str, shard: Path, entry: dict[str, Any], offsets: Mapping[str, int]) -> SampleRow:
    """A row of a record table, checked: what it says of the sample's bytes has to go together.

    Raises:
        DatasetError: it does not.
    """
    where = f"{shard}: sample {key!r}"
    try:
        found = msgspec.convert(entry, _Indexed)
    except msgspec.ValidationError as error:
        raise DatasetError(f"{where}: its row cannot be read: {error}. Run `tracekit verify` on the dataset") from error
    specs, places = found.tensors, found.tensor_index
    problem = _places_problem(specs, places, offsets)
    if problem is not None:
        raise DatasetError(f"{where}: {problem}. Run `tracekit verify` on the dataset")
    marks = TokenMarks(
        num_tokens=found.num_tokens,
        prompt_length=found.prompt_length,
        last_prompt=found.last_prompt_index,
        first_answer=found.first_answer_index,
        last_answer=found.last_answer_index,
    )
    start, size, data_offset = offsets["json_offset"], offsets["json_size"], offsets["data_offset"]
    pieces = None
    if found.checksums is not None:
        pieces = Pieces(
            found.checksums,
            record=(start, start + size),
            data_offset=data_offset,
            places=places,
            specs=specs,
            where=where,
        )
    tensors = _stored_tensors(specs, places, data_offset, found.num_tokens, where=where)
    return SampleRow(key, shard, start, size, tensors, marks, pieces)


def _places_problem(
    specs: Sequence[TensorSpec], places: Sequence[TensorIndex], offsets: Mapping[str, int]
) -> str | None:
    """What is wrong with where a sample's record, payload and tensors lie; None where nothing is.

    The record lies before the payload, and the tensors fill the data part of the payload, back to back.
    """
    json_offset, json_size = offsets["json_offset"], offsets["json_size"]
    start, data_offset = offsets["tensors_offset"], offsets["data_offset"]
    stop = start + offsets["tensors_size"]
    if not (0 <= json_offset <= json_offset + json_size <= start and start + 8 <= data_offset <= stop):
        return (
            f"a record at bytes {json_offset} to {json_offset + json_size}, and data at byte {data_offset} of a "
            f"payload at bytes {start} to {stop}, do not go together"
        )
    if sorted(place.name for place in places) != sorted({spec.name for spec in specs}):
        return "its record and its byte index name different tensors"
    end = 0
    for place in sorted(places, key=lambda one: (one.offset, one.size)):
        if place.offset != end or place.size < 0:
            return f"tensor {place.name!r} is said to have {place.size} bytes at {place.offset}, expected them at {end}"
        end += place.size
    return None if data_offset + end == stop else f"its tensors end at byte {data_offset + end}, its payload at {stop}"


def _stored_tensors(
    specs: Sequence[TensorSpec], places: Sequence[TensorIndex], data_offset: int, num_tokens: int, *, where: str
) -> dict[str, StoredTensor]:
    """Tensors of a row by name, each checked: its bytes, shape and positions have to go together."""
    specs_of = {spec.name: spec for spec in specs}
    place_of = {place.name: place for place in places}
    tensors: dict[str, StoredTensor] = {}
    for spec in specs_of.values():
        place, dtype = place_of[spec.name], DTYPES.get(spec.dtype)
        if dtype is None or min(spec.shape, default=0) < 0:
            raise DatasetError(
                f"{where}: tensor {spec.name!r} ({spec.dtype} {spec.shape}) has an unknown dtype or shape"
            )
        if not are_ranges(spec.positions, num_tokens) or spec.num_keys not in (0, num_tokens):
            raise DatasetError(
                f"{where}: tensor {spec.name!r} names positions outside a text of {num_tokens} tokens. Run "
                "`tracekit verify` on the dataset"
            )
        if "L" in spec.axes and (spec.axes[0] != "L" or len(spec.layers) != spec.shape[0]):
            raise DatasetError(f"{where}: tensor {spec.name!r} names {len(spec.layers)} layers, it has {spec.shape}")
        problem = choices_problem(spec) or problem_of(spec, specs_of)
        if problem:
            raise DatasetError(f"{where}: tensor {spec.name!r}: {problem}. Run `tracekit verify` on the dataset")
        letter, num_rows = _rows_axis(spec)
        start = data_offset + place.offset
        num_bytes = math.prod(spec.shape) * dtype.itemsize
        is_exempt = is_companion(spec.name) or spec.layout == "sparse"  # problem_of has looked at them
        has_all_rows = is_exempt or (letter in spec.axes and spec.shape[spec.axes.index(letter)] == num_rows)
        if place.size != num_bytes or not has_all_rows:
            raise DatasetError(
                f"{where}: tensor {spec.name!r} {spec.shape} with {num_rows} rows does not go with its "
                f"{place.size} bytes at {start}. Run `tracekit verify` on the dataset"
            )
        tensors[spec.name] = StoredTensor(spec, dtype, start, num_bytes, spec.layout)
    return {name: _with_companions(one, tensors) for name, one in tensors.items() if not is_companion(name)}


def _with_companions(stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """A tensor together with what it is unpacked with, described as it then is."""
    companions = {name.rpartition(".")[2]: tensors[name] for name in companion_names(stored.spec)}
    counts = companions["counts"].spec if stored.layout == "sparse" else None
    return stored._replace(spec=plain_spec(stored.spec, counts), companions=companions)


def _rows_axis(spec: TensorSpec) -> tuple[str, int]:
    """Axis along which a tensor's tokens lie, and how long it must be."""
    if spec.choice_offsets:
        return ("S" if spec.layout == "full" else "T"), choice_spans(spec)[-1].stop
    kept = positions_of(spec.positions)
    return ("S", num_packed(kept)) if spec.layout == "causal" else ("T", len(kept))


class _Place(NamedTuple):
    """Where an asked-for layer stands: in which tensor, at which entry of its first axis (None: all of them)."""

    stored: StoredTensor
    entry: int | None
    layers: list[int]


def find_place(row: SampleRow, site: str, layer: int | None) -> _Place:
    """Find a site's tensor and layer, whether its layers are stored together or one by one."""
    stored = row.tensors.get(site)
    by_layer = {} if stored else _by_layer(row, site)
    if not stored and not by_layer:
        raise SampleNotFoundError(f"sample {row.key!r} stores no {site!r}; stored: {_stored_text(row)}")
    layers = stored.spec.layers if stored else list(by_layer)
    if layer is None:
        if not stored:
            raise DatasetError(f"the shapes of {site!r} differ by layer in sample {row.key!r}; choose one with `layer`")
        return _Place(stored, None, layers)
    if not layers:
        raise ConfigError(f"{site!r} has no layers; leave `layer` out")
    number = layers[layer] if -len(layers) <= layer < 0 else layer
    if number not in layers:
        raise SampleNotFoundError(
            f"sample {row.key!r} stores no layer {layer} of {site!r}; stored: {_ranges_text(layers)}"
        )
    return _Place(stored, layers.index(number), [number]) if stored else _Place(by_layer[number], 0, [number])


def layers_of(row: SampleRow, site: str) -> list[int]:
    """Numbers of the layers of a site."""
    stored = row.tensors.get(site)
    return stored.spec.layers if stored else list(_by_layer(row, site))


class Extent(NamedTuple):
    """A range of a shard's bytes, and what is taken of the array over it."""

    start: int
    """First byte in the shard."""
    num_bytes: int
    """Bytes."""
    shape: tuple[int, ...]
    """Shape of the array over them."""
    axes: str
    """Letter of each axis."""
    cut: tuple[slice, ...]
    """What is taken of that array; empty where all of it is."""


def extent_of(stored: StoredTensor, *, entry: int | None, head: int | None = None, choice: int | None = None) -> Extent:
    """Bytes of one entry of a tensor's first axis (None: all of it), of one head of that, whose axis stays, and of one
    choice where they lie together."""
    assert stored.layout != "sparse", stored.spec.name
    spec = stored.spec
    start, num_bytes, shape, axes = stored.start, stored.num_bytes, tuple(spec.shape), "".join(spec.axes)
    if entry is not None:
        num_bytes //= shape[0]
        start, shape, axes = start + entry * num_bytes, shape[1:], axes[1:]
    if head is not None:
        num_bytes //= shape[0]
        start, shape = start + head * num_bytes, (1, *shape[1:])
    if choice is None:
        return Extent(start, num_bytes, shape, axes, ())
    span, axis = choice_spans(spec)[choice], axes.index("S" if spec.layout == "full" else "T")
    if axis > 0:
        return Extent(start, num_bytes, shape, axes, (slice(None),) * axis + (span,))
    row_bytes, length = num_bytes // shape[0], span.stop - span.start
    return Extent(start + span.start * row_bytes, length * row_bytes, (length, *shape[1:]), axes, ())


def choice_number(stored: StoredTensor, choice: int, *, where: str) -> int:
    """Number of a choice, counted from the start.

    Raises:
        ConfigError: the tensor holds no choices.
        SampleNotFoundError: no such choice.
    """
    count = max(len(stored.spec.choice_offsets) - 1, 0)
    if not count:
        raise ConfigError(f"{where} has no choices; leave `choice` out")
    if not isinstance(choice, int | np.integer):
        raise ConfigError(f"choice is {choice!r}, expected its number, counted from 0")
    if not -count <= choice < count:
        raise SampleNotFoundError(f"{where}: no choice {choice}; choices are 0 to {count - 1}, or -1 for the last")
    return int(choice) % count


def _by_layer(row: SampleRow, site: str) -> dict[int, StoredTensor]:
    """The tensors `site.<layer>` by layer, where a site is stored so."""
    found = {stored.spec.layers[0]: stored for name, stored in row.tensors.items() if name.startswith(f"{site}.")}
    return dict(sorted(found.items()))


def num_query_heads(row: SampleRow, place: _Place) -> int:
    """Heads that grouped heads are to be repeated to: those of the queries, or of the attention, in the same layers."""
    for site in ("queries", "attentions"):
        by_layer = _by_layer(row, site)
        found = [row.tensors[site]] if site in row.tensors else [by_layer[n] for n in place.layers if n in by_layer]
        numbers = sorted({stored.spec.shape[1] for stored in found})
        if len(numbers) == 1 and numbers[0] % place.stored.spec.shape[1] == 0:
            return numbers[0]
        if numbers:
            raise DatasetError(
                f"sample {row.key!r}: {place.stored.spec.name!r} has {place.stored.spec.shape[1]} heads, {site!r} "
                f"{' or '.join(map(str, numbers))}; choose a `layer`, or read them without `expand_heads`"
            )
    raise DatasetError(
        f"sample {row.key!r} stores neither queries nor attentions, so the number of query heads is not known; "
        "read the heads as stored, without `expand_heads`"
    )


def _stored_text(row: SampleRow) -> str:
    """What a sample stores, for messages."""
    texts = [
        f"{name} (layers {_ranges_text(stored.spec.layers)})" if stored.spec.layers else name
        for name, stored in row.tensors.items()
    ]
    return ", ".join(texts) or "no tensors"


def _ranges_text(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0 1 2 3 7."""
    texts: list[str] = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            first, last = numbers[start], numbers[i - 1]
            texts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    return ", ".join(texts)
