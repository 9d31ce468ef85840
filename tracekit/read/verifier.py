"""Verification: re-read a dataset and prove it, from the index down to every tensor; replay samples on request.

Checked: the index against the manifests; every file's size and SHA-256; tar structure; every record against its schema
and its place; every tensor against its declared dtype and shape; keys and counts; record tables, records tars and
sidecars, checksums included, against what the shards say (tracekit.read.comparing); label sets against their summaries
and the keys; the loading script against those of all released versions; nothing undeclared in the folder. An open
dataset (a plan, no manifest yet) is checked as far as it goes.
"""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from tracekit.card.script import script_problem
from tracekit.errors import CorruptShardError, DatasetError
from tracekit.format.journal import Sent, is_sent, read_journal
from tracekit.format.labels import read_labels, read_summary, summary_path
from tracekit.format.layout import (
    Layout,
    config_names,
    files_inside,
    inside,
    is_ignored,
    read_whole,
    records_tar_path,
    shard_path,
)
from tracekit.format.manifest import (
    Index,
    Manifest,
    Plan,
    SampleIndex,
    ShardInfo,
    Sidecar,
    Verification,
    index_entry,
    newest_schema,
    read_growth,
    read_manifest,
    read_plan,
    read_struct,
    shard_info,
    shard_names,
    shard_number,
    sidecar_checksum,
)
from tracekit.format.shards import RawSample, index_of, iter_samples, read_sample, sha256_file, size_fault
from tracekit.read.comparing import SplitTables, sidecar_problems
from tracekit.read.index import schema_of
from tracekit.records import Record, RecordSchema, check_schema, decode_record
from tracekit.storage import companion_names, content_problem, problem_of
from tracekit.tensors import (
    HeaderEntry,
    TensorSpec,
    are_ranges,
    choices_problem,
    decode,
    is_companion,
    num_packed,
    positions_of,
    read_header,
)

__all__ = ["Report", "verify"]

MAX_SCRIPT_BYTES = 64 << 20
"""Most bytes of a loading script: one of 10,000 shards has about 1 MB a configuration."""


class Report(NamedTuple):
    """What verification found."""

    problems: list[str]
    """Everything that is wrong; empty where the dataset is right."""
    num_samples: int
    """Samples checked."""
    num_bytes: int
    """Bytes of the shards checked."""
    open_configs: list[str]
    """Configurations that are not finished."""
    sent: list[Sent]
    """Shards that are not here but, by the journal, were sent to the Hub as their sidecars say; they were not read."""


def verify(
    root: Path | str, *, config: str | None = None, progress: Callable[[int], object] = lambda done: None
) -> Report:
    """Check a dataset folder; `progress` is told of every shard's bytes.

    Raises:
        DatasetError: the folder is no dataset, or has no such configuration.
    """
    root = Path(root)
    names = config_names(root)
    if config is not None and config not in names:
        raise DatasetError(f"{str(root)!r} has no configuration {config!r}; it has {', '.join(names)}")
    problems: list[str] = []
    open_configs: list[str] = []
    num_samples = num_bytes = 0
    sent: list[Sent] = []
    for name in [config] if config is not None else names:
        layout = Layout(root, name)
        try:
            check = _Config(layout, read_plan(layout))
            if check.manifest is None:
                open_configs.append(name)
            for shard in check.shards():
                if (entry := check.sent(shard)) is not None:
                    sent.append(entry)
                    problems += check.from_sidecar(shard)
                    continue
                problems += check.shard(shard)
                num_samples += shard.num_samples
                num_bytes += shard.num_bytes
                progress(shard.num_bytes)
            problems += check.files()
            problems += check.rest()
            problems += check.labels(has_all_keys=not problems)
        except DatasetError as error:
            problems.append(str(error))
    for look in (partial(_index_problems, config=config), _script_problems, _strangers):
        if look is _strangers and problems:
            continue
        try:
            problems += look(root, names)
        except DatasetError as error:
            problems.append(str(error))
    return Report(problems, num_samples, num_bytes, open_configs, sent)


class _Config:
    """One configuration under verification."""

    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._layout, self._plan = layout, plan
        self._has_checksums = check_schema(plan.schema_version, where=layout.plan)
        self._schema = schema_of(layout, plan.task)
        self.manifest = read_manifest(layout) if layout.manifest.exists() else None
        self._tables: dict[str, SplitTables] = {}
        self._unreadable: list[str] = []
        self._keys: set[str] = set()
        self._has_unknown_keys = False
        self._journal = read_journal(layout.root)

    def shards(self) -> Iterator[ShardInfo]:
        """The shards that should be there: the manifest's, or those that have a sidecar."""
        if self.manifest is not None:
            yield from self.manifest.shards
            return
        for name in shard_names(self._layout, self._plan):
            sidecar = self._sidecar(name)
            if sidecar is not None:
                yield msgspec.structs.replace(shard_info(sidecar, self._plan.source.split), name=name)

    def sent(self, shard: ShardInfo) -> Sent | None:
        """Where a shard that is not here was sent to, by the journal."""
        path = shard_path(self._layout.config, shard.name)
        return None if os.path.lexists(self._layout.root / path) else is_sent(self._journal, path, shard.sha256)

    def shard(self, shard: ShardInfo) -> list[str]:
        """What is wrong with one shard."""
        where = shard_path(self._layout.config, shard.name)
        try:
            path = self._layout.shard(shard.name)
        except DatasetError as error:
            return [str(error), *self.from_sidecar(shard)]
        if not path.exists():
            return [f"{where}: missing", *self.from_sidecar(shard)]
        problems = []
        fault = size_fault(path, shard.num_bytes)
        if (num_bytes := path.stat().st_size) > shard.num_bytes:
            return [f"{where}: {fault}", *self.from_sidecar(shard)]
        sha256 = sha256_file(path)
        if fault:
            problems.append(f"{where}: {fault}")
        elif sha256 != shard.sha256:
            problems.append(f"{where}: SHA-256 is not the manifest's; its bytes were altered")
        found: list[tuple[SampleIndex, bytes]] = []
        try:
            with path.open("rb") as file:
                samples = list(iter_samples(file, where=where))
                if len(samples) != shard.num_samples:
                    problems.append(f"{where}: {len(samples)} samples, the manifest says {shard.num_samples}")
                for sample in samples:
                    problems += self._sample(file, sample, where, found)
        except CorruptShardError as error:
            problems.append(str(error))
        return problems + self._compared(shard, found, num_bytes, sha256, is_whole=not problems)

    def from_sidecar(self, shard: ShardInfo) -> list[str]:
        """What is wrong with what is said of a shard that is not here, by its sidecar; takes the keys from there."""
        sidecar = self._sidecar(shard.name)
        self._has_unknown_keys |= sidecar is None
        self._keys |= {sample.key for sample in sidecar.samples} if sidecar is not None else set()
        return self._of_split(shard.split).shard(sidecar) if self.manifest is not None else []

    def rest(self) -> list[str]:
        """What is wrong with the record tables after the last shard, and sidecars that cannot be read."""
        return [problem for tables in self._tables.values() for problem in tables.rest()] + self._unreadable

    def _compared(
        self, shard: ShardInfo, found: list[tuple[SampleIndex, bytes]], num_bytes: int, sha256: str, *, is_whole: bool
    ) -> list[str]:
        """Where manifest, sidecar and record tables are not what a shard says; only of a shard that is right."""
        made = Sidecar(
            name=shard.name,
            number=shard_number(shard.name),
            num_bytes=num_bytes,
            sha256=sha256,
            samples=[index for index, _ in found],
            records=[msgspec.Raw(record) for _, record in found],
            verification=Verification.nothing(),
        )
        tables = self._of_split(shard.split) if self.manifest is not None else None
        if not is_whole:
            return tables.shard(None) if tables is not None else []
        problems: list[str] = []
        if (sidecar := self._sidecar(shard.name)) is not None:
            path = self._layout.sidecar(shard.name)
            checksum = sidecar_checksum(read_whole(path)) if self._has_checksums else None
            where = path.relative_to(self._layout.root).as_posix()
            problems += sidecar_problems(where, sidecar, made, checksum=checksum)
        for name, value in msgspec.structs.asdict(shard_info(made, self._plan.source.split)).items():
            if tables is not None and getattr(shard, name) != value:
                said = f"{name} of shard {shard.name} is {getattr(shard, name)!r}"
                problems.append(f"{self._layout.config}: its manifest says that {said}, the shard says {value!r}")
        return problems + (tables.shard(made) if tables is not None else [])

    def _of_split(self, split: str) -> SplitTables:
        if split not in self._tables:
            self._tables[split] = SplitTables(self._layout, self._schema, split, has_checksums=self._has_checksums)
        return self._tables[split]

    def _sidecar(self, name: str) -> Sidecar | None:
        """The sidecar of a shard; None where it is not there, or cannot be read, which `rest` tells."""
        try:
            path = self._layout.sidecar(name)
            return read_struct(path, Sidecar) if path.exists() else None
        except DatasetError as error:
            self._unreadable += [str(error)] if str(error) not in self._unreadable else []
            return None

    def labels(self, *, has_all_keys: bool) -> list[str]:
        """What is wrong with the label sets; their keys are looked at where those of the samples are known."""
        problems = []
        found = files_inside(self._layout.root, f"labels/{self._layout.config}", "*.json*")
        for name in sorted({path.stem for path in found}):
            where = self._layout.labels(name).relative_to(self._layout.root).as_posix()
            try:
                labels = read_labels(self._layout.labels(name))
                is_judged = summary_path(self._layout, name).exists()  # the last that a judge writes
                summary = read_summary(self._layout, name) if is_judged else None
            except DatasetError as error:
                problems.append(str(error))
                continue
            strange = sorted({label.key for label in labels} - self._keys)
            if strange and has_all_keys and not self._has_unknown_keys:
                problems.append(f"{where}: {len(strange)} labels are of no sample here, the first of {strange[0]!r}")
            if summary is None:
                continue
            if sha256_file(self._layout.labels(name)) != summary.labels_sha256:
                problems.append(f"{where}: its labels are not those of its summary; run the stage evaluate again")
            counted = len(labels), sum(label.failure is not None for label in labels)
            told = [(rate.num, rate.count, rate.value) for rate in summary.rates]
            are_shares = all(
                0 <= count <= num and value == (count / num if num else None) for num, count, value in told
            )
            if counted != (summary.num_samples, summary.num_failures) or not are_shares:
                problems.append(f"{where}: its summary says other counts or rates than its labels; judge again")
        return problems

    def files(self) -> list[str]:
        """What is wrong with the files beside the shards."""
        problems = []
        if self.manifest is None:
            return problems
        for file in self.manifest.files:
            try:
                path = inside(self._layout.root, file.path)
            except DatasetError as error:
                problems.append(str(error))
                continue
            if not path.exists():
                problems.append(f"{file.path}: missing")
            elif fault := size_fault(path, file.num_bytes):
                problems.append(f"{file.path}: {fault}")
            elif sha256_file(path) != file.sha256:
                problems.append(f"{file.path}: SHA-256 is not the manifest's")
        for split in self.manifest.splits:
            shards = [shard for shard in self.manifest.shards if shard.split == split.name]
            counts = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
            if (split.num_samples, split.num_bytes) != counts:
                problems.append(f"{self._layout.config}: split counts do not add up to the shards'")
        for name in ("schema_version", "config", "task"):
            if getattr(self.manifest, name) != getattr(self._plan, name):
                problems.append(f"{self._layout.config}: its manifest and its plan differ in {name}")
        return problems

    def _sample(
        self, file: BinaryIO, sample: RawSample, where: str, found: list[tuple[SampleIndex, bytes]]
    ) -> list[str]:
        """What is wrong with a sample; its index, made again, and its record are added to what was found."""
        here = f"{where}: {sample.key}"
        if sample.key in self._keys:
            return [f"{here}: a second sample of this key"]
        self._keys.add(sample.key)
        raw_record, payload = read_sample(file, sample)
        try:
            record = decode_record(raw_record, self._schema.record_type, where=here)
            decode_record(raw_record, self._schema.strict_type, where=here)
            header = read_header(payload, where=here)
        except CorruptShardError as error:
            return [str(error)]
        problems = []
        if record.key != sample.key or record.config != self._layout.config or record.task_name() != self._plan.task:
            problems.append(f"{here}: its record says key {record.key!r}, configuration {record.config!r}")
        index = index_of(sample, raw_record, payload)
        found.append((index if self._has_checksums else msgspec.structs.replace(index, checksums=b""), raw_record))
        problems += [f"{here}: {problem}" for problem in _tensor_problems(record, header.entries)]
        return problems or [f"{here}: {problem}" for problem in _content_problems(record, payload, here)]


def _tensor_problems(record: Record, entries: dict[str, HeaderEntry]) -> list[str]:
    """Where tensors are not what their record declares."""
    problems = []
    declared = {spec.name: spec for spec in record.tensors}
    for name in sorted(declared.keys() ^ entries.keys()):
        problems.append(f"tensor {name!r} is {'missing' if name in declared else 'not declared'}")
    for name in declared.keys() & entries.keys():
        spec, entry = declared[name], entries[name]
        dtype = entry.dtype_name
        if dtype != spec.dtype or entry.shape != spec.shape:
            problems.append(f"tensor {name!r} is {dtype} {entry.shape}, declared {spec.dtype} {spec.shape}")
            continue
        if not are_ranges(spec.positions, len(record.token_ids)):
            problems.append(f"tensor {name!r}: positions {spec.positions} of a text of {len(record.token_ids)} tokens")
            continue
        problems += [f"tensor {name!r}: {problem}" for problem in _shape_problems(spec, record)]
        problem = problem_of(spec, declared)
        problems += [f"tensor {name!r}: {problem}"] if problem else []
    problems += _choice_problems(record)
    if not len(record.token_ids) == len(record.tokens) == len(record.token_offsets):
        problems.append("token_ids, tokens and token_offsets differ in length")
    return problems


def _content_problems(record: Record, payload: bytes, where: str) -> list[str]:
    """Where values in a smaller form are not what belongs to them says."""
    packed = [spec for spec in record.tensors if companion_names(spec)]
    arrays = decode(payload, where=where) if packed else {}
    problems = {spec.name: content_problem(spec, arrays) for spec in packed}
    return [f"tensor {name!r}: {problem}" for name, problem in problems.items() if problem is not None]


def _shape_problems(spec: TensorSpec, record: Record) -> list[str]:
    """Where a tensor's shape is not what its layers, positions and choices say."""
    problems = []
    rows = positions_of(spec.positions)
    expected = {"L": len(spec.layers), "T": len(rows)}
    if spec.layout == "causal":
        expected["S"] = num_packed(rows)
    for axis, length in zip(spec.axes[:3], spec.shape[:3], strict=False):
        if axis in expected and length != expected[axis]:
            problems.append(f"axis {axis} is {length}, its layers and positions say {expected[axis]}")
    problem = choices_problem(spec)
    if problem is not None:
        problems.append(problem)
    if spec.layout == "full" and not spec.choice_offsets and spec.shape[-1] != spec.num_keys:
        problems.append(f"{spec.shape[-1]} keys, declared {spec.num_keys}")
    if spec.layout == "sparse" and spec.num_keys != len(record.token_ids):
        problems.append(f"{spec.num_keys} keys in a text of {len(record.token_ids)} tokens")
    if len(rows) and rows[-1] >= len(record.token_ids):
        problems.append(f"position {rows[-1]} of a text of {len(record.token_ids)} tokens")
    return problems


def _choice_problems(record: Record) -> list[str]:
    """Where choices are not the same in a record's spans, its tokens and its tensors."""
    spans = [span for span in record.spans if re.fullmatch(r"choice_\d+", span.name)]
    if not spans:
        return [
            f"tensor {spec.name!r}: holds choices, its record none" for spec in record.tensors if spec.choice_offsets
        ]
    offsets, problems = [spans[0].start, *(span.stop for span in spans)], []
    are_neighbours = all(one.stop == other.start for one, other in pairwise(spans))
    if offsets[0] != 0 or not are_neighbours or not all(start < stop for start, stop in pairwise(offsets)):
        problems.append(f"its choices lie at {[[span.start, span.stop] for span in spans]}")
    elif offsets[-1] != len(record.token_ids):
        problems.append(f"choices end at token {offsets[-1]} of {len(record.token_ids)}")
    return problems + [
        f"tensor {spec.name!r}: choices at {spec.choice_offsets}, its record says {offsets}"
        for spec in record.tensors
        if spec.choice_offsets != offsets and not is_companion(spec.name)
    ]


def _index_problems(root: Path, names: list[str], *, config: str | None) -> list[str]:
    """Where the index is not what the manifests say; of one configuration, where one is named."""
    asked = names if config is None else [config]
    complete = [name for name in asked if Layout(root, name).manifest.exists()]
    if not complete:
        return []
    index = read_struct(inside(root, "manifest.json"), Index)
    if not inside(root, "README.md").exists():
        return ["README.md: missing; without it `datasets` does not know the features"]
    listed = {entry.name: entry for entry in index.configs}
    problems = [f"manifest.json: {name} is listed but not there" for name in sorted(listed.keys() - set(names))]
    if len(listed) < len(index.configs):
        problems.append("manifest.json: a configuration is listed twice")
    manifests: list[Manifest] = []
    for name in complete:
        data = read_whole(Layout(root, name).manifest)
        manifests.append(read_manifest(Layout(root, name)))
        if listed.get(name) != index_entry(manifests[-1], data):
            problems.append(f"manifest.json: its entry of {name} is not what manifests/{name}.json says")
    if config is None and not problems and index.schema_version != newest_schema(manifests):
        problems.append(f"manifest.json: schema {index.schema_version}, its manifests say {newest_schema(manifests)}")
    return problems


def _script_problems(root: Path, names: list[str]) -> list[str]:
    """Where the loading script is none that tracekit wrote for these manifests: somebody may run it."""
    layouts = [Layout(root, name) for name in names]
    script = layouts[0].script
    if not script.exists():
        return []
    paths: set[str] = set()
    manifests: list[Manifest] = []
    schemas: dict[str, RecordSchema] = {}
    for layout in layouts:
        if layout.manifest.exists():
            manifests.append(read_manifest(layout))
            schemas[layout.config] = schema_of(layout, manifests[-1].task)
            continue
        plan = read_plan(layout)
        paths |= {shard_path(layout.config, name) for name in shard_names(layout, plan)}
        paths.add(records_tar_path(layout.config, plan.source.split))
    if script.stat().st_size > MAX_SCRIPT_BYTES:
        return [f"load_traces.py: {script.stat().st_size} bytes, expected at most {MAX_SCRIPT_BYTES}; do not run it"]
    problem = script_problem(read_whole(script), manifests, schemas, paths)
    return [] if problem is None else [f"load_traces.py: {problem}"]


def _strangers(root: Path, names: list[str]) -> list[str]:
    """Files where `datasets` would read them, but which no manifest knows; and links."""
    found = sorted(root.rglob("*"))  # before what is declared: a shard may be closed in between
    declared: set[str] = set()
    for layout in (Layout(root, name) for name in names):
        plan, growth = read_plan(layout), read_growth(layout)
        split = plan.source.split
        # a shard that is being closed has its name, and its journal until it has its sidecar: asked in this order
        paths = [path for path in found if layout.journal(path.stem).exists()]
        names_there = shard_names(layout, plan if growth is None else growth)
        paths += [layout.shard(name) for name in names_there if layout.sidecar(name).exists()]
        if layout.manifest.exists():
            paths += [layout.shard(shard.name) for shard in read_manifest(layout).shards]
        paths += [layout.records_table(split), layout.records_tar(split)]
        declared |= {path.relative_to(root).as_posix() for path in paths}
    problems = []
    for path in found:
        relative = path.relative_to(root).as_posix()
        try:
            inside(root, relative, is_folder=path.is_dir())
        except DatasetError as error:
            problems.append(str(error))
            continue
        is_data = path.is_file() and relative.startswith(("data/", "records/")) and not is_ignored(relative)
        if is_data and relative not in declared:
            problems.append(f"{relative}: belongs to no plan or manifest of this dataset")
    return problems
