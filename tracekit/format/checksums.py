"""Checksums of a sample's bytes: what a reader compares a fetched or cached range with.

    pieces       | record | hidden_states: layer 0 | layer 1 | ... | topk_ids: 1 MiB | 1 MiB | the rest | ...
    checksums    | crc32  | crc32                  | crc32   | ... | crc32           | crc32 | crc32    | ...

The record is the first piece. Then come the tensors, companions too, in the order of their bytes. A tensor whose first
axis is L is cut at its layers; any other is whole. What is larger than 1 MiB is cut again, every 1 MiB from its start.
An empty tensor has no piece. The header of the payload has none either: no reader of ranges reads it.

`checksums` is one packed value a sample: a `zlib.crc32` a piece, each an unsigned 32-bit integer, little-endian. It
stands in the record table as a binary column, in a sidecar as base64. It finds damage; it does not stop a forger.
"""

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import msgspec
import numpy as np

from tracekit.errors import DatasetError
from tracekit.tensors import Payload, TensorIndex, TensorSpec

__all__ = ["PIECE_BYTES", "Pieces", "checksums_of", "specs_of"]

PIECE_BYTES = 1 << 20
"""Largest piece."""


class _TensorsOnly(msgspec.Struct):
    """The one field of a record that says how tensors are cut."""

    tensors: list[TensorSpec] = []


def specs_of(record: bytes | msgspec.Raw) -> list[TensorSpec]:
    """What a record says of its tensors; the rest of it is not decoded."""
    return msgspec.json.decode(record, type=_TensorsOnly).tensors


def checksums_of(record: bytes, payload: Payload) -> bytes:
    """The packed checksums of a sample."""
    stops = [piece.stop for piece in _cut(payload.places, specs_of(record))]
    found, crc, position = [zlib.crc32(record)], 0, -payload.data_offset
    waiting = iter([0, *stops])
    stop = next(waiting)
    for buffer in payload.buffers:
        view = memoryview(buffer).cast("B") if len(buffer) else memoryview(b"")
        while len(view):
            part = view[: stop - position]
            crc, position, view = zlib.crc32(part, crc), position + len(part), view[len(part) :]
            if position == stop:
                found.append(crc)
                crc, stop = 0, next(waiting, stop)
    assert len(found) == 2 + len(stops), (len(found), stops)
    del found[1]  # the header's
    return np.array(found, "<u4").tobytes()


class _Piece(NamedTuple):
    """One piece of the tensors, counted from the start of the payload's data part."""

    tensor: str
    layer: int | None
    start: int
    stop: int


def _cut(places: Sequence[TensorIndex], specs: Iterable[TensorSpec]) -> list[_Piece]:
    """The pieces of a payload's tensors, in order."""
    by_name = {spec.name: spec for spec in specs}
    pieces: list[_Piece] = []
    for place in sorted(places, key=lambda one: (one.offset, one.size)):
        spec = by_name.get(place.name)
        layers = spec.layers if spec is not None and spec.axes[:1] == ["L"] else []
        if not layers or place.size % len(layers):
            layers = [None]
        step = place.size // len(layers)
        for number, layer in enumerate(layers if step else []):
            start = place.offset + number * step
            pieces += [
                _Piece(place.name, layer, at, min(at + PIECE_BYTES, start + step))
                for at in range(start, start + step, PIECE_BYTES)
            ]
    return pieces


class Pieces:
    """The pieces of one sample, by their bytes in the shard. Nothing is worked out before a piece is asked for.

    Raises, on first use:
        DatasetError: there are not as many checksums as pieces.
    """

    def __init__(
        self,
        checksums: bytes,
        *,
        record: tuple[int, int],
        data_offset: int,
        places: Sequence[TensorIndex],
        specs: Sequence[TensorSpec],
        where: str,
    ) -> None:
        self._checksums, self._record, self._data_offset = checksums, record, data_offset
        self._places, self._specs, self._where = places, specs, where

    def widened(self, start: int, stop: int) -> tuple[int, int]:
        """The bytes `[start, stop)`, widened to the borders of the pieces that hold them."""
        starts, stops, _ = self._bounds
        first, last = bisect_right(stops, start), bisect_left(starts, stop) - 1
        return (min(starts[first], start), max(stops[last], stop)) if first <= last else (start, stop)

    def damaged(self, start: int, data: memoryview) -> str | None:
        """What is wrong with the bytes from `start` on, which hold whole pieces; None where nothing is."""
        starts, stops, checksums = self._bounds
        for number in range(bisect_left(starts, start), bisect_right(stops, start + len(data))):
            if zlib.crc32(data[starts[number] - start : stops[number] - start]) != checksums[number]:
                place = f"bytes {starts[number]} to {stops[number]} of the shard"
                return (
                    f"{self._where}: {self._name(number)} ({place}) is damaged: its checksum is not that of the index"
                )
        return None

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int], list[int]]:
        """Start, stop and checksum of every piece, in the order of the shard."""
        cut = _cut(self._places, self._specs)
        starts = [self._record[0], *(self._data_offset + piece.start for piece in cut)]
        stops = [self._record[1], *(self._data_offset + piece.stop for piece in cut)]
        if len(self._checksums) != 4 * len(starts):
            raise DatasetError(
                f"{self._where}: {len(self._checksums)} bytes of checksums, expected {4 * len(starts)} for "
                f"{len(starts)} pieces. Run `tracekit verify` on the dataset"
            )
        return starts, stops, np.frombuffer(self._checksums, "<u4").tolist()

    def _name(self, number: int) -> str:
        if number == 0:
            return "its record"
        piece = _cut(self._places, self._specs)[number - 1]
        return piece.tensor if piece.layer is None else f"{piece.tensor}, layer {piece.layer},"
