"""The record of the task serve: one request that `tracekit serve` answered."""

from typing import ClassVar

import msgspec

from tracekit.records.base import Record, Summary

__all__ = ["Message", "ServeRecord"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: str
    """`system` (a client's `developer` too), `user` or `assistant`."""
    content: str
    """Its text; several parts of text are joined."""


class ServeRecord(Record, frozen=True, kw_only=True, tag="serve", forbid_unknown_fields=True):
    """One request, and the answer that the client received. Who asked, when, and how long it took are not in it.

    `seed` is the server's; where the client gave none, the draws of a sampled answer follow from it and the key.
    `question_id` is the SHA-256 of the prompt, so that equal requests stay on one side of a split.
    """

    DRAWN_ARE_EXTRA: ClassVar[bool] = False

    endpoint: str
    """`chat` (/v1/chat/completions) or `completion` (/v1/completions)."""
    messages: list[Message]
    """The conversation (chat); empty for a completion, whose text is `prompt`."""
    generated_text: str
    """Everything: prompt and generated tokens, special tokens included; `token_offsets` count in it."""
    generated_answer: str
    """The text that the client received: no special tokens, and nothing from a stop string on."""
    generated_token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one; those that make up a stop string too."""
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each generated token, nats."""
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
    num_layers: int
    """Number of transformer blocks."""

    def summary(self) -> Summary:
        """The last message, or the prompt, and the answer."""
        asked = self.messages[-1].content if self.messages else self.prompt
        return Summary(asked, self.generated_answer or "(no answer)", "")
