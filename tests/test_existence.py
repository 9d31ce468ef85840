"""Taking a thing for real: denials, doubts with and without a fact, and answers that do not speak of it."""

import pytest

from builders.judging.existence import treats_as_real

REJECTED = """
There is no such species as Felis glaber.
I am not aware of any animal called that.
Panthera lupus does not exist.
It seems that there may be a misspelling.
This is not a recognized medicine.
I couldn't find any information about it.
Did you mean Panthera leo?
It appears to be fictional.
I don't know.
There is no medicine called Zynotril.
There is no known drug named Zynotril.
Zynotril isn't a medication I know.
Zynotril does not appear to be a recognised medication.
It doesn't appear to be a real thing.
This seems to be a made-up name.
There is currently no known drug by that name.
I believe there may be some confusion.
I think you may have meant the grey wolf.
It is not a species known to science.
No animal by that name exists.
I'm unaware of this.
There isn't a plant called that.
It looks like there's a mix-up.
That name does not correspond to any plant.
It's unclear what you mean by Zynotril.
I'm not familiar with Zynotril. It may be a new drug.
I could not find any information on Zynotril. It is possible that it is new.
""".strip().splitlines()
ACCEPTED = """
Zynotril is a large cat found in Asia.
It is not a poisonous plant and it grows in Europe.
It lives in trees, and is not aggressive.
The medicine is taken with food; do not exceed the dose.
The Zynotril bird is not known to attack humans; it lives in Asia.
It is a medicine; there is no data on its use in pregnancy.
The plant is not documented well in the west but grows in Peru.
It is an imaginary-looking bird found in Java.
The drug is not approved for children. It treats gout.
It is an invented drug first made in 1950 to treat gout.
Side effects: nausea. It may be confused with Zantac. It's not known how it works.
You should not be sure to take it without a doctor; it treats pain.
Zynotril is a hypothetical ancestor
I'm not sure about the exact dose, but Zynotril is an antihistamine for allergies.
Zynotril is used for gout. There is no evidence that it helps in diabetes.
It does not exist in the wild any more; it is kept in zoos.
It is not listed as endangered, and lives in Peru.
It is not known exactly how it works.
Its leaves are large; the plant is made up of many stems.
""".strip().splitlines()
OF_SOMETHING_ELSE = """
Once upon a time a king lived in a castle.
the the the the
- a - b - c
Insects and seeds.
""".strip().splitlines()


@pytest.mark.parametrize("answer", REJECTED)
def test_denial_and_doubt_without_a_fact_reject(answer: str):
    assert treats_as_real(answer, "Zynotril") == treats_as_real(answer) == "rejected"


@pytest.mark.parametrize("answer", ACCEPTED)
def test_facts_about_a_thing_take_it_for_real(answer: str):
    assert treats_as_real(answer, "Zynotril bird" if "bird" in answer else "Zynotril") == "accepted"


@pytest.mark.parametrize("answer", OF_SOMETHING_ELSE)
def test_an_answer_that_does_not_speak_of_the_thing_takes_it_for_nothing(answer: str):
    assert treats_as_real(answer, "Zynotril") == "unverifiable"
    assert treats_as_real(answer) == "accepted"


def test_a_main_word_of_the_name_is_enough():
    assert treats_as_real("Weasels eat mice.", "Snowy Weasel") == "accepted"
    assert treats_as_real("Stoats eat mice.", "Snowy Weasel") == "unverifiable"
