"""Diff: two datasets of the same questions side by side: answers, calibration, entropy, activations.

    from tracekit.analysis.diff import diff

    difference = diff("traces/base", "traces/tuned")            # or hf://datasets/owner/name@v1.0.0
    diff("traces/run", "traces/run", where_a=["level=0"], where_b=["level=0.1"])    # two slices of one dataset

Configurations that both have are compared one by one, sample by sample of the same question. Changes are b minus a:
a is what was before, b what came after. What does not align is refused with the reason; what only one side has is
counted. Both sides are summed up over the same questions: accuracy over those that both judged, calibration, against
the most probable letter, over those that both can calibrate. Nothing here imports torch.
"""

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.analysis.alignment import align, differing_conditions
from tracekit.analysis.difference import (
    AnswerChange,
    AnswerChanges,
    ConfigDifference,
    Difference,
    Histogram,
    Shift,
    Side,
    SideScores,
)
from tracekit.analysis.distances import COMPARED_SITES, compare_activations
from tracekit.analysis.outcomes import (
    Outcomes,
    accuracy_most_probable,
    accuracy_of,
    calibration_of,
    read_outcomes,
)
from tracekit.card.calibration import Calibration
from tracekit.errors import ConfigError, DatasetError
from tracekit.hub import HubPath
from tracekit.read.remote import Listing, list_configs
from tracekit.read.store import TraceStore
from tracekit.records import ModelInfo
from tracekit.tensors import is_companion

__all__ = [
    "AnswerChange",
    "AnswerChanges",
    "ConfigDifference",
    "Difference",
    "Histogram",
    "Shift",
    "Side",
    "SideScores",
    "diff",
]

_NUM_BINS = 20


def diff(
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    config: str | Sequence[str] | None = None,
    where_a: Sequence[str] = (),
    where_b: Sequence[str] = (),
    sites: Sequence[str] = COMPARED_SITES,
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> Difference:
    """Compare two datasets of the same questions.

    Args:
        a: Folder of a dataset, or `hf://datasets/owner/name@v1.0.0`: what was before.
        b: The other, or the same with other filters: what came after.
        config: Configuration to compare, or its name in a and its name in b; all that both have by default.
        where_a: Filters `field=value` on a's records, see `tracekit.read.filters.rows_where`.
        where_b: Filters on b's records.
        sites: Sites of the residual stream to compare; none by an empty list, which is fast.
        layers: Layers to compare, negative from the last that both have; all that both have by default.
        progress: Show a bar on stderr while activations are read.

    Raises:
        ConfigError: a filter that names no field or lets nothing through, or a site that cannot be compared.
        DatasetError: a folder is no dataset, no configuration in common, different tasks, no sample in common, or
            samples of the same question that were not asked the same.
        HubError: a published dataset cannot be read.
    """
    unknown = [site for site in sites if site not in COMPARED_SITES]
    if unknown:
        raise ConfigError(f"site {unknown[0]!r} cannot be compared; sites that can: {', '.join(COMPARED_SITES)}")
    first, second = (list_configs(HubPath.parse(str(path)) or Path(path)) for path in (a, b))
    pairs = _config_pairs(first, second, config)
    compared = []
    for name_a, name_b in pairs:
        with TraceStore(str(first.path), name_a) as store_a, TraceStore(str(second.path), name_b) as store_b:
            left = _Opened(first, name_a, store_a, where_a)
            right = _Opened(second, name_b, store_b, where_b)
            compared.append(_compare(left, right, sites, layers, progress))
    return Difference(
        a=Side(path=str(first.path), where=list(where_a)),
        b=Side(path=str(second.path), where=list(where_b)),
        configs=compared,
        configs_only_a=[] if config else [name for name in first.configs if name not in second.configs],
        configs_only_b=[] if config else [name for name in second.configs if name not in first.configs],
    )


class _Opened:
    """One configuration of one side, opened."""

    def __init__(self, listing: Listing, config: str, store: TraceStore, where: Sequence[str]) -> None:
        self.listing, self.config, self.store, self.where = listing, config, store, where
        info = store.info()
        self.task, self.is_open, self.num_samples = info.task, info.is_open, info.num_samples
        self.outcome = store.about.outcome
        self.model = "; ".join(
            ", ".join(
                part
                for part in (
                    f"{model.id} at {model.revision[:19]}",
                    model.adapter and f"adapter {model.adapter}",
                    model.quantization,
                )
                if part
            )
            for model in info.models
        )
        self.model_name = "; ".join(_short_name(model) for model in info.models)


def _short_name(model: ModelInfo) -> str:
    """`SmolLM2-135M`, or with an adapter `SmolLM2-135M + lora-wiki`."""
    names = [model.id, *([model.adapter.partition("@")[0]] if model.adapter else [])]
    return " + ".join(name.rsplit("/", 1)[-1] for name in names)


def _config_pairs(a: Listing, b: Listing, config: str | Sequence[str] | None) -> list[tuple[str, str]]:
    """Names in a and in b of the configurations to compare."""
    if config is not None:
        names = [config] if isinstance(config, str) else list(config)
        if len(names) not in (1, 2):
            raise ConfigError(f"{len(names)} configurations were named, expected one, or one of a and one of b")
        return [(names[0], names[-1])]
    common = [name for name in a.configs if name in b.configs]
    if common:
        return [(name, name) for name in common]
    if len(a.configs) == len(b.configs) == 1:
        return [(a.configs[0], b.configs[0])]
    raise DatasetError(
        f"no configuration in common: {a.path} has {', '.join(a.configs)}; {b.path} has {', '.join(b.configs)}. Name "
        "one of each with --dataset-config NAME_A NAME_B"
    )


def _compare(
    a: _Opened, b: _Opened, sites: Sequence[str], layers: Sequence[int] | None, progress: bool
) -> ConfigDifference:
    """Compare one configuration."""
    name = a.config if a.config == b.config else f"{a.config}, {b.config}"
    if a.task != b.task:
        raise DatasetError(
            f"{name}: {a.listing.path} is of task {a.task!r}, {b.listing.path} of {b.task!r}; only datasets of the "
            "same task can be compared. Name configurations with --dataset-config"
        )
    every_a, every_b = (read_outcomes(one.store, one.listing, one.config, one.where) for one in (a, b))
    found = align(every_a, every_b, where=name, is_filtered=bool(a.where or b.where))
    common_a, common_b = every_a.take(found.rows_a), every_b.take(found.rows_b)
    distances = None
    if sites:
        pairs = list(zip(common_a.keys, common_b.keys, strict=True))
        distances = compare_activations(a.store, b.store, pairs, sites=sites, layers=layers, progress=progress)
    return ConfigDifference(
        config=name,
        task=a.task,
        aligned_by=found.by,
        notes=[
            *_unfinished(a, b),
            *_extra(every_a, every_b),
            *differing_conditions(common_a, common_b),
            *_storage(a, b),
            *_captured(a, b),
        ],
        num_common=len(found.rows_a),
        num_only_a=found.num_only_a,
        num_only_b=found.num_only_b,
        num_judged_both=sum(_judged_both(common_a.verdicts, common_b.verdicts)),
        a=_scores(a, common_a, common_b),
        b=_scores(b, common_b, common_a),
        shifts=_shifts(common_a, common_b),
        answers=_answer_changes(
            (common_a.answers, common_b.answers),
            (common_a.verdicts, common_b.verdicts),
            has_letters=a.outcome.has_letters,
        ),
        most_probable=_answer_changes(
            (common_a.most_probable, common_b.most_probable),
            (common_a.most_probable_verdicts, common_b.most_probable_verdicts),
            has_letters=True,
        ),
        activations=distances.sites if distances else [],
        activations_note=("; ".join(distances.notes) or None) if distances else "no site was asked for",
    )


def _unfinished(a: _Opened, b: _Opened) -> list[str]:
    return [
        f"{name} is not finished: {side.num_samples} samples so far"
        for name, side in (("a", a), ("b", b))
        if side.is_open
    ]


def _extra(a: Outcomes, b: Outcomes) -> list[str]:
    """Drawn answers that are not compared."""
    return [
        f"{side.num_extra} drawn answers of {name} are left out; compare them with --where-{name} sample_index=1"
        for name, side in (("a", a), ("b", b))
        if side.num_extra
    ]


def _storage(a: _Opened, b: _Opened) -> list[str]:
    """Tensors that stand in another form on one side than on the other."""
    forms_a, forms_b = (
        {one.name: one.dtype if one.layout != "sparse" else "sparse" for one in side.store.info().tensors}
        for side in (a, b)
    )
    return [
        f"{name} is stored as {form} in a and as {forms_b[name]} in b: what differs holds the rounding"
        for name, form in forms_a.items()
        if name in forms_b and form != forms_b[name] and not is_companion(name)
    ]


def _captured(a: _Opened, b: _Opened) -> list[str]:
    """Tensors of steps on one side, and of a pass on the other."""
    ways = [_ways(side.store) for side in (a, b)]
    if ways[0] == ways[1] or not (a.store.info().tensors and b.store.info().tensors):
        return []
    said = [" and ".join(sorted(one)) for one in ways]
    return [f"captured from {said[0]} in a and from {said[1]} in b: what differs holds the rounding"]


def _ways(store: TraceStore) -> set[str]:
    records = store.records
    if "captured_from" not in records.column_names:  # before schema 2.1
        return {"pass"}
    return {*records.column("captured_from").unique().to_pylist()}


def _judged_both(one: Sequence[bool | None], other: Sequence[bool | None]) -> list[bool]:
    return [None not in pair for pair in zip(one, other, strict=True)]


def _scores(side: _Opened, outcomes: Outcomes, others: Outcomes) -> SideScores:
    """How a side did on what the other did, too."""
    num_judged = sum(verdict is not None for verdict in outcomes.verdicts)
    both = _judged_both(outcomes.verdicts, others.verdicts)
    calibration, note = _calibration(outcomes, others)
    return SideScores(
        config=side.config,
        model=side.model,
        model_name=side.model_name,
        asked_for=outcomes.asked_for,
        confidence_name=outcomes.confidence_name,
        num_judged=num_judged,
        num_unjudged=len(outcomes.verdicts) - num_judged if outcomes.has_verdicts else 0,
        accuracy=accuracy_of([verdict for verdict, is_both in zip(outcomes.verdicts, both, strict=True) if is_both]),
        accuracy_most_probable=accuracy_most_probable(outcomes, side.outcome),
        num_without_answer=0 if outcomes.answers is None else sum(answer is None for answer in outcomes.answers),
        calibration=calibration,
        calibration_against=outcomes.calibrated_against(),
        calibration_note=note,
    )


def _calibration(outcomes: Outcomes, others: Outcomes) -> tuple[Calibration | None, str | None]:
    """Calibration over what both sides can calibrate, or over all that this side can where the other can nothing."""
    is_used, is_other = outcomes.is_calibrated(), others.is_calibrated()
    both = is_used & is_other
    if not is_other.any() or not is_used.any() or both.all():
        return calibration_of(outcomes)
    calibration, _ = calibration_of(outcomes.take([int(row) for row in np.flatnonzero(both)]))
    return calibration, f"{int((~both).sum())} of {len(both)} samples left out: not judged in both"


def _shifts(a: Outcomes, b: Outcomes) -> list[Shift]:
    """How every number moved that both sides have."""
    found = []
    for name, values in a.numbers.items():
        others = b.numbers.get(name)
        if others is None:
            continue
        is_there = np.isfinite(values) & np.isfinite(others)
        if not is_there.any():
            continue
        steps = others[is_there] - values[is_there]
        low, high = min(float(steps.min()), 0.0), max(float(steps.max()), 0.0)
        counts, edges = np.histogram(steps, bins=_NUM_BINS, range=(low, high) if low < high else (-1.0, 1.0))
        found.append(
            Shift(
                name=name,
                unit=a.units.get(name, ""),
                num=len(steps),
                mean_a=float(values[is_there].mean()),
                mean_b=float(others[is_there].mean()),
                shift=float(steps.mean()),
                shift_std=float(steps.std()),
                histogram=Histogram(edges=[float(edge) for edge in edges], counts=[int(count) for count in counts]),
            )
        )
    return found


def _answer_changes(
    answers: tuple[list[Any] | None, list[Any] | None],
    verdicts: tuple[list[bool | None], list[bool | None]],
    *,
    has_letters: bool,
) -> AnswerChanges | None:
    """How the answers of a, the first of each pair, became those of b."""
    one, other = answers
    if one is None or other is None:
        return None
    pairs = list(zip(one, other, strict=True))
    changes = Counter(pair for pair in pairs if pair[0] != pair[1])
    turns = Counter(zip(*verdicts, strict=True))
    return AnswerChanges(
        num=sum(pair != (None, None) for pair in pairs),
        num_changed=sum(changes.values()),
        num_right_to_wrong=turns[True, False],
        num_wrong_to_right=turns[False, True],
        confusions=[
            AnswerChange(a=before, b=after, count=count)
            for (before, after), count in sorted(changes.items(), key=lambda item: (-item[1], str(item[0])))
        ]
        if has_letters
        else [],
    )
