"""An OpenAI-compatible endpoint that is asked: OpenAI's own, vLLM, llama.cpp's server, and others.

    OPENAI_BASE_URL     where it is; https://api.openai.com/v1 by default
    OPENAI_API_KEY      its key; not needed for a server on this machine

The official client sends again what failed by chance (no connection, 408, 409, 429, 5xx), with growing pauses or the
one that the server asks for. What a server does not know of a request (a JSON schema, a seed, a temperature, the name
`max_tokens`) is left out or renamed once it says so, and that is said. Keys are in no name, message or log.
"""

import asyncio
import base64
import ipaddress
import os
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from tracekit.clients.client import DEFAULT_SETTINGS, ClientConfig, OnReply, Reply, Request, failed_reply, ignore_reply
from tracekit.console import say
from tracekit.errors import UNREADABLE, ClientError, ConfigError
from tracekit.model.answers import without_thinking

__all__ = ["EndpointClient"]

_DEFAULT_URL = "https://api.openai.com/v1"
_PROBE_SECONDS = 10.0
"""Longest wait for a sign of life before the first request."""
_MAX_SENDS = 6
"""Times a request is put in other words: one for each thing that a server may not know, and the last."""
_MAX_SAID = 300
"""Characters of an endpoint's own words in a message."""
_MIN_SECRET = 6
"""Characters from which on a key is one: `none` and an API's version are words like others."""
_DISPENSABLE = ("response_format", "seed", "temperature")
"""What is left out of requests to a server that does not know it."""
_SCHEMA_WORDS = ("response_format", "json_schema", "json schema", "grammar")


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _ReplyChoice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Tokens(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    """What is needed of a chat completion."""

    choices: list[_ReplyChoice]
    usage: _Tokens | None = None


class _Address(NamedTuple):
    """Where an endpoint is, and how one is let in."""

    url: str
    """What requests go to; no user name or password."""
    shown: str
    """What may be written down: no query either."""
    key: str
    headers: dict[str, str]
    """With the user name and password of the URL, if it had them."""
    secrets: tuple[str, ...]
    """What never appears in a message."""


class EndpointClient:
    """Asks a model at an endpoint, many requests at a time. Ctrl-C ends it at once.

    Raises:
        ClientError: the package `openai` is not installed; no key for an endpoint elsewhere.
        ConfigError: OPENAI_BASE_URL is no address.
    """

    def __init__(self, model: str, settings: ClientConfig = DEFAULT_SETTINGS) -> None:
        try:
            import openai
        except ImportError as error:
            raise ClientError(
                f"asking {model!r} at an endpoint needs the package openai, which is not installed. Run:\n"
                "    pip install 'tracekit-llm[endpoint]'"
            ) from error
        self._openai, self._model, self._settings = openai, model, settings
        self._address = _address()
        self._client = openai.AsyncOpenAI(
            base_url=self._address.url,
            api_key=self._address.key,
            default_headers=self._address.headers,
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )
        self._runner = asyncio.Runner()  # connections belong to its loop
        self._is_reached = self._takes_schema = self._has_noted_usage = False
        self._length_field = "max_tokens"
        self._dropped: set[str] = set()
        self._num_failed_in_a_row = 0
        self.name = f"{model}@{self._address.shown}"

    def ask(self, requests: Sequence[Request], on_reply: OnReply = ignore_reply) -> list[Reply]:
        """Replies in the order of the requests, `on_reply` called as they come.

        Raises:
            ClientError: no connection, no key or a wrong one, no such model, a limit, or nothing but failures.
        """
        return self._runner.run(self._ask(requests, on_reply)) if requests else []

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()

    async def _ask(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        if not self._is_reached:
            await self._reach()
        replies: dict[int, Reply] = {}
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for index, request in waiting:
                replies[index] = await self._answer(request)
                on_reply(index, replies[index])

        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._settings.concurrency, len(requests))):
                    group.create_task(work())
        except ExceptionGroup as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        return [replies[index] for index in range(len(requests))]

    async def _reach(self) -> None:
        """See that somebody answers, whatever: a server that is not there is no matter of patience."""
        probe = self._client.with_options(max_retries=0, timeout=min(_PROBE_SECONDS, self._settings.timeout))
        try:
            await probe.models.with_raw_response.list()
        except self._openai.APITimeoutError:
            return
        except self._openai.APIConnectionError as error:
            reason = self._shown(str(error.__cause__ or error))
        except self._openai.APIError:
            reason = None
        else:
            reason = None
        if reason is not None:
            raise ClientError(
                f"{self.name}: no connection ({reason}). Is the server running, and is OPENAI_BASE_URL right?"
            )
        self._is_reached = True

    async def _answer(self, request: Request) -> Reply:
        """The reply to one request, put in other words where the server does not know some."""
        left_out: set[str] = set()
        error: Any = None
        for _ in range(_MAX_SENDS):
            fields = self._fields(request, left_out)
            try:
                response = await self._client.chat.completions.with_raw_response.create(**fields)
            except self._openai.APIError as caught:
                error = caught
            else:
                if "response_format" in left_out - self._dropped:  # what was refused without a word was the schema
                    self._drop("response_format")
                self._takes_schema |= "response_format" in fields
                return self._reply(response.content)
            if getattr(error, "status_code", None) not in (400, 422) or not self._adapts(error, fields, left_out):
                break
        return self._failure(error)

    def _fields(self, request: Request, left_out: set[str]) -> dict[str, Any]:
        """A request as the endpoint takes it."""
        fields: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": one.role, "content": one.content} for one in request.messages],
            self._length_field: request.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.json_schema is not None:
            is_strict = request.json_schema.get("additionalProperties") is False  # what OpenAI asks of a strict one
            schema = {"name": "reply", "schema": request.json_schema, "strict": is_strict}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {name: value for name, value in fields.items() if name not in self._dropped | left_out}

    def _adapts(self, error: Any, fields: dict[str, Any], left_out: set[str]) -> bool:
        """Whether a refused request is worth sending again, without or with another name for what was refused."""
        said = f"{error.param} {_words(error)}" if error.param else _words(error)
        if "max_completion_tokens" in _words(error) and "max_tokens" in fields:
            if self._length_field == "max_tokens":
                say(f"{self.name} takes max_completion_tokens in place of max_tokens")
            self._length_field = "max_completion_tokens"
            return True
        for name in _DISPENSABLE:
            words = _SCHEMA_WORDS if name == "response_format" else (name,)
            if name in fields and any(word in (error.param or said).lower() for word in words):
                self._drop(name)
                return True
        if "response_format" in fields and not self._takes_schema:
            left_out.add("response_format")
            return True
        return False

    def _drop(self, name: str) -> None:
        if name not in self._dropped:
            what = {"response_format": "JSON schemas", "seed": "seeds", "temperature": "this temperature"}[name]
            say(f"{self.name} does not take {what}; going on without ({name})")
        self._dropped.add(name)

    def _reply(self, content: bytes) -> Reply:
        """What a response says."""
        try:
            completion = msgspec.json.decode(content, type=_Completion)
        except UNREADABLE as error:
            return self._failed(f"the endpoint's response is no chat completion: {error}")
        if not completion.choices:
            return self._failed("the endpoint's response holds no choices")
        choice, tokens = completion.choices[0], completion.usage
        if choice.finish_reason == "content_filter":
            return failed_reply("the endpoint's content filter held the reply back")
        self._num_failed_in_a_row = 0
        if tokens is None and not self._has_noted_usage:
            self._has_noted_usage = True
            say(f"{self.name} does not say how many tokens it used; they are counted as 0")
        return Reply(
            text=without_thinking(choice.message.content or choice.message.refusal or ""),
            finish_reason=choice.finish_reason or "stop",
            num_input_tokens=tokens.prompt_tokens if tokens else 0,
            num_output_tokens=tokens.completion_tokens if tokens else 0,
        )

    def _failure(self, error: Any) -> Reply:
        """A request that has no reply, or the end of all.

        Raises:
            ClientError: the next request would fare no better.
        """
        status, said = getattr(error, "status_code", None), self._shown(_words(error))
        num_sends = self._settings.max_retries + 1
        advice = {
            401: "Check OPENAI_API_KEY, and that it belongs to OPENAI_BASE_URL",
            402: "Check the account's credit",
            403: "Check that the key may use this model",
            404: "Check the model's name, and OPENAI_BASE_URL, which mostly ends in /v1",
            405: "Check OPENAI_BASE_URL, which mostly ends in /v1",
            429: f"It was asked {num_sends} times; ask fewer at a time, or check the account's limits",
        }.get(status or 0)
        if advice is not None:
            raise ClientError(f"{self.name}: HTTP {status}: {said}. {advice}. What was answered is kept; run again")
        if status is not None and status < 500:
            self._num_failed_in_a_row = 0
            return failed_reply(f"HTTP {status}: {said}")
        if isinstance(error, self._openai.APITimeoutError):
            return self._failed(f"no reply within {self._settings.timeout:g} s, sent {num_sends} times")
        if status is None:
            reason = self._shown(str(error.__cause__ or error))
            raise ClientError(
                f"{self.name}: the connection is lost ({reason}), tried {num_sends} times. What was answered is kept; "
                "run again when the server is back"
            )
        return self._failed(f"HTTP {status}: {said}, sent {num_sends} times")

    def _failed(self, why: str) -> Reply:
        """A failure that is the server's: one is an accident, many in a row are the state of things.

        Raises:
            ClientError: as many in a row as are asked at a time, and more than two.
        """
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= max(3, self._settings.concurrency):
            num_failed = self._num_failed_in_a_row
            raise ClientError(
                f"{self.name}: {num_failed} requests in a row failed, the last with: {self._shown(why)}\n"
                "Look at the server, its log and OPENAI_BASE_URL. What was answered is kept; run again"
            )
        return failed_reply(self._shown(why))

    def _shown(self, text: str) -> str:
        """Words of others, in one line, without what is secret."""
        for secret in self._address.secrets:
            text = text.replace(secret, "***")
        text = " ".join(text.split())
        return text if len(text) <= _MAX_SAID else text[:_MAX_SAID] + " ..."


def _address() -> _Address:
    """Where to ask, by the environment.

    Raises:
        ClientError: there is no key, and the endpoint is elsewhere.
        ConfigError: the address is none.
    """
    base = os.environ.get("OPENAI_BASE_URL", "").strip() or _DEFAULT_URL
    try:
        parts = urlsplit(base)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError("OPENAI_BASE_URL in the environment is no address; expected one as http://127.0.0.1:8080/v1")
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    shown = f"{parts.scheme}://{place}{parts.path.rstrip('/')}"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not _is_here(host) and parts.password is None:
        raise ClientError(
            f"OPENAI_API_KEY is not set in the environment, and {shown} is not on this machine. Set it (to any "
            "word where the server takes none), or set OPENAI_BASE_URL to your own server"
        )
    headers, secrets = {}, [key, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
    if parts.password is not None:
        pair = f"{unquote(parts.username or '')}:{unquote(parts.password)}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        secrets += [parts.password, unquote(parts.password)]
    url = shown + (f"?{parts.query}" if parts.query else "")
    return _Address(url, shown, key or "none", headers, tuple(s for s in secrets if len(s) >= _MIN_SECRET))


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _words(error: Any) -> str:
    """What an endpoint says of an error."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return str(body or error)
