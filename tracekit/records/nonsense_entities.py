"""The record of the task nonsense_entities."""

from tracekit.records.base import Record, Summary

__all__ = ["NonsenseEntitiesRecord"]


class NonsenseEntitiesRecord(Record, frozen=True, kw_only=True, tag="nonsense_entities", forbid_unknown_fields=True):
    """One question about a thing that does not exist, and what the model made of it.

    Samples about one name share `question_id`. Whether the answer takes the thing for real is in label sets, not here.
    """

    question: str
    """The question, the name in it."""
    domain: str
    """What it would be: `animals`, `plants` or `medicines`."""
    name: str
    """The name."""
    made_of: list[str]
    """The real names that it is made of; of a real one that name alone."""
    name_group: str
    """Class, family or number of words within which it was made."""
    wording_id: str
    """Which wording the question has."""
    is_invented: bool
    """False for a real name, asked about as a control."""
    generated_text: str
    """Everything: prompt and generated tokens, special tokens included; `token_offsets` count in it."""
    generated_answer: str
    """The answer alone: no prompt, no reasoning, no special tokens."""
    generated_token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one."""
    num_layers: int
    """Number of transformer blocks."""
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each generated token, nats."""
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at max_new_tokens)."""
    is_truncated: bool
    """True where max_new_tokens ran out before the answer came to its end (a plain prompt's ends with its line)."""

    def summary(self) -> Summary:
        """Question and answer."""
        return Summary(self.question, self.generated_answer or "(no answer)", "")
