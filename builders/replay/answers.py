"""Answers from elsewhere: a serving engine's output, an API log, `generation.jsonl`, one JSON object a line.

    what        under                                            form
    prompt      messages                                         [{"role", "content"}, ...]: through the chat template
                question                                         the user's text alone: likewise, or as a plain question
                question choices (options)                       CommonsenseQA's, nested or not: with its options
                prompt                                           text as a model reads it, template applied
                prompt_token_ids                                 its ids
    answer      answer generation response output completion     text, or the assistant's message, in a list or not
                token_ids output_token_ids generated_token_ids   its ids
                outputs choices                                  [{"text" or "message", "token_ids", "finish_reason"}]
                reasoning_content reasoning thinking             what the model thought, without its markers
    ended       finish_reason, stop_reason and the like          builders/replay/endings.py
    identity    id key custom_id request_id question_id; model

A conversation that ends with the assistant's message holds its own answer. A log may keep the request under `request`
or `body` and the reply under `response` (Inspect: `output`), as lines of OpenAI's batch API do. A cell of a table may
hold messages, ids and logs as JSON. A record of this project is read by its ids. Ids are checked against the
tokenizer, and against the text where both are given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from builders.kit import csqa_questions
from builders.kit.cells import Cells
from builders.kit.sources import SourceRow
from builders.replay.endings import ending_of
from tracekit.errors import SourceError
from tracekit.model.messages import (
    REASONING_FIELDS,
    ROLES,
    MessageError,
    MessageForm,
    conversation,
    reasoning_of,
    text_of,
)
from tracekit.records import Message, Span
from tracekit.task import Example

__all__ = ["NAMES", "AnswerExample", "parse_row"]

_ANSWERS = ("answer", "generation", "response", "output", "completion")
_ASKED = ("question", "prompt")
_IDS = ("token_ids", "output_token_ids", "generated_token_ids")
_LISTS = ("outputs", "choices")
_BESIDE_PROMPT = ("suffix", "echo", "chat_template")
_OTHER_REASONING = ("reasoning_details", "thinking_blocks", "reasoning_text", "thoughts", *REASONING_FIELDS)
"""Names of reasoning; under the last it is read where it is a text."""
_BESIDE_MESSAGES = ("tools", "functions", "documents", "system", "system_prompt", "continue_final_message")
"""What changes the prompt of a conversation besides its messages: with OpenAI's, vLLM's and Anthropic's requests."""
_STRUCTURES = ("messages", "request", "body", "prompt_token_ids", *_IDS, *_LISTS)
"""What a table of texts holds as JSON."""
_PREDICTIONS = (
    "generated",
    "generated_answer",
    "generated_text",
    "model_answer",
    "model_output",
    "model_response",
    "pred",
    "predicted_answer",
    "prediction",
)
"""Names for what a model said, beside which `answer` is the right answer of a question."""
NAMES = ("id", "key", "custom_id", "request_id", "question_id")
_PROMPTS = "'messages', 'question', 'prompt' or 'prompt_token_ids', in the row or in a log's 'request' or 'body'"
_REPLIES = (
    f"a text in {', '.join(map(repr, _ANSWERS))}, ids in {', '.join(map(repr, _IDS))}, or one of them in "
    f"{' or '.join(map(repr, _LISTS))} (a list of one) or in a log's 'response'; or a last message of the assistant"
)
_CALLS = ("tool_calls", "function_call")


class AnswerExample(Example, frozen=True, kw_only=True):
    """A prompt, in one form or two, and the answer to it."""

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
    reasoning: str | None = None
    """What the model thought before it, where that is given apart."""
    token_ids: list[int] | None = None
    """Ids of everything that the model wrote."""
    finish_reason: str = "unknown"
    """How it ended."""
    stop: str | int | None = None
    """The stop string that ended it, or the id of the token that did; None where it is not said."""
    has_ended: bool = False
    """Whether the model ended its turn by itself: not cut, and not stopped by a string."""
    model: str | None = None
    """Who wrote it."""
    template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    """Variables that the request set in the chat template."""
    prompt_spans: list[Span] | None = None
    """Parts of the prompt, where a record of this project is read; None where they are not known."""

    @property
    def text(self) -> str:
        """The user's texts, the prompt and the answer; a template may leave out what the assistant said before."""
        asked = (one.content for one in self.messages if one.role == "user")
        return "\n".join(one for one in (*asked, self.question, self.prompt, self.answer) if one)


def parse_row(row: SourceRow) -> AnswerExample:
    """A row as an example.

    Raises:
        SourceError: there is no prompt or no answer, several of one, or one of another type.
    """
    texts = {name: value for name, value in row.data.items() if not isinstance(value, bytes)}  # a record's checksums
    cells = Cells(row._replace(data=texts), {"id": NAMES})
    data = _structured(row, cells)
    request, reply = _sides(data)
    only = _only(reply)
    holder = _with_message(reply if only is None else only)
    if "prompt_length" in data:
        prompt, answer = _of_record(data)
    else:
        prompt, said = _prompt(row, request, reply, holder)
        answer = _answer(holder, (*_ANSWERS, "text") if only else _ANSWERS)
        if said is not None and any(answer.values()) and said["answer"] != answer["answer"]:
            raise SourceError("two answers: the conversation ends with the assistant's, and there is another beside it")
        answer = answer if any(answer.values()) else said or answer
    if not any(answer.values()):
        raise SourceError(
            f"no answer; expected {_REPLIES}; the prompt goes into {_PROMPTS}; columns: {', '.join(data)}"
        )
    ending = ending_of(request, reply, holder)
    if ending.reason in _CALLS and not answer.get("token_ids"):
        raise SourceError(f"finish_reason is {ending.reason!r}: calls of tools are no text; give 'token_ids'")
    return AnswerExample(
        index=row.index,
        example_id=cells.identity(),
        model=_model(reply) or _model(request),
        template_kwargs=_template_kwargs(request, prompt),
        **prompt,
        **answer,
        finish_reason=ending.reason,
        stop=ending.stop,
        has_ended=ending.is_own,
    )


def _structured(row: SourceRow, cells: Cells) -> dict[str, Any]:
    """The columns: messages, ids and logs out of the texts that hold them, and a model's texts as they stand.

    Raises:
        SourceError: such a text cannot be read.
    """
    texts = {name: value for name, value in row.data.items() if isinstance(value, str) and cells.data[name] is not None}
    data = cells.data | {name: texts[name] for name in (*_ANSWERS, *_ASKED, *REASONING_FIELDS) if name in texts}
    data |= {name: cells.structure(name, data[name]) for name in _STRUCTURES if name in data}
    log = data.get("response")
    if isinstance(log, str) and log.lstrip().startswith("{") and '"choices"' in log and '"message"' in log:
        data["response"] = cells.structure("response", log)
    return data


def _with_message(holder: dict[str, Any]) -> dict[str, Any]:
    """A reply whose answer is a message, as TRL and pipelines of transformers write it, with the message in its place.

    Raises:
        SourceError: there are several messages.
    """
    for name in _ANSWERS:
        value = holder.get(name)
        listed = value if isinstance(value, list) else [value]
        messages = [one for one in listed if isinstance(one, dict) and "role" in one]
        if not messages:
            continue
        if len(listed) > 1 or messages[0]["role"] != "assistant":
            raise SourceError(f"{name!r} holds {len(listed)} messages; expected one, of the assistant")
        return {key: one for key, one in holder.items() if key != name} | messages[0] | {"message": messages[0]}
    return holder


def _sides(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was asked, and what came back: two objects of a log, or the row itself."""
    error = data.get("error")
    logs = [data[name] for name in ("response", "output") if isinstance(data.get(name), dict)]
    response = next((one for one in logs if "role" not in one), None)
    status = 200 if response is None else response.get("status_code", 200)
    if (error and isinstance(error, dict | str)) or status != 200:
        raise SourceError(f"the request failed ({str(error or f'status {status}')[:80]}); leave the row out")
    asked = next((data[name] for name in ("request", "body") if isinstance(data.get(name), dict)), {})
    request = data | _inner(asked)
    further = request.get("extra_body")  # of a call of OpenAI's client
    request |= further if isinstance(further, dict) else {}
    return request, (data if response is None else _inner(response))


def _inner(value: dict[str, Any]) -> dict[str, Any]:
    """The body of a request or reply, which the batch API puts into an envelope."""
    return value["body"] if isinstance(value.get("body"), dict) else value


def _of_record(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prompt and answer of a record of this project: its ids, cut where the prompt ends."""
    whole, length = _ids(data, ("token_ids",)), data["prompt_length"]
    if not whole or not isinstance(length, int) or not 0 < length < len(whole):
        raise SourceError(
            f"'prompt_length' is {length!r}: expected a number of the prompt's tokens in 'token_ids', which then holds "
            f"prompt and answer ({len(whole or [])} ids here)"
        )
    try:
        spans = msgspec.convert(data.get("spans"), list[Span] | None)
    except msgspec.ValidationError as error:
        raise SourceError(f"'spans' are not those of a record: {error}") from error
    inside = None if spans is None else [one for one in spans if 0 <= one.start < one.stop <= length]
    return {"prompt_token_ids": whole[:length], "prompt_spans": inside}, {"token_ids": whole[length:]}


def _prompt(
    row: SourceRow, request: dict[str, Any], reply: dict[str, Any], holder: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The prompt in every form that there is, and the answer that ends its conversation."""
    messages, prompt = request.get("messages"), request.get("prompt")
    ids = next((found for side in (holder, reply, request) if (found := _ids(side, ("prompt_token_ids",)))), None)
    if isinstance(prompt, list):  # as clients send one: messages, a text, or ids
        kinds = {type(one) for one in prompt}
        if kinds == {dict} and messages is None:
            messages, prompt = prompt, None
        elif kinds == {int}:
            ids, prompt = ids or prompt, None
        elif kinds == {str} and len(prompt) == 1:
            prompt = prompt[0]
    forms = _messages(messages)
    question = _question(row, request, has_other=bool(forms or prompt))
    texts = {"question": question, "prompt": _text_in("prompt", prompt)}
    given = [name for name, value in ({"messages": forms} | texts).items() if value]
    if len(given) > 1:
        raise SourceError(f"two prompts: {' and '.join(map(repr, given))}; give one of them")
    if not given and not ids:
        raise SourceError(f"no prompt; expected {_PROMPTS}; the answer is {_REPLIES}; columns: {', '.join(row.data)}")
    last = forms.pop() if forms and forms[-1].role == "assistant" else None
    if last is not None and not forms:
        raise SourceError("'messages' holds an answer and nothing before it; expected the user's message in front")
    said = None if last is None else _said(last, f"messages[{len(forms)}]", has_ids=False)
    try:
        return {**texts, "messages": tuple(conversation(forms)), "prompt_token_ids": ids}, said
    except MessageError as error:
        raise SourceError(str(error)) from error


def _template_kwargs(request: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    """What the request set in the chat template.

    Raises:
        SourceError: it put more into the prompt than its messages say, and the ids of the prompt are not given.
    """
    if prompt.get("prompt_token_ids") is not None:
        return {}
    is_chat = bool(prompt.get("messages") or prompt.get("question"))
    beside = (*_BESIDE_PROMPT, *_BESIDE_MESSAGES) if is_chat else _BESIDE_PROMPT
    more = next((name for name in beside if request.get(name)), None)
    if more is not None:
        raise SourceError(
            f"{more!r} stands beside the prompt, and is no part of it here; give 'prompt_token_ids', or all of the "
            "prompt in 'messages'"
        )
    given = request.get("chat_template_kwargs")
    return given if is_chat and isinstance(given, dict) else {}


def _question(row: SourceRow, request: dict[str, Any], *, has_other: bool) -> str | None:
    """The question; of a row of CommonsenseQA with its options, where no other prompt is given."""
    question = request.get("question")
    has_options = any(_are_options(request.get(name)) for name in ("choices", "options"))
    if not isinstance(question, dict) and not (has_options and question):
        return _text(request, ("question",))
    if has_other:
        return None
    asked = {name: value for name, value in request.items() if name not in (*_ANSWERS, "answerKey")}
    found = csqa_questions.parse_row(row._replace(data=asked))
    return csqa_questions.with_options(found.question, found.choices)


def _are_options(choices: Any) -> bool:
    """Whether `choices` are the options of a question, and no answers of an API."""
    listed = choices if isinstance(choices, list) else []
    is_labelled = bool(listed) and all(
        isinstance(one, str) or (isinstance(one, dict) and "label" in one) for one in listed
    )
    return is_labelled or isinstance(choices, dict)


def _messages(value: Any) -> list[MessageForm]:
    """The messages of a conversation."""
    if value is None:
        return []
    roles = [one["role"] for one in value if isinstance(one, dict) and "role" in one]
    if others := [role for role in roles if role not in ROLES]:
        raise SourceError(f"'messages': role {others[0]!r}, expected {', '.join(ROLES)}")
    try:
        forms = msgspec.convert(value, list[MessageForm])
    except msgspec.ValidationError as error:
        raise SourceError(f"'messages' is no list of {{'role', 'content'}} with texts: {error}") from error
    if not forms:
        raise SourceError("'messages' holds no message")
    return forms


def _answer(holder: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Text, reasoning and ids of the answer."""
    try:
        form = msgspec.convert({"role": "assistant"} | (holder.get("message") or {}), MessageForm)
    except (msgspec.ValidationError, TypeError) as error:
        raise SourceError(f"'message' is no message with a text: {error}") from error
    ids, text = _ids(holder, _IDS), _text(holder, names)
    other = next((name for name in _PREDICTIONS if isinstance(holder.get(name), str)), None)
    if other is not None and "answer" in names and holder.get("answer") is not None:
        raise SourceError(f"two answers: 'answer' and {other!r}; leave what the model said, under 'answer'")
    said = _said(form, "message", has_ids=ids is not None)
    beside = {holder[name] for name in REASONING_FIELDS if isinstance(holder.get(name), str) and holder[name]}
    if len(beside) > 1:
        raise SourceError(f"several texts in {', '.join(map(repr, REASONING_FIELDS))} differ; leave one")
    reasoning = said["reasoning"] or (beside.pop() if beside else None)
    if reasoning is None and ids is None:
        _check_reasoning(holder, holder.get("message") or {})
    return {"answer": said["answer"] if text is None else text, "reasoning": reasoning, "token_ids": ids}


def _check_reasoning(*sides: Mapping[str, Any]) -> None:
    """Refuse reasoning that is not put back: it stands in another form than a text, or under another name."""
    for side in sides:
        name = next((name for name in _OTHER_REASONING if isinstance(side.get(name), str | list) and side[name]), None)
        if name is not None:
            raise SourceError(
                f"{name!r} holds reasoning in a form that is not read here; give it as a text in "
                f"{' or '.join(map(repr, REASONING_FIELDS))}, or give 'token_ids'"
            )


def _said(form: MessageForm, where: str, *, has_ids: bool) -> dict[str, Any]:
    """Text and reasoning of an assistant's message. A call of a tool is passed over where ids tell what was written."""
    try:
        is_call = bool(form.tool_calls or form.function_call)
        text = None if has_ids and is_call else text_of(form, where) or form.refusal
        return {"answer": text, "reasoning": reasoning_of(form, where)}
    except MessageError as error:
        raise SourceError(str(error)) from error


def _only(reply: dict[str, Any]) -> dict[str, Any] | None:
    """The one answer of a list of answers."""
    for name in _LISTS:
        listed = reply.get(name)
        if listed is None or (name == "choices" and _are_options(listed)):
            continue
        if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
            count = len(listed) if isinstance(listed, list) else f"a {type(listed).__name__} of"
            raise SourceError(
                f"{name!r} holds {count} answers; expected a list of one object: write a row for each answer"
            )
        return listed[0]
    return None


def _model(data: Mapping[str, Any]) -> str | None:
    """Who wrote the answer; a record of this project says more of it than its name."""
    model = data.get("model")
    name = model.get("id") if isinstance(model, dict) else model
    return name if isinstance(name, str) else None


def _text(data: dict[str, Any], names: Sequence[str]) -> str | None:
    """The text under one of these names.

    Raises:
        SourceError: what is there is no text, or there are several.
    """
    found = {name: data[name] for name in names if data.get(name) is not None and not _is_log(name, data[name])}
    if len(found) > 1:
        raise SourceError(f"several texts: {', '.join(map(repr, found))}; leave one")
    return next((_text_in(name, value) for name, value in found.items()), None)


def _is_log(name: str, value: Any) -> bool:
    """Whether what stands under a name is a whole reply, and no text."""
    return name == "response" and isinstance(value, dict)


def _text_in(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise SourceError(f"{name!r} is no text: {str(value)[:80]!r}")
    return value


def _ids(data: Mapping[str, Any], names: Sequence[str]) -> list[int] | None:
    """The ids under one of these names.

    Raises:
        SourceError: what is there are no ids, or there are several that differ.
    """
    found = {name: data[name] for name in names if data.get(name) is not None}
    if len(found) > 1:
        raise SourceError(f"several lists of ids: {', '.join(map(repr, found))}; leave one")
    for name, value in found.items():
        try:
            return msgspec.convert(value, list[int])
        except msgspec.ValidationError as error:
            raise SourceError(f"{name!r} are no token ids: {error}") from error
    return None
