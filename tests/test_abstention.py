"""Abstention by phrases: what declines, and what answers with a reservation."""

import pytest

from builders.judging.abstention import abstains, without_abstentions

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
I apologize, but I am unable to answer that.
Without more context, I cannot determine the answer.
I cannot help you with this.
My apologies, I can't help with that.
The question does not provide enough information to determine the city.
This question cannot be answered without additional context.
That information isn't available to me.
As of my last update, I don't have that information.
Great question. I don't know the answer.
Well, that is a great question! Unfortunately I don't know.
I'm not 100% sure.
**I don't know.**
"I don't know"
Answer: I don't know
I lack the information needed to answer this question.
Based on the available information, it is not possible to say.
It depends on which article you mean. Could you clarify?
The specific city is not mentioned.
I haven't the faintest idea.
I wish I knew, but I don't.
Your question is unclear.
There is no capital named in my records, sorry.
I do not know the name of the mayor of Paris, France.
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
I can't say for certain, but Paris is the most likely.
I'm not sure, but Paris would be my guess.
It is unclear, but most historians say Paris.
I don't know for sure. Paris.
I'm not certain, Paris?
I cannot verify this. The capital is Paris.
I would not hesitate: it is Paris
No data was lost in Paris.
There is no evidence that he left Paris.
There is no information gap: Paris.
It is impossible to overstate how much Paris shaped him.
It is not known for being calm, Paris.
It is unknown soldiers' grave in London.
Insufficient data quality made the committee stop the study.
""".strip().splitlines()


@pytest.mark.parametrize("answer", ABSTAINING)
def test_an_answer_that_names_nothing_abstains(answer: str):
    assert abstains(answer)


@pytest.mark.parametrize("answer", [*ANSWERING, "", "  \n"])
def test_an_answer_with_a_reservation_is_an_answer(answer: str):
    assert not abstains(answer)


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("Paris", None),
        ("I don't know.", ""),
        ("I don't know for sure. Paris.", "Paris."),
        ("I'm not sure, but Paris would be my guess.", "but Paris would be my guess."),
        ("I'm sorry, I do not know the mayor of Paris. I can help you find London.", ""),
    ],
)
def test_what_is_said_besides_declining_is_left(answer: str, rest: str | None):
    assert without_abstentions(answer) == rest


@pytest.mark.parametrize(
    "unit", ["as an ai as an ai ", "I am sorry, but ", "without more context ", "I do not really "]
)
def test_a_text_that_repeats_itself_is_read_in_time(unit: str):
    assert abstains(unit * 200) in (True, False)  # the time limit of a test is what this is about
