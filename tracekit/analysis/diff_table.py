"""The table that `tracekit diff` prints: a Difference in, lines of text out."""

from collections.abc import Callable, Sequence

from tracekit.analysis.difference import AnswerChanges, ConfigDifference, Difference, Side, SideScores
from tracekit.analysis.distances import Distance, SiteDistance
from tracekit.analysis.outcomes import number_label
from tracekit.card.calibration import Calibration

__all__ = ["difference_lines"]

_NUM_CONFUSIONS = 6
_NUM_LAYERS = 12  # of more, these are shown, evenly spread: the plots and --json have all
_LABEL, _NAME, _CELL = 44, 24, 12  # widths of a row's label, of the name of a note or a site, and of a number


def difference_lines(difference: Difference) -> list[str]:
    """The difference as aligned text, readable at a glance."""
    lines = [f"{name:{_NAME}s}{_side_text(side)}" for name, side in (("a", difference.a), ("b", difference.b))]
    for name, only in (("a", difference.configs_only_a), ("b", difference.configs_only_b)):
        if only:
            lines.append(f"{f'only {name} has':{_NAME}s}{', '.join(only)}")
    for one in difference.configs:
        lines += ["", *_config_lines(one)]
    return lines


def _side_text(side: Side) -> str:
    return side.path + (f"  where {' and '.join(side.where)}" if side.where else "")


def _config_lines(one: ConfigDifference) -> list[str]:
    return [
        f"{one.config} ({one.task}): {one.num_common} samples in common, aligned by {one.aligned_by}; "
        f"only in a {one.num_only_a}, only in b {one.num_only_b}",
        *[_note(f"model of {name}", side.model) for name, side in (("a", one.a), ("b", one.b))],
        *[_note("note", note) for note in one.notes],
        f"{'':{_LABEL}s}{'a':>{_CELL}s}{'b':>{_CELL}s}{'b - a':>{_CELL}s}{'std of b - a':>{_CELL + 3}s}",
        *_score_lines(one),
        *_shift_lines(one),
        *_calibration_lines(one.a, one.b),
        *_answer_lines(one),
        *[line for site in one.activations for line in _site_lines(site)],
        *([_note("activations", one.activations_note)] if one.activations_note else []),
    ]


def _note(name: str, text: str) -> str:
    return f"  {name:{_NAME - 2}s}{text}"


def _score_lines(one: ConfigDifference) -> list[str]:
    is_unread = one.a.num_without_answer + one.b.num_without_answer > 0
    lines = [_row(f"accuracy ({one.num_judged_both} judged in both)", one.a.accuracy, one.b.accuracy)]
    letters = [side.accuracy_most_probable for side in (one.a, one.b)]
    lines.append(_row("accuracy of the most probable letter", *letters))
    if one.num_judged_both < max(one.a.num_judged, one.b.num_judged):
        lines.append(_row("judged", one.a.num_judged, one.b.num_judged))
    if is_unread:
        lines.append(_row("nothing parsed", one.a.num_without_answer, one.b.num_without_answer))
    return [line for line in lines if line]


def _shift_lines(one: ConfigDifference) -> list[str]:
    """The means of the numbers, each over the samples that have it in both."""
    lines = []
    for shift in one.shifts:
        labels = [number_label(shift.name, side.confidence_name, shift.unit) for side in (one.a, one.b)]
        count = "" if shift.num == one.num_common else f"  over {shift.num}"
        lines.append(f"{_row(labels[0], shift.mean_a, shift.mean_b)}{shift.shift_std:>{_CELL + 3}.4g}{count}")
    return lines


def _calibration_lines(a: SideScores, b: SideScores) -> list[str]:
    """What confidence is held against, the numbers, and what was left out."""
    lines = []
    if a.calibration or b.calibration:
        if a.calibration_against == b.calibration_against:
            lines.append(f"  calibration against {a.calibration_against}")
        else:
            lines += [
                _note(f"calibration of {name}", f"against {side.calibration_against}")
                for name, side in (("a", a), ("b", b))
            ]
        num_bins = max(len(one.bins) for one in (a.calibration, b.calibration) if one)
        rows: list[tuple[str, Callable[[Calibration], float | None]]] = [
            ("samples", lambda found: found.num),
            (f"ECE ({num_bins} bins of equal width)", lambda found: found.ece),
            ("Brier", lambda found: found.brier),
            ("AUROC", lambda found: found.auroc),
        ]
        for name, value_of in rows:
            values = [None if one is None else value_of(one) for one in (a.calibration, b.calibration)]
            lines += [row for row in [_row(f"  {name}", *values)] if row]
    if a.calibration_note == b.calibration_note:
        return lines + ([_note("calibration", a.calibration_note)] if a.calibration_note else [])
    return lines + [
        _note(f"calibration of {name}", side.calibration_note)
        for name, side in (("a", a), ("b", b))
        if side.calibration_note
    ]


def _answer_lines(one: ConfigDifference) -> list[str]:
    is_judged = one.num_judged_both > 0
    lines = [] if one.answers is None else _change_lines("answers", one.answers, one.num_common, is_judged)
    if one.most_probable is not None:
        is_judged = one.a.accuracy_most_probable is not None
        name = "most probable letter" if one.a.asked_for is None else "most probable bin"
        lines += _change_lines(name, one.most_probable, one.num_common, is_judged)
    return lines


def _change_lines(name: str, changes: AnswerChanges, num_common: int, is_judged: bool) -> list[str]:
    if not changes.num:
        return [f"  {name} changed: none parsed in either"]
    turns = f"; right to wrong {changes.num_right_to_wrong}, wrong to right {changes.num_wrong_to_right}"
    lines = [f"  {name} changed: {changes.num_changed} of {num_common}{turns if is_judged else ''}"]
    if changes.confusions:
        shown = [
            f"{change.a or '(none)'} to {change.b or '(none)'}: {change.count}"
            for change in changes.confusions[:_NUM_CONFUSIONS]
        ]
        more = len(changes.confusions) - len(shown)
        lines.append(f"    {', '.join(shown)}{f', and {more} other changes' if more else ''}")
    return lines


def _row(name: str, a: float | None, b: float | None) -> str:
    """A number of both sides and how it moved; empty where neither has it."""
    if a is None and b is None:
        return ""
    step = _signed(b - a) if a is not None and b is not None else f"{'-':>{_CELL}s}"
    return f"  {name:{_LABEL - 2}s}{_cell(a)}{_cell(b)}{step}"


def _site_lines(site: SiteDistance) -> list[str]:
    """Distances by layer: over all prompt positions, and beside them at the last ones where these are not all."""
    parts = {"prompt": "prompt positions", "last_prompt": "last positions"}
    if site.is_last_alone():
        parts.pop("prompt")
    head = "".join(f"{name:>{_CELL}s}" for name in ("cosine", "norm change", "rel. diff."))
    counts = {name: max((getattr(layer, name).num_positions for layer in site.layers), default=0) for name in parts}
    over = "  ".join(f"{f'{counts[name]} {what}':>{3 * _CELL}s}" for name, what in parts.items())
    lines = [f"  {site.site:{_NAME - 2}s}{over}", f"  {'layer':{_NAME - 2}s}" + "  ".join([head] * len(parts))]
    for layer in _spread(site.layers):
        number = "-" if layer.layer is None else str(layer.layer)
        cells = "  ".join(_distance_cells(getattr(layer, name)) for name in parts)
        lines.append(f"  {number:{_NAME - 2}s}{cells}")
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
