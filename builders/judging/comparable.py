"""Texts as the rule-based judge compares them: tokens in which spelling, numbers and dates are put in one form.

    On May 12th, 1905, J. R. R. Tolkien's 1,000 dogs     ->     on #12 may #1905 jrr tolkien #1000 dogs

Numbers are marked, so that no word equals them. TriviaQA's normalisation, in builders/kit/scoring.py, is another
matter.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple

__all__ = ["Token", "prepared", "tokens_of"]

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * (i + 2) for i, word in enumerate(_TENS)}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ORDINALS = {
    word: f"{value}th"
    for value, word in enumerate(
        [
            "zeroth",
            "first",
            "second",
            "third",
            "fourth",
            "fifth",
            "sixth",
            "seventh",
            "eighth",
            "ninth",
            "tenth",
            "eleventh",
            "twelfth",
            "thirteenth",
            "fourteenth",
            "fifteenth",
            "sixteenth",
            "seventeenth",
            "eighteenth",
            "nineteenth",
            "twentieth",
        ]
    )
}
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_SHORT_MONTHS = {month[:3]: month for month in _MONTHS} | {"sept": "september"}
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound"}
_UNDECOMPOSED = str.maketrans({"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"})

_INITIALS = re.compile(r"\b(?:[^\W\d_]\.\s?){2,}")
_ISO_DATE = re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b")
_TOKEN = re.compile(
    r"(?P<number>(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])|(?<![\w.])\.\d+\b)"
    r"|(?P<ordinal>\d+(?:st|nd|rd|th)\b)|(?P<sign>[%$€£])|(?P<word>[^\W_]+(?:'[^\W_]+)*)",
    re.IGNORECASE,
)


class Token(NamedTuple):
    """One token of a normalised text."""

    text: str
    """As it is compared."""
    original: str
    """As it stands in the text, without accents."""
    start: int
    """First character in the prepared text."""
    stop: int
    """One past the last."""


def tokens_of(text: str) -> list[Token]:
    """A text as it is compared.

    NFKC, no accents on Latin letters, lower case, initials joined, numbers by value, dates as day, month, year; "the"
    and "an" left out; "a" stays, for "Vitamin A".
    """
    raw = [_token(match) for match in _TOKEN.finditer(prepared(text))]
    tokens = _in_order(list(_numbers([token for token in raw if token.text not in ("the", "an")])))
    return tokens or raw


def prepared(text: str) -> str:
    """The text with what marks and spells apart the same made equal; case is kept."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'").replace("_", " ")
    text = "".join(_without_marks(text)).translate(_UNDECOMPOSED)
    text = re.sub(r"n't\b", " not", re.sub(r"\bcan't\b", "can not", re.sub(r"\bwon't\b", "will not", text)))
    text = _ISO_DATE.sub(_spelled_date, text)
    text = re.sub(r"\b(\d+0)'s\b", r"\1s", text)
    text = re.sub(r"'s\b|(?<=s)'(?=\s|$)", "", text)
    return _INITIALS.sub(lambda match: re.sub(r"[.\s]", "", match[0]) + " ", text)


def _without_marks(text: str) -> Iterator[str]:
    """Characters without accents where they are Latin letters; others are whole."""
    for character in text:
        parts = unicodedata.normalize("NFD", character)
        yield parts[0] if len(parts) > 1 and "LATIN" in unicodedata.name(parts[0], "") else character


def _spelled_date(match: re.Match[str]) -> str:
    month = int(match[2])
    return f"{int(match[3])} {_MONTHS[month - 1]} {match[1]}" if 1 <= month <= len(_MONTHS) else match[0]


def _token(match: re.Match[str]) -> Token:
    text = match[0].casefold()
    if match["number"]:
        text = _value(Decimal(text.replace(",", "").replace("−", "-")))
    elif match["ordinal"]:
        text = f"{int(text[:-2])}th"
    elif match["sign"]:
        text = _CURRENCIES.get(text, "percent")
    else:
        text = {"dollars": "dollar", "euros": "euro", "pounds": "pound"}.get(text, _ORDINALS.get(text, text))
    return Token(text, match[0], match.start(), match.end())


def _value(number: Decimal) -> str:
    """A number as it is compared: "3", "-5", "3.5"; marked, so that no word equals it."""
    return f"#{number.normalize():f}"


def _numbers(tokens: Sequence[Token]) -> Iterator[Token]:
    """Tokens with numbers in words as numbers: "twenty-three", "5 million"; "$5" with its unit behind, "per cent"."""
    place = 0
    while place < len(tokens):
        token = tokens[place]
        following = tokens[place + 1].text if place + 1 < len(tokens) else ""
        if token.original in _CURRENCIES and following.startswith("#"):
            (*_, last), stop = list(_numbers(tokens[place + 1 : (end := _number_stop(tokens, place + 1))])), end
            yield last
            yield token
            place = stop
        elif (token.text, following) == ("per", "cent"):
            yield token._replace(text="percent", stop=tokens[place + 1].stop)
            place += 2
        elif (stop := _number_stop(tokens, place)) > place:
            yield Token(_sum(tokens[place:stop]), token.original, token.start, tokens[stop - 1].stop)
            place = stop
        else:
            yield token
            place += 1


def _number_stop(tokens: Sequence[Token], start: int) -> int:
    """One past the last token of the number that begins here; `start` where none does."""
    first = tokens[start].text
    before = tokens[start - 1].text if start else ""
    following = tokens[start + 1].text if start + 1 < len(tokens) else ""
    is_pronoun = first == "one" and (before in ("no", "this", "that") or following in ("of", "who"))
    is_word = first in _SMALL and not is_pronoun
    if not (is_word or first.startswith("#") or (first == "a" and following in _SCALES)):
        return start
    stop = start + 1
    while stop < len(tokens):
        previous, current = tokens[stop - 1].text, tokens[stop].text
        following = tokens[stop + 1].text if stop + 1 < len(tokens) else ""
        is_unit = current in _SMALL and _SMALL[current] < len(_TENS) + 2 and previous in _TENS
        is_after_scale = current in _SMALL and (previous in _SCALES or (previous == "and"))
        is_and = current == "and" and previous in ("hundred", "thousand") and following in _SMALL
        if not (current in _SCALES or is_unit or is_after_scale or is_and):
            break
        stop += 1
    return stop


def _sum(tokens: Sequence[Token]) -> str:
    """Value of a number in words or digits."""
    total, part = Decimal(0), Decimal(0)
    for token in tokens:
        if token.text in ("a", "and"):
            continue
        if token.text == "hundred":
            part = (part or 1) * 100
        elif token.text in _SCALES:
            total, part = total + (part or 1) * _SCALES[token.text], Decimal(0)
        else:
            part += Decimal(token.text[1:]) if token.text.startswith("#") else _SMALL[token.text]
    return _value(total + part)


def _in_order(tokens: list[Token]) -> list[Token]:
    """Tokens with dates as day, month, year, and months in full."""
    found = list(tokens)
    for place, token in enumerate(tokens):
        before = tokens[place - 1] if place else None
        after = tokens[place + 1] if place + 1 < len(tokens) else None
        month = _SHORT_MONTHS.get(token.text, token.text)
        if month not in _MONTHS:
            continue
        if after is not None and _is_day(after) and not (before is not None and _is_day(before)):
            found[place], found[place + 1] = _day(after), token._replace(text=month)
        elif before is not None and before.text == "of" and place > 1 and _is_day(tokens[place - 2]):
            found[place - 2], found[place - 1], found[place] = before._replace(text=""), _day(tokens[place - 2]), token
        elif before is not None and _is_day(before):
            found[place - 1], found[place] = _day(before), token._replace(text=month)
        elif after is not None and re.fullmatch(r"#\d{3,4}", after.text):
            found[place] = token._replace(text=month)
    return [token for token in found if token.text]


def _is_day(token: Token) -> bool:
    return re.fullmatch(r"#(?:[1-9]|[12]\d|3[01])|(?:[1-9]|[12]\d|3[01])th", token.text) is not None


def _day(token: Token) -> Token:
    return token._replace(text="#" + token.text.strip("#th"))
