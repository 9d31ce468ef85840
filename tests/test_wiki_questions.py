"""Questions about sections: what is read of replies, bins that fill evenly, rejections counted, nothing asked twice."""

from pathlib import Path

import pytest

from builders.wiki_qa.articles import Article, Section
from builders.wiki_qa.prompts import answer_request, question_request, read_answer, read_question
from builders.wiki_qa.questions import Written, written
from tests.judges_for_tests import FakeClient, reply
from tracekit.clients.client import ClientConfig, Reply, Request
from tracekit.clients.responses import CachedClient


def section(row: int, difficulty: str | None = None) -> Section:
    return Section(Article(row, f"Town {row}", "", difficulty), "", f"Town {row} has {row + 100} wells.", 6)


def is_question_request(request: Request) -> bool:
    return request.messages[-1].content.endswith("Write one question about a fact in this section.")


def writer(request: Request) -> str:
    """Writes a question about the wells of a town, and knows their number."""
    text = request.messages[-1].content
    town = text.split("Town ")[1].split()[0]
    return f"How many wells has Town {town}?" if is_question_request(request) else f"{int(town) + 100} wells."


def ask(sections: list[Section], num_questions: int | None = None, *, client: FakeClient | None = None) -> Written:
    return written(client or FakeClient(writer), sections, num_questions=num_questions, seed=3)


@pytest.mark.parametrize(
    ("reply_text", "question"),
    [
        ("Who built Fort Alder?", "Who built Fort Alder?"),
        ('Question: "Who built Fort Alder?"', "Who built Fort Alder?"),
        ("Sure, here is one:\n\n1. Who built Fort Alder?\nAnswer: Rehm", "Who built Fort Alder?"),
    ],
)
def test_a_question_is_found_in_a_reply(reply_text: str, question: str):
    assert read_question(reply_text) == (question, "")


@pytest.mark.parametrize(
    ("reply_text", "why"),
    [
        ("", "no question"),
        ("Fort Alder was built by Rehm.", "no question"),
        ("Why?", "no question"),
        ("Who " + "really " * 40 + "built Fort Alder?", "question too long"),
        ("Who built the fort in this section?", "question points at the section"),
        ("According to the text, who built Fort Alder?", "question points at the section"),
    ],
)
def test_what_is_no_question_that_stands_alone_is_rejected_with_the_reason(reply_text: str, why: str):
    assert read_question(reply_text) == ("", why)


@pytest.mark.parametrize(
    ("reply_text", "answer", "why"),
    [
        ("Anton Rehm.", "Anton Rehm", ""),
        ("Answer: eleven weeks\nIt was long.", "eleven weeks", ""),
        ("A. Rehm", "A. Rehm", ""),
        ("UNANSWERABLE", "", "unanswerable"),
        ("Unanswerable.", "", "unanswerable"),
        ("It says: unanswerable", "", "unanswerable"),
        ("", "", "no answer"),
        ("the", "", "no answer"),
        ("It was built by a man who was called Anton Rehm and who", "", "answer too long"),
        ("Fort Alder", "", "answer stands in the question"),
    ],
)
def test_an_answer_is_a_few_words_that_are_not_in_the_question(reply_text: str, answer: str, why: str):
    text = "Fort Alder was built by Anton Rehm (A. Rehm) in eleven weeks."
    assert read_answer(reply_text, "Who built the Fort Alder?", text) == (answer, why)


@pytest.mark.parametrize(
    ("answer", "section_text", "stands"),
    [
        ("48 colours", "It has 48 colours.", True),
        ("the Four Winds", "The window \u201cThe Four Winds\u201d shows ships.", True),
        ("1,741", "Built in 1,741 days", True),
        ("Duarte-Neves", "by Duarte Neves", True),
        ("Set\u00fabal", "the office of SET\u00daBAL.", True),
        ("\u6771\u4eac", "\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059\u3002", True),
        ("art", "the artist's house", False),
        ("1742", "between 1741 and 1748", False),
        ("eleven days", "eleven weeks and two days", False),
        ("\u4eac\u90fd", "\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059\u3002", False),
    ],
)
def test_an_answer_stands_in_the_section(answer: str, section_text: str, stands: bool):
    expected = (answer, "") if stands else ("", "answer is not in the section")
    assert read_answer(answer, "What is asked here today?", section_text) == expected


@pytest.mark.parametrize(
    "question",
    [
        "Where was he born?",
        "In which year did she leave Vienna?",
        "After moving to Paris, what did she discover?",
        "In New York, what did he open?",
        "Which city was he born in?",
        "At what age did she marry?",
        "How many bastions did it have?",
        "How long did it take him to cross Antarctica?",
        "Which river flows through it?",
        "What is the name of his wife?",
        "What was the title of their first album?",
        "What was the name of the ship in which he sailed?",
        "Its capital is which city?",
        "What caused this event?",
        "What did Napoleon do with it?",
        "What did NASA call it?",
        "Who was the first person to climb it?",
        "How did the company pay them?",
        "What did Ada Lovelace do after that?",
        "Which trees grow there?",
        "What was the latter named after?",
        "What was the former's population?",
    ],
)
def test_a_question_with_a_dangling_pronoun_is_rejected(question: str):
    assert read_question(question) == ("", "dangling pronoun")


@pytest.mark.parametrize(
    "question",
    [
        "When Marie Curie left Warsaw, where did she go?",
        "Which city lost its walls in 1809?",
        "Which painter cut off his ear?",
        "What did the settlers call their town?",
        "When did the engineer Anton Rehm finish his bridge?",
        "How long did it take to build Fort Alder?",
        'Who wrote "As I told her"?',
        "Who wrote Their Eyes Were Watching God?",
        "Who was Elizabeth I?",
        "After the flood destroyed the bridge, who rebuilt it?",
        "Who built the mill and sold it in 1820?",
        "Which ship that sank in 1628 was raised in 1961?",
        "How many locks are there?",
        "What did Ada Lovelace do that Babbage did not?",
        "What was the former king's name?",
    ],
)
def test_a_pronoun_that_the_question_explains_is_kept(question: str):
    assert read_question(question) == (question, "")


def test_what_the_section_does_not_say_is_rejected_and_counted():
    def say(request: Request) -> str:
        if "Town 1 " in request.messages[-1].content and is_question_request(request):
            return "How many wells does it have?"
        return writer(request) if "Town 2" not in request.messages[-1].content else writer(request).replace("2", "9")

    made = ask([section(row) for row in range(4)], client=FakeClient(say))
    assert [one.article_row for one in made.questions] == [0, 3]
    assert dict(made.rejected) == {"dangling pronoun": 1, "answer is not in the section": 1}


def test_braces_in_an_article_are_text():
    request = answer_request("{title}", "a {section} of {0}", "why {question}?", seed=0, max_new_tokens=8)
    assert request.messages[-1].content == "Article: {title}\n\na {section} of {0}\n\nQuestion: why {question}?"
    assert "{0}" in question_request("t", "{0}", seed=0, max_new_tokens=8).messages[-1].content


def test_every_section_is_asked_about_and_questions_stand_in_the_order_of_articles():
    made = ask([section(row) for row in range(7)])
    assert [(one.id, one.question, one.answer) for one in made.questions] == [
        (f"{row}-0", f"How many wells has Town {row}?", f"{row + 100} wells") for row in range(7)
    ]
    assert (made.num_asked, dict(made.rejected)) == (7, {})


def test_bins_of_difficulty_fill_evenly_and_others_take_the_place_of_one_that_is_empty():
    sections = [section(row, "easy") for row in range(20)] + [section(row, "hard") for row in range(20, 24)]
    made = ask(sections, 6)
    assert sorted(one.difficulty or "" for one in made.questions) == ["easy"] * 3 + ["hard"] * 3
    made = ask(sections, 12)
    assert sorted(one.difficulty or "" for one in made.questions) == ["easy"] * 8 + ["hard"] * 4
    assert made.num_asked == 12


def test_rejected_sections_are_replaced_until_there_are_enough_and_counted():
    def half(request: Request) -> str | Reply:
        town = int(request.messages[-1].content.split("Town ")[1].split()[0].rstrip("?"))
        if town % 4 == 1 and is_question_request(request):
            return "No idea."
        if town % 4 == 2 and not is_question_request(request):
            return "UNANSWERABLE"
        if town % 4 == 3:
            return reply("", error=f"over {town} tokens")
        return writer(request)

    made = ask([section(row) for row in range(40)], 9, client=FakeClient(half))
    assert len(made.questions) == 9
    assert made.num_asked == 9 + made.rejected.total()
    assert set(made.rejected) == {"no question", "unanswerable", "no reply: over N tokens"}


def test_questions_that_are_equal_but_for_case_and_signs_are_kept_once():
    texts = iter(["Who is  Anna Berg?", "who is 'anna berg' ?", "Who is Carl Berg?"])

    def say(request: Request) -> str:
        return next(texts) if is_question_request(request) else "wells"

    made = ask([section(row) for row in range(3)], client=FakeClient(say))
    assert len(made.questions) == 2
    assert dict(made.rejected) == {"duplicate": 1}


def test_which_sections_are_asked_about_is_the_seed_s_and_every_article_comes_before_second_sections():
    sections = [one for row in range(6) for one in (section(row), section(row))]
    made = ask(sections, 4)
    assert made.questions == ask(sections, 4).questions
    assert len({one.article_row for one in made.questions}) == 4
    other = written(FakeClient(writer), sections, num_questions=4, seed=4)
    assert other.questions != made.questions


def test_a_stage_that_was_stopped_asks_nothing_twice(tmp_path: Path):
    class Stopped(FakeClient):
        def ask(self, requests, on_reply=lambda place, one: None):
            if len(self.asked) >= 5:
                raise KeyboardInterrupt
            return super().ask(requests, on_reply)

    sections = [section(row) for row in range(5)]
    stopped, whole = Stopped(writer), FakeClient(writer)
    settings = ClientConfig()
    with CachedClient(stopped, tmp_path / "cache.jsonl", settings) as client, pytest.raises(KeyboardInterrupt):
        written(client, sections, num_questions=None, seed=3)
    with CachedClient(whole, tmp_path / "cache.jsonl", settings) as client:
        made = written(client, sections, num_questions=None, seed=3)
    assert (len(stopped.asked), len(whole.asked)) == (5, 5)
    assert not any(is_question_request(request) for request in whole.asked)
    assert made.questions == ask(sections).questions
