"""Steps: what a model computes while it writes answers, kept step by step and put together as whole texts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError
from tracekit.model.capture import (
    Buffers,
    NextTokens,
    Stand,
    Text,
    Trace,
    WantedRows,
    asked_of,
    head_scores,
    resolve_layers,
)
from tracekit.model.generation import Generated, StepScorer
from tracekit.model.hooks import AttentionCall, record
from tracekit.model.scores import Scores, score
from tracekit.model.traced import TracedModel
from tracekit.model.values import ValuePolicy
from tracekit.sites import ATTENTION_SITES, SITES, resolve_sites

__all__ = ["Steps", "ToAnswer"]


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


class Steps:
    """What the steps of one batch hand over, site by site and layer by layer.

    Prompts are padded on the left. Each is read in one row, and answered in `repeat` rows that stand together; where
    that is more than one, or the answers are there already (`is_decoding` False), the last prompt token is read with
    the answers. `chosen` are the rows of answers whose tensors are kept, by default all.
    """

    def __init__(
        self,
        traced: TracedModel,
        asked: Sequence[ToAnswer],
        settings: CaptureConfig,
        policy: ValuePolicy,
        *,
        repeat: int = 1,
        chosen: Sequence[int] | None = None,
        is_decoding: bool = True,
    ) -> None:
        self._traced, self._settings, self._policy = traced, settings, policy
        sites = resolve_sites(settings.sites)
        self._sites = tuple(site for site in sites if SITES[site].source != "head")
        self._layers = {site: self._wanted_layers(site) for site in self._sites}
        self._longest = max(len(one.token_ids) for one in asked)
        self._repeat, self._num_rows, self._is_decoding = repeat, len(asked) * repeat, is_decoding
        self._chosen = None if chosen is None or len(chosen) == self._num_rows else list(chosen)
        self._spans: list[tuple[int, int]] = []
        """Of each step, the positions that it reads."""
        self._chunks: dict[tuple[str, int], list[Tensor]] = {}
        self._calls: dict[int, list[AttentionCall]] = {}
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._held: list[list[AttentionCall]] = []
        rule = traced.decoding
        self._keeps_queries = rule is not None and rule.keeps_queries and "attentions" in self._sites
        self._lasts: list[Tensor] = []
        self._output_type: Any = None
        self._is_finite = torch.ones((), dtype=torch.bool)
        wants_topk = len(sites) > len(self._sites)
        self._keeps_last = not is_decoding or (wants_topk and settings.tokens in ("all", "prompt"))
        ids = [Text(one.token_ids, len(one.token_ids), asked_ids=one.asked_ids) for one in asked for _ in range(repeat)]
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
        """A step begins."""
        given = next(one for one in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if one is not None)
        count = given.shape[1]
        start = self._spans[-1][1] if self._spans else 0
        if self._is_decoding and self._spans and count > 1:  # some models read the whole text anew
            if count != start + 1 or self._spans[0][1] != self._longest:
                raise CaptureError(f"{count} tokens are read in the decoding step that ends at token {start + 1}")
            start, self._spans, self._chunks, self._calls, self._lasts = 0, [], {}, {}, []
        self._spans.append((start, start + count))
        return args, kwargs | ({"output_hidden_states": True} if "hidden_states" in self._layers else {})

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "hidden_states", None) if "hidden_states" in self._layers else None
        for layer, value in enumerate(hidden or ()):
            self._put("hidden_states", layer, value)
        last, (start, _) = output.last_hidden_state, self._spans[-1]
        if self._policy.may_be_nonfinite:
            self._is_finite = self._is_finite.to(last.device) & last.isfinite().all()
        if self._keeps_last and (start == 0 or not self._is_decoding):
            self._lasts.append(self._of_chosen(last).clone())
            self._output_type = type(output)

    def _of_chosen(self, value: Tensor) -> Tensor:
        """What belongs to the chosen rows, of a tensor of prompts or of rows."""
        if len(value) == self._num_rows:
            return value if self._chosen is None else value[self._chosen]
        rows = range(self._num_rows) if self._chosen is None else self._chosen
        prompts = [row // self._repeat for row in rows]
        return value if prompts == list(range(len(value))) else value[prompts]

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
        own = self._of_chosen(value.detach())
        chunks[len(self._spans) - 1 :] = [own.clone()]  # some layers attend twice, and hand over the same

    def _keep_call(self, layer: int, call: AttentionCall) -> None:
        """Keep what attention is called with: of the keys those of this step, since a cache may drop them later."""
        if layer not in self._layers["attentions"]:
            return
        count = call.query.shape[2]
        query, key = self._of_chosen(call.query.detach()).clone(), self._of_chosen(call.key[:, :, -count:]).clone()
        calls = self._calls.setdefault(layer, [])
        calls[len(self._spans) - 1 :] = [call._replace(query=query, key=key, value=key)]

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
                mask = torch.ones(1, 1, stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)
            whole[:, :, start:stop, stop - mask.shape[-1] : stop] = self._of_chosen(mask) if len(mask) > 1 else mask
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
        own = list(rows) if self._chosen is None else [self._chosen.index(row) for row in rows]
        stands = [Stand(row, self._longest - text.prompt_length) for row, text in zip(own, texts, strict=True)]
        buffers = Buffers(self._traced, texts, self._sites, self._settings, self._policy, stands)
        for site, layers in self._layers.items():
            for layer in sorted(layers):
                buffers.put(site, layer, self._whole(site, layer))
        buffers.settle()
        if self._policy.may_be_nonfinite and not (buffers.is_finite and self._is_finite):
            return None
        numbers = self._numbers(texts, rows, stands, self._settings)
        captured_from = "decoding" if self._is_decoding else "pass"
        return [buffers.trace(i, one)._replace(captured_from=captured_from) for i, one in enumerate(numbers)]

    def numbers(self, texts: Sequence[Text], rows: Sequence[int]) -> list[Trace]:
        """Traces of the texts of these rows that hold the numbers of their answers, and no tensor.

        Raises: as `tracekit.model.capture.capture`.
        """
        settings = msgspec.structs.replace(self._settings, sites=("none",))
        found = self._numbers(texts, rows, [Stand(0, 0)] * len(rows), settings)
        return [Trace({}, [], one, self._policy, captured_from="decoding") for one in found]

    def _numbers(
        self, texts: Sequence[Text], rows: Sequence[int], stands: Sequence[Stand], settings: CaptureConfig
    ) -> list[NextTokens]:
        """Numbers of the wanted positions: of the steps, and before those of the head over the last hidden states."""
        wanted = WantedRows.of(texts, settings, 0)
        first = [text.prompt_length - 1 if self._is_decoding else len(text.token_ids) for text in texts]
        before = [[p for p in some if p < start] for some, start in zip(wanted.positions, first, strict=True)]
        parts = [self.scorer.rows()] if self._is_decoding else []
        num_step_rows = sum(len(part.logprobs) for part in parts)
        if any(before):
            last = torch.cat(self._lasts, 1)
            hidden = torch.cat(
                [last[row, [left + p for p in some]] for (row, left), some in zip(stands, before, strict=True)]
            )
            following = wanted._replace(positions=before).following(texts)
            asked = asked_of(texts, before)
            parts.append(head_scores(self._traced, hidden, self._output_type, following, asked, wanted.width))
        places: list[int] = []
        num_before = num_step_rows
        for text_rows, some, row, start in zip(before, wanted.positions, rows, first, strict=True):
            places += range(num_before, num_before + len(text_rows))
            num_before += len(text_rows)
            places += [(p - start) * self._num_rows + row for p in some if p >= start]
        scores = Scores(*(torch.cat(column)[places] for column in zip(*parts, strict=True))) if parts else None
        if scores is not None:  # of drawn answers nobody wants as many of the most likely tokens
            best, logprobs = scores.best[:, : wanted.width], scores.best_logprobs[:, : wanted.width]
            scores = scores._replace(best=best, best_logprobs=logprobs)
        return wanted.numbers(self._traced, scores, texts, settings, 0, self._policy)
