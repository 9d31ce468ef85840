"""Would it pay to compute the prefix that the three prompts of a question share only once?

    unshared    the three prompts of a batch of questions, each in a pass of its own, hidden states of every position
    shared      the common beginning once, with a cache; then the rest of each prompt on a copy of the cache
    run         what builders.introspection does for the three passes: generate, capture, score, encode

The first two are bare transformers. `shared` is held against `unshared` at every position, and its saving is set
against what a run costs in all. A run reads every prompt twice, to generate and to capture.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import transformers
from torch import Tensor

from benchmarks.measure import compare, interleave, parse_arguments, ratio_table, say, store_results
from builders.introspection.config import IntrospectionConfig
from builders.introspection.questions import McqQuestion, read_questions
from builders.introspection.task import single_passes
from builders.introspection.tracer import IntrospectionTracer
from builders.kit.columns import ChoiceSource
from tracekit.config import ModelConfig
from tracekit.errors import ModelError
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.traced import TracedModel
from tracekit.records import encode_record
from tracekit.task import Place
from tracekit.tensors import encode

BATCH_SIZE = 8
_NUM_ROUNDS = 6
_MAX_SECONDS = 150

Prompts = Sequence[Sequence[list[int]]]
"""Ids of the prompts, pass by pass."""


def common_lengths(prompts: Prompts) -> list[int]:
    """Tokens that all prompts of a question begin with; one at least is left to each."""
    lengths = []
    for some in zip(*prompts, strict=True):
        same = next((i for i, ids in enumerate(zip(*some, strict=False)) if len(set(ids)) > 1), min(map(len, some)) - 1)
        lengths.append(same)
    return lengths


def padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T), padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


@torch.inference_mode()
def run_unshared(traced: TracedModel, prompts: Prompts) -> list[list[Tensor]]:
    """Hidden states (L+1, T, D) of every prompt, pass by pass."""
    inner: Any = traced.anatomy.inner
    states = []
    for rows in prompts:
        ids, mask = padded(rows)
        hidden = inner(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
        states.append([torch.stack([layer[i, : len(row)] for layer in hidden]) for i, row in enumerate(rows)])
    return states


@torch.inference_mode()
def run_shared(traced: TracedModel, prompts: Prompts) -> list[list[Tensor]]:
    """The same, the common beginning computed once."""
    inner: Any = traced.anatomy.inner
    lengths = common_lengths(prompts)
    ids, mask = padded([row[:length] for row, length in zip(prompts[0], lengths, strict=True)])
    first = inner(input_ids=ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
    states = []
    for rows in prompts:
        rest, rest_mask = padded([row[length:] for row, length in zip(rows, lengths, strict=True)])
        hidden = inner(
            input_ids=rest,
            attention_mask=torch.cat([mask, rest_mask], 1),
            position_ids=torch.tensor(lengths)[:, None] + torch.arange(rest.shape[1]),
            past_key_values=copy.deepcopy(first.past_key_values),
            output_hidden_states=True,
        ).hidden_states
        states.append(
            [
                torch.stack(
                    [
                        torch.cat([a[i, :n], b[i, : len(row) - n]])
                        for a, b in zip(first.hidden_states, hidden, strict=True)
                    ]
                )
                for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
            ]
        )
    return states


def run_builder(traced: TracedModel, tracers: Sequence[IntrospectionTracer], batch: Sequence[McqQuestion]) -> int:
    """Trace and encode a batch in every pass; bytes that would be written."""
    samples = [sample for tracer in tracers for sample in tracer.trace(traced, batch, Place("", 0, 0))]
    return sum(len(encode_record(sample.record)) + encode(sample.trace.tensors).size for sample in samples)


def run() -> Mapping[str, Any] | None:
    """Measure, print and store; None where the demo model is not installed."""
    transformers.utils.logging.disable_progress_bar()
    config = IntrospectionConfig(
        model=ModelConfig(model="demo", device="cpu"), source=ChoiceSource(source="sample", limit=BATCH_SIZE)
    )
    try:
        tokenizer = load_tokenizer(config.model)
        traced = load_model(config.model, model_info(config.model, variant="chat"), tokenizer, config.capture.sites)
    except ModelError as error:
        say(f"prefix: skipped. {error}")
        return None
    parts, batch = single_passes(config), read_questions(config.source).examples
    tracers = [IntrospectionTracer(part, tokenizer) for part in parts]
    silent = [
        msgspec.structs.replace(part, capture=msgspec.structs.replace(part.capture, sites=("none",))) for part in parts
    ]
    texts = [IntrospectionTracer(part, tokenizer).trace(traced, batch, Place("", 0, 0)) for part in silent]
    prompts = [[sample.record.token_ids[: sample.record.prompt_length] for sample in some] for some in texts]
    shared, total = sum(common_lengths(prompts)), sum(len(ids) for some in prompts for ids in some)
    say(f"prefix: {traced.info.id}, {BATCH_SIZE} questions: {total} prompt tokens in three passes, {3 * shared} common")
    variants = {
        "unshared": lambda number: run_unshared(traced, prompts),
        "shared": lambda number: run_shared(traced, prompts),
        "run": lambda number: run_builder(traced, tracers, batch),
    }
    pairs = zip(variants["unshared"](0), variants["shared"](0), strict=True)
    error = max(((a - b).abs().max() / a.abs().max()).item() for some in pairs for a, b in zip(*some, strict=True))
    say(f"largest relative difference of a hidden state: {error:.1e}")
    rounds = interleave(variants, num_rounds=_NUM_ROUNDS, max_seconds=_MAX_SECONDS)
    ratios = [
        compare("time of the passes, shared / unshared", rounds, "shared", "unshared"),
        compare("time of a run / of its unshared passes", rounds, "run", "unshared"),
    ]
    saved = (1 - ratios[0].median) / ratios[1].median
    say(ratio_table("Sharing the prefix of three prompts", ratios))
    say(f"share of a run's time that it would save: {saved:.0%}; {2 * saved:.0%} if generation shared it as well")
    results = {
        "ratios": ratios,
        "common_share": 3 * shared / total,
        "largest_relative_difference": error,
        "saved_share_of_a_run": saved,
    }
    store_results("prefix", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
