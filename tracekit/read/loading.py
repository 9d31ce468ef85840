"""Loading for training: a dataset as `datasets` objects whose rows hold arrays, and a decoder for `webdataset`.

    ds = tracekit.load_dataset("traces/my-run", split="train")              # or "owner/name", "hf://datasets/owner/name@v1"
    ds[0]["prompt"], ds[0]["hidden_states"]                                 # str, (L+1, T, D) with its own dtype
    ds.select_columns(["is_correct", "hidden_states"]).shuffle(seed=0)      # what is not selected is not read

    wds.WebDataset("data/capitals/train-{00000..00003}.tar").decode(tracekit.wds_decoder())

A row is flat: the record's fields, then one column a site. Map-style, the records are an Arrow table mapped from the
cache of `datasets`, and a site's column holds the sample's key there; the format puts the tensor in its place when a
row is read:

    Arrow    | key      | prompt   | ... | hidden_states | attentions |
             | "000042" | "What?"  |     | "000042"      | "000042"   |
    row        "000042"   "What?"         (L+1, T, D)     (L, H, T, T)      read by TraceStore, in this process

Streaming, each shard is read in the order of its tar, and shards are what `datasets` deals to workers and nodes.

Nothing here imports torch before it is asked for; `datasets` does it when it streams, where torch is installed.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from tracekit.errors import UNREADABLE, ConfigError, CorruptShardError, DatasetError, HubError, SampleNotFoundError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, ShardInfo, read_manifest, read_plan, read_schema
from tracekit.format.shards import sha256_file, size_fault
from tracekit.hub import HubPath, fetch
from tracekit.read.accessors import handed_out
from tracekit.read.remote import open_remote
from tracekit.read.store import TraceStore
from tracekit.sites import GROUPS
from tracekit.storage import plain_spec, upscale
from tracekit.tensors import TensorSpec, decode, is_companion, site_of

if TYPE_CHECKING:
    import datasets

__all__ = ["load_dataset", "wds_decoder"]

_PREFETCHED_SAMPLES = 8
"""Samples of a remote shard that are asked for together: enough to merge ranges, and small beside a shard."""


class _Source(NamedTuple):
    """A configuration that can be loaded."""

    hub: HubPath | None
    """Where it is on the Hub, at a commit; None for a folder."""
    layout: Layout
    """Its paths; of one on the Hub, those of the local copy, which has everything but the shards."""
    manifest: Manifest
    """What it holds."""


class _Columns(NamedTuple):
    """What a row holds."""

    columns: tuple[str, ...]
    """Its columns, in order."""
    fields: tuple[str, ...]
    """Those that are fields of the record."""
    sites: tuple[str, ...]
    """Those that are tensors."""
    layered: frozenset[str]
    """Sites with a layer axis."""
    ragged: frozenset[str]
    """Sites whose shapes differ by layer: stored, and handed back, one array a layer."""
    layers: tuple[int, ...] | None
    """Layers to keep, negative from the end; None keeps all."""
    torch: bool
    """Whether tensors are torch's."""


def load_dataset(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    columns: str | Sequence[str] | None = None,
    sites: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    torch: bool = False,
) -> "datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict":
    """Load a configuration of a finished dataset, each sample one flat row: its record's fields and its tensors.

    A tensor stands under its site's name, shaped as `TraceStore.tensor` gives it (attention (L, H, T_query, T)) and
    with the dtype it is stored in; of a site whose shapes differ by layer, a list of arrays. Several choices stand one
    after the other along T, split at the `choice_offsets` in `tensors`; their attention is a list of arrays
    (L, H, T_c, T_c), one a choice, and described as stored. The layer axis stays also where one layer is chosen. The
    row's `tensors` describes the tensors of the row, after selection. Arrays may be read-only views of a shard; torch
    tensors are copies.

    Samples differ in length, so a DataLoader needs a `collate_fn` (`list`, to begin with) and, for torch to take its
    rows, `torch=True`. One column of all rows is
    `ds.select_columns(["is_correct"])["is_correct"]`: without `select_columns`, `datasets` decodes whole rows for it.

    Args:
        path: Folder of a dataset, or on the Hub `owner/name`, `owner/name@v1.0.0`, `hf://datasets/owner/name@v1.0.0`.
            A folder that exists comes first.
        name: Configuration; may be left out where there is one. `<configuration>_records` gives the records alone.
        split: Split; None gives all of them, as a dict.
        revision: Tag, branch or commit on the Hub, in place of one in `path`.
        streaming: Read shard after shard as an `IterableDataset`. From the Hub by byte ranges, nothing is downloaded
            whole; map-style, the shards of the splits asked for are downloaded first. Either way bytes from the Hub are
            checked against their checksums when they are read.
        columns: Fields and sites of a row, in this order; None keeps all. Sites named in `sites` are kept as well.
        sites: Sites of a row, or groups (`hidden attn qkv resid topk none`); None keeps those in `columns`.
        layers: Layers of the sites that have layers, in this order, negative from the end; only these are read.
        torch: Hand back torch tensors, bfloat16 kept, in place of numpy arrays.

    Returns:
        `Dataset`, or with `streaming` `IterableDataset`; without `split` a dict of them.

    Raises:
        ConfigError: no such split, column or site, or `datasets` is not installed.
        DatasetError: no such dataset, several configurations and none named, one that is not finished, or a shard that
            is missing.
        CorruptShardError: a shard is cut, or holds other samples than the manifest says.
        SampleNotFoundError: a layer that is not stored.
        HubError: the Hub has no such dataset, or cannot be reached.
    """
    hf = _import_datasets()
    source, is_records = _open_named(path, name, revision)
    choice = _choose(
        source,
        columns=[columns] if isinstance(columns, str) else columns,
        sites=[] if is_records else [sites] if isinstance(sites, str) else sites,
        layers=[layers] if isinstance(layers, int) else layers,
        torch=torch,
    )
    known = [one.name for one in source.manifest.splits]
    if split is not None and split not in known:
        raise ConfigError(
            f"no split {split!r} in configuration {source.layout.config!r}; splits: {', '.join(known)}. For a part of "
            "one, use `.select(range(10))`, or `.take(10)` when streaming"
        )
    load = _streamed if streaming else _mapped
    if split is not None:
        return load(source, split, choice)
    loaded = {one: load(source, one, choice) for one in known}
    return hf.IterableDatasetDict(loaded) if streaming else hf.DatasetDict(loaded)


def wds_decoder(*, torch: bool = False) -> Callable[[str, bytes], Any]:
    """Decoder of samples for `wds.WebDataset(urls).decode(tracekit.wds_decoder())`.

    `sample["json"]` becomes a dict, `sample["safetensors"]` a dict of read-only arrays by name, dtype kept; values of
    few bits are multiplied with their scales, float32. Causal, sparse and choices' attention stays packed, since a
    member knows nothing of its neighbour (`tracekit.storage.spread` unpacks the sparse); the record has what is needed:

        spec = next(one for one in sample["json"]["tensors"] if one["name"] == "attentions")  # layout "causal"
        rows = tracekit.tensors.positions_of(spec["positions"])
        tracekit.tensors.unpack_causal(sample["safetensors"]["attentions"], rows, spec["num_keys"])

    Every other member is refused, so that none reaches webdataset's own decoders, which run pickle. A compressed one
    (`.json.gz`) is decompressed by webdataset before any decoder is asked and counts as what it then is (`.json`);
    `.decode(tracekit.wds_decoder(), pre=[])` refuses it as it is.

    Args:
        torch: Hand back torch tensors, bfloat16 kept; they are copies.

    Raises:
        CorruptShardError: another member, JSON that is no object, or a payload that is cut. webdataset raises its
            DecodingError from it, with key and address of the sample.
    """
    return partial(_decode_member, torch=torch)


def _decode_member(name: str, data: bytes, *, torch: bool) -> dict[str, Any]:
    """One member of a sample; `name` is a dot and what follows the key."""
    if name == ".json":
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except UNREADABLE as error:
            raise CorruptShardError(f"a member <key>.json is not a record: {error}") from error
    if name == ".safetensors":
        arrays = decode(data, where="member <key>.safetensors")
        for name in [name for name in arrays if {f"{name}.scales", f"{name}.token_scales"} <= arrays.keys()]:
            scales, of_tokens = arrays.pop(f"{name}.scales"), arrays.pop(f"{name}.token_scales")
            try:
                arrays[name] = upscale(arrays[name], scales, of_tokens)
            except CorruptShardError as error:
                raise CorruptShardError(f"a member <key>.safetensors: {name}: {error}") from error
        return {site: handed_out(array, torch) for site, array in arrays.items()}
    raise CorruptShardError(
        f"a sample has a member <key>{name}; expected <key>.json and <key>.safetensors, and nothing else. It was not "
        "decoded: this is no shard of tracekit, or something was put into it"
    )


# ---------------------------------------------------------------- what there is


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"load_dataset needs the package `datasets` ({error}): pip install 'tracekit-llm[run]'. TraceStore reads a "
            "dataset without it"
        ) from error
    return datasets


def _open_named(path: str | os.PathLike[str], name: str | None, revision: str | None) -> tuple[_Source, bool]:
    """A configuration, and whether it was named by its records, as the card does (`capitals_records`)."""
    base = (name or "").removesuffix("_records")
    if name is None or base == name:
        return _open_source(path, name, revision), False
    try:
        return _open_source(path, name, revision), False
    except DatasetError:
        return _open_source(path, base, revision), True


def _open_source(path: str | os.PathLike[str], name: str | None, revision: str | None) -> _Source:
    """Find a finished configuration, here or on the Hub."""
    hub = _on_hub(path)
    if hub is not None:
        try:
            remote = open_remote(hub.at(revision), name)
        except HubError as error:
            if str(path).startswith("hf:"):
                raise
            raise type(error)(f"{error}. If a folder is meant: {str(path)!r} is none here") from error
        layout = Layout(remote.root, remote.config)
        return _Source(remote.path, layout, read_manifest(layout))
    if revision is not None:
        raise ConfigError(f"revision is {revision!r}, but {str(path)!r} is a folder; only the Hub has revisions")
    root = Path(path).absolute()
    with TraceStore(root, name) as store:
        info = store.info()
    layout = Layout(root, info.configs[0])
    if info.is_open:
        task = read_plan(layout).task
        raise DatasetError(
            f"{root}: configuration {layout.config!r} is not finished: {info.num_samples} samples so far, no "
            f"{layout.manifest.relative_to(root)}. To finish it, run the command that began it again: `python -m "
            f"builders.{task} --out {root} ...` with the same flags. TraceStore reads what is there"
        )
    return _Source(None, layout, read_manifest(layout))


def _on_hub(path: str | os.PathLike[str]) -> HubPath | None:
    """Where a path is on the Hub; None for a folder."""
    if not isinstance(path, str) or Path(path).is_dir():
        return None
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", path, re.ASCII)
    return HubPath.parse(f"hf://datasets/{path}" if is_name else path)


def _choose(
    source: _Source,
    *,
    columns: Sequence[str] | None,
    sites: Sequence[str] | None,
    layers: Sequence[int] | None,
    torch: bool,
) -> _Columns:
    """Check what was asked for against what there is."""
    fields = read_schema(source.layout).names
    tensors = [one for one in source.manifest.tensors if not is_companion(one.name)]
    stored = list(dict.fromkeys(site_of(one.name) for one in tensors))
    if sites is not None:  # groups as builders take them: those of their sites that are stored
        groups = {**GROUPS, "none": ()}
        members = [site for name in sites for site in groups.get(name, ()) if site in stored]
        sites = [*(site for site in sites if site not in groups), *members]
    clash = {*fields} & {*stored}
    assert not clash, f"sites with the name of a field: {clash}"
    for what, asked, known in (("column", columns, [*fields, *stored]), ("site", sites, stored)):
        unknown = [one for one in asked or () if one not in known]
        if unknown:
            raise ConfigError(
                f"no {what} {', '.join(map(repr, unknown))} in configuration {source.layout.config!r}; expected a list "
                f"of: {', '.join(known) or 'nothing, no tensor is stored'}"
            )
    wanted = list(dict.fromkeys(columns)) if columns is not None else [*fields, *(stored if sites is None else sites)]
    if sites is not None:
        wanted = [one for one in wanted if one in fields or one in sites]
        wanted += [one for one in dict.fromkeys(sites) if one not in wanted]
    if not wanted:
        raise ConfigError("`columns` leaves nothing of a row; name at least one field or site")
    if layers is not None and not layers:
        raise ConfigError("`layers` is empty; leave it out for all layers, or give `sites=[]` for no tensors")
    if layers is not None and stored and not {*wanted} & {*stored}:
        raise ConfigError(
            "`layers` of no site: `columns` leaves the tensors out; name sites in `columns` or `sites` too"
        )
    return _Columns(
        columns=tuple(wanted),
        fields=tuple(one for one in wanted if one in fields),
        sites=tuple(one for one in wanted if one in stored),
        layered=frozenset(site_of(one.name) for one in tensors if "L" in one.axes or one.layout == "sparse"),
        ragged=frozenset(site_of(one.name) for one in tensors if site_of(one.name) != one.name),
        layers=None if layers is None else tuple(int(layer) for layer in layers),
        torch=torch,
    )


def _layer(number: int, layers: Sequence[int], site: str) -> int:
    """A layer's number, negative ones counted from the last that is stored."""
    if not -len(layers) <= number < 0 and number not in layers:
        raise SampleNotFoundError(
            f"no layer {number} of {site!r} is stored; there are {', '.join(map(str, layers))}. `sites` chooses those "
            "sites that have it"
        )
    return layers[number] if number < 0 else number


# ---------------------------------------------------------------- rows


class _TensorReader:
    """Reads the tensors of samples. Can be pickled; every process opens its own store when it first reads."""

    def __init__(self, location: str, config: str, choice: _Columns, *, check: bool = False) -> None:
        self._location, self._config, self._choice, self._check = location, config, choice, check
        self._opened: tuple[int, TraceStore] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """The format of a map-style dataset: keys become tensors in the columns of sites."""
        return {name: [self._value(name, value) for value in values] for name, values in batch.items()}

    def rows(self, shard: ShardInfo) -> Iterator[dict[str, Any]]:
        """Rows of one shard, in the order of its tar.

        Raises:
            CorruptShardError: the shard is cut, or does not hold the samples that the manifest says.
            DatasetError: the shard is missing.
        """
        keys = [sample.key for sample in self._store.shard(shard.number, split=shard.split)]
        if len(keys) != shard.num_samples:
            raise CorruptShardError(
                f"shard {shard.name} of {self._location}: {len(keys)} samples are indexed, the manifest says "
                f"{shard.num_samples}. Run `tracekit verify` on the dataset"
            )
        for start in range(0, len(keys), _PREFETCHED_SAMPLES):
            together = keys[start : start + _PREFETCHED_SAMPLES]
            if self._choice.sites:
                self._store.prefetch(together, sites=self._choice.sites, layers=self._choice.layers)
            yield from map(self.row, together)
        self._store.release(keys[-1])

    def row(self, key: str) -> dict[str, Any]:
        """One row. The record of a folder's sample is read from the shard, and so proves that it holds this sample."""
        record = self._store.record_fields(key) if self._choice.fields else {}
        sites = self._choice.sites
        return {name: self._value(name, key if name in sites else record[name]) for name in self._choice.columns}

    @property
    def _store(self) -> TraceStore:
        if self._opened is None or self._opened[0] != os.getpid():  # not shared with the process it was forked from
            self._opened = os.getpid(), TraceStore(self._location, self._config, check=self._check)
        return self._opened[1]

    def _value(self, name: str, value: Any) -> Any:
        if name in self._choice.sites:  # not a key where `map` has put values of its own into the column
            return self._tensor(value, name) if isinstance(value, str) else value
        return self._specs(value) if name == "tensors" else value

    def _tensor(self, key: str, site: str) -> Any:
        """A site of a sample: an array with all chosen layers, or a list where their shapes differ."""
        choice, in_torch = self._choice, self._choice.torch
        if choice.layers is None or site not in choice.layered:
            return self._store.tensor(key, site, torch=in_torch)
        parts = [self._store.tensor(key, site, layer=layer, torch=in_torch) for layer in choice.layers]
        if site in choice.ragged:
            return parts
        if isinstance(parts[0], list):  # attention of several choices: a list of arrays for each layer
            return [_joined(list(layers), in_torch) for layers in zip(*parts, strict=True)]
        return _joined(parts, in_torch)

    def _specs(self, specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The specs of the tensors in a row, as they are there."""
        chosen: list[dict[str, Any]] = []
        by_name = {spec["name"]: spec for spec in specs}
        for site in self._choice.sites:
            own = [spec for spec in specs if site_of(spec["name"]) == site and not is_companion(spec["name"])]
            of_site = [_unpacked(spec, by_name) for spec in own]
            layers = [layer for spec in of_site for layer in spec["layers"]]
            if self._choice.layers is None or not layers:
                chosen += of_site
                continue
            kept = [_layer(n, layers, site) for n in self._choice.layers]
            if site in self._choice.ragged:
                by_layer = {spec["layers"][0]: spec for spec in of_site}
                chosen += [by_layer[layer] for layer in kept]
            else:
                chosen += [{**spec, "layers": kept, "shape": [len(kept), *spec["shape"][1:]]} for spec in of_site]
        return chosen


def _joined(layers: list[Any], in_torch: bool) -> Any:
    """Layers as one array or tensor, the layer axis first."""
    if len(layers) == 1:
        return layers[0][None]
    if in_torch:
        import torch

        return torch.stack(layers)
    return np.stack(layers)


def _unpacked(spec: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A spec as its tensor is handed back; attention of choices is a list, which its entry as stored tells."""
    if spec["layout"] in ("scaled", "sparse"):
        own = msgspec.convert(spec, TensorSpec)
        counts = specs.get(f"{own.name}.counts")
        plain = plain_spec(own, None if counts is None else msgspec.convert(counts, TensorSpec))
        return {**spec, **msgspec.to_builtins(plain)}
    if spec["layout"] != "causal":
        return dict(spec)
    num_rows = sum(stop - start for start, stop in spec["positions"])
    shape = [*spec["shape"][:-1], num_rows, spec["num_keys"]]
    return {**spec, "layout": "full", "axes": [*spec["axes"][:-1], "T", "T"], "shape": shape}


# ---------------------------------------------------------------- as `datasets` has them


def _mapped(source: _Source, split: str, choice: _Columns) -> "datasets.Dataset":
    """A split, map-style."""
    import datasets

    layout = source.layout
    shards = [shard for shard in source.manifest.shards if shard.split == split]
    if not choice.sites:
        shards = []
    if source.hub is not None and shards:  # plan, manifest and record tables are here already
        fetch(source.hub, [layout.shard(shard.name).relative_to(layout.root).as_posix() for shard in shards])
    reader = _reader(source._replace(hub=None), choice, shards, check=source.hub is not None)
    table = str(layout.records_table(split))
    if "::" in table:
        raise ConfigError(f"{table!r}: `datasets` takes '::' in a path for an address; rename the folder")
    # `datasets` knows a file by its path and time alone; by this folder it knows it by its content
    cache = Path(import_module("datasets.config").HF_DATASETS_CACHE) / "tracekit" / sha256_file(layout.manifest)
    dataset: Any = datasets.Dataset.from_parquet(
        glob.escape(table),
        split=datasets.NamedSplit(split),
        columns=list(dict.fromkeys(("key", *choice.fields))),
        cache_dir=str(cache),
    )
    keys = dataset.data.column("key")
    for site in choice.sites:
        dataset = dataset.add_column(site, keys)
    return dataset.select_columns(list(choice.columns)).with_transform(reader)


def _streamed(source: _Source, split: str, choice: _Columns) -> "datasets.IterableDataset":
    """A split, shard after shard."""
    import datasets

    shards = [shard for shard in source.manifest.shards if shard.split == split]
    return datasets.IterableDataset.from_generator(
        _rows,
        gen_kwargs={"shards": shards, "reader": _reader(source, choice, shards)},
        split=datasets.NamedSplit(split),
    )


def _rows(shards: list[ShardInfo], reader: _TensorReader) -> Iterator[dict[str, Any]]:
    """Rows of some shards: what `datasets` runs in each worker with its own share of them."""
    for shard in shards:
        yield from reader.rows(shard)


def _reader(source: _Source, choice: _Columns, shards: Sequence[ShardInfo], *, check: bool = False) -> _TensorReader:
    """A reader of these shards; of a folder, they are there and of the right size, and the first sample can be read."""
    layout = source.layout
    if source.hub is not None:
        return _TensorReader(str(source.hub), layout.config, choice)
    reader = _TensorReader(str(layout.root), layout.config, choice, check=check)
    for shard in shards:
        path = layout.shard(shard.name)
        if not path.is_file():
            raise DatasetError(
                f"shard {path} is missing, which by the manifest holds {shard.num_samples} samples. Make or fetch it "
                "again; map-style, `sites=[]` loads the records without it"
            )
        if fault := size_fault(path, shard.num_bytes):
            raise CorruptShardError(
                f"{path} has {fault}. Run `tracekit verify` on the dataset, then fetch or make the shard again"
            )
    if shards:
        reader.row(shards[0].first_key)
    return reader
