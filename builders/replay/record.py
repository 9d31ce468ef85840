"""The record of the task replay: an answer that was written elsewhere, run through the model again to be traced."""

from tracekit.records import Message, ResponseRecord

__all__ = ["ReplayRecord"]


class ReplayRecord(ResponseRecord, frozen=True, kw_only=True, tag="replay"):
    """A prompt and an answer from elsewhere, as the model of this dataset reads them.

    `generation` says what is not known here: nothing was generated. Its `max_new_tokens` is 0.
    """

    messages: list[Message]
    """The conversation; empty where the prompt was given as text or ids."""
    question: str | None
    """The question, where the prompt was made of one."""
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
    finish_reason: str
    """`stop`, `length`, another word of the source's, or `unknown`."""
    is_truncated: bool
    """True where the source says that the answer was cut (`length`)."""
