"""Abstention by phrases: does a text decline to answer, or deny that a thing is real? No model; English alone.

The phrases were written for this project. A text is taken apart into clauses. It abstains where its first clause does
and no other clause answers after all: "I don't know." does, "I don't know who else, but it was Paris" does not. Rules
like these miss what is said in other words: they are for use without a model, and every label they make names them.
"""

import hashlib
import json
import re

__all__ = ["RULES_SHA256", "abstains", "denies"]

_OPENING = (
    r"(?:(?:i'?m|i am|we are|we're) (?:so |very |really )?(?:sorry|afraid)(?: that)?|sorry|apologies|my apologies|"
    r"unfortunately|honestly|frankly|well|hmm+|actually|no|as (?:an|a) [\w -]{2,40}|at (?:the|this) moment|currently)"
)
_I = r"(?:i|we)"
_NOT = r"(?:do not|don'?t|did not|didn'?t|cannot|can not|can'?t|could not|couldn'?t)"
_HEDGE = r"(?:really |actually |currently |honestly |simply |just |quite |exactly |even )*"
_UNABLE = r"(?:unable|not able)"

_ABSTENTIONS = (
    rf"{_I} {_HEDGE}{_NOT} {_HEDGE}(?:know|recall|remember|say|tell|answer|identify|determine|confirm|verify|find)\b",
    rf"{_I} {_HEDGE}{_NOT} {_HEDGE}(?:provide|give|offer|share) (?:you |any |an |a |the |that |this |more )*"
    r"(?:answer|information|info|details?|response|name|date|fact)",
    rf"{_I} {_HEDGE}(?:do not|don'?t|didn'?t) {_HEDGE}have {_HEDGE}(?:(?:any|enough|sufficient|specific|reliable|the|"
    r"that|an|a|access to) )*(?:information|info|knowledge|data|details?|answer|idea|clue|context|access|memory|"
    r"recollection)",
    rf"{_I} have no (?:\w+ )?(?:idea|information|knowledge|clue|data|record|recollection|memory)",
    rf"(?:i am|i'?m|we are|we're) {_HEDGE}(?:not (?:entirely |completely |quite |too |so |at all )?(?:sure|certain|"
    rf"aware|familiar)|unsure|uncertain|unaware|unfamiliar|{_UNABLE} to|not in a position to)",
    rf"{_I} (?:would|will|must|have to|'d|'ll) (?:rather |prefer )?(?:not|decline|refuse|pass|abstain)",
    rf"{_I} (?:won'?t|decline|refuse|abstain)\b",
    r"(?:there is|there'?s|there are) (?:no|not enough|insufficient|too little) (?:\w+ ){0,2}(?:information|data|"
    r"details|context|evidence|record|records|way to (?:know|tell|say))",
    r"(?:not enough|insufficient|no) (?:information|data|context|details)\b",
    r"(?:it is|it'?s|that is|that'?s|this is) (?:not known|unknown|unclear|impossible to|not possible to|beyond my|"
    r"outside (?:of )?my|not something (?:that )?i)",
    r"(?:the|my) (?:answer|training data|knowledge) (?:is (?:unknown|not known)|does not|doesn'?t)",
    r"(?:could|can|would) you (?:please )?(?:clarify|specify|provide|give|tell|rephrase|explain)",
    r"please (?:clarify|specify|provide|give|tell|rephrase|supply)",
    r"(?:no idea|no clue|not sure|dunno|beats me|who knows|cannot say|can'?t say|hard to say|don'?t know|"
    r"do not know)\b",
)
_WHOLE = r"(?:unknown|n/?a|not (?:known|available|applicable|certain)|no (?:answer|comment|information)|unsure|\?+|-+)"
_ABSTAINING = re.compile(rf"(?:{_OPENING}[,:]? )*(?:{'|'.join(_ABSTENTIONS)})")
_ABSTAINING_WHOLE = re.compile(rf"(?:{_OPENING}[,:]? )*{_WHOLE}")

_ANSWERING = re.compile(
    r"(?:(?:but|however|though|although|still|yet|so|that said|if i had to guess|my (?:best )?guess (?:is|would be)|"
    r"perhaps|maybe|probably|possibly)[,:]? )*(?:(?:i|we) (?:do |would |'d |can )?(?:think|believe|guess|suspect|"
    r"assume|suppose|(?:know|say|recall) (?:that|it|the))\b|"
    r"(?:it|he|she|they|that|this|the (?:\w+ ){0,2}\w+)(?:'s| (?:is|was|were|are|might|"
    r"may|could|must|would|should|has|had|seems|appears))\b|"
    r"(?:perhaps|maybe|probably|possibly) \w|my (?:best )?guess|if i had to guess)"
)
_STILL_NOTHING = re.compile(
    r"(?:it|that|this|they)(?:'s| is| was| are| were| may be| might be| could be| would be| seems| appears)? (?:not |"
    r"be )?(?:known|unknown|unclear|impossible|hard|difficult|beyond|outside|possible|best|important|a (?:good|"
    r"difficult|tricky|great|hard)|something (?:that )?i|depend)"
)
_CLAUSES = re.compile(r"(?<=[.!?;:])\s+|\n+|,? (?=(?:but|however|though|although|yet)\b)|(?<=[^,]), (?=(?:so|maybe|"
                      r"perhaps|probably|possibly|my|it|he|she)\b)")  # fmt: skip

_DENIALS = (
    r"\b(?:does|do|did)(?: not|n'?t) (?:actually |really |seem to |appear to )*exist\b",
    r"\bno such (?:thing|species|animal|plant|medicine|medication|drug|organism|product|name|creature|bird|"
    r"fish|tree)\b",
    r"\b(?:is|are|was) (?:not|n'?t) (?:actually |really )*(?:a |an |any )?(?:real|recogni[sz]ed|known|valid|actual|"
    r"existing|genuine|established|approved|listed|documented|described|registered)\b",
    r"\b(?:isn'?t|aren'?t) (?:actually |really )*(?:a |an |any )?(?:real|recogni[sz]ed|known|valid|actual|genuine)\b",
    r"\b(?:fictional|fictitious|made[- ]up|invented|imaginary|nonexistent|non-existent|hypothetical)\b",
    r"\b(?:not|never) (?:heard of|come across|encountered)\b",
    r"\b(?:not|n'?t) (?:aware|familiar|sure|certain)\b",
    r"\b(?:unaware of|unfamiliar with|unsure)\b",
    r"\b(?:not|n'?t|unable to|cannot) (?:recogni[sz]e|find|identify|locate|verify|confirm|know)\b",
    r"\b(?:not|n'?t) have (?:any |specific |reliable |enough )*(?:information|knowledge|data|record)\b",
    r"\bno (?:\w+ )?(?:information|record|records|evidence|mention|data|reference)\b",
    r"\b(?:misspell\w*|misspelt|typo|mistyped|spelling mistake|spelled incorrectly)\b",
    r"\b(?:did|do) you mean\b|\b(?:may|might|could) (?:be|have been) (?:a )?(?:mistake|confus\w+|mix\w* up|error)\b",
    r"\b(?:may|might|could|must) be (?:confusing|confused|thinking of|referring to|mistaken)\b|\bperhaps you mean\w*\b",
)
_DENYING = re.compile("|".join(_DENIALS))

RULES_SHA256 = hashlib.sha256(
    json.dumps(
        [one.pattern for one in (_ABSTAINING, _ABSTAINING_WHOLE, _ANSWERING, _STILL_NOTHING, _CLAUSES, _DENYING)]
    ).encode()
).hexdigest()
"""SHA-256 of all phrases."""


def abstains(answer: str) -> bool:
    """Whether an answer declines to answer; an empty one does not.

    A clause counts where an abstaining phrase begins it, after words such as "Sorry,": a quoted title does not. After
    an abstention a clause that names something ("it was ...", "my guess is ...") makes the whole an answer.
    """
    text = _plain(answer)
    if _ABSTAINING_WHOLE.fullmatch(text.rstrip(".! ")):
        return True
    clauses = [clause.strip(" ,") for clause in _CLAUSES.split(text) if clause.strip(" ,")]
    is_abstaining = [_ABSTAINING.match(_without_but(clause)) is not None for clause in clauses]
    if not any(is_abstaining):
        return False
    first = is_abstaining.index(True)
    if any(_OPENING_ONLY.fullmatch(clause) is None for clause in clauses[:first]):
        return False  # something was said before: "Paris. I'm not sure about the year."
    return not any(_answers(clause) for clause in clauses[first + 1 :] if not _ABSTAINING.match(_without_but(clause)))


def denies(answer: str) -> bool:
    """Whether an answer about a thing doubts that it is real, denies it, or declines to tell about it."""
    return abstains(answer) or _DENYING.search(_plain(answer)) is not None


_OPENING_ONLY = re.compile(rf"{_OPENING}[.!,]?")
_BUT = re.compile(r"(?:but|however|though|although|yet)[,]? ")


def _plain(text: str) -> str:
    """Lower case, straight apostrophes, single spaces between words, lines kept."""
    lowered = text.lower().replace("’", "'").replace("‘", "'").strip()
    return "\n".join(" ".join(line.split()) for line in lowered.splitlines() if line.strip())


def _without_but(clause: str) -> str:
    return _BUT.sub("", clause, count=1)


def _answers(clause: str) -> bool:
    """Whether a clause after an abstention names something all the same."""
    rest = _without_but(clause)
    return _ANSWERING.match(rest) is not None and _STILL_NOTHING.match(rest) is None
