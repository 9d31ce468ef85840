"""Declared types: whether the attributes of a dataclass are what its annotations say, and how a program ends where a
declaration is wrong."""

import builtins
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, TracebackType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["attribute_fault", "told_plainly"]

_PLAIN = "_is_told_plainly"
ErrorT = TypeVar("ErrorT", bound=Exception)


def told_plainly(error: ErrorT) -> ErrorT:
    """The same error. Where nobody catches it, the program ends with one line that names the file, without a
    traceback."""
    setattr(error, _PLAIN, True)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _end
    return error


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not getattr(error, _PLAIN, False):
        sys.__excepthook__(kind, error, trace)
        return
    library = Path(__file__).parent
    steps = [
        one
        for one in traceback.extract_tb(trace)
        if Path(one.filename).is_file() and library not in Path(one.filename).parents
    ]
    where = f"{steps[-1].filename}, line {steps[-1].lineno}: " if steps else ""
    sys.stderr.write(f"error: {where}{error}\n")


def attribute_fault(one: Any) -> str | None:
    """The first attribute that is not of its declared type, and which it has to be; None where all are.

    A function is not looked into. What an annotation names and its module has not imported may be anything.
    """
    for name, declared in _declared(type(one)).items():
        if hasattr(one, name) and not _fits(value := getattr(one, name), declared):
            return f"{name}={value!r:.200} has to be {_words(declared)}"
    return None


class _Names(dict[str, Any]):
    """The names of a module; those that it has for type checkers alone are Any."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


@cache
def _declared(of: type) -> dict[str, Any]:
    return get_type_hints(of, localns=_Names(vars(sys.modules[of.__module__])))


def _fits(value: Any, declared: Any) -> bool:
    """Whether a value is of a declared type."""
    origin, inner = get_origin(declared), get_args(declared)
    if isinstance(declared, TypeVar):
        return declared.__bound__ is None or isinstance(value, declared.__bound__)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Callable:
        return callable(value)
    if origin is type:
        return isinstance(value, type) and issubclass(value, _class(inner[0]))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(key, inner[0]) and _fits(value[key], inner[1]) for key in value)
    return declared is Any or isinstance(value, origin or declared)


def _class(declared: Any) -> Any:
    return declared.__bound__ if isinstance(declared, TypeVar) else declared


def _words(declared: Any) -> str:
    """A declared type in words."""
    origin, inner = get_origin(declared), get_args(declared)
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inner)
    if origin is type:
        return f"a class that inherits from {_class(inner[0]).__name__}"
    if origin is Mapping:
        return f"a dictionary, each value {_words(inner[1])}"
    names = {Callable: "a function", str: "a text", bool: "True or False", NoneType: "None"}
    kind = origin or _class(declared)
    return names.get(kind, f"a {kind.__name__}")
