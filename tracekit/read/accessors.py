"""Accessors: one sample at a time by key, as a typed record, arrays and graphs.

How a value is found:

    key -> row -> record table: shard, offsets, tensor entries -> bytes of one layer in the mapped shard -> array

Arrays are read-only views of the shard, except where values have to be computed (causal attention is unpacked, heads
are repeated, scattered tokens are gathered). Torch tensors, asked for with `torch=True`, are copies. Nothing here
imports torch until then, and nothing knows models.

A sample of several choices (encoders on multiple-choice questions) holds them one after the other along T. `choice`
picks one, which then reads as a sample of its own: its T is the choice's, positions count from its start.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from tracekit.errors import ConfigError, CorruptShardError, DatasetError, SampleNotFoundError
from tracekit.read.byte_ranges import (
    SampleRow,
    StoredTensor,
    choice_number,
    extent_of,
    find_place,
    layers_of,
    num_query_heads,
)
from tracekit.read.graphs import Graph, attention_edges
from tracekit.read.index import Folder, ShardBytes
from tracekit.read.remote import ByteRange, RemoteShards
from tracekit.read.rows import Rows
from tracekit.read.stacking import (
    Selected,
    TokenMarks,
    Tokens,
    check_choice_tokens,
    expand_heads,
    head_number,
    is_single,
    one_choice,
    stack_layers,
    take_head,
    take_rows,
    take_single,
    token_positions,
)
from tracekit.records import Record, decode_record
from tracekit.storage import spread, upscale
from tracekit.tensors import TensorSpec, choice_spans, positions_of

__all__ = ["Accessors", "Array", "handed_out"]

Array: TypeAlias = Any
"""np.ndarray, or torch.Tensor with `torch=True`."""

_QKV = {"q": "queries", "k": "keys", "v": "values"}
_STAGES = ("embed", "pre_attn", "post_attn", "post_mlp")


class Accessors:
    """Reads samples of opened rows; `TraceStore` is one, and `Sample` has its methods without their `key`."""

    def __init__(self, rows: Rows, folder_of: Mapping[Path, Folder]) -> None:
        self._rows = rows
        self._folder_of = folder_of
        self._bytes_of: dict[Path, ShardBytes] = {shard: folder.bytes_of for shard, folder in folder_of.items()}

    def record(self, key: str) -> Record:
        """The typed record of a sample, from its shard; where that is not here, from the record table.

        Raises:
            SampleNotFoundError: no such key.
            CorruptShardError: the shard does not hold this record where the index says.
        """
        record: Record = self._record_as(self._row(key), self._folder_of[self._row(key).shard].record_type)
        return record

    def record_fields(self, key: str) -> dict[str, Any]:
        """The fields of a sample's record as they are stored, those that the installed task does not know included.

        Raises: as `record`.
        """
        fields: dict[str, Any] = msgspec.to_builtins(
            self._record_as(self._row(key), self._folder_of[self._row(key).shard].schema.strict_type)
        )
        return fields

    def _record_as(self, row: SampleRow, struct: type[Any]) -> Any:
        """The record of a row, decoded and checked as this type."""
        key = row.key
        if isinstance(self._bytes_of[row.shard], RemoteShards) or not row.shard.exists():
            fields = self._rows.record_fields(key)
            assert fields["key"] == key, (fields["key"], key)
            try:
                return msgspec.convert(fields, struct)
            except msgspec.ValidationError as error:
                raise DatasetError(
                    f"{row.shard}: sample {key!r}: its row is no record: {error}. Run `tracekit verify` on the dataset"
                ) from error
        raw = self._read(row, row.json_offset, row.json_size)
        record = decode_record(raw, struct, where=f"{row.shard}: record {key!r}")
        if record.key != key:
            raise CorruptShardError(
                f"{row.shard}: found the record of {record.key!r}, the index says it is {key!r}. "
                "Run `tracekit verify` on the dataset"
            )
        return record

    def tensor(
        self,
        key: str,
        site: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        choice: int | None = None,
        tokens: Tokens = None,
        expand_heads: bool = False,
        torch: bool = False,
    ) -> Array:
        """One site of one sample, dtype as stored; axes as in tracekit.sites, attention always as (.., T_query, T).

        Args:
            key: Key of the sample.
            site: Name of the site.
            layer: Layer number; -1 is the last stored one. Takes the layer axis away.
            head: Head number. Takes the head axis away. With `expand_heads` counted as the queries' heads are.
            choice: Number of a choice, negative from the end, where the sample has several: T is then the choice's.
            tokens: Which tokens (attention: query rows), see tracekit.read.stacking. A single one takes the axis away.
            expand_heads: Repeat grouped key/value heads so that there are as many as the queries have.
            torch: Hand back a torch tensor, bfloat16 kept.

        Returns:
            The array. Of a site whose shapes differ by layer and without `layer`: a list of them, one a layer. Of a
            sample of several choices and without `choice`: all of them one after the other along T, as stored; of
            attention, where each is a matrix of its own, a list of arrays, one a choice.

        Raises:
            SampleNotFoundError: no such key, site, layer, head, choice or token; the message says what is stored.
            ConfigError: `head`, `layer`, `choice` or named tokens where there are none.
            DatasetError: the shard is missing, or `expand_heads` where the number of heads is not stored.
            CorruptShardError: the shard is cut short, or its bytes are not those of their checksums: these are checked
                where they are fetched, and in a folder with `check=True`.
        """
        row = self._row(key)
        if layer is None and site not in row.tensors and layers_of(row, site):
            options: Any = {"head": head, "choice": choice, "tokens": tokens}
            options |= {"expand_heads": expand_heads, "torch": torch}
            return [self.tensor(key, site, layer=one, **options) for one in layers_of(row, site)]
        spec = find_place(row, site, layer).stored.spec
        if choice is None and spec.choice_offsets and spec.layout == "full":
            options = {"layer": layer, "head": head, "tokens": tokens, "torch": torch}
            return [self.tensor(key, site, choice=one, **options) for one in range(len(spec.choice_offsets) - 1)]
        selected = self._select(row, site, layer=layer, head=head, choice=choice, tokens=tokens, expand=expand_heads)
        return handed_out((take_single(selected) if is_single(tokens) else selected).array, torch)

    def tensors(self, key: str) -> dict[str, np.ndarray]:
        """Every tensor of a sample by its stored name, in its stored form: attention causal, sparse or of choices
        packed, values of few bits beside their scales (`tracekit.storage.unpacked` takes `record.tensors` and these).

        `tensor` hands attention back as (L, H, T_query, T). Read-only, nothing is copied.
        Raises: as `tensor`.
        """
        row = self._row(key)
        found: dict[str, np.ndarray] = {}
        for name, one in row.tensors.items():
            found[name] = self._bytes(row, one)
            found |= {f"{name}.{suffix}": self._bytes(row, two) for suffix, two in one.companions.items()}
        return found

    def hidden_states(
        self,
        key: str,
        *,
        layer: int | None = None,
        choice: int | None = None,
        tokens: Tokens = None,
        torch: bool = False,
    ) -> Array:
        """Hidden states (L+1, T, D), as `output_hidden_states=True` gives them; with `layer` (T, D), 0 the embeddings.

        Raises and further arguments: as `tensor`.
        """
        return self.tensor(key, "hidden_states", layer=layer, choice=choice, tokens=tokens, torch=torch)

    def attention(
        self,
        key: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        choice: int | None = None,
        tokens: Tokens = None,
        torch: bool = False,
    ) -> Array:
        """Attention probabilities (L, H, T_query, T); with `layer` (H, T_query, T), with `head` too (T_query, T).

        T_query are the query rows that were kept, all T of them unless the run chose fewer. Of several choices, name
        one with `choice`; without, you get a list, one array a choice.
        Raises and further arguments: as `tensor`.
        """
        return self.tensor(key, "attentions", layer=layer, head=head, choice=choice, tokens=tokens, torch=torch)

    def attention_mass(
        self,
        key: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        tokens: Tokens = None,
        torch: bool = False,
    ) -> Array:
        """What is left of each row of sparse attention (`--attention-top-p`): the sum of the weights that were kept.

        (L, H, T_query) float32, where heads differ by layer a list of them; with `layer` (H, T_query), with `head` too
        (T_query,).
        Raises and further arguments: as `tensor`; SampleNotFoundError where attention is stored whole.
        """
        row = self._row(key)
        if layer is None and "attentions" not in row.tensors and (layers := layers_of(row, "attentions")):
            return [self.attention_mass(key, layer=one, head=head, tokens=tokens, torch=torch) for one in layers]
        place = find_place(row, "attentions", layer)
        mass = place.stored.companions.get("mass")
        if mass is None:
            raise SampleNotFoundError(f"sample {key!r} stores its attention whole; each row's mass is its sum")
        array = self._bytes(row, mass, place.entry)
        axes = "".join(mass.spec.axes)[0 if place.entry is None else 1 :]
        selected = Selected(array, axes, place.layers, f"mass of attentions of sample {key!r}")
        if head is not None:
            selected = take_head(selected, head)
        selected = _at_tokens(selected, mass.spec, row.marks, tokens)
        return handed_out((take_single(selected) if is_single(tokens) else selected).array, torch)

    def qkv(
        self,
        key: str,
        which: Literal["q", "k", "v"],
        *,
        layer: int | None = None,
        head: int | None = None,
        choice: int | None = None,
        tokens: Tokens = None,
        expand_heads: bool = False,
        torch: bool = False,
    ) -> Array:
        """Queries (L, H, T, E), keys or values (L, K, T, E; with `expand_heads` L, H, T, E), after rotary embedding.

        Raises and further arguments: as `tensor`.
        """
        if which not in _QKV:
            raise ConfigError(f"no {which!r} in qkv, expected {', '.join(_QKV)}")
        options: Any = {"layer": layer, "head": head, "choice": choice, "tokens": tokens}
        return self.tensor(key, _QKV[which], **options, expand_heads=expand_heads, torch=torch)

    def resid(
        self,
        key: str,
        stage: Literal["embed", "pre_attn", "post_attn", "post_mlp"] = "post_mlp",
        *,
        layer: int | None = None,
        choice: int | None = None,
        tokens: Tokens = None,
        torch: bool = False,
    ) -> Array:
        """Residual stream (L, T, D) at one place in the blocks; `embed` is (T, D) and has no layers.

        Raises and further arguments: as `tensor`.
        """
        if stage not in _STAGES:
            raise ConfigError(f"no stage {stage!r} in the residual stream, expected {', '.join(_STAGES)}")
        return self.tensor(key, f"resid_{stage}", layer=layer, choice=choice, tokens=tokens, torch=torch)

    def graph(
        self,
        key: str,
        layer: int,
        *,
        heads: Literal["mean"] | int = "mean",
        choice: int | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        torch: bool = False,
    ) -> Graph:
        """One layer's attention as a graph over the sample's tokens, see tracekit.read.graphs.

        Args:
            key: Key of the sample.
            layer: Layer number; -1 is the last stored one.
            heads: Mean over all heads, or one head's number.
            choice: Number of a choice, negative from the end; needed where the sample has several.
            top_k: Keep the strongest edges of each query token.
            threshold: Keep edges of at least this weight.
            torch: Hand back torch tensors.

        Raises:
            SampleNotFoundError: no such key, layer, head or choice, or no attention was stored.
            ConfigError: `heads`, `choice` or `top_k` is not what it may be.
        """
        if isinstance(heads, str) and heads != "mean":
            raise ConfigError(f"heads is {heads!r}, expected 'mean' or the number of a head")
        row = self._row(key)
        stored = find_place(row, "attentions", layer).stored
        weights = self._select(
            row, "attentions", layer=layer, head=None if heads == "mean" else int(heads), choice=choice
        )
        matrix_QT = weights.array.astype(np.float32).mean(axis=0) if heads == "mean" else weights.array
        tokens, num_nodes = self.record(key).tokens, matrix_QT.shape[1]
        positions = positions_of(stored.spec.positions)
        if choice is not None:
            start, stop = stored.spec.choice_offsets[choice_number(stored, choice, where=weights.where) :][:2]
            tokens, positions = tokens[start:stop], np.arange(num_nodes)
        edges = attention_edges(matrix_QT, positions, top_k=top_k, threshold=threshold)
        x = self._inputs_of(row, weights.layers[0], choice, num_nodes)
        return Graph(
            edge_index=handed_out(edges.edge_index, torch),
            edge_weight=handed_out(edges.edge_weight, torch),
            x=None if x is None else handed_out(x, torch),
            num_nodes=num_nodes,
            tokens=tokens,
            layer=weights.layers[0],
        )

    def graphs(
        self,
        key: str,
        *,
        heads: Literal["mean"] | int = "mean",
        choice: int | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        torch: bool = False,
    ) -> Iterator[Graph]:
        """The graph of every layer whose attention is stored, first to last; arguments as `graph`."""
        layers = layers_of(self._row(key), "attentions")
        options: Any = {"heads": heads, "choice": choice, "top_k": top_k, "threshold": threshold, "torch": torch}
        return (self.graph(key, layer, **options) for layer in layers)

    def _inputs_of(self, row: SampleRow, layer: int, choice: int | None, num_tokens: int) -> np.ndarray | None:
        """`hidden_states[layer]` (T, D); None where it is not stored for every token."""
        if "hidden_states" not in row.tensors or layer not in row.tensors["hidden_states"].spec.layers:
            return None
        values_TD = self._select(row, "hidden_states", layer=layer, choice=choice).array
        return values_TD if len(values_TD) == num_tokens else None

    def _num_choices(self, row: SampleRow, site: str) -> int:
        """How many choices a site of a sample holds; 0 where it knows none."""
        layers = layers_of(row, site)
        spec = find_place(row, site, layers[0] if layers else None).stored.spec
        return max(len(spec.choice_offsets) - 1, 0)

    def _select_layers(
        self,
        row: SampleRow,
        site: str,
        layer: int | Sequence[int] | None,
        *,
        choice: int | None = None,
        tokens: Tokens = None,
    ) -> Selected:
        """As `_select`; of several layers, these with a layer axis."""
        if layer is None or isinstance(layer, int | np.integer):
            return self._select(row, site, layer=layer, choice=choice, tokens=tokens)
        return stack_layers([self._select(row, site, layer=one, choice=choice, tokens=tokens) for one in layer])

    def _select(
        self,
        row: SampleRow,
        site: str,
        *,
        layer: int | np.integer | None = None,
        head: int | None = None,
        choice: int | None = None,
        tokens: Tokens = None,
        expand: bool = False,
    ) -> Selected:
        """What was asked for of one tensor, its token axis still there."""
        place = find_place(row, site, None if layer is None else int(layer))
        spec, where = place.stored.spec, f"{site} of sample {row.key!r}"
        number = None if choice is None else choice_number(place.stored, choice, where=where)
        num_heads = num_query_heads(row, place) if expand and "K" in spec.axes else None
        only = None
        if head is not None and place.entry is not None and _is_by_head(place.stored):
            only = head_number(place.stored.spec.shape[1], head, num_heads=num_heads, where=where)
        view = self._view(row, place.stored, place.entry, only, number)
        selected = view._replace(layers=place.layers, where=where)
        marks = row.marks
        if spec.choice_offsets:
            check_choice_tokens(tokens, where=where)
            if number is not None:
                selected, spec = one_choice(selected, spec, number)
                marks = marks._replace(num_tokens=spec.positions[0][1])
            elif spec.layout == "full":
                count = len(spec.choice_offsets) - 1
                raise ConfigError(f"{where} holds {count} choices; choose one with `choice`, 0 to {count - 1}")
        if head is not None:
            selected = take_head(selected, 0) if only is not None else take_head(selected, head, num_heads=num_heads)
        selected = _at_tokens(selected, spec, marks, tokens)
        return expand_heads(selected, num_heads=num_heads) if num_heads and head is None else selected

    def _view(
        self,
        row: SampleRow,
        stored: StoredTensor,
        entry: int | None,
        head: int | None = None,
        choice: int | None = None,
    ) -> Selected:
        """A tensor, or one entry of its first axis, or a head or a choice of that; over the shard's own memory where it
        is stored as it is handed out."""
        layers = stored.spec.layers
        if stored.layout == "sparse":
            axes = "".join(stored.spec.axes)[0 if entry is None else 1 :]
            return Selected(self._spread(row, stored, entry), axes, layers, row.key)
        extent = extent_of(stored, entry=entry, head=head, choice=choice)
        data = self._read(row, extent.start, extent.num_bytes)
        array = np.ndarray(extent.shape, stored.dtype, data)
        array = array[extent.cut] if extent.cut else array
        if stored.layout == "scaled":
            scales, of_tokens = (self._bytes(row, one, entry) for one in stored.companions.values())
            span = slice(None) if choice is None else choice_spans(stored.spec)[choice]
            array = upscale(array, scales, of_tokens[..., span])
        return Selected(array, extent.axes, layers, row.key)

    def _spread(self, row: SampleRow, stored: StoredTensor, entry: int | None) -> np.ndarray:
        """Sparse attention with zeros where nothing was kept; of one entry, only its weights are read."""
        counts = self._bytes(row, stored.companions["counts"])
        weights, indices = (
            np.ndarray(
                ((one.stop - one.start) // dtype.itemsize,), dtype, self._read(row, one.start, one.stop - one.start)
            )
            for one, dtype in self._kept_ranges(row, stored, entry)
        )
        try:
            return spread(weights, indices, counts if entry is None else counts[entry], stored.spec.num_keys)
        except CorruptShardError as error:
            raise self._damaged(row, stored, str(error)) from error

    def _kept_ranges(self, row: SampleRow, stored: StoredTensor, entry: int | None) -> list[tuple[ByteRange, np.dtype]]:
        """Where the weights of one entry of sparse attention lie, and their keys; of all entries without one."""
        start, stop = 0, stored.stored_shape[0]
        if entry is not None:
            counts = self._bytes(row, stored.companions["counts"])
            stops = counts.sum((1, 2), dtype=np.int64).cumsum()
            if stops[-1] != stop:
                raise self._damaged(row, stored, f"{stops[-1]} weights are counted, {stop} are there")
            start, stop = int(stops[entry - 1]) if entry else 0, int(stops[entry])
        return [
            (ByteRange(row.shard, one.start + start * size, one.start + stop * size), one.dtype)
            for one in (stored, stored.companions["indices"])
            for size in (one.dtype.itemsize,)
        ]

    def _damaged(self, row: SampleRow, stored: StoredTensor, what: str) -> CorruptShardError:
        return CorruptShardError(
            f"{row.shard}: {stored.spec.name} of sample {row.key!r}: {what}. Run `tracekit verify` on the dataset"
        )

    def _bytes(self, row: SampleRow, stored: StoredTensor, entry: int | None = None) -> np.ndarray:
        """A tensor as it is stored, or one entry of its first axis, over the shard's own memory."""
        shape, start, num_bytes = stored.stored_shape, stored.start, stored.num_bytes
        if entry is not None:
            num_bytes //= shape[0]
            shape, start = shape[1:], start + entry * num_bytes
        return np.ndarray(shape, stored.dtype, self._read(row, start, num_bytes))

    def _read(self, row: SampleRow, start: int, num_bytes: int) -> memoryview:
        """Bytes of a sample in its shard."""
        return self._bytes_of[row.shard].view(row.shard, start, num_bytes, row.pieces)

    def _row(self, key: str) -> SampleRow:
        return self._rows.row(key)


def _at_tokens(selected: Selected, spec: TensorSpec, marks: TokenMarks, tokens: Tokens) -> Selected:
    """The values at these tokens, their axis still there; packed attention unpacked."""
    is_whole = tokens is None or (isinstance(tokens, str) and tokens == "all")
    return take_rows(selected, spec, None if is_whole else token_positions(marks, tokens, where=selected.where))


def _is_by_head(stored: StoredTensor) -> bool:
    """Whether a head of one layer can be read alone: its bytes lie together, and need no companion."""
    return stored.spec.axes[1:2] in (["H"], ["K"]) and not stored.companions


def handed_out(values: np.ndarray, torch: bool) -> Array:
    """An array as it is, or as a torch tensor; never a tensor over a mapped shard, where writing to it would crash."""
    if not torch:
        return values
    import torch as pytorch

    array = np.ascontiguousarray(values) if values.flags.writeable else values.copy()
    wide = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8}.get(str(array.dtype))
    if wide is None:
        return pytorch.from_numpy(array)
    return pytorch.from_numpy(array.view(wide)).view(getattr(pytorch, str(array.dtype)))
