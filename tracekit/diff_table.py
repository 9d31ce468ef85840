"""The table that `tracekit diff` prints: a Difference in, lines of text out."""

from collections.abc import Callable, Sequence

from tracekit.diff import ConfigDifference, Difference, Scores, Side
from tracekit.distances import Distance, SiteDistance

__all__ = ["difference_lines"]

_NUM_CONFUSIONS = 6
_NUM_LAYERS = 12  # of more, these are shown, evenly spread: the plots and --json have all
_LABEL, _CELL = 24, 12


def difference_lines(difference: Difference) -> list[str]:
    """The difference as aligned text, readable at a glance."""
    lines = [f"{name:{_LABEL}s}{_side_text(side)}" for name, side in (("a", difference.a), ("b", difference.b))]
    for name, only in (("a", difference.configs_only_a), ("b", difference.configs_only_b)):
        if only:
            lines.append(f"{f'only {name} has':{_LABEL}s}{', '.join(only)}")
    for one in difference.configs:
        lines += ["", *_config_lines(one)]
    return lines


def _side_text(side: Side) -> str:
    return side.path + (f"  where {' and '.join(side.where)}" if side.where else "")


def _config_lines(one: ConfigDifference) -> list[str]:
    return [
        f"{one.config} ({one.task}): {one.num_common} samples in common, aligned by {one.aligned_by}; "
        f"only in a {one.num_only_a}, only in b {one.num_only_b}",
        *[f"  model of {name:{_LABEL - 11}s}{side.model}" for name, side in (("a", one.a), ("b", one.b))],
        f"{'':{_LABEL}s}{'a':>{_CELL}s}{'b':>{_CELL}s}{'b - a':>{_CELL}s}{'std of b - a':>{_CELL + 3}s}",
        *_score_lines(one.a, one.b),
        *[
            f"  {f'mean {shift.name}':{_LABEL - 2}s}{_cell(shift.mean_a)}{_cell(shift.mean_b)}"
            f"{_signed(shift.shift)}{shift.shift_std:>{_CELL + 3}.4g}"
            for shift in one.shifts
        ],
        *_calibration_notes(one.a, one.b),
        *_answer_lines(one),
        *[line for site in one.activations for line in _site_lines(site)],
        *([f"  activations           {one.activations_note}"] if one.activations_note else []),
    ]


def _score_lines(a: Scores, b: Scores) -> list[str]:
    rows: list[tuple[str, Callable[[Scores], float | None]]] = [
        ("accuracy", lambda side: side.accuracy),
        ("accuracy by letter", lambda side: side.accuracy_most_probable),
        ("judged", lambda side: side.num_judged or None),
        (
            "nothing parsed",
            lambda side: side.num_without_answer if a.num_without_answer + b.num_without_answer else None,
        ),
        ("calibrated over", lambda side: side.calibration and side.calibration.num),
        ("ECE", lambda side: side.calibration and side.calibration.ece),
        ("Brier", lambda side: side.calibration and side.calibration.brier),
        ("AUROC", lambda side: side.calibration and side.calibration.auroc),
    ]
    lines = []
    for name, value_of in rows:
        one, other = value_of(a), value_of(b)
        if one is not None or other is not None:
            step = _signed(other - one) if one is not None and other is not None else f"{'-':>{_CELL}s}"
            lines.append(f"  {name:{_LABEL - 2}s}{_cell(one)}{_cell(other)}{step}")
    return lines


def _calibration_notes(a: Scores, b: Scores) -> list[str]:
    if a.calibration_note == b.calibration_note:
        return [f"  calibration           {a.calibration_note}"] if a.calibration_note else []
    return [
        f"  calibration of {name}      {side.calibration_note}"
        for name, side in (("a", a), ("b", b))
        if side.calibration_note
    ]


def _answer_lines(one: ConfigDifference) -> list[str]:
    answers = one.answers
    if answers is None:
        return []
    turns = f"right to wrong {answers.num_right_to_wrong}, wrong to right {answers.num_wrong_to_right}"
    share = f"{answers.num_changed} of {one.num_common}"
    judged = f"; {turns}" if one.a.num_judged or one.b.num_judged else ""
    lines = [f"  {'answers changed':{_LABEL - 2}s}{share}{judged}"]
    if answers.confusions:
        shown = [
            f"{change.a or '(none)'} to {change.b or '(none)'}: {change.count}"
            for change in answers.confusions[:_NUM_CONFUSIONS]
        ]
        more = len(answers.confusions) - len(shown)
        lines.append(f"{'':{_LABEL}s}{', '.join(shown)}{f', and {more} other changes' if more else ''}")
    return lines


def _site_lines(site: SiteDistance) -> list[str]:
    heads = ("cosine", "norm change", "rel. diff.")
    head = "".join(f"{name:>{_CELL}s}" for name in heads)
    num_prompt, num_last = (
        max((getattr(layer, part).num_positions for layer in site.layers), default=0)
        for part in ("prompt", "last_prompt")
    )
    over = f"{f'{num_prompt} prompt positions':>{3 * _CELL}s}  {f'{num_last} last positions':>{3 * _CELL}s}"
    lines = [f"  {site.site:{_LABEL - 2}s}{over}", f"  {'layer':{_LABEL - 2}s}{head}  {head}"]
    for layer in _spread(site.layers):
        number = "-" if layer.layer is None else str(layer.layer)
        lines.append(f"  {number:{_LABEL - 2}s}{_distance_cells(layer.prompt)}  {_distance_cells(layer.last_prompt)}")
    return lines


def _distance_cells(one: Distance) -> str:
    change = f"{'-':>{_CELL}s}" if one.norm_change is None else _signed(one.norm_change)
    return f"{_cell(one.cosine)}{change}{_cell(one.relative_difference)}"


def _spread(layers: Sequence) -> list:
    """All layers, or of many some of them: first, last and evenly between."""
    if len(layers) <= _NUM_LAYERS:
        return list(layers)
    last = len(layers) - 1
    return [layers[round(number * last / (_NUM_LAYERS - 1))] for number in range(_NUM_LAYERS)]


def _cell(value: float | None) -> str:
    return f"{'-':>{_CELL}s}" if value is None else f"{value:>{_CELL}.4g}"


def _signed(value: float) -> str:
    return f"{value:>+{_CELL}.4g}" if value else f"{'0':>{_CELL}s}"
