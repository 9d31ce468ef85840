"""Merging: runs that differ only in their slice of the source become one dataset.

Shards are rewritten one by one, because a record names its shard: tensors are copied as they are, records get their new
shard number, and the schema version of today. Slices must not overlap; the result is ordered as the source is. A killed
merge resumes when it is run again: the plan in the new folder says what it is made of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import msgspec
from msgspec import UNSET

from tracekit.errors import CorruptShardError, DatasetError, PlanMismatchError
from tracekit.format.layout import PARTIAL_SUFFIX, Layout, config_names, shard_name, write_atomic
from tracekit.format.manifest import (
    Manifest,
    Plan,
    SampleIndex,
    ShardTask,
    Sidecar,
    read_manifest,
    read_plan,
    read_schema,
    read_struct,
    to_bytes,
)
from tracekit.format.shards import ShardWriter, sha256_file
from tracekit.records import (
    SCHEMA_VERSION,
    About,
    Record,
    RecordSchema,
    ResponseRecord,
    decode_record,
    encode_record,
    outcome_fault,
    schema_differences,
)
from tracekit.run.command import joined_command
from tracekit.run.finish import finish, is_finished
from tracekit.task import Task, check_settings, the_task
from tracekit.tensors import Payload

__all__ = ["merge"]

_SLICE = ("offset", "limit")
_SAMPLES_AT_ONCE = 8


class _Slice(msgspec.Struct):
    """What merging needs of `source` in a plan's `run`."""

    offset: Annotated[int, msgspec.Meta(ge=0)]
    limit: Annotated[int, msgspec.Meta(ge=1)] | None


class _Shards(msgspec.Struct):
    """What merging needs of `output`."""

    samples_per_shard: int


class _Devices(msgspec.Struct):
    """What merging needs of `model`."""

    device: str


class _RunSettings(msgspec.Struct):
    """The part of a plan's `run` that merging reads; a plan from a stranger may lack it."""

    source: _Slice
    output: _Shards
    model: _Devices


class _Part(NamedTuple):
    """One run to be joined."""

    layout: Layout
    plan: Plan
    rows: set[int]
    """Indices of the examples that it used: rows of the source, or numbers made of them."""


def merge(folders: Sequence[Path], out: Path, *, config: str | None = None) -> Manifest:
    """Join complete runs into a new folder, or finish what the same merge began there.

    Raises:
        DatasetError: a folder is no complete dataset, slices overlap, or `out` holds something else.
        PlanMismatchError: the runs differ in more than their slice; the message shows in what.
        ShardLockedError: another process merges into `out`.
    """
    parts = sorted(
        (_open(folder, config) for folder in folders), key=lambda part: (_slice_of(part.plan), min(part.rows))
    )
    _check(parts)
    layout = Layout(out, parts[0].layout.config)
    told = _told_alike(parts)
    task = None if told else the_task(parts[0].plan.task, where=folders[0], to_do="merging")
    about = task.about if task else told.about if told and told.about else About()
    plan = _joined_plan(parts, about)
    schema = read_schema(parts[0].layout) if task is None else RecordSchema.of(task.record)
    if fault := outcome_fault(about.outcome, schema):
        raise DatasetError(f"{parts[0].layout.manifest}: its outcome {fault}")
    for part in parts:
        check_settings(part.plan, where=part.layout.plan)
        if task is not None:
            _check_records(part.layout, task)
    if not _is_begun(layout, plan):
        write_atomic(layout.plan, to_bytes(plan))
    elif is_finished(layout):
        return read_struct(layout.manifest, Manifest)
    numbers = iter(plan.shards)
    record_type = schema.record_type if task is None else task.record
    for part in parts:
        for shard in part.plan.shards:
            _copy(part.layout, shard.name, layout, next(numbers), record_type, about)
    write_atomic(layout.schema, schema.to_bytes())
    return finish(layout, plan, task, like=told)


def _told_alike(parts: Sequence[_Part]) -> Manifest | None:
    """The manifest of the first run, where what the manifests say of their task holds for the whole too; None where
    the task's code has to say it anew: of older versions, and where the task sums up what all records hold."""
    manifests = [read_manifest(part.layout, to_continue=True) for part in parts]
    schemas = [read_schema(part.layout).document for part in parts]
    first = manifests[0]
    is_alike = all(one.about == first.about and one.card == first.card and not one.report for one in manifests)
    is_said = first.about is not None and first.card is not UNSET
    return first if is_said and is_alike and all(one == schemas[0] for one in schemas) else None


def _is_begun(layout: Layout, plan: Plan) -> bool:
    """Whether this merge was begun in its folder.

    Raises:
        DatasetError: the folder holds something else.
    """
    if layout.plan.exists() and read_plan(layout) == plan:
        return True
    if any(path.is_file() and path.suffix != PARTIAL_SUFFIX for path in layout.root.rglob("*")):
        raise DatasetError(
            f"--out {str(layout.root)!r} exists already, and not by a merge of these folders; merge writes a new "
            "folder. Choose another --out"
        )
    return False


def _open(folder: Path, config: str | None) -> _Part:
    names = config_names(folder)
    if config is None and len(names) > 1:
        raise DatasetError(f"{str(folder)!r} has {', '.join(names)}; choose one with --dataset-config")
    layout = Layout(folder, config or names[0])
    if not layout.manifest.exists():
        raise DatasetError(f"{str(folder)!r}: {layout.config} is not finished; run its command again first")
    plan = read_plan(layout, to_continue=True)
    if plan.is_growing:
        raise DatasetError(
            f"{str(folder)!r}: {layout.config} grows with what is asked of a server and has no slice of a source to be "
            "joined by. Read several folders as one: TraceStore([one, other])"
        )
    try:
        msgspec.convert(plan.run, _RunSettings)
        joined_command([plan.command])
    except (msgspec.ValidationError, DatasetError) as error:
        raise DatasetError(f"{layout.plan} is not what a run writes: {error} (in `run` or `command`)") from error
    rows = {row for shard in plan.shards for batch in shard.batches for row in batch}
    if not rows:
        raise DatasetError(f"{layout.plan} names no rows of a source, so that there is nothing to merge")
    return _Part(layout, plan, rows)


def _check(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for other in parts[1:]:
        a, b = _without_slice(first.plan), _without_slice(other.plan)
        differences = [f"    {name}: {a[name]!r} and {b[name]!r}" for name in sorted(a) if a[name] != b[name]]
        if differences:
            raise PlanMismatchError(
                f"{first.layout.root} and {other.layout.root} differ in more than their slice of the source:\n"
                + "\n".join(differences)
            )
    seen: dict[int, Path] = {}
    for part in parts:
        for row in part.rows:
            if row in seen:
                raise DatasetError(
                    f"row {row} of the source is in {seen[row]} and in {part.layout.root}; slices overlap"
                )
            seen[row] = part.layout.root


def _check_records(layout: Layout, task: Task[Any, Any]) -> None:
    """See that records lose nothing when they are written again.

    Raises:
        PlanMismatchError: they have fields that the installed task does not know.
    """
    found = schema_differences(read_schema(layout), RecordSchema.of(task.record))
    lost = [path for path, (_, now) in found.items() if now == "(absent)"]
    if lost:
        raise PlanMismatchError(
            f"{layout.root}: its records have the field `{lost[0]}`, which the installed task {task.name!r} does not "
            "know; upgrade the package that defines the task"
        )


def _without_slice(plan: Plan) -> dict[str, Any]:
    """What has to be the same."""
    run = {section: dict(values) if isinstance(values, dict) else values for section, values in plan.run.items()}
    for name in _SLICE:
        run["source"].pop(name)
    run["output"].pop("samples_per_shard")
    run["model"].pop("device")  # `device_type` says what came of it
    source = msgspec.structs.replace(plan.source, num_used=0, skipped=[])
    fields = ("schema_version", "config", "task", "model", "device_type", "versions")
    return {name: getattr(plan, name) for name in fields} | {"source": source} | {f"run.{k}": v for k, v in run.items()}


def _joined_plan(parts: Sequence[_Part], about: About) -> Plan:
    plans = [part.plan for part in parts]
    tasks = [task for plan in plans for task in plan.shards]
    split = plans[0].source.split
    starts, stops = zip(*map(_slice_of, plans), strict=True)
    run = dict(plans[0].run)
    run["source"] = {**run["source"], "offset": min(starts), "limit": max(stops) - min(starts)}
    return msgspec.structs.replace(
        plans[0],
        schema_version=SCHEMA_VERSION,
        run=run,
        source=msgspec.structs.replace(
            plans[0].source,
            num_used=sum(plan.source.num_used for plan in plans),
            skipped=[skipped for plan in plans for skipped in plan.source.skipped],
        ),
        shards=[
            ShardTask(name=shard_name(split, number), number=number, batches=task.batches)
            for number, task in enumerate(tasks)
        ],
        command=joined_command([plan.command for plan in plans]),
        grown=[],
        about=about,
    )


def _slice_of(plan: Plan) -> tuple[int, int]:
    """First row of the source that a run read and one past the last; the numbers in its batches may be of pieces."""
    offset, limit = plan.run["source"]["offset"], plan.run["source"]["limit"]
    num_rows = plan.source.num_rows
    return offset, num_rows if limit is None else min(offset + limit, num_rows)


def _copy(source: Layout, name: str, target: Layout, shard: ShardTask, record_type: type[Record], about: About) -> None:
    """Copy one shard, its records renumbered, or what is missing of it."""
    if target.shard(shard.name).exists() and target.sidecar(shard.name).exists():
        return
    sidecar = read_struct(source.sidecar(name), Sidecar, to_continue=True)
    if not source.shard(name).exists():
        raise DatasetError(
            f"{source.shard(name)} is not here; merging needs the shards. Fetch a published dataset first "
            "(huggingface_hub.snapshot_download)"
        )
    has_size = source.shard(name).stat().st_size == sidecar.num_bytes
    if not has_size or sha256_file(source.shard(name)) != sidecar.sha256:
        raise CorruptShardError(
            f"{source.shard(name)} is not what its sidecar says; run `tracekit verify {source.root}`"
        )
    pairs = list(zip(sidecar.records, sidecar.samples, strict=True))
    with ShardWriter(target, shard.name, shard.number) as writer, source.shard(name).open("rb") as file:
        for start in range(writer.num_batches * _SAMPLES_AT_ONCE, len(pairs), _SAMPLES_AT_ONCE):
            samples = [
                _renumbered(file, raw, index, shard.number, record_type, about)
                for raw, index in pairs[start:][:_SAMPLES_AT_ONCE]
            ]
            if start == 0:  # what is said of the shard is said once
                writer.append(samples, sidecar.verification, sidecar.hidden_norms, sidecar.losses)
            else:
                writer.append(samples)
        if not writer.is_done:
            writer.finish()


def _renumbered(
    file: BinaryIO, raw: msgspec.Raw, index: SampleIndex, shard: int, record_type: type[Record], about: About
) -> tuple[str, bytes, Payload]:
    record: Record = decode_record(bytes(raw), record_type, where=index.key)
    record = msgspec.structs.replace(record, schema_version=SCHEMA_VERSION)
    if isinstance(record, ResponseRecord) and not record.generated_text.startswith(record.prompt):  # of schema 1.x
        record = msgspec.structs.replace(record, generated_text=record.prompt + record.generated_text)
    if about.outcome.shard is not None:
        record = msgspec.structs.replace(record, **{about.outcome.shard: shard})
    file.seek(index.tensors_offset)
    data = file.read(index.tensors_size)
    payload = Payload([data], index.data_offset - index.tensors_offset, index.tensors_size, index.tensors)
    return index.key, encode_record(record), payload
