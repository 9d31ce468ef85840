"""Articles: rows of any of their forms, and sections that hold whole paragraphs and keep to their lengths."""

import json
from pathlib import Path

import pytest

from builders.kit.columns import ArticleSource
from builders.kit.sources import SourceRow, read_examples
from builders.wiki_qa.articles import SAMPLE, SOURCE, Article, draw_sections, parse_article, sections_of
from tracekit.errors import SourceError


def count(text: str) -> int:
    return len(text.split())


def article(text: str, row: int = 0) -> Article:
    return Article(row, "Title", text, None)


def words(number: int, word: str = "w") -> str:
    return " ".join([word] * number)


@pytest.mark.parametrize("field", ["text", "markdown", "article", "content"])
def test_a_row_is_an_article_whatever_its_text_is_called(field: str):
    found = parse_article(SourceRow(7, "here", {"title": " Ice ", field: "Cold water.", "h_score_cat": 3}))
    assert found == Article(7, "Ice", "Cold water.", "3")


@pytest.mark.parametrize(
    "data", [{"title": "Ice"}, {"title": "", "text": "x"}, {"text": "x"}, {"title": 3, "text": "x"}]
)
def test_a_row_without_title_or_text_is_refused_with_its_columns(data: dict[str, object]):
    with pytest.raises(SourceError, match="columns: " + ", ".join(data)):
        parse_article(SourceRow(0, "here", data))


@pytest.mark.parametrize("mark", ["## {}", "### {} ##", "== {} ==", " = = {} = = ", "={}="])
def test_headings_of_markdown_and_of_wiki_text_part_the_article(mark: str):
    early, late = mark.format("Early years"), mark.format("Death")
    text = f"{words(6, 'lead')}\n\n{early}\n\n{words(5, 'early')}\n{late}\n{words(7, 'late')}"
    found = sections_of(article(text), count, min_tokens=5, max_tokens=10)
    assert [(one.heading, one.text.split()[0], one.num_tokens) for one in found] == [
        ("", "lead", 6),
        ("Early years", "early", 5),
        ("Death", "late", 7),
    ]


def test_paragraphs_are_put_together_while_they_fit_and_what_is_short_is_left_out():
    body = "\n\n".join(words(4, letter) for letter in "abcde")
    found = sections_of(article(f"## One\n\n{body}"), count, min_tokens=5, max_tokens=9)
    assert [one.text for one in found] == [f"{words(4, 'a')}\n\n{words(4, 'b')}", f"{words(4, 'c')}\n\n{words(4, 'd')}"]


def test_a_paragraph_that_is_too_long_is_cut_between_sentences():
    sentences = [f"The {letter} is {words(3, letter)}." for letter in "abcdef"]
    found = sections_of(article(" ".join(sentences)), count, min_tokens=5, max_tokens=14)
    assert [one.text for one in found] == [" ".join(sentences[i : i + 2]) for i in (0, 2, 4)]
    assert sections_of(article(words(40)), count, min_tokens=5, max_tokens=14) == []  # no sentence ends anywhere


def test_sections_are_drawn_by_seed_and_article_and_stay_in_order():
    sections = sections_of(
        article("\n".join(f"## {n}\n{words(6)}" for n in range(20))), count, min_tokens=5, max_tokens=9
    )
    drawn = draw_sections(sections, 5, seed=1)
    assert drawn == draw_sections(sections, 5, seed=1) != draw_sections(sections, 5, seed=2)
    assert [int(one.heading) for one in drawn] == sorted(int(one.heading) for one in drawn)
    assert draw_sections(sections, 50, seed=1) == sections
    assert draw_sections([], 5, seed=1) == []


@pytest.mark.parametrize("source", ["sample", "wikitext/slice_articles_12.jsonl"])
def test_real_articles_give_sections_within_the_limits(source: str, request: pytest.FixtureRequest):
    path = "sample" if source == "sample" else str(request.getfixturevalue("shared") / "data" / source)
    articles = read_examples(ArticleSource(source=path), default=SOURCE, sample=SAMPLE, parse=parse_article).examples
    for one in articles:
        found = sections_of(one, count, min_tokens=150, max_tokens=400)
        assert len(found) >= 3, one.title
        assert all(150 <= section.num_tokens == count(section.text) <= 400 for section in found)
        assert all("=" not in section.heading for section in found)


def test_the_sample_is_read_as_it_is(tmp_path: Path):
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    found = read_examples(ArticleSource(source="sample"), default=SOURCE, sample=SAMPLE, parse=parse_article).examples
    assert [one.title for one in found] == [row["title"] for row in rows]
