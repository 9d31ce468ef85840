"""What a model is asked that writes questions about a section of an article, and how its replies are read.

Two passes: one writes a question, another, which does not know what the first had in mind, answers it from the section
or says that it cannot. Written for this project.
"""

import re

from tracekit.clients.client import Message, Request
from tracekit.model.prompts import sha256_text

__all__ = ["MAX_ANSWER_WORDS", "PROMPTS_SHA256", "answer_request", "question_request", "read_answer", "read_question"]

MAX_ANSWER_WORDS = 10
_MAX_QUESTION_WORDS = 40
_MAX_QUESTION_TOKENS = 96
_MAX_ANSWER_TOKENS = 64

_ASK = """\
Below is a section of an encyclopedia article with the title "{title}".

{section}

Write one question about a fact that this section states.
- Somebody who has never seen the section has to understand the question: name the person, place, work or event that it
  is about. Do not write "the section", "the text", "the article", "here", or "he", "she", "it" without saying who.
- The answer is a name, a number, a date or a few words, stands in the section, and is the only right one.
- One sentence that ends with a question mark. Write the question and nothing else."""

_ANSWER = """\
Below is a section of an encyclopedia article with the title "{title}".

{section}

Question: {question}

Answer the question from the section alone, in at most ten words, without a full sentence. If the section does not say,
or if the question has several right answers, write UNANSWERABLE. Write the answer and nothing else."""

_CANNOT = "UNANSWERABLE"
PROMPTS_SHA256 = sha256_text("\n".join((_ASK, _ANSWER)))
"""Which prompts a question was made with."""

_POINTS_AT_TEXT = re.compile(
    r"\b(?:(?:this|the|that|above|given|provided|following)\s+(?:section|passage|text|article|paragraph|excerpt)"
    r"|according to (?:it|this|the (?:section|passage|text|article))|mentioned (?:above|here))\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^\W*(?:question|q|answer|a)\s*\d*\s*[:.)]\s*", re.IGNORECASE)


def question_request(title: str, section: str, *, seed: int) -> Request:
    """Ask for a question about a section."""
    return _request(_ASK.format(title=title, section=section), _MAX_QUESTION_TOKENS, seed)


def answer_request(title: str, section: str, question: str, *, seed: int) -> Request:
    """Ask for its answer from the section."""
    return _request(_ANSWER.format(title=title, section=section, question=question), _MAX_ANSWER_TOKENS, seed)


def read_question(reply: str) -> tuple[str, str]:
    """The question in a reply, or empty; and why there is none, or empty."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    asked = [_LABEL.sub("", line).strip("\"'*“” ") for line in lines]
    question = next((line for line in asked if line.endswith("?")), "")
    if not question:
        return "", "no question"
    if len(question.split()) > _MAX_QUESTION_WORDS:
        return "", "question too long"
    if len(question.split()) < 3:
        return "", "no question"
    if _POINTS_AT_TEXT.search(question):
        return "", "question points at the section"
    return question, ""


def read_answer(reply: str) -> tuple[str, str]:
    """The answer in a reply, or empty; and why there is none, or empty."""
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    answer = _LABEL.sub("", lines[0]).strip("\"'*“” ") if lines else ""
    if not re.search(r"\w", answer):
        return "", "no answer"
    if _CANNOT.lower() in reply.lower():
        return "", "unanswerable"
    if len(answer.split()) > MAX_ANSWER_WORDS:
        return "", "answer too long"
    return answer.rstrip("."), ""


def _request(text: str, max_new_tokens: int, seed: int) -> Request:
    return Request(messages=[Message(role="user", content=text)], max_new_tokens=max_new_tokens, seed=seed)
