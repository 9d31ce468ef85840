"""The questions stage of wiki_qa: sections of articles in, questions with answers out, written by a model.

    questions/<config>.jsonl    {"id", "question", "answer", "title", "article_row", "section_title", "section", ...}
    questions/<config>.json     how they were made, how many were kept, why the others were not; written last

Sections are taken in an order that the seed decides, turn by turn from every bin of difficulty, until every bin has its
share. Replies are cached, so that a run that was stopped asks nothing twice; both files are written at the end.
"""

import random
import re
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from builders.wiki_qa.articles import Section
from builders.wiki_qa.config import MAX_NEW_TOKENS
from builders.wiki_qa.prompts import answer_request, question_request, read_answer, read_question
from tracekit.clients.client import Client
from tracekit.errors import UNREADABLE, DatasetError, SourceError
from tracekit.format.layout import Layout, read_whole, write_atomic
from tracekit.format.manifest import SourceInfo

__all__ = [
    "MAX_NEW_TOKENS",
    "QuestionSet",
    "Rejection",
    "WikiQuestion",
    "Written",
    "read_questions",
    "write_questions",
    "written",
]

_MAX_ROUND = 512
"""Sections asked about at once: what is kept decides what is asked next."""


class WikiQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """A question about a section, with the answer that the section gives."""

    id: str
    """Row of the article and number of the section drawn from it."""
    question: str
    """The question."""
    answer: str
    """Its answer, from the section."""
    title: str
    """Title of the article."""
    article_row: int
    """Its row in the source."""
    section_title: str
    """Heading of the section; empty above the first one."""
    section: str
    """The section."""
    section_num_tokens: int
    """Its length."""
    difficulty: str | None
    """The source's bin of difficulty of the article; null where it has none."""


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """Why sections came to nothing."""

    reason: str
    """Why."""
    count: int
    """How many of them."""


class QuestionSet(msgspec.Struct, frozen=True, kw_only=True):
    """How a file of questions was made."""

    question_model: str
    """Who wrote them."""
    prompts_sha256: str
    """SHA-256 of what it was asked."""
    settings: dict[str, Any]
    """What else decides them."""
    source: SourceInfo
    """The articles."""
    num_articles: int
    """Articles."""
    num_without_section: int
    """Articles of them that have no section of the right length."""
    num_sections: int
    """Sections of the right length that were drawn of them."""
    num_asked: int
    """Sections that a question was asked for."""
    num_kept: int
    """Questions that were kept."""
    rejected: list[Rejection]
    """What became of the others, the most frequent first."""
    by_difficulty: list[Rejection]
    """Questions kept by bin of difficulty, `reason` being the bin; empty where the source has none."""
    asked: dict[str, Any] = {}
    """Settings of this stage that are not at their defaults, by path: tracekit.run.command."""


class Written(NamedTuple):
    """Questions, and what was rejected on the way."""

    questions: list[WikiQuestion]
    """Those that were kept, in the order of articles and sections."""
    num_asked: int
    """Sections that a question was asked for."""
    rejected: Counter[str]
    """Sections that came to nothing, by reason."""


def written(
    client: Client,
    sections: Sequence[Section],
    *,
    num_questions: int | None,
    seed: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Written:
    """Have questions written about sections and answered from them.

    Args:
        client: The model that is asked, first for questions, then for answers.
        sections: The sections, article by article.
        num_questions: How many are wanted, spread evenly over the bins of difficulty; None asks about every section.
        seed: Decides which sections are asked about first.
        max_new_tokens: Longest reply.

    Raises:
        ClientError: the model cannot be asked.
    """
    queues = _queues(sections, seed)
    kept: dict[str | None, int] = dict.fromkeys(queues, 0)
    found: list[tuple[tuple[int, int], WikiQuestion]] = []
    rejected: Counter[str] = Counter()
    seen: set[str] = set()
    num_asked = 0
    while any(queues.values()):
        wanted = _shares(kept, queues, num_questions)
        chosen = [place for bin_, queue in queues.items() for place in _taken(queue, wanted[bin_])]
        if not chosen:
            break
        num_asked += len(chosen)
        for place, question, why in _asked(client, chosen, sections, seed, max_new_tokens):
            words = " ".join(re.findall(r"\w+", question.question.casefold())) if question else ""
            if question is None or words in seen:
                rejected[why or "duplicate"] += 1
                continue
            seen.add(words)
            kept[question.difficulty] += 1
            found.append((place, question))
    return Written([question for _, question in sorted(found, key=lambda pair: pair[0])], num_asked, rejected)


def write_questions(layout: Layout, made: Written, about: QuestionSet) -> None:
    """Write questions and, last, how they were made.

    Raises:
        SourceError: there are none; the message says why.
    """
    if not made.questions:
        reasons = ", ".join(f"{count} {reason}" for reason, count in made.rejected.most_common()) or "no section"
        raise SourceError(
            f"no question was kept: of {about.num_sections} sections from {about.num_articles} articles "
            f"{made.num_asked} were asked about; rejected: {reasons}. Try another --question-model, more articles "
            "(--limit), or other --min-section-tokens and --max-section-tokens"
        )
    encoder = msgspec.json.Encoder()
    write_atomic(layout.questions, b"".join(encoder.encode(question) + b"\n" for question in made.questions))
    write_atomic(_about(layout), msgspec.json.format(encoder.encode(about), indent=2) + b"\n")


def read_questions(layout: Layout) -> QuestionSet | None:
    """How the questions of a configuration were made; None where there are none.

    Raises:
        DatasetError: the file says something else.
    """
    path = _about(layout)
    if not (path.exists() and layout.questions.exists()):
        return None
    try:
        return msgspec.json.decode(read_whole(path), type=QuestionSet)
    except UNREADABLE as error:
        raise DatasetError(f"{path}: {error}; move it away and run the questions stage again") from error


def _about(layout: Layout) -> Any:
    return layout.question_set


def _queues(sections: Sequence[Section], seed: int) -> dict[str | None, deque[tuple[int, int]]]:
    """Places of the sections by bin of difficulty, drawn by the seed: articles first, then their further sections."""
    places: dict[str | None, list[tuple[int, tuple[int, int]]]] = {}
    number_in: Counter[int] = Counter()
    for index, section in enumerate(sections):
        number = number_in[section.article.row]
        number_in[section.article.row] += 1
        places.setdefault(section.article.difficulty, []).append((number, (index, number)))
    queues = {}
    for difficulty in sorted(places, key=str):
        draw = random.Random(f"{seed} {difficulty}")  # of a text it is the same on every machine
        shuffled = draw.sample(places[difficulty], len(places[difficulty]))
        queues[difficulty] = deque(place for _, place in sorted(shuffled, key=lambda pair: pair[0]))
    return queues


def _shares(
    kept: dict[str | None, int], queues: dict[str | None, deque[tuple[int, int]]], num_questions: int | None
) -> dict[str | None, int]:
    """How many sections to take of every bin next, so that bins that are not empty fill up evenly."""
    if num_questions is None:
        return dict.fromkeys(queues, _MAX_ROUND)
    wanted: dict[str | None, int] = dict.fromkeys(queues, 0)
    for _ in range(min(_MAX_ROUND, num_questions - sum(kept.values()))):
        open_bins = [bin_ for bin_, queue in queues.items() if len(queue) > wanted[bin_]]
        if not open_bins:
            break
        wanted[min(open_bins, key=lambda bin_: kept[bin_] + wanted[bin_])] += 1
    return wanted


def _taken(queue: deque[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    return [queue.popleft() for _ in range(min(count, len(queue)))]


def _asked(
    client: Client, places: Sequence[tuple[int, int]], sections: Sequence[Section], seed: int, max_new_tokens: int
) -> list[tuple[tuple[int, int], WikiQuestion | None, str]]:
    """For each section its place, and the question that was written about it or why there is none."""
    chosen = [sections[index] for index, _ in places]
    how = {"seed": seed, "max_new_tokens": max_new_tokens}
    asked = client.ask([question_request(one.article.title, one.text, **how) for one in chosen])
    questions = [("", _no_reply(r.error)) if r.error else read_question(r.text) for r in asked]
    with_question = [number for number, (question, _) in enumerate(questions) if question]
    replies = client.ask(
        [answer_request(chosen[n].article.title, chosen[n].text, questions[n][0], **how) for n in with_question]
    )
    answers = {
        number: ("", _no_reply(reply.error))
        if reply.error
        else read_answer(reply.text, questions[number][0], chosen[number].text)
        for number, reply in zip(with_question, replies, strict=True)
    }
    found: list[tuple[tuple[int, int], WikiQuestion | None, str]] = []
    for number, (place, section) in enumerate(zip(places, chosen, strict=True)):
        question, why = questions[number]
        answer, why_no_answer = answers.get(number, ("", why))
        if not answer:
            found.append((place, None, why_no_answer))
            continue
        found.append(
            (
                place,
                WikiQuestion(
                    id=f"{section.article.row}-{place[1]}",
                    question=question,
                    answer=answer,
                    title=section.article.title,
                    article_row=section.article.row,
                    section_title=section.heading,
                    section=section.text,
                    section_num_tokens=section.num_tokens,
                    difficulty=section.article.difficulty,
                ),
                "",
            )
        )
    return found


def _no_reply(error: str) -> str:
    """Why there was no reply, the same for requests that failed alike."""
    return "no reply: " + re.sub(r"\d+", "N", error)
