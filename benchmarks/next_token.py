"""Next-token traces beside a bare forward pass: the demo model reads the same batches of windows.

    next_token    what a run does before it writes: one teacher-forced pass, all hidden states, every next-token number,
                  records and payloads
    bare          `model(input_ids, attention_mask)`, right-padded, and nothing kept of its logits

The text is the packaged encyclopedic sample, cut into windows of 128 tokens, and the treebank sample, whose sentences
are short and of different lengths.
"""

import cProfile
import pstats
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from benchmarks.measure import Ratio, compare, interleave, parse_arguments, ratio_table, say, store_results, table
from builders.kit.columns import TextSource
from builders.next_token.config import NextTokenConfig
from builders.next_token.tracer import NextTokenTracer
from builders.next_token.windows import Window, windows
from tracekit.config import ModelConfig, ReadingConfig
from tracekit.errors import ModelError
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.traced import TracedModel
from tracekit.records import encode_record
from tracekit.task import Place
from tracekit.tensors import encode

BATCH_SIZE = 8
SETTINGS = {"windows of 128 tokens": "sample", "sentences": "sample:ud_ewt"}
_NUM_ROUNDS = 6
_MAX_SECONDS = 120

Batch = Sequence[Window]


def run_next_token(traced: TracedModel, tracer: NextTokenTracer, batch: Batch) -> int:
    """Trace and encode a batch; bytes that would be written."""
    samples = tracer.trace(traced, batch, Place("next_token", 0, 0))
    return sum(len(encode_record(sample.record)) + encode(sample.trace.tensors).size for sample in samples)


def run_bare(traced: TracedModel, batch: Batch) -> torch.Tensor:
    """The model's logits (B, T, V)."""
    longest = max(window.stop - window.start for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(batch):
        token_ids = torch.from_numpy(window.whole.token_ids[window.start : window.stop])
        ids[row, : len(token_ids)], mask[row, : len(token_ids)] = token_ids, 1
    with torch.inference_mode():
        return traced.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def config_of(source: str) -> NextTokenConfig:
    """The demo model over a sample, hidden states only."""
    return NextTokenConfig(
        model=ModelConfig(model="demo", device="cpu"),
        source=TextSource(source=source),
        capture=ReadingConfig(sites=("hidden_states",)),
        max_seq_len=128,
    )


def batches_of(config: NextTokenConfig) -> list[Batch]:
    """The windows in batches of like length, longest first, as a plan makes them; whole batches only."""
    ordered = sorted(windows(config).examples, key=lambda window: (window.start - window.stop, window.index))
    size = min(BATCH_SIZE, len(ordered))
    return [ordered[start : start + size] for start in range(0, len(ordered) - size + 1, size)]


def measure_setting(traced: TracedModel, name: str, config: NextTokenConfig) -> Ratio:
    """One kind of text: throughput of next_token divided by that of the bare pass."""
    say(f"\n{name}")
    batches, tracer = batches_of(config), NextTokenTracer(config, traced.tokenizer, [])
    variants = {
        "next_token": lambda number: run_next_token(traced, tracer, batches[number % len(batches)]),
        "bare": lambda number: run_bare(traced, batches[number % len(batches)]),
    }
    for warm_up in variants.values():
        warm_up(0)
    rounds = interleave(variants, num_rounds=_NUM_ROUNDS, max_seconds=_MAX_SECONDS)
    return compare(f"{name}: tokens a second, next_token / bare", rounds, "bare", "next_token", target=">= 0.85")


_STAGES = {
    "capture": ("capture.py", "capture"),
    "checks and copies": ("capture.py", "put"),
    "head and next-token numbers": ("capture.py", "_next_tokens"),
    "head": ("capture.py", "head_logits"),
    "records": ("next_token/tracer.py", "_record"),
    "record encoding": ("__init__.py", "encode_record"),
    "payload encoding": ("tensors.py", "encode"),
}
"""Functions whose time is taken from a profile, by what they stand for."""


def break_down(traced: TracedModel, config: NextTokenConfig) -> dict[str, float]:
    """Where the time of next_token goes, as shares, from a profile over all batches."""
    tracer, profile = NextTokenTracer(config, traced.tokenizer, []), cProfile.Profile()
    for batch in batches_of(config):
        profile.enable()
        run_next_token(traced, tracer, batch)
        profile.disable()
    seconds: dict[str, float] = {}
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for stage, (stage_file, stage_function) in _STAGES.items():
            if function == stage_function and file.endswith(stage_file):
                seconds[stage] = cumulative
    assert seconds.keys() == _STAGES.keys(), f"tracekit has other functions now; found only {list(seconds)}"
    numbers = seconds["head and next-token numbers"]
    parts = {
        "model without head": seconds["capture"] - seconds["checks and copies"] - numbers,
        "head": seconds["head"],
        "log-probabilities, entropies, best tokens": numbers - seconds["head"],
    }
    for stage in ("checks and copies", "records", "record encoding", "payload encoding"):
        parts[stage] = seconds[stage]
    total = sum(parts.values())
    return {stage: part / total for stage, part in parts.items()}


def run() -> Mapping[str, Any] | None:
    """Measure, print and store; None where the demo model is not installed."""
    transformers.utils.logging.disable_progress_bar()
    configs = {name: config_of(source) for name, source in SETTINGS.items()}
    model = next(iter(configs.values())).model
    try:
        tokenizer = load_tokenizer(model)
        traced = load_model(model, model_info(model, variant="chat"), tokenizer, ("hidden_states",))
    except ModelError as error:
        say(f"next_token: skipped. {error}")
        return None
    say(f"next_token: {traced.info.id} ({traced.info.dtype}), batches of {BATCH_SIZE}")
    ratios = [measure_setting(traced, name, config) for name, config in configs.items()]
    shares = {name: break_down(traced, config) for name, config in configs.items()}
    say(ratio_table("Next-token traces: throughputs divided", ratios))
    rows = [[stage, *[f"{share[stage]:.1%}" for share in shares.values()]] for stage in next(iter(shares.values()))]
    say(table("Where its time goes", ["stage", *shares], rows))
    results = {"ratios": ratios, "shares": shares}
    store_results("next_token", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
