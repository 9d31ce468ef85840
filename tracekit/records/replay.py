"""The record of the task replay: an answer that was written elsewhere, run through the model again to be traced."""

from tracekit.records.base import Record, Summary
from tracekit.records.serve import Message

__all__ = ["ReplayRecord"]


class ReplayRecord(Record, frozen=True, kw_only=True, tag="replay", forbid_unknown_fields=True):
    """A prompt and an answer from elsewhere, as the model of this dataset reads them.

    `generation` says what is not known here: nothing was generated. Its `max_new_tokens` is 0.
    """

    messages: list[Message]
    """The conversation; empty where the prompt was given as text or ids."""
    question: str | None
    """The question, where the prompt was made of one."""
    generated_text: str
    """Everything: prompt and answer, special tokens included; `token_offsets` count in it."""
    generated_answer: str
    """The answer alone: no prompt, no reasoning, no special tokens."""
    generated_token_ids: list[int]
    """Ids of the answer, end-of-sequence included where it ended by itself."""
    are_prompt_ids_given: bool
    """Whether the source gave the prompt's ids; else the text was tokenised here."""
    are_answer_ids_given: bool
    """Whether the source gave the answer's ids; else the text was tokenised here, perhaps into other tokens than the
    engine had generated."""
    source_model: str | None
    """The model that wrote the answer, as the source calls it; null where it does not."""
    token_logprobs: list[float]
    """Log-probability of each token of the answer under the raw model of this dataset, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each of them, nats."""
    finish_reason: str
    """`stop`, `length`, another word of the source's, or `unknown`."""
    is_truncated: bool
    """True where the source says that the answer was cut (`length`)."""
    num_layers: int
    """Number of transformer blocks."""

    def summary(self) -> Summary:
        """What was asked, and the answer."""
        asked = self.messages[-1].content if self.messages else self.question or self.prompt
        return Summary(asked, self.generated_answer or "(no answer)", "")
