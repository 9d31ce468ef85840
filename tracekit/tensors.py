"""The wire form of tensors: one safetensors payload a sample, and attention packed to its causal half.

    payload    | u64 header size | JSON header, spaces to a multiple of 64 | tensor bytes, back to back |

The header is exactly safetensors' own, `{"name": {"dtype", "shape", "data_offsets"}, ...}`, so that any safetensors
reader opens it. It is written here, not by the safetensors package, because a shard's hash must not depend on that
package's version, because the byte index needs every offset, and because nothing has to be copied on the way. Wider
dtypes come first (then by name), so every tensor is aligned; layer is the first axis of a tensor, so one layer
of one sample is one contiguous range of bytes.

    layout "causal"    query row p holds only the p+1 keys it may look at:

        row 0  a00                     stored   a00 a10 a11 a20 a21 a22 ...
        row 1  a10 a11                          row p starts at p(p+1)/2
        row 2  a20 a21 a22

    layout "full"      query rows with all T keys, (.., T_query, T)
    layout "dense"     everything that is not attention
    layout "scaled", "sparse"    smaller and less exact, see tracekit.storage

A sample of several choices has them one after the other along T, each starting at its entry of `choice_offsets`.
Attention then has layout "full" and one axis S of the choices' own (T_c, T_c) matrices, row by row:

    choice_offsets [0, 2, 5]   dense   t0 t1 | t2 t3 t4           attention   a00 a01 a10 a11 | b00 b01 b02 b10 ... b22

This module knows numpy and nothing of models, records or shards.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from tracekit.errors import UNREADABLE, CorruptShardError, DatasetError

__all__ = [
    "DTYPES",
    "Payload",
    "TensorIndex",
    "TensorSpec",
    "are_ranges",
    "choice_spans",
    "choices_problem",
    "decode",
    "dtype_name",
    "encode",
    "is_companion",
    "num_packed",
    "pack_indices",
    "positions_of",
    "read_header",
    "site_of",
    "unpack_causal",
]

_ALIGN = 64
_MAX_HEADER_BYTES = 1 << 24

_SAFETENSORS_TO_NUMPY = {
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NUMPY_TO_SAFETENSORS = {dtype: code for code, dtype in _SAFETENSORS_TO_NUMPY.items()}

DTYPES: Mapping[str, np.dtype] = {str(dtype): dtype for dtype in _NUMPY_TO_SAFETENSORS}
"""Every dtype a tensor may have, by the name that stands in `TensorSpec.dtype`."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one stored tensor is; stands in the record beside the tensor's bytes."""

    name: str
    """Site, or `site.<layer>` where the shapes differ by layer."""
    dtype: str
    """Name of the dtype, as numpy and torch spell it (`float32`, `bfloat16`, ...)."""
    shape: list[int]
    """Shape as stored."""
    axes: list[str]
    """Letter of each stored axis, see tracekit.axes."""
    layers: list[int]
    """Layer number of each entry of the first axis; empty where there is no layer axis."""
    positions: list[list[int]]
    """Token positions along T (attention: the query rows), as `[start, stop)` ranges."""
    layout: str
    """`dense`, or for attention `causal` (packed lower triangle) or `full`; `scaled` and `sparse`: see
    tracekit.storage."""
    num_keys: int
    """Attention: number of keys, the T of a full row; 0 for everything else."""
    choice_offsets: list[int]
    """Multiple choice: where each choice starts along T, and the end; empty for everything else."""


class TensorIndex(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of one tensor lie inside its payload's data part."""

    name: str
    """Name of the tensor."""
    offset: int
    """First byte, counted from the start of the payload's data part."""
    size: int
    """Number of bytes."""


class Payload(NamedTuple):
    """An encoded payload: its byte buffers in order, and where each tensor lies."""

    buffers: list[bytes | memoryview]
    """Header and tensors, in order."""
    data_offset: int
    """Size of the header part."""
    size: int
    """Size of the whole payload."""
    places: list[TensorIndex]
    """Where each tensor lies in the data part."""

    def tobytes(self) -> bytes:
        """All buffers as one bytes object."""
        return b"".join(self.buffers)


def dtype_name(array: np.ndarray) -> str:
    """Name of an array's dtype; raises DatasetError for one that has no wire form."""
    if array.dtype not in _NUMPY_TO_SAFETENSORS:
        raise DatasetError(f"dtype {array.dtype} cannot be stored; known: {', '.join(DTYPES)}")
    return str(array.dtype)


def encode(tensors: Mapping[str, np.ndarray]) -> Payload:
    """Encode named arrays as one safetensors payload, without copying contiguous ones.

    Raises:
        DatasetError: an array's dtype has no wire form.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():  # ascontiguousarray turns 0-d into 1-d
        arrays[name] = array.reshape(tensors[name].shape)
        dtype_name(array)
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    entries, index, offset = {}, [], 0
    for name in order:
        array = arrays[name]
        entries[name] = {
            "dtype": _NUMPY_TO_SAFETENSORS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        index.append(TensorIndex(name=name, offset=offset, size=array.nbytes))
        offset += array.nbytes
    header = msgspec.json.encode(entries)
    header += b" " * (-(8 + len(header)) % _ALIGN)
    buffers: list[bytes | memoryview] = [len(header).to_bytes(8, "little") + header]
    buffers += [arrays[name].reshape(-1).view(np.uint8).data for name in order]
    return Payload(buffers, 8 + len(header), 8 + len(header) + offset, index)


class HeaderEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in a safetensors header."""

    dtype: str
    """Safetensors' dtype code."""
    shape: list[int]
    """Shape of the tensor."""
    data_offsets: tuple[int, int]
    """`[start, stop)` in the data part."""

    @property
    def dtype_name(self) -> str:
        """The dtype as numpy and torch spell it."""
        return str(_SAFETENSORS_TO_NUMPY[self.dtype])


class Header(NamedTuple):
    """A decoded header and where the data part starts."""

    entries: dict[str, HeaderEntry]
    data_offset: int


def read_header(payload: bytes | memoryview, *, where: str = "payload") -> Header:
    """Decode and check the header of a payload.

    Raises:
        CorruptShardError: the header is cut, not JSON, or does not describe the bytes that follow.
    """
    if len(payload) < 8:
        raise CorruptShardError(f"{where}: {len(payload)} bytes are too few for a safetensors payload")
    size = int.from_bytes(payload[:8], "little")
    if size > min(len(payload) - 8, _MAX_HEADER_BYTES):
        raise CorruptShardError(f"{where}: the header claims {size} bytes, the payload has {len(payload)}")
    try:
        raw = msgspec.json.decode(bytes(payload[8 : 8 + size]), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=HeaderEntry) for name, entry in raw.items()}
    except UNREADABLE as error:
        raise CorruptShardError(f"{where}: the safetensors header cannot be read: {error}") from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype = _SAFETENSORS_TO_NUMPY.get(entry.dtype)
        start, stop = entry.data_offsets
        num_values = 1
        for length in entry.shape:
            num_values *= length
        if dtype is None or min(entry.shape, default=0) < 0 or stop - start != num_values * dtype.itemsize:
            raise CorruptShardError(f"{where}: tensor {name!r} has {entry.dtype} {entry.shape} in {stop - start} bytes")
        if start != end:
            raise CorruptShardError(f"{where}: tensor {name!r} starts at byte {start}, expected {end}")
        end = stop
    if 8 + size + end != len(payload):
        raise CorruptShardError(f"{where}: tensors end at byte {8 + size + end}, the payload at {len(payload)}")
    return Header(entries, 8 + size)


def decode(payload: bytes | memoryview, *, where: str = "payload") -> dict[str, np.ndarray]:
    """Decode a payload into arrays that share its memory (read-only, dtype kept, bfloat16 too).

    Raises:
        CorruptShardError: the payload is not a whole, consistent safetensors payload.
    """
    header = read_header(payload, where=where)
    arrays = {}
    for name, entry in header.entries.items():
        start, stop = (header.data_offset + offset for offset in entry.data_offsets)
        flat = np.frombuffer(payload, np.uint8, stop - start, start).view(_SAFETENSORS_TO_NUMPY[entry.dtype])
        arrays[name] = flat.reshape(entry.shape)
    return arrays


def are_ranges(positions: Sequence[Sequence[int]], num_tokens: int) -> bool:
    """Whether these are `[start, stop)` ranges of a text, in order; to be asked before anything is made of them."""
    end = 0
    for pair in positions:
        if len(pair) != 2 or not end <= pair[0] < pair[1] <= num_tokens:
            return False
        end = pair[1]
    return True


def positions_of(ranges: Iterable[Iterable[int]]) -> np.ndarray:
    """Positions that `[start, stop)` ranges stand for, in order."""
    parts = [np.arange(start, stop) for start, stop in ranges]
    return np.concatenate(parts) if parts else np.arange(0)


def site_of(name: str) -> str:
    """The site of a tensor: `keys` for the tensors `keys`, `keys.12` and `keys.12.scales`."""
    return name.partition(".")[0]


def is_companion(name: str) -> bool:
    """Whether a tensor only belongs to another one, as `keys.scales` and `keys.12.scales` (tracekit.storage)."""
    owner, _, suffix = name.rpartition(".")
    return bool(owner) and not suffix.isdecimal()


def choice_spans(spec: TensorSpec) -> list[slice]:
    """Where each choice lies along T, for attention along S; empty where there are no choices."""
    offsets = spec.choice_offsets
    lengths = [stop - start for start, stop in pairwise(offsets)]
    stops = list(accumulate(length**2 if spec.layout == "full" else length for length in lengths))
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def choices_problem(spec: TensorSpec) -> str | None:
    """What is wrong with how a tensor describes its choices; None where nothing is, or it has none."""
    offsets = spec.choice_offsets
    if not offsets:
        return None
    if len(offsets) < 2 or offsets[0] != 0 or any(a >= b for a, b in pairwise(offsets)):
        return f"choice_offsets {offsets}, expected 0 and then larger and larger numbers, at least one"
    letter = {"dense": "T", "scaled": "T", "full": "S"}.get(spec.layout)
    if letter is None or letter not in spec.axes or len(spec.axes) != len(spec.shape):
        return f"layout {spec.layout!r} with axes {spec.axes}, expected dense with T, or full with S, for choices"
    if spec.positions != [[0, offsets[-1]]] or spec.num_keys:
        return (
            f"positions {spec.positions} and num_keys {spec.num_keys}, expected [[0, {offsets[-1]}]] and 0: of choices "
            "every token is kept"
        )
    length, expected = spec.shape[spec.axes.index(letter)], choice_spans(spec)[-1].stop
    if length != expected:
        return f"axis {letter} is {length}, its choice_offsets {offsets} say {expected}"
    return None


def num_packed(rows: np.ndarray) -> int:
    """Values a head needs for these query rows in layout `causal`."""
    return int((rows + 1).sum())


def pack_indices(rows: np.ndarray, row_stride: int) -> np.ndarray:
    """Flat indices that pick the causal part of `rows` out of a (T, row_stride) attention matrix."""
    return np.concatenate([row * row_stride + np.arange(row + 1) for row in rows]) if len(rows) else np.arange(0)


def unpack_causal(packed: np.ndarray, rows: np.ndarray, num_keys: int) -> np.ndarray:
    """Undo layout `causal`: (..., S) packed values back to (..., len(rows), num_keys), zeros above the diagonal."""
    full = np.zeros((*packed.shape[:-1], len(rows), num_keys), dtype=packed.dtype)
    if len(rows):
        local_row = np.repeat(np.arange(len(rows)), rows + 1)
        column = np.concatenate([np.arange(row + 1) for row in rows])
        full[..., local_row, column] = packed
    return full
