"""The packaged articles: their form, and sections long enough to ask about and short enough to read at once."""

import json
import re
from pathlib import Path

import pytest

import builders

PATH = Path(builders.__file__).parent / "wiki_qa" / "wiki_articles.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def sections(text: str) -> list[tuple[str, str]]:
    """Heading and body of every section."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    assert parts[0] == "", f"text before the first heading: {parts[0][:60]!r}"
    return list(zip(parts[1::2], (body.strip() for body in parts[2::2]), strict=True))


def test_every_row_has_the_same_keys_in_the_same_order(rows: list[dict[str, str]]):
    for row in rows:
        assert list(row) == ["title", "text", "category"], row
        assert all(isinstance(text, str) and text and text == text.strip() for text in row.values()), row["title"]


def test_eight_articles_of_eight_categories(rows: list[dict[str, str]]):
    assert len(rows) == 8
    assert len({row["title"].casefold() for row in rows}) == 8
    assert len({row["category"] for row in rows}) == 8


def test_an_article_has_450_to_800_words(rows: list[dict[str, str]]):
    for row in rows:
        assert 450 <= len(row["text"].split()) <= 800, row["title"]


def test_a_section_is_long_enough_to_ask_about(rows: list[dict[str, str]]):
    for row in rows:
        found = sections(row["text"])
        assert len(found) >= 3, row["title"]
        assert len({heading for heading, _ in found}) == len(found), row["title"]
        for heading, body in found:
            # A word of English with its punctuation is 1.2 to 1.5 tokens: between 200 and 500 of them.
            assert 170 <= len(body.split()) <= 310, (row["title"], heading)


def test_every_section_has_names_and_numbers_to_ask_for(rows: list[dict[str, str]]):
    for row in rows:
        for heading, body in sections(row["text"]):
            details = re.findall(r"(?<=[a-z,] )[A-Z]\w+|\d[\d,.]*\d|\d", body)
            assert len(set(details)) >= 10, (row["title"], heading)


def test_an_article_is_paragraphs_of_plain_text(rows: list[dict[str, str]]):
    for row in rows:
        for paragraph in row["text"].split("\n\n"):
            assert paragraph == " ".join(paragraph.split()), row["title"]
            assert paragraph.startswith("## ") or paragraph.endswith((".", '."')), (row["title"], paragraph[-40:])
        assert not re.search(r"[*_\[\]<>{}|]", row["text"]), row["title"]
