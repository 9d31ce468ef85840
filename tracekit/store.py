"""TraceStore: random access to a dataset folder, as arrays that share the shards' memory.

    with TraceStore("traces/my-run") as store:
        sample = store[0]                                    # or store["000042"]
        sample.record.tokens                                 # the typed record
        sample.hidden_states(layer=12)                       # (T, D)
        sample.attention(layer=3, head=0)                    # (T, T)
        store.stack("hidden_states", layer=12).values        # (N, D) at the last prompt token

How a value is found:

    key -> row -> record table: shard, offsets, tensor entries -> bytes of one layer in the mapped shard -> array

A finished configuration is indexed from its Parquet files, an open one (a plan and sidecars, no manifest yet) from its
sidecars. Opening reads keys and offsets; tensor entries are read a row group at a time, when one of its samples is.

Arrays are read-only views of the shard, except where values have to be computed (causal attention is unpacked, heads
are repeated, scattered tokens are gathered). Views stay valid after `close`. Torch tensors, asked for with
`torch=True`, are copies. Nothing here imports torch until then, and nothing knows models or the Hub.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from tracekit.errors import ConfigError, CorruptShardError, DatasetError, SampleNotFoundError
from tracekit.graphs import Graph, attention_edges
from tracekit.hub import HubPath
from tracekit.index import (
    Row,
    Stored,
    find_place,
    layers_of,
    num_query_heads,
    open_folder,
    together,
)
from tracekit.manifest import SplitInfo, TensorSummary, Verification
from tracekit.records import RECORD_TYPES, ModelInfo, Record, decode_record
from tracekit.remote import ByteRange, RemoteShards
from tracekit.rows import Rows, ranges_of
from tracekit.stacking import (
    Selected,
    Stacked,
    Tokens,
    expand_heads,
    is_single,
    stack_samples,
    take_head,
    take_rows,
    take_single,
    token_positions,
)
from tracekit.tensors import positions_of

__all__ = ["Sample", "Split", "StoreInfo", "TraceStore", "handed_out"]

Array: TypeAlias = Any
"""np.ndarray, or torch.Tensor with `torch=True`."""

_QKV = {"q": "queries", "k": "keys", "v": "values"}
_STAGES = ("embed", "pre_attn", "post_attn", "post_mlp")


class Split(NamedTuple):
    """Keys of two sets of samples that share no question."""

    train: list[str]
    """Keys to fit on."""
    test: list[str]
    """Keys to test on."""


class StoreInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds."""

    paths: list[str]
    """The folders."""
    configs: list[str]
    """Configuration read of each folder."""
    task: str
    """Name of the task."""
    models: list[ModelInfo]
    """The models, each once."""
    splits: list[SplitInfo]
    """Splits."""
    num_samples: int
    """Samples."""
    num_bytes: int
    """Bytes of the shards."""
    tensors: list[TensorSummary]
    """What is stored of each sample."""
    verification: Verification
    """What replays showed while the data was made: the largest errors per site."""
    is_open: bool
    """True where the run is not finished: more samples may come."""


class TraceStore:
    """Reads one configuration of a dataset folder, or of several as one. Use as a context manager, or `close` it.

    Rows stand folder by folder, split by split, by key. A store can be pickled and used after a fork, so it can be
    given to the workers of a data loader.

    Raises:
        DatasetError: no such folder, no dataset, several configurations and none named, folders that do not go
            together, or files that contradict each other.
    """

    def __init__(
        self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], config: str | None = None
    ) -> None:
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        if not paths:
            raise DatasetError("no folder was given, expected at least one")
        self._paths, self._config = [HubPath.parse(str(one)) or Path(one) for one in paths], config
        self._folders = [open_folder(root, config) for root in self._paths]
        tasks = sorted({folder.task for folder in self._folders})
        if len(tasks) > 1:
            raise DatasetError(f"the folders hold different tasks ({', '.join(tasks)}); read them separately")
        self._bytes_of = {shard.path: folder.bytes_of for folder in self._folders for shard in folder.shards}
        self._rows = Rows(self._folders, where=", ".join(str(path) for path in self._paths))

    def __enter__(self) -> "TraceStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        pinned = [
            folder.bytes_of.path if isinstance(folder.bytes_of, RemoteShards) else path
            for folder, path in zip(self._folders, self._paths, strict=True)
        ]
        return TraceStore, ([str(path) for path in pinned], self._config)

    def __repr__(self) -> str:
        paths = ", ".join(str(path) for path in self._paths)
        return f"<TraceStore {paths}: {len(self)} samples{', open' if self.is_open else ''}>"

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator["Sample"]:
        return (Sample(self, key) for key in self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __getitem__(self, which: int | np.integer | str) -> "Sample":
        """Sample by key or by row (negative from the end).

        Raises:
            SampleNotFoundError: no such key or row.
        """
        if isinstance(which, str):
            self._rows.number(which)
            return Sample(self, which)
        if not -len(self) <= which < len(self):
            raise SampleNotFoundError(f"no sample {which}; the dataset has {len(self)} samples, counted from 0")
        return Sample(self, self.keys[which])

    def close(self) -> None:
        """Let go of all files. Arrays that were handed out stay valid; nothing more can be read."""
        self._rows.close()
        for folder in self._folders:
            folder.bytes_of.close()

    @property
    def is_open(self) -> bool:
        """True where a folder's run is not finished: what is there can be read, more may come."""
        return any(folder.is_open for folder in self._folders)

    @property
    def keys(self) -> list[str]:
        """Key of every sample, in row order. Not to be changed."""
        return self._rows.keys

    @cached_property
    def records(self) -> pa.Table:
        """The records of all samples as one table, in row order: every field of the record, no tensors. Read once."""
        return self._rows.table()

    def record(self, key: str) -> Record:
        """The typed record of a sample, from its shard; where that is not here, from the record table.

        Raises:
            SampleNotFoundError: no such key.
            CorruptShardError: the shard does not hold this record where the index says.
        """
        row = self._row(key)
        if isinstance(self._bytes_of[row.shard], RemoteShards) or not row.shard.exists():
            fields = self._rows.record_fields(key)
            assert fields["key"] == key, (fields["key"], key)
            return msgspec.convert(fields, RECORD_TYPES[fields["task"]])
        raw = self._bytes_of[row.shard].view(row.shard, row.json_offset, row.json_size)
        record = decode_record(raw, where=f"{row.shard}: record {key!r}")
        if record.key != key:
            raise CorruptShardError(
                f"{row.shard}: found the record of {record.key!r}, the index says it is {key!r}. "
                "Run `tracekit verify` on the dataset"
            )
        return record

    def by_prompt(self, text_or_sha256: str) -> list["Sample"]:
        """Samples with this prompt: the rendered prompt, the user's own text, or the SHA-256 (64 hex digits) of either.

        Raises:
            SampleNotFoundError: there is none.
        """
        digest = text_or_sha256.lower()
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            digest = hashlib.sha256(text_or_sha256.encode()).hexdigest()
        found = self._rows.with_prompt(digest)
        if not len(found):
            raise SampleNotFoundError(
                f"no sample with prompt {text_or_sha256[:80]!r} (SHA-256 {digest}); give the prompt exactly as in "
                "`record.prompt`, the user's own text, or the SHA-256 of either"
            )
        return [self[int(row)] for row in found]

    def shard(self, number: int, *, split: str | None = None) -> Iterator["Sample"]:
        """Samples of one shard in the order of its tar; of several folders, of each folder's shard in turn.

        Raises:
            ConfigError: the dataset has several splits and none was named.
            SampleNotFoundError: no such shard or split.
        """
        rows = self._rows.in_shard(number, split)
        return (self[row] for row in rows)

    def info(self) -> StoreInfo:
        """Summary: configurations, models, splits, sizes, stored tensors, proven errors."""
        folders = self._folders
        splits: dict[str, SplitInfo] = {}
        tensors: dict[tuple[str, str, str], TensorSummary] = {}
        for one in (split for folder in folders for split in folder.splits):
            before = splits.get(one.name, SplitInfo(name=one.name, num_samples=0, num_bytes=0))
            num_samples, num_bytes = before.num_samples + one.num_samples, before.num_bytes + one.num_bytes
            splits[one.name] = SplitInfo(name=one.name, num_samples=num_samples, num_bytes=num_bytes)
        for one in (tensor for folder in folders for tensor in folder.tensors):
            kind = (one.name, one.dtype, one.layout)
            num_bytes = one.num_bytes + (tensors[kind].num_bytes if kind in tensors else 0)
            tensors[kind] = msgspec.structs.replace(one, num_bytes=num_bytes)
        return StoreInfo(
            paths=[str(path) for path in self._paths],
            configs=[folder.config for folder in folders],
            task=folders[0].task,
            models=[one.model for i, one in enumerate(folders) if one.model not in [f.model for f in folders[:i]]],
            splits=list(splits.values()),
            num_samples=len(self),
            num_bytes=sum(shard.num_bytes for shard in self._rows.shards),
            tensors=list(tensors.values()),
            verification=together(folder.verification for folder in folders),
            is_open=self.is_open,
        )

    def tensor(
        self,
        key: str,
        site: str,
        *,
        layer: int | None = None,
        head: int | None = None,
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
            tokens: Which tokens (attention: query rows), see tracekit.stacking. A single one takes the axis away.
            expand_heads: Repeat grouped key/value heads so that there are as many as the queries have.
            torch: Hand back a torch tensor, bfloat16 kept.

        Returns:
            The array. Of a site whose shapes differ by layer and without `layer`: a list of them, one a layer.

        Raises:
            SampleNotFoundError: no such key, site, layer, head or token; the message says what is stored.
            ConfigError: `head` or `layer` for a site that has none.
            DatasetError: the shard is missing, or `expand_heads` where the number of heads is not stored.
            CorruptShardError: the shard is cut short.
        """
        row = self._row(key)
        if layer is None and site not in row.tensors and layers_of(row, site):
            options: Any = {"head": head, "tokens": tokens, "expand_heads": expand_heads, "torch": torch}
            return [self.tensor(key, site, layer=one, **options) for one in layers_of(row, site)]
        selected = self._select(row, site, layer=layer, head=head, tokens=tokens, expand=expand_heads)
        return handed_out((take_single(selected) if is_single(tokens) else selected).array, torch)

    def tensors(self, key: str) -> dict[str, np.ndarray]:
        """Every tensor of a sample by its stored name, in its stored form: causal attention packed (L, H, S).

        `tensor` hands attention back as (L, H, T_query, T). Read-only, nothing is copied.
        Raises: as `tensor`.
        """
        row = self._row(key)
        return {name: self._view(row, one, None) for name, one in row.tensors.items()}

    def hidden_states(self, key: str, *, layer: int | None = None, tokens: Tokens = None, torch: bool = False) -> Array:
        """Hidden states (L+1, T, D), as `output_hidden_states=True` gives them; with `layer` (T, D), 0 the embeddings.

        Raises and further arguments: as `tensor`.
        """
        return self.tensor(key, "hidden_states", layer=layer, tokens=tokens, torch=torch)

    def attention(
        self, key: str, *, layer: int | None = None, head: int | None = None, tokens: Tokens = None, torch: bool = False
    ) -> Array:
        """Attention probabilities (L, H, T_query, T); with `layer` (H, T_query, T), with `head` too (T_query, T).

        T_query are the query rows that were kept, all T of them unless the run chose fewer.
        Raises and further arguments: as `tensor`.
        """
        return self.tensor(key, "attentions", layer=layer, head=head, tokens=tokens, torch=torch)

    def qkv(
        self,
        key: str,
        which: Literal["q", "k", "v"],
        *,
        layer: int | None = None,
        head: int | None = None,
        tokens: Tokens = None,
        expand_heads: bool = False,
        torch: bool = False,
    ) -> Array:
        """Queries (L, H, T, E), keys or values (L, K, T, E; with `expand_heads` L, H, T, E), after rotary embedding.

        Raises and further arguments: as `tensor`.
        """
        if which not in _QKV:
            raise ConfigError(f"no {which!r} in qkv, expected {', '.join(_QKV)}")
        return self.tensor(
            key, _QKV[which], layer=layer, head=head, tokens=tokens, expand_heads=expand_heads, torch=torch
        )

    def resid(
        self,
        key: str,
        stage: Literal["embed", "pre_attn", "post_attn", "post_mlp"] = "post_mlp",
        *,
        layer: int | None = None,
        tokens: Tokens = None,
        torch: bool = False,
    ) -> Array:
        """Residual stream (L, T, D) at one place in the blocks; `embed` is (T, D) and has no layers.

        Raises and further arguments: as `tensor`.
        """
        if stage not in _STAGES:
            raise ConfigError(f"no stage {stage!r} in the residual stream, expected {', '.join(_STAGES)}")
        return self.tensor(key, f"resid_{stage}", layer=layer, tokens=tokens, torch=torch)

    def stack(
        self,
        site: str,
        keys: Sequence[str] | None = None,
        *,
        layer: int | None = None,
        tokens: Tokens = "last_prompt",
        torch: bool = False,
    ) -> Stacked:
        """One site of many samples as one array, with a mask.

        Shapes for a site (L, T, D); with `layer` the L is gone, attention has (H, T_query, T) in place of (T, D):

            one token ("last_prompt", "first_answer", "last_answer", 12)     values (N, L, D), mask (N,)
            "answer_mean": mean over the answer's tokens, float32            values (N, L, D), mask (N,)
            "all", "prompt", "answer", positions or a slice                  values (N, L, T_max, D), mask (N, T_max)

        The mask is False, and the value zero, where a sample does not have the token: an empty answer, or padding.

        Raises:
            SampleNotFoundError: no such key, site or layer, or a token that was not kept.
            DatasetError: samples whose shapes differ in more than tokens, or a site whose shapes differ by layer.
            ConfigError: no samples.
        """
        chosen = self.keys if keys is None else list(keys)
        is_mean = isinstance(tokens, str) and tokens == "answer_mean"
        wanted = "answer" if is_mean else tokens
        self.prefetch(chosen, sites=[site], layers=None if layer is None else [layer])
        samples = [self._select(self._row(key), site, layer=layer, tokens=wanted) for key in chosen]
        stacked = stack_samples(
            samples, list(chosen), reduce="mean" if is_mean else "single" if is_single(tokens) else "pad"
        )
        return stacked._replace(values=handed_out(stacked.values, torch), mask=handed_out(stacked.mask, torch))

    def prefetch(
        self,
        keys: Sequence[str] | None = None,
        *,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Of a published dataset, fetch what will be read next: many ranges at once, neighbours in one request.

        What is fetched is kept in the cache. Nothing to do for a local folder. `stack` does it by itself.

        Args:
            keys: Samples; all of them by default.
            sites: Sites; all that are stored by default. Those that a sample does not store are left out.
            layers: Layers; all by default.

        Raises:
            SampleNotFoundError: no such key or layer.
            HubError: the Hub cannot be reached.
        """
        ranges: dict[int, list[ByteRange]] = {}
        for key in self.keys if keys is None else keys:
            row = self._row(key)
            source = self._bytes_of[row.shard]
            if isinstance(source, RemoteShards):
                ranges.setdefault(id(source), []).extend(ranges_of(row, sites, layers))
        for folder in self._folders:
            folder.bytes_of.prefetch(ranges.get(id(folder.bytes_of), []))

    def split(self, *, test_size: float = 0.2, by: str = "question_id", seed: int = 0) -> Split:
        """Keys of a train and a test set; samples with the same value in column `by` are on the same side.

        The values are ordered by a hash of seed and value, and the first `test_size` of them (at least one, not all)
        are the test set: the same on every machine, and nearly the same after shards were added.

        Raises:
            ConfigError: no such column or one of lists, a test_size that is not between 0 and 1, or a single value.
        """
        if not 0 < test_size < 1:
            raise ConfigError(f"test_size is {test_size}, expected more than 0 and less than 1")
        plain = [field.name for field in self._rows.schema if not pa.types.is_nested(field.type)]
        if by not in plain:
            raise ConfigError(f"cannot split by {by!r}, expected a column of plain values: {', '.join(plain)}")
        values = self._rows.table([by])[by].to_pylist()
        unique = sorted(set(values), key=lambda value: hashlib.sha256(f"{seed}:{value}".encode()).digest())
        if len(unique) < 2:
            raise ConfigError(f"cannot split by {by!r}: all {len(values)} samples have the same value, {unique}")
        test = set(unique[: min(max(round(test_size * len(unique)), 1), len(unique) - 1)])
        sides: tuple[list[str], list[str]] = ([], [])
        for key, value in zip(self.keys, values, strict=True):
            sides[value in test].append(key)
        return Split(*sides)

    def graph(
        self,
        key: str,
        layer: int,
        *,
        heads: Literal["mean"] | int = "mean",
        top_k: int | None = None,
        threshold: float | None = None,
        torch: bool = False,
    ) -> Graph:
        """One layer's attention as a graph over the sample's tokens, see tracekit.graphs.

        Args:
            key: Key of the sample.
            layer: Layer number; -1 is the last stored one.
            heads: Mean over all heads, or one head's number.
            top_k: Keep the strongest edges of each query token.
            threshold: Keep edges of at least this weight.
            torch: Hand back torch tensors.

        Raises:
            SampleNotFoundError: no such key, layer or head, or no attention was stored.
            ConfigError: `heads` or `top_k` is not what it may be.
        """
        if isinstance(heads, str) and heads != "mean":
            raise ConfigError(f"heads is {heads!r}, expected 'mean' or the number of a head")
        row = self._row(key)
        spec = find_place(row, "attentions", layer).stored.spec
        weights = self._select(row, "attentions", layer=layer, head=None if heads == "mean" else int(heads))
        matrix_QT = weights.array.astype(np.float32).mean(axis=0) if heads == "mean" else weights.array
        edges = attention_edges(matrix_QT, positions_of(spec.positions), top_k=top_k, threshold=threshold)
        x = self._inputs_of(row, weights.layers[0], spec.num_keys)
        return Graph(
            edge_index=handed_out(edges.edge_index, torch),
            edge_weight=handed_out(edges.edge_weight, torch),
            x=None if x is None else handed_out(x, torch),
            num_nodes=spec.num_keys,
            tokens=self.record(key).tokens,
            layer=weights.layers[0],
        )

    def graphs(
        self,
        key: str,
        *,
        heads: Literal["mean"] | int = "mean",
        top_k: int | None = None,
        threshold: float | None = None,
        torch: bool = False,
    ) -> Iterator[Graph]:
        """The graph of every layer whose attention is stored, first to last; arguments as `graph`."""
        layers = layers_of(self._row(key), "attentions")
        return (self.graph(key, layer, heads=heads, top_k=top_k, threshold=threshold, torch=torch) for layer in layers)

    def _inputs_of(self, row: Row, layer: int, num_tokens: int) -> np.ndarray | None:
        """`hidden_states[layer]` (T, D); None where it is not stored for every token."""
        if "hidden_states" not in row.tensors or layer not in row.tensors["hidden_states"].spec.layers:
            return None
        values_TD = self._select(row, "hidden_states", layer=layer).array
        return values_TD if len(values_TD) == num_tokens else None

    def _select(
        self,
        row: Row,
        site: str,
        *,
        layer: int | None = None,
        head: int | None = None,
        tokens: Tokens = None,
        expand: bool = False,
    ) -> Selected:
        """What was asked for of one tensor, its token axis still there."""
        place = find_place(row, site, layer)
        spec = place.stored.spec
        axes = "".join(spec.axes if place.entry is None else spec.axes[1:])
        array = self._view(row, place.stored, place.entry)
        selected = Selected(array, axes, place.layers, f"{site} of sample {row.key!r}")
        num_heads = num_query_heads(row, place) if expand and "K" in axes else None
        if head is not None:
            selected = take_head(selected, head, num_heads=num_heads)
        if tokens is None or (isinstance(tokens, str) and tokens == "all"):
            positions = None
        else:
            positions = token_positions(row.marks, tokens, where=selected.where)
        selected = take_rows(selected, spec, positions)
        return expand_heads(selected, num_heads=num_heads) if num_heads and head is None else selected

    def _view(self, row: Row, stored: Stored, entry: int | None) -> np.ndarray:
        """A stored tensor, or one entry of its first axis, over the shard's own memory."""
        shape, start, num_bytes = stored.spec.shape, stored.start, stored.num_bytes
        if entry is not None:
            num_bytes //= shape[0]
            shape, start = shape[1:], start + entry * num_bytes
        return np.ndarray(shape, stored.dtype, self._bytes_of[row.shard].view(row.shard, start, num_bytes))

    def _row(self, key: str) -> Row:
        return self._rows.row(key)


P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def _of_sample(
    method: Callable[Concatenate[TraceStore, str, P], ResultT],
) -> "Callable[Concatenate[Sample, P], ResultT]":
    """A store's method for one key, as a method of the sample."""

    @wraps(method)
    def bound(self: "Sample", /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return method(self._store, self.key, *args, **kwargs)

    return bound


class Sample:
    """One sample of a store: its key, its record, and the store's accessors without their `key` argument."""

    def __init__(self, store: TraceStore, key: str) -> None:
        self._store = store
        self.key = key

    def __repr__(self) -> str:
        return f"<Sample {self.key!r}>"

    @cached_property
    def record(self) -> Record:
        """The typed record, read from the shard when first asked for."""
        return self._store.record(self.key)

    tensor = _of_sample(TraceStore.tensor)
    tensors = _of_sample(TraceStore.tensors)
    hidden_states = _of_sample(TraceStore.hidden_states)
    attention = _of_sample(TraceStore.attention)
    qkv = _of_sample(TraceStore.qkv)
    resid = _of_sample(TraceStore.resid)
    graph = _of_sample(TraceStore.graph)
    graphs = _of_sample(TraceStore.graphs)


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
