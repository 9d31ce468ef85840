"""Letters as answers: how they are spelled in tokens, how probable each is, and which one an output names.

A letter can follow a prompt as "A" or as " A", which most tokenizers know as two different tokens. Both spellings are
scored, and the one with more probability on all letters together counts. Where every letter is one token, its logit
comes from the captured pass itself; where one is several, as in tokenizers that keep the space apart, the letters of
that spelling are scored by the summed log-probability of their tokens, in passes of their own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tracekit.capture import Trace
from tracekit.continuations import continuation_ids, score_continuations
from tracekit.traced import TracedModel

__all__ = ["LetterScores", "Named", "Spelling", "asked_ids", "name_letter", "score_letters", "spellings_of"]


class Spelling(NamedTuple):
    """One way to write the letters after a prompt."""

    form: str
    """`A`, or ` A` with a space before."""
    token_ids: list[list[int]]
    """Ids of each letter after the prompt."""

    @property
    def is_single(self) -> bool:
        """Whether every letter is one token."""
        return all(len(ids) == 1 for ids in self.token_ids)


class LetterScores(NamedTuple):
    """How probable each letter is after a prompt."""

    spelling: Spelling
    """The spelling that has more probability."""
    logits: list[float]
    """Raw logits; summed log-probabilities where letters are several tokens."""
    logprobs: list[float]
    """Log-probabilities over the whole vocabulary, nats."""
    mass: float
    """Probability of all letters together."""
    other_mass: float
    """The same in the other spelling; 0.0 where the tokenizer has but one."""


class Named(NamedTuple):
    """What letter an output names."""

    letter: str | None
    """The letter; None where none could be read."""
    start: int
    """First character of what names it."""
    failure: str | None
    """Why none could be read; None where one was."""


def spellings_of(tokenizer: Any, prompt: str, letters: Sequence[str]) -> list[Spelling]:
    """The spellings of the letters after a prompt: two, or one where the tokenizer makes the same tokens of both."""
    bare, spaced = (Spelling(joint + "A", continuation_ids(tokenizer, prompt, joint, letters)) for joint in ("", " "))
    return [bare] if bare.token_ids == spaced.token_ids else [bare, spaced]


def asked_ids(spellings: Sequence[Spelling]) -> tuple[int, ...]:
    """The tokens whose logits the captured pass has to give: the letters of every spelling in single tokens."""
    return tuple(ids[0] for spelling in spellings if spelling.is_single for ids in spelling.token_ids)


def score_letters(
    traced: TracedModel, prompts: Sequence[list[int]], spellings: Sequence[Sequence[Spelling]], traces: Sequence[Trace]
) -> list[LetterScores]:
    """Scores of the letters after each prompt. `traces` were captured with the `asked_ids` of the spellings."""
    long = [[one for one in some if not one.is_single] for some in spellings]
    continuations = [[ids for one in some for ids in one.token_ids] for some in long]
    sums = score_continuations(traced, prompts, continuations)
    return [_best(*row) for row in zip(spellings, traces, sums, strict=True)]


def _best(spellings: Sequence[Spelling], trace: Trace, sums: list[float]) -> LetterScores:
    """The scores of the more probable spelling."""
    asked, summed = 0, 0
    found: list[LetterScores] = []
    for spelling in spellings:
        count = len(spelling.token_ids)
        if spelling.is_single:
            logits = trace.asked_logits[asked : asked + count].tolist()
            logprobs = trace.asked_logprobs[asked : asked + count].tolist()
            asked += count
        else:
            logits = logprobs = sums[summed : summed + count]
            summed += count
        found.append(LetterScores(spelling, logits, logprobs, float(np.exp(logprobs).sum()), 0.0))
    best = max(found, key=lambda scores: scores.mass)
    return best._replace(other_mass=sum(scores.mass for scores in found if scores is not best))


_OPENING = r"[\s\"'“‘*_`(\[{<]*"
_FIRST = re.compile(_OPENING + r"([A-Za-z])([\"'”’*_`)\]}>]*)(?![A-Za-z0-9])(.*)", re.DOTALL)
_STATED = tuple(
    re.compile(rf"\b(?i:{words})\b(?:\s+is)?\s*:?{_OPENING}([A-Z])\b(?!['’])")
    for words in ("answer", "option|choice|letter|range")
)
_ANOTHER = re.compile(r" *(?:,|/|&|and\b|or\b)+(?: *or\b)? *([A-Z])\b")
_SETS_OFF = re.compile(r"[.:),;]+(?:\s|$)|\s*\n|\s+(?:[-–—:=]|is\b|because\b|since\b)")


def name_letter(text: str, options: Mapping[str, str]) -> Named:
    """The letter that an answer names, of the letters that `options` gives with their texts.

    In this order: a letter alone or set off at the start ("B", "(b)", "**B.** Jupiter", "B Jupiter"); the text of an
    option and nothing else; a single letter that the answer states ("the answer is B", "Option C").
    """
    stripped = text.strip()
    if not stripped:
        return Named(None, 0, "the output is empty")
    start = text.index(stripped)
    first = _FIRST.match(stripped)
    if first and first[1].upper() in options and _is_set_off(first, options[first[1].upper()]):
        other = _ANOTHER.match(first[3])
        if other and other[1] in options and other[1] != first[1].upper():
            return Named(None, 0, f"several letters: {first[1].upper()}, {other[1]}, ...")
        return Named(first[1].upper(), start + first.start(1), None)
    same = [letter for letter, option in options.items() if _plain(option) == _plain(stripped)]
    if len(same) == 1:
        return Named(same[0], start, None)
    for pattern in _STATED:
        stated = [match for match in pattern.finditer(text) if match[1] in options]
        names = sorted({match[1] for match in stated})
        if len(names) == 1 and not any(_ANOTHER.match(text, match.end()) for match in stated):
            return Named(names[0], stated[0].start(1), None)
        if stated:
            return Named(None, 0, f"several letters: {', '.join(names)}{', ...' * (len(names) == 1)}")
    return Named(None, 0, f"no letter of {', '.join(options)} at the start, and none stated")


def _is_set_off(match: "re.Match[str]", option: str) -> bool:
    """Whether a letter at the start stands for itself, and not for a word: "A" may be an article."""
    letter, closing, rest = match.groups()
    if closing or not rest.strip() or _SETS_OFF.match(rest) or _ANOTHER.match(rest):
        return True
    return letter.isupper() and bool(_plain(option)) and _plain(rest).startswith(_plain(option))


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()
