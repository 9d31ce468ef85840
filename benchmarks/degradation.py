"""How a model's perplexity rises with damage: the demo model, every method, three groups, several draws a level.

Not a time but a curve: of the packaged encyclopedic sample, in windows of 256 tokens; the middle of the draws is shown,
because a few large weights carry the model, and a draw that hits them is far from the others. Written to
benchmarks/degradation.png.
"""

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from benchmarks.measure import parse_arguments, say, store_results, table
from builders.degradation.configs import LEVELS
from builders.degradation.damage import Damaged
from builders.degradation.perplexity import text_perplexity
from builders.degradation.weight_groups import find_group
from tracekit.config import ModelConfig
from tracekit.errors import ModelError
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.plots import BLUE, ORANGE, canvas, grid, png, style

GROUPS = ("attn", "mlp", "embed")
_TEXT = Path(__file__).parents[1] / "builders" / "next_token" / "next_token_wikitext.txt"
_NUM_CHARACTERS, _NUM_DRAWS, _WINDOW = 2500, 3, 256

Curves = dict[str, dict[str, list[tuple[float, float]]]]
"""Method, group, and the points: level, perplexity."""


def measure(model: ModelConfig) -> Curves:
    """The curves of every method and group."""
    tokenizer = load_tokenizer(model)
    traced = load_model(model, model_info(model, variant="chat"), tokenizer, ())
    text = _TEXT.read_text(encoding="utf-8")[:_NUM_CHARACTERS]
    curves: Curves = {}
    for method, levels in LEVELS.items():
        for name in GROUPS:
            points = curves.setdefault(method, {}).setdefault(name, [])
            with Damaged(find_group(traced.model, traced.anatomy, name)) as damaged:
                for level in levels:
                    draws = _NUM_DRAWS if level and method != "uni_quant" else 1
                    found = []
                    for seed in range(draws):
                        damaged.apply(method, level=level, seed=seed)
                        found.append(text_perplexity(traced, text, max_length=_WINDOW, stride=_WINDOW).perplexity)
                    points.append((level, statistics.median(found)))
            say(f"  {method} {name}: " + ", ".join(f"{level:g}: {value:.4g}" for level, value in points))
    return curves


def draw(curves: Curves) -> bytes:
    """The curves as a PNG, a panel for each method."""
    with style():
        figure = canvas(height=3.2)
        panels: Any = figure.subplots(1, len(curves), sharey=True)
        for axes, (method, groups) in zip(panels, curves.items(), strict=True):
            for (name, points), color, marker in zip(groups.items(), (BLUE, ORANGE, "#009E73"), "osD", strict=True):
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
            axes.set_yscale("log")
            axes.set_xlabel("level")
            axes.set_title(method, loc="left", parse_math=False)
            grid(axes)
        panels[0].set_ylabel("perplexity (log scale)")
        panels[0].legend(title="group", frameon=False, fontsize=10)
        return png(figure)


def run() -> Mapping[str, Any] | None:
    """Measure, print, draw and store; None where the demo model is not installed."""
    transformers.utils.logging.disable_progress_bar()
    say("degradation: perplexity by level of damage")
    try:
        curves = measure(ModelConfig(model="demo", device="cpu"))
    except ModelError as error:
        say(f"degradation: skipped. {error}")
        return None
    for method, groups in curves.items():
        levels = [f"{level:g}" for level, _ in next(iter(groups.values()))]
        rows = [[name, *[f"{value:.4g}" for _, value in points]] for name, points in groups.items()]
        say(table(f"{method}: perplexity by level", ["group", *levels], rows))
    (Path(__file__).parent / "degradation.png").write_bytes(draw(curves))
    results = {"curves": curves}
    store_results("degradation", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
