"""Abstention by phrases: does a text decline to answer? No model; English alone.

The phrases were written for this project. A text is taken apart into clauses, and each is one of three things:

    abstaining   "I don't know", "The question does not say": its subject is the speaker, the question or what is known
    empty        "Great question.", "Without more context,", "I can help you find it": names nothing
    all others   "Paris", "but most historians say Paris", "No data was lost in Paris."

A text abstains where one clause does and all others are empty. Rules like these miss what is said in other words: they
are for use without a model, and every label they make names them.
"""

import re

__all__ = ["abstains", "clauses_of", "plain", "without_abstentions"]

_I = r"(?:i|we)"
_HEDGE = (
    r"(?:(?:really|actually|currently|honestly|simply|just|quite|exactly|even|still|also|personally|entirely|"
    r"completely|totally|fully|absolutely|too|so|at all|100 ?%|100 percent|a hundred percent|very) )*"
)
_NOT = r"(?:do|did|can|could|would|will) not"
_SAY = (
    r"(?:know|recall|remember|say|tell|answer|identify|determine|confirm|verify|find|help|assist|comment|guess|"
    r"speculate|provide|give|offer|share|be (?:sure|certain))"
)
_KNOWLEDGE = (
    r"(?:information|info|knowledge|data|details?|answer|idea|clue|context|access|memory|recollection|records?)"
)
_WHAT = r"(?:who|what|where|when|which|how|why|whether|if)"
_AFTER = (
    rf"(?=$|[.,;:!?]| (?:{_WHAT}|for|to|about|on|of|from|exactly|at|based|in (?:the|my|this)|without|with|here|yet)\b)"
)

_ABSTENTIONS = (
    rf"{_I} {_HEDGE}{_NOT} {_HEDGE}{_SAY}\b",
    rf"{_I} {_HEDGE}do not {_HEDGE}have {_HEDGE}(?:[\w-]+ ){{0,4}}{_KNOWLEDGE}\b",
    rf"{_I} {_HEDGE}have (?:absolutely )?no (?:\w+ )?{_KNOWLEDGE}\b",
    rf"{_I} (?:have not|do not have) (?:the (?:faintest|foggiest|slightest)(?: idea)?|a clue|an idea)",
    rf"{_I} {_HEDGE}lack (?:[\w-]+ ){{0,4}}{_KNOWLEDGE}\b",
    rf"{_I} (?:am|are|was|were) {_HEDGE}(?:not {_HEDGE}(?:sure|certain|aware|familiar|positive|able to"
    rf"|in a position to)"
    r"|unsure|uncertain|unaware|unfamiliar|unable to)",
    rf"{_I} (?:would|will|must|have to) (?:rather |prefer )?(?:not (?:to )?(?:{_SAY}|like|want)|decline\b|refuse\b"
    rf"|pass\b|"
    r"abstain\b)",
    rf"{_I} (?:decline|refuse|abstain)\b",
    rf"{_I} wish {_I} (?:knew|could)",
    r"(?:there is|there are) (?:no|not enough|not sufficient|insufficient|too little) (?:\w+ ){0,2}"
    r"(?:information|data|details|context|evidence|way to (?:know|tell|say))(?=$|[.,!?]| (?:available|provided|given|"
    r"here|about|on|regarding|in (?:the|my|this)|for me|to (?:answer|determine|say|tell|know|identify|be))\b)",
    r"there is no (?:\w+ ){0,4}in my (?:records|memory|data|knowledge)",
    r"(?:not enough|insufficient|no) (?:information|data|context|details)(?=$|[.,!?]| (?:available|provided|given|here|"
    r"to (?:answer|determine|say|tell|know|identify))\b)",
    rf"(?:it|that|this) (?:is|was|remains) {_HEDGE}(?:not {_HEDGE}(?:known|clear|certain)|unknown|unclear"
    rf"|uncertain){_AFTER}"
    r"(?! for being| to be)",
    r"(?:it|that|this) is (?:impossible|not possible|hard|difficult) (?:for me )?to (?:say|tell|know|determine|answer|"
    r"identify|be sure|be certain|verify|confirm|give|provide)\b",
    r"(?:it|that|this) is (?:beyond|outside(?: of)?) my\b|(?:it|that|this) is not something (?:that )?i\b",
    r"it depends\b",
    r"(?:the|this|that|your) (?:question|prompt|query|passage|text|context) (?:does not|did not) (?:provide|give|"
    r"contain|specify|include|say|mention|state|make)",
    r"(?:the|this|that|your) (?:question|query|prompt) (?:can not|could not) be (?:answered|resolved)",
    r"(?:the|this|that|your) (?:question|query|prompt) is (?:too )?(?:unclear|ambiguous|vague|incomplete|not clear)",
    r"(?:the|that|this|such) (?:[\w-]+ ){0,2}(?:\w+) (?:is|are|was) (?:not (?:available|mentioned|specified|provided|"
    r"given|stated|known|publicly|clear)|unknown(?! soldier)|unavailable|unclear)" + _AFTER,
    r"(?:the|my) (?:training data|knowledge) (?:does not|is)",
    r"(?:could|can|would) you (?:please )?(?:clarify|specify|provide|give|tell|rephrase|explain)",
    r"please (?:clarify|specify|provide|give|tell|rephrase|supply)",
    r"(?:no idea|no clue|not (?:100 ?% )?(?:sure|certain)|dunno|beats me|who knows|can not say|hard to say|do not know)"
    r"(?=$|[.,;:!?]| )",
)
_OPENING = (
    r"(?:(?:i|we) (?:am|are) (?:so |very |really |deeply )?(?:sorry|afraid)(?: that)?|(?:i"
    r"|we) (?:sincerely )?apologi[sz]e"
    r"|sorry|(?:my )?apologies|unfortunately|honestly|frankly|well|hmm+|oh|actually|no|please note(?: that)?|"
    r"as (?:an|a) [\w-]+(?: [\w-]+){0,3}|at (?:the|this) moment|currently|as of (?:my|the|now)\b[^,]{0,40}(?=,|$)"
    r"|answer|"
    r"(?:based|going|judging) on [^,]{2,60}(?=,|$)|without [^,]{2,60}(?=,|$)|given [^,]{2,60}(?=,|$)|from (?:the|what"
    r"|my) [^,]{2,60}(?=,|$))"
)
_JOINED = r"(?:[,:]? (?:but |and )?)"
_BUT = r"(?:(?:but|however|though|although|yet|still|so|and|that said)[,:]? )*"
_WHOLE = r"(?:unknown|n/?a|not (?:known|available|applicable|certain)|no (?:answer|comment|information)|unsure|\?+|-+)"
_EMPTY = (
    rf"{_OPENING}",
    r"(?:that is |this is |what )?(?:an? |such )?(?:really |very )?(?:great|good|interesting|excellent|tricky|hard"
    r"|tough|"
    r"difficult) (?:question|one)",
    r"(?:i|we) (?:can|could|would|will|am|are|do|hope|only|was|have been|suggest|recommend)(?! (?:say|tell|guess|think|"
    r"believe|know)\b)\b.*",
    r"(?:i|we) (?:think|believe) (?:you|i|we)\b.*",
    r"(?:you|if you|please|let me|feel free|perhaps you|maybe you|try|would you|could you|can you|do you|is there)\b.*",
    r"(?:it|that|this|they) (?:is|was|are|were|may be|might be|could be|would be|seems|appears) (?:not |be )?(?:known|"
    r"unknown|unclear|impossible|hard|difficult|beyond|outside|possible|best|important|better"
    r"|something (?:that )?i)\b.*",
    r"(?:my|the) (?:training|knowledge|data|records|memory)\b.*",
    r"(?:because|since|as|which|for) (?:i|it|my|this|the (?:question|text|passage))\b.*",
    r"(?:sorry|thanks|thank you)\b.*",
)
_ABSTAINING = re.compile(rf"{_BUT}(?:{_OPENING}{_JOINED}){{0,3}}{_BUT}(?:{'|'.join(_ABSTENTIONS)})")
_ABSTAINING_WHOLE = re.compile(rf"(?:{_OPENING}{_JOINED}){{0,3}}{_WHOLE}")
_NOTHING = re.compile(rf"{_BUT}(?:{_OPENING}{_JOINED}){{0,3}}(?:{'|'.join(_EMPTY)})?[ .!?,]*")
_CLAUSES = re.compile(
    r"(?<=[.!?;:])\s+|\n+|,? (?=(?:but|however|though|although|yet)\b)|"
    r"(?<=[^,]), (?=(?:so|maybe|perhaps|probably|possibly|my|it|he|she|i|sorry)\b)|"
    r"(?:(?<=sure)|(?<=certain)|(?<=know)|(?<=idea)|(?<=positive)), |\.\.\.\s*|…\s*|\s[-–—]+\s",
    re.IGNORECASE,
)
_TITLE = re.compile(r"[\"“][^\"“”]* (?!I\b)[A-Z][^\"“”]*[\"”][.!?]?")
"""A quotation with a capital letter inside: a name, whatever it says."""
_CONTRACTIONS = (
    (re.compile(r"\bcan(?:not|'t)\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\b(i)'m\b"), r"\1 am"),
    (re.compile(r"\b(it|that|there|this|he|she|what|who)'s\b"), r"\1 is"),
    (re.compile(r"\b(we|you|they)'re\b"), r"\1 are"),
    (re.compile(r"\b(i|we|you|they)'ve\b"), r"\1 have"),
    (re.compile(r"\b(i|we|you|it|he|she|they)'d\b"), r"\1 would"),
    (re.compile(r"\b(i|we|you|it|he|she|they)'ll\b"), r"\1 will"),
)


def abstains(answer: str) -> bool:
    """Whether an answer declines to answer and names nothing all the same; an empty one does not."""
    return without_abstentions(answer) == ""


def without_abstentions(answer: str) -> str | None:
    """What an answer says besides declining: "" where that is nothing, None where it does not decline at all.

    A clause counts where an abstaining phrase begins it, after words such as "Sorry,": a quoted title does not, nor
    what comes after something was said: "Paris. I'm not sure about the year."
    """
    if _ABSTAINING_WHOLE.fullmatch(plain(answer).rstrip(".! ")):
        return ""
    clauses = clauses_of(answer)
    is_abstaining = [_ABSTAINING.match(plain(clause)) is not None for clause in clauses]
    if not any(is_abstaining):
        return None
    first = is_abstaining.index(True)
    if not all(_NOTHING.fullmatch(plain(clause)) for clause in clauses[:first]):
        return None
    rest = [clause for clause, abstaining in zip(clauses, is_abstaining, strict=True) if not abstaining]
    return " ".join(clause for clause in rest if not _NOTHING.fullmatch(plain(clause)))


def clauses_of(text: str) -> list[str]:
    """The clauses of a text without the marks and quotes of formatting around them."""
    unmarked = re.sub(r"[*_`#]+", "", text.replace("’", "'").replace("‘", "'"))
    bare = unmarked if _TITLE.fullmatch(unmarked.strip()) else unmarked.strip(' "“”')
    unquoted = re.sub(r"^\s*(?:final )?answer\s*:\s*", "", bare, flags=re.IGNORECASE)
    return [clause.strip(" ,") for clause in _CLAUSES.split(unquoted) if clause.strip(' ,.!?"“”')]


def plain(text: str) -> str:
    """Lower case, straight apostrophes, contractions written out, single spaces between words."""
    lowered = " ".join(text.lower().replace("’", "'").replace("‘", "'").split())
    for pattern, written_out in _CONTRACTIONS:
        lowered = pattern.sub(written_out, lowered)
    return lowered
