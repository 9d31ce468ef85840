"""Checks of a pass: values are finite and fit their dtype, attention rows sum to one, and nothing sees the future.

    value of a batch (B, ...)   --reduced where it lies-->   a number a text (B,)   --one copy, after the pass-->   host

A number that the host reads while the model runs makes it wait for the device. So every layer leaves its numbers on the
device, and `settle` fetches those of all layers at once. Errors are those of the first site, layer and text that fail.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracekit.errors import CaptureError, DtypeOverflowError
from tracekit.sites import ATTENTION_SITES

__all__ = ["ROW_SUM_TOLERANCE", "AttentionRules", "PassChecks", "Span", "check_fits", "check_rows"]

ROW_SUM_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far from 1 the sum of an attention row may lie, by dtype."""

Span = tuple[int, int]
"""Columns `[start, stop)` of a batch's row."""


class AttentionRules(NamedTuple):
    """What holds of a model's attention."""

    is_causal: bool
    """Whether no token sees a later one."""
    rows_sum_to_one: bool
    """Whether rows sum to one; else they sum to one at most."""


class _Outside(NamedTuple):
    """Columns of a batch that do not count, on one device; None where all count."""

    kept: Tensor | None
    """Positions that are not stored (B, T)."""
    real: Tensor | None
    """Padding (B, T)."""


class _Found(NamedTuple):
    """Numbers of one layer of a site, as they lie on the device; one for each text (B,)."""

    site: str
    layer: int
    dtype: torch.dtype
    """What the model computes it in."""
    stored: torch.dtype
    """What it is stored in."""
    columns: list[Tensor]
    """The largest absolute value; of attention also the lowest and the highest sum of a row, and the largest weight of
    a later token, or of padding."""


class PassChecks:
    """What is looked at once a pass is over. `kept` are the columns of each row that are stored, `real` those of its
    text."""

    def __init__(self, kept: Sequence[Span], real: Sequence[Span], rules: AttentionRules) -> None:
        self._kept, self._real, self._rules = kept, real, rules
        self._outsides: dict[tuple[torch.device, int], _Outside] = {}
        self._found: list[_Found] = []

    def add(self, site: str, layer: int, value: Tensor, stored: torch.dtype) -> None:
        """Reduce a batch's tensor on its device; nothing is fetched."""
        outside = self._outside_of(value)
        if site == "attentions":
            columns = _numbers_of_attention(value, outside)
        elif outside.kept is None:
            columns = [value.abs().amax(tuple(range(1, value.dim())))]
        elif value.device.type == "cpu":  # one text after the other costs less there than a mask
            parts = zip(value.unbind(), self._kept, strict=True)
            columns = [torch.stack([_largest(one.narrow(-2, start, stop - start)) for one, (start, stop) in parts])]
        else:
            largest_BT = value.abs().amax(-1)
            largest_BT = largest_BT.amax(1) if site in ATTENTION_SITES else largest_BT
            columns = [_filled(largest_BT, outside.kept, 0).amax(1)]
        self._found.append(_Found(site, layer, value.dtype, stored, columns))

    def settle(self) -> None:
        """Fetch the numbers of all that was added, and see that they are as they should be.

        Raises:
            CaptureError: a value is not finite, an attention row does not sum to one, or a token sees a later one.
            DtypeOverflowError: a value does not fit the dtype that it is stored in.
        """
        found, self._found = self._found, []
        fetched = iter(_fetched([column for one in found for column in one.columns]))
        for one in found:
            largest_B, *of_attention = (next(fetched) for _ in one.columns)
            limit = torch.finfo(one.stored).max
            for largest in largest_B:
                if not largest <= limit:  # true for NaN, too
                    _check_finite(one, largest)
                    check_fits(one.site, one.layer, largest, one.stored)
            for lowest, highest, future in zip(*of_attention, strict=True):
                check_rows(one.layer, one.dtype, lowest=lowest, highest=highest, future=future, rules=self._rules)

    def _outside_of(self, value: Tensor) -> _Outside:
        """What does not count, on a value's device; made once."""
        width = value.shape[1 if value.dim() == 3 else 2]
        key = value.device, width
        if key not in self._outsides:
            self._outsides[key] = _Outside(
                *(_outside(spans, width, value.device) for spans in (self._kept, self._real))
            )
        return self._outsides[key]


def _numbers_of_attention(value_BHTT: Tensor, outside: _Outside) -> list[Tensor]:
    rows_BTT = torch.maximum(value_BHTT.amax(1), -value_BHTT.amin(1))  # without a copy of all absolute values
    sums_BHT = value_BHTT.sum(-1, dtype=torch.float32)
    padding = None if outside.real is None else outside.real[:, None]
    dropped = None if outside.kept is None else outside.kept[..., None]
    rows_BTT = _filled(rows_BTT, None if outside.real is None else outside.real[..., None], 0)
    largest_BTT = _filled(rows_BTT, padding, 0)
    others_BTT = largest_BTT.triu(1)
    if padding is not None:
        others_BTT = torch.maximum(others_BTT, rows_BTT.masked_fill(~padding, 0))
    return [
        _filled(largest_BTT, dropped, 0).amax((1, 2)),
        _filled(sums_BHT, padding, float("inf")).amin((1, 2)),
        _filled(sums_BHT, padding, float("-inf")).amax((1, 2)),
        others_BTT.amax((1, 2)),
    ]


def _check_finite(one: _Found, largest: float) -> None:
    if not math.isfinite(largest):
        raise CaptureError(f"{one.site}, layer {one.layer}: not finite in a {one.dtype} model; use another --dtype")


def check_fits(site: str, layer: int, largest: float, stored: torch.dtype) -> None:
    """See that a dtype holds the largest value.

    Raises:
        DtypeOverflowError: it does not.
    """
    if largest > torch.finfo(stored).max:
        raise DtypeOverflowError(
            f"{site}, layer {layer}: {largest:g} does not fit {stored} (largest {torch.finfo(stored).max:g}); use "
            "another --store-dtype"
        )


def check_rows(
    layer: int, dtype: torch.dtype, *, lowest: float, highest: float, future: float, rules: AttentionRules
) -> None:
    """See that attention rows sum to one, and no token sees a later one; `future` is the largest weight of a later one.

    Raises:
        CaptureError: one does, or does not.
    """
    slack = ROW_SUM_TOLERANCE[dtype]
    if highest > 1 + slack or (rules.rows_sum_to_one and lowest < 1 - slack):
        raise CaptureError(f"attentions, layer {layer}: rows sum to {lowest:g}..{highest:g}, expected 1")
    if rules.is_causal and future != 0:  # NaN is not 0 either
        raise CaptureError(f"attentions, layer {layer}: a causal model attends to the future, or to padding")


def _largest(value: Tensor) -> Tensor:
    return value.abs().amax() if value.numel() else value.new_zeros(())


def _outside(spans: Sequence[Span], width: int, device: torch.device) -> Tensor | None:
    if all(span == (0, width) for span in spans):
        return None
    columns = np.arange(width)
    return torch.from_numpy(np.stack([(columns < start) | (columns >= stop) for start, stop in spans])).to(device)


def _filled(value: Tensor, outside: Tensor | None, other: float) -> Tensor:
    """The value, and `other` outside."""
    return value if outside is None else value.masked_fill(outside, other)


def _fetched(columns: Sequence[Tensor]) -> list[list[float]]:
    """What lies on devices, on the host: one copy for each device."""
    places: dict[torch.device, list[int]] = {}
    for place, column in enumerate(columns):
        places.setdefault(column.device, []).append(place)
    found: dict[int, list[float]] = {}
    for some in places.values():
        numbers = torch.stack([columns[place].float() for place in some]).cpu().numpy()
        found |= zip(some, numbers.tolist(), strict=True)
    return [found[place] for place in range(len(columns))]
