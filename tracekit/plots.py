"""One look for all pictures: a canvas of its own without shared state, and PNG bytes without clock or versions."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tracekit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "INK", "ORANGE", "canvas", "grid", "png", "style"]

BLUE, ORANGE, INK = "#0072B2", "#E69F00", "#222222"
"""Okabe and Ito's: told apart with any colour vision, and in grey."""
_WIDTH_INCHES, _DPI = 8, 150  # text of 12 points is 17 pixels high when the picture is shown 800 pixels wide


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
