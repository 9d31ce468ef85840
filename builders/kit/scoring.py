"""Right or wrong, for short answers: TriviaQA's normalisation, exact match, token F1, and where an alias is named.

    answer      "It was the Eiffel_Tower, in Paris."
    normalised  "it was eiffel tower in paris"
    alias       "The Eiffel Tower"  ->  "eiffel tower"
    found       characters 11 to 23 of the answer: "Eiffel_Tower"

Exact match and normalisation are those of TriviaQA (Joshi et al. 2017, "TriviaQA: A Large Scale Distantly Supervised
Challenge Dataset for Reading Comprehension", https://aclanthology.org/P17-1147); token F1 is SQuAD's (Rajpurkar et al.
2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", https://aclanthology.org/D16-1264). Written from
their descriptions. Characters are compared as they are: no Unicode normal form is applied, because the metric has none.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["AliasMatch", "exact_match", "f1", "find_alias", "normalize_answer"]

_QUOTES = "‘’´`"
_PUNCTUATION = string.punctuation + _QUOTES
_TO_SPACE = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_ARTICLE = re.compile(r"\b(?:an?|the)\b")
_TOKEN = re.compile(r"\S+")


class AliasMatch(NamedTuple):
    """Where an answer names one of its aliases."""

    alias: str
    """The alias, as it was given."""
    start: int
    """First character in the answer."""
    stop: int
    """One past the last character in the answer."""


class _Token(NamedTuple):
    """One token of a normalised text, and the characters of the original text that it came from."""

    text: str
    start: int
    stop: int


def normalize_answer(text: str) -> str:
    """A text as TriviaQA compares it (Joshi et al. 2017).

    Underscores become spaces; letters become lower-case; punctuation, ASCII's and the quotes ‘ ’ ´ `, becomes spaces;
    the articles a, an and the are removed; white space is collapsed to single spaces and stripped.
    """
    return " ".join(token.text for token in _tokenize(text))


def exact_match(answer: str, aliases: Iterable[str]) -> bool:
    """Whether the whole answer is one of the aliases, both normalised (Joshi et al. 2017).

    A text that normalises to nothing ("The", "!!!") is compared by its lower-cased, stripped self. An empty text never
    matches.
    """
    wanted = _comparable(answer)
    return bool(wanted) and any(_comparable(alias) == wanted for alias in aliases)


def f1(answer: str, aliases: Iterable[str]) -> float:
    """Best F1, 0 to 1, over the aliases: of the bags of normalised tokens of answer and alias (Rajpurkar et al. 2016).

    Without aliases it is 0. A text that normalises to nothing is compared as in `exact_match`.
    """
    return max((_token_f1(_comparable(answer).split(), _comparable(alias).split()) for alias in aliases), default=0.0)


def find_alias(answer: str, aliases: Iterable[str]) -> AliasMatch | None:
    """The longest alias that the answer names, and the characters that name it.

    An answer names an alias where the alias' normalised tokens stand in a row in the normalised answer. Longest is by
    characters of the normalised alias; of equals the first alias, of several places the first place. The range is in
    characters of the answer as given, runs from the first to the last of those tokens (so without an article or a quote
    in front) and by itself normalises to the alias. An alias that normalises to nothing ("The") is named only by an
    answer that is nothing else: found anywhere, it would be found in any sentence.
    """
    tokens = _tokenize(answer)
    best: AliasMatch | None = None
    best_size = 0
    for alias in aliases:
        size = len(_comparable(alias))
        if size > best_size and (found := _find(answer, tokens, alias)):
            best, best_size = found, size
    return best


def _tokenize(text: str) -> list[_Token]:
    """Tokens of the normalised text. Every step before the last keeps positions, so each token knows its origin."""
    lowered = text.replace("_", " ").lower()
    # Lower-casing may lengthen a character ("İ" becomes two), so each lower-cased one is given its original's position.
    origins = [index for index, character in enumerate(text) for _ in character.lower()]
    assert len(origins) == len(lowered), f"{len(origins)} != {len(lowered)} for {text!r}"
    spaced = _ARTICLE.sub(lambda match: " " * len(match[0]), lowered.translate(_TO_SPACE))
    return [_Token(match[0], origins[match.start()], origins[match.end() - 1] + 1) for match in _TOKEN.finditer(spaced)]


def _comparable(text: str) -> str:
    """The normalised text. Of one that normalises to nothing, "The." or "!!!", the lower-cased and stripped text."""
    lowered = text.lower().strip()
    return normalize_answer(text) or lowered.strip(_PUNCTUATION + string.whitespace) or lowered


def _token_f1(answer: list[str], alias: list[str]) -> float:
    num_shared = (Counter(answer) & Counter(alias)).total()
    return 2 * num_shared / (len(answer) + len(alias)) if num_shared else 0.0


def _find(answer: str, tokens: list[_Token], alias: str) -> AliasMatch | None:
    """First place in the answer, tokenised, that names this alias."""
    normalized = normalize_answer(alias)
    if not normalized:
        return _find_whole(answer, alias)
    wanted = normalized.split(" ")
    for first in range(len(tokens) - len(wanted) + 1):
        run = tokens[first : first + len(wanted)]
        start, stop = run[0].start, run[-1].stop
        # A Greek sigma is lower-cased by its surroundings; a range counts only if it is the alias by itself too.
        if [token.text for token in run] == wanted and normalize_answer(answer[start:stop]) == normalized:
            return AliasMatch(alias, start, stop)
    return None


def _find_whole(answer: str, alias: str) -> AliasMatch | None:
    """The answer without the white space around it, if that is the alias; for an alias that normalises to nothing."""
    if not exact_match(answer, [alias]):
        return None
    start = len(answer) - len(answer.lstrip())
    return AliasMatch(alias, start, start + len(answer.strip()))
