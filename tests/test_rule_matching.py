"""Naming a gold answer: what counts as the same, and what is named without being stood by."""

import pytest

from builders.judging.comparable import tokens_of
from builders.judging.rule_matching import names_gold

NAMED = [
    ("Paris", "It is Paris."),
    ("Paris", "Paris, not London."),
    ("Paris", "Not London but Paris."),
    ("Paris", "Not only Paris but the whole of France."),
    ("Paris", "No data was lost in Paris."),
    ("Mumbai", "Mumbai, or Bombay as it was called."),
    ("a thousand", "about 1,000 or so"),
    ("heads or tails", "It was heads or tails."),
    ("1,000", "1000"),
    ("1000", "about 1,000 people"),
    ("3", "There are three."),
    ("three", "There are 3."),
    ("two dogs", "2 dogs"),
    ("23", "twenty-three"),
    ("342", "three hundred and forty-two"),
    ("$5 million", "5 million dollars"),
    ("20 million", "It had 20,000,000 inhabitants."),
    ("50%", "50 percent"),
    ("50 per cent", "50%"),
    ("3.50", "It costs 3.5."),
    ("12 May 1905", "May 12, 1905"),
    ("May 12, 1905", "12 May 1905."),
    ("12 May 1905", "It was on May 12th, 1905"),
    ("12 May 1905", "on the 12th of May 1905"),
    ("12 May 1905", "1905-05-12"),
    ("May 1905", "12 May 1905"),
    ("1905", "1905-05-12"),
    ("1960s", "the 1960's"),
    ("12th century", "in the twelfth century"),
    ("J. R. R. Tolkien", "J.R.R. Tolkien"),
    ("J.R.R. Tolkien", "by JRR Tolkien"),
    ("U.S.", "US"),
    ("US", "the U.S. Army"),
    ("Erdős", "Erdos"),
    ("Gödel", "Go\u0308del"),
    ("Gödel", "Godel's theorem"),
    ("Łódź", "Lodz"),
    ("ﬁsh", "fish"),
    ("東京", "答えは東京です"),
    ("Vitamin A", "It is vitamin A."),
    ("vitamin a", "vitamin A deficiency"),
    ("A", "A"),
    ("A", "The answer is A."),
    ("no", "No, it did not."),
    ("a dog", "It is the dog."),
    ("The Who", "the who"),
    ("did not marry", "He didn't marry."),
    ("!!!", "!!!"),
]
NOT_NAMED = [
    ("Paris", "London"),
    ("Paris", "Not Paris."),
    ("Paris", "It was not Paris but London."),
    ("Paris", "It wasn't in Paris."),
    ("Paris", "London, rather than Paris."),
    ("Paris", "London instead of Paris"),
    ("Paris", "It is not the city of Paris."),
    ("Paris", "Paris is not the capital."),
    ("Paris", "Paris is wrong."),
    ("Paris", "Either Paris or London or Rome or Berlin."),
    ("Paris", "Paris or London"),
    ("Paris", "Rome, London, or Paris"),
    ("Paris", "Paris, London, or Rome"),
    ("10", "10,000"),
    ("5", "3.5 km"),
    ("5", "-5 degrees"),
    ("20", "20 million"),
    ("20", "twenty-three"),
    ("1", "No one knows it was one of them."),
    ("12 May 1905", "13 May 1905"),
    ("Vitamin A", "vitamin B"),
    ("Vitamin A", "vitamin deficiency"),
    ("type A", "a type of thing"),
    ("A", "A man did."),
    ("U.S.", "He told us that."),
    ("no", "It has no windows."),
    ("Paris", "Parisian"),
    ("Paris", ""),
]


@pytest.mark.parametrize(("gold", "answer"), NAMED)
def test_a_gold_answer_is_seen_in_another_form(gold: str, answer: str):
    assert names_gold(answer, [gold]), (tokens_of(answer), tokens_of(gold))


@pytest.mark.parametrize(("gold", "answer"), NOT_NAMED)
def test_something_else_or_something_denied_is_not_the_gold_answer(gold: str, answer: str):
    assert not names_gold(answer, [gold]), (tokens_of(answer), tokens_of(gold))


def test_two_gold_answers_may_stand_beside_each_other():
    assert names_gold("Bombay or Mumbai", ["Mumbai", "Bombay"])
    assert not names_gold("Bombay or Mumbai", ["Mumbai"])
    assert not names_gold("Paris", [])


def test_a_question_for_what_is_not_so_is_answered_by_what_is_not_so():
    assert names_gold("Paris did not burn.", ["Paris"], question="Which city did not burn?")
    assert not names_gold("Paris did not burn.", ["Paris"], question="Which city burnt?")
