"""Capture beside the usual ways: the demo model answers sample questions in batches of 8.

    tracekit            batched generation, captured while it decodes (beams: in a teacher-forced pass afterwards): all
                        hidden states and attention, every layer
    hidden only         the same without attention
    in a pass           generation, then a teacher-forced pass, as `--capture-from pass` does it
    several             a greedy answer, its hidden states captured, and four drawn ones; beside `generate` and
                        `generate(num_return_sequences=5)`, both plain
    stepwise            one prompt at a time, eager, `generate(output_hidden_states=True, output_attentions=True)`, and
                        the nested tuples stitched into (L+1, T, D) and (L, H, T, T)
    plain               batched generation alone, the attention that transformers selects, nothing captured

Every round takes another batch, batched by length as a plan does it, and every variant of a round the same one.
Stepwise stops at each answer's own end while a batch goes on to its longest, so the ratio depends on the answers: it is
measured on answers as they come and on answers of 32 tokens each (end-of-sequence off, for all variants alike).
"""

import cProfile
import json
import pstats
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from benchmarks.measure import (
    Ratio,
    Round,
    compare,
    interleave,
    parse_arguments,
    ratio_table,
    say,
    store_results,
    table,
)
from builders.trivia_qa.task import SAMPLE, SYSTEM
from tracekit.config import AnswerCaptureConfig, DrawConfig, GenerationConfig, ModelConfig, PromptConfig
from tracekit.errors import ModelError
from tracekit.model.capture import Text, Trace
from tracekit.model.decoding import ToAnswer, answer_several, answer_traced
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.prompts import Prompter
from tracekit.model.proof import prove_decoding
from tracekit.model.traced import TracedModel
from tracekit.tensors import Payload, encode, unpack_causal

BATCH_SIZE = 8
MAX_NEW_TOKENS = 32
NUM_BEAMS = 5
BOTH = AnswerCaptureConfig(sites=("hidden_states", "attentions"))
HIDDEN = AnswerCaptureConfig(sites=("hidden_states",))
IN_A_PASS = AnswerCaptureConfig(sites=("hidden_states", "attentions"), capture_from="pass")

Prompts = Sequence[list[int]]


class Traced(NamedTuple):
    """What a tracekit variant made of a batch."""

    texts: list[Text]
    traces: list[Trace]
    payloads: list[Payload]


class Stitched(NamedTuple):
    """What the stepwise way makes of one prompt."""

    token_ids: list[int]
    hidden_states: np.ndarray
    attentions: np.ndarray


class Setting(NamedTuple):
    """One way of answering, and how long it is measured."""

    name: str
    num_beams: int
    stops: bool
    """Whether answers end where the model ends them."""
    num_rounds: int
    max_seconds: float


SETTINGS = (
    Setting("greedy", 1, True, num_rounds=4, max_seconds=100),
    Setting("greedy, 32 tokens each", 1, False, num_rounds=3, max_seconds=90),
    Setting(f"{NUM_BEAMS} beams", NUM_BEAMS, True, num_rounds=3, max_seconds=130),
)


def run_tracekit(traced: TracedModel, prompts: Prompts, config: AnswerCaptureConfig, num_beams: int) -> Traced:
    """Generate, capture, encode: what a run does before it writes."""
    settings = GenerationConfig(num_beams=num_beams, max_new_tokens=MAX_NEW_TOKENS)
    asked = [ToAnswer(prompt) for prompt in prompts]
    made = answer_traced(traced, asked, settings, config, from_decoding=config.capture_from != "pass")
    traces = [one.trace for one in made]
    return Traced([one.text for one in made], traces, [encode(trace.tensors) for trace in traces])


def run_plain(traced: TracedModel, prompts: Prompts, num_beams: int) -> torch.Tensor:
    """Batched generation as everybody writes it: left padding, no capture."""
    return _generated(traced, prompts, do_sample=False, num_beams=num_beams)


def _generated(traced: TracedModel, prompts: Prompts, **how: Any) -> torch.Tensor:
    longest = max(len(prompt) for prompt in prompts)
    pad = traced.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        return traced.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, **how)


def run_several(traced: TracedModel, prompts: Prompts) -> object:
    """A greedy answer, captured, and four drawn ones to each prompt."""
    settings = DrawConfig(num_beams=1, max_new_tokens=MAX_NEW_TOKENS)
    seeds = [[f"{row} {number}" for number in range(4)] for row in range(len(prompts))]
    asked = [ToAnswer(prompt) for prompt in prompts]
    return answer_several(traced, asked, seeds, settings, HIDDEN, are_traced=False, from_decoding=True)


def run_plain_several(traced: TracedModel, prompts: Prompts) -> object:
    """The same by plain generation: greedy, and five drawn together."""
    return _generated(traced, prompts, do_sample=False), _generated(
        traced, prompts, do_sample=True, num_return_sequences=5
    )


def run_stepwise(traced: TracedModel, prompts: Prompts, num_beams: int) -> list[Stitched]:
    """One prompt at a time with everything returned at every step, then stitched."""
    with _eager(traced.model):
        return [_stepwise_one(traced, prompt, num_beams) for prompt in prompts]


def _stepwise_one(traced: TracedModel, prompt: list[int], num_beams: int) -> Stitched:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = traced.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=MAX_NEW_TOKENS,
            output_hidden_states=True,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    token_ids = output.sequences[0].tolist()
    num_steps = len(token_ids) - len(prompt)
    rows = output.beam_indices[0, :num_steps].tolist() if num_beams > 1 else [0] * num_steps
    hidden = torch.cat(
        [torch.stack([layer[row] for layer in output.hidden_states[step]]) for step, row in enumerate(rows)], dim=1
    )
    return Stitched(token_ids, hidden.numpy(), _stitch_attention(output.attentions, rows).numpy())


def _stitch_attention(steps: Sequence[Sequence[torch.Tensor]], rows: Sequence[int]) -> torch.Tensor:
    """The steps' (B, H, T_step, T_so_far) of every layer as one (L, H, T, T)."""
    num_heads = steps[0][0].shape[1]
    num_tokens = steps[len(rows) - 1][0].shape[-1]
    whole = torch.zeros(len(steps[0]), num_heads, num_tokens, num_tokens)
    for step, row in enumerate(rows):
        for layer, value in enumerate(steps[step]):
            stop = value.shape[-1]
            whole[layer, :, stop - value.shape[2] : stop, :stop] = value[row]
    return whole


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _ending(traced: TracedModel, *, stops: bool) -> Iterator[None]:
    """Let answers end with end-of-sequence, or never."""
    settings = traced.model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = before if stops else None
    try:
        yield
    finally:
        settings.eos_token_id = before


def check_agreement(traced: TracedModel, prompts: Prompts) -> dict[str, float]:
    """That tracekit and stepwise give the same: share of equal texts, and the largest differences of their tensors.

    Differences are divided by the largest value of the tensor. Stepwise never sees the last token.
    """
    ours, theirs = run_tracekit(traced, prompts, BOTH, 1), run_stepwise(traced, prompts, 1)
    same, hidden, attention = 0, 0.0, 0.0
    for text, trace, other in zip(ours.texts, ours.traces, theirs, strict=True):
        if text.token_ids == other.token_ids:
            same += 1
            num_tokens = len(text.token_ids)
            full = unpack_causal(trace.tensors["attentions"], np.arange(num_tokens), num_tokens)
            hidden = max(hidden, _difference(trace.tensors["hidden_states"][:, :-1], other.hidden_states))
            attention = max(attention, _difference(full[:, :, :-1, :-1], other.attentions))
    return {
        "same_texts": same / len(prompts),
        "hidden_states_relative_difference": hidden,
        "attentions_relative_difference": attention,
    }


def _difference(values: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(values - reference).max() / np.abs(reference).max())


def measure_setting(traced: TracedModel, batches: Sequence[Prompts], setting: Setting) -> list[Ratio]:
    """All variants of one way of answering."""
    say(f"\n{setting.name}")

    def of_batch(run: Callable[..., object], *arguments: object) -> Callable[[int], object]:
        return lambda number: run(traced, batches[number % len(batches)], *arguments, setting.num_beams)

    variants = {"tracekit": of_batch(run_tracekit, BOTH), "stepwise": of_batch(run_stepwise)}
    variants["plain"] = of_batch(run_plain)
    if setting.num_beams == 1:
        variants["hidden only"] = of_batch(run_tracekit, HIDDEN)
        variants["in a pass"] = of_batch(run_tracekit, IN_A_PASS)
    with _ending(traced, stops=setting.stops):
        for warm_up in (run_tracekit, BOTH), (run_stepwise,), (run_plain,):
            warm_up[0](traced, batches[-1][:1], *warm_up[1:], setting.num_beams)
        rounds = interleave(variants, num_rounds=setting.num_rounds, max_seconds=setting.max_seconds)
    return _ratios(setting, rounds)


def measure_several(traced: TracedModel, batches: Sequence[Prompts]) -> list[Ratio]:
    """Several answers to each prompt."""
    say("\n1 greedy + 4 drawn")
    variants: dict[str, Callable[[int], object]] = {
        "several": lambda number: run_several(traced, batches[number % len(batches)]),
        "plain": lambda number: run_plain_several(traced, batches[number % len(batches)]),
    }
    for variant in variants.values():
        variant(len(batches) - 1)
    rounds = interleave(variants, num_rounds=3, max_seconds=100)
    return [compare("1 greedy + 4 drawn: tracekit / plain", rounds, "several", "plain", target="<= 1")]


def _ratios(setting: Setting, rounds: Sequence[Round]) -> list[Ratio]:
    return [
        compare(
            f"{setting.name}: {numerator} / {denominator}",
            rounds,
            numerator,
            denominator,
            target=target if setting.num_beams == 1 else "<= 0.7" if numerator == "tracekit" else "",
        )
        for numerator, denominator, target in (
            ("stepwise", "tracekit", ">= 3.2"),
            ("tracekit", "plain", "<= 1.08"),
            ("hidden only", "plain", "<= 1.08"),
            ("in a pass", "plain", ""),
        )
        if numerator in rounds[0]
    ]


_STAGES = {
    "whole": ("model/decoding.py", "answer_traced"),
    "generation": ("model/generation.py", "generate"),
    "checks and copies": ("model/capture.py", "put"),
    "payload encoding": ("tensors.py", "encode"),
}
"""Functions of tracekit whose time is taken from a profile, by what they stand for."""


def break_down(traced: TracedModel, batches: Sequence[Prompts], num_beams: int) -> dict[str, float]:
    """Where tracekit's time goes, as shares, from a profile over some batches."""
    profile = cProfile.Profile()
    for prompts in batches:
        profile.enable()
        run_tracekit(traced, prompts, BOTH, num_beams)
        profile.disable()
    seconds: dict[str, float] = {}
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for stage, (stage_file, stage_function) in _STAGES.items():
            if function == stage_function and file.endswith(f"tracekit/{stage_file}"):
                seconds[stage] = cumulative
    assert seconds.keys() == _STAGES.keys(), f"tracekit has other functions now; found only {list(seconds)}"
    parts = {stage: seconds[stage] for stage in ("generation", "checks and copies", "payload encoding")}
    parts["all else of the capture"] = seconds["whole"] - seconds["generation"] - seconds["checks and copies"]
    total = sum(parts.values())
    return {stage: part / total for stage, part in parts.items()}


def count_tokens(traced: TracedModel, prompts: Prompts) -> dict[str, float]:
    """What a batch consists of: tokens, and the share of the capture pass that is padding."""
    made = run_tracekit(traced, prompts, HIDDEN, 1)
    totals = [len(text.token_ids) for text in made.texts]
    answers = [len(text.token_ids) - text.prompt_length for text in made.texts]
    return {
        "prompt_tokens_mean": sum(totals) / len(totals) - sum(answers) / len(answers),
        "answer_tokens_mean": sum(answers) / len(answers),
        "answer_tokens_max": max(answers),
        "padding_share_of_capture": 1 - sum(totals) / (max(totals) * len(totals)),
    }


def load() -> tuple[TracedModel, list[Prompts]]:
    """The demo model and the batches of sample questions, like lengths together."""
    transformers.utils.logging.disable_progress_bar()
    config = ModelConfig(model="demo", device="cpu")
    tokenizer = load_tokenizer(config)
    traced = load_model(config, model_info(config, variant="chat"), tokenizer, ("hidden_states", "attentions"))
    rule = prove_decoding(traced)
    assert rule.fault is None, rule
    prompter = Prompter(tokenizer, PromptConfig(), default_system=SYSTEM)
    rows = [json.loads(line) for line in Path(SAMPLE).read_text(encoding="utf-8").splitlines()]
    ordered = sorted((prompter.prompt(row["question"]).token_ids for row in rows), key=len, reverse=True)
    edges = range(0, len(ordered) + 1, BATCH_SIZE)
    return traced, [ordered[start:stop] for start, stop in pairwise(edges)]


def run() -> Mapping[str, Any] | None:
    """Measure, print and store; None where the demo model is not installed."""
    try:
        traced, batches = load()
    except ModelError as error:
        say(f"capture: skipped. {error}")
        return None
    say(f"capture: {traced.info.id} ({traced.info.dtype}), batches of {BATCH_SIZE}, {torch.get_num_threads()} threads")
    agreement = check_agreement(traced, batches[0][:4])
    tokens = count_tokens(traced, batches[len(batches) // 2])
    shares = {
        "greedy": break_down(traced, batches[:3], 1),
        f"{NUM_BEAMS} beams": break_down(traced, batches[3:4], NUM_BEAMS),
    }
    ratios = [ratio for setting in SETTINGS for ratio in measure_setting(traced, batches, setting)]
    ratios += measure_several(traced, batches)
    say(ratio_table("Capture: times divided", ratios))
    rows = [[stage, *[f"{share[stage]:.1%}" for share in shares.values()]] for stage in shares["greedy"]]
    say(table("Where tracekit's time goes", ["stage", *shares], rows))
    facts = [[name, f"{value:.3g}"] for name, value in {**agreement, **tokens}.items()]
    say(table("Agreement with stepwise, and what a batch is", ["", "value"], facts))
    results = {"ratios": ratios, "shares": shares, "agreement": agreement, "tokens": tokens}
    store_results("capture", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
