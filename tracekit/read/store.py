"""TraceStore: random access to a dataset folder, as arrays that share the shards' memory.

    with TraceStore("traces/my-run") as store:
        sample = store[0]                                    # or store["000042"]
        sample.record.tokens                                 # the typed record
        sample.hidden_states(layer=12)                       # (T, D)
        sample.attention(layer=3, head=0)                    # (T, T)
        store.stack("hidden_states", layer=12).values        # (N, D) at the last prompt token

A finished configuration is indexed from its Parquet files, an open one (a plan and sidecars, no manifest yet) from its
sidecars. Opening reads keys and offsets; tensor entries are read a row group at a time, when one of its samples is.

One sample at a time is read in tracekit.read.accessors; here are many: stacked, found, split. Arrays are views of the
shards and stay valid after `close`. Nothing here imports torch, and nothing knows models.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tracekit.errors import ConfigError, DatasetError, SampleNotFoundError
from tracekit.format.labels import read_summaries
from tracekit.format.layout import Layout
from tracekit.hub import HubPath, fetch
from tracekit.read.accessors import Accessors, handed_out
from tracekit.read.byte_ranges import SampleRow, find_place, layers_of
from tracekit.read.index import open_folder
from tracekit.read.info import StoreInfo, meta_of, sum_up
from tracekit.read.labels import labels_table
from tracekit.read.remote import ByteRange, RemoteShards, check_files
from tracekit.read.rows import Rows, ranges_of
from tracekit.read.sample import Sample
from tracekit.read.stacking import Stacked, Tokens, check_choice_tokens, is_single, stack_choices, stack_samples
from tracekit.records import About, outcome_fault
from tracekit.task import about_of
from tracekit.tensors import site_of

__all__ = ["Sample", "Split", "StoreInfo", "TraceStore"]


class Split(NamedTuple):
    """Keys of two sets of samples that share no question."""

    train: list[str]
    """Keys to fit on."""
    test: list[str]
    """Keys to test on."""


class TraceStore(Accessors):
    """Reads one configuration of a dataset folder, or of several as one. Use as a context manager, or `close` it.

    Its methods for one sample take a `key` first, see tracekit.read.accessors; `store[key]` has them too. Rows stand
    folder by folder, split by split, by key. A store can be pickled and used after a fork, so it can be given to
    the workers of a data loader.

    Bytes of a published dataset are checked against their checksums when they are fetched, and again when they are read
    from the cache. Bytes of a folder are not: reading maps the shards, and `tracekit verify` checks them all. With
    `check=True` the record table is compared with its SHA-256 when the folder is opened, and each piece of a shard with
    its checksum when it is first read.

    Raises:
        DatasetError: no such folder, no dataset, several configurations and none named, folders that do not go
            together, or files that contradict each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        config: str | None = None,
        *,
        check: bool = False,
    ) -> None:
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        if not paths:
            raise DatasetError("no folder was given, expected at least one")
        self._paths, self._config = [HubPath.parse(str(one)) or Path(one) for one in paths], config
        self._check = check
        self._folders = [open_folder(root, config, check=check) for root in self._paths]
        tasks = sorted({folder.description.task for folder in self._folders})
        if len(tasks) > 1:
            raise DatasetError(f"the folders hold different tasks ({', '.join(tasks)}); read them separately")
        super().__init__(
            Rows(self._folders, where=", ".join(str(path) for path in self._paths)),
            {shard.path: folder for folder in self._folders for shard in folder.shards},
        )

    def __enter__(self) -> "TraceStore":
        return self

    def __exit__(self, *of: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        pinned = [
            folder.bytes_of.path if isinstance(folder.bytes_of, RemoteShards) else path
            for folder, path in zip(self._folders, self._paths, strict=True)
        ]
        return partial(TraceStore, check=self._check), ([str(path) for path in pinned], self._config)

    def __repr__(self) -> str:
        paths = ", ".join(str(path) for path in self._paths)
        return f"<TraceStore {paths}: {len(self)} samples{', open' if self.is_open else ''}>"

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator["Sample"]:
        """Samples in row order. What is held of a shard is let go once the next one begins: memory does not grow."""
        shard_of, before = self._rows.shard_of, None
        for row, key in enumerate(self.keys):
            shard = shard_of(row)
            if before is not None and shard != before:
                self.release(self.keys[row - 1])
            before = shard
            yield Sample(self, key)

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

    def release(self, key: str) -> None:
        """Let go of what is held of the shard that a sample is in: its map, and where the bytes of its samples lie.

        For walks over many shards in an order of one's own; iterating over the store does it by itself. Arrays that
        were handed out stay valid, and what is read there again is mapped again.

        Raises:
            SampleNotFoundError: no such key.
        """
        number = self._rows.number(key)
        shard = self._rows.shard_of(number)
        self._rows.release(number)
        self._bytes_of[shard].release(shard)

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

    def columns(self, names: Sequence[str]) -> pa.Table:
        """These fields of all records as one table, in row order; the others are not read.

        Raises:
            ConfigError: no such field.
        """
        unknown = [name for name in names if name not in self._rows.schema.names]
        if unknown:
            raise ConfigError(f"records have no field {unknown[0]!r}; fields: {', '.join(self._rows.schema.names)}")
        return self._rows.table(names)

    def labels(self, name: str | None = None) -> pa.Table:
        """What a judge said of all samples, in row order: the columns of `tracekit.read.labels.LABEL_SCHEMA`.

        A sample that the judge has not labelled has null in every column but `key`.

        Args:
            name: Name of the label set, or its beginning where that is enough (`rules`); the only set by default.

        Raises:
            SampleNotFoundError: no such set, or several and none named; the message names those there are.
            DatasetError: the set cannot be read.
            HubError: the Hub cannot be reached.
        """
        layouts: list[Layout] = []
        for folder, path in zip(self._folders, self._paths, strict=True):
            shards = folder.bytes_of
            if isinstance(shards, RemoteShards):
                root = fetch(shards.path, [f"labels/{folder.config}/*"])
                sums = {one.name: one.labels_sha256 for one in read_summaries(Layout(root, folder.config))}
                check_files(shards.path, root, {f"labels/{folder.config}/{one}.jsonl": sums[one] for one in sums})
            else:
                root = Path(str(path))
            layouts.append(Layout(root, folder.config))
        return labels_table(layouts, self.keys, name)

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

    @property
    def schema(self) -> pa.Schema:
        """Fields of the records, as Arrow types."""
        return self._rows.schema

    @property
    def about(self) -> About:
        """What the dataset says of its task: which fields of the records say what. Of several folders, the first's.

        Raises:
            DatasetError: it names a field that the records do not have, or one of another type.
        """
        first = self._folders[0]
        about = about_of(first.description)
        if fault := outcome_fault(about.outcome, first.schema):
            raise DatasetError(f"{self!r}: its outcome {fault}")
        return about

    def info(self) -> StoreInfo:
        """Summary: configurations, models, splits, sizes, stored tensors, proven errors."""
        return sum_up(self._folders, self._paths, len(self))

    @property
    def meta(self) -> dict[str, Any] | list[dict[str, Any]]:
        """What the manifest says, as plain values; of several folders a list, one a folder.

        `config task schema_version model source run device_type versions command splits tensors verification
        num_samples num_shards num_bytes is_open`; `run` is the run's configuration. Of a run that is not finished: its
        plan, with the counts so far.
        """
        found = [meta_of(folder) for folder in self._folders]
        return found[0] if len(found) == 1 else found

    def stack(
        self,
        site: str,
        keys: Sequence[str] | None = None,
        *,
        layer: int | None = None,
        tokens: Tokens = "auto",
        torch: bool = False,
    ) -> Stacked:
        """One site of many samples as one array, with a mask.

        Shapes for a site (L, T, D); with `layer` the L is gone, attention has (H, T_query, T) in place of (T, D):

            one token ("last_prompt", "first_answer", "last_answer", 12)     values (N, L, D), mask (N,)
            "answer_mean": mean over the answer's tokens, float32            values (N, L, D), mask (N,)
            "all", "prompt", "answer", positions or a slice                  values (N, L, T_max, D), mask (N, T_max)

        Samples of several choices have C after N, (N, C, L, T_max, D) with mask (N, C, T_max), and know no tokens by
        name but "all"; 0 is the first of each choice: (N, C, L, D). "auto" is "last_prompt", of choices "all".

        The mask is False, and the value zero, where a sample does not have the token: an empty answer, padding, or
        fewer choices than others.

        Raises:
            SampleNotFoundError: no such key, site or layer, or a token that was not kept.
            DatasetError: samples whose shapes differ in more than tokens, or a site whose shapes differ by layer.
            ConfigError: no samples, or no such tokens.
        """
        stacked = self._stack(site, self.keys if keys is None else list(keys), layer=layer, tokens=tokens)
        return stacked._replace(values=handed_out(stacked.values, torch), mask=handed_out(stacked.mask, torch))

    def arrays(
        self,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        keys: Sequence[str] | None = None,
    ) -> dict[str, Stacked]:
        """Every site as one padded array over all samples and tokens, in memory: site -> (values, mask, keys).

            hidden_states (N, L+1, T_max, D), attentions (N, L, H, T_max, T_max), ...; mask (N, T_max)

        Of several choices (N, C, ...). A site whose shapes differ by layer comes as one array a layer, `keys.3`,
        without the layer axis. For more than memory holds, use `stack` by layer, or `tracekit.load_dataset`.

        Args:
            sites: Sites; all that are stored by default.
            layers: Layers of the sites that have layers, in this order, negative from the end; all by default.
            keys: Samples; all by default.

        Raises: as `stack`.
        """
        chosen = self.keys if keys is None else list(keys)
        if layers is not None and not len(layers):
            raise ConfigError("`layers` is empty; leave it out for all layers, or name at least one")
        stored = (tensor.name for folder in self._folders for tensor in folder.tensors)
        found: dict[str, Stacked] = {}
        for site in dict.fromkeys(map(site_of, stored)) if sites is None else sites:
            row = self._row(chosen[0]) if chosen else None
            if row is None or site in row.tensors or not layers_of(row, site):
                wanted = None if row is None or not layers_of(row, site) else layers
                found[site] = self._stack(site, chosen, layer=wanted, tokens="all")
                continue
            asked = layers_of(row, site) if layers is None else layers
            numbers = [find_place(row, site, layer).layers[0] for layer in asked]
            found |= {f"{site}.{one}": self._stack(site, chosen, layer=one, tokens="all") for one in numbers}
        return found

    def prefetch(
        self,
        keys: Sequence[str] | None = None,
        *,
        sites: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        choice: int | None = None,
    ) -> None:
        """Of a published dataset, fetch what will be read next: many ranges at once, neighbours in one request.

        What is fetched is kept in the cache. Nothing to do for a local folder. `stack` does it by itself.

        Args:
            keys: Samples; all of them by default.
            sites: Sites; all that are stored by default. Those that a sample does not store are left out.
            layers: Layers; all by default.
            choice: One choice alone, where its bytes lie together: with `layers`, of sites without heads. The pieces
                that hold it are fetched whole (tracekit.format.checksums).

        Raises:
            SampleNotFoundError: no such key, layer or choice.
            ConfigError: `choice` for samples that have none.
            HubError: the Hub cannot be reached.
        """
        chosen = self.keys if keys is None else keys
        self._fetch(chosen, lambda row: ranges_of(row, sites, layers, choice))
        if layers is not None:  # where these layers of sparse attention lie, the counts say, which are here now
            self._fetch(chosen, lambda row: self._kept_of(row, sites, layers))

    def _fetch(self, keys: Sequence[str], wanted: Callable[[SampleRow], Iterable[ByteRange]]) -> None:
        """Fetch what is wanted of these samples, where they are on the Hub."""
        ranges: dict[int, list[ByteRange]] = {}
        for row in map(self._row, keys):
            source = self._bytes_of[row.shard]
            if isinstance(source, RemoteShards):
                ranges.setdefault(id(source), []).extend(map(row.widened, wanted(row)))
        for folder in self._folders:
            if found := ranges.get(id(folder.bytes_of)):
                folder.bytes_of.prefetch(found)

    def _kept_of(self, row: SampleRow, sites: Sequence[str] | None, layers: Sequence[int]) -> Iterator[ByteRange]:
        """Where the kept weights of these layers lie, in a sample whose attention is sparse."""
        stored = row.tensors.get("attentions")
        if stored is None or stored.layout != "sparse" or (sites is not None and "attentions" not in sites):
            return
        for entry in {find_place(row, "attentions", layer).entry for layer in layers}:
            yield from (one for one, _ in self._kept_ranges(row, stored, entry))

    def split(
        self, *, test_size: float = 0.2, by: str = "question_id", stratify: str | None = None, seed: int = 0
    ) -> Split:
        """Keys of a train and a test set; samples with the same value in column `by` are on the same side.

        The values are ordered by a hash of seed and value, and the first `test_size` of them (at least one, not all)
        are the test set: the same on every machine, and nearly the same after shards were added. With `stratify`,
        this is done for each value of that column alone, so that both sides have it in the same share; a question
        whose samples differ in it is a class of its own.

        Raises:
            ConfigError: no such column or one of lists, a test_size that is not between 0 and 1, a single value, or
                one of `stratify` that a single value of `by` has.
        """
        if not 0 < test_size < 1:
            raise ConfigError(f"test_size is {test_size}, expected more than 0 and less than 1")
        values = self._plain_column(by, "split")
        classes = self._plain_column(stratify, "stratify") if stratify is not None else [None] * len(values)
        if len(set(values)) < 2 or (stratify is not None and len(set(classes)) < 2):
            what, name, same = ("stratify", stratify, classes) if len(set(values)) > 1 else ("split", by, values)
            raise ConfigError(f"cannot {what} by {name!r}: all {len(values)} samples have the same value, {same[:1]}")
        classes_of: dict[Any, set[Any]] = defaultdict(set)
        for value, one in zip(values, classes, strict=True):
            classes_of[value].add(one)
        strata: dict[frozenset[Any], list[Any]] = defaultdict(list)
        for value, found in classes_of.items():
            strata[frozenset(found)].append(value)
        test: set[Any] = set()
        for found, members in strata.items():
            if len(members) < 2 and len(found) == 1:
                raise ConfigError(
                    f"cannot stratify by {stratify!r}: only {by} {members[0]!r} has the value {next(iter(found))!r}; "
                    "each value needs two, one for each side"
                )
            members.sort(key=lambda value: hashlib.sha256(f"{seed}:{value}".encode()).digest())
            test.update(members[: min(max(round(test_size * len(members)), 1), len(members) - 1)])
        sides: tuple[list[str], list[str]] = ([], [])
        for key, value in zip(self.keys, values, strict=True):
            sides[value in test].append(key)
        return Split(*sides)

    def _plain_column(self, name: str, verb: str) -> list[Any]:
        """A column of plain values.

        Raises:
            ConfigError: there is none of this name.
        """
        plain = [field.name for field in self._rows.schema if not pa.types.is_nested(field.type)]
        if name not in plain:
            raise ConfigError(f"cannot {verb} by {name!r}, expected a column of plain values: {', '.join(plain)}")
        return self._rows.table([name])[name].to_pylist()

    def _stack(self, site: str, keys: list[str], *, layer: int | Sequence[int] | None, tokens: Tokens) -> Stacked:
        """A site of samples; of several layers in the order given."""
        layers = [layer] if isinstance(layer, int | np.integer) else layer
        self.prefetch(keys, sites=[site], layers=layers)
        rows = [self._row(key) for key in keys]
        counts = [self._num_choices(row, site) for row in rows]
        name = tokens if isinstance(tokens, str) else None
        if not any(counts):
            wanted = {"auto": "last_prompt", "answer_mean": "answer"}.get(name or "", tokens)
            samples = [self._select_layers(row, site, layer, tokens=wanted) for row in rows]
            reduce = "mean" if name == "answer_mean" else "single" if is_single(wanted) else "pad"
            return stack_samples(samples, keys, reduce=reduce)
        if not all(counts):
            without = keys[counts.index(0)]
            raise DatasetError(
                f"cannot stack {site} of sample {without!r}, which has no choices, with samples that have"
            )
        wanted = "all" if name == "auto" else tokens
        check_choice_tokens(wanted, where=f"{site} of sample {keys[0]!r}")
        choices = [
            [self._select_layers(row, site, layer, choice=number, tokens=wanted) for number in range(count)]
            for row, count in zip(rows, counts, strict=True)
        ]
        return stack_choices(choices, keys, reduce="single" if is_single(wanted) else "pad")
