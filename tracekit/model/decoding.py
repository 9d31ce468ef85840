"""Capture while decoding: answers, with what the model computed while it wrote them.

The steps of generation hand over what a pass over prompt and answer would: the first one the states of the prompts,
every further one those of a token. Kept side by side they are the tensors of the whole text. The last token is read in
one step more, whose own token is thrown away. Log-probabilities and entropies come from the logits that the tokens were
chosen by. So nothing runs twice.

Whether a model computes in its steps what it computes in a pass is measured (`tracekit.model.proof.prove_decoding`).
Beams and drawn answers share one reading of their prompt, each with a copy of its cache. What beam search found is
then read once more, over the prompt's cache. Rows that influence one another, and texts longer than what was measured,
are captured in a pass afterwards.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch
from torch import Tensor

from tracekit.config import CaptureConfig, DrawConfig, GenerationConfig
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.generation import (
    Generated,
    SomeDrawn,
    StepScorer,
    answer_once,
    draws,
    generate,
    in_groups,
    left_padded,
)
from tracekit.model.steps import Steps, ToAnswer
from tracekit.model.traced import TracedModel
from tracekit.model.values import FINITE, ValuePolicy

__all__ = ["AnswerTrace", "DecodedTraces", "ToAnswer", "answer_several", "answer_traced", "captured_answers"]

AnswerT = TypeVar("AnswerT")


class AnswerTrace(NamedTuple):
    """An answer, and what was captured of it and its prompt."""

    generated: Generated
    text: Text
    trace: Trace


def answer_traced(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    config: GenerationConfig,
    settings: CaptureConfig,
    *,
    from_decoding: bool,
    policy: ValuePolicy = FINITE,
) -> list[AnswerTrace]:
    """Answer prompts, all deterministically or all drawn, and capture what `settings` ask for.

    `from_decoding` captures while the answers are decoded, where this is proven; else, and for all that it is not
    proven for, a pass over prompts and answers follows.

    Raises: as `tracekit.model.capture.capture`.
    """
    is_drawn = asked[0].seed is not None
    assert all((one.seed is not None) == is_drawn for one in asked), "all are drawn, or none is"
    uses_beams = config.num_beams > 1 and not is_drawn
    if not from_decoding or (uses_beams and not _can_repeat(traced, asked)):
        return _in_a_pass(traced, asked, config, settings, policy)

    def answer(rows: list[int]) -> list[AnswerTrace]:
        some = [asked[row] for row in rows]
        way = _with_beams if uses_beams else _while_decoding
        if not _is_proven(traced, some, config.max_new_tokens, by_length=True):
            way = _in_a_pass
        return way(traced, some, config, settings, policy)

    return _in_groups(traced, asked, config, answer)


def answer_several(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    seeds: Sequence[Sequence[str]],
    config: DrawConfig,
    settings: CaptureConfig,
    *,
    are_traced: bool,
    from_decoding: bool,
) -> list[list[AnswerTrace]]:
    """For each prompt its deterministic answer, and after it those that its seeds draw; as many for each.

    Drawn answers hold tensors where they `are_traced`, else their numbers alone. Where `from_decoding` allows it, the
    prompts are read once for all of their answers, which are decoded together.

    Raises: as `tracekit.model.capture.capture`.
    """
    of_drawn = settings if are_traced else msgspec.structs.replace(settings, sites=("none",))
    num_drawn = len(seeds[0])
    if num_drawn == 0 or not (from_decoding and _can_repeat(traced, asked)):
        columns = [answer_traced(traced, asked, config, settings, from_decoding=from_decoding)]
        for number in range(num_drawn):
            drawn = [one._replace(seed=own[number]) for one, own in zip(asked, seeds, strict=True)]
            columns.append(answer_traced(traced, drawn, config, of_drawn, from_decoding=from_decoding))
        return [list(row) for row in zip(*columns, strict=True)]
    uses_beams = config.num_beams > 1
    plans: list[list[str | None]] = [[*([] if uses_beams else [None]), *own] for own in seeds]

    def answer(rows: list[int]) -> list[list[AnswerTrace]]:
        some, drawn = [asked[row] for row in rows], [plans[row] for row in rows]
        if _is_proven(traced, some, config.max_new_tokens, by_length=True):
            kept = of_drawn if uses_beams else settings
            return _together(traced, some, drawn, config, kept, are_traced=are_traced)
        lone = [seeds[row] for row in rows]
        made = answer_several(traced, some, lone, config, settings, are_traced=are_traced, from_decoding=False)
        return [one[1:] if uses_beams else one for one in made]

    made = _in_groups(traced, asked, config, answer)
    if not uses_beams:
        return made
    first = answer_traced(traced, asked, config, settings, from_decoding=True)
    return [[one, *others] for one, others in zip(first, made, strict=True)]


def _in_groups(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    config: GenerationConfig,
    answer: Callable[[list[int]], list[AnswerT]],
) -> list[AnswerT]:
    lengths = [len(one.token_ids) for one in asked]
    by_length = traced.decoding is not None and traced.decoding.fault is None and traced.decoding.by_length
    return in_groups(traced, lengths, config.max_new_tokens, answer, by_length=by_length)


def _can_repeat(traced: TracedModel, asked: Sequence[ToAnswer]) -> bool:
    """Whether prompts may be read once for several answers to each."""
    rule = traced.decoding
    is_proven = rule is not None and rule.fault is None and rule.repeats is True
    has_more = all(len(one.token_ids) > 1 for one in asked)
    return is_proven and has_more and not any(one.inputs or one.token_type_ids for one in asked)


def _in_a_pass(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    config: GenerationConfig,
    settings: CaptureConfig,
    policy: ValuePolicy,
) -> list[AnswerTrace]:
    """Answer, then run prompts and answers through the model."""
    prompts, seeds, beside = _parts(asked)
    answers = answer_once(traced, prompts, config, seeds or None, **beside)
    return captured_answers(traced, asked, answers, settings, policy)


def captured_answers(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    answers: Sequence[Generated],
    settings: CaptureConfig,
    policy: ValuePolicy = FINITE,
) -> list[AnswerTrace]:
    """Answers that are there, captured in a pass over prompts and answers.

    Raises: as `tracekit.model.capture.capture`.
    """
    texts = [one.text(answer) for one, answer in zip(asked, answers, strict=True)]
    traces = capture(traced, texts, settings, policy=policy)
    return [AnswerTrace(*parts) for parts in zip(answers, texts, traces, strict=True)]


def _while_decoding(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    config: GenerationConfig,
    settings: CaptureConfig,
    policy: ValuePolicy,
) -> list[AnswerTrace]:
    """The same of prompts that run together, captured step by step."""
    steps = Steps(traced, asked, settings, policy)
    prompts, seeds, beside = _parts(asked)
    drawing = draws(config, seeds) if seeds and isinstance(config, DrawConfig) else []
    processors = [steps.scorer, *drawing]
    with steps.recording():
        answers = generate(traced, prompts, config, num_beams=1, processors=processors, late=steps.scorer, **beside)
    return _taken(traced, steps, asked, answers, settings, policy)


def _parts(asked: Sequence[ToAnswer]) -> tuple[list[list[int]], list[str], dict[str, Any]]:
    """Prompts, their seeds where they have any, and what the model reads beside them."""
    inputs = [one.inputs for one in asked]
    segments = [one.token_type_ids for one in asked if one.token_type_ids is not None]
    seeds = [one.seed for one in asked if one.seed is not None]
    return [one.token_ids for one in asked], seeds, {"inputs": inputs, "segments": segments}


def _taken(
    traced: TracedModel,
    steps: Steps,
    asked: Sequence[ToAnswer],
    answers: Sequence[Generated],
    settings: CaptureConfig,
    policy: ValuePolicy,
) -> list[AnswerTrace]:
    """Answers with what their steps have handed over; in a pass, text by text, where not all of that is finite."""
    texts = [one.text(answer) for one, answer in zip(asked, answers, strict=True)]
    traces = steps.traces(texts, range(len(texts)))
    if traces is None:
        return captured_answers(traced, asked, answers, settings, policy)
    return [AnswerTrace(*parts) for parts in zip(answers, texts, traces, strict=True)]


def _together(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    seeds: Sequence[Sequence[str | None]],
    config: DrawConfig,
    settings: CaptureConfig,
    *,
    are_traced: bool,
) -> list[list[AnswerTrace]]:
    """Several answers to each prompt, which is read once: those without a seed greedy, the others drawn."""
    repeat, flat = len(seeds[0]), [seed for own in seeds for seed in own]
    chosen = [row for row, seed in enumerate(flat) if are_traced or seed is None]
    steps = Steps(traced, asked, settings, FINITE, repeat=repeat, chosen=chosen)
    with steps.recording():
        cache = _read(traced, *_prompts(traced, asked))
        cache.reorder_cache(torch.arange(len(asked), device=traced.device).repeat_interleave(repeat))
        answers = generate(
            traced,
            [one.token_ids for one in asked for _ in range(repeat)],
            config,
            num_beams=1,
            processors=[steps.scorer, SomeDrawn(config, flat)],
            late=steps.scorer,
            cache=cache,
        )
    texts = [asked[row // repeat].text(answer) for row, answer in enumerate(answers)]
    others = sorted({*range(len(texts))} - {*chosen})
    traces: dict[int, Trace] = {}
    for rows, made in ((chosen, steps.traces), (others, steps.numbers)):
        if rows:
            traces |= zip(rows, made([texts[row] for row in rows], rows) or [], strict=True)
    whole = [AnswerTrace(answers[row], texts[row], traces[row]) for row in range(len(texts))]
    return [whole[start : start + repeat] for start in range(0, len(whole), repeat)]


def _with_beams(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    config: GenerationConfig,
    settings: CaptureConfig,
    policy: ValuePolicy,
) -> list[AnswerTrace]:
    """Answers by beam search, whose beams share one reading of the prompt; then a pass over the answers alone, which
    goes on from the prompt's cache."""
    steps = Steps(traced, asked, settings, policy, is_decoding=False)
    ids, mask = _prompts(traced, asked)
    with steps.recording():
        cache = _read(traced, ids, mask)
    kept = copy.deepcopy(cache)
    cache.reorder_cache(torch.arange(len(asked), device=traced.device).repeat_interleave(config.num_beams))
    prompts, _, _ = _parts(asked)
    answers = generate(traced, prompts, config, num_beams=config.num_beams, processors=[], cache=cache)
    longest = max(len(answer.token_ids) for answer in answers)
    rows = [[prompt[-1], *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    padded = torch.tensor([row + [0] * (1 + longest - len(row)) for row in rows], device=ids.device)
    real = torch.tensor([[1] * len(row) + [0] * (1 + longest - len(row)) for row in rows], device=ids.device)
    with steps.recording():
        _read(traced, padded, torch.cat([mask, real], 1), kept)
    return _taken(traced, steps, asked, answers, settings, policy)


def _prompts(traced: TracedModel, asked: Sequence[ToAnswer]) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts without their last tokens, padded on the left."""
    ids, mask = left_padded(traced, [one.token_ids for one in asked], traced.model.generation_config.pad_token_id)
    return ids[:, :-1], mask[:, :-1]


def _read(traced: TracedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
    """Have the model read tokens (B, T) over a cache, its mask over both; the cache with them."""
    inner: Any = traced.anatomy.inner
    takes_positions = "position_ids" in signature(inner.forward).parameters
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    further = {"position_ids": positions} if takes_positions else {}
    traced.begin_pass()
    with torch.inference_mode():
        output = inner(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **further)
    return output.past_key_values


class DecodedTraces:
    """Traces of prompts that are answered each in its own way, taken while they are decoded.

        decoded = DecodedTraces(traced, asked, wanted, settings, max_new_tokens=64)
        answer_variously(..., recording=decoded.recording)
        decoded.traces({row: text})

    `wanted` says of which of them traces are wanted.
    """

    def __init__(
        self,
        traced: TracedModel,
        asked: Sequence[ToAnswer],
        wanted: Sequence[bool],
        settings: CaptureConfig,
        *,
        max_new_tokens: int,
    ) -> None:
        self._traced, self._asked, self._wanted = traced, asked, wanted
        self._settings, self._max_new_tokens = settings, max_new_tokens
        self._recorded: list[tuple[list[int], Steps]] = []

    @contextmanager
    def recording(self, rows: list[int]) -> Iterator[StepScorer | None]:
        """While open, rows that run together are recorded, where one is wanted and decoding is proven for them."""
        asked = [self._asked[row] for row in rows]
        is_wanted = any(self._wanted[row] for row in rows)
        if not (is_wanted and _is_proven(self._traced, asked, self._max_new_tokens, by_length=False)):
            yield None
            return
        steps = Steps(self._traced, asked, self._settings, FINITE)
        with steps.recording():
            yield steps.scorer
        self._recorded.append((rows, steps))

    def traces(self, texts: Mapping[int, Text]) -> dict[int, Trace]:
        """Traces of texts by their rows; of those that were recorded, once.

        Raises: as `tracekit.model.capture.capture`.
        """
        found: dict[int, Trace] = {}
        while self._recorded:
            rows, steps = self._recorded.pop()
            own = [(row, place) for place, row in enumerate(rows) if row in texts]
            made = steps.traces([texts[row] for row, _ in own], [place for _, place in own])
            found |= zip([row for row, _ in own], made or [], strict=True)
        return found


def _is_proven(traced: TracedModel, asked: Sequence[ToAnswer], max_new_tokens: int, *, by_length: bool) -> bool:
    """Whether decoding is proven for prompts that run together; `by_length` where they are put together by length."""
    rule = traced.decoding
    longest = max(len(one.token_ids) for one in asked) + max_new_tokens
    if rule is None or rule.fault is not None or (rule.limit is not None and longest > rule.limit):
        return False
    return by_length or not rule.by_length or len({len(one.token_ids) for one in asked}) == 1
