"""The pictures of a Difference, as PNG bytes; pure: the same difference gives the same bytes.

    <config>-<site>.png          cosine similarity and relative difference by layer
    <config>-reliability.png     reliability diagram of a and of b: accuracy by confidence, and how many answers there
    <config>-<number>-shift.png  histogram of b - a of entropy and of confidence

The title names the models of a and b. A picture whose numbers are missing is left out.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracekit.analysis.difference import ConfigDifference, Difference, Shift
from tracekit.analysis.distances import LayerDistance, SiteDistance
from tracekit.card.calibration import Calibration
from tracekit.plots import BLUE, INK, ORANGE, canvas, grid, png, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_difference"]

_SHIFTS = ("entropy", "confidence")
_MAX_NAME = 72  # characters of a model's name and filters in a title
_LAYER_LABELS = {
    "hidden_states": "layer of hidden_states (0: embeddings; the model's last: after its final norm)",
}


def draw_difference(difference: Difference) -> dict[str, bytes]:
    """The PNG files by name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn: dict[str, bytes] = {}
    with style():
        for one in difference.configs:
            names = _names(difference, one)
            stem = one.config.replace(", ", "-")
            for site in one.activations:
                if len(site.layers) > 1:
                    drawn[f"{stem}-{site.site}.png"] = _site_png(one, names, site)
            if one.a.calibration is not None or one.b.calibration is not None:
                drawn[f"{stem}-reliability.png"] = _reliability_png(one, names)
            for shift in one.shifts:
                if shift.name in _SHIFTS:
                    drawn[f"{stem}-{shift.name}-shift.png"] = _shift_png(one, names, shift)
    return drawn


def _names(difference: Difference, one: ConfigDifference) -> list[str]:
    """What a and b are, a line each: model, filters, and what was asked for where that is not the same."""
    lines = []
    for name, side, scores in (("a", difference.a, one.a), ("b", difference.b, one.b)):
        where = f" where {' and '.join(side.where)}" if side.where else ""
        asked = f" ({scores.asked_for})" if one.a.asked_for != one.b.asked_for else ""
        text = f"{name}: {scores.model_name}{asked}{where}"
        lines.append(text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 3] + "...")
    return lines


def _shift_words(one: ConfigDifference, shift: Shift) -> tuple[str, str, float]:
    """What moved, its unit, and the factor to that unit."""
    if shift.name == "entropy":
        return "entropy", "nats", 1.0
    if one.a.asked_for is None:
        return "the probability of the most probable letter", "0 to 1", 1.0
    return one.a.confidence_name.partition(" (")[0], "percent points", 100.0


def _site_png(one: ConfigDifference, names: Sequence[str], site: SiteDistance) -> bytes:
    from matplotlib.ticker import MaxNLocator

    figure = canvas(height=6.8)
    cosines, differences = figure.subplots(2, 1, sharex=True)
    kinds = [("last_prompt", "last prompt position", ORANGE, "s"), ("prompt", "all prompt positions", BLUE, "o")]
    for part, label, color, marker in kinds[: 1 if site.is_last_alone() else 2]:
        layers = [layer for layer in site.layers if getattr(layer, part).num_positions]
        if not layers:
            continue
        of_part = [getattr(layer, part) for layer in layers]
        look = {"color": color, "marker": marker, "markersize": 5, "label": f"{label} ({of_part[0].num_positions})"}
        numbers = [_number(layer) for layer in layers]
        cosines.plot(numbers, [distance.cosine for distance in of_part], **look)
        differences.plot(numbers, [distance.relative_difference for distance in of_part], **look)
    _room(cosines, 1.0)
    differences.set_ylim(bottom=0)
    if differences.get_ylim()[1] < 1e-6:
        differences.set_ylim(0, 1)
    cosines.set_ylabel("cosine of a and b")
    differences.set_ylabel("|b - a| / |a|")
    differences.set_xlabel(_LAYER_LABELS.get(site.site, f"layer of {site.site}"))
    differences.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*cosines.get_legend_handles_labels(), frameon=False, ncols=2, loc="outside lower center")
    _title(cosines, f"How far the activations lie apart: {site.site}", one, names)
    grid(cosines)
    grid(differences)
    return png(figure)


def _room(axes: "Axes", top: float) -> None:
    """Room for a line that lies at the top, and an axis where every value is the same."""
    low = axes.get_ylim()[0]
    span = max(top - low, 1e-3)
    axes.set_ylim(top - 1.05 * span, top + 0.05 * span)
    axes.ticklabel_format(axis="y", useOffset=False)


def _number(layer: LayerDistance) -> int:
    assert layer.layer is not None, layer
    return layer.layer


def _reliability_png(one: ConfigDifference, names: Sequence[str]) -> bytes:
    figure = canvas(height=7.2)
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="calibrated")
    sides = (("a", one.a.calibration, BLUE, "o", -1), ("b", one.b.calibration, ORANGE, "s", 1))
    for name, calibration, color, marker, side in sides:
        if calibration is None:
            continue
        bins = [item for item in calibration.bins if item.num]
        curve.plot(
            [item.mean_confidence for item in bins],
            [item.accuracy for item in bins],
            color=color,
            marker=marker,
            markersize=7,
            linewidth=1.2,
            label=_score_text(name, calibration),
        )
        width = 0.4 / len(calibration.bins)
        counts.bar(
            [(item.low + item.high + side * width) / 2 for item in calibration.bins],
            [item.num for item in calibration.bins],
            width=width,
            color=color,
            edgecolor="white",
            hatch="//" if side > 0 else None,
            label=name,
        )
    curve.set_xlim(0, 1)
    curve.set_ylim(-0.03, 1.03)
    curve.set_ylabel("share that is right")
    figure.legend(*curve.get_legend_handles_labels(), frameon=False, loc="outside lower center")
    counts.set_ylabel("answers")
    counts.set_xlabel("confidence")
    against = {side.calibration_against for side in (one.a, one.b) if side.calibration_against}
    _title(curve, f"Confidence against {min(against, key=len)}", one, names)
    grid(curve)
    grid(counts)
    return png(figure)


def _score_text(name: str, calibration: Calibration) -> str:
    area = "" if calibration.auroc is None else f", AUROC {calibration.auroc:.3f}"
    return f"{name}: ECE {calibration.ece:.3f}, Brier {calibration.brier:.3f}{area}"


def _shift_png(one: ConfigDifference, names: Sequence[str], shift: Shift) -> bytes:
    from matplotlib.ticker import MaxNLocator

    figure = canvas(height=4.6)
    axes = figure.subplots()
    what, unit, factor = _shift_words(one, shift)
    edges = [factor * edge for edge in shift.histogram.edges]
    width = edges[1] - edges[0]
    axes.bar(
        [edge + width / 2 for edge in edges[:-1]],
        shift.histogram.counts,
        width=width,
        color=BLUE,
        edgecolor="white",
        linewidth=0.8,
    )
    axes.axvline(0, color=INK, linewidth=1)
    axes.axvline(
        factor * shift.shift,
        color=ORANGE,
        linestyle="--",
        linewidth=2,
        label=f"mean {_signed(factor * shift.shift)}, standard deviation {factor * shift.shift_std:.3g}, "
        f"of {shift.num} samples",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(edges[0] - width, edges[-1] + width)  # 0 may be an edge, and has to be seen
    axes.set_ylabel("samples per bin")
    axes.set_xlabel(f"{what} ({unit}), b minus a")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center")
    _title(axes, f"Shift of {what}", one, names)
    grid(axes)
    return png(figure)


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def _title(axes: "Axes", text: str, one: ConfigDifference, names: Sequence[str]) -> None:
    lines = [text, f"{one.config}, {one.num_common} samples in common", *names]
    axes.set_title("\n".join(lines), loc="left", parse_math=False)
