"""Pronouns of an English question that stand for something the question does not name.

    Where was he born?                              dangling: "he"
    When Marie Curie left Warsaw, where did she go?  "she" is Marie Curie
    Which city lost its walls in 1809?               "its" is the city
    What did Napoleon do with it?                    dangling: a subject is never the object of its own verb
    What grows there?                                dangling: "there"

Without a parser this is a rule of thumb, and a strict one: a question that it cannot clear counts as dangling.
"""

import re

__all__ = ["dangling_pronoun"]

_PERSONS = frozenset(("he", "she", "him", "her", "his", "hers"))
_OTHERS = frozenset(("it", "its", "they", "them", "their", "theirs"))
_NEVER_CLEAR = frozenset(("this", "these", "those", "we", "us", "our", "ours"))
_AUXILIARIES = frozenset(
    (
        *("did", "does", "do", "was", "were", "is", "are", "has", "have", "had", "will", "would", "can", "could"),
        "should",
    )
)
_DETERMINERS = frozenset(("a", "an", "the", "which", "what", "each", "every", "any"))
_PLACES_AND_TIMES = frozenset(("in", "at", "to", "from", "near", "during", "on", "into", "through", "since", "until"))
_BEFORE_ASKED = _PLACES_AND_TIMES | {"for", "of", "with", "by", "about", "under", "after", "before"}
_POSSESSIVES = frozenset(("its", "their", "theirs", "his", "her", "hers"))
_CONJUNCTIONS = frozenset(("after", "before", "when", "because", "while", "as", "if", "until", "since", "although"))
_OBJECTS = frozenset(("it", "him", "them"))
_CLAUSE_OPENERS = _CONJUNCTIONS | {"and", "or", "but", "that", "which", "who", "whom", "where", "how", "why", "what"}
_MEASURES = frozenset(
    (
        *("year", "month", "day", "date", "decade", "century", "time", "age", "number", "name", "title"),
        "percentage",
        "kind",
    )
)
_PERSON_NOUN = re.compile(
    r"\w+(?:er|or|ist|ian|man|woman|eer|ess|ant)|king|queen|prince|poet|pope|saint|bishop|general|captain|wife|husband"
    r"|son|girl|boy|architect|monk|president|scientist|pilot|duke|knight|nun|child"
)
_QUOTED = re.compile(r"[\"“«](?:[^\"”»]*)[\"”»]|(?<!\w)['‘][^'’]+['’](?!\w)")
_PLEONASTIC = re.compile(
    r"\bit (?=take[ns]?\b.*\bto\b"
    r"|(?:possible|necessary|customary|common|legal|forbidden|believed|thought|said|known) (?:to|that)\b)"
)
_TOKEN = re.compile(r"\w+(?:['’]\w+)?|[,;:]")


def dangling_pronoun(question: str) -> str | None:
    """The first pronoun of a question that nothing before it explains; None where there is none."""
    text = _PLEONASTIC.sub("", _QUOTED.sub(" Quoted ", question))
    tokens = _TOKEN.findall(text)
    for place, token in enumerate(tokens):
        word = token if place else token.lower()  # a capital inside a question is part of a name
        if word in _NEVER_CLEAR or (word in _PERSONS | _OTHERS and not _is_named(tokens, place)):
            return word
        if _points_back(tokens, place, word):
            return word
    return None


def _points_back(tokens: list[str], place: int, word: str) -> bool:
    """Whether a word that is no pronoun of a person or thing points at a text before the question."""
    before, after = tokens[place - 1].lower() if place else "", tokens[place + 1 :]
    is_last = not after
    if word == "that":  # "after that"; not "the ship that sank"
        return is_last or before in _BEFORE_ASKED
    if word == "there":  # "what grows there"; not "how many are there"
        return is_last and before not in _AUXILIARIES
    name, _, owned = word.replace("’", "'").partition("'")
    if before != "the" or name not in ("latter", "former"):  # not "the former king"
        return False
    return name == "latter" or bool(owned) or is_last or after[0] in _AUXILIARIES


def _is_named(tokens: list[str], place: int) -> bool:
    """Whether something before a pronoun can be what it stands for."""
    before, pronoun = tokens[:place], tokens[place].lower()
    if before and before[-1].lower() in _AUXILIARIES:  # the subject: what is asked for cannot be meant
        before = before[: max((i for i, mark in enumerate(before) if mark in ",;:"), default=0)]
    elif pronoun in _OBJECTS and before and not _opens_clause(before[-1]):  # nothing of its own clause can be meant
        before = before[: max((i for i, word in enumerate(before) if i and _opens_clause(word)), default=0)]
    return any(_is_name(before, i, pronoun) or _is_phrase(before, i, pronoun) for i in range(len(before)))


def _opens_clause(word: str) -> bool:
    return word in ",;:" or word.lower() in _CLAUSE_OPENERS


def _is_name(tokens: list[str], place: int, pronoun: str) -> bool:
    """Whether a name stands here; of a place or time it is no person's."""
    if not tokens[place][0].isupper() or (pronoun in _PERSONS and _after_place(tokens, place)):
        return False
    is_first_of_two = len(tokens) > 1 and tokens[1][0].isupper() and tokens[0].lower() not in _BEFORE_ASKED
    return place > 0 or is_first_of_two


def _is_phrase(tokens: list[str], place: int, pronoun: str) -> bool:
    """Whether a noun phrase begins here that a pronoun may stand for: `which city`, `the settlers`."""
    determiner, rest = tokens[place].lower(), tokens[place + 1 :]
    if determiner not in _DETERMINERS or not rest or rest[0].lower() in _MEASURES | _AUXILIARIES | {"of"}:
        return False
    if determiner in ("which", "what"):
        if place and tokens[place - 1].lower() in _BEFORE_ASKED:
            return False
        if pronoun not in _POSSESSIVES and tokens[-1].lower() not in _CONJUNCTIONS:  # "which river flows through it"
            return False
    is_owned = len(rest) == 2 and rest[1] == "of"  # "the bridge of his"
    has_person = any(_PERSON_NOUN.fullmatch(token.lower()) for token in rest[:2])
    return not is_owned and (has_person or pronoun not in _PERSONS)


def _after_place(tokens: list[str], place: int) -> bool:
    """Whether a name belongs to a phrase of place or time: `in New York`."""
    while place and tokens[place][0].isupper():
        place -= 1
    return tokens[place].lower() in _PLACES_AND_TIMES
