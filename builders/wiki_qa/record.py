"""The record of the task wiki_qa: a question that a model wrote about a section of an article, answered without it."""

from tracekit.records import AnsweredRecord

__all__ = ["WikiQARecord"]


class WikiQARecord(AnsweredRecord, frozen=True, kw_only=True, tag="wiki_qa"):
    """One question, what it was made of, and the answer of a model that saw neither article nor section.

    Whether the answer is right, wrong or withheld is said by the label sets beside the dataset (`store.labels()`).
    """

    question: str
    """The question."""
    ground_truth_answers: list[str]
    """The answer that the question writer gave with the section before it."""
    article_title: str
    """Title of the article."""
    article_row: int
    """Row of the article in its source, counted from 0."""
    article_source: str
    """The source of the articles: Hub id or file, with its revision or hash."""
    section_title: str
    """Heading over the section; empty where there is none."""
    section: str
    """The section that the question was made of."""
    section_num_tokens: int
    """Its length in tokens of the question writer's tokenizer (of the tested model's, for an endpoint)."""
    difficulty: str | None
    """The source's own bin of difficulty of the article; null where it has none."""
    question_model: str
    """The model that wrote the question and gave its answer."""
    question_prompts_sha256: str
    """SHA-256 of the prompts it was asked with."""
