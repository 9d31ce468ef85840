"""The record of the task serve: one request that `tracekit serve` answered."""

from tracekit.records import Message, ResponseRecord

__all__ = ["ServeRecord"]


class ServeRecord(ResponseRecord, frozen=True, kw_only=True, tag="serve"):
    """One request, and the answer that the client received. Who asked, when, and how long it took are not in it.

    `seed` is the server's; where the client gave none, the draws of a sampled answer follow from it and the key.
    `question_id` is the SHA-256 of the prompt, so that equal requests stay on one side of a split.
    """

    endpoint: str
    """`chat` (/v1/chat/completions) or `completion` (/v1/completions)."""
    messages: list[Message]
    """The conversation (chat); empty for a completion, whose text is `prompt`."""
    generated_answer: str
    """The text that the client received: no special tokens, and nothing from a stop string on."""
    generated_token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one; those that make up a stop string too."""
    finish_reason: str
    """`stop` (end of sequence, or a stop string) or `length` (cut at the tokens asked for)."""
    stop_string: str | None
    """The stop string that ended the answer; null where none did."""
    stop: list[str]
    """The stop strings of the request."""
    request_seed: int | None
    """`seed` of the request; null where it had none."""
    is_streamed: bool
    """Whether the answer was sent token by token."""
    is_truncated: bool
    """True where the tokens asked for ran out before the answer came to its end."""
    shard: int
    """Number of the shard that holds the sample."""
