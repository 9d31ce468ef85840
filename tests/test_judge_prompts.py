"""Prompts of judges: replies are read strictly, and prompts say what the replies are to look like."""

import json

import pytest

from builders.judging.prompts import ABSTENTION, EXISTENCE, VERDICT, JudgeQuestion, parse_reply, prompts_sha256


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"verdict": "correct"}', "correct"),
        (' \n{"verdict":"incorrect"}\n', "incorrect"),
        ('```json\n{"verdict": "unverifiable"}\n```', "unverifiable"),
        ('Sure, here it is: {"verdict": "correct"} as asked.', "correct"),
        ('{"reason": "same city", "verdict": "correct"}', "correct"),
    ],
)
def test_one_object_with_an_allowed_value_is_read(text: str, value: str):
    assert parse_reply(text, VERDICT) == (value, None)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("", "no JSON object"),
        ("correct", "no JSON object"),
        ('"correct"', "no JSON object"),
        ('{"verdict": "correct"', "not JSON"),
        ('{"verdict": correct}', "not JSON"),
        ("{'verdict': 'correct'}", "not JSON"),
        ('{"verdict": "Correct"}', "verdict is 'Correct'"),
        ('{"verdict": "right"}', "verdict is 'right'"),
        ('{"verdict": ["correct"]}', "verdict is"),
        ('{"verdict": null}', "verdict is None"),
        ('{"judgement": "correct"}', "no key 'verdict'"),
        ('{"answer": {"verdict": "correct"}}', "no key 'verdict'"),
        ('{"verdict": "correct"} or {"verdict": "incorrect"}', "more than one"),
        ('{"verdict": "correct"}}', "more than one"),
        ('} {"verdict": "correct"}', "more than one"),
        ('{"verdict": "correct", "verdict": "incorrect"}', "a key stands twice"),
        ('{"a":' * 100_000, "not JSON"),
    ],
)
def test_anything_else_fails_and_says_why(text: str, failure: str):
    parsed = parse_reply(text, VERDICT)
    assert parsed.value is None
    assert failure in str(parsed.failure)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"abstains": true}', True),
        ('{"abstains": false}', False),
        ('{"abstains": "true"}', None),
        ('{"abstains": 1}', None),
        ('{"abstains": 0}', None),
    ],
)
def test_true_and_false_are_json_and_nothing_else(text: str, value: bool | None):
    assert parse_reply(text, ABSTENTION).value is value


@pytest.mark.parametrize("question", [ABSTENTION, VERDICT, EXISTENCE])
def test_a_prompt_shows_every_reply_that_is_allowed(question: JudgeQuestion):
    for value in question.allowed:
        shown = json.dumps({question.key: value})
        assert shown in question.instruction
        assert parse_reply(shown, question).value == value
    assert question.schema()["properties"][question.key]["enum"] == list(question.allowed)


def test_other_prompts_have_another_hash():
    changed = ABSTENTION._replace(instruction=ABSTENTION.instruction + " ")
    assert len({prompts_sha256([ABSTENTION]), prompts_sha256([changed]), prompts_sha256([ABSTENTION, VERDICT])}) == 3
