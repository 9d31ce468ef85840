"""What a server is told besides its model and what it captures: where it listens, how much it takes, when shards close.

None of it is part of the dataset: a server may be started again with other settings of these.
"""

import ipaddress
from importlib.util import find_spec
from typing import Annotated

import msgspec

from tracekit.config import Positive
from tracekit.errors import ConfigError

__all__ = ["API_KEY_VARIABLE", "ServerSettings", "check_installed", "is_loopback"]

API_KEY_VARIABLE = "TRACEKIT_API_KEY"
"""Environment variable with the key that clients have to send; unset or empty: none."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a server serves."""

    host: str = "127.0.0.1"
    """Address to listen at. One that other machines reach needs a key (TRACEKIT_API_KEY)."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one."""
    allow_no_key: bool = False
    """Listen at an address that other machines reach although there is no key."""
    max_batch: Positive = 16
    """Requests that are generated together at most."""
    batch_wait_ms: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """Milliseconds that the first request of a batch waits for others."""
    max_queue: Positive = 64
    """Requests that may wait; one more is answered 429."""
    samples_per_shard: Positive = 256
    """A shard is closed once it holds so many samples."""
    close_after: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds after its first sample at which a shard is closed at the latest, so that readers see it."""
    max_connections: Positive | None = None
    """Connections at once; requests on further ones are answered 503. By default 256 more than wait and are
    generated."""
    body_seconds: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """Seconds that a request's body may take to come; a slower one is answered 408."""
    limit_body: Positive = 1 << 20
    """Bytes of a request's body; a longer one is answered 413."""
    limit_new_tokens: Positive = 1024
    """Tokens that a request may ask for."""
    limit_tokens: Positive | None = None
    """Tokens of prompt and answer together; by default, and at most, what the model has positions for."""


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_installed() -> None:
    """See that what a server needs is there.

    Raises:
        ConfigError: it is not; the message holds the pip line.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"`tracekit serve` needs {' and '.join(missing)}: pip install 'tracekit-llm[run,serve]'")
