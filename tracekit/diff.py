"""Diff: two datasets of the same questions side by side: answers, calibration, entropy, activations.

    difference = diff("traces/base", "traces/tuned")            # or hf://datasets/owner/name@v1.0.0
    diff("traces/run", "traces/run", where_a=["level=0"], where_b=["level=0.1"])    # two slices of one dataset

Configurations that both have are compared one by one, sample by sample of the same question. Changes are b minus a:
a is what was before, b what came after. What does not align is refused with the reason; what only one side has is
counted. Nothing here imports torch.
"""

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np

from tracekit.alignment import align
from tracekit.calibration import Calibration
from tracekit.distances import COMPARED_SITES, SiteDistance, compare_activations
from tracekit.errors import ConfigError, DatasetError
from tracekit.hub import HubPath
from tracekit.outcomes import (
    FIELDS,
    Fields,
    Outcomes,
    accuracy_most_probable,
    accuracy_of,
    calibration_of,
    read_outcomes,
)
from tracekit.remote import Listing, list_configs
from tracekit.store import TraceStore

__all__ = [
    "AnswerChange",
    "AnswerChanges",
    "ConfigDifference",
    "Difference",
    "Histogram",
    "Scores",
    "Shift",
    "Side",
    "diff",
]

_NUM_BINS = 21  # odd, so that no change lies in the middle of one


class Side(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the two datasets."""

    path: str
    """Folder, or address on the Hub."""
    where: list[str]
    """Filters `field=value` that its samples passed."""


class Scores(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one side did on the common samples."""

    config: str
    """Its configuration."""
    model: str
    """Its model: id, revision, adapter and quantization where it has any."""
    num_judged: int
    """Samples that were judged right or wrong."""
    num_unjudged: int
    """Samples without a judgement: nothing could be parsed, or the source is unlabelled; 0 where a pass judges none."""
    accuracy: float | None
    """Share of the judged samples that is right; null where none is judged."""
    accuracy_most_probable: float | None
    """The same of the most probable allowed answer, parsed or not; null where that is the answer itself."""
    num_without_answer: int
    """Samples from whose output no answer could be read."""
    calibration: Calibration | None
    """Confidence against being right; null where it cannot be told."""
    calibration_note: str | None
    """Why calibration cannot be told, or what was left out of it; null where there is nothing to say."""


class Histogram(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counts in bins of equal width."""

    edges: list[float]
    """Edges, one more than there are bins."""
    counts: list[int]
    """Values in each bin."""


class Shift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a number moved from a to b, over the common samples that have it on both sides."""

    name: str
    """The number: `entropy` (nats), `confidence` (0 to 1), `loss` (nats), ..."""
    num: int
    """Samples."""
    mean_a: float
    """Mean in a."""
    mean_b: float
    """Mean in b."""
    shift: float
    """Mean of b - a."""
    shift_std: float
    """Standard deviation of b - a over samples (population)."""
    histogram: Histogram
    """Distribution of b - a."""


class AnswerChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples whose answer was one and became another."""

    a: str | None
    """The answer in a; null where nothing was parsed."""
    b: str | None
    """The answer in b."""
    count: int
    """Samples."""


class AnswerChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the answers to the common samples changed."""

    num_changed: int
    """Samples whose answer is another, or is there on one side alone."""
    num_right_to_wrong: int
    """Samples right in a and wrong in b."""
    num_wrong_to_right: int
    """Samples wrong in a and right in b."""
    confusions: list[AnswerChange]
    """Every change with its count, most frequent first; empty for answers in free text."""


class ConfigDifference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One configuration of both."""

    config: str
    """Its name; `name_a, name_b` where they were named apart."""
    task: str
    """Its task."""
    aligned_by: str
    """`question` (question_id and sample_index) or `key`."""
    num_common: int
    """Samples that both have; all that follows is over these."""
    num_only_a: int
    """Samples that only a has."""
    num_only_b: int
    """Samples that only b has."""
    a: Scores
    """How a did."""
    b: Scores
    """How b did."""
    shifts: list[Shift]
    """Every number of the task that both have."""
    answers: AnswerChanges | None
    """How the answers changed; null for a task without answers."""
    activations: list[SiteDistance]
    """Distances at every site and layer that both have; empty where they cannot be compared."""
    activations_note: str | None
    """Why they cannot be, or what was left out; null where there is nothing to say."""


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two datasets side by side."""

    a: Side
    """One dataset."""
    b: Side
    """The other."""
    configs: list[ConfigDifference]
    """The configurations that were compared."""
    configs_only_a: list[str]
    """Configurations that only a has."""
    configs_only_b: list[str]
    """Configurations that only b has."""


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
        where_a: Filters `field=value` on a's records, see `tracekit.outcomes.rows_where`.
        where_b: Filters on b's records.
        sites: Sites of the residual stream to compare; none by an empty list, which is fast.
        layers: Layers to compare; all that both have by default.
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
        self.task = info.task
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
    found = align(every_a, every_b, where=name)
    common_a, common_b = every_a.take(found.rows_a), every_b.take(found.rows_b)
    distances = None
    if sites:
        pairs = list(zip(common_a.keys, common_b.keys, strict=True))
        distances = compare_activations(a.store, b.store, pairs, sites=sites, layers=layers, progress=progress)
    return ConfigDifference(
        config=name,
        task=a.task,
        aligned_by=found.by,
        num_common=len(found.rows_a),
        num_only_a=found.num_only_a,
        num_only_b=found.num_only_b,
        a=_scores(a, common_a),
        b=_scores(b, common_b),
        shifts=_shifts(common_a, common_b),
        answers=_answer_changes(common_a, common_b, FIELDS.get(a.task, Fields())),
        activations=distances.sites if distances else [],
        activations_note=("; ".join(distances.notes) or None) if distances else "no site was asked for",
    )


def _scores(side: _Opened, outcomes: Outcomes) -> Scores:
    num_judged = sum(verdict is not None for verdict in outcomes.verdicts)
    calibration, note = calibration_of(outcomes)
    return Scores(
        config=side.config,
        model=side.model,
        num_judged=num_judged,
        num_unjudged=len(outcomes.verdicts) - num_judged if outcomes.has_verdicts else 0,
        accuracy=accuracy_of(outcomes.verdicts),
        accuracy_most_probable=accuracy_most_probable(outcomes, FIELDS.get(side.task, Fields())),
        num_without_answer=0 if outcomes.answers is None else sum(answer is None for answer in outcomes.answers),
        calibration=calibration,
        calibration_note=note,
    )


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
        reach = float(np.abs(steps).max()) or 1.0
        counts, edges = np.histogram(steps, bins=_NUM_BINS, range=(-reach, reach))
        found.append(
            Shift(
                name=name,
                num=len(steps),
                mean_a=float(values[is_there].mean()),
                mean_b=float(others[is_there].mean()),
                shift=float(steps.mean()),
                shift_std=float(steps.std()),
                histogram=Histogram(edges=[float(edge) for edge in edges], counts=[int(count) for count in counts]),
            )
        )
    return found


def _answer_changes(a: Outcomes, b: Outcomes, fields: Fields) -> AnswerChanges | None:
    if a.answers is None or b.answers is None:
        return None
    changes = Counter((one, other) for one, other in zip(a.answers, b.answers, strict=True) if one != other)
    turns = Counter(zip(a.verdicts, b.verdicts, strict=True))
    return AnswerChanges(
        num_changed=sum(changes.values()),
        num_right_to_wrong=turns[True, False],
        num_wrong_to_right=turns[False, True],
        confusions=[
            AnswerChange(a=one, b=other, count=count)
            for (one, other), count in sorted(changes.items(), key=lambda item: (-item[1], str(item[0])))
        ]
        if fields.has_letters
        else [],
    )
