"""A session with Ray: on a cluster that is there, or on this machine alone, then on loopback and quiet.

Nothing of the environment travels: tokens and caches are each node's own affair.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tracekit.errors import ClusterError, ConfigError

__all__ = ["Share", "connected", "share"]

_OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray of our own: only examples and sidecars pass through it."""
_CONNECT_SECONDS = 10.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no warning that a worker without GPU sees none
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else what Ray says of dead workers goes to stdout; it is in Ray's own logs
}
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without it Ray takes the address of this machine for its own, and listens on all of them."""


class Share(NamedTuple):
    """What each worker asks a cluster for."""

    num_workers: int
    num_cpus: float
    num_gpus: int


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected; without an address to RAY_ADDRESS, or to a Ray that is started for this run alone.

    Where this process is connected already, it stays so.

    Raises:
        ConfigError: ray is not installed.
        ClusterError: no cluster answers, or it refuses.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.update(_QUIET | (_LOOPBACK if address == "local" else {}))
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs Ray ({error}); install it here and on every node: pip install 'tracekit-llm[run,ray]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    _look(address)
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError, ImportError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def share(nodes: Sequence[Mapping[str, Any]], *, num_workers: int | None, gpus_per_worker: int, on_gpus: bool) -> Share:
    """How many workers, and what each asks for, by what `ray.nodes()` says.

    Workers share the CPUs of a node equally: of the node that has fewest for each, since any may be anywhere.

    Raises:
        ClusterError: no node could take a worker.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if on_gpus:
        slots = [(int(r.get("GPU", 0)) // gpus_per_worker, r.get("CPU", 0)) for r in resources]
    else:
        with_cpus = [r["CPU"] for r in resources if r.get("CPU", 0) >= 1]
        wanted = num_workers or len(with_cpus)
        slots = [(-(-wanted // len(with_cpus)), cpus) for cpus in with_cpus]
    slots = [(count, cpus) for count, cpus in slots if count > 0 and cpus > 0]
    if not slots:
        needed = f"{gpus_per_worker} GPUs and a CPU" if on_gpus else "a CPU"
        raise ClusterError(f"no node of the cluster can take a worker: each needs {needed}; there are {resources}")
    total = sum(count for count, _ in slots) if on_gpus else num_workers or len(slots)
    each = min(cpus / min(count, num_workers or count) for count, cpus in slots)
    return Share(num_workers or total, int(each) if each >= 1 else each, gpus_per_worker if on_gpus else 0)


def _look(address: str) -> None:
    """See that somebody listens at an address: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):  # `local`, `auto`
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ClusterError:
    why = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return ClusterError(
        f"no Ray cluster answers at {address!r}: {why}. Start one (`ray start --head`); where it asks for a token, set "
        "RAY_AUTH_MODE=token here as well; or leave --ray-address out for one on this machine alone"
    )
