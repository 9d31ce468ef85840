"""Admission: what is asked in, a prompt and how it is to be decoded out, or a refusal."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from tracekit.config import PromptConfig
from tracekit.errors import ConfigError
from tracekit.model.answers import prompt_of_ids
from tracekit.model.generation import Decoding
from tracekit.model.prompts import Prompt, Prompter
from tracekit.model.vocabulary import check_rows
from tracekit.serve.forms import Asked, RequestError

__all__ = ["Admission", "Limits"]


class Limits(NamedTuple):
    """Most tokens of a request."""

    num_positions: int | None
    """Of prompt and answer together; None where the model has no limit."""
    num_new: int
    """Of the answer."""


class Admission:
    """Renders and checks requests. It has a tokenizer of its own: the engine's is used by another thread."""

    def __init__(
        self, tokenizer: Any, config: PromptConfig, limits: Limits, names: Sequence[str], *, seed: int
    ) -> None:
        self._prompter = Prompter(tokenizer, config, default_system="")
        self._tokenizer = tokenizer
        self._limits, self._names, self._seed = limits, names, seed
        self._lock = threading.Lock()

    def prompts(self, asked: Asked) -> list[Prompt]:
        """The prompts of a request, one where it is a chat.

        Raises:
            RequestError: another model is asked for, the messages do not go through the chat template, or a token id
                is not in the vocabulary.
        """
        if asked.model is not None and asked.model not in self._names:
            raise RequestError(
                f"no model {asked.model!r} here; this server has {self._names[0]!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        param = "messages" if asked.endpoint == "chat" else "prompt"
        try:
            with self._lock:
                if asked.endpoint == "chat":
                    prompts = [self._prompter.conversation([msgspec.to_builtins(one) for one in asked.messages])]
                else:
                    prompts = [self._completion(one) for one in asked.prompts]
        except ConfigError as error:
            code = "chat_template" if asked.endpoint == "chat" else "invalid_value"
            raise RequestError(str(error), param=param, code=code) from error
        if not all(prompt.token_ids for prompt in prompts):
            raise RequestError("the prompt is empty", param=param, code="invalid_value")
        return prompts

    def _completion(self, given: str | list[int]) -> Prompt:
        if isinstance(given, str):
            return self._prompter.plain(given)
        check_rows(self._tokenizer, given)
        return prompt_of_ids(self._tokenizer, given)

    def decoding(self, asked: Asked, prompt: Prompt, key: str) -> Decoding:
        """How a request is decoded; `key` seeds the draws where the client gave no seed.

        Raises:
            RequestError: more tokens are asked for than there may be.
        """
        wanted, length, limits = asked.max_new_tokens, len(prompt.token_ids), self._limits
        if wanted is not None and wanted > limits.num_new:
            raise RequestError(
                f"`{asked.max_tokens_param}` is {wanted}, this server gives {limits.num_new} at most "
                "(--limit-new-tokens)",
                param=asked.max_tokens_param,
                code="invalid_value",
            )
        room = limits.num_new if limits.num_positions is None else limits.num_positions - length
        if room < (wanted or 1):
            raise RequestError(
                f"the prompt has {length} tokens and {wanted or 1} more are asked for; there is room for "
                f"{limits.num_positions} together",
                param="messages" if asked.endpoint == "chat" else "prompt",
                code="context_length_exceeded",
            )
        return Decoding(
            max_new_tokens=min(limits.num_new, room) if wanted is None else wanted,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=f"{self._seed} {key}" if asked.seed is None else str(asked.seed),
            num_best=asked.num_best,
        )
