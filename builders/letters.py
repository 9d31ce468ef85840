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
from tracekit.errors import ConfigError
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
    """The spellings of the letters after a prompt: two, or one where the tokenizer makes the same tokens of both.

    A spelling in which two letters are the same tokens (both unknown to the tokenizer) is none.

    Raises:
        ConfigError: neither spelling tells the letters apart.
    """
    bare, spaced = (Spelling(joint + "A", continuation_ids(tokenizer, prompt, joint, letters)) for joint in ("", " "))
    both = [bare] if bare.token_ids == spaced.token_ids else [bare, spaced]
    found = [one for one in both if len({tuple(ids) for ids in one.token_ids}) == len(letters)]
    if not found:
        raise ConfigError(
            f"the tokenizer writes several of the letters {' '.join(letters)} as the same tokens, "
            f"{bare.token_ids}; use a model whose tokenizer knows them"
        )
    return found


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


_OPENING = r"(?:[\s\"'“‘*_`(\[{$]|<(?=\w>\W*$)|<\w+>|\\(?:boxed|text(?:bf)?|math(?:bf|rm))(?=\{)|\\[(\[])*"
_FIRST = re.compile(_OPENING + r"([A-Za-z])((?:[\"'”’*_`)\]}>$]|\\[)\]])*)(?![A-Za-z0-9])(.*)", re.DOTALL)
_STATED = tuple(
    re.compile(rf"\b(?i:{words})\b(?:\s+is)?\s*[:：]?{_OPENING}([A-Za-z])\b(?![-'’./*]\w|[+#])")
    for words in ("answer", "option|choice|letter|range")
)
_ANOTHER = re.compile(
    r"(?:(?:\s*(?:,|/|&|and\b|or\b))+|\s*\n(?=\W*\w\W*(?:\n|$)))"
    rf"{_OPENING}([A-Z]|[a-z](?=\W*$|\W*[,/.)]|\s+(?:or|and)\b))\b"
)
_SETS_OFF = re.compile(r"[.:),;!]+(?:\s|$)|\s*\n|\s+(?:[-–—:(]|is\b|because\b|since\b)|</")
_DENIED = re.compile(r"\W*(?:(?:is|was)\s+(?:not|wrong|incorrect|false)|(?:is|was)n['’]t)\b")


def name_letter(text: str, options: Mapping[str, str]) -> Named:
    """The letter that an answer names, of the letters that `options` gives with their texts.

    In this order: the text of an option and nothing else, where that is more than a letter; a letter alone or set off
    at the start ("B", "(b)", "**B.** Jupiter", "\\boxed{B}", "B Jupiter"); the text of an option but for its
    punctuation; a single letter that the answer states ("the answer is B", "Option C").
    """
    stripped = text.strip()
    if not stripped:
        return Named(None, 0, "the output is empty")
    start = text.index(stripped)
    same = _same(stripped, options)
    if len(same) == 1 and len(_plain(stripped)) > 1:
        return Named(same[0], start, None)
    first = _FIRST.match(stripped)
    if first and first[1].upper() in options and _is_set_off(first[1], first[2], first[3], options):
        other = _other(first[1], options, _ANOTHER.match(first[3]))
        if other is None and _is_listing(stripped, options):
            other = list(options)[1]
        if other is not None:
            return Named(None, 0, f"several letters: {first[1].upper()}, {other}, ...")
        return Named(first[1].upper(), start + first.start(1), None)
    if len(same) == 1:
        return Named(same[0], start, None)
    return _stated(text, options)


def _stated(text: str, options: Mapping[str, str]) -> Named:
    """The letter that an answer states somewhere, and does not deny."""
    for number, pattern in enumerate(_STATED):
        stated = [
            match
            for match in pattern.finditer(text)
            if match[1].upper() in options
            and not _DENIED.match(text, match.end())
            # "the answer is A cat": an article; after "option", it is none
            and ((match[1] in options and (number or match[1] != "A")) or _follows_letter(text, match, options))
        ]
        names = sorted({match[1].upper() for match in stated})
        others = [_other(match[1], options, _ANOTHER.match(text, match.end())) for match in stated]
        if len(names) == 1 and not any(others):
            return Named(names[0], stated[0].start(1), None)
        if stated:
            return Named(None, 0, f"several letters: {', '.join(names)}{', ...' * (len(names) == 1)}")
    return Named(None, 0, f"no letter of {', '.join(options)} at the start, and none stated")


def _follows_letter(text: str, match: "re.Match[str]", options: Mapping[str, str]) -> bool:
    """Whether what follows a stated letter sets it off."""
    whole = _FIRST.match(text, match.start(1))
    return whole is not None and _is_set_off(whole[1], whole[2], whole[3], options)


def _is_set_off(letter: str, closing: str, rest: str, options: Mapping[str, str]) -> bool:
    """Whether a letter stands for itself, and not for a word or a part of one: "A" may be an article."""
    if _DENIED.match(rest):
        return False
    if closing or not rest.strip() or _SETS_OFF.match(rest) or _ANOTHER.match(rest):
        return True
    follows = max(options, key=lambda name: len(options[name]) if _begins(rest, options[name]) else -1)
    return letter == follows and _begins(rest, options[letter])


def _other(letter: str, options: Mapping[str, str], another: "re.Match[str] | None") -> str | None:
    """Another letter of the options that is named in the same breath."""
    found = another[1].upper() if another and not _DENIED.match(another.string, another.end()) else None
    return found if found in options and found != letter.upper() else None


def _is_listing(text: str, options: Mapping[str, str]) -> bool:
    """Whether a text repeats the options rather than choose one."""
    shown = " ".join(f"{letter}. {option}" for letter, option in list(options.items())[:2])
    return _begins(text, shown)


def _begins(text: str, option: str) -> bool:
    """Whether a text begins with that of an option, signs before it left out."""
    wanted = _plain(option)
    return bool(wanted) and any(
        re.match(re.escape(wanted) + r"(?!\w)", _plain(form)) is not None for form in (text, re.sub(r"^\W+", "", text))
    )


def _same(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options that have this text, or else this text but for quotes, emphasis and punctuation."""
    exact = [letter for letter, option in options.items() if option.casefold() == text.casefold()]
    plain = _plain(text)
    return exact or [letter for letter, option in options.items() if plain and _plain(option) == plain]


def _plain(text: str) -> str:
    """A text without case, quotes, emphasis and punctuation; signs that tell -1 from 1 and C++ from C stay."""
    words = re.sub(r"[\s\"'“”‘’`_()\[\]{}–—…]+|[.,:;!?](?!\d)|(?<=[^\W\d])-(?=[^\W\d])", " ", text.casefold())
    return re.sub(r"\s+", " ", words).strip(" *%").replace(" %", "%")
