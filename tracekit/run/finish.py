"""Finishing: one pass over the sidecars, and the dataset is complete.

Writes the records tables, the schema, the manifest, the card, and last the index. Needs no shard to be there.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tracekit.card.readme import CardSettings, render_card, settings_of, task_part
from tracekit.card.script import render_script
from tracekit.errors import DatasetError
from tracekit.format.journal import sent_shards
from tracekit.format.layout import Layout, config_names, inside, read_text, read_whole, sweep, write_atomic
from tracekit.format.manifest import (
    FileInfo,
    Index,
    Manifest,
    Plan,
    ShardInfo,
    Sidecar,
    SplitInfo,
    TaskReport,
    TensorSummary,
    Verification,
    index_entry,
    newest_schema,
    read_manifest,
    read_schema,
    read_struct,
    shard_info,
    shard_names,
    to_bytes,
)
from tracekit.format.shards import sha256_file
from tracekit.read.tables import tensor_summaries, write_records_table, write_records_tar
from tracekit.records import About, Record, RecordSchema, decode_record
from tracekit.run.metrics import Tally
from tracekit.storage import StorageLoss, added_up
from tracekit.task import Task, about_of

__all__ = ["check_can_grow", "done_shards", "finish", "is_finished", "ordered_names", "reopen", "write_index"]

_FINITE = "every value is finite"
INVARIANTS = [
    "every tensor has the model's own shape, unpadded",
    _FINITE,
    "attention rows sum to one (at most one for models with sinks)",
    "causal attention is zero above the diagonal",
]
"""What capture checks of every sample (tracekit.model.capture); a sample that fails is never written."""
_COUNTED = "every value is finite, or counted in its record"
"""What holds in its place where a model may give other values."""


def finish(layout: Layout, plan: Plan, task: Task[Any, Any] | None, *, like: Manifest | None = None) -> Manifest:
    """Write everything that follows from a plan's sidecars; the manifest and the index last.

    Without the `task` its schema has to be there already, and what it says of the dataset is as in the manifest `like`.

    Raises:
        ConfigError: the task's card or report cannot be made.
        DatasetError: a shard is not done, or a dataset that grows has none.
    """
    names = shard_names(layout, plan)
    missing = [name for name in names if not layout.sidecar(name).exists()]
    if plan.is_growing and not names:
        raise DatasetError(
            f"{layout.root}: {layout.config} has no sample yet; a dataset without any cannot be finished"
        )
    if missing:
        raise DatasetError(
            f"{layout.root}: {len(missing)} shards are not done ({missing[0]} first); run the command again"
        )
    split = plan.source.split

    def sidecars() -> Iterator[Sidecar]:
        for name in names:
            yield read_struct(layout.sidecar(name), Sidecar)

    schema = read_schema(layout) if task is None else RecordSchema.of(task.record)
    record_type = schema.record_type if task is None else task.record

    def records() -> Iterator[Record]:
        for sidecar in sidecars():
            for raw, index in zip(sidecar.records, sidecar.samples, strict=True):
                yield decode_record(bytes(raw), record_type, where=f"{sidecar.name}: {index.key}")

    write_records_table(layout.records_table(split), schema, sidecars())
    write_records_tar(layout.records_tar(split), sidecars())
    write_atomic(layout.schema, schema.to_bytes())
    about = about_of(plan) if task is None else task.about
    manifest = _manifest(layout, plan, about, sidecars(), records(), tensor_summaries(sidecars()))
    if task is not None:
        report: TaskReport | None = None if task.report is None else task.call("report", records())
        manifest = msgspec.structs.replace(manifest, card=task_part(manifest, task))
        if report is not None:
            metrics = sorted([*manifest.metrics, *report.metrics], key=lambda one: one.name)
            report = msgspec.structs.replace(report, metrics=[])
            manifest = msgspec.structs.replace(manifest, metrics=metrics, report=report)
    elif like is not None:
        manifest = msgspec.structs.replace(manifest, card=like.card)
    write_atomic(layout.manifest, to_bytes(manifest))
    write_index(layout.root)
    sweep(layout.root)
    return manifest


def reopen(layout: Layout) -> None:
    """Make a finished configuration one that is not: its shards and sidecars stay.

    Raises: as `check_can_grow`.
    """
    check_can_grow(layout)
    layout.manifest.unlink(missing_ok=True)


def check_can_grow(layout: Layout) -> None:
    """See that a configuration can be finished again once it holds more.

    Raises:
        DatasetError: sidecars are missing, as of a downloaded dataset; or a later version finished it.
    """
    if not layout.manifest.exists():
        return
    shards = read_manifest(layout, to_continue=True).shards
    missing = [shard.name for shard in shards if not layout.sidecar(shard.name).exists()]
    if missing:
        raise DatasetError(
            f"{layout.root}: {layout.config} cannot grow: {layout.sidecar(missing[0])} is not there (a downloaded "
            "dataset has none). Choose another --out, and read both folders as one: TraceStore([one, other])"
        )


def done_shards(layout: Layout, plan: Plan) -> set[str]:
    """Names of the shards of a plan that need no more work.

    A shard is done that is here with its sidecar; that the Hub has, by the journal, as its sidecar says; or that is
    here as a finished manifest says (a downloaded dataset has no sidecars).
    """
    finished = read_manifest(layout).shards if is_finished(layout) else []
    sizes = {shard.name: shard.num_bytes for shard in finished}
    names, done = shard_names(layout, plan), set[str]()
    for name in names:
        path = layout.shard(name)
        is_known = layout.sidecar(name).exists()
        if path.exists() and (is_known or sizes.get(name) == path.stat().st_size):
            done.add(name)
    return done | sent_shards(layout).intersection(names)  # after the others: a shard is sent before it is deleted


def is_finished(layout: Layout) -> bool:
    """Whether a configuration's manifest is there and the index, which is written last, knows it."""
    if not (layout.manifest.exists() and layout.dataset_index.exists()):
        return False
    known = {entry.name: entry.manifest_sha256 for entry in read_struct(layout.dataset_index, Index).configs}
    return known.get(layout.config) == hashlib.sha256(read_whole(layout.manifest)).hexdigest()


def ordered_names(root: Path) -> list[str]:
    """Configurations of a folder: those of the index in its order, then new ones by name.

    The first one's records are the default of `load_dataset`, which must not change when another one is added.
    """
    index = inside(root, "manifest.json")
    known = [entry.name for entry in read_struct(index, Index).configs] if index.exists() else []
    names = config_names(root)
    return [name for name in known if name in names] + [name for name in names if name not in known]


def write_index(root: Path) -> None:
    """Write the card and the index over every complete configuration of a folder."""
    layouts = [Layout(root, name) for name in ordered_names(root)]
    complete = [layout for layout in layouts if layout.manifest.exists()]
    manifests = [read_manifest(layout) for layout in complete]
    card, index = inside(root, "README.md"), inside(root, "manifest.json")
    described = {entry.name for entry in read_struct(index, Index).configs} if index.exists() else set()
    made_from = [manifest for manifest in manifests if manifest.config in described]
    settings = settings_of(read_text(card), made_from) if card.exists() else CardSettings()
    schemas = {layout.config: read_schema(layout) for layout in complete}
    write_atomic(card, render_card(manifests, schemas, settings=settings).encode())
    write_atomic(inside(root, "load_traces.py"), render_script(manifests, schemas).encode())
    entries = [
        index_entry(manifest, read_whole(layout.manifest)) for layout, manifest in zip(complete, manifests, strict=True)
    ]
    write_atomic(index, to_bytes(Index(schema_version=newest_schema(manifests), configs=entries)))


def _manifest(
    layout: Layout,
    plan: Plan,
    about: About,
    sidecars: Iterator[Sidecar],
    records: Iterator[Record],
    tensors: list[TensorSummary],
) -> Manifest:
    shards: list[ShardInfo] = []
    split = plan.source.split
    verification = Verification.nothing()
    tally = Tally(about.outcome)
    losses: list[StorageLoss] = []
    num_from_decoding = 0
    for sidecar in sidecars:
        losses = added_up([*losses, *sidecar.losses])
        shards.append(shard_info(sidecar, split))
        verification = verification.with_more(sidecar.verification)
        tally.add_norms(sidecar.hidden_norms)
    for record in records:
        num_from_decoding += record.captured_from == "decoding"
        tally.add(record)
    files = [layout.plan, layout.schema, layout.records_table(split), layout.records_tar(split)]
    num_bytes, num_samples = sum(shard.num_bytes for shard in shards), sum(shard.num_samples for shard in shards)
    source = plan.source
    if plan.is_growing:  # its rows are what was asked of it
        source = msgspec.structs.replace(source, num_rows=num_samples, num_used=num_samples)
    return Manifest(
        schema_version=plan.schema_version,
        config=plan.config,
        task=plan.task,
        model=plan.model,
        source=source,
        run=plan.run,
        device_type=plan.device_type,
        versions=plan.versions,
        splits=[SplitInfo(name=split, num_samples=num_samples, num_bytes=num_bytes)],
        shards=shards,
        files=[
            FileInfo(path=str(path.relative_to(layout.root)), num_bytes=path.stat().st_size, sha256=sha256_file(path))
            for path in files
        ],
        tensors=tensors,
        metrics=tally.metrics(),
        invariants=[_COUNTED if i == _FINITE and not about.are_values_finite else i for i in INVARIANTS],
        verification=verification,
        command=plan.command,
        templates=tally.templates(),
        made_from=tally.made_from(),
        figures=tally.figures(),
        losses=losses,
        about=about,
        num_from_decoding=num_from_decoding,
    )
