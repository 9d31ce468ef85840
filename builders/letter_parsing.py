"""Which letter of a question's options an output names, if it names one.

Nothing is guessed: an output that names two letters, takes one back or sets another option's text beside it names none,
and the reason is kept.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Named", "name_letter"]


class Named(NamedTuple):
    """What letter an output names."""

    letter: str | None
    """The letter; None where none could be read."""
    start: int
    """First character of what names it."""
    failure: str | None
    """Why none could be read; None where one was."""


_OPENING = r"(?:[\s\"'“‘*_`(\[{$]|<(?=\w>\W*$)|<\w+>|\\(?:boxed|text(?:bf)?|math(?:bf|rm))(?=\{)|\\[(\[])*"
_FIRST = re.compile(
    r"(?:[-–—•]\s+)?" + _OPENING + r"([A-Za-z])((?:[\"'”’*_`)\]}>$]|\\[)\]])*)(?![A-Za-z0-9])(.*)", re.DOTALL
)
_STATED = tuple(
    re.compile(rf"\b(?i:{words})\b(?:\s+is)?\s*[:：]?{_OPENING}([A-Za-z])\b(?![-'’./*]\w|[+#])")
    for words in ("answer", "option|choice|letter|range")
)
_ANOTHER = re.compile(
    r"(?:(?:\s*(?:,|/|&|and\b|or\b))+|\s*\n(?=\W*\w\W*(?:\n|$)))"
    rf"{_OPENING}([A-Z]|[a-z](?=\W*$|\W*[,/.)]|\s+(?:or|and)\b))\b"
)
_SETS_OFF = re.compile(r"[.:),;!]+[*_`]*(?:\s|$)|\s*\n|\s+(?:[-–—:(]|is\b|because\b|since\b)|</")
_DENIED = re.compile(r"\W*(?:(?:is|was)\s+(?:not|wrong|incorrect|false)|(?:is|was)n['’]t)\b")
_MARKED = re.compile(r"[.:),!]+[*_`]*(?:\s|$)|\s+[-–—:=]\s")
_CORRECTED = re.compile(
    r"(?:\b(?i:actually|wait|sorry|or rather|instead|correction|hmm|oops|I mean|on second thought)\b"
    r"|\b(?i:no)\b(?=\s*[,.;:!–—-])"
    r"|(?:^\W*|[.!?]\s+)(?i:wrong|incorrect|scratch that)\b)\W+"
    r"(?i:(?:it|that|this)(?:\s+is|['’]s)\s+|I\s+(?:think|choose|pick|mean)\s+"
    r"|(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice|letter)\b(?:\s+is\b)?\s*:?\s*)*"
    rf"{_OPENING}([A-Z]|[a-z](?=\W*$))\b(?=\W*$|[\"'”’*_`)\]}}]*[.,;:!?\n]|\s+(?i:is|was)\s+(?i:right|correct|better|best)\b)"
)
_ANOTHER_QUESTION = re.compile(r"\n\W*(?i:question|q)\s*\d*\W*[:：]")


def name_letter(text: str, options: Mapping[str, str]) -> Named:
    """The letter that an answer names, of the letters that `options` gives with their texts.

    In this order: the text of an option and nothing else, where that is more than a letter; a letter alone or set off
    at the start ("B", "(b)", "- B", "**B.** Jupiter", "\\boxed{B}", "B Jupiter"); the text of an option but for its
    punctuation; a single letter that the answer states ("the answer is B", "Option C"). What a model goes on to after
    the answer, a line that begins with "Question:", is not read.

    A letter is none where another is named beside it ("A or B"), where the options are listed, also in part
    ("A. Mars\\nB."), where it is taken back ("A. No, B"), and where another option's text follows it ("A. Jupiter").
    """
    answer = _ANOTHER_QUESTION.split(text, maxsplit=1)[0]
    stripped = answer.strip()
    if not stripped:
        return Named(None, 0, "nothing before another question" if text.strip() else "the output is empty")
    start = text.index(stripped)
    same = _same(stripped, options)
    if len(same) == 1 and len(_plain(stripped)) > 1:
        return Named(same[0], start, None)
    first = _FIRST.match(stripped)
    if first and first[1].upper() in options and _is_set_off(first[1], first[2], first[3], options):
        letter = first[1].upper()
        listed = list(options)[1] if _is_listing(stripped, options) else _listed(letter, first[3], options)
        failure = _doubt(letter, first[3], listed, options)
        return Named(None, 0, failure) if failure else Named(letter, start + first.start(1), None)
    if len(same) == 1:
        return Named(same[0], start, None)
    return _stated(answer, options)


def _stated(text: str, options: Mapping[str, str]) -> Named:
    """The letter that an answer states somewhere, and does not deny."""
    for number in range(len(_STATED)):
        stated = _statements(text, number, options)
        names = sorted({match[1].upper() for match in stated})
        if len(names) > 1:
            return Named(None, 0, f"several letters: {', '.join(names)}")
        for match in stated:
            rest = _after(text, match)
            listed = _listed(names[0], rest, options)
            # beside a stated letter, the letters of an explanation; a list begins with the first
            is_list = [names[0], listed] == list(options)[:2]
            failure = _doubt(names[0], rest, listed if is_list else None, options)
            if failure:
                return Named(None, 0, failure)
        if stated:
            return Named(names[0], stated[0].start(1), None)
    return Named(None, 0, f"no letter of {', '.join(options)} at the start, and none stated")


def _statements(text: str, number: int, options: Mapping[str, str]) -> list["re.Match[str]"]:
    """Where a text states letters of the options, and does not deny them."""
    return [
        match
        for match in _STATED[number].finditer(text)
        if match[1].upper() in options
        and not _DENIED.match(text, match.end())
        # "the answer is A cat": an article; after "option", it is none
        and ((match[1] in options and (number or match[1] != "A")) or _follows_letter(text, match, options))
    ]


def _after(text: str, match: "re.Match[str]") -> str:
    """What follows a letter and the signs that close it."""
    whole = _FIRST.match(text, match.start(1))
    assert whole is not None, text[match.start(1) :]
    return whole[3]


def _doubt(letter: str, rest: str, listed: str | None, options: Mapping[str, str]) -> str | None:
    """Why a letter is not the answer, for what follows it; None where nothing speaks against it."""
    other = _other(letter, options, _ANOTHER.match(rest)) or listed or _corrected(letter, rest, options)
    if other is not None:
        return f"several letters: {letter}, {other}, ..."
    other = _text_of_another(letter, rest, options)
    return None if other is None else f"the letter {letter}, but the text of {other}"


def _listed(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another letter that is set off at the start of a later line, or right after this one or its text."""
    own = rf"^\W*(?:{re.escape(options[letter])}(?!\w))?"
    lines = re.sub(own, "\n", rest, count=1, flags=re.IGNORECASE).split("\n")
    for number in range(1, len(lines)):
        item = _FIRST.match("\n".join(lines[number:]))
        if item is None or item[1].upper() not in options or item[1].upper() == letter or _DENIED.match(item[3]):
            continue
        other, after = item[1].upper(), item[3]
        is_marked = ")" in item[2] or "]" in item[2] or _MARKED.match(after) or not re.search(r"\w", after)
        if is_marked or _begins(after, options[other]) or _is_cut(after, options[other]):
            return other
    return None


def _corrected(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another letter that is named later in place of this one."""
    later = [*_CORRECTED.finditer(rest), *_statements(rest, 0, options)]
    return next((match[1].upper() for match in later if match[1].upper() in options.keys() - {letter}), None)


def _text_of_another(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another option whose text, whole or cut, stands where that of the letter would."""
    line = rest.split("\n", 1)[0]
    if not _plain(line) or not re.search(r"\w", line):
        same = _same(rest.strip(), options) if re.search(r"\w", rest) else []
        return None if letter in same else next(iter(same), None)
    cut = [name for name in options if _is_cut(line, options[name])]
    begun = [name for name in options if _begins(line, options[name])]
    if begun:
        longest = max(begun, key=lambda name: (len(_plain(options[name])), name == letter))
        # "1" is no beginning of "10" where another option is "1"
        is_own = letter in cut and (not _is_cut(line, options[longest]) or _begins(options[letter], line))
        return None if longest == letter or is_own else longest
    return None if letter in cut else next(iter(cut), None)


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


def _is_cut(text: str, option: str) -> bool:
    """Whether a text is the beginning of that of an option, signs before it left out; also the whole of it."""
    forms = (_plain(text), _plain(re.sub(r"^\W+", "", text)))
    return any(form and _plain(option).startswith(form) for form in forms)


def _same(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options that have this text, or else this text but for quotes, emphasis and punctuation."""
    exact = [letter for letter, option in options.items() if option.casefold() == text.casefold()]
    plain = _plain(text)
    return exact or [letter for letter, option in options.items() if plain and _plain(option) == plain]


def _plain(text: str) -> str:
    """A text without case, quotes, emphasis and punctuation; signs that tell -1 from 1 and C++ from C stay."""
    words = re.sub(r"[\s\"'“”‘’`_()\[\]{}–—…]+|[.,:;!?](?!\d)|(?<=[^\W\d])-(?=[^\W\d])", " ", text.casefold())
    return re.sub(r"\s+", " ", words).strip(" *%").replace(" %", "%")
