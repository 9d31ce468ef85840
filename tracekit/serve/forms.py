"""Requests: bytes of a body in, what is asked out, or an error that says which parameter is wrong and why.

The forms are those of OpenAI's API. A parameter is taken, is known to change no answer, or has a value that changes
none. Any other is refused by name: the answer might not be the one that was asked for.
"""

import re
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from tracekit.errors import UNREADABLE
from tracekit.model.messages import MessageError, MessageForm, conversation
from tracekit.records import Message

__all__ = ["Asked", "RequestError", "parse_chat", "parse_completion"]

_GREEDY_BELOW = 0.01
"""Temperatures under this are greedy: scores divided by them overflow, and clients mean greedy by them."""
_MAX_NAME = 64
"""Characters of an unknown parameter's name that are repeated."""
_COMPLETION_TOKENS = 16
"""What OpenAI's API gives a completion that asks for no number."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "moderation": (),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "max_new_tokens": (),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "allowed_token_ids": ([],),
    "no_repeat_ngram_size": (0,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_a": (0,),
    "tfs": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "prompt_embeds": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "return_hidden_states": (False,),
    "repeat_penalty": (1,),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "prompt_logprobs": (),
    "lora_path": (),
}
"""Parameters that change an answer in ways that this server has not, those of other servers among them (vLLM, SGLang,
llama.cpp), and the values of each that change nothing."""


_HARMLESS = frozenset(
    {
        # OpenAI
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
        # vLLM, SGLang, llama.cpp, Ollama
        "cache_prompt",
        "cache_salt",
        "id_slot",
        "keep_alive",
        "priority",
        "request_id",
        "rid",
    }
)
"""Parameters that clients send and that change no answer, whatever their value: who asks, how it is billed, cached and
scheduled. `parallel_tool_calls` says nothing without tools."""


class RequestError(Exception):
    """A request that is refused: status, and what OpenAI's error form says of it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.retry_after = message, status, param, code, retry_after


class Asked(NamedTuple):
    """What a request asks for, checked."""

    endpoint: Literal["chat", "completion"]
    model: str | None
    messages: list[Message]
    """The conversation; empty for a completion."""
    prompts: list[str | list[int]]
    """The prompts of a completion, texts or token ids; each is answered, and is a sample of its own."""
    max_new_tokens: int | None
    """None: as many as there may be."""
    max_tokens_param: str
    """What the client calls that number."""
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    seed: int | None
    stop: list[str]
    num_best: int | None
    """Most likely tokens that are to be told with every token; None where not even its own log-probability is."""
    is_streamed: bool
    wants_usage: bool
    """Whether a stream ends with its usage."""
    wants_token_ids: bool
    """Whether the reply is to hold the ids of prompt and answer."""
    is_logged: bool


class _StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Whether OpenAI pads its events; none are padded here."""
    continuous_usage_stats: Literal[False] | None = None
    """vLLM's usage in every event, which is not there."""


_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


_TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class _Form(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    store: bool | None = None
    return_token_ids: bool | None = None


class _ChatForm(_Form, frozen=True, kw_only=True):
    messages: Annotated[list[MessageForm], msgspec.Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    add_special_tokens: Literal[False] | None = None
    """The template writes them."""


class _CompletionForm(_Form, frozen=True, kw_only=True):
    prompt: str | Annotated[list[str | _TokenId | list[_TokenId]], msgspec.Meta(min_length=1)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    add_special_tokens: Literal[True] | None = None
    """The tokenizer adds them."""


def parse_chat(body: bytes) -> Asked:
    """The body of a request to /v1/chat/completions.

    Raises:
        RequestError: it is not JSON, a parameter is wrong, or one is not supported.
    """
    form = _convert(body, _ChatForm)
    if form.top_logprobs is not None and not form.logprobs:
        raise RequestError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    param = "max_tokens" if form.max_completion_tokens is None else "max_completion_tokens"
    return Asked(
        endpoint="chat",
        messages=_messages(form.messages),
        prompts=[],
        max_new_tokens=form.max_completion_tokens or form.max_tokens,
        max_tokens_param=param,
        num_best=(form.top_logprobs or 0) if form.logprobs else None,
        **_common(form),
    )


def parse_completion(body: bytes) -> Asked:
    """The body of a request to /v1/completions.

    Raises: as `parse_chat`.
    """
    form = _convert(body, _CompletionForm)
    return Asked(
        endpoint="completion",
        messages=[],
        prompts=_prompts(form.prompt),
        max_new_tokens=form.max_tokens or _COMPLETION_TOKENS,
        max_tokens_param="max_tokens",
        num_best=form.logprobs,
        **_common(form),
    )


def _convert(body: bytes, form: type[Any]) -> Any:
    try:
        data = msgspec.json.decode(body)
    except UNREADABLE as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError(f"the body is JSON of a {type(data).__name__}, expected an object", code="invalid_json")
    known = {field.encode_name for field in msgspec.structs.fields(form)}
    for name, value in data.items():
        if value is not None and name not in known:
            _check_neutral(name, value)
    try:
        return msgspec.convert(data, form)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$\.([^`]+)`", str(error)) or re.search(r"missing required field `(\w+)`", str(error))
        why = str(error).partition(" - at `$")[0]
        message = f"`{found[1]}`: {why}" if found else why
        raise RequestError(message, param=found[1] if found else None, code="invalid_value") from error


def _check_neutral(name: str, value: Any) -> None:
    """Refuse a parameter that could change the answer."""
    neutral = _NEUTRAL.get(name, ())
    if name in _HARMLESS or value in neutral:
        return
    if name in _NEUTRAL:
        message = f"`{name}` is not supported here{f' but as {neutral[0]!r}' if neutral else ''}; leave it out"
    else:
        message = f"`{name[:_MAX_NAME]}` is no parameter that this server knows; leave it out"
    raise RequestError(message, param=name[:_MAX_NAME], code="unsupported_parameter")


def _common(form: _Form) -> dict[str, Any]:
    temperature = 1.0 if form.temperature is None else form.temperature
    options = form.stream_options
    if options is not None and not form.stream:
        raise RequestError("`stream_options` goes with `stream`: true", param="stream_options")
    stop = [form.stop] if isinstance(form.stop, str) else form.stop or []
    return {
        "model": form.model,
        "temperature": temperature if temperature >= _GREEDY_BELOW else 0.0,
        "top_p": form.top_p or 1.0,
        "top_k": max(form.top_k or 0, 0),
        "seed": form.seed,
        "stop": list(dict.fromkeys(stop)),
        "is_streamed": bool(form.stream),
        "wants_usage": bool(options and options.include_usage),
        "wants_token_ids": bool(form.return_token_ids),
        "is_logged": form.store is not False,
    }


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    """One text, one list of ids, or several of either."""
    if isinstance(given, str):
        return [given]
    kinds = {type(one) for one in given}
    if len(kinds) > 1:
        raise RequestError(
            "`prompt` mixes texts, token ids and lists of them; send one kind", param="prompt", code="invalid_value"
        )
    return [given] if kinds == {int} else given


def _messages(forms: list[MessageForm]) -> list[Message]:
    try:
        return conversation(forms)
    except MessageError as error:
        raise RequestError(error.message, param=error.field, code="unsupported_parameter") from error
