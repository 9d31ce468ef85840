"""Abstention by phrases: what declines, what answers with a reservation, and what doubts that a thing is real."""

import pytest

from builders.abstention import RULES_SHA256, abstains, denies

ABSTAINING = """
I don't know.
I do not know the answer to that question.
Sorry, I don't know
I'm not sure.
I’m sorry, but I cannot answer that.
I'm afraid I can't recall.
Unfortunately, I do not have information about that.
As an AI, I don't have access to that information.
Unknown
N/A
I am not able to determine the author.
There is not enough information to answer.
I don't know. It is not known to me.
I have no idea, sorry.
I'm not sure, but I can help you find it.
I would rather not guess.
Could you please provide more context?
It's impossible to say.
I don't know who that is.
I'm sorry. I don't have that information.
I do not have any specific information on this. Please provide more details.
I don't know, but you could look it up.
""".strip().splitlines()

ANSWERING = """
Paris
I don't know who else, but it was Paris
I'm not sure, but I think it is Paris.
Paris. I'm not sure about the year.
It is not known for sure, but the author was Homer.
"I Don't Know How to Love Him"
I don't know exactly, maybe Paris.
You don't know Jack
I am not sure. My guess is Paris.
No
None
The Unknown Soldier
Not Without My Daughter
I do not know for certain; it was Verdi.
The answer is Paris. Please specify if you meant another.
He could not answer
I don't know... it was Paris!
Sorry, the answer is Paris.
I know that it is Paris
I cannot say with certainty, however, the likely author was Marlowe.
""".strip().splitlines()


@pytest.mark.parametrize("answer", ABSTAINING)
def test_an_answer_that_names_nothing_abstains(answer: str):
    assert abstains(answer)


@pytest.mark.parametrize("answer", [*ANSWERING, "", "  \n"])
def test_an_answer_with_a_reservation_is_an_answer(answer: str):
    assert not abstains(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "There is no such species as Felis glaber.",
        "I am not aware of any animal called that.",
        "Panthera lupus does not exist.",
        "It seems that there may be a misspelling.",
        "This is not a recognized medicine.",
        "I couldn't find any information about it.",
        "Did you mean Panthera leo?",
        "It appears to be fictional.",
        "I don't know.",
    ],
)
def test_doubt_that_a_thing_is_real_is_seen(answer: str):
    assert denies(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Panthera lupus is a large cat found in Asia.",
        "It is not a poisonous plant and it grows in Europe.",
        "It lives in trees, and is not aggressive.",
        "Take it with food and do not exceed the dose.",
    ],
)
def test_facts_about_a_thing_take_it_for_real(answer: str):
    assert not denies(answer)


def test_the_phrases_have_a_hash():
    assert len(RULES_SHA256) == 64
