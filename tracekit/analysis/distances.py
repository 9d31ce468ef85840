"""Distances: how far the activations of two runs lie apart, layer by layer, position by position.

    cosine                a·b / (|a| |b|)          direction: 1 the same, 0 unrelated
    norm change           (|b| - |a|) / |a|        length: 0 the same, 0.1 a tenth longer
    relative difference   |b - a| / |a|            both: 0 the same

Each is the mean over positions of all samples, a position's vector (D,) taken as stored and computed in float64. At
all prompt positions, where both read the same tokens, and at the last prompt position alone. One sample is in memory
at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from tqdm import tqdm

from tracekit.read.store import TraceStore
from tracekit.records import Record
from tracekit.sites import RESID_SITES
from tracekit.tensors import TensorSpec, is_companion, positions_of, site_of

__all__ = [
    "COMPARED_SITES",
    "Distance",
    "Distances",
    "LayerDistance",
    "SiteDistance",
    "compare_activations",
    "distance",
]

COMPARED_SITES = ("hidden_states", *RESID_SITES)
"""Sites that can be compared: a vector of the model's width at every position."""
_AHEAD = 64
"""Samples whose bytes are fetched at once from a published dataset."""


class Distance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Means over positions."""

    num_positions: int
    """Positions that the means are over."""
    num_left_out: int
    """Positions left out: a value that is not finite, or a vector that is zero on one side alone."""
    cosine: float | None
    """Mean cosine similarity, -1 to 1; null where no position is left."""
    norm_change: float | None
    """Mean of (|b| - |a|) / |a|; null likewise."""
    relative_difference: float | None
    """Mean of |b - a| / |a|; null likewise."""


class LayerDistance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of a site."""

    layer: int | None
    """Its number; null for a site without layers."""
    prompt: Distance
    """At every prompt position that both keep, in samples whose prompts are the same tokens."""
    last_prompt: Distance
    """At the last prompt position, the one that predicts the first generated token."""


class SiteDistance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One site."""

    site: str
    """Its name."""
    layers: list[LayerDistance]
    """Its layers, in order."""

    def is_last_alone(self) -> bool:
        """Whether nothing but last prompt positions was compared, so that both distances are one."""
        return all(layer.prompt == layer.last_prompt for layer in self.layers)


class Distances(NamedTuple):
    """All sites, and what could not be compared."""

    sites: list[SiteDistance]
    notes: list[str]
    """What was left out, and why."""


class _Sums:
    """Sums over positions of one layer."""

    def __init__(self) -> None:
        self.values = np.zeros(3)
        self.num_positions = self.num_left_out = 0

    def add(self, a_TD: np.ndarray, b_TD: np.ndarray) -> None:
        """Take in the vectors of some positions."""
        a, b = a_TD.astype(np.float64), b_TD.astype(np.float64)
        is_finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        a, b = a[is_finite], b[is_finite]
        aa, bb, ab = (np.einsum("td,td->t", x, y) for x, y in ((a, a), (b, b), (a, b)))
        is_defined = (aa > 0) == (bb > 0)
        aa, bb, ab, step = aa[is_defined], bb[is_defined], ab[is_defined], (b - a)[is_defined]
        difference = np.sqrt(np.einsum("td,td->t", step, step))
        norms, is_same = np.where(aa > 0, np.sqrt(aa), 1.0), difference == 0
        cosine = np.where(is_same, 1.0, np.clip(ab / np.where(is_same, 1.0, norms * np.sqrt(bb)), -1.0, 1.0))
        change = (np.sqrt(bb) - np.sqrt(aa)) / norms
        self.values += [cosine.sum(), change.sum(), (difference / norms).sum()]
        self.num_positions += len(cosine)
        self.num_left_out += len(a_TD) - len(cosine)

    def mean(self) -> Distance:
        """The means."""
        cosine, change, difference = (
            (float(value) for value in self.values / self.num_positions) if self.num_positions else (None, None, None)
        )
        return Distance(
            num_positions=self.num_positions,
            num_left_out=self.num_left_out,
            cosine=cosine,
            norm_change=change,
            relative_difference=difference,
        )


def distance(a_TD: np.ndarray, b_TD: np.ndarray) -> Distance:
    """How far vectors (T, D) of any float dtype lie from others (T, D), averaged over T.

    Positions where a value is not finite, or where one of the two vectors alone is zero, are left out and counted; of
    two zero vectors the cosine is 1.
    """
    sums = _Sums()
    sums.add(a_TD, b_TD)
    return sums.mean()


def compare_activations(
    a: TraceStore,
    b: TraceStore,
    pairs: Sequence[tuple[str, str]],
    *,
    sites: Sequence[str] = COMPARED_SITES,
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> Distances:
    """Compare what two stores hold of the same questions, sample by sample.

    Args:
        a: One store.
        b: The other.
        pairs: Keys in a and in b of the samples to compare.
        sites: Sites to compare, where both stores have them.
        layers: Layers to compare, where both stores have them, negative from the last that both have; all by default.
        progress: Show a bar on stderr.

    Raises:
        CorruptShardError, DatasetError, HubError: the activations cannot be read.
    """
    comparison = _Comparison(a, b, sites, layers)
    bar = tqdm(total=len(pairs), unit="sample", desc="activations", disable=None if progress else True)
    with bar:
        for start in range(0, len(pairs), _AHEAD):
            records = [(a.record(one), b.record(other)) for one, other in pairs[start : start + _AHEAD]]
            comparison.prefetch(records)
            for record_a, record_b in records:
                refusal = comparison.add(record_a, record_b)
                if refusal is not None:
                    return Distances([], [f"activations cannot be compared: {refusal}"])
                bar.update()
    return Distances(comparison.sites(), comparison.notes())


_Layers: TypeAlias = dict[int | None, TensorSpec]


class _Comparison:
    """Sums over the samples of two stores."""

    def __init__(self, a: TraceStore, b: TraceStore, sites: Sequence[str], layers: Sequence[int] | None) -> None:
        self._a, self._b, self._names, self._layers = a, b, sites, layers
        self._sums: dict[str, dict[int | None, tuple[_Sums, _Sums]]] = {}
        self._num_samples = self._num_other_tokens = 0
        self._only: dict[str, set[str]] = {"a": set(), "b": set()}
        self._found: set[int] = set()

    def prefetch(self, pairs: Sequence[tuple[Record, Record]]) -> None:
        """Fetch what will be read of these samples, and no layer that one side alone has."""
        for site in self._names:
            common = set.intersection(*[{*found} for a, b in pairs for found in self._chosen(a, b, site)])
            layers = sorted(layer for layer in common if layer is not None)
            if common:
                for number, store in enumerate((self._a, self._b)):
                    store.prefetch([pair[number].key for pair in pairs], sites=[site], layers=layers or None)

    def _chosen(self, a: Record, b: Record, site: str) -> tuple[_Layers, _Layers]:
        """The layers of a site that each of two samples holds, of those that were asked for."""
        found_a, found_b = _stored(a, site), _stored(b, site)
        if self._layers is None:
            return found_a, found_b
        common = sorted(layer for layer in found_a if layer is not None and layer in found_b)
        numbers = {n: common[n] if -len(common) <= n < 0 else n for n in self._layers}
        self._found |= {n for n, layer in numbers.items() if layer in common}
        wanted = {None, *numbers.values()}
        first, second = ({at: spec for at, spec in found.items() if at in wanted} for found in (found_a, found_b))
        return first, second

    def add(self, a: Record, b: Record) -> str | None:
        """Take in a pair of samples; why they cannot be compared, if so."""
        counts = [getattr(record, "num_layers", None) for record in (a, b)]
        if counts[0] != counts[1]:
            return f"the model of a has {counts[0]} layers, that of b {counts[1]}"
        is_same_prompt = a.token_ids[: a.prompt_length] == b.token_ids[: b.prompt_length]
        self._num_samples += 1
        self._num_other_tokens += not is_same_prompt
        for site in self._names:
            found_a, found_b = self._chosen(a, b, site)
            self._only["a"] |= {_layer_name(site, layer) for layer in found_a if layer not in found_b}
            self._only["b"] |= {_layer_name(site, layer) for layer in found_b if layer not in found_a}
            for layer in found_a:
                if layer in found_b:
                    specs = found_a[layer], found_b[layer]
                    widths = [spec.shape[-1] for spec in specs]
                    if widths[0] != widths[1]:
                        return f"{site} is {widths[0]} wide in a and {widths[1]} in b"
                    self._add_layer(a, b, site, layer, specs, is_same_prompt)
        return None

    def _add_layer(
        self,
        a: Record,
        b: Record,
        site: str,
        layer: int | None,
        specs: tuple[TensorSpec, TensorSpec],
        is_same_prompt: bool,
    ) -> None:
        of_prompt, of_last = self._sums.setdefault(site, {}).setdefault(layer, (_Sums(), _Sums()))
        kept_a, kept_b = (positions_of(spec.positions) for spec in specs)
        if a.last_prompt_index in kept_a and b.last_prompt_index in kept_b:
            of_last.add(
                self._a.tensor(a.key, site, layer=layer, tokens=[a.last_prompt_index]),
                self._b.tensor(b.key, site, layer=layer, tokens=[b.last_prompt_index]),
            )
        if is_same_prompt:
            both = np.intersect1d(kept_a, kept_b)
            at = both[both < a.prompt_length]
            of_prompt.add(
                self._a.tensor(a.key, site, layer=layer, tokens=at), self._b.tensor(b.key, site, layer=layer, tokens=at)
            )

    def sites(self) -> list[SiteDistance]:
        """The means."""
        return [
            SiteDistance(
                site=site,
                layers=[
                    LayerDistance(layer=layer, prompt=of_prompt.mean(), last_prompt=of_last.mean())
                    for layer, (of_prompt, of_last) in sorted(self._sums[site].items(), key=lambda item: item[0] or 0)
                ],
            )
            for site in self._names
            if site in self._sums
        ]

    def notes(self) -> list[str]:
        """What was not compared."""
        found = []
        missing = [str(layer) for layer in self._layers or [] if layer not in self._found]
        if missing:
            found.append(f"no layer {', '.join(missing)} in both")
        elif not self._sums:
            found.append(f"no activations in common: both need one of {', '.join(self._names)}")
        for side, names in self._only.items():
            if names:
                shown = sorted(names)
                more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
                found.append(f"only {side} has {', '.join(shown[:4])}{more}")
        if self._num_other_tokens:
            found.append(
                f"{self._num_other_tokens} of {self._num_samples} prompts are other tokens in b than in a: of these "
                "the last prompt position alone was compared"
            )
        every = [sums for of_site in self._sums.values() for pair in of_site.values() for sums in pair]
        if every and not any(sums.num_positions for sums in every):
            found.append("no prompt position was kept on both sides; run with --tokens prompt, all or last")
        elif every and all(site.is_last_alone() for site in self.sites()):
            found.append("both sides keep only the last position of each prompt, so nothing else was compared")
        num_left_out = max((sums.num_left_out for sums in every), default=0)
        if num_left_out:
            found.append(f"in one layer {num_left_out} positions were left out: not finite, or zero on one side alone")
        return found


def _stored(record: Record, site: str) -> _Layers:
    """The layers of a site that a sample holds, each with its tensor."""
    specs = [spec for spec in record.tensors if site_of(spec.name) == site and not is_companion(spec.name)]
    return {layer: spec for spec in specs for layer in spec.layers or [None]}


def _layer_name(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} layer {layer}"
