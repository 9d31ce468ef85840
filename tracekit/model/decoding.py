"""Capture while decoding: answers, with what the model computed while it wrote them.

The steps of generation hand over what a pass over prompt and answer would: the first one the states of the prompts,
every further one those of a token. Kept side by side they are the tensors of the whole text. The last token is read in
one step more, whose own token is thrown away. Log-probabilities and entropies come from the logits that the tokens were
chosen by. So nothing runs twice.

Whether a model computes in its steps what it computes in a pass is measured (`tracekit.model.proof.prove_decoding`).
Beams, rows that influence one another, and texts beyond what was measured are captured in a pass afterwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.config import CaptureConfig, DrawConfig, GenerationConfig
from tracekit.errors import CaptureError
from tracekit.model.capture import (
    Buffers,
    Stand,
    Text,
    Trace,
    WantedRows,
    asked_of,
    capture,
    head_scores,
    resolve_layers,
)
from tracekit.model.generation import Generated, StepScorer, answer_once, draws, generate, in_groups
from tracekit.model.hooks import AttentionCall, record
from tracekit.model.scores import Scores, score
from tracekit.model.traced import TracedModel
from tracekit.model.values import FINITE, ValuePolicy
from tracekit.sites import ATTENTION_SITES, SITES, resolve_sites

__all__ = ["AnswerTrace", "DecodedTraces", "ToAnswer", "answer_traced", "captured_answers"]


class ToAnswer(NamedTuple):
    """A prompt that is to be answered."""

    token_ids: list[int]
    """The prompt."""
    seed: str | None = None
    """Decides the draw; None where the answer is deterministic."""
    asked_ids: tuple[int, ...] = ()
    """Tokens whose logits are wanted in the place of the answer's first one."""
    inputs: Mapping[str, Tensor] = MappingProxyType({})
    """What the model takes beside the tokens, such as `pixel_values` (1, C, H, W)."""
    token_type_ids: list[int] | None = None
    """Segment of each token, for models that have segments."""

    def text(self, answer: Generated) -> Text:
        """Prompt and answer as they are captured."""
        kinds = self.token_type_ids
        return Text(
            self.token_ids + answer.token_ids,
            len(self.token_ids),
            token_type_ids=None if kinds is None else [*kinds, *[0] * len(answer.token_ids)],
            inputs=self.inputs,
            asked_ids=self.asked_ids,
        )


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
    if not from_decoding or (config.num_beams > 1 and not is_drawn):
        return _in_a_pass(traced, asked, config, settings, policy)

    def answer(rows: list[int]) -> list[AnswerTrace]:
        some = [asked[row] for row in rows]
        is_proven = _is_proven(traced, some, config.max_new_tokens, by_length=True)
        return (_while_decoding if is_proven else _in_a_pass)(traced, some, config, settings, policy)

    lengths = [len(one.token_ids) for one in asked]
    by_length = traced.decoding is not None and traced.decoding.fault is None and traced.decoding.by_length
    return in_groups(traced, lengths, config.max_new_tokens, answer, by_length=by_length)


def _in_a_pass(
    traced: TracedModel,
    asked: Sequence[ToAnswer],
    config: GenerationConfig,
    settings: CaptureConfig,
    policy: ValuePolicy,
) -> list[AnswerTrace]:
    """Answer, then run prompts and answers through the model."""
    seeds = [one.seed for one in asked if one.seed is not None]
    answers = answer_once(
        traced,
        [one.token_ids for one in asked],
        config,
        seeds or None,
        inputs=[one.inputs for one in asked],
        segments=[one.token_type_ids for one in asked if one.token_type_ids is not None],
    )
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
    steps = _Steps(traced, asked, settings, policy)
    seeds = [one.seed for one in asked if one.seed is not None]
    drawing = draws(config, seeds) if seeds and isinstance(config, DrawConfig) else []
    with steps.recording():
        answers = generate(
            traced,
            [one.token_ids for one in asked],
            config,
            num_beams=1,
            processors=[steps.scorer, *drawing],
            inputs=[one.inputs for one in asked],
            segments=[one.token_type_ids for one in asked if one.token_type_ids is not None],
            late=steps.scorer,
        )
    texts = [one.text(answer) for one, answer in zip(asked, answers, strict=True)]
    traces = steps.traces(texts, range(len(texts)))
    if traces is None:  # where not everything is finite, texts run alone
        return captured_answers(traced, asked, answers, settings, policy)
    return [AnswerTrace(*parts) for parts in zip(answers, texts, traces, strict=True)]


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
        self._recorded: list[tuple[list[int], _Steps]] = []

    @contextmanager
    def recording(self, rows: list[int]) -> Iterator[StepScorer | None]:
        """While open, rows that run together are recorded, where one is wanted and decoding is proven for them."""
        asked = [self._asked[row] for row in rows]
        is_wanted = any(self._wanted[row] for row in rows)
        if not (is_wanted and _is_proven(self._traced, asked, self._max_new_tokens, by_length=False)):
            yield None
            return
        steps = _Steps(self._traced, asked, self._settings, FINITE)
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


class _Scorer(StepScorer):
    """Numbers of the raw logits of each step, taken when its token is chosen."""

    def __init__(self, asked: Tensor, width: int) -> None:
        self._asked, self._width = asked, width
        self._logits: Tensor | None = None
        self._steps: list[Scores] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._logits = scores
        return scores

    def take(self, tokens: Tensor) -> None:
        """The tokens (B,) that the step has chosen."""
        assert self._logits is not None, "the processors run before a token is chosen"
        asked = self._asked.to(tokens.device)
        self._steps.append(score(self._logits, tokens.to(self._logits.device), asked, self._width))
        self._logits = None

    def rows(self) -> Scores:
        """Numbers of all steps and rows, (steps x B, ...), step by step, on the CPU."""
        return Scores(*(torch.cat(column).cpu() for column in zip(*self._steps, strict=True)))


class _Steps:
    """What the steps of one decoded batch hand over, site by site and layer by layer."""

    def __init__(
        self, traced: TracedModel, asked: Sequence[ToAnswer], settings: CaptureConfig, policy: ValuePolicy
    ) -> None:
        self._traced, self._settings, self._policy = traced, settings, policy
        sites = resolve_sites(settings.sites)
        self._sites = tuple(site for site in sites if SITES[site].source != "head")
        self._layers = {site: self._wanted_layers(site) for site in self._sites}
        self._num_rows, self._longest = len(asked), max(len(one.token_ids) for one in asked)
        self._spans: list[tuple[int, int]] = []
        """Of each step, the positions that it reads."""
        self._chunks: dict[tuple[str, int], list[Tensor]] = {}
        self._calls: dict[int, list[AttentionCall]] = {}
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._held: list[list[AttentionCall]] = []
        rule = traced.decoding
        self._keeps_queries = rule is not None and rule.keeps_queries and "attentions" in self._sites
        self._prompt_output: Any = None
        self._is_finite = torch.ones((), dtype=torch.bool)
        wants_topk = len(sites) > len(self._sites)
        self._wants_prompt_rows = wants_topk and settings.tokens in ("all", "prompt")
        ids = [Text(one.token_ids, len(one.token_ids), asked_ids=one.asked_ids) for one in asked]
        self.scorer = _Scorer(asked_of(ids, [[0]] * len(ids)), settings.topk if wants_topk else 1)

    def _wanted_layers(self, site: str) -> set[int]:
        available = self._traced.layouts[site].layers
        if "L" not in SITES[site].axes:
            return {available[0]}
        return {*resolve_layers(self._settings.layers, available)}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While open, what the model computes is kept."""
        inner = self._traced.anatomy.inner
        hooked = tuple(site for site in self._sites if SITES[site].source in ("attention", "block"))
        calls = None
        if self._keeps_queries:
            hooked, calls = tuple(site for site in hooked if site != "attentions"), self._keep_call
        handles = [
            inner.register_forward_pre_hook(self._begin, with_kwargs=True),
            inner.register_forward_hook(self._end),
        ]
        try:
            rule = self._traced.resid_rule
            with record(self._traced.model, self._traced.anatomy, hooked, self._put, resid_rule=rule, calls=calls):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A step begins. Where its tokens stand is counted from the end: some models read the whole text anew."""
        given = next(one for one in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if one is not None)
        stop = self._spans[-1][1] + 1 if self._spans else self._longest
        start = stop - given.shape[1]
        if start == 0:
            self._spans, self._chunks, self._calls = [], {}, {}
        elif not self._spans or start != self._spans[-1][1]:
            raise CaptureError(f"{given.shape[1]} tokens are read in the decoding step that ends at token {stop}")
        self._spans.append((start, stop))
        return args, kwargs | ({"output_hidden_states": True} if "hidden_states" in self._layers else {})

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "hidden_states", None) if "hidden_states" in self._layers else None
        for layer, value in enumerate(hidden or ()):
            self._put("hidden_states", layer, value)
        last = output.last_hidden_state
        if self._policy.may_be_nonfinite:
            self._is_finite = self._is_finite.to(last.device) & last.isfinite().all()
        if self._wants_prompt_rows and self._spans[-1][0] == 0:
            self._prompt_output = type(output)(last_hidden_state=last[:, : self._longest].clone())

    def _put(self, site: str, layer: int, value: Tensor) -> None:
        if layer not in self._layers[site]:
            return
        start, stop = self._spans[-1]
        count = stop - start
        if site in ("keys", "values"):  # of the whole text so far, where they come from a cache
            value = value[:, :, -count:]
        length = value.shape[2 if site in ATTENTION_SITES else 1]
        if length != count:
            raise CaptureError(f"{site}, layer {layer}: {length} rows in a decoding step of {count} tokens")
        chunks = self._chunks.setdefault((site, layer), [])
        chunks[len(self._spans) - 1 :] = [value.detach().clone()]  # some layers attend twice, and hand over the same

    def _keep_call(self, layer: int, call: AttentionCall) -> None:
        """Keep what attention is called with: of the keys those of this step, since a cache may drop them later."""
        if layer not in self._layers["attentions"]:
            return
        count = call.query.shape[2]
        key = call.key[:, :, -count:].clone()
        calls = self._calls.setdefault(layer, [])
        calls[len(self._spans) - 1 :] = [call._replace(query=call.query.detach().clone(), key=key, value=key)]

    def _attention(self, layer: int) -> Tensor:
        """Attention probabilities (B, H, T, T) of the kept queries."""
        calls = self._calls.pop(layer, [])
        if len(calls) != len(self._spans):
            raise CaptureError(f"attentions, layer {layer}: {len(calls)} calls in {len(self._spans)} decoding steps")
        query, key = (torch.cat([getattr(call, name) for call in calls], 2) for name in ("query", "key"))
        total = self._spans[-1][1]
        if query.shape[2] != total or key.shape[2] != total:
            raise CaptureError(f"attentions, layer {layer}: {key.shape[2]} keys of {total} tokens")
        known = tuple(id(call.mask) for call in calls)
        if known not in self._masks:
            self._masks[known] = self._mask([call.mask for call in calls], query)
            self._held.append(calls)  # or another mask might get its number
        call = calls[-1]._replace(query=query, key=key, value=key, mask=self._masks[known])
        return call.probabilities()

    def _mask(self, masks: Sequence[Tensor | None], query: Tensor) -> Tensor:
        """The mask (B, 1, T, T) to be added, of those of the steps; a window's holds the last keys alone."""
        total, least = self._spans[-1][1], torch.finfo(query.dtype).min
        whole = query.new_full((query.shape[0], 1, total, total), least)
        for (start, stop), mask in zip(self._spans, masks, strict=True):
            if mask is None:
                mask = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)
            whole[:, :, start:stop, stop - mask.shape[-1] : stop] = mask
        return whole

    def _whole(self, site: str, layer: int) -> Tensor:
        """All steps of a site side by side (B, ..., T, ...), as a pass over the padded texts would give them."""
        if site == "attentions" and self._keeps_queries:
            return self._attention(layer)
        chunks = self._chunks.pop((site, layer), [])
        if len(chunks) != len(self._spans):
            raise CaptureError(f"{site}, layer {layer}: came in {len(chunks)} of {len(self._spans)} decoding steps")
        if site != "attentions":
            return torch.cat(chunks, 2 if site in ATTENTION_SITES else 1) if len(chunks) > 1 else chunks[0]
        total = self._spans[-1][1]
        whole = chunks[0].new_zeros((*chunks[0].shape[:2], total, total))
        for (start, stop), chunk in zip(self._spans, chunks, strict=True):
            num_keys = chunk.shape[3]  # a window keeps the last ones
            if num_keys > stop:
                raise CaptureError(f"attentions, layer {layer}: {num_keys} keys in a text of {stop} tokens")
            whole[:, :, start:stop, stop - num_keys : stop] = chunk
        return whole

    def traces(self, texts: Sequence[Text], rows: Sequence[int]) -> list[Trace] | None:
        """What was captured of the texts of these rows; None where not all is finite and the policy allows that.

        Raises: as `tracekit.model.capture.capture`.
        """
        stands = [Stand(row, self._longest - text.prompt_length) for row, text in zip(rows, texts, strict=True)]
        buffers = Buffers(self._traced, texts, self._sites, self._settings, self._policy, stands)
        for site, layers in self._layers.items():
            for layer in sorted(layers):
                buffers.put(site, layer, self._whole(site, layer))
        buffers.settle()
        if self._policy.may_be_nonfinite and not (buffers.is_finite and self._is_finite):
            return None
        wanted = WantedRows.of(texts, self._settings, 0)
        scores = self._scores(texts, stands, wanted)
        numbers = wanted.numbers(self._traced, scores, texts, self._settings, 0, self._policy)
        return [buffers.trace(i, own)._replace(captured_from="decoding") for i, own in enumerate(numbers)]

    def _scores(self, texts: Sequence[Text], stands: Sequence[Stand], wanted: WantedRows) -> Scores:
        """Numbers of the wanted rows: of the steps, and of the head over what stands before the last prompt token."""
        rows = self.scorer.rows()
        first = [text.prompt_length - 1 for text in texts]
        before = [[p for p in some if p < start] for some, start in zip(wanted.positions, first, strict=True)]
        if num_before := sum(map(len, before)):
            kept, pairs = self._prompt_output, zip(stands, before, strict=True)
            hidden = torch.cat([kept.last_hidden_state[row, [left + p for p in some]] for (row, left), some in pairs])
            following = torch.full((num_before,), -1)
            asked = asked_of(texts, before)
            further = head_scores(self._traced, hidden, type(kept), following, asked, wanted.width)
            rows = Scores(*(torch.cat(pair) for pair in zip(rows, further, strict=True)))
        num_step_rows = len(rows.logprobs) - num_before
        places: list[int] = []
        for i, some in enumerate(wanted.positions):
            places += range(num_step_rows, num_step_rows + len(before[i]))
            num_step_rows += len(before[i])
            places += [(p - first[i]) * self._num_rows + stands[i].row for p in some if p >= first[i]]
        return Scores(*(column[places] for column in rows))
