"""Records of tasks in which a model answers a prompt."""

import msgspec

from tracekit.records.base import Record

__all__ = ["AnsweredRecord", "ResponseRecord", "SampledAnswer"]


class ResponseRecord(Record, frozen=True, kw_only=True):
    """A prompt, and what a model wrote."""

    generated_text: str
    """Everything: prompt and generated tokens, special tokens included; `token_offsets` count in it."""
    generated_answer: str
    """The answer alone: no prompt, no reasoning, no special tokens."""
    generated_token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one."""
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each generated token, nats."""
    finish_reason: str
    """`stop` (the answer ended by itself) or `length` (cut at max_new_tokens)."""
    is_truncated: bool
    """True where max_new_tokens ran out before the answer came to its end (a plain prompt's ends with its line)."""
    num_layers: int
    """Number of transformer blocks."""


class SampledAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One more answer to the same question, drawn by sampling."""

    sample_index: int
    """1, 2, ...; 0 is the deterministic answer of the record itself."""
    text: str
    """The answer, cleaned as `generated_answer` is."""
    token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one."""
    token_logprobs: list[float]
    """Log-probability of each under the raw model (no temperature), nats."""
    finish_reason: str
    """`stop` or `length`."""
    is_correct: bool | None = None
    """By the same rule as the record's own answer; null where the task judges none."""


class AnsweredRecord(ResponseRecord, frozen=True, kw_only=True):
    """A question that `tracekit.answering` asked, and the model's answer: what a task of your own inherits from."""

    beam_score: float | None = None
    """Score of the winning beam, transformers' `sequences_scores`: summed log-probability divided by the number of
    generated tokens, nats; null without beams."""
    samples: list[SampledAnswer] = []  # noqa: RUF012 - msgspec copies it
    """Further answers, from num_samples > 1; empty otherwise."""
