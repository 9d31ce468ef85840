"""Which letter of a question's options an output names, if it names one.

Nothing is guessed: an output that names two letters, takes one back, weighs it against another or sets another option's
text beside it names none, and the reason is kept. Full-width letters, other scripts' signs and JSON are read as well.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

__all__ = ["Named", "name_letter"]


class Named(NamedTuple):
    """What letter an output names."""

    letter: str | None
    """The letter; None where none could be read."""
    start: int
    """First character of what names it."""
    failure: str | None
    """Why none could be read; None where one was."""


_SIGNS = {
    **dict.fromkeys("：︰﹕꞉∶ː։׃፡፥᠄", ":"),
    **dict.fromkeys("。｡．", "."),
    **dict.fromkeys("、،", ","),
    **dict.fromkeys("【〔「『〖", "["),
    **dict.fromkeys("】〕」』〗", "]"),
    **dict.fromkeys("«»„‟", '"'),
    **dict.fromkeys("\u200b\u200e\u200f\ufeff\u2060", " "),
    **dict.fromkeys("‐‑−﹣", "-"),
}
"""Other scripts' signs as the ones that are read, one for one, so that places in a text stay."""
_OPENING = r"(?:[\s\"'“‘*_`(\[{$]|<(?=\w>\W*$)|<\w+>|\\(?:boxed|text(?:bf)?|math(?:bf|rm))(?=\{)|\\[(\[])*"
_FIRST = re.compile(
    r"(?:(?:[-–—•>]|#{1,6})\s+)?" + _OPENING + r"([A-Za-z])((?:[\"'”’*_`)\]}>$]|\\[)\]])*)(?![A-Za-z0-9])(.*)",
    re.DOTALL,
)
_ANSWER_WORDS = (
    "answer|antwort|antwoord|svar|réponse|respuesta|resposta|risposta|odpowied[źz]|odpověď|cevap|jawaban|đáp án|ответ"
    "|відповідь|απάντηση|תשובה|الجواب|الإجابة|उत्तर|คำตอบ|答案|回答|解答|答え|正解|정답"
)
_BETWEEN = (
    r"(?:[\s\"'”’*_`)\]}~#:=>–—→⇒-]|</?\w{1,20}>|[应應]?[选選]|是|为|為|は|은|는"
    r"|(?<![A-Za-z])(?i:is|(?:must|should|would) be|(?:appears|seems) to be|(?:most )?likely|probably|clearly|therefore"
    r"|ist|es|est|è|é|la|el)(?![A-Za-z])){0,40}?"
)
"""What stands between a word for the answer and its letter: signs of emphasis and quotes, a verb, a colon or a dash."""
_ALONE = r"([A-Za-z])(?![A-Za-z0-9])(?![-'’./*]\w|[+#])"
_STATED = (
    *(
        re.compile(rf"(?<![A-Za-z])(?i:{words})(?![A-Za-z]){_BETWEEN}{_OPENING}(?<![A-Za-z]){_ALONE}")
        for words in (_ANSWER_WORDS, "option|choice|letter|range")
    ),
    re.compile(rf"\\boxed\{{{_OPENING}{_ALONE}"),
)
_ANOTHER = re.compile(
    r"(?:(?:\s*(?:,|/|&|and\b|or\b))+|\s*\n(?=\W*\w\W*(?:\n|$)))"
    rf"{_OPENING}([A-Z]|[a-z](?=\W*$|\W*[,/.)]|\s+(?:or|and)\b))\b"
)
_SETS_OFF = re.compile(r"[.:),;!]+[^\w\s]*_*(?:\s|$)|\s*\n|\s+(?:[-–—:(]|is\b|because\b|since\b)|</")
_DENIED = re.compile(
    r"\W*(?:(?:is|was|seems|looks)\s+(?:(?:also|clearly|obviously|just|simply)\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|unlikely|invalid|excluded|eliminated|less|too|out|ruled out|rejected"
    r"|discarded|dismissed|worse|worst|inferior|weaker|tempting|close(?=\s*(?:[,.;!]|but\b|$))"
    r"|(?:a|the) (?:distractor|decoy|trap|second[- ]best))\b"
    r"|(?:is|was|does|did|can|ca|could|would|wo)n['’]t\b|(?:cannot|fails?|(?:does|did|can|could|would)\s+not)\b"
    r"|değil|नहीं|[은는이가]?\s*아[니닙님닌닐]|[じで]は?ゃ?(?:な[いく]|ありません)|неверн|неправильн|不正确|不对|不對|不是|错|錯)"
)
"""What denies the letter before it, or the text of its option."""
_VERDICT = re.compile(
    r"\W*(?:[✗✘❌×]|(?i:wrong|incorrect|false)\b|(?i:no|out)\b(?=\s*(?:[.,;!]|$))|(?i:not)\s+(?i:correct|right|possible|it)\b)"
)
"""What denies it without a verb."""
_NO_CHOICE = re.compile(
    r"(?i:\W*(?:(?:none|both|neither) of|all of (?:the above|these|them|the options)"
    r"|(?:unknown|unclear|unsure|not sure|no)\W*(?:$|[.!\n]))"
    r"|[^\w,–—-]*(?:i (?:do not|don['’]t|cannot|can['’]t|am not)|i['’]m (?:not|unsure))\b)"
)
"""What stands after a letter that is no choice."""
_ONLY_LETTERS = re.compile(r"\W*\b([A-Z])\b(?:\W*\b[A-Z]\b)*\W*")
"""Letters and nothing else, as of an answer that names several."""
_NAMELY = re.compile(r"\W*(?:(?:which\s+)?is\s+(?:the\s+)?|(?:i\.e\.|namely),?\s+)", re.IGNORECASE)
"""What ties the text of an option to the letter before it."""
_PAIR = re.compile(r"(?<![A-Za-z0-9])([A-Z])\s*(?:[:=]|\(\s*\d|\d)")
"""A letter with a value of its own."""
_UNSAID = re.compile(
    r"(?i:\b(?:not|never|neither|nor|avoid|reject|discard|dismiss|exclude|(?:rul|eliminat|exclud|discard|reject|dismiss)\w*"
    r"|opposite|instead of|rather than|except|other than|consider\w*|look\w*|check\w*|examin\w*|compar\w*|start\w*"
    r"|begin\w*|review\w*|evaluat\w*|analy[sz]\w*|let['’]?s|let me|tempt\w*|distract\w*|trap|initially|first thought"
    r"|first guess|first instinct|people|students?|others|someone|they|you (?:might|may|could)|one (?:might|may|could)"
    r"|for example|for instance|e\.g)\b|n['’]t\b|\b(?:all|any\w*|every\w*|none|nothing|no)\b.*\bbut\s*$"
    r"|\b(?:wrong|incorrect|false|worst|worse|least\s+\w+|less\s+\w+|second(?:[ -]best)?|other|another|alternative"
    r"|example|sample|previous|last|earlier|former|unlikely|bad|poor|invalid|falsche\w*|mauvaise)(?:\s+\w+){0,2}\W*$"
    r"|(?:неправильн|неверн)\w+\s*$|(?:错误的?|錯誤的?|誤った|不|非)\s*$)"
)
"""What says, in a clause, that the option or answer named at its end is not the writer's own."""
_CLAUSE = re.compile(r"[.!?;:\n]\s|\n|,\s|\b(?i:so|but|therefore|thus|hence|because|since)\b(?=\s+\S)")
_SENTENCE_END = re.compile(r"(?<![eE]\.g)[.!?\n](?=\W|$)")
_MAX_SENTENCE = 1000
"""Characters before a letter that are looked at."""
_ASKS = re.compile(r"\W*(?i:why|is|are|was|were|what|which|how|do|does|did|would|should|could|can)\b")
_SUPPOSES = re.compile(r"\b(?i:if|unless|suppose|initially|at first|for example|for instance|e\.g)\b")
_CONDITION = re.compile(r"\b(?i:if|unless)\b")
_LINK = re.compile(
    r"[:=>–—→⇒是为為は은는]|\s-+\s|(?<![A-Za-z])(?i:is|be|likely|probably|clearly|ist|es|est|è|é)(?![A-Za-z])"
)
"""What ties a letter to the word for the answer before it."""
_SETTLED = re.compile(
    r"(?:\W*$|\s*है|[^\w\s]*[.,!;\n]|[^\w\s]*\s*\n|\s*(?i:because|since|as|for)\b"
    r"|\W*\s(?i:is|was|seems?|looks|appears|fits|must be|should be|would be)\s+"
    r"(?i:(?:to be|\w+ly|also|the|a|most|my|our)\s+)*"
    r"(?i:right|correct|best|true|good|better|answer|choice|suitable|appropriate|likely|accurate|one)\b)"
)
"""What follows an option that is named and chosen in one."""
_MARKED = re.compile(r"[.:),!]+[*_`]*(?:\s|$)|\s+[-–—:=]\s")
_CORRECTED = re.compile(
    r"(?:\b(?i:actually|wait|sorry|or rather|instead|correction|hmm|oops|I mean|on second thought)\b"
    r"|\b(?i:no)\b(?=\s*[,.;:!–—-])"
    r"|(?:^\W*|[.!?]\s+)(?i:wrong|incorrect|scratch that)\b)\W+"
    r"(?i:(?:it|that|this)(?:\s+is|['’]s)\s+|I\s+(?:think|choose|pick|mean)\s+"
    r"|(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice|letter)\b(?:\s+is\b)?\s*:?\s*)*"
    rf"{_OPENING}([A-Z]|[a-z](?=\W*$))\b(?=\W*$|[\"'”’*_`)\]}}]*[.,;:!?)\n]|\s+(?i:is|was)\s+(?i:right|correct|better|best)\b)"
)
_HEDGED = re.compile(
    r"\b(?i:but|however|although|though|yet|whereas|while|instead|rather|or|and|also|alternatively|maybe|perhaps"
    r"|possibly|otherwise|else|unless|could|might)\b[^.!?\n]{0,80}?"
    r"(?<![A-Za-z0-9])(?<!not )(?<!than )([A-Z])(?![A-Za-z0-9'’+#-])"
)
"""A word that sets something against what was said, and a letter after it in the same sentence."""
_CONCLUDED = re.compile(
    r"(?:[:=→⇒]|\b(?i:so|thus|hence|therefore|it(?:['’]s|\s+is)|choose|pick|select|go\s+with|must\s+be|should\s+be)\b)"
    rf"(?:\s*,)?{_OPENING}([A-Z])(?=[\"'”’*_`)\]}}>$\s]*(?:[.!,;]|$))"
)
"""A letter that ends a sentence as its conclusion."""
_ASSERTED = re.compile(r"\s+(?:is|was|has|looks|seems|would|could|might|may)\b")
"""What is said of an option, which need not choose it."""
_SAID_OF = re.compile(
    r"(?:\s*(?:,|&|and\b|or\b)\s*[A-Z](?![A-Za-z]))*\s+(?:is|are|was|were|has|have|does|do)\b"
    r"(?!\s+(?:also\s+)?(?:possible|plausible|likely|right|correct|better|best|more|the\b))"
)
"""What an explanation says of other options."""
_NEGATED = re.compile(r"\b(?:not|neither|nor|than)\s+[A-Z](?:(?:\s*,|\s+(?:or|and|nor)\b)+\s*[A-Z])*(?![A-Za-z])")
_CONTRAST = re.compile(r"\b(?i:but|however|although|though|yet|whereas|except)\b")
_OF_OTHERS = re.compile(
    r"\b(?i:some|many|most|people|others|they|you|one (?:might|may|could|would)|if|not|never|wrong\w*|mistaken\w*"
    r"|choose|pick|select|tempt\w*|could|might|may|would)\b|n['’]t\b"
)
"""A conclusion that may be somebody else's, or none."""
_TAKEN_BACK = re.compile(
    r"\W*(?i:wrong|incorrect|false|nope|never mind|scratch that|not (?:right|correct|quite|it|this))\W*(?:$|[.,!;)\n])"
)
_ANSWER_KEYS = re.compile(
    rf"(?i:(?:(?:the|my|your|final|correct|right|best|model|predicted|selected|chosen|most|likely)[\W_]*)*"
    rf"(?:{_ANSWER_WORDS}|option|choice|letter|prediction|response|correct)(?:[\W_]*(?:letter|key|choice|option|id|label|text))*)"
)
"""A name in JSON for the answer that is given: `wrong_answer` and `options` are none."""
_ANOTHER_QUESTION = re.compile(r"\n\W*(?i:question|q)\s*\d*\W*[:：]")


def name_letter(text: str, options: Mapping[str, str]) -> Named:
    """The letter that an answer names, of the letters that `options` gives with their texts.

    In this order: the text of an option and nothing else, where that is more than a letter; a letter alone or set off
    at the start ("B", "(b)", "- B", "**B.** Jupiter", "\\boxed{B}", "B Jupiter"); the text of an option but for its
    punctuation; a single letter that the answer states ("the answer is B", "Option C"). What a model goes on to after
    the answer, a line that begins with "Question:", is not read.

    A letter is none where another is named beside it ("A or B"), where the options are listed, also in part
    ("A. Mars\\nB."), where it is taken back ("A. No, B"), where it is weighed against another ("A is large, but B has
    rings"), and where another option's text follows it ("A. Jupiter"). Of JSON, the entry for the answer is read.
    """
    text = _readable(text)
    options = {letter: _readable(option) for letter, option in options.items()}
    found = _in_json(text, options)
    return _name(text, options) if found is None else found


def _name(text: str, options: Mapping[str, str]) -> Named:
    """The letter that a readable text names."""
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
        concluded = _concluded(letter, first[3], options)
        if concluded is not None:
            return Named(concluded[1].upper(), start + first.start(3) + concluded.start(1), None)
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
        and (number == 2 or _is_own(text, match, options))
        # "the answer is A cat": an article; after "option", it is none
        and ((match[1] in options and (number or match[1] != "A")) or _follows_letter(text, match, options))
    ]


def _is_own(text: str, match: "re.Match[str]", options: Mapping[str, str]) -> bool:
    """Whether the writer says that a letter is the answer: not whether it may be, what others say, or what it is not.

    "Option B" alone is the topic of any sentence, so that what follows has to choose it.
    """
    first = max(0, match.start() - _MAX_SENTENCE)
    before = text[first : match.start()]
    start = max((end.end() for end in _SENTENCE_END.finditer(before)), default=0)
    end = _SENTENCE_END.search(text, match.end())
    sentence = before[start:]
    if end is not None and end[0] == "?" and _ASKS.match(before[start:] or text[match.start() :]):
        return False
    own_text = options[match[1].upper()]
    after = text[match.end() : None if end is None else end.start()][:_MAX_SENTENCE].replace(own_text, "", 1)
    if _SUPPOSES.search(sentence) or _CONDITION.search(after):
        return False
    clause = max((one.end() for one in _CLAUSE.finditer(before)), default=0)
    if _UNSAID.search(before[max(clause, start) :]) or re.search(r"(?i:\b(?:all|any\w*|every\w*)\s+but\s+$)", before):
        return False
    is_linked = _LINK.search(text, match.start(), match.start(1)) is not None
    rest, letter = _after(text, match), match[1].upper()
    own = re.match(rf"\W*{re.escape(options[letter])}(?!\w)\W?", rest, re.IGNORECASE)
    is_settled = _SETTLED.match(rest[own.end() :] if own else rest) is not None
    return is_linked or is_settled or _text_of_another(letter, rest, options) is not None


def _after(text: str, match: "re.Match[str]") -> str:
    """What follows a letter and the signs that close it."""
    whole = _FIRST.match(text, match.start(1))
    assert whole is not None, text[match.start(1) :]
    return whole[3]


def _doubt(letter: str, rest: str, listed: str | None, options: Mapping[str, str]) -> str | None:
    """Why a letter is not the answer, for what follows it; None where nothing speaks against it."""
    is_of_option = _begins(rest, options[letter])
    beside = _ONLY_LETTERS.fullmatch(rest.split("\n", 1)[0]) if not is_of_option else None
    other = _other(letter, options, _ANOTHER.match(rest) or beside) or listed or _corrected(letter, rest, options)
    if other is not None:
        return f"several letters: {letter}, {other}, ..."
    other = _text_of_another(letter, rest, options)
    if other is not None:
        return f"the letter {letter}, but the text of {other}"
    other = _weighed(letter, rest, options) or _paired(letter, rest, options)
    if other is not None:
        return f"several letters: {letter}, {other}, ..."
    if _NO_CHOICE.match(rest) and not is_of_option:
        return f"the letter {letter}, but no choice"
    own = re.match(rf"\W*{re.escape(options[letter])}(?!\w)", rest, re.IGNORECASE) if options[letter].strip() else None
    is_denied = own is not None and (_DENIED.match(rest, own.end()) or _VERDICT.match(rest, own.end())) is not None
    is_taken_back = _TAKEN_BACK.match(rest) is not None and not is_of_option
    is_weighed = _ASSERTED.match(rest) is not None and _CONTRAST.search(rest) is not None
    return f"the letter {letter}, taken back" if is_weighed or is_denied or is_taken_back else None


def _paired(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another letter of the same line that has a value of its own ("A: 10 %, B: 80 %"), or for an A that stands for
    "answer" ("A: It is Jupiter") one that is named or whose text is given."""
    line = rest.strip().split("\n", 1)[0]
    pairs = (match[1] for match in _PAIR.finditer(line))
    others = options.keys() - {letter}
    if letter == "A" and re.match(r"\W*:", rest) and not (_begins(rest, options["A"]) or _is_cut(line, options["A"])):
        named = re.findall(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9'’+#-])", line)
        texts = (one for one in sorted(others) if options[one].strip() and _plain(options[one]) in _plain(line))
        return next((one for one in [*named, *texts] if one in others), None)
    return next((one for one in pairs if one in others), None)


def _weighed(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another letter that is set against this one, or concluded after it; the option's own text aside.

    What a chosen letter's explanation says of the others sets nothing against it ("C. But B is large").
    """
    own = re.compile(re.escape(options[letter]), re.IGNORECASE)
    bare = _NEGATED.sub(" ", own.sub("", rest, count=1) if options[letter].strip() else rest)
    for match in [*_HEDGED.finditer(bare), *_CONCLUDED.finditer(bare)]:
        is_said_of = _DENIED.match(bare, match.end()) or (
            not _ASSERTED.match(rest) and _SAID_OF.match(bare, match.end())
        )
        if match[1] in options.keys() - {letter} and not is_said_of:
            return match[1]
    return None


def _concluded(letter: str, rest: str, options: Mapping[str, str]) -> "re.Match[str] | None":
    """Where something is said of an option, and in contrast to it another is concluded at the end: that one."""
    if _ASSERTED.match(rest) is None or (contrast := _CONTRAST.search(rest)) is None:
        return None
    is_chosen = re.search(r"\b(?i:right|correct|best|answer|choice)\b", rest[: contrast.start()])
    if is_chosen or _OF_OTHERS.search(rest, contrast.end()):
        return None
    standing = set(re.findall(r"(?<![A-Za-z0-9])([A-Z])(?![A-Za-z0-9'’+#-])", rest)) & options.keys() - {letter}
    matches = [*_CONCLUDED.finditer(rest, contrast.end()), *_statements(rest, 0, options)]
    last = next((match for match in matches if not re.search(r"\w", rest[match.end() :])), None)
    return last if last is not None and standing == {last[1].upper()} else None


def _in_json(text: str, options: Mapping[str, str]) -> Named | None:
    """The letter in an answer that is a JSON object, also in a fence; None where it is none."""
    bare = re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", text).strip()
    try:
        data = json.loads(bare) if bare.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    values = _answers_in(data)
    if any(value is False for value in data.values()):
        return Named(None, 0, "JSON with an answer that it calls false")
    named = {value: _name(value, options) for value in values}
    letters = {one.letter for one in named.values()}
    if len(letters) != 1 or None in letters:
        failures = [one.failure for one in named.values() if one.failure]
        return Named(None, 0, failures[0] if failures else "JSON that gives no answer, or several")
    value, found = next(iter(named.items()))
    told = [one for one in data.values() if isinstance(one, str) and one not in named]
    other = next((same[0] for one in told if (same := _same(one, options)) and found.letter not in same), None)
    if other is not None:
        return Named(None, 0, f"the letter {found.letter}, but the text of {other}")
    place = text.rfind(json.dumps(value, ensure_ascii=False))
    return found._replace(start=max(place + 1, 0) + found.start)


def _answers_in(data: dict[str, Any]) -> list[str]:
    """The texts under names for an answer; of a nested object those in it."""
    found: list[str] = []
    for name, value in data.items():
        if not _ANSWER_KEYS.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)):
            continue
        for one in value if isinstance(value, list) else [value]:
            found += _answers_in(one) if isinstance(one, dict) else [one] if isinstance(one, str) else []
    return found


def _readable(text: str) -> str:
    """A text with other forms of Latin letters and signs in their plain form, character by character, and with
    signs of emphasis for closing tags."""
    text = re.sub(r"</\w+>", lambda tag: "*" * len(tag[0]), text)
    return text if text.isascii() else "".join(one if one.isascii() else _plain_form(one) for one in text)


@cache
def _plain_form(character: str) -> str:
    """Full-width, circled and mathematical letters and full-width signs as ASCII; whatever is more than one stays."""
    if character in _SIGNS:
        return _SIGNS[character]
    plain = unicodedata.normalize("NFKC", character)
    if len(plain) == 3 and plain[0] + plain[2] == "()":  # a letter in brackets, as one character
        plain = plain[1]
    return plain if len(plain) == 1 and plain.isascii() and not plain.isdigit() else character


def _listed(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another letter that is set off at the start of a later line, or right after this one or its text."""
    own = rf"^\W*(?:{re.escape(options[letter])}(?!\w))?"
    lines = re.sub(own, "\n", rest, count=1, flags=re.IGNORECASE).split("\n")
    for number in range(1, len(lines)):
        if not lines[number].strip():
            continue
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
    later = [*_CORRECTED.finditer(rest), *_statements(rest, 0, options), *_statements(rest, 2, options)]
    return next((match[1].upper() for match in later if match[1].upper() in options.keys() - {letter}), None)


def _text_of_another(letter: str, rest: str, options: Mapping[str, str]) -> str | None:
    """Another option whose text, whole or cut, stands where that of the letter would."""
    line = rest.split("\n", 1)[0]
    if not _plain(line) or not re.search(r"\w", line):
        same = _same(rest.strip(), options) if re.search(r"\w", rest) else []
        return None if letter in same else next(iter(same), None)
    if tie := _NAMELY.match(line):
        tied = [name for name in options if _begins(line[tie.end() :], options[name])]
        return None if letter in tied else next(iter(tied), None)
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
