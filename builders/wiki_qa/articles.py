"""Articles: title and text of an encyclopedia, and the sections of them that questions are made of.

Address   https://huggingface.co/datasets/euirim/goodwiki (good and featured articles of the English Wikipedia)
Licence   CC BY-SA 4.0; the sample in samples/wiki_articles.jsonl was written for this project
One row   {"title": "Marie Curie", "text": "Marie Curie was born Maria Sklodowska in Warsaw ..."}

The text is under `text`, `markdown`, `article` or `content`; headings are lines of Markdown (`## Youth`) or of wiki
text (`== Youth ==`). A bin of difficulty may stand under `difficulty`, `bin` or `h_score_cat`.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from builders.kit.cells import Cells, Columns
from builders.kit.sources import HubSource, SourceRow

__all__ = ["COLUMNS", "SAMPLE", "SOURCE", "Article", "Section", "draw_sections", "parse_article", "sections_of"]

SOURCE = HubSource("euirim/goodwiki", None)
SAMPLE = Path(__file__).with_name("wiki_articles.jsonl")

COLUMNS: Columns = {
    "title": ("title",),
    "text": ("text", "markdown", "article", "content"),
    "bin": ("difficulty", "bin", "h_score_cat"),
}
"""The columns that are read."""

_HEADING = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+(?P<md>.+?)[ \t]*#*|=(?P<wiki>.+)=)[ \t]*$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")


class Article(NamedTuple):
    """One article."""

    row: int
    """Row in the source."""
    title: str
    """Title."""
    text: str
    """Text, headings and all."""
    difficulty: str | None
    """The source's own bin of difficulty; None where it has none."""


class Section(NamedTuple):
    """A piece of an article, all under one heading."""

    article: Article
    """Where it is from."""
    heading: str
    """Its heading; empty above the first one."""
    text: str
    """Whole paragraphs, or whole sentences of one that is too long."""
    num_tokens: int
    """Length in the tokens it was cut by."""


def parse_article(row: SourceRow) -> Article:
    """A row as an article.

    Raises:
        SourceError: no title, or no text.
    """
    cells = Cells(row, COLUMNS)
    title = cells.text("title", what="title of an article")
    text = cells.text("text", what="text of an article")
    return Article(row.index, title.strip(), text, cells.scalar(*cells.first("bin")))


def sections_of(
    article: Article, num_tokens: Callable[[str], int], *, min_tokens: int, max_tokens: int
) -> list[Section]:
    """The pieces of an article that are long enough to ask about and short enough to read at once, in its order.

    Paragraphs under one heading are put together as long as they fit; what is shorter than `min_tokens` is left out.
    """
    found = []
    for heading, body in _parts(article.text):
        for text in _packed(list(_paragraphs(body, num_tokens, max_tokens)), num_tokens, max_tokens):
            size = num_tokens(text)
            if min_tokens <= size <= max_tokens:
                found.append(Section(article, heading, text, size))
    return found


def draw_sections(sections: Sequence[Section], count: int, *, seed: int) -> list[Section]:
    """So many sections of one article, drawn by the seed and the article's row; all in order where there are fewer."""
    if len(sections) <= count:
        return list(sections)
    draw = random.Random(f"{seed} {sections[0].article.row}")  # of a text it is the same on every machine
    return [sections[place] for place in sorted(draw.sample(range(len(sections)), count))]


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Headings and what stands under each."""
    heading, start = "", 0
    for match in _HEADING.finditer(text):
        yield heading, text[start : match.start()]
        heading, start = (match["md"] or match["wiki"]).strip("= \t"), match.end()
    yield heading, text[start:]


def _paragraphs(body: str, num_tokens: Callable[[str], int], max_tokens: int) -> Iterator[str]:
    """Paragraphs, one that is too long in groups of its sentences."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s)", body):
        text = paragraph.strip()
        if not text:
            continue
        if num_tokens(text) <= max_tokens:
            yield text
        else:
            yield from _packed(_SENTENCE_END.split(text), num_tokens, max_tokens, joint=" ")


def _packed(
    pieces: Sequence[str], num_tokens: Callable[[str], int], max_tokens: int, *, joint: str = "\n\n"
) -> Iterator[str]:
    """Pieces put together in order, as many as fit; one that does not fit alone stands alone."""
    group = ""
    for piece in pieces:
        longer = f"{group}{joint}{piece}" if group else piece
        if group and num_tokens(longer) > max_tokens:
            yield group
            group = piece
        else:
            group = longer
    if group:
        yield group
