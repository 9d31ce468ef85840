"""The prompts of the degradation builder: how many of each kind, their ids, and which have an answer."""

from collections import Counter
from typing import get_args

import pytest

from builders.degradation.prompts import DREAMS, IQ, IQ_KINDS, PICTURE, DegradationPrompt, PromptKind

ALL = (*DREAMS, *IQ, *PICTURE)


def test_as_many_prompts_of_each_kind_as_promised():
    assert Counter(prompt.kind for prompt in DREAMS) == {"dream": 38}
    assert Counter(prompt.kind for prompt in IQ) == dict.fromkeys(IQ_KINDS, 13)
    assert Counter(prompt.kind for prompt in PICTURE) == {"picture": 20}
    assert {prompt.kind for prompt in ALL} == set(get_args(PromptKind))


@pytest.mark.parametrize(
    ("prompts", "prefix"),
    [(DREAMS, "dream"), (PICTURE, "picture")],
    ids=["dreams", "picture"],
)
def test_ids_are_the_group_and_a_number_from_one(prompts: tuple[DegradationPrompt, ...], prefix: str):
    assert [prompt.id for prompt in prompts] == [f"{prefix}-{number:02d}" for number in range(1, len(prompts) + 1)]


def test_ids_of_tasks_name_their_kind():
    assert [prompt.id for prompt in IQ] == [f"iq-{kind}-{number:02d}" for kind in IQ_KINDS for number in range(1, 14)]


def test_no_id_and_no_text_stands_twice():
    assert len({prompt.id for prompt in ALL}) == len(ALL)
    assert len({prompt.text.casefold() for prompt in ALL}) == len(ALL)


def test_every_text_is_a_whole_sentence_on_one_line():
    for prompt in ALL:
        assert prompt.text == " ".join(prompt.text.split()), prompt.id
        assert prompt.text[0].isupper(), prompt.id
        assert prompt.text[-1] in ".?'", prompt.id
        assert 20 < len(prompt.text) < 300, prompt.id


def test_tasks_have_a_short_answer_unless_they_are_creative():
    for prompt in ALL:
        if prompt.kind in {"mathematics", "language", "logic", "factual"}:
            assert prompt.answer is not None, prompt.id
            assert 0 < len(prompt.answer) <= 20, prompt.id
            assert prompt.answer == prompt.answer.strip(), prompt.id
        else:
            assert prompt.answer is None, prompt.id


def test_answers_in_mathematics_are_numbers():
    answers = [prompt.answer or "" for prompt in IQ if prompt.kind == "mathematics"]
    assert all(answer.replace("/", "").replace(".", "").isdigit() for answer in answers), answers


def test_a_dream_is_told_by_the_one_who_dreamed_it():
    for prompt in DREAMS:
        assert "dream" in prompt.text or "nightmare" in prompt.text, prompt.id
        assert any(sign in prompt.text.casefold() for sign in ("first person", "'i", "as the dreamer")), prompt.id
