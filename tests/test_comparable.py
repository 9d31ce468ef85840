"""Texts as they are compared: one form for spelling, numbers and dates."""

import pytest

from builders.judging.comparable import tokens_of


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The 12th of May, 1905, in B12", ["#12", "may", "#1905", "in", "b12"]),
        ("On May 12th, 1905, J. R. R. Tolkien's dogs", ["on", "#12", "may", "#1905", "jrr", "tolkien", "dogs"]),
        ("two hundred and five thousand, or 3.50", ["#205000", "or", "#3.5"]),
        ("$5 million, -5 degrees, F-16", ["#5000000", "dollar", "#-5", "degrees", "f", "#16"]),
        ("Zo\u0308e d\u2019Arc ate an apple", ["zoe", "d'arc", "ate", "apple"]),
        ("The", ["the"]),
        ("", []),
    ],
)
def test_a_text_is_put_in_one_form(text: str, tokens: list[str]):
    assert [token.text for token in tokens_of(text)] == tokens
