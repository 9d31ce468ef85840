"""Does an answer take a thing for real? By phrases, without a model; English alone.

    rejected       says that there is no such thing: "There is no medicine called Zynotril." Declines, or knows nothing
                   of it, and tells nothing about it all the same: "I am not familiar with Zynotril."
    accepted       tells something about it: "It treats gout.", "I'm not sure about the dose, but it is a painkiller."
    unverifiable   does not speak of it: neither its name nor a word for it stands there

The phrases were written for this project, and are blind to whatever is said in other words. An answer of a few words
that leaves the thing out ("Insects and seeds.") counts as not speaking of it.
"""

import re
from typing import Literal

from builders.judging.abstention import abstains, clauses_of, plain

__all__ = ["treats_as_real"]

_THING = (
    r"(?:thing|species|animal|plant|medicine|medication|drug|organism|product|name|creature|bird|mammal|reptile|fish|"
    r"tree|herb|flower|genus|substance|compound|brand|pill|treatment|entity|term|word|taxon)s?"
)
_REAL = r"(?:real|recogni[sz]ed|known|valid|actual|existing|genuine|established|legitimate|standard|commonly)"
_ADVERB = r"(?:(?:actually|really|currently|yet|widely|well|commonly|officially|generally|to my knowledge,?) )*"
_ANYTHING = r"(?:it|this|that|they|them|any|such|(?:the|this|that|a|an|any) (?:\w+ ){0,2}" + _THING + ")"

_DENIALS = (
    rf"\b(?:do|does|did) not {_ADVERB}(?:seem to |appear to )?exist\b(?! (?:in (?:the wild|captivity|europe|nature)|"
    r"outside|any ?more|naturally|at high))",
    rf"\bno such (?:\w+ )?{_THING}\b|\bno such\b[.!]",
    rf"\b(?:is|are|was) {_ADVERB}(?:no|not (?:a|an|any)?) ?(?:[\w-]+ )?{_THING} (?:that is )?(?:called|named|known as"
    rf"|known"
    r" to science|by (?:that|this|the) name|with (?:that|this|the) name|like that|i (?:know|recogni[sz]e|am|have))",
    rf"\bno (?:[\w-]+ ){{0,2}}{_THING} (?:called|named|known as|known to science|by (?:that|this) name|with (?:that"
    rf"|this) name)\b",
    rf"\bnot {_ADVERB}(?:a|an|any|the name of a|one of the) (?:\w+ )?{_REAL} (?:[\w-]+ ){{0,2}}{_THING}\b",
    rf"\bnot {_ADVERB}(?:real|recogni[sz]ed|genuine)\b(?! (?:for|by (?:children|its)|until))",
    r"\bnot (?:\w+ )?(?:known|documented|described|listed|recorded|found) (?:to (?:science|exist|me)\b|as an? (?:\w+ )?"
    rf"{_THING}|in any|anywhere)",
    rf"\bnot (?:appear|seem) to (?:be|correspond|match|refer)(?: to)? (?:a |an |any |the name of )?(?:[\w-]+ )?"
    rf"(?:{_REAL}|{_THING})\b",
    rf"\bnot (?:correspond|refer|match|belong)(?: to)? (?:a |an |any )(?:\w+ )?(?:{_REAL}|{_THING})\b",
    rf"\b(?:fictional|fictitious|imaginary|mythical|made[- ]up|invented|hypothetical"
    rf"|nonsense)(?! of\b) (?:\w+ )?(?:{_THING}"
    r"|being|character)\b(?! (?:first|that was|to treat|made|discovered|developed|used))|\b(?:fictional|fictitious"
    r"|made[- ]up|"
    r"imaginary|nonexistent|non-existent)(?= *(?:$|[.,;!?]| or\b| and\b))",
)
_DOUBTS = (
    r"^(?:but |however,? |sorry,? |and |so )*(?:i|we) (?:am |have |do |can |could |was )?(?:\w+ )?(?:not|never"
    r"|unable to|"
    r"unaware|unfamiliar|unsure|no) (?:been able to |able to |\w+ly )?(?:aware|familiar|sure|certain|recogni[sz]e|find|"
    r"identify|locate|verify|confirm|know|heard?|come across|encountered|see|have|of|with|information|record|data|"
    r"knowledge)\b",
    r"^(?:i|we) (?:am|are) (?:unaware|unfamiliar|unsure)\b",
    rf"\bno (?:\w+ )?(?:information|records?|mention|data|references?|evidence) (?:is |are )?(?:available )?(?:on"
    rf"|about|"
    rf"regarding|of|for|to|that) {_ANYTHING}(?! (?:affects|helps|causes|is|in|treats|works)\b)|\bno (?:\w+ )?"
    r"(?:information|records?|mention|data)(?: available)?(?=$|[.!?])",
    r"\b(?:misspell\w*|misspelt|typo|mistyped|spelling mistake|spelling error|spelled incorrectly)\b",
    r"\b(?:did|do) you (?:perhaps )?mean\b|\bwhat you mean\b|\byou (?:may|might|could|must|probably|perhaps) (?:have "
    r"|be )?"
    r"(?:mean\w*|confus\w+|think\w*|referr\w+|mistaken|mix\w+)\b|\b(?:perhaps|maybe) you mean\w*\b",
    r"\bthere (?:is|are|was|may be|might be|seems to be|appears to be|could be|must be|has been"
    r"|may have been) (?:\w+ )?"
    r"(?:confusion|mistake|mix-?up|mix up|error|misunderstanding|typo)",
    r"\b(?:it|this|that) (?:is|may be|might be|could be|seems to be|appears to be) (?:likely |probably "
    r"|perhaps )?(?:a |an )"
    r"(?:mistake|confusion|mix-?up|error|misunderstanding)\b",
)
_TELLING_OF_DETAILS = re.compile(
    r"(?:it|this|that) (?:is|was|remains) (?:\w+ )?(?:not (?:\w+ )?known|unknown|unclear"
    r"|uncertain) (?:exactly )?(?:how|when|"
    r"where|whether|why|which|if|who|what) (?!you\b).*"
)
_DENIED, _DOUBTED = re.compile("|".join(_DENIALS)), re.compile("|".join(_DOUBTS))
_BUT = r"(?:(?:but|however|though|although|yet|and|so|that said)[,:]? )*"
_NOT_TELLING = (
    r"(?!(?:\w+ )?(?:not |likely |probably |possibly |also )*(?:possible|impossible|best|important|better|known"
    r"|unknown|unclear|hard|"
    r"difficult|likely|something|may|might|could|would|a (?:good|great|difficult|mistake)|not\b))"
)
_PRONOUN = re.compile(r"(?:^|[.;:,!?] |\b(?:and|but|that|because|when|while|as|if|where) )(?:it|they|this|these) \w+")
_DOMAIN_NOUN = re.compile(rf"\b(?:the|this|these|its|their) (?:\w+ )?{_THING}\b")


def treats_as_real(answer: str, subject: str | None = None) -> Literal["accepted", "rejected", "unverifiable"]:
    """Whether an answer takes the thing that was asked about for real.

    Args:
        answer: What was answered; not empty.
        subject: Name of the thing; without one every answer is taken to speak of it.
    """
    clauses = [plain(clause) for clause in clauses_of(answer)]
    whole = plain(answer)
    if any(_DENIED.search(clause) for clause in clauses) or _DENIED.search(whole):
        return "rejected"
    is_detail = any(_TELLING_OF_DETAILS.match(clause) for clause in clauses)
    is_doubted = [_DOUBTED.search(clause) is not None for clause in clauses]
    if abstains(answer) and not is_detail:
        return "rejected"
    told = [clause for clause, doubted in zip(clauses, is_doubted, strict=True) if not doubted]
    if any(is_doubted) and not any(_tells(clause, subject) for clause in told):
        return "rejected"
    return "accepted" if is_detail or subject is None or _speaks_of(whole, subject) else "unverifiable"


def _tells(clause: str, subject: str | None) -> bool:
    """Whether a clause says something of the thing as a fact."""
    names = (
        rf"(?:the |a |an )?{re.escape(plain(subject))}"
        if subject
        else r"(?:the |a |an )?(?!(?:it|they|this|these)\b)[\w-]+"
    )
    told = rf"{_BUT}(?:it|they|this|these|the (?:\w+ ){{0,2}}{_THING}|{names}) {_NOT_TELLING}\w+"
    return re.match(told, clause) is not None


def _speaks_of(whole: str, subject: str) -> bool:
    """Whether the name of the thing, a main word of it, or a word for it stands in an answer."""
    words = [word for word in plain(subject).split() if len(word) > len("the")] or [plain(subject)]
    is_named = any(re.search(rf"(?<!\w){re.escape(word)}", whole) for word in words)
    return is_named or _PRONOUN.search(whole) is not None or _DOMAIN_NOUN.search(whole) is not None
