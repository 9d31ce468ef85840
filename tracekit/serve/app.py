"""The application: HTTP in and out. Who may ask, how much, and every error in OpenAI's form.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /health
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tracekit.serve.admission import Admission
from tracekit.serve.batcher import Batcher
from tracekit.serve.forms import Asked, RequestError, parse_chat, parse_completion
from tracekit.serve.replies import DONE, HttpReply, ReplyChoice, TextPiece, TokenUsage, error_body, event, models_body
from tracekit.serve.samples import Failed, More, ServeJob, WholeAnswer
from tracekit.serve.settings import ServerSettings, is_loopback

__all__ = ["KEY_HEADER", "LOG_HEADER", "make_app"]

KEY_HEADER = "X-Tracekit-Key"
"""Tells a client the key of its sample."""
LOG_HEADER = "X-Tracekit-Log"
"""`off` keeps a request out of the dataset."""

_LOOK_SECONDS = 0.25
"""How often a request whose body is not there yet looks whether the server is stopping."""
_Queue = asyncio.Queue[tuple[int, More | WholeAnswer | Failed]]
"""What there is to say, each with the number of its prompt."""


def make_app(
    engine: Batcher, admission: Admission, names: Sequence[str], settings: ServerSettings, *, api_key: str | None
) -> Starlette:
    """The ASGI application of an engine."""
    service = _Service(engine, admission, names, settings)
    handlers: dict[Any, Any] = {
        RequestError: service.refused,
        HTTPException: service.not_found,
        ClientDisconnect: service.gone,
        Exception: service.broken,
    }
    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.completion, methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/v1/models/{name:path}", service.model, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        middleware=[Middleware(_Guard, host=settings.host, api_key=api_key)],
        exception_handlers=handlers,
    )


class _Guard:
    """Lets in who may ask: by the key, and on a loopback address by the Host header.

    A page in a browser can have a name of its own resolve to this machine (DNS rebinding); its requests then carry
    that name.
    """

    def __init__(self, app: ASGIApp, *, host: str, api_key: str | None) -> None:
        self._app, self._is_local = app, is_loopback(host)
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            error = self._refusal(headers, scope["path"])
            if error is not None:
                await _error(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes], path: str) -> RequestError | None:
        if self._is_local and not is_loopback(_host_of(headers.get(b"host", b"").decode("latin-1"))):
            return RequestError("this server is asked for as localhost or 127.0.0.1", status=403, code="wrong_host")
        if self._key is None or path == "/health":
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        message = "the API key is missing or wrong; send `Authorization: Bearer KEY`"
        return RequestError(message, status=401, code="invalid_api_key")


def _host_of(header: str) -> str:
    """The host in a Host header, without its port."""
    return header.partition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]


class _Service:
    """The endpoints."""

    def __init__(self, engine: Batcher, admission: Admission, names: Sequence[str], settings: ServerSettings) -> None:
        self._engine, self._admission, self._names, self._settings = engine, admission, names, settings
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def models(self, request: Request) -> Response:
        return _json(models_body(self._names, self._created))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._names:
            message = f"no model {name!r} here; this server has {self._names[0]!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")
        return _json(models_body([name], self._created)["data"][0])

    async def health(self, request: Request) -> Response:
        try:
            self._engine.check_room()
        except RequestError as error:
            if error.status == 503:
                raise
        return _json({"status": "ok"})

    async def refused(self, request: Request, error: RequestError) -> Response:
        self._engine.log(None, error.status, code=error.code, param=error.param)
        return _error(error)

    async def not_found(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error(RequestError(message, status=error.status_code, code="no_such_endpoint"))

    async def gone(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def broken(self, request: Request, error: Exception) -> Response:
        return _error(RequestError("an error of the server; its terminal has the traceback", status=500))

    async def _answer(self, request: Request, parse: Callable[[bytes], Asked]) -> Response:
        self._engine.check_room()
        asked = parse(await self._body(request))
        is_logged = asked.is_logged and _wants_log(request)
        self._engine.check_room(len(asked.prompts) or 1)
        prompts = await run_in_threadpool(self._admission.prompts, asked)
        for prompt in prompts:
            self._admission.decoding(asked, prompt, "")  # refused before a key is given away
        queue: _Queue = asyncio.Queue()
        loop, started = asyncio.get_running_loop(), time.monotonic()

        def send(index: int, said: More | WholeAnswer | Failed) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (index, said))

        def make_job(index: int, key: str | None) -> ServeJob:
            decoding = self._admission.decoding(asked, prompts[index], key or secrets.token_hex(8))
            return ServeJob(key, asked, prompts[index], decoding, partial(send, index), started)

        jobs = self._engine.submit([partial(make_job, i) for i in range(len(prompts))], is_logged=is_logged)
        keys = [job.key for job in jobs]
        reply = HttpReply(
            is_chat=asked.endpoint == "chat",
            model=asked.model or self._names[0],
            wants_logprobs=asked.num_best is not None,
            wants_usage=asked.wants_usage,
            prompts=[prompt.token_ids for prompt in prompts] if asked.wants_token_ids else None,
        )
        if asked.is_streamed:  # its head goes before it is known whether all are kept
            headers = _key_header(keys) | {"Cache-Control": "no-cache"}
            return StreamingResponse(_stream(reply, queue, len(jobs)), media_type="text/event-stream", headers=headers)
        pieces: list[list[TextPiece]] = [[] for _ in jobs]
        ended: dict[int, WholeAnswer] = {}
        while len(ended) < len(jobs):
            index, said = await queue.get()
            if isinstance(said, Failed):
                raise RequestError(said.message, status=503, code=said.code)
            if isinstance(said, WholeAnswer):
                ended[index] = said
            else:
                pieces[index] += said.pieces
        answers = [ended[index] for index in range(len(jobs))]
        choices = [
            ReplyChoice(one.text, own, one.finish_reason, one.stop_string, one.usage, one.generated.token_ids)
            for one, own in zip(answers, pieces, strict=True)
        ]
        kept = [key if one.is_kept else None for key, one in zip(keys, answers, strict=True)]
        return _json(reply.whole(choices), headers=_key_header(kept))

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than it may be long, nor longer than it may take."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page in a browser cannot send elsewhere unasked
            raise RequestError(f"content type {kind!r}; send application/json", status=415, code="content_type")
        reading = asyncio.create_task(self._read(request))
        deadline = time.monotonic() + self._settings.body_seconds
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=min(_LOOK_SECONDS, max(0, deadline - time.monotonic())))
                if reading.done():
                    break
                self._engine.check_room()
                if time.monotonic() >= deadline:
                    raise RequestError(
                        f"the body did not come within {self._settings.body_seconds:g} s (--body-seconds)",
                        status=408,
                        code="body_too_slow",
                    )
            return reading.result()
        finally:
            reading.cancel()

    async def _read(self, request: Request) -> bytes:
        limit = self._settings.limit_body
        declared = request.headers.get("content-length", "")
        whole = bytearray()
        too_long = declared.isdigit() and int(declared) > limit
        if not too_long:
            async for chunk in request.stream():
                whole += chunk
                if too_long := len(whole) > limit:
                    break
        if too_long:
            message = f"the body is longer than {limit} bytes (--limit-body)"
            raise RequestError(message, status=413, code="body_too_long")
        return bytes(whole)


async def _stream(reply: HttpReply, queue: _Queue, num_answers: int) -> AsyncIterator[bytes]:
    """The events of a streamed reply."""
    for body in reply.first():
        yield event(body)
    usages: list[TokenUsage] = []
    num_said = [0] * num_answers
    while len(usages) < num_answers:
        index, said = await queue.get()
        if isinstance(said, Failed):
            yield event(error_body(RequestError(said.message, status=503, code=said.code)))
            return
        if isinstance(said, WholeAnswer):
            usages.append(said.usage)
            left = said.generated.token_ids[num_said[index] :]
            yield event(reply.end(index, said.finish_reason, said.stop_string, left))
        else:
            num_said[index] += len(said.token_ids)
            yield event(reply.part(index, said.text, said.pieces, said.token_ids))
    for body in reply.last(usages):
        yield event(body)
    yield DONE


def _key_header(keys: Sequence[str | None]) -> dict[str, str]:
    """The header with the keys of the samples, in the order of the prompts; empty in the place of one without."""
    return {KEY_HEADER: ",".join(key or "" for key in keys)} if any(keys) else {}


def _wants_log(request: Request) -> bool:
    value = request.headers.get(LOG_HEADER, "on").strip().lower()
    if value not in ("on", "off"):
        raise RequestError(f"{LOG_HEADER} is {value!r}, expected on or off", param=LOG_HEADER, code="invalid_value")
    return value == "on"


def _json(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def _error(error: RequestError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(error_body(error), status=error.status, headers=headers)
