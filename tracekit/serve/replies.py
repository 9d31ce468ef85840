"""Replies: what was answered in, bodies as OpenAI's API writes them out. Pure."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from tracekit.serve.forms import RequestError

__all__ = ["DONE", "HttpReply", "ReplyChoice", "TextPiece", "TokenUsage", "error_body", "event", "models_body"]

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


class TextPiece(NamedTuple):
    """One token as it is told of with log-probabilities."""

    token: str
    """What it adds to the text; empty for a special one, and for all but the last of those that make one character."""
    logprob: float
    """nats."""
    best: list[tuple[str, float]]
    """The most likely tokens in its place, best first."""
    start: int
    """Characters of the answer before it."""


class TokenUsage(NamedTuple):
    """Tokens of a request."""

    num_prompt: int
    num_new: int

    def body(self) -> dict[str, int]:
        """As the API writes it."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_new,
            "total_tokens": self.num_prompt + self.num_new,
        }


class ReplyChoice(NamedTuple):
    """One answer of a request."""

    text: str
    pieces: list[TextPiece]
    finish_reason: str
    stop_reason: str | None
    """The stop string that ended it."""
    usage: TokenUsage
    token_ids: list[int]
    """All of its tokens."""


class HttpReply:
    """The bodies of one reply: whole, or event by event; all of them have one id and one time.

    `prompts` are the ids of the prompts where the client wants ids (`return_token_ids`). All stand where vLLM has them:

        chat         prompt_token_ids beside `choices` (of a stream, in its first chunk), token_ids in each choice
        completion   both in each choice (of a stream, prompt_token_ids in each answer's first chunk)
    """

    def __init__(
        self,
        *,
        is_chat: bool,
        model: str,
        wants_logprobs: bool,
        wants_usage: bool,
        prompts: Sequence[list[int]] | None = None,
    ) -> None:
        self._is_chat, self._wants_logprobs, self._wants_usage = is_chat, wants_logprobs, wants_usage
        self._prompts, self._unsaid = prompts, set(range(len(prompts or ())))
        self._base = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, choices: Sequence[ReplyChoice]) -> dict[str, Any]:
        """The reply in one, an answer to each prompt."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        bodies = [self._choice(index, one) for index, one in enumerate(choices)]
        return {
            **self._base,
            "object": kind,
            **(self._prompt_ids(0) if self._is_chat else {}),
            "choices": bodies,
            "usage": _sum([one.usage for one in choices]).body(),
        }

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        if not self._is_chat:
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}) | self._prompt_ids(0)]

    def part(self, index: int, text: str, pieces: Sequence[TextPiece], token_ids: Sequence[int]) -> dict[str, Any]:
        """More of the text of an answer."""
        said = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return self._chunk(said | self._ids(index, token_ids), pieces, index=index)

    def end(self, index: int, finish_reason: str, stop_reason: str | None, token_ids: Sequence[int]) -> dict[str, Any]:
        """The end of an answer, with those of its tokens that added no text."""
        said = {"delta": {}} if self._is_chat else {"text": ""}
        said |= self._ids(index, token_ids) | {"stop_reason": stop_reason}
        return self._chunk(said, index=index, finish_reason=finish_reason)

    def last(self, usages: Sequence[TokenUsage]) -> list[dict[str, Any]]:
        """What a stream ends with, after the end of every answer."""
        if not self._wants_usage:
            return []
        return [{**self._base, "object": self._chunk_kind, "choices": [], "usage": _sum(usages).body()}]

    def _choice(self, index: int, one: ReplyChoice) -> dict[str, Any]:
        said: dict[str, Any] = {"text": one.text}
        if self._is_chat:
            said = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
        return {
            "index": index,
            **said,
            "logprobs": self._logprobs(one.pieces),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
            **self._ids(index, one.token_ids),
        }

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        """The ids of a prompt, where they are wanted and not said yet."""
        if self._prompts is None or index not in self._unsaid:
            return {}
        self._unsaid.remove(index)
        return {"prompt_token_ids": self._prompts[index]}

    def _ids(self, index: int, token_ids: Sequence[int]) -> dict[str, Any]:
        """What a choice says of ids, where they are wanted."""
        if self._prompts is None:
            return {}
        return {"token_ids": token_ids, **({} if self._is_chat else self._prompt_ids(index))}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _chunk(
        self,
        said: dict[str, Any],
        pieces: Sequence[TextPiece] = (),
        *,
        index: int = 0,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(pieces) if pieces else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._base, "object": self._chunk_kind, "choices": [choice], **usage}

    def _logprobs(self, pieces: Sequence[TextPiece]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        if self._is_chat:
            return {
                "content": [
                    {
                        **_token(piece.token, piece.logprob),
                        "top_logprobs": [_token(token, logprob) for token, logprob in piece.best],
                    }
                    for piece in pieces
                ],
                "refusal": None,
            }
        return {
            "tokens": [piece.token for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [dict(reversed(piece.best)) for piece in pieces],  # of equal texts the likelier
            "text_offset": [piece.start for piece in pieces],
        }


def _sum(usages: Sequence[TokenUsage]) -> TokenUsage:
    return TokenUsage(sum(one.num_prompt for one in usages), sum(one.num_new for one in usages))


def _token(token: str, logprob: float) -> dict[str, Any]:
    is_part = "\ufffd" in token  # of a character
    return {"token": token, "logprob": logprob, "bytes": None if is_part else list(token.encode())}


def event(body: dict[str, Any]) -> bytes:
    """A body as one event of a stream."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    """An error as the API writes it."""
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def models_body(names: Sequence[str], created: int) -> dict[str, Any]:
    """The list of models: one, under each of its names."""
    models = [{"id": name, "object": "model", "created": created, "owned_by": "tracekit"} for name in names]
    return {"object": "list", "data": models}
