"""Measuring: variants run in turn, A B A B, and compared round by round; only ratios are handed out.

Other programs use the same cores at times. So a measurement starts when there are cores free for it, notes how long
its threads were ready to run and had to wait for a core (Linux says so), and is repeated when that was too long. Ratios
come from the rounds that were left in peace, or from all rounds where there were too few of those.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import torch

from benchmarks.page import write_page

__all__ = [
    "QUICK",
    "Measured",
    "Ratio",
    "Round",
    "compare",
    "interleave",
    "measured",
    "parse_arguments",
    "percentile",
    "ratio_of",
    "ratio_table",
    "say",
    "store_results",
    "table",
]

RESULTS = Path(__file__).parent / "results.json"

QUICK: Any = {"num_rounds": 1, "max_seconds": 1.0, "min_rounds": 1}
"""Arguments of `interleave` for a quick try: everything once, whatever other programs do."""
_CALM = 0.10
"""Share of its time that a measurement may spend waiting for a core and still count as calm."""
_SLACK = 0.10
"""Share of the machine that other programs may take beyond the cores that are not needed here."""
_QUIET_WAIT_SECONDS = 10.0
_QUIET_PROBE_SECONDS = 0.3
_NUM_TRIES = 3
"""How often a measurement is made at most before its round counts as disturbed."""
_MIN_CALM_ROUNDS = 3
_VERSIONED = ("torch", "transformers", "numpy", "pyarrow", "msgspec", "lmdb", "zarr")
_PEERS = ("sae-lens", "nnsight", "transformer-lens", "datasets")
"""What is named beside these where benchmarks/peers.py runs."""


class Measured(NamedTuple):
    """One measurement."""

    seconds: float
    """Wall time."""
    waiting: float
    """Time that threads of this process spent waiting for a core, divided by the wall time; 0 where nobody tells."""


Round = Mapping[str, Measured]
"""One measurement of every variant, taken one after the other."""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How two variants compare, over rounds."""

    name: str
    """What is divided by what."""
    low: float
    """Smallest ratio of a round."""
    median: float
    """Median of the rounds."""
    high: float
    """Largest."""
    num_rounds: int
    """Rounds it is made of."""
    num_disturbed: int
    """Rounds left out because they had to wait for other programs; 0 where all had to be used."""
    is_calm: bool
    """Whether only undisturbed rounds were used."""
    target: str
    """What it should be, as `>= 3` or `<= 1.4`; empty where nothing was asked."""
    is_met: bool | None
    """Whether the median reaches the target; None without one."""

    def cells(self) -> list[str]:
        """A row of a table."""
        mark = {True: "yes", False: "NO", None: ""}[self.is_met]
        rounds = f"{self.num_rounds}{'' if self.is_calm else ' (busy machine)'}"
        return [self.name, f"{self.low:.2f}", f"{self.median:.2f}", f"{self.high:.2f}", rounds, self.target, mark]


RATIO_COLUMNS = ("ratio", "min", "median", "max", "rounds", "target", "reached")


def measured(work: Callable[[], object]) -> Measured:
    """Run some work once, after a garbage collection."""
    gc.collect()
    waited, started = _waited_seconds(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    waited = _waited_seconds() - waited
    del result
    return Measured(seconds, max(0.0, waited / seconds))


def interleave(
    variants: Mapping[str, Callable[[int], object]],
    *,
    num_rounds: int,
    max_seconds: float,
    min_rounds: int = 2,
    before: Callable[[str], object] | None = None,
) -> list[Round]:
    """Measure all variants round after round, each given the round's number; their order rotates.

    Rounds are added until `num_rounds` of them were calm or the time is over. `before` is called with a
    variant's name right before its measurement, and not measured.
    """
    rounds: list[Round] = []
    names = list(variants)
    end = time.perf_counter() + max_seconds
    while sum(_is_calm(one) for one in rounds) < num_rounds:
        number = len(rounds)
        longest = max((sum(m.seconds for m in one.values()) for one in rounds), default=0.0)
        if number >= min_rounds and time.perf_counter() + longest > end:
            break
        turned = names[number % len(names) :] + names[: number % len(names)]
        found = {
            name: _in_peace(partial(variants[name], number), end, partial(before, name) if before else None)
            for name in turned
        }
        rounds.append(found)
        times = "  ".join(f"{name} {found[name].seconds:.3g} s" for name in names)
        say(f"  round {number + 1}{'' if _is_calm(found) else ' (disturbed)'}: {times}")
    return rounds


def compare(name: str, rounds: Sequence[Round], numerator: str, denominator: str, *, target: str = "") -> Ratio:
    """The ratio of two variants' times. `target` reads `>= 3` or `<= 1.4`."""
    calm = [one for one in rounds if _is_calm(one)]
    is_calm = len(calm) >= min(_MIN_CALM_ROUNDS, len(rounds))
    used = calm if is_calm else rounds
    values = [one[numerator].seconds / one[denominator].seconds for one in used]
    ratio = ratio_of(name, values, target=target)
    return msgspec.structs.replace(ratio, num_disturbed=len(rounds) - len(used), is_calm=is_calm)


def ratio_of(name: str, values: Sequence[float], *, target: str = "") -> Ratio:
    """A ratio of something else than times, as of memory, which other programs do not disturb."""
    median = statistics.median(values)
    return Ratio(
        name=name,
        low=min(values),
        median=median,
        high=max(values),
        num_rounds=len(values),
        num_disturbed=0,
        is_calm=True,
        target=target,
        is_met=_is_met(median, target),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return float(np.quantile(np.asarray(values), share))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: first column to the left, the others to the right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        rest = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return f"{row[0].ljust(widths[0])}  {rest}".rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([f"\n{title}", line(cells[0]), rule, *[line(row) for row in cells[1:]]])


def ratio_table(title: str, ratios: Sequence[Ratio]) -> str:
    """A table of ratios."""
    return table(title, RATIO_COLUMNS, [ratio.cells() for ratio in ratios])


def store_results(name: str, results: Mapping[str, Any]) -> None:
    """Put one benchmark's results, with the machine they come from, into results.json beside the others'."""
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stored[name] = msgspec.to_builtins({"machine": _machine(), **results})
    rounded = json.loads(json.dumps(stored), parse_float=lambda text: float(f"{float(text):.4g}"))
    RESULTS.write_text(json.dumps(rounded, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_page(json.loads(RESULTS.read_text(encoding="utf-8")), RESULTS.parent)  # keys in the order of the file
    say(f"\n{name}: written to {RESULTS}")


def parse_arguments(description: str, *, has_quick: bool = False) -> bool:
    """Read the command line of a benchmark, and set torch's threads; whether a quick try was asked for."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    if has_quick:
        parser.add_argument("--quick", action="store_true", help="a short try; nothing is stored")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return has_quick and arguments.quick


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def _is_met(value: float, target: str) -> bool | None:
    if not target:
        return None
    sign, _, bound = target.partition(" ")
    assert sign in (">=", "<="), target
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def _in_peace(work: Callable[[], object], end: float, before: Callable[[], object] | None) -> Measured:
    """The measurement least disturbed of up to `_NUM_TRIES`, each begun when the machine is quiet."""
    tries: list[Measured] = []
    while not tries or (tries[-1].waiting > _CALM and len(tries) < _NUM_TRIES and time.perf_counter() < end):
        _wait_for_quiet(end)
        if before is not None:
            before()
        tries.append(measured(work))
    return min(tries, key=lambda one: one.waiting)


def _is_calm(one: Round) -> bool:
    return max(measurement.waiting for measurement in one.values()) <= _CALM


def _wait_for_quiet(end: float) -> None:
    """Wait a little for other programs to leave us our cores."""
    give_up = min(end, time.perf_counter() + _QUIET_WAIT_SECONDS)
    cores = os.cpu_count() or 1
    allowed = 1 - min(torch.get_num_threads(), cores) / cores + _SLACK
    psutil.cpu_percent()
    while time.perf_counter() < give_up:
        time.sleep(_QUIET_PROBE_SECONDS)
        if psutil.cpu_percent() / 100 <= allowed:
            return


def _waited_seconds() -> float:
    """Time that the threads of this process have spent ready to run but without a core."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text(encoding="ascii").split()[1])
        except OSError:  # the thread has just ended
            continue
    return total / 1e9


def _machine() -> dict[str, Any]:
    """What the ratios were measured on."""
    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Versions of what is installed here."""
    names = (*_VERSIONED, *_PEERS) if find_spec("sae_lens") else _VERSIONED
    return {name: version(name) for name in names if find_spec(name.replace("-", "_"))}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
