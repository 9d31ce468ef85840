"""A degradation run summed up: what the answers are like at every level of damage, and a picture of it.

distinct-n is the share of different n-grams among all of an answer (Li et al. 2016, "A Diversity-Promoting Objective
Function for Neural Conversation Models", https://arxiv.org/abs/1510.03055); repetition is 1 - distinct-4, seq-rep-4 of
Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training" (https://arxiv.org/abs/1908.04319). Both are
over the words of an answer, in lower case, and its runs of signs ("!!!!"); single marks of punctuation do not count.
They are means over the answers that have an n-gram. Repeats draw the damage anew: how much a level's numbers differ
from repeat to repeat is their spread.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import stdev

import msgspec

from builders.degradation.record import DegradationRecord
from tracekit.plots import Curve, Panel, Picture, Point

__all__ = ["LevelStats", "Measures", "distinct", "level_lines", "level_pictures", "level_stats"]

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]{2,}")
_COLUMNS = (
    "level",
    "answers",
    "tokens",
    "repetition",
    "distinct-1",
    "distinct-2",
    "right",
    "entropy",
    "perplexity",
    "not finite",
)
_SHOWN = (
    ("mean_tokens", "tokens an answer"),
    ("repetition", "repetition (1 - distinct-4)"),
    ("distinct_2", "distinct-2"),
    ("accuracy", "right (of those expected)"),
    ("mean_entropy", "entropy of a token, nats"),
    ("perplexity", "perplexity of the text"),
)


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """What some answers are like."""

    mean_tokens: float | None
    """Generated tokens an answer."""
    repetition: float | None
    """1 - distinct-4; null where no answer has four words."""
    distinct_1: float | None
    """distinct-1; null where no answer has a word."""
    distinct_2: float | None
    """distinct-2; null where no answer has two words."""
    accuracy: float | None
    """Share of the expected answers that were given; null where none was expected."""
    mean_entropy: float | None
    """Mean entropy of a generated token, nats; null where none is finite."""
    perplexity: float | None
    """Perplexity of the run's text; null where none was asked for, or not finite."""
    nonfinite_share: float | None
    """Share of the answers with values that are not finite."""


class LevelStats(Measures, frozen=True, kw_only=True):
    """The answers at one level of damage to one group of weights."""

    method: str
    """How weights were damaged."""
    group: str
    """Which weights."""
    level: float
    """How much."""
    num_samples: int
    """Answers."""
    num_repeats: int
    """Draws of the damage."""
    is_perplexity_finite: bool | None
    """Whether it is a number at this level; null where none was asked for."""
    spread: Measures
    """Sample standard deviation of each measure over the repeats; null where it is of fewer than two of them, and for
    perplexity, which is of the first repeat's damage."""


def distinct(text: str, n: int) -> float | None:
    """Share of different n-grams among all of a text's, 0 to 1; None where it has none."""
    words = _WORD.findall(text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def level_stats(records: Iterable[DegradationRecord]) -> list[LevelStats]:
    """The levels of a run, method by method, group by group, rising."""

    def place(record: DegradationRecord) -> tuple[str, str, float]:
        return record.damage.method, record.damage.group, record.damage.level

    small = [msgspec.structs.replace(one, token_ids=[], tokens=[], token_offsets=[], tensors=[]) for one in records]
    return [_summed(*key, list(some)) for key, some in groupby(sorted(small, key=place), key=place)]


def _summed(method: str, group: str, level: float, records: Sequence[DegradationRecord]) -> LevelStats:
    by_repeat: dict[int, list[DegradationRecord]] = {}
    for record in records:
        by_repeat.setdefault(record.repeat, []).append(record)
    return LevelStats(
        method=method,
        group=group,
        level=level,
        num_samples=len(records),
        num_repeats=len(by_repeat),
        is_perplexity_finite=records[0].is_perplexity_finite,
        spread=_spread([_measured(some) for some in by_repeat.values()]),
        **msgspec.structs.asdict(_measured(records)),
    )


def _measured(records: Sequence[DegradationRecord]) -> Measures:
    ratios = {n: [distinct(record.generated_answer, n) for record in records] for n in (1, 2, 4)}
    distinct_4 = _mean(ratios[4])
    return Measures(
        mean_tokens=_mean(len(record.generated_token_ids) for record in records),
        repetition=None if distinct_4 is None else 1 - distinct_4,
        distinct_1=_mean(ratios[1]),
        distinct_2=_mean(ratios[2]),
        accuracy=_mean(None if record.is_correct is None else float(record.is_correct) for record in records),
        mean_entropy=_mean(entropy for record in records for entropy in record.token_entropies),
        perplexity=_mean(record.perplexity for record in records),
        nonfinite_share=_mean(float(record.is_spoilt) for record in records),
    )


def _spread(repeats: Sequence[Measures]) -> Measures:
    """Sample standard deviation of every measure."""
    found: dict[str, float | None] = {}
    for field in msgspec.structs.fields(Measures):
        values = [value for one in repeats if (value := getattr(one, field.name)) is not None]
        is_known = len(values) > 1 and field.name != "perplexity"
        found[field.name] = stdev(values) if is_known else None
    return Measures(**found)


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def level_lines(stats: Sequence[LevelStats]) -> list[str]:
    """A table of the levels, a block for each method and group."""
    lines: list[str] = []
    for (method, group), some in groupby(stats, key=lambda one: (one.method, one.group)):
        rows = list(some)
        most = max(one.num_repeats for one in rows)
        repeats = f" (mean ± standard deviation over {most} repeats)" if most > 1 else ""
        lines += [f"{method}, {group}{repeats}", "  " + "".join(f"{name:>14s}" for name in _COLUMNS)]
        for one in rows:
            cells = [
                f"{one.level:g}",
                str(one.num_samples),
                _cell(one, "mean_tokens", ".1f"),
                _cell(one, "repetition", ".3f"),
                _cell(one, "distinct_1", ".3f"),
                _cell(one, "distinct_2", ".3f"),
                _cell(one, "accuracy", ".3f"),
                _cell(one, "mean_entropy", ".3f"),
                "infinite" if one.is_perplexity_finite is False else _cell(one, "perplexity", ".4g"),
                _cell(one, "nonfinite_share", ".3f"),
            ]
            lines.append("  " + "".join(f"{cell:>14s}" for cell in cells))
        lines.append("")
    return lines


def _cell(one: LevelStats, name: str, form: str) -> str:
    """A measure, with its spread where that is not zero."""
    value, spread = getattr(one, name), getattr(one.spread, name)
    if value is None:
        return "-"
    shown = format(spread or 0.0, form)
    return format(value, form) + (f"±{shown}" if shown != format(0.0, form) else "")


def level_pictures(stats: Sequence[LevelStats]) -> list[Picture]:
    """A picture for each method: the curves of every group over the levels."""
    return [_picture(method, list(some)) for method, some in groupby(stats, key=lambda one: one.method)]


def _picture(method: str, stats: Sequence[LevelStats]) -> Picture:
    groups = [group for group, _ in groupby(stats, key=lambda one: one.group)]
    most = max(one.num_repeats for one in stats)
    bars = f"; bars: standard deviation over {most} repeats" if most > 1 else ""
    return Picture(
        file=f"levels-{method}.png",
        title=f"Answers by level of damage\n{method}{bars}",
        x_label=f"level of {method}",
        legend="group",
        panels=[
            Panel(title=title, curves=curves, is_log=name == "perplexity")
            for name, title in _SHOWN
            if (curves := [curve for group in groups if (curve := _curve(name, group, stats)).points])
        ],
    )


def _curve(name: str, group: str, stats: Sequence[LevelStats]) -> Curve:
    points = [
        Point(x=one.level, y=value, spread=getattr(one.spread, name) or 0.0)
        for one in stats
        if one.group == group and (value := getattr(one, name)) is not None
    ]
    return Curve(name=group, points=points)
