"""What the passes ask, in one place: templates, and the letters that answer them.

All three passes show the question with its options first and then ask something of their own, so that their prompts
share everything up to there:

    Which planet is the largest?
    A. Mars
    B. Jupiter
    C. Venus
    D. Earth

    mcq                Which option is right? ...
    self_confidence    Do not answer the question. How likely is it that you would answer it correctly? A. under 5 % ...
    other_confidence   Do not answer the question. How likely is it that a typical college-educated person would ...
"""

import string
from collections.abc import Sequence
from itertools import pairwise

from builders.introspection.config import PASSES, Pass
from builders.introspection.record import ConfidenceBin
from builders.kit.choices import Choice
from tracekit.errors import ConfigError
from tracekit.model.prompts import sha256_text

__all__ = ["PASSES", "SYSTEM", "Pass", "bins_of", "instruction_sha256", "message"]

SYSTEM = "Reply to every question with one letter and nothing else."

_QUESTION = "{question}\n{options}\n\n"
_MCQ = "Which option is right? Give the letter of one option."
_CONFIDENCE = (
    "Do not answer the question. How likely is it that {who} would answer it correctly?\n"
    "{ranges}\n"
    "Give the letter of one range."
)
_WHO = {"self_confidence": "you", "other_confidence": "a typical college-educated person"}


def message(name: Pass, question: str, choices: Sequence[Choice], bins: Sequence[ConfidenceBin]) -> str:
    """The user's message of a pass. `bins` are those of the confidence passes."""
    shown = _QUESTION.format(question=question, options=_lines([(c.label, c.text) for c in choices]))
    return shown + _instruction(name, bins)


def instruction_sha256(name: Pass, system: str, bins: Sequence[ConfidenceBin]) -> str:
    """Hash of everything that a pass asks apart from the question: system message, template, bins."""
    return sha256_text("\n".join([system, _QUESTION, _instruction(name, bins)]))


def bins_of(edges: Sequence[float], midpoints: Sequence[float] = ()) -> list[ConfidenceBin]:
    """Bins between edges in percent, lettered from A; they count for the middle, or for the given midpoints.

    Raises:
        ConfigError: edges that do not rise from 0 to 100, fewer than 2 or more than 26 bins, or midpoints that are not
            one inside each.
    """
    is_rising = all(low < high for low, high in pairwise(edges))
    if not (3 <= len(edges) <= 27 and is_rising and edges[0] == 0 and edges[-1] == 100):
        raise ConfigError(
            f"edges {' '.join(f'{edge:g}' for edge in edges)} - at `$.bin_edges`; expected 3 to 27 percentages that "
            "rise from 0 to 100"
        )
    pairs = list(pairwise(edges))
    middles = list(midpoints) or [(low + high) / 2 for low, high in pairs]
    if len(middles) != len(pairs) or not all(a <= m <= b for (a, b), m in zip(pairs, middles, strict=True)):
        raise ConfigError(
            f"midpoints {' '.join(f'{middle:g}' for middle in middles)} - at `$.bin_midpoints`; expected "
            f"{len(pairs)}, one inside each bin"
        )
    return [
        ConfidenceBin(label=letter, low=float(low), high=float(high), midpoint=float(middle))
        for letter, (low, high), middle in zip(string.ascii_uppercase, pairs, middles, strict=False)
    ]


def _instruction(name: Pass, bins: Sequence[ConfidenceBin]) -> str:
    """What a pass asks about the question shown."""
    if name == "mcq":
        return _MCQ
    return _CONFIDENCE.format(who=_WHO[name], ranges=_lines([(one.label, one.text()) for one in bins]))


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in pairs)
