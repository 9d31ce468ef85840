"""The record of the task trivia_qa."""

import msgspec

from tracekit.records.base import Record, Summary

__all__ = ["SampledAnswer", "TriviaQARecord"]


class SampledAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    is_correct: bool
    """By the same rule as the record's `is_correct`."""


class TriviaQARecord(Record, frozen=True, kw_only=True, tag="trivia_qa", forbid_unknown_fields=True):
    """One question, one answer, and whether it is right."""

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
    """Every accepted answer; the first is the source's main one."""
    global_example_id: int
    """Row of the example in the source, counted from 0."""
    shard: int
    """Number of the shard that holds the sample."""
    index_in_shard: int
    """Place of the sample in its shard."""
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each generated token, nats."""
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at max_new_tokens)."""
    is_truncated: bool
    """True where max_new_tokens ran out before the answer came to its end (a plain prompt's ends with its line)."""
    beam_score: float | None
    """Score of the winning beam, transformers' `sequences_scores`: summed log-probability divided by the number of
    generated tokens, nats; null without beams."""
    matched_alias: str | None
    """The accepted answer that was found in the generated one; null where none was."""
    matched_alias_span: list[int] | None
    """`[start, stop)` tokens of that alias; null where none was found."""
    is_correct: bool
    """Whether the answer is right, by `correctness_rule`."""
    correctness_rule: str
    """`exact_match` (normalised, any alias) or `alias_in_answer`."""
    exact_match: bool
    """Normalised exact match with any alias (TriviaQA's normalisation)."""
    f1: float
    """Best token F1 over the aliases, 0 to 1."""
    samples: list[SampledAnswer]
    """Further answers, from num_samples > 1; empty otherwise."""

    def summary(self) -> Summary:
        """Question and answer."""
        missed = self.ground_truth_answers[:1] if not self.is_correct else []
        return Summary(self.question, self.generated_answer or "(no answer)", "".join(missed))
