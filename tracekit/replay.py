"""Replay of a stored dataset: load its model again, run some samples alone, and compare."""

import msgspec

from tracekit.capture import Text, Trace
from tracekit.config import CaptureConfig, ModelConfig
from tracekit.errors import ModelError
from tracekit.layout import Layout
from tracekit.manifest import Manifest, Verification, read_struct
from tracekit.models import load_model, load_tokenizer, model_info
from tracekit.proof import replay
from tracekit.sites import resolve_sites
from tracekit.store import TraceStore

__all__ = ["replay_stored"]


def replay_stored(layout: Layout, count: int, *, model: str | None, adapter: str | None, device: str) -> Verification:
    """Run `count` samples, spread over the dataset, again.

    Raises:
        ModelError: the model is not the one that made the dataset.
        CaptureError: an error is past the tolerance.
    """
    import numpy as np

    manifest = read_struct(layout.manifest, Manifest)
    settings = msgspec.convert(manifest.run["model"], ModelConfig)
    settings = msgspec.structs.replace(
        settings, model=model or settings.model, adapter=adapter or settings.adapter, device=device
    )
    for flag, given, name, revision in (
        ("--model", model, manifest.model.id, manifest.model.revision),
        ("--adapter", adapter, manifest.model.adapter or "", (manifest.model.adapter or "").partition("@")[2]),
    ):
        if given is None and revision.startswith("sha256:"):
            raise ModelError(
                f"{layout.config} was made with the local {name!r} ({revision[:23]}); say where it is: {flag} PATH"
            )
    capture_config = msgspec.convert(manifest.run["capture"], CaptureConfig)
    tokenizer = load_tokenizer(settings)
    info = model_info(settings, variant=manifest.model.variant)
    if (info.id, info.revision, info.adapter) != (manifest.model.id, manifest.model.revision, manifest.model.adapter):
        raise ModelError(
            f"{layout.config} was made by {manifest.model.id} at {manifest.model.revision}, adapter "
            f"{manifest.model.adapter}; this is {info.id} at {info.revision}, adapter {info.adapter}. Give the right "
            "one with --model and --adapter"
        )
    traced = load_model(settings, info, tokenizer, resolve_sites(capture_config.sites))
    result = Verification.nothing()
    with TraceStore(str(layout.root), config=layout.config) as store:
        picked = sorted({round(i) for i in np.linspace(0, len(store) - 1, count)})
        for position in picked:
            sample = store[position]
            record = sample.record
            text = Text(record.token_ids, record.prompt_length)
            logprobs, entropies = (
                np.array(getattr(record, name, [])) for name in ("token_logprobs", "token_entropies")
            )
            lone = Trace(sample.tensors(), record.tensors, logprobs, entropies, np.zeros(0))
            result = result.with_more(replay(traced, record.key, text, lone, capture_config))
    return result
