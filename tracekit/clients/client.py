"""Client: the interface of a model that is asked rather than traced, whatever runs it. Questions in, texts out."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec

__all__ = [
    "DEFAULT_SETTINGS",
    "ChatMessage",
    "Client",
    "ClientConfig",
    "OnReply",
    "Reply",
    "Request",
    "failed_reply",
    "ignore_reply",
]


class ClientConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models that write questions and judge answers are asked; nothing of it changes what they say."""

    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 8
    """Requests at a time to an endpoint; prompts a batch of a local model."""
    timeout: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """Seconds until a request to an endpoint counts as failed."""
    max_retries: Annotated[int, msgspec.Meta(ge=0)] = 5
    """Times a failed request to an endpoint is sent again, with growing pauses."""
    price_in: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Dollars per million tokens of prompts, for the cost that is printed; 0 prints none."""
    price_out: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Dollars per million tokens of replies, for the cost that is printed."""


DEFAULT_SETTINGS = ClientConfig()
"""How models are asked where nothing else is said."""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    """Who says it."""
    content: str
    """What is said."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question to a model. Equal requests to one model are asked once and answered from the cache after that."""

    messages: list[ChatMessage]
    """The chat so far, the user's message last."""
    max_new_tokens: int = 256
    """Longest reply, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Seed of what is drawn; also tells equal questions apart that are to be answered anew."""
    json_schema: dict[str, Any] | None = None
    """JSON Schema of the reply, for clients that can hold a model to it; others ignore it, so check replies."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What came back for one request."""

    text: str
    """The reply, special tokens left out; empty where `error` is set."""
    finish_reason: str
    """`stop`, `length`, or another word of the endpoint's."""
    num_input_tokens: int
    """Tokens of the prompt, as the model counts them."""
    num_output_tokens: int
    """Tokens of the reply."""
    error: str | None = None
    """Why there is no reply to this request, where others were answered (a content filter, a prompt too long)."""
    is_cached: bool = False
    """Whether the model was not asked, because it had been before."""


OnReply = Callable[[int, Reply], object]
"""Called with a request's place and its reply as soon as that is there."""


def ignore_reply(index: int, reply: Reply) -> None:
    """What is done with a reply where the caller waits for all of them: nothing."""


def failed_reply(why: str) -> Reply:
    """What stands where there is no reply."""
    return Reply(text="", finish_reason="error", num_input_tokens=0, num_output_tokens=0, error=why)


class Client(Protocol):
    """A model that can be asked."""

    name: str
    """Which model, and what runs it: `HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366`,
    `gpt-4o@https://api.openai.com/v1`. Stands in datasets, labels and keys of caches; no key, no local path."""

    def ask(self, requests: Sequence[Request], on_reply: OnReply = ...) -> list[Reply]:
        """Replies in the order of the requests.

        Raises:
            ClientError: nothing can be asked: no connection, no key, no such model. What was answered is in the cache.
        """
        ...

    def close(self) -> None:
        """Let go of the model or the connections."""
        ...
