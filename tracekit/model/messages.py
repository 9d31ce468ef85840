"""Messages: a conversation as clients send it and logs keep it in, texts with roles out.

    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}   ->  system, "Be brief."
    {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}         ->  assistant, "So."; reasoning "Hm."

The server reads requests by it; tasks read logs by it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tracekit.records import Message

__all__ = [
    "REASONING_FIELDS",
    "ROLES",
    "MessageError",
    "MessageForm",
    "MessagePart",
    "conversation",
    "reasoning_of",
    "text_of",
]

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which servers give a model's reasoning beside its answer: vLLM's older and newer one, and Ollama's."""


ROLES = ("system", "developer", "user", "assistant")
"""Who may speak; `developer` is a newer name of `system`."""


class MessageError(ValueError):
    """A message that is more than text: the field, and what is wrong with it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


class MessagePart(msgspec.Struct, frozen=True):
    """One part of a message's content."""

    type: str
    """`text`; others are refused."""
    text: str | None = None
    """Its text."""


class MessageForm(msgspec.Struct, frozen=True):
    """One message as it is written."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who says it."""
    content: str | list[MessagePart] | None = None
    """A text, or parts of text."""
    tool_calls: list[Any] | None = None
    """Calls of tools, which are refused."""
    function_call: Any = None
    """The older form of a call."""
    reasoning_content: str | None = None
    """A model's reasoning, without its markers."""
    reasoning: str | None = None
    """The same under another name."""
    thinking: str | None = None
    """The same under a third name."""
    images: list[Any] | None = None
    """Pictures, as Ollama takes them; refused."""
    audio: Any = None
    """Sound, which is refused."""
    prefix: bool | None = None
    """Whether the answer is to go on with this message, as Mistral and DeepSeek call it; refused."""
    partial: bool | None = None
    """The same, as Qwen and Kimi call it."""
    refusal: str | None = None
    """A text in place of the content, of a model that declines."""


def conversation(forms: Sequence[MessageForm]) -> list[Message]:
    """The messages of a conversation that an assistant is to go on with.

    Raises:
        MessageError: a message is more than text, or has reasoning: what a chat template makes of the reasoning of
            earlier turns differs from server to server.
    """
    messages = []
    for number, form in enumerate(forms):
        where = f"messages[{number}]"
        if form.content is None and form.role != "assistant":
            raise MessageError(f"{where}.content", "is missing; expected a text")
        text = text_of(form, where)
        name = next((name for name in REASONING_FIELDS if getattr(form, name)), None)
        if name is not None:
            why = "reasoning of an earlier turn is not supported here; leave it out, as chat templates do"
            raise MessageError(f"{where}.{name}", why)
        begun = next((name for name in ("prefix", "partial") if getattr(form, name)), None)
        if begun is not None:
            raise MessageError(f"{where}.{begun}", "an answer that goes on with a message is not supported here")
        messages.append(Message(role="system" if form.role == "developer" else form.role, content=text))
    return messages


def text_of(form: MessageForm, where: str) -> str:
    """The text of a message, its parts joined by line feeds; `where` names the message in errors.

    Raises:
        MessageError: it calls a tool, or holds a picture or something else that is no text.
    """
    name = "tool_calls" if form.tool_calls else "function_call" if form.function_call else None
    if name is not None:
        raise MessageError(f"{where}.{name}", "calls of tools are not supported here")
    other = "images" if form.images else "audio" if form.audio else None
    if other is not None:
        raise MessageError(f"{where}.{other}", "only text is supported here; leave it out")
    if not isinstance(form.content, list):
        return form.content or ""
    for part in form.content:
        if part.type != "text" or part.text is None:
            why = f"content of type {part.type!r} is not supported here; expected parts of type 'text', with `text`"
            raise MessageError(f"{where}.content", why)
    return "\n".join(part.text or "" for part in form.content)


def reasoning_of(form: MessageForm, where: str) -> str | None:
    """The reasoning beside a message's content; None where there is none.

    Raises:
        MessageError: there are two that differ.
    """
    given = {name: getattr(form, name) for name in REASONING_FIELDS if getattr(form, name)}
    found = set(given.values())
    if len(found) > 1:
        first, second, *_ = given
        raise MessageError(f"{where}.{second}", f"differs from `{first}`; leave one of them")
    return found.pop() if found else None
