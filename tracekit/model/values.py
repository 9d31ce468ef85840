"""Which values a model may give: finite ones alone, or others too, as of a model whose weights are damaged."""

from typing import NamedTuple

__all__ = ["FINITE", "ValuePolicy"]


class ValuePolicy(NamedTuple):
    """What is done with a value that is not finite, and with one that its dtype does not hold."""

    may_be_nonfinite: bool = False
    """Whether a value that is not finite is stored as it is in a lone eager pass; else it stops the capture."""
    may_overflow: bool = False
    """Whether a finite value beyond the dtype that it is stored in becomes inf, and is counted; else it stops the
    capture. Only beside the first."""


FINITE = ValuePolicy()
"""Every value is finite, and its dtype holds it."""
