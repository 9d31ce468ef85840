"""The record of the task wiki_qa: a question that a model wrote about a section of an article, answered without it."""

from typing import ClassVar

from tracekit.records.base import Record, Summary

__all__ = ["WikiQARecord"]


class WikiQARecord(Record, frozen=True, kw_only=True, tag="wiki_qa", forbid_unknown_fields=True):
    """One question, what it was made of, and the answer of a model that saw neither article nor section.

    Whether the answer is right, wrong or withheld is said by the label sets beside the dataset (`store.labels()`).
    """

    made_from: ClassVar[tuple[str, ...]] = ("article_source", "question_model")

    question: str
    """The question."""
    generated_text: str
    """Everything: prompt and generated tokens, special tokens included; `token_offsets` count in it."""
    generated_answer: str
    """The answer alone: no prompt, no reasoning, no special tokens."""
    generated_token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one."""
    num_layers: int
    """Number of transformer blocks."""
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
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each generated token, nats."""
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at max_new_tokens)."""
    is_truncated: bool
    """True where max_new_tokens ran out before the answer came to its end."""

    def summary(self) -> Summary:
        """Question and answer."""
        return Summary(self.question, self.generated_answer or "(no answer)", self.ground_truth_answers[0])
