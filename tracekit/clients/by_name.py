"""Opening the model that a flag names, with its cache before it.

openai:gpt-4o-mini      an OpenAI-compatible endpoint: OPENAI_BASE_URL, OPENAI_API_KEY
anything else           a local model, as --model takes it: Hub id, folder, GGUF file, demo
"""

from pathlib import Path

import msgspec

from tracekit.clients.client import Client, ClientConfig
from tracekit.clients.responses import CachedClient
from tracekit.config import ModelConfig
from tracekit.errors import ConfigError

__all__ = ["ENDPOINT_PREFIX", "open_client"]

ENDPOINT_PREFIX = "openai:"
"""What the names of models at an endpoint begin with."""


def open_client(
    spec: str, *, model: ModelConfig, settings: ClientConfig, cache: Path | None, desc: str
) -> CachedClient:
    """The client that `spec` names; use it as a context manager.

    A local model takes device, dtype and quantisation from `model`, the model that is tested, but neither its adapter
    nor its checkpoint; a GGUF file is never quantised again. `cache` is the file of replies, None for none; `desc`
    stands before the progress bar.

    Raises:
        ConfigError: a name or setting is wrong.
        ModelError: no such local model.
        ClientError: there is no key for the endpoint, or its package is not installed.
    """
    if spec == ENDPOINT_PREFIX:
        raise ConfigError(f"model {spec!r}: nothing after the colon; expected openai:MODEL, as openai:gpt-4o-mini")
    client: Client
    if spec.startswith(ENDPOINT_PREFIX):
        from tracekit.clients.endpoint import EndpointClient

        client = EndpointClient(spec.removeprefix(ENDPOINT_PREFIX), settings)
    else:
        from tracekit.clients.local import LocalClient  # torch

        own = msgspec.structs.replace(model, model=spec, model_path=None, adapter=None, merge_adapter=False)
        if spec.endswith(".gguf"):
            own = msgspec.structs.replace(own, quantize="none")
        client = LocalClient(own, settings)
    return CachedClient(client, cache, settings, desc=desc)
