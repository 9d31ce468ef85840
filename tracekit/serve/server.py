"""The server: a folder, a model and a port, from the first check to the finished dataset.

A first Ctrl-C or SIGTERM: no more requests (503), those in hand are answered and written, the shard is closed, manifest
and card are written, so that the folder is a complete dataset. A second one stops at once. The next start goes on.
"""

import asyncio
import os
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self, cast

import msgspec
import torch
import uvicorn

from tracekit.config import AnswerCaptureConfig, ModelConfig, PromptConfig, check
from tracekit.console import logged, note, say
from tracekit.errors import ConfigError, TracekitError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, Plan, SourceInfo
from tracekit.model.models import load_model, load_tokenizer, max_positions, model_info
from tracekit.model.placement import computing_device
from tracekit.model.prompts import Prompter
from tracekit.model.proof import choose_capture
from tracekit.model.vocabulary import note_num_rows
from tracekit.records import SCHEMA_VERSION, ModelInfo
from tracekit.run.plan import public_run, versions
from tracekit.serve.admission import Admission, Limits
from tracekit.serve.app import make_app
from tracekit.serve.batcher import Batcher
from tracekit.serve.growing import GrowingDataset, told_of_space
from tracekit.serve.protocol import make_protocol
from tracekit.serve.settings import API_KEY_VARIABLE, ServerSettings, is_loopback
from tracekit.serve.task import TASK, ServeConfig
from tracekit.sites import resolve_sites

__all__ = ["LoggingServer"]

_SPLIT = "train"
_MORE_CONNECTIONS = 256
"""Connections there may be past those whose requests wait or are generated: of clients that keep theirs open."""
_GRACE_SECONDS = 30
"""How long a client may take to read an answer that is complete while the server is stopping."""


class LoggingServer:
    """One server at work. Use as a context manager: `with LoggingServer(...) as server: server.run()`.

    On entering everything is checked and the model loaded; `run` serves until `stop` or a signal; leaving finishes what
    was admitted, and the dataset. `manifest` is the finished dataset's then, None where it has no sample.

    Raises:
        ConfigError: a setting is wrong, or others could reach the server and there is no key.
        TracekitError: as of `tracekit.run.runner.execute`, and of GrowingDataset; on leaving also what stopped it.
    """

    def __init__(
        self,
        out: Path,
        *,
        model: ModelConfig,
        capture: AnswerCaptureConfig,
        prompt: PromptConfig,
        settings: ServerSettings,
        seed: int = 41,
        config: str | None = None,
    ) -> None:
        self._layout = Layout(out, config or TASK.name)
        self._settings = check(settings)
        self._run_config = check(ServeConfig(model=model, capture=capture, prompt=prompt))
        self._seed = seed
        self._stack = ExitStack()
        self._uvicorn: _Uvicorn | None = None
        self.manifest: Manifest | None = None
        self.url = ""

    def __enter__(self) -> Self:
        with _room(self._layout.root), ExitStack() as stack:
            open_log = stack.enter_context(logged())
            self._start(stack, open_log)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *of: object) -> None:
        with _room(self._layout.root), self._stack:
            self._engine.__exit__()
            failure = self._engine.failure
            if failure is not None:
                note(f"error: {failure}")
                raise failure
            if not self._engine.has_ended_well:
                raise TracekitError("the server stopped by an error of its own; the traceback is above")
            say("finishing")
            self.manifest = self._dataset.finish()

    @property
    def names(self) -> list[str]:
        """Names under which clients may ask for the model, its own first; never a path of this machine."""
        given: Any = self._plan.run["model"]
        return list(dict.fromkeys([self._info.id, given["model"]]))

    def about(self) -> list[str]:
        """Where it is and what to try, line by line."""
        is_chat = self._info.variant == "chat"
        asked = (
            {"messages": [{"role": "user", "content": "Why is the sky blue?"}]} if is_chat else {"prompt": "The sky"}
        )
        body = msgspec.json.encode({"model": self.names[0], **asked, "max_tokens": 32}).decode()
        path = "chat/completions" if is_chat else "completions"
        words = ["curl", f"{self.url}/v1/{path}", "-H", "Content-Type: application/json"]
        key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if os.environ.get(API_KEY_VARIABLE) else ""
        return [
            f"address         {self.url}/v1",
            f"model           {', '.join(self.names)}",
            f"folder          {self._layout.root}, configuration {self._layout.config}",
            f"try             {shlex.join(words)}{key} -d {shlex.quote(body)}",
        ]

    def run(self) -> None:
        """Serve until a signal or `stop`."""
        assert self._uvicorn is not None, "not entered"
        self._uvicorn.run(sockets=[self._socket])

    def stop(self) -> None:
        """Have `run` return once everything that was admitted is answered and written."""
        self._engine.drain()

    def _start(self, stack: ExitStack, open_log: Any) -> None:
        model, capture = self._run_config.model, self._run_config.capture
        api_key = os.environ.get(API_KEY_VARIABLE) or None
        self._check_host(api_key)
        tokenizer = load_tokenizer(model)
        variant = Prompter(tokenizer, self._run_config.prompt, default_system="").variant
        sites = resolve_sites(capture.sites)
        self._info = model_info(model, variant=variant, sites=sites)
        self._plan = self._make_plan(self._info)
        limits = Limits(self._positions(), self._settings.limit_new_tokens)
        self._socket = stack.enter_context(self._bind())
        self._dataset = stack.enter_context(
            GrowingDataset(
                self._layout,
                self._plan,
                capture,
                TASK,
                samples_per_shard=self._settings.samples_per_shard,
                close_after=self._settings.close_after,
            )
        )
        open_log(self._layout.text_log)
        say(f"loading {self._info.id}")
        traced = load_model(model, self._info, tokenizer, sites)
        choose_capture(traced, capture.capture_from, repeats=False)
        self._dataset.begin()
        self._engine = Batcher(
            traced,
            self._dataset,
            self._layout,
            capture,
            self._settings,
            split=_SPLIT,
            seed=self._seed,
            on_end=self._end,
        )
        own = load_tokenizer(model)
        note_num_rows(own, traced.num_rows)
        admission = Admission(own, self._run_config.prompt, limits, self.names, seed=self._seed)
        app = make_app(
            self._engine,
            admission,
            self.names,
            self._settings,
            api_key=api_key,
        )
        self._uvicorn = _Uvicorn(app, self._engine, self._settings)
        self._engine.__enter__()

    def _end(self) -> None:
        assert self._uvicorn is not None
        self._uvicorn.should_exit = True

    def _check_host(self, api_key: str | None) -> None:
        settings = self._settings
        if not is_loopback(settings.host) and api_key is None and not settings.allow_no_key:
            raise ConfigError(
                f"--host {settings.host} lets other machines ask and fill the disk; set {API_KEY_VARIABLE} to a key "
                "that they have to send, or pass --allow-no-key"
            )

    def _positions(self) -> int | None:
        own, asked = max_positions(self._run_config.model), self._settings.limit_tokens
        if asked is not None and own is not None and asked > own:
            raise ConfigError(f"--limit-tokens {asked}: the model has {own} positions")
        return own if asked is None else asked

    def _bind(self) -> socket.socket:
        """A socket at the address, not listening yet: what cannot be had is said before the model is loaded."""
        settings = self._settings
        host = settings.host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, settings.port))
        except OSError as error:
            bound.close()
            raise ConfigError(
                f"cannot listen at {settings.host} port {settings.port}: {error.strerror or error}; choose another "
                "--host or --port (0 takes a free one)"
            ) from error
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{bound.getsockname()[1]}"
        return bound

    def _make_plan(self, info: ModelInfo) -> Plan:
        config = self._run_config
        source = SourceInfo(
            id="requests", revision="none", subset=None, split=_SPLIT, num_rows=0, num_used=0, skipped=[]
        )
        whole = public_run(config, info, source)
        run = {name: whole[name] for name in ("model", "capture", "prompt")} | {"seed": self._seed}
        model: Any = whole["model"]["model"]
        return Plan(
            schema_version=SCHEMA_VERSION,
            config=self._layout.config,
            task=TASK.name,
            run=run,
            model=info,
            source=source,
            batch_size=self._settings.max_batch,
            device_type=computing_device(config.model).type,
            num_threads=torch.get_num_threads(),
            versions=versions(),
            shards=[],
            command=shlex.join(["tracekit", "serve", "--model", model, "--sites", *config.capture.sites]),
            is_growing=True,
            about=TASK.about,
        )


@contextmanager
def _room(root: Path) -> Iterator[None]:
    """Have an error about the room on a disk say what to do."""
    try:
        yield
    except OSError as error:
        if (told := told_of_space(error, root)) is error:
            raise
        raise told from error


class _Uvicorn(uvicorn.Server):
    """uvicorn, which on a signal lets the engine finish before it closes the door; until then requests get a 503."""

    def __init__(self, app: Any, engine: Batcher, settings: ServerSettings) -> None:
        most = settings.max_connections or settings.max_queue + settings.max_batch + _MORE_CONNECTIONS
        super().__init__(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", make_protocol(most)),
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the engine finish, the second stops at once."""
        if self._engine.is_draining:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        say("stopping: what was admitted is finished first; once more to stop at once")
        self._engine.drain()
