"""One look for all pictures: a canvas of its own without shared state, and PNG bytes without clock or versions."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from tracekit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "INK",
    "ORANGE",
    "Curve",
    "Panel",
    "Picture",
    "Point",
    "canvas",
    "draw_picture",
    "grid",
    "png",
    "style",
]

BLUE, ORANGE, INK = "#0072B2", "#E69F00", "#222222"
"""Okabe and Ito's: told apart with any colour vision, and in grey."""
_APART = 0.04
"""Distance of two curves' points of one place, in steps from one place to the next."""
_WIDTH_INCHES, _DPI = 8, 150  # text of 12 points is 17 pixels high when the picture is shown 800 pixels wide


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A point of a curve."""

    x: float
    """Where it is."""
    y: float
    """Its value."""
    spread: float = 0.0
    """Half the height of its bar."""


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """A curve; it has one colour in all panels of a picture."""

    name: str
    """What the legend calls it."""
    points: list[Point]
    """Its points, from left to right."""


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One of the diagrams that stand over each other in a picture."""

    title: str
    """What its values are."""
    curves: list[Curve]
    """Its curves."""
    is_log: bool = False
    """Whether the axis of its values is logarithmic."""


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """Curves over the same places, as they lie in a manifest."""

    file: Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*\.png\Z")]
    """Name of the PNG."""
    title: str
    """What stands over it."""
    x_label: str
    """What the places are."""
    legend: str
    """What the curves are."""
    panels: Annotated[list[Panel], msgspec.Meta(min_length=1, max_length=20)]
    """Its diagrams; the first shows the legend."""


@contextmanager
def style() -> Iterator[None]:
    """While open, pictures are drawn in tracekit's style, whatever a person's own is: it would change the bytes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib, which is not installed: pip install 'tracekit-llm[publish]'"
        ) from error
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {"font.size": 12, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False}
        )
        yield


def canvas(*, height: float) -> "Figure":
    """An empty picture, 8 inches wide, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI, layout="constrained", facecolor="white")


def grid(axes: "Axes") -> None:
    """Light horizontal lines behind the data."""
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def png(figure: "Figure") -> bytes:
    """The picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})  # the version would be in the bytes
    return out.getvalue()


def draw_picture(picture: Picture) -> bytes:
    """A PNG of curves.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with style():
        figure = canvas(height=2.6 * len(picture.panels))
        diagrams: Any = figure.subplots(len(picture.panels), 1, sharex=True, squeeze=False)
        names = list(dict.fromkeys(curve.name for panel in picture.panels for curve in panel.curves))
        places = sorted({point.x for panel in picture.panels for curve in panel.curves for point in curve.points})
        # curves that coincide are drawn a little apart
        step = min((after - before for before, after in pairwise(places)), default=0.0) * _APART
        for panel, axes in zip(picture.panels, diagrams[:, 0], strict=True):
            for curve in panel.curves:
                number = names.index(curve.name)
                axes.errorbar(
                    [point.x + (number - (len(names) - 1) / 2) * step for point in curve.points],
                    [point.y for point in curve.points],
                    yerr=[point.spread for point in curve.points],
                    label=curve.name,
                    color=(BLUE, ORANGE)[number] if number < 2 else f"C{number % 10}",
                    marker="osD^v"[number % 5],
                    capsize=2,
                    elinewidth=1,
                )
            if panel.is_log:
                axes.set_yscale("log")
            axes.set_ylabel(panel.title, parse_math=False)
            grid(axes)
        diagrams[0, 0].set_title(picture.title, loc="left", parse_math=False)
        legend = diagrams[0, 0].legend(title=picture.legend, frameon=False, ncols=min(4, max(1, len(names))))
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_parse_math(False)
        diagrams[-1, 0].set_xlabel(picture.x_label, parse_math=False)
        return png(figure)
