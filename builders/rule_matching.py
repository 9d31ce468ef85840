"""Does an answer name a gold answer, and stand by it? By rules, on a normalisation of its own; English, and CJK golds.

    answer                            gold              names it
    It was 12 May 1905.               May 12, 1905      yes: dates are put in one order
    about a thousand                  1,000             yes: numbers are compared by value
    10,000                            10                no
    It was not Paris but London.      Paris             no: negated
    Either Paris or London.           Paris             no: one of several
    JRR Tolkien                       J. R. R. Tolkien  yes: initials are joined, accents and dots left out

TriviaQA's own normalisation, in builders/scoring.py, is another matter: its metric is what it is. Not done, because it
would be wrong as often as right: surnames alone for whole names, synonyms, plurals, abbreviations written out.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import NamedTuple

from builders.abstention import plain

__all__ = ["names_gold", "tokens_of"]

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
_WORDS_TOO = frozenset(
    ["us", "it", "who", "am", "is", "in", "or", "aids", "be", "as", "id", "ok", "me", "no", "so", "at", "all"]
)
"""Words that some acronyms look like in lower case."""
_PARTICLES = frozenset(["no", "yes", "none", "nothing", "never", "not", "unknown", "nobody", "true", "false"])
"""Golds that any sentence may hold without giving them as its answer."""
_UNDECOMPOSED = str.maketrans({"ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE"})
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")

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


def names_gold(answer: str, gold: Sequence[str], *, question: str = "") -> bool:
    """Whether an answer names one of the gold answers, neither denied nor as one of several to choose from.

    Args:
        answer: What was answered.
        gold: Answers that count as right.
        question: What was asked; where it asks for what is not so, "Paris did not" is an answer.
    """
    prepared = _prepared(answer)
    tokens = tokens_of(answer)
    return any(_names(prepared, tokens, one, tuple(gold), question) for one in gold)


def tokens_of(text: str) -> list[Token]:
    """A text as it is compared.

    NFKC, no accents on Latin letters, lower case, initials joined, numbers by value, dates as day, month, year; "the"
    and "an" left out; "a" stays, for "Vitamin A".
    """
    prepared = _prepared(text)
    raw = [_token(match) for match in _TOKEN.finditer(prepared)]
    tokens = _in_order(list(_numbers([token for token in raw if token.text not in ("the", "an")])))
    return tokens or raw


def _prepared(text: str) -> str:
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


# Finding


def _names(prepared: str, tokens: list[Token], one: str, gold: tuple[str, ...], question: str) -> bool:
    """Whether an answer names this gold answer and stands by it."""
    wanted = tokens_of(one)
    if not wanted:
        return " ".join(prepared.casefold().split()) == " ".join(_prepared(one).casefold().split()) != ""
    if _CJK.search(one):
        return _prepared(one).casefold() in prepared.casefold()
    if wanted[0].text == "a" and len(wanted) > 1:
        wanted = wanted[1:]
    is_whole = [token.text for token in _bare(tokens)] == [token.text for token in _bare(wanted)]
    if is_whole:
        return True
    for start, stop, first in _places(tokens, wanted):
        if _is_word_of_its_own(prepared, wanted, first, start, stop):
            continue
        if not (_is_denied(prepared, start, stop, question) or _is_one_of_several(prepared, start, stop, gold)):
            return True
    return False


def _bare(tokens: list[Token]) -> list[Token]:
    """Tokens without a leading article."""
    return tokens[1:] if len(tokens) > 1 and tokens[0].text == "a" else tokens


def _places(tokens: list[Token], wanted: list[Token]) -> Iterator[tuple[int, int, Token]]:
    """Where these tokens stand one after the other: characters from and to, and the first token."""
    keeps_a = any(token.text == "a" for token in wanted)
    kept = [place for place, token in enumerate(tokens) if keeps_a or token.text != "a"]
    for first in range(len(kept) - len(wanted) + 1):
        run = [tokens[place] for place in kept[first : first + len(wanted)]]
        if all(ours.text == theirs.text for ours, theirs in zip(run, wanted, strict=True)):
            start, stop = min(token.start for token in run), max(token.stop for token in run)
            yield start, stop, run[0]


def _is_word_of_its_own(prepared: str, wanted: list[Token], found: Token, start: int, stop: int) -> bool:
    """Whether what was found is but a word of the sentence: "us" for U.S., the article for A, "no" in "no idea"."""
    if len(wanted) > 1:
        last = wanted[-1]
        return last.text == "a" and not prepared[start:stop].endswith("A") and _CLOSED.match(prepared, stop) is None
    (one,) = wanted
    if len(one.text) == 1 and one.text.isalpha():
        return not found.original.isupper() or _CLOSED.match(prepared, stop) is None
    if one.text in _PARTICLES:
        return _CLOSED.match(prepared, stop) is None or re.search(r"(?:^|[.!?:]\s*)$", prepared[:start]) is None
    return one.text in _WORDS_TOO and one.original.isupper() and not found.original.isupper()


_CLOSED = re.compile(r"\s*(?:$|[.,;:!?)\]\"'])")
_SENTENCE_START = re.compile(r".*(?:[.!?;\n]\s|\n)", re.DOTALL)
_FILLER = (
    r"(?:(?:in|at|by|from|of|on|to|for|with|as|actually|really|been|be|called|named|necessarily|likely|probably|it|was|is"
    r"|the|a|an|mr|mrs|sir|dr|(?:the|a) \w+ (?:of|called|named)) )*"
)
_DENIED_BEFORE = re.compile(
    rf"(?:\b(?:not|never|neither|nor|rather than|instead of|other than|except|except for|unlike|as opposed to|far from|"
    rf"excluding|cannot)) {_FILLER}[\"'(]*$"
)
_DENIED_AFTER = re.compile(
    r"[\"')]* (?:(?:is|was|are|were|would be|can not be|could not be) (?:definitely |certainly |clearly )?(?:not|never)"
    r"(?: (?:it|right|correct|true|the (?:\w+ )?(?:answer|one|right|correct)\b|the|a|an|one)\b|[.,;!?]|$)|(?:is|was) "
    r"(?:wrong|incorrect|false|a mistake)\b|did not\b|does not\b|was not\b|were not\b)"
)
_ASKS_FOR_NOT = re.compile(r"\b(?:not|never|except)\b")


def _is_denied(prepared: str, start: int, stop: int, question: str) -> bool:
    """Whether a sentence denies what stands here in it."""
    begun = _SENTENCE_START.match(prepared[:start])
    before = plain(prepared[begun.end() if begun else 0 : start]) + " "
    before = re.sub(r"[,:]", "", before).lstrip() if before.strip() else ""
    if _DENIED_BEFORE.search(before):
        return True
    after = re.split(r"[.!?;\n]", prepared[stop:], maxsplit=1)[0]
    denied_after = _DENIED_AFTER.match(" " + plain(after) if after[:1].isspace() else plain(after))
    return denied_after is not None and _ASKS_FOR_NOT.search(plain(question)) is None


_OR_BEFORE = re.compile(r"\bor (?:(?:maybe|perhaps|possibly|rather|in|on|at|by|the|a|an) )*[\"'(]*$", re.IGNORECASE)
_OR_AFTER = re.compile(
    r"[\"')]*(?P<items>(?:\s*,\s*(?:[\w'.-]+\s?){1,4})*)(?P<comma>\s*,)?\s+or\s+"
    r"(?!so\b|more\b|less\b|about\b|around\b|there|thereabouts|earlier|later|not\b|at (?:least|most)\b)"
    r"(?P<other>[^,.;!?]*)",
    re.IGNORECASE,
)
_ITEM_BEFORE = re.compile(r"(?:^|[\s,])(?P<item>[\w'.-]+)\s*,\s*$")


def _is_one_of_several(prepared: str, start: int, stop: int, gold: tuple[str, ...]) -> bool:
    """Whether what stands here is offered beside other answers: "Paris or London". Another gold answer is no other."""
    begun = _SENTENCE_START.match(prepared[:start])
    before, after = prepared[begun.end() if begun else 0 : start], prepared[stop:]
    found = _OR_AFTER.match(after)
    if found is not None and not _is_gold(found["other"], gold):
        is_of_a_kind = all(_kind(item.strip()) == _kind(prepared[start:stop]) for item in _listed(found["items"]))
        has_either = re.search(r"\beither\b", before, re.IGNORECASE) is not None
        is_apposition = found["comma"] is not None and not found["items"].strip() and not has_either
        if is_of_a_kind and not is_apposition:
            return True
    if not _OR_BEFORE.search(before):
        return False
    head = _OR_BEFORE.sub("", before).rstrip(" ")
    return not head.endswith(",") or "," in head[:-1] or re.search(r"\beither\b", head, re.IGNORECASE) is not None


def _listed(items: str) -> list[str]:
    return [item for item in items.split(",") if item.strip()]


def _kind(text: str) -> str:
    """Digits, capital or small letter at the beginning."""
    return "digit" if text[:1].isdigit() else "capital" if text[:1].isupper() else "small"


def _is_gold(text: str, gold: tuple[str, ...]) -> bool:
    """Whether the other side of an "or" is a gold answer too."""
    ours = [token.text for token in _bare(tokens_of(text))]
    wanted = [[token.text for token in _bare(tokens_of(one))] for one in gold]
    return any(one and ours[: len(one)] == one for one in wanted)
