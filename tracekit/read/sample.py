"""Sample: one sample of a store, with the store's accessors as methods of its own."""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Concatenate, ParamSpec, TypeVar

from tracekit.read.accessors import Accessors
from tracekit.records import Record

__all__ = ["Sample"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def _of_sample(
    method: Callable[Concatenate[Accessors, str, P], ResultT],
) -> "Callable[Concatenate[Sample, P], ResultT]":
    """A store's method for one key, as a method of the sample."""

    @wraps(method)
    def bound(self: "Sample", /, *args: P.args, **kwargs: P.kwargs) -> ResultT:
        return method(self._store, self.key, *args, **kwargs)

    return bound


class Sample:
    """One sample of a store: its key, its record, and the store's accessors without their `key` argument."""

    def __init__(self, store: Accessors, key: str) -> None:
        self._store = store
        self.key = key

    def __repr__(self) -> str:
        return f"<Sample {self.key!r}>"

    @cached_property
    def record(self) -> Record:
        """The typed record, read from the shard when first asked for."""
        return self._store.record(self.key)

    tensor = _of_sample(Accessors.tensor)
    tensors = _of_sample(Accessors.tensors)
    hidden_states = _of_sample(Accessors.hidden_states)
    attention = _of_sample(Accessors.attention)
    attention_mass = _of_sample(Accessors.attention_mass)
    qkv = _of_sample(Accessors.qkv)
    resid = _of_sample(Accessors.resid)
    graph = _of_sample(Accessors.graph)
    graphs = _of_sample(Accessors.graphs)
