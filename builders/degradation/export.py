"""Exports: a finished configuration in the form that other tools read, under `exports/` beside the dataset.

    degradation-json    exports/outputs_{method}_{model}_{name}.json: one JSON list, an object a sample, in the fields
                        of the scripts that the degradation builder replaces

What differs from run to run (when, how long, on what device, in what batch) is not part of a dataset: it is taken from
the run log and is null where the log is gone.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from builders.degradation.record import DegradationRecord
from tracekit.errors import ConfigError, DatasetError
from tracekit.format.layout import Layout, choose_config, config_names, inside, sweep, write_atomic
from tracekit.format.manifest import ShardTask, Sidecar, read_manifest, read_plan, read_struct
from tracekit.read.store import TraceStore
from tracekit.run.run_log import LogLine, log_lines

__all__ = ["export_degradation"]

_UNKNOWN: Mapping[str, Any] = {
    "timestamp": None,
    "duration": None,
    "device": None,
    "batch_size_effective": None,
    "vram_usage_percent": None,
}


def export_degradation(root: Path, *, config: str | None = None, num_samples: int | None = None) -> Path:
    """Write a degradation run as one JSON list; the path of the file.

    Args:
        root: Folder of the dataset.
        config: Its configuration, where there are several.
        num_samples: So many samples alone, drawn by a fixed seed, in order; all by default.

    Raises:
        DatasetError: no such dataset or configuration, or one that is not finished.
        ConfigError: a configuration of another task, or fewer samples than one.
    """
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"--sample {num_samples}: expected at least 1; leave it out for all")
    layout = Layout(root, choose_config(config_names(root), config, root))
    if not layout.manifest.exists():
        raise DatasetError(f"{layout.config} in {str(root)!r} is not finished; run its command again first")
    logged = {key: line for shard in read_plan(layout).shards for key, line in _logged(layout, shard)}
    with TraceStore(str(root), config=layout.config) as store:
        keys = list(store.keys)
        if num_samples is not None and num_samples < len(keys):
            chosen = set(random.Random(0).sample(keys, num_samples))
            keys = [key for key in keys if key in chosen]
        levels = _levels(layout)
        rows = [_row(store.record(key), logged.get(key, _UNKNOWN), levels) for key in keys]
    first = rows[0]
    parts = (first["degradation_method"], first["model_name"], first["config_name"])
    several = [layout.config] if len(config_names(root)) > 1 else []
    drawn = [] if num_samples is None else [f"sample{len(rows)}"]
    name = "_".join(re.sub(r"[^\w.-]+", "-", part) for part in (*parts, *several, *drawn))
    path = inside(root, f"exports/outputs_{name}.json")
    sweep(root)
    write_atomic(path, json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False).encode())
    return path


def _levels(layout: Layout) -> list[float]:
    """The levels of a run, by size."""
    try:
        return sorted(msgspec.convert(read_manifest(layout).run.get("levels", []), list[float]))
    except msgspec.ValidationError as error:
        raise DatasetError(f"{layout.manifest}: {error} - at `$.run.levels`") from error


def _logged(layout: Layout, shard: ShardTask) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the run log says of each sample of a shard; of a batch that was computed twice, the last time."""
    lines = {line.batch: line for line in log_lines(layout) if line.shard == shard.name}
    keys = iter([sample.key for sample in read_struct(layout.sidecar(shard.name), Sidecar).samples])
    for number, batch in enumerate(shard.batches):
        line = lines.get(number)
        for size in line.parts if line else [len(batch)]:
            for key in islice(keys, size):
                if line:
                    yield key, _of_part(line, size)


def _of_part(line: LogLine, size: int) -> dict[str, Any]:
    """What a line of the log says of the samples of one part of its batch; seconds are shared out evenly."""
    share = line.used_memory_share
    return {
        "timestamp": line.time,
        "duration": line.seconds / line.num_samples,
        "device": line.device,
        "batch_size_effective": size,
        "vram_usage_percent": None if share is None else 100 * share,
    }


def _row(record: Any, logged: Mapping[str, Any], levels: list[float]) -> dict[str, Any]:
    """One sample in the fields of the scripts; levels are counted by size, whenever they came into the dataset."""
    if not isinstance(record, DegradationRecord):
        raise ConfigError(f"degradation-json is for the task degradation; this is {record.task_name()}")
    damage, generation, model = record.damage, record.generation, record.model
    if damage.level not in levels:
        raise DatasetError(f"sample {record.key} is of level {damage.level}, which is none of the manifest's: {levels}")
    num_out = len(record.generated_token_ids)
    is_4bit = (model.quantization or "").startswith(("nf4", "fp4"))
    return {
        "timestamp": logged["timestamp"],
        "experiment_id": f"{damage.method}|{model.id}|{record.config_name}",
        "config_name": record.config_name,
        "model_name": model.id,
        "model_variant": "it" if model.variant == "chat" else "base",
        "prompt_group": record.prompt_group,
        "prompt_id": record.prompt_id,
        "prompt_text": record.prompt_text,
        "output": record.generated_answer,
        "degradation_method": damage.method,
        "param_group_name": damage.group,
        "std_dev": damage.level,
        "level_value": damage.level,
        "level_index": levels.index(damage.level),
        "repeat_index": record.repeat,
        "seed": damage.seed,
        "restore_strategy": "subset_in_memory",
        "temperature": generation.temperature,
        "do_sample": generation.do_sample,
        "gen_params": {
            "temperature": generation.temperature,
            "do_sample": generation.do_sample,
            "max_new_tokens": generation.max_new_tokens,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
        },
        "tokens": num_out,
        "tokens_in": record.prompt_length,
        "tokens_out": num_out,
        "duration": logged["duration"],
        "batch_size_effective": logged["batch_size_effective"],
        "device": logged["device"],
        "dtype": model.dtype,
        "load_4bit": is_4bit,
        "usar_4bit": is_4bit,
        "image_used": record.image_filename is not None,
        "image_filename": record.image_filename,
        "vram_usage_percent": logged["vram_usage_percent"],
        "perplexity": record.perplexity,
    }
