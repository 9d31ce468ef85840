"""The card's figures: a manifest in, PNG bytes out. Pure: the same manifest gives the same bytes, without a clock.

    figures/<config>-entropy.png    answers by the mean entropy of their tokens, right and wrong, and the share of right
    figures/<config>-norms.png      mean L2 norm of the hidden states at every layer

They are drawn from `Manifest.figures` alone. A figure whose numbers are missing is left out.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from tracekit.format.manifest import FigureData, Manifest
from tracekit.plots import BLUE, INK, ORANGE, canvas, grid, png, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Figure", "draw", "figures_of"]

_ENTROPY_TITLE, _NORMS_TITLE = "Answer correctness against entropy", "Hidden-state norm by layer"
_LOG_FROM = 20  # largest norm over smallest, from which on only a logarithmic axis shows both
_Z = 1.96  # standard errors either side that hold 95 %


class Figure(NamedTuple):
    """One figure of a configuration, before it is drawn."""

    path: str
    """Path in the dataset."""
    title: str
    """What it is."""
    caption: str
    """What it shows, in a sentence."""


def figures_of(manifest: Manifest) -> list[Figure]:
    """The figures that a configuration has numbers for."""
    data = manifest.figures
    found: list[Figure] = []
    if _has_entropy(data):
        found.append(
            Figure(
                _entropy_path(manifest),
                _ENTROPY_TITLE,
                f"{data.num_right} right and {data.num_wrong} wrong answers by the mean entropy of their tokens, and "
                "the share of right ones with its 95 % interval.",
            )
        )
    if data.mean_norms:
        found.append(
            Figure(
                _norms_path(manifest),
                _NORMS_TITLE,
                f"Mean L2 norm of the hidden states at each layer, over {data.num_tokens} tokens.",
            )
        )
    return found


def draw(manifest: Manifest) -> dict[str, bytes]:
    """The PNG files of a configuration by their paths in the dataset.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn: dict[str, bytes] = {}
    with style():
        if _has_entropy(manifest.figures):
            drawn[_entropy_path(manifest)] = _entropy_png(manifest)
        if manifest.figures.mean_norms:
            drawn[_norms_path(manifest)] = _norms_png(manifest)
    return drawn


def _entropy_path(manifest: Manifest) -> str:
    return f"figures/{manifest.config}-entropy.png"


def _norms_path(manifest: Manifest) -> str:
    return f"figures/{manifest.config}-norms.png"


def _has_entropy(data: FigureData) -> bool:
    return sum(data.entropy_right) + sum(data.entropy_wrong) > 0


def _entropy_png(manifest: Manifest) -> bytes:
    from matplotlib.ticker import MaxNLocator

    data = manifest.figures
    figure = canvas(height=6.4)
    counts, shares = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    edges = data.entropy_edges
    width = edges[1] - edges[0]
    centres = [edge + width / 2 for edge in edges[:-1]]
    look: dict[str, Any] = {"width": width, "edgecolor": "white", "linewidth": 0.8}
    right, wrong = data.entropy_right, data.entropy_wrong
    counts.bar(centres, wrong, color=ORANGE, hatch="//", label=f"wrong ({data.num_wrong})", **look)
    counts.bar(centres, right, bottom=wrong, color=BLUE, label=f"right ({data.num_right})", **look)
    counts.set_ylabel("answers per bin")
    counts.yaxis.set_major_locator(MaxNLocator(integer=True))
    counts.legend(title="answer", frameon=False)
    _title(counts, _ENTROPY_TITLE, manifest)
    filled = [(x, r, r + w) for x, r, w in zip(centres, right, wrong, strict=True) if r + w]
    intervals = [_interval(r, n) for _, r, n in filled]
    points = [100 * r / n for _, r, n in filled]
    shares.errorbar(
        [x for x, _, _ in filled],
        points,
        yerr=[
            [point - 100 * low for point, (low, _) in zip(points, intervals, strict=True)],
            [100 * high - point for point, (_, high) in zip(points, intervals, strict=True)],
        ],
        fmt="o",
        color=BLUE,
        ecolor="#888888",
        capsize=3,
        label="per bin, with 95 % interval",
    )
    judged = data.num_right + data.num_wrong
    shares.axhline(100 * data.num_right / judged, color=INK, linestyle="--", linewidth=1, label="all answers")
    shares.set_ylim(-5, 105)
    shares.set_xlim(0, edges[-1])
    shares.set_ylabel("right answers (%)")
    shares.set_xlabel("mean entropy of an answer's tokens (nats)")
    shares.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=11)
    grid(counts)
    grid(shares)
    return png(figure)


def _norms_png(manifest: Manifest) -> bytes:
    from matplotlib.ticker import MaxNLocator

    data = manifest.figures
    figure = canvas(height=4.6)
    axes = figure.subplots()
    axes.plot(
        data.layers,
        data.mean_norms,
        color=BLUE,
        marker="o",
        markersize=5,
        label=f"mean over {data.num_tokens} tokens",
    )
    smallest = min(data.mean_norms)
    if smallest > 0 and max(data.mean_norms) > _LOG_FROM * smallest:
        axes.set_yscale("log")
        axes.set_ylabel("L2 norm (model's own units, log scale)")
    else:
        axes.set_ylim(bottom=0)
        axes.set_ylabel("L2 norm (model's own units)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer of hidden_states (0: embeddings; the model's last: after its final norm)")
    axes.legend(frameon=False)
    _title(axes, _NORMS_TITLE, manifest)
    grid(axes)
    return png(figure)


def _title(axes: "Axes", text: str, manifest: Manifest) -> None:
    axes.set_title(f"{text}\n{manifest.config}, {manifest.model.id}", loc="left", parse_math=False)


def _interval(num_right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: sensible for few answers, and for none or all of them right."""
    share = num_right / total
    centre = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z / (1 + _Z**2 / total) * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
