"""Answers from elsewhere: a serving engine's output, an API log, `generation.jsonl`, one JSON object a line.

    what        under                                            form
    prompt      messages                                         [{"role", "content"}, ...]: through the chat template
                question                                         the user's text alone: likewise, or as a plain question
                prompt                                           text as a model reads it, template applied
                prompt_token_ids                                 its ids
    answer      answer generation response output completion     text
                token_ids output_token_ids generated_token_ids   its ids
                outputs choices                                  [{"text" or "message", "token_ids", "finish_reason"}]
    ended       finish_reason                                    `stop`: it ended by itself; `length`: it was cut
    identity    id key custom_id question_id; model

A conversation that ends with the assistant's message holds its own answer. Ids are checked against the tokenizer, and
against the text where both are given.
"""

from typing import Any

import msgspec

from builders.sources import Row
from tracekit.errors import SourceError
from tracekit.records import Message
from tracekit.run.plan import Example

__all__ = ["AnswerExample", "parse_row"]

_ANSWERS = ("answer", "generation", "response", "output", "completion")
_IDS = ("token_ids", "output_token_ids", "generated_token_ids")
_NAMES = ("id", "key", "custom_id", "question_id")
_ROLES = ("system", "user", "assistant")


class AnswerExample(Example, frozen=True, kw_only=True):
    """A prompt, in one form or two, and the answer to it."""

    example_id: str
    """The source's id, else the row."""
    messages: tuple[Message, ...] = ()
    """The conversation."""
    question: str | None = None
    """The user's text."""
    prompt: str | None = None
    """The prompt as the model read it."""
    prompt_token_ids: list[int] | None = None
    """Its ids."""
    answer: str | None = None
    """The answer."""
    token_ids: list[int] | None = None
    """Its ids."""
    finish_reason: str = "unknown"
    """How it ended."""
    model: str | None = None
    """Who wrote it."""


def parse_row(row: Row) -> AnswerExample:
    """A row as an example.

    Raises:
        SourceError: there is no prompt or no answer, several of one, or one of another type.
    """
    data = row.data
    only = _only(data)
    messages, said = _messages(data.get("messages"))
    answer = _text(only, (*_ANSWERS, "text")) if only else _text(data, _ANSWERS)
    if answer is None and only:
        answer = _message_text(only.get("message"))
    token_ids = _ids(only or data, _IDS)
    if said is not None and (answer is not None or token_ids is not None):
        raise SourceError("two answers: the conversation ends with the assistant's, and there is another beside it")
    answer = said if said is not None else answer
    question, prompt = _text(data, ("question",)), _text(data, ("prompt",))
    prompt_ids = _ids(data, ("prompt_token_ids",))
    given = [name for name, value in (("messages", messages), ("question", question), ("prompt", prompt)) if value]
    if len(given) > 1:
        raise SourceError(f"two prompts: {' and '.join(map(repr, given))}; give one of them")
    if not given and not prompt_ids:
        raise SourceError(
            f"no prompt; expected 'messages', 'question', 'prompt' or 'prompt_token_ids'; columns: {', '.join(data)}"
        )
    if not answer and not token_ids:
        raise SourceError(
            f"no answer; expected a text in {', '.join(map(repr, _ANSWERS))}, ids in {', '.join(map(repr, _IDS))}, "
            f"'outputs' or 'choices'; columns: {', '.join(data)}"
        )
    reason = (only or data).get("finish_reason") or data.get("finish_reason")
    model = data.get("model")
    identity = next((data[name] for name in _NAMES if data.get(name) not in (None, "")), row.index)
    return AnswerExample(
        index=row.index,
        example_id=str(identity),
        messages=tuple(messages),
        question=question,
        prompt=prompt,
        prompt_token_ids=prompt_ids,
        answer=answer,
        token_ids=token_ids,
        finish_reason=reason if isinstance(reason, str) else "unknown",
        model=model if isinstance(model, str) else None,
    )


def _only(data: dict[str, Any]) -> dict[str, Any] | None:
    """The one answer of a list of answers."""
    name = next((name for name in ("outputs", "choices") if name in data), None)
    if name is None:
        return None
    listed = data[name]
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
        count = len(listed) if isinstance(listed, list) else f"a {type(listed).__name__} of"
        raise SourceError(f"{name!r} holds {count} answers; expected a list of one object: write a row for each answer")
    return listed[0]


def _messages(value: Any) -> tuple[list[Message], str | None]:
    """The conversation, and its last message where that is the assistant's."""
    if value is None:
        return [], None
    try:
        messages = msgspec.convert(
            [{"role": one.get("role"), "content": one.get("content")} for one in value], list[Message]
        )
    except (msgspec.ValidationError, AttributeError, TypeError) as error:
        raise SourceError(f"'messages' is no list of {{'role', 'content'}} with texts: {error}") from error
    others = [one.role for one in messages if one.role not in _ROLES]
    if others or not messages:
        raise SourceError(f"'messages': role {others[0]!r}, expected {', '.join(_ROLES)}" if others else "no message")
    if messages[-1].role == "assistant":
        return messages[:-1], messages[-1].content
    return messages, None


def _message_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) and isinstance(value.get("content"), str) else None


def _text(data: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The text under one of these names.

    Raises:
        SourceError: what is there is no text, or there are several.
    """
    found = {name: data[name] for name in names if data.get(name) is not None}
    if len(found) > 1:
        raise SourceError(f"several texts: {', '.join(map(repr, found))}; leave one")
    for name, value in found.items():
        if not isinstance(value, str):
            raise SourceError(f"{name!r} is no text: {str(value)[:80]!r}")
        return value
    return None


def _ids(data: dict[str, Any], names: tuple[str, ...]) -> list[int] | None:
    """The ids under one of these names."""
    for name in names:
        value = data.get(name)
        if value is not None:
            try:
                return msgspec.convert(value, list[int])
            except msgspec.ValidationError as error:
                raise SourceError(f"{name!r} are no token ids: {error}") from error
    return None
