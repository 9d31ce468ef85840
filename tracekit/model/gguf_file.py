"""GGUF files: as what type one stores its weights. transformers unpacks them, and the numbers keep their rounding."""

import re
from pathlib import Path

from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, LlamaFileType

from tracekit.errors import ModelError

__all__ = ["gguf_type"]

_PLAIN = {Kind.F32, Kind.F16, Kind.BF16, Kind.F64, Kind.I8, Kind.I16, Kind.I32, Kind.I64}
_READ_ERRORS = (OSError, ValueError, LookupError, TypeError, EOFError, OverflowError, MemoryError)
"""What the reader raises for a file that is none, or is cut short."""


def gguf_type(path: Path) -> str | None:
    """The type of a GGUF file's quantised weights (Q4_1, Q4_K_M); None where none is quantised.

    The name of the file's own type counts if its tensors agree; else that of most weights.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        reader = GGUFReader(path)
    except _READ_ERRORS as error:
        raise ModelError(f"model {str(path)!r} cannot be loaded: it is no readable GGUF file ({error})") from error
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in _PLAIN:
            name = tensor.tensor_type.name
            sizes[name] = sizes.get(name, 0) + int(tensor.n_elements)
    if not sizes:
        return None
    field = reader.get_field("general.file_type")
    number = None if field is None else int(field.contents())
    own = next((kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.value == number), "")
    agrees = own[-1:] and _family(own) in {_family(name) for name in sizes}
    return own if agrees else max(sizes, key=lambda name: sizes[name])


def _family(name: str) -> str:
    """`Q4` of Q4_K_M, `IQ3` of IQ3_XXS."""
    return re.match(r"[A-Z]*\d*", name)[0]  # type: ignore[index]
