"""Ways to damage weights, and the groups of weights: what a configuration names. Nothing here imports torch."""

import math
from typing import Literal, TypeAlias, get_args

from tracekit.errors import ConfigError

__all__ = ["GROUPS", "METHODS", "Method", "check_level"]

Method: TypeAlias = Literal["mult_gauss", "ablation", "uni_quant"]
"""How weights are damaged."""

METHODS: tuple[Method, ...] = get_args(Method)

GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "embed": ("embed",),
    **{part: (part,) for part in ("q", "k", "v", "o", "gate", "up", "down")},
}
"""Groups by name, and the parts that each is made of."""


def check_level(level: float, *, method: str, at: str) -> None:
    """See that a level has a meaning; `at` is where it was given.

    Raises:
        ConfigError: no such method; a level that is negative or not finite, or above 1 for ablation.
    """
    if method not in METHODS:
        raise ConfigError(f"damage method {method!r} - at `{at}`; expected one of {', '.join(METHODS)}")
    highest = 1.0 if method == "ablation" else math.inf
    if not (math.isfinite(level) and 0 <= level <= highest):
        expected = "a share from 0 to 1" if method == "ablation" else "0 (untouched) or more"
        raise ConfigError(f"level {level} of {method} - at `{at}`; expected {expected}")
