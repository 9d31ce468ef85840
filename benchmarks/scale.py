"""A dataset of 100,000 small samples beside one of 1,000: opening, reading at random, iterating, finishing, verifying.

    a sample      a record of 12 tokens and the hidden states of one layer, (1, 12, 16) float16; 256 samples a shard
    first reads   every sample once, in random order, from a store just opened: time a sample
    again         samples at random, all of which were read before: of 1,000 the store remembers where every one lies
                  (it remembers 4,096), of 100,000 it looks that up again
    iterate       record and tensor of every sample, in order

Written by ShardWriter and finished as a run is. Opening and memory are taken in processes of their own
(benchmarks/cold.py), with the files in the page cache.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cold import CONFIG, LAYER, SITE
from benchmarks.measure import (
    Ratio,
    Round,
    compare,
    interleave,
    parse_arguments,
    ratio_of,
    ratio_table,
    say,
    store_results,
    table,
)
from builders.trivia_qa import TriviaQAConfig
from tests.datasets_for_tests import MODEL, VERIFICATION, make_record
from tracekit.config import ModelConfig, SourceConfig
from tracekit.format.layout import Layout, shard_name, write_atomic
from tracekit.format.manifest import Plan, ShardTask, SourceInfo, to_bytes
from tracekit.format.shards import ShardWriter
from tracekit.read.store import TraceStore
from tracekit.records import SCHEMA_VERSION, encode_record
from tracekit.run.finish import finish
from tracekit.run.plan import public_run
from tracekit.tensors import Payload, TensorSpec, encode

SIZES = (1_000, 10_000, 100_000)
QUICK_SIZES = (500, 1_000, 5_000)
_SHARD, _TOKENS, _WIDTH = 256, 12, 16
_NUM_REPEATED = 20_000
_OPEN_SECONDS = 1.0


def write(folder: Path, count: int) -> dict[str, float]:
    """Write and finish a dataset; seconds, and this process's largest memory before and after each (MiB)."""
    layout, plan = Layout(folder, CONFIG), _plan(count)
    write_atomic(layout.plan, to_bytes(plan))
    layout.sidecar("-").parent.mkdir(parents=True)
    found = {"mib_before": _peak_mib()}
    started = time.perf_counter()
    for task in plan.shards:
        with ShardWriter(layout, task.name, task.number) as writer:
            writer.append([_sample(number) for number in task.batches[0]], VERIFICATION)
            writer.finish()
    found |= {"write_seconds": time.perf_counter() - started, "mib_after_write": _peak_mib()}
    started = time.perf_counter()
    finish(layout, plan)
    return found | {"finish_seconds": time.perf_counter() - started, "mib_after_finish": _peak_mib()}


def _plan(count: int) -> Plan:
    """The plan of a run over so many questions."""
    source = SourceInfo(
        id="made_up.jsonl",
        revision="sha256:0",
        subset=None,
        split="train",
        num_rows=count,
        num_used=count,
        skipped=[],
    )
    rows = [list(range(start, min(start + _SHARD, count))) for start in range(0, count, _SHARD)]
    config = TriviaQAConfig(model=ModelConfig(model="demo"), source=SourceConfig(source="sample"))
    return Plan(
        schema_version=SCHEMA_VERSION,
        config=CONFIG,
        task="trivia_qa",
        run=public_run(config, MODEL, source),
        model=MODEL,
        source=source,
        batch_size=_SHARD,
        device_type="cpu",
        num_threads=1,
        versions={},
        shards=[ShardTask(name=shard_name("train", i), number=i, batches=[one]) for i, one in enumerate(rows)],
    )


def _sample(number: int) -> tuple[str, bytes, Payload]:
    """Key, record and payload."""
    key = f"{number:06d}"
    hidden = np.random.default_rng(number).standard_normal((1, _TOKENS, _WIDTH), dtype=np.float32).astype(np.float16)
    spec = TensorSpec(
        name=SITE,
        dtype="float16",
        shape=list(hidden.shape),
        axes=["L", "T", "D"],
        layers=[LAYER],
        positions=[[0, _TOKENS]],
        layout="dense",
        num_keys=0,
        choice_offsets=[],
    )
    record = make_record(
        key,
        [spec],
        num_tokens=_TOKENS,
        prompt_length=_TOKENS - 4,
        has_answer=True,
        question_id=f"q{key}",
        split="train",
        model=MODEL,
    )
    return key, encode_record(record), encode({SITE: hidden})


def _peak_mib() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_a_process(*command: str, cache: Path) -> Any:
    """Run a module of the benchmarks, and decode what it prints last."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(
        [sys.executable, "-m", *command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    return json.loads(made.stdout.splitlines()[-1])


def read_first(folder: Path, number: int) -> None:
    """Every sample once, in random order."""
    with TraceStore(folder) as store:
        order = list(range(len(store)))
        random.Random(number).shuffle(order)
        for row in order:
            store[row].hidden_states(layer=LAYER).sum()


def read_again(store: TraceStore, number: int) -> None:
    """Samples at random."""
    rng = random.Random(number)
    for _ in range(_NUM_REPEATED):
        store[rng.randrange(len(store))].hidden_states(layer=LAYER).sum()


def iterate(folder: Path) -> None:
    """Every record and tensor, in order."""
    with TraceStore(folder) as store:
        for sample in store:
            assert sample.record.key == sample.key
            sample.hidden_states(layer=LAYER).sum()


def measure_access(folders: Mapping[int, Path], *, num_rounds: int) -> list[Ratio]:
    """Time a sample of the larger datasets divided by that of the smallest."""
    stores = {count: TraceStore(folder) for count, folder in folders.items()}
    for store in stores.values():
        for sample in store:
            sample.hidden_states(layer=LAYER)

    def each(work: Callable[[int, int], object]) -> dict[str, Callable[[int], object]]:
        return {f"{count:,}": partial(work, count) for count in folders}

    small = f"{min(folders):,}"
    ratios: list[Ratio] = []
    for name, work, is_whole in (
        ("first reads", lambda count, number: read_first(folders[count], number), True),
        ("again", lambda count, number: read_again(stores[count], number), False),
        ("iterate", lambda count, number: iterate(folders[count]), True),
    ):
        say(f"\n{name}")
        rounds = [
            _per_sample(one, is_whole) for one in interleave(each(work), num_rounds=num_rounds, max_seconds=40)
        ]
        target = "" if name == "again" else "<= 1.5"
        for count in sorted(folders)[1:]:
            ratios.append(
                compare(f"{name}: time a sample, of {count:,} / of {small}", rounds, f"{count:,}", small, target=target)
            )
    return ratios


def _per_sample(one: Round, is_whole: bool) -> Round:
    """Seconds a sample."""
    return {
        name: measured._replace(seconds=measured.seconds / (int(name.replace(",", "")) if is_whole else _NUM_REPEATED))
        for name, measured in one.items()
    }


def measure_memory(cold: Mapping[str, Sequence[Any]]) -> list[Ratio]:
    """Memory at the end of an iteration divided by that after a tenth of it."""
    ratios: list[Ratio] = []
    for how, runs in cold.items():
        walks = [run["iterate"]["mib"] for run in runs]
        if all(walk["10%"] for walk in walks):
            values = [walk["100%"]["all"] / walk["10%"]["all"] for walk in walks]
            ratios.append(ratio_of(f"iterate, {how}: memory at the end / after a tenth", values, target="<= 1.05"))
    return ratios


def run(*, is_quick: bool = False) -> Mapping[str, Any]:
    """Measure, print and store."""
    sizes = QUICK_SIZES if is_quick else SIZES
    root = Path(tempfile.mkdtemp(prefix="tracekit-scale-"))
    cache = root / "cache"
    folders = {count: root / str(count) for count in sizes}
    largest = folders[max(sizes)]
    try:
        written = {str(n): in_a_process("benchmarks.scale", "--write", str(n), str(folders[n]), cache=cache) for n in sizes}
        say(f"scale: {', '.join(f'{n:,}' for n in sizes)} samples; the largest {_size(largest) / 1e6:.0f} MB")
        stores = {str(n): in_a_process("benchmarks.cold", "store", str(folders[n]), cache=cache) for n in sizes}
        cold = {"TraceStore": [stores[str(max(sizes))]]}
        for how, name in (("stream", "tracekit.load_dataset"), ("plain", "datasets.load_dataset")):
            cold[name] = [in_a_process("benchmarks.cold", how, str(largest), cache=cache)]
        mapped = in_a_process("benchmarks.cold", "map", str(largest), cache=cache)
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import sys, tracekit.cli; sys.exit(tracekit.cli.main())", "verify", str(largest)],
            check=True,
            capture_output=True,
        )
        verify_seconds = time.perf_counter() - started
        ratios = measure_access(folders, num_rounds=1 if is_quick else 3) + measure_memory(cold)
    finally:
        shutil.rmtree(root)
    opened = stores[str(max(sizes))]["open_seconds"]
    small, middle, large = (written[str(n)] for n in sizes)
    per_sample = [one["finish_seconds"] / n for one, n in zip((middle, large), sizes[1:], strict=True)]
    ratios.append(
        ratio_of(f"finishing: time a sample, of {sizes[2]:,} / of {sizes[1]:,}", [per_sample[1] / per_sample[0]])
    )
    say(ratio_table("Size: time a sample divided", ratios))
    figures = {
        "open_seconds": {str(n): one["open_seconds"] for n, one in zip(sizes, stores.values(), strict=True)},
        "import_seconds": stores[str(max(sizes))]["import_seconds"],
        "opens_in_a_second": opened < _OPEN_SECONDS,
        "cold": {"TraceStore": stores, "load_dataset, map": mapped, **{k: v[0] for k, v in cold.items() if k != "TraceStore"}},
        "written": written,
        "verify_seconds": verify_seconds,
        "verify_microseconds_per_sample": 1e6 * verify_seconds / max(sizes),
    }
    del small
    rows = [[n, f"{one['open_seconds']:.3f}", f"{one['first_by_key_ms']:.2f}"] for n, one in stores.items()]
    say(table("A process that opens it", ["samples", "open, s", "first sample, ms"], rows))
    say(f"\nimport {figures['import_seconds']:.2f} s, verify {verify_seconds:.1f} s, " + json.dumps(written))
    results = {"ratios": ratios, **figures}
    if not is_quick:
        store_results("scale", results)
    return results


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        print(json.dumps(write(Path(sys.argv[3]), int(sys.argv[2]))))
        sys.exit(0)
    quick = parse_arguments(__doc__ or "", has_quick=True)
    sys.exit(0 if run(is_quick=quick) else 1)
