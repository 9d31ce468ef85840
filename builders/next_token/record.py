"""The record of the task next_token."""

import msgspec

from tracekit.records import Record

__all__ = ["NextTokenRecord", "Word"]


class Word(msgspec.Struct, frozen=True, kw_only=True):
    """One gold word of a treebank sentence, and the model tokens it lies in."""

    id: str
    """Id in the CoNLL-U sentence: `3`, `3-4` (a multi-word token) or `3.1` (an empty node)."""
    form: str
    """The word as written."""
    lemma: str | None
    """Lemma; null where the treebank gives none (a multi-word token)."""
    upos: str | None
    """Universal part of speech; null where none is given."""
    head: int | None
    """Id of the head word, 0 for the root; null where none is given."""
    deprel: str | None
    """Relation to the head; null where none is given."""
    start_char: int | None
    """First character in `text`; null where the word stands nowhere in the text (an empty node)."""
    stop_char: int | None
    """One past its last character."""
    start_token: int | None
    """First token of this window that covers the word; null where none does."""
    stop_token: int | None
    """One past the last token that covers the word."""


class NextTokenRecord(Record, frozen=True, kw_only=True, tag="next_token"):
    """A window of text, and how the model predicts each of its tokens.

    The lists `next_...` have one entry for each position that has a following token: T-1 of them. Probabilities are
    the raw model's, in float32. With `--numbers none` the lists are empty, and nothing is scored.
    """

    text: str
    """The text of this window; equal to `prompt`."""
    kind: str
    """What the source is: `ud_ewt`, `go_emotions`, `csqa`, `wikitext2`, `wikitext103`, or `text`."""
    document_id: str
    """The source's id of the document (sentence, article, line) the window comes from."""
    window_index: int
    """Number of the window in its document."""
    window_start: int
    """First token of the window, counted in the whole document's tokens."""
    num_context: int
    """Tokens at the window's start that an earlier window holds too (`stride`); loss and perplexity leave them out."""
    num_document_tokens: int
    """Tokens of the whole document."""
    num_layers: int
    """Number of transformer blocks."""
    words: list[Word]
    """Gold words (ud_ewt); empty for other sources."""
    labels: list[str]
    """Gold labels by name (go_emotions); empty for other sources."""
    question: str | None
    """The question (csqa); null for other sources."""
    answer: str | None
    """The right answer's text (csqa); null where it is not known, and for other sources."""
    next_pos: list[int]
    """Position t of each entry; the token predicted is the one at t+1."""
    next_true_id: list[int]
    """Id of the token that follows."""
    next_pred_id: list[int]
    """Id of the token that the model holds for most likely."""
    next_correct: list[bool]
    """Whether they are the same."""
    next_true_prob: list[float]
    """Probability of the token that follows."""
    next_true_logprob: list[float]
    """Its log-probability, nats."""
    next_pred_prob: list[float]
    """Probability of the most likely token."""
    next_entropy: list[float]
    """Entropy of the next-token distribution, nats."""
    next_topk_ids: list[list[int]]
    """The k most likely tokens, best first (`--topk`)."""
    next_topk_tokens: list[list[str]]
    """The same as the tokenizer writes them."""
    next_topk_probs: list[list[float]]
    """Their probabilities."""
    num_scored: int
    """Entries that loss and perplexity are over: those that predict a token past `num_context`."""
    loss: float | None
    """Mean negative log-probability of the scored tokens, nats; null where none is scored."""
    perplexity: float | None
    """exp(loss); null where none is scored, or where it is beyond a float."""
