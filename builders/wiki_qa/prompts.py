"""What a model is asked that writes questions about a section of an article, and how its replies are read.

Two passes: one writes a question, another, which does not know what the first had in mind, answers it from the section
or says that it cannot. Solved examples stand before both. Written for this project; place and persons are invented.
"""

import re
import unicodedata
from collections.abc import Sequence

from builders.kit.pronouns import dangling_pronoun
from tracekit.clients.client import ChatMessage, Request
from tracekit.model.prompts import sha256_text

__all__ = ["MAX_ANSWER_WORDS", "PROMPTS_SHA256", "answer_request", "question_request", "read_answer", "read_question"]

MAX_ANSWER_WORDS = 10
_MAX_QUESTION_WORDS = 40

_ASK_SYSTEM = """\
You write quiz questions. You are given a section of an encyclopedia article and write one question about a fact that it
states. Somebody who has never seen the section has to understand the question, so name the person, place, work or event
that it is about; do not write "the section" or "the text", and no "he", "she" or "it" without saying who. The answer is
a name, a number, a date or a few words, stands in the section, and is the only right one. Write the question alone: one
sentence that ends with a question mark."""

_ANSWER_SYSTEM = """\
You answer questions from a section of an encyclopedia article and from nothing else, in at most ten words, without a
full sentence. If the section does not say, or if several answers are right, you write UNANSWERABLE. You write the
answer alone."""

_SECTION = "Article: {title}\n\n{section}"
_ASK = _SECTION + "\n\nWrite one question about a fact in this section."
_ANSWER = _SECTION + "\n\nQuestion: {question}"

_FIRST = (
    "Fort Alder",
    "Fort Alder stands on a hill above the river Lenne. It was built between 1741 and 1748 by the engineer Anton Rehm, "
    "who gave it five bastions and a double ditch. In 1809 it withstood a siege of eleven weeks. The garrison left in "
    "1873, and since 1921 the fort has housed a school of forestry.",
)
_SECOND = (
    "Ines Calvero",
    "Calvero moved to Lisbon in 1932 and joined the workshop of the glass painter Duarte Neves. Her first window of "
    "her own, The Four Winds, was made for the harbour office of Setubal and shows ships of 48 colours of glass.",
)
_ASKED = "How long was the siege that Fort Alder withstood in 1809?"
_ASKED_TOO = "For which building did Ines Calvero make the window The Four Winds?"
_NOT_SAID = "In which year was Ines Calvero born?"

_CANNOT = "UNANSWERABLE"
_ASK_EXAMPLES = ((_FIRST, _ASKED), (_SECOND, _ASKED_TOO))
_ANSWER_EXAMPLES = (
    (_FIRST, _ASKED, "eleven weeks"),
    (_SECOND, _NOT_SAID, _CANNOT),
    (_SECOND, _ASKED_TOO, "the harbour office of Setubal"),
)
PROMPTS_SHA256 = sha256_text(repr((_ASK_SYSTEM, _ANSWER_SYSTEM, _ASK, _ANSWER, _ASK_EXAMPLES, _ANSWER_EXAMPLES)))
"""Which prompts a question was made with."""

_POINTS_AT_TEXT = re.compile(
    r"\b(?:(?:this|the|that|above|given|provided|following)\s+(?:section|passage|text|article|paragraph|excerpt)"
    r"|according to (?:it|this|the (?:section|passage|text|article))|mentioned (?:above|here))\b",
    re.IGNORECASE,
)
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_SMALL_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "was", "with")
)
_QUESTION_LABEL = re.compile(r"^\W*(?:(?:question|q)\s*\d*\s*[:.)]|\d+\s*[.)])\s*", re.IGNORECASE)
_ANSWER_LABEL = re.compile(r"^\W*(?:answer|a)\s*:\s*", re.IGNORECASE)  # no full stop: "A. Rehm" is a name


def question_request(title: str, section: str, *, seed: int, max_new_tokens: int) -> Request:
    """Ask for a question about a section."""
    solved = [(_ASK.format(title=one, section=text), asked) for (one, text), asked in _ASK_EXAMPLES]
    return _request(_ASK_SYSTEM, solved, _ASK.format(title=title, section=section), max_new_tokens, seed)


def answer_request(title: str, section: str, question: str, *, seed: int, max_new_tokens: int) -> Request:
    """Ask for its answer from the section."""
    solved = [
        (_ANSWER.format(title=one, section=text, question=asked), answer)
        for (one, text), asked, answer in _ANSWER_EXAMPLES
    ]
    text = _ANSWER.format(title=title, section=section, question=question)
    return _request(_ANSWER_SYSTEM, solved, text, max_new_tokens, seed)


def read_question(reply: str) -> tuple[str, str]:
    """The question in a reply, or empty; and why there is none, or empty."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    asked = [_QUESTION_LABEL.sub("", line).strip("\"'*“” ") for line in lines]
    question = next((line for line in asked if line.endswith("?")), "")
    if not question:
        return "", "no question"
    if len(question.split()) > _MAX_QUESTION_WORDS:
        return "", "question too long"
    if len(question.split()) < 3:
        return "", "no question"
    if _POINTS_AT_TEXT.search(question):
        return "", "question points at the section"
    if dangling_pronoun(question) is not None:
        return "", "dangling pronoun"
    return question, ""


def read_answer(reply: str, question: str, section: str) -> tuple[str, str]:
    """The answer to a question in a reply, or empty; and why there is none, or empty.

    It must stand in the section as it is, but for case and signs.
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    answer = _ANSWER_LABEL.sub("", lines[0]).strip("\"'*“” ").rstrip(".") if lines else ""
    words = [word for word in _words(answer) if word not in _SMALL_WORDS]
    if not words:
        return "", "no answer"
    if _CANNOT.lower() in reply.lower():
        return "", "unanswerable"
    if len(answer.split()) > MAX_ANSWER_WORDS:
        return "", "answer too long"
    if set(words) <= set(_words(question)):
        return "", "answer stands in the question"
    if not _stands_in(answer, section):
        return "", "answer is not in the section"
    return answer, ""


def _stands_in(answer: str, section: str) -> bool:
    """Whether an answer's words stand in a section, one after the other; of a script without spaces its characters."""
    wanted, words = (_words(unicodedata.normalize("NFKC", text)) for text in (answer, section))
    if _NO_SPACES.search(answer):
        return "".join(wanted) in "".join(words)
    return f" {' '.join(wanted)} " in f" {' '.join(words)} "


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _request(system: str, solved: Sequence[tuple[str, str]], text: str, max_new_tokens: int, seed: int) -> Request:
    messages = [ChatMessage(role="system", content=" ".join(system.split()))]
    for asked, answer in solved:
        messages += [ChatMessage(role="user", content=asked), ChatMessage(role="assistant", content=answer)]
    return Request(
        messages=[*messages, ChatMessage(role="user", content=text)], max_new_tokens=max_new_tokens, seed=seed
    )
