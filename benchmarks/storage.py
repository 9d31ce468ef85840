"""What the smaller storage forms cost: bytes, time and accuracy beside tensors as they were captured.

A batch of answered questions is captured once; what is measured is the way from captured tensors to encoded payloads,
and the reading of one layer, form by form. Time is held against the capture itself, which a run pays as well.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import transformers

from benchmarks.measure import compare, interleave, parse_arguments, ratio_table, say, store_results, table
from builders.kit.columns import QuestionSource
from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaQAConfig
from builders.trivia_qa.task import examples as read
from tracekit import TraceStore
from tracekit.answering import open_tracer
from tracekit.config import CaptureConfig, ModelConfig, OutputConfig, SamplesConfig
from tracekit.errors import ModelError
from tracekit.model.capture import capture
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.run.encode import batch_of
from tracekit.run.runner import execute
from tracekit.storage import StorageLoss
from tracekit.task import Place

BATCH_SIZE = 8
_NUM_ROUNDS = 6
_MAX_SECONDS = 120
_SITES = ("hidden_states", "attentions")
_FORMS: dict[str, dict[str, Any]] = {
    "as captured": {},
    "bfloat16": {"store_dtype": "bfloat16"},
    "float8": {"store_dtype": "float8"},
    "int8": {"store_dtype": "int8"},
    "top-p 0.99": {"attention_top_p": 0.99},
    "top-p 0.9": {"attention_top_p": 0.9},
}


def run() -> Mapping[str, Any] | None:
    """Measure, print and store; None where the demo model is not installed."""
    transformers.utils.logging.disable_progress_bar()
    config = TriviaQAConfig(
        model=ModelConfig(model="demo", device="cpu"),
        source=QuestionSource(source="sample", limit=BATCH_SIZE),
        generation=SamplesConfig(num_beams=1, max_new_tokens=24),
        capture=CaptureConfig(sites=_SITES, num_replays=0),
        output=OutputConfig(batch_size=BATCH_SIZE),
    )
    try:
        tokenizer = load_tokenizer(config.model)
        traced = load_model(config.model, model_info(config.model, variant="chat"), tokenizer, _SITES)
    except ModelError as error:
        say(f"storage: skipped. {error}")
        return None
    examples = read(config).examples
    samples = open_tracer(TRIVIA_QA, config, tokenizer, examples).trace(traced, examples, Place("", 0, 0))
    texts: list[Any] = [sample.text for sample in samples]
    forms = {
        name: msgspec.structs.replace(config.capture, **{k: v for k, v in form.items() if v != "bfloat16"})
        for name, form in _FORMS.items()
        if name != "bfloat16"
    }
    variants = {name: lambda number, form=form: batch_of(samples, form) for name, form in forms.items()}
    variants["capture"] = lambda number: capture(traced, texts, config.capture)
    rounds = interleave(variants, num_rounds=_NUM_ROUNDS, max_seconds=_MAX_SECONDS)
    ratios = [compare(f"time of encoding / of capturing, {name}", rounds, name, "capture") for name in forms]
    say(ratio_table("Storage forms: time", ratios))
    rows, figures = [], {}
    whole = 0
    with tempfile.TemporaryDirectory() as root:
        for name, form in _FORMS.items():
            settings = msgspec.structs.replace(config, capture=msgspec.structs.replace(config.capture, **form))
            outcome = execute(TRIVIA_QA, settings, Path(root) / name.replace(" ", "-"))
            assert outcome.manifest is not None
            num_bytes = {site: _bytes_of(outcome.manifest.tensors, site) for site in _SITES}
            total = sum(num_bytes.values())
            whole = whole or total
            first = next(iter(_FORMS))
            share = {site: num_bytes[site] / figures.get(first, num_bytes)[site] for site in _SITES}
            figures.setdefault(name, {site: float(count) for site, count in num_bytes.items()})
            figures[name] |= {"share_of_bytes": total / whole, **_losses(outcome.manifest.losses)}
            with TraceStore(str(outcome.folder)) as store:
                assert len(store) == BATCH_SIZE
            said = "; ".join(loss.in_words() for loss in outcome.manifest.losses) or "none beyond its dtype"
            rows.append(
                [name, f"{share['hidden_states']:.2f}", f"{share['attentions']:.2f}", f"{total / whole:.2f}", said]
            )
    say(table("Storage forms: bytes and loss", ["form", "hidden_states", "attentions", "both", "loss"], rows))
    results = {"ratios": ratios, "forms": figures}
    store_results("storage", results)
    return results


def _bytes_of(tensors: list[Any], site: str) -> int:
    """Bytes of a site, what belongs to it included."""
    return sum(tensor.num_bytes for tensor in tensors if tensor.name.partition(".")[0] == site)


def _losses(losses: list[StorageLoss]) -> dict[str, float]:
    found: dict[str, float] = {}
    for loss in losses:
        found |= {
            f"{loss.name}.mean_relative_error": loss.relative_error,
            f"{loss.name}.max_relative_error": loss.max_error,
        }
        if loss.form == "sparse":
            found |= {"share_of_weights": loss.num_kept / loss.num_values, "mean_mass": loss.mass / loss.num_rows}
    return found


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
