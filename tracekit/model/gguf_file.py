"""GGUF files: as what type one stores its weights. transformers unpacks them, and the numbers keep their rounding.

    "GGUF"  version u32  tensors u64  fields u64          versions 2 and 3, little-endian
    each field      name, type u32, value                 a name is its length (u64) and UTF-8
    each tensor     name, axes u32, sizes u64, type u32, offset u64

gguf's own reader takes seconds for the tokens of a vocabulary; here their strings are skipped.
"""

import math
import re
import struct
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from gguf import LlamaFileType

from tracekit.errors import ModelError

__all__ = ["gguf_type"]

_KINDS: dict[int, Kind] = {kind.value: kind for kind in Kind}
_PLAIN = {Kind.F32, Kind.F16, Kind.BF16, Kind.F64, Kind.I8, Kind.I16, Kind.I32, Kind.I64}
_FORMS = {
    **{Type.UINT8: "B", Type.INT8: "b", Type.BOOL: "?", Type.UINT16: "H", Type.INT16: "h"},
    **{Type.UINT32: "I", Type.INT32: "i", Type.FLOAT32: "f", Type.UINT64: "Q", Type.INT64: "q", Type.FLOAT64: "d"},
}
"""Fixed-size values, as struct writes their types."""
_MAX_AXES = 8


def gguf_type(path: Path) -> str | None:
    """The type of a GGUF file's quantised weights (Q4_1, Q4_K_M); None where none is quantised.

    The name of the file's own type counts if its tensors agree; else that of most weights.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            number, kinds = _header(file)
    except (OSError, ValueError, struct.error, RecursionError) as error:
        raise ModelError(f"model {str(path)!r} cannot be loaded: it is no readable GGUF file ({error})") from error
    sizes = Counter[str]()
    for kind, size in kinds.items():
        if kind not in _PLAIN:
            sizes[kind.name] += size
    if not sizes:
        return None
    own = next((kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.value == number), "")
    return own if _family(own) in {_family(name) for name in sizes} else sizes.most_common(1)[0][0]


def _header(file: BinaryIO) -> tuple[object, Counter[Kind]]:
    """The file's own type, None where it says none, and how many weights are of each type.

    Raises:
        ValueError, struct.error: the header is no GGUF header, or is cut short.
    """
    if (magic := file.read(4)) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    version, num_tensors, num_fields = _values(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, expected 2 or 3, little-endian")
    number: object = None
    for _ in range(num_fields):
        name = _text(file)
        value = _value(file, Type(_values(file, "I")[0]))
        number = value if name == b"general.file_type" else number
    kinds = Counter[Kind]()
    for _ in range(num_tensors):
        _text(file)
        (num_axes,) = _values(file, "I")
        if num_axes > _MAX_AXES:
            raise ValueError(f"a tensor has {num_axes} axes")
        *shape, kind, _ = _values(file, f"{num_axes}QIQ")
        if kind not in _KINDS:
            raise ValueError(f"a tensor is of type {kind}, which gguf does not know")
        kinds[_KINDS[kind]] += math.prod(shape)
    return number, kinds


def _value(file: BinaryIO, kind: Type) -> object:
    """A value of a field; strings and arrays are skipped."""
    if kind is Type.STRING:
        return _text(file)
    if kind is not Type.ARRAY:
        return _values(file, _FORMS[kind])[0]
    inner, count = _values(file, "IQ")
    if Type(inner) in _FORMS:
        file.seek(count * struct.calcsize(f"<{_FORMS[Type(inner)]}"), 1)
        return None
    for _ in range(count):
        _value(file, Type(inner))
    return None


def _text(file: BinaryIO) -> bytes:
    (size,) = _values(file, "Q")
    found = file.read(size) if size < 1 << 31 else b""
    if len(found) != size:
        raise ValueError(f"a string of {size} bytes is cut short")
    return found


def _values(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _family(name: str) -> str:
    """`Q4` of Q4_K_M, `IQ3` of IQ3_XXS."""
    return "".join(re.findall(r"^[A-Z]+\d+", name))
