"""Planning: a configuration and its examples in, shard tasks out; and what a run will cost.

Examples go to shards in the source's order. Within a shard batches are made of examples of like prompt length, longest
first, so that memory runs out at once or not at all, and samples stand in the tar in the order they are computed in.
"""

import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tracekit.config import FileSource, PromptConfig, RunConfig
from tracekit.errors import NoSpaceError, PlanMismatchError
from tracekit.format.layout import shard_name
from tracekit.format.manifest import Plan, ShardTask, SourceInfo
from tracekit.records import SCHEMA_VERSION, ModelInfo
from tracekit.run.command import named_file
from tracekit.sizes import filesize
from tracekit.task import Example, Task
from tracekit.version import __version__

__all__ = [
    "Devices",
    "Estimate",
    "check_space",
    "deal",
    "difference_lines",
    "differences",
    "make_plan",
    "mismatch",
    "num_shards",
    "public_run",
    "versions",
]

_VERSIONED = ("torch", "transformers", "tokenizers", "numpy", "bitsandbytes", "peft")
_PLACEMENT = ("device_map", "max_memory", "offload_folder")
"""Settings of the model that are not written down: where weights lie decides how fast a dataset is made and not what is
in it, so a folder that was begun on one device goes on shared out over several, and the other way round."""

_LATER = {"capture": {"numbers": "all", "capture_from": "auto"}}
"""Settings that plans of this schema version may lack, and what was done without them."""


class Devices(NamedTuple):
    """Where a model runs, as a plan knows it."""

    device_type: str
    """`cpu`, `cuda` or `mps`."""
    num_threads: int
    """Threads that the CPU's part of the work is done in."""


def num_shards(examples: Sequence[Example], size: int) -> int:
    """Shards that the examples fill."""
    return sum(1 for _ in _deal(examples, size))


class Estimate(NamedTuple):
    """What a run will cost, measured on a small batch."""

    num_examples: int
    num_prompt_tokens: int
    bytes_per_sample: int
    total_bytes: int
    num_shards: int
    seconds: float
    """Time of the whole run, from the measured batch; what is done once a cell is counted once a cell."""
    num_measured: int
    """Samples in the measured batch."""
    overhead_seconds: float = 0.0
    """Time in it that does not depend on the number of samples a cell."""
    overhead: str = ""
    """What that goes into."""
    num_there: int = 0
    """Examples that are there already, of a run that grows; everything above is without them."""


def versions() -> dict[str, str]:
    """Versions of the packages whose behaviour a dataset's bytes depend on."""
    return {"tracekit": __version__, **{name: version(name) for name in _VERSIONED if find_spec(name)}}


def public_run(config: RunConfig, model: ModelInfo, source: SourceInfo) -> dict[str, Any]:
    """The configuration as it is written down: names instead of local paths, and nothing of how it was asked for."""
    run = msgspec.json.decode(msgspec.json.encode(config))
    del run["output"]["out"], run["output"]["dry_run"], run["output"]["force_run"], run["publish"]
    del run["cluster"]
    for name in config.not_recorded:
        del run[name]
    is_local = config.model.model != "demo" and Path(config.model.model).expanduser().exists()
    run["model"]["model"] = model.id if is_local else config.model.model
    run["model"]["device"] = config.model.device.partition(":")[0]
    for name in _PLACEMENT:
        del run["model"][name]
    if config.model.model_path is not None:
        run["model"]["model_path"] = model.id
    if config.model.adapter is not None:
        run["model"]["adapter"] = str(model.adapter).partition("@")[0]
    named = config.source.source if isinstance(config.source, FileSource) else "default"
    if named not in ("default", "sample") and Path(named).expanduser().exists():
        run["source"]["source"] = source.id
    prompt = getattr(config, "prompt", None)
    template = prompt.chat_template if isinstance(prompt, PromptConfig) else None
    if template is not None and Path(template).is_file():
        run["prompt"]["chat_template"] = named_file(template)
    for name in config.local_files:
        if name in run:
            run[name] = None if run[name] is None else named_file(run[name])
    return run


def make_plan(
    *,
    name: str,
    task: Task[Any, Any],
    run: dict[str, Any],
    config: RunConfig,
    model: ModelInfo,
    source: SourceInfo,
    examples: Sequence[Example],
    lengths: Sequence[int],
    batch_size: int,
    devices: Devices,
) -> Plan:
    """Deal the examples out to shards and batches. `lengths` are prompt tokens, example by example. No command."""
    return Plan(
        schema_version=SCHEMA_VERSION,
        config=name,
        task=task.name,
        run=run,
        model=model,
        source=source,
        batch_size=batch_size,
        device_type=devices.device_type,
        num_threads=devices.num_threads,
        versions=versions(),
        shards=deal(examples, lengths, config=config, batch_size=batch_size),
        about=task.about,
        code=None if task.file is None else named_file(str(task.file)),
    )


def deal(
    examples: Sequence[Example], lengths: Sequence[int], *, config: RunConfig, batch_size: int, first_shard: int = 0
) -> list[ShardTask]:
    """Examples dealt out to shards and batches; shards are counted from `first_shard`."""
    shards = []
    for number, part in enumerate(_deal(examples, config.output.samples_per_shard), start=first_shard):
        batches: list[list[int]] = []
        for _, cell in groupby(part, key=lambda pair: pair[1].cell):
            ordered = sorted(cell, key=lambda pair: (-lengths[pair[0]], pair[0]))
            indices = [example.index for _, example in ordered]
            batches += [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        shards.append(ShardTask(name=shard_name(config.source.split, number), number=number, batches=batches))
    return shards


def _deal(examples: Sequence[Example], size: int) -> Iterator[list[tuple[int, Example]]]:
    """Examples shard by shard, with their places: `size` a shard, cells cut only where one is larger than that."""
    part: list[tuple[int, Example]] = []
    for _, group in groupby(enumerate(examples), key=lambda pair: pair[1].cell):
        cell = list(group)
        if part and len(part) + len(cell) > size:
            yield part
            part = []
        while len(cell) > size:
            yield cell[:size]
            cell = cell[size:]
        part += cell
    if part:
        yield part


def differences(plan: Plan, fresh: Plan) -> dict[str, tuple[Any, Any]]:
    """What two plans set out to do differently, by path: the value of the first and of the second."""
    old, new = (_flat(msgspec.to_builtins(_comparable(p))) for p in (plan, fresh))
    return {
        name: (old.get(name, "(absent)"), new.get(name, "(absent)"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def mismatch(folder: Path, plan: Plan, found: dict[str, tuple[Any, Any]]) -> PlanMismatchError:
    """The error for a folder that was begun with something else; `found` are the differences that matter."""
    to_do = "Run the original command to go on with it"
    if "code" in found:
        to_do = "The file that defines the task was changed or renamed since. Run it as it was"
    if any(name.startswith("record.") for name in found):
        to_do = "The task's record was changed since. Install the version of the task that began it"
    if "schema_version" in found:
        to_do = "It can be read, verified and published; to add to it, use the tracekit that began it"
    return PlanMismatchError(
        f"{folder} was begun with another plan for {plan.config!r}:\n{difference_lines(found)}\n"
        f"{to_do}, or choose another --out (or --dataset-config)"
    )


def difference_lines(found: dict[str, tuple[Any, Any]]) -> str:
    """Differences of two plans, a line each."""
    return "\n".join(f"    {name}: {old!r} there, {new!r} now" for name, (old, new) in found.items())


def check_space(folder: Path, estimate: Estimate, *, num_kept: int | None = None) -> None:
    """Refuse a run that would not fit on the disk; `num_kept` shards of it, where the others are deleted as it goes.

    Raises:
        NoSpaceError: with what is needed and what is free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    needed = estimate.total_bytes
    if num_kept is not None:
        needed = needed * min(num_kept, estimate.num_shards) // max(1, estimate.num_shards)
    if needed > free:
        raise NoSpaceError(
            f"this run needs about {filesize(needed)}, {existing} has {filesize(free)} free. Fewer "
            "--sites, --layers or --tokens, a smaller --store-dtype or --limit, or another --out"
        )


def _comparable(plan: Plan) -> Plan:
    """A plan without what follows from the rest of it, and with all settings."""
    shards: list[ShardTask] = []
    source = msgspec.structs.replace(plan.source, skipped=[])
    run = plan.run | {part: later | plan.run[part] for part, later in _LATER.items() if part in plan.run}
    if "device" in run.get("model", {}):  # `device_type` says what came of it, of `auto` and of a device map too
        run = run | {"model": {name: value for name, value in run["model"].items() if name != "device"}}
    return msgspec.structs.replace(
        plan,
        run=run,
        shards=shards,
        source=source,
        batch_size=0,
        num_threads=0,
        command="",
        grown=[],
        about=None,
        captured_from="pass",
    )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    if isinstance(value, dict) and value:
        return {
            k: v for name, inner in value.items() for k, v in _flat(inner, f"{path}.{name}" if path else name).items()
        }
    return {path: value}
