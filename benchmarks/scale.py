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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cold import CONFIG, LAYER, SITE
from benchmarks.measure import (
    QUICK,
    Ratio,
    Round,
    compare,
    interleave,
    measured,
    parse_arguments,
    ratio_of,
    ratio_table,
    say,
    store_results,
    table,
)
from builders.kit.columns import QuestionSource
from builders.trivia_qa.task import TASK, TriviaQAConfig
from tests.datasets_for_tests import MODEL, VERIFICATION, make_record
from tracekit.config import ModelConfig
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
_ROUNDS: Any = {"num_rounds": 3, "max_seconds": 35}
_OTHERS = {
    "stream": "tracekit.load_dataset, streaming",
    "plain": "datasets.load_dataset, streaming",
    "map": "tracekit.load_dataset, map-style",
}
"""Ways of reading with `datasets`, by their name in benchmarks/cold.py."""


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
    finish(layout, plan, TASK)
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
    config = TriviaQAConfig(model=ModelConfig(model="demo"), source=QuestionSource(source="sample"))
    return Plan(
        schema_version=SCHEMA_VERSION,
        config=CONFIG,
        task=TASK.name,
        about=TASK.about,
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


def measure_access(folders: Mapping[int, Path], *, is_quick: bool) -> list[Ratio]:
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
        ("first reads", lambda count, number: _often(count, partial(read_first, folders[count], number)), True),
        ("again", lambda count, number: read_again(stores[count], number), False),
        ("iterate", lambda count, number: _often(count, partial(iterate, folders[count])), True),
    ):
        say(f"\n{name}")
        rounds = [_per_sample(one, is_whole) for one in interleave(each(work), **(QUICK if is_quick else _ROUNDS))]
        target = "" if name == "again" else "<= 1.5"
        for count in sorted(folders)[1:]:
            ratios.append(
                compare(f"{name}: time a sample, of {count:,} / of {small}", rounds, f"{count:,}", small, target=target)
            )
    return ratios


def _num_passes(count: int) -> int:
    """Passes over a small dataset in one measurement, so that each takes a comparable time."""
    return max(1, _NUM_REPEATED // count)


def _often(count: int, work: Callable[[], object]) -> None:
    """Pass over a dataset, from opening it on, as often as it takes."""
    for _ in range(_num_passes(count)):
        work()


def _per_sample(one: Round, is_whole: bool) -> Round:
    """Seconds a sample."""
    counts = {name: int(name.replace(",", "")) for name in one}
    reads = {name: count * _num_passes(count) if is_whole else _NUM_REPEATED for name, count in counts.items()}
    return {name: took._replace(seconds=took.seconds / reads[name]) for name, took in one.items()}


def memory_ratios(walked: Mapping[str, Any]) -> list[Ratio]:
    """Memory at the end of an iteration divided by that after a tenth of it, where the kernel tells."""
    found: list[Ratio] = []
    for name, one in walked.items():
        mib = one.get("iterate", {}).get("mib", {})
        if mib.get("10%"):
            value = mib["100%"]["all"] / mib["10%"]["all"]
            found.append(ratio_of(f"iterate, {name}: memory at the end / after a tenth", [value], target="<= 1.05"))
    return found


def finish_ratios(written: Mapping[int, Mapping[str, float]]) -> list[Ratio]:
    """What finishing takes of the largest dataset, beside the next smaller one."""
    small, large = sorted(written)[-2:]
    seconds = written[large]["finish_seconds"] / large / (written[small]["finish_seconds"] / small)
    memory = written[large]["mib_after_finish"] / written[small]["mib_after_finish"]
    return [
        ratio_of(f"finishing: time a sample, of {large:,} / of {small:,}", [seconds], target="<= 1.5"),
        ratio_of(f"finishing: largest memory, of {large:,} / of {small:,}", [memory]),
    ]


def run(*, is_quick: bool = False) -> Mapping[str, Any]:
    """Measure, print and store."""
    sizes = QUICK_SIZES if is_quick else SIZES
    root = Path(tempfile.mkdtemp(prefix="tracekit-scale-"))
    folders = {count: root / str(count) for count in sizes}
    try:
        written = {count: _in_a_process(root, "scale", "--write", count, folder) for count, folder in folders.items()}
        largest = folders[max(sizes)]
        num_bytes = sum(path.stat().st_size for path in largest.rglob("*") if path.is_file())
        say(f"scale: {', '.join(f'{count:,}' for count in sizes)} samples, the largest {num_bytes / 1e6:.0f} MB")
        stores = {count: _in_a_process(root, "cold", "store", folder) for count, folder in folders.items()}
        others = {name: _in_a_process(root, "cold", how, largest) for how, name in _OTHERS.items()}
        verified = measured(partial(_verify, largest)).seconds
        ratios = measure_access(folders, is_quick=is_quick)
    finally:
        shutil.rmtree(root)
    ratios += memory_ratios({"TraceStore": stores[max(sizes)], **others}) + finish_ratios(written)
    results = {
        "ratios": ratios,
        "opens_in_a_second": stores[max(sizes)]["open_seconds"] < _OPEN_SECONDS,
        "num_bytes": num_bytes,
        "verify_seconds": verified,
        "written": {str(count): one for count, one in written.items()},
        "TraceStore": {str(count): one for count, one in stores.items()},
        **others,
    }
    say(ratio_table("Size: times and memory divided", ratios))
    rows = [
        [f"{n:,}", *(f"{one[key]:.3f}" for key in ("import_seconds", "open_seconds", "first_by_key_ms"))]
        for n, one in stores.items()
    ]
    say(table("A process that opens it", ["samples", "import, s", "open, s", "first sample, ms"], rows))
    say(f"\nverify: {verified:.1f} s; written: {written}; by `datasets`: {others}")
    if not is_quick:
        store_results("scale", results)
    return results


def _in_a_process(root: Path, module: str, *arguments: object) -> Any:
    """Run a module of the benchmarks, and decode what it prints last."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return json.loads(made.stdout.splitlines()[-1])


def _verify(folder: Path) -> None:
    """`tracekit verify`, as a command."""
    code = "import sys, tracekit.cli; sys.exit(tracekit.cli.main())"
    subprocess.run([sys.executable, "-c", code, "verify", str(folder)], check=True, capture_output=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        print(json.dumps(write(Path(sys.argv[3]), int(sys.argv[2]))))
        sys.exit(0)
    quick = parse_arguments(__doc__ or "", has_quick=True)
    sys.exit(0 if run(is_quick=quick) else 1)
