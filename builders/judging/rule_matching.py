"""Does an answer name a gold answer, and stand by it? By rules, on a normalisation of its own; English, and CJK golds.

    answer                            gold              names it
    It was 12 May 1905.               May 12, 1905      yes: dates are put in one order
    about a thousand                  1,000             yes: numbers are compared by value
    10,000                            10                no
    It was not Paris but London.      Paris             no: negated
    Either Paris or London.           Paris             no: one of several
    JRR Tolkien                       J. R. R. Tolkien  yes: initials are joined, accents and dots left out

TriviaQA's own normalisation, in builders/kit/scoring.py, is another matter: its metric is what it is. Not done,
because it
would be wrong as often as right: surnames alone for whole names, synonyms, plurals, abbreviations written out.
"""

import re
from collections.abc import Iterator, Sequence

from builders.judging.abstention import plain
from builders.judging.comparable import Token, prepared, tokens_of

__all__ = ["names_gold"]

_WORDS_TOO = frozenset(
    ["us", "it", "who", "am", "is", "in", "or", "aids", "be", "as", "id", "ok", "me", "no", "so", "at", "all"]
)
"""Words that some acronyms look like in lower case."""
_PARTICLES = frozenset(["no", "yes", "none", "nothing", "never", "not", "unknown", "nobody", "true", "false"])
"""Golds that any sentence may hold without giving them as its answer."""
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def names_gold(answer: str, gold: Sequence[str], *, question: str = "") -> bool:
    """Whether an answer names one of the gold answers, neither denied nor as one of several to choose from.

    Args:
        answer: What was answered.
        gold: Answers that count as right.
        question: What was asked; where it asks for what is not so, "Paris did not" is an answer.
    """
    text = prepared(answer)
    tokens = tokens_of(answer)
    return any(_names(text, tokens, one, tuple(gold), question) for one in gold)


def _names(text: str, tokens: list[Token], one: str, gold: tuple[str, ...], question: str) -> bool:
    """Whether an answer names this gold answer and stands by it."""
    wanted = tokens_of(one)
    if not wanted:
        return " ".join(text.casefold().split()) == " ".join(prepared(one).casefold().split()) != ""
    if _CJK.search(one):
        return prepared(one).casefold() in text.casefold()
    if wanted[0].text == "a" and len(wanted) > 1:
        wanted = wanted[1:]
    is_whole = [token.text for token in _bare(tokens)] == [token.text for token in _bare(wanted)]
    if is_whole:
        return True
    for start, stop, first in _places(tokens, wanted):
        if _is_word_of_its_own(text, wanted, first, start, stop):
            continue
        if not (_is_denied(text, start, stop, question) or _is_one_of_several(text, start, stop, gold)):
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


def _is_word_of_its_own(text: str, wanted: list[Token], found: Token, start: int, stop: int) -> bool:
    """Whether what was found is but a word of the sentence: "us" for U.S., the article for A, "no" in "no idea"."""
    if len(wanted) > 1:
        last = wanted[-1]
        return last.text == "a" and not text[start:stop].endswith("A") and _CLOSED.match(text, stop) is None
    (one,) = wanted
    if len(one.text) == 1 and one.text.isalpha():
        return not found.original.isupper() or _CLOSED.match(text, stop) is None
    if one.text in _PARTICLES:
        return _CLOSED.match(text, stop) is None or re.search(r"(?:^|[.!?:]\s*)$", text[:start]) is None
    return one.text in _WORDS_TOO and one.original.isupper() and not found.original.isupper()


_CLOSED = re.compile(r"\s*(?:$|[.,;:!?)\]\"'])")
_SENTENCE_START = re.compile(r".*(?:[.!?;\n]\s|\n)", re.DOTALL)
_FILLER = (
    r"(?:(?:in|at|by|from|of|on|to|for|with|as|actually|really|been|be|called|named|necessarily|likely|probably|it|was|is"
    r"|the|a|an|mr|mrs|sir|dr|(?:the|a) \w+ (?:of|called|named)) ){0,8}"
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


def _is_denied(text: str, start: int, stop: int, question: str) -> bool:
    """Whether a sentence denies what stands here in it."""
    begun = _SENTENCE_START.match(text[:start])
    before = plain(text[begun.end() if begun else 0 : start]) + " "
    before = re.sub(r"[,:]", "", before).lstrip() if before.strip() else ""
    if _DENIED_BEFORE.search(before):
        return True
    after = re.split(r"[.!?;\n]", text[stop:], maxsplit=1)[0]
    denied_after = _DENIED_AFTER.match(" " + plain(after) if after[:1].isspace() else plain(after))
    return denied_after is not None and _ASKS_FOR_NOT.search(plain(question)) is None


_OR_BEFORE = re.compile(r"\bor (?:(?:maybe|perhaps|possibly|rather|in|on|at|by|the|a|an) )*[\"'(]*$", re.IGNORECASE)
_OR_AFTER = re.compile(
    r"[\"')]*(?P<items>(?:\s*,\s*[\w'.-]+(?:\s[\w'.-]+){0,3})*)(?P<comma>\s*,)?\s+or\s+"
    r"(?!so\b|more\b|less\b|about\b|around\b|there|thereabouts|earlier|later|not\b|at (?:least|most)\b)"
    r"(?P<other>[^,.;!?]*)",
    re.IGNORECASE,
)


def _is_one_of_several(text: str, start: int, stop: int, gold: tuple[str, ...]) -> bool:
    """Whether what stands here is offered beside other answers: "Paris or London". Another gold answer is no other."""
    begun = _SENTENCE_START.match(text[:start])
    before, after = text[begun.end() if begun else 0 : start], text[stop:]
    found = _OR_AFTER.match(after)
    if found is not None and not _is_gold(found["other"], gold):
        items = [item.strip() for item in found["items"].split(",") if item.strip()]
        is_of_a_kind = all(_kind(item) == _kind(text[start:stop]) for item in items)
        has_either = re.search(r"\beither\b", before, re.IGNORECASE) is not None
        is_apposition = found["comma"] is not None and not found["items"].strip() and not has_either
        if is_of_a_kind and not is_apposition:
            return True
    if not _OR_BEFORE.search(before):
        return False
    head = _OR_BEFORE.sub("", before).rstrip(" ")
    return not head.endswith(",") or "," in head[:-1] or re.search(r"\beither\b", head, re.IGNORECASE) is not None


def _kind(text: str) -> str:
    """Digits, capital or small letter at the beginning."""
    return "digit" if text[:1].isdigit() else "capital" if text[:1].isupper() else "small"


def _is_gold(text: str, gold: tuple[str, ...]) -> bool:
    """Whether the other side of an "or" is a gold answer too."""
    ours = [token.text for token in _bare(tokens_of(text))]
    wanted = [[token.text for token in _bare(tokens_of(one))] for one in gold]
    return any(one and ours[: len(one)] == one for one in wanted)
