"""Capture: token ids in, every requested tensor out, in one teacher-forced pass.

Sequences run right-padded in one batch, so every real token sees exactly what it would see alone; padding is cut off
while the tensors are copied into buffers of their final shape, layer by layer, while the model runs. Next-token
numbers come from the raw logits at the positions that need them: the model runs once without its head, then the head
alone runs over chunks of those rows, so (B, T, V) never exists. Where no position needs them, the head is left out,
and the pass ends after the last layer that is kept (tracekit.model.early_stop).

Values that are not finite stop a capture, unless its policy allows them, as of damaged models. What a text gives would
then depend on its batch (a masked value that is not finite still spoils the sum in which it has weight 0, and kernels
differ in what they skip), so where anything in a batch is not finite, each text runs again alone, in eager attention.
A finite value beyond the dtype it is stored in stops a capture too, unless overflow is allowed: it becomes inf.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from tracekit.config import CaptureConfig, check_head_sites
from tracekit.errors import (
    CaptureError,
    ConfigError,
    UnsupportedSiteError,
)
from tracekit.model.checks import AttentionRules, PassChecks, check_fits, check_rows
from tracekit.model.early_stop import early_stop
from tracekit.model.hooks import eager_attention, record
from tracekit.model.scores import Scores, score
from tracekit.model.traced import SiteLayout, TracedModel
from tracekit.model.values import FINITE, ValuePolicy
from tracekit.sites import ATTENTION_SITES, SITES, resolve_sites
from tracekit.tensors import TensorSpec, num_packed, pack_indices

__all__ = [
    "Buffers",
    "CapturedBatch",
    "NextTokens",
    "Stand",
    "Text",
    "Trace",
    "WantedRows",
    "asked_of",
    "capture",
    "head_logits",
    "head_scores",
    "keep_inner_output",
    "resolve_layers",
    "run_rows",
    "to_numpy",
]

_HEAD_ROWS = 256


class Text(NamedTuple):
    """Prompt and answer as token ids."""

    token_ids: list[int]
    """Prompt, then answer."""
    prompt_length: int
    """Where the answer starts."""
    scored_from: int | None = None
    """First token whose log-probability is wanted; the answer's first by default."""
    token_type_ids: list[int] | None = None
    """Segment of each token, for encoders that have segments."""
    inputs: Mapping[str, Tensor] = MappingProxyType({})
    """What the model takes beside the tokens, such as `pixel_values` (1, C, H, W); batches join them along axis 0."""
    asked_ids: tuple[int, ...] = ()
    """Tokens whose logits are wanted in the place of the first one after the prompt."""

    @property
    def scored(self) -> range:
        """Positions whose next token is scored: one before each scored token."""
        first = self.prompt_length if self.scored_from is None else self.scored_from
        return range(first - 1, len(self.token_ids) - 1)


class NextTokens(NamedTuple):
    """How each scored token (the answer's) was predicted by the raw model."""

    logprobs: np.ndarray = np.zeros(0, np.float32)
    """Log-probability of each, nats, float32 (num_scored,)."""
    entropies: np.ndarray = np.zeros(0, np.float32)
    """Entropy of the distribution of each, nats, float32 (num_scored,)."""
    predicted_ids: np.ndarray = np.zeros(0, np.int64)
    """Most likely token in the place of each, int64 (num_scored,)."""
    best_ids: np.ndarray = np.zeros((0, 0), np.int64)
    """Most likely tokens in the place of each, best first, int64 (num_scored, num_best)."""
    best_logprobs: np.ndarray = np.zeros((0, 0), np.float32)
    """Their log-probabilities, nats, float32 (num_scored, num_best)."""
    topk_ids: np.ndarray = np.zeros((0, 0), np.int64)
    """Most likely tokens after each kept position, int64 (num_kept, topk)."""
    topk_logprobs: np.ndarray = np.zeros((0, 0), np.float32)
    """Their log-probabilities, nats, float32 (num_kept, topk)."""
    asked_logits: np.ndarray = np.zeros(0, np.float32)
    """Raw logits of `asked_ids` in the place of the first token after the prompt, float32 (num_asked,)."""
    asked_logprobs: np.ndarray = np.zeros(0, np.float32)
    """Their log-probabilities, nats, float32 (num_asked,)."""


class Trace(NamedTuple):
    """What was captured of one text."""

    tensors: dict[str, np.ndarray]
    """Stored tensors by name."""
    specs: list[TensorSpec]
    """What each of them is."""
    next_tokens: NextTokens = NextTokens()
    """How its scored tokens were predicted."""
    policy: ValuePolicy = FINITE
    """Which values there may be."""
    num_overflowed: int = 0
    """Values of the model that were finite and stand in the tensors as inf: their dtype does not reach so far."""
    captured_from: str = "pass"
    """`decoding`, the steps in which the answer was written, or `pass`, one over prompt and answer."""


def capture(
    traced: TracedModel,
    texts: Sequence[Text],
    config: CaptureConfig,
    *,
    num_best: int = 0,
    policy: ValuePolicy = FINITE,
) -> list[Trace]:
    """Run texts through the model once and keep what the configuration asks for.

    `num_best` most likely tokens are kept in the place of each scored one. `policy` says which values may be, of
    tensors and of next-token numbers. With `numbers="none"` nothing is scored, and there are no next-token numbers.

    Texts that would influence one another (int8 with outliers, tracekit.model.lengths) run apart.

    Raises:
        CaptureError: an invariant failed: attention rows that do not sum to one, attention to the future (of rows that
            are finite), or a value that is not finite and not allowed to be.
        DtypeOverflowError: a value does not fit `store_dtype`, and overflow is not allowed.
        UnsupportedSiteError: the model cannot give a requested site.
        ConfigError: a site comes from the head, which the configuration leaves out.
    """
    check_head_sites(config)
    traces: dict[int, Trace] = {}
    for group in traced.groups([len(text.token_ids) for text in texts]):
        together = [texts[i] for i in group]
        made = _captured(traced, together, config, num_best, policy)
        traces |= zip(group, made, strict=True)
    return [traces[i] for i in range(len(texts))]


def _captured(
    traced: TracedModel,
    texts: Sequence[Text],
    config: CaptureConfig,
    num_best: int,
    policy: ValuePolicy,
) -> list[Trace]:
    """The same of texts that may run together."""
    needs_head = any(_head_positions(text, config) for text in texts)
    rows = run_rows(traced, texts, config, policy=policy, needs_output=needs_head or policy.may_be_nonfinite)
    parts = [(rows, texts)]
    if policy.may_be_nonfinite and not (rows.buffers.is_finite and rows.output.last_hidden_state.isfinite().all()):
        with eager_attention(traced.model, traced.anatomy):
            parts = [(run_rows(traced, [text], config, policy=policy), [text]) for text in texts]
    return [
        part.buffers.trace(i, numbers)
        for part, some in parts
        for i, numbers in enumerate(_next_tokens(traced, part.output, some, config, num_best, policy))
    ]


class CapturedBatch(NamedTuple):
    """What came of a batch: captured tensors, and the model's output (of an LM, its inner model's), None where the pass
    ended early."""

    buffers: "Buffers"
    output: Any


def run_rows(
    traced: TracedModel,
    texts: Sequence[Text],
    config: CaptureConfig,
    *,
    policy: ValuePolicy = FINITE,
    needs_output: bool = True,
) -> CapturedBatch:
    """Run texts as rows of one batch and capture what the configuration asks for, next-token numbers left out.

    Where no output is needed, the pass ends as soon as all that is asked for is there, if the model allows it. Values
    that are not finite, where there may be any, are stored as they are in this batch.

    Raises: as `capture`.
    """
    sites = resolve_sites(config.sites)
    missing = [site for site in sites if site not in traced.layouts and SITES[site].source != "head"]
    if missing:
        raise UnsupportedSiteError(_cannot_give(traced, missing))
    buffers = Buffers(traced, texts, sites, config, policy)
    inputs = _right_pad(texts, traced.device)
    hooked = tuple(site for site in sites if SITES[site].source in ("attention", "block"))
    awaited = buffers.wanted
    may_stop = not needs_output and _may_stop(traced, texts, awaited)
    wants_hidden = "hidden_states" in sites and not may_stop
    whole: Any = None

    def put(site: str, layer: int, value: Tensor) -> None:
        buffers.put(site, layer, value)
        awaited.discard((site, layer))

    with (
        torch.inference_mode(),
        keep_inner_output(traced.anatomy.inner) if traced.head == "lm" else nullcontext([]) as kept,
        record(traced.model, traced.anatomy, hooked, put, resid_rule=traced.resid_rule),
        early_stop(traced.anatomy, put, lambda: not awaited) if may_stop else nullcontext(),
    ):
        whole = traced.run(**inputs, output_hidden_states=wants_hidden)
    output = kept[0] if kept else whole
    if wants_hidden:
        for layer, hidden in enumerate(output.hidden_states):
            put("hidden_states", layer, hidden)
    assert not awaited, awaited
    buffers.settle()
    return CapturedBatch(buffers, output)


def _may_stop(traced: TracedModel, texts: Sequence[Text], wanted: set[tuple[str, int]]) -> bool:
    """Whether the pass may end once all that is wanted is there. Pictures may be added to the stream between blocks."""
    hidden = [layer for site, layer in wanted if site == "hidden_states"]
    from_blocks = not hidden or (traced.order.inputs_are_hidden and max(hidden) < traced.num_layers)
    return traced.order.can_stop and from_blocks and not texts[0].inputs


def resolve_layers(chosen: Sequence[str], available: Sequence[int], *, at: str = "$.capture.layers") -> list[int]:
    """Layer numbers for `all`, numbers (negative from the end) and ranges `4-8`; `at` is where they were given.

    Raises:
        ConfigError: no such layer, or not a layer at all.
    """
    picked: set[int] = set()
    last = available[-1]
    for text in chosen:
        low, dash, high = text.partition("-") if not text.startswith("-") else (text, "", "")
        try:
            first = int(low) if text != "all" else 0
            stop = int(high) if dash else first
        except ValueError:
            raise ConfigError(f"layer {text!r} - at `{at}`; expected all, 12, -1 or 4-8") from None
        wanted = list(available) if text == "all" else list(range(first, stop + 1))
        wanted = [number + last + 1 if number < 0 else number for number in wanted]
        if not wanted or wanted[0] < 0 or wanted[-1] > last:
            raise ConfigError(f"layer {text!r} - at `{at}`; the model has layers 0 to {last} there")
        picked.update(number for number in wanted if number in available)
    if not picked:
        raise ConfigError(f"layers {' '.join(chosen)!r} - at `{at}`; none of them gives this site")
    return sorted(picked)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as an array, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@contextmanager
def keep_inner_output(inner: nn.Module) -> Iterator[list[Any]]:
    """Keep the inner model's output, and let the head see a single row of it."""
    kept: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        kept[:] = [output]
        return type(output)(last_hidden_state=output.last_hidden_state[:1, :1])

    handle = inner.register_forward_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


def head_logits(traced: TracedModel, rows: Tensor, output_type: Callable[..., Any]) -> Iterator[Tensor]:
    """Logits (n, V) in float32 for rows (N, D) of the last hidden state, chunk by chunk.

    The model's own forward pass runs with its inner model replaced by the rows, so soft-caps and scales of any head
    are applied as they should be. `output_type` is the type of the inner model's output.
    """
    inner: Any = traced.anatomy.inner
    own_forward = inner.__dict__.get("forward")
    token = torch.zeros((1, 1), dtype=torch.long, device=traced.device)
    for chunk in rows.split(_HEAD_ROWS):
        inner.forward = lambda *args, chunk=chunk, **kwargs: output_type(last_hidden_state=chunk[None])
        try:
            with torch.inference_mode():
                logits = traced.model(input_ids=token, use_cache=False).logits[0]
        finally:
            if own_forward is None:
                del inner.forward
            else:
                inner.forward = own_forward
        yield logits.float()


class WantedRows(NamedTuple):
    """The rows of logits that the numbers of texts come from."""

    positions: list[list[int]]
    """Of each text, the positions whose next token is scored, kept or asked for, in order."""
    kept: list[range]
    """Of each text, those whose most likely tokens are stored."""
    width: int
    """How many of the most likely tokens are wanted."""

    @classmethod
    def of(cls, texts: Sequence[Text], config: CaptureConfig, num_best: int) -> "WantedRows":
        """Those of texts."""
        kept = [_topk_positions(text, config) for text in texts]
        positions = [_head_positions(text, config) for text in texts]
        return cls(positions, kept, max(1, num_best, config.topk if any(kept) else 0))

    def following(self, texts: Sequence[Text]) -> Tensor:
        """The token that follows each row (n,), -1 where none is scored."""
        pairs = zip(texts, self.positions, strict=True)
        rows = [text.token_ids[p + 1] if p in text.scored else -1 for text, some in pairs for p in some]
        return torch.tensor(rows, dtype=torch.long)

    def numbers(
        self,
        traced: TracedModel,
        scores: Scores | None,
        texts: Sequence[Text],
        config: CaptureConfig,
        num_best: int,
        policy: ValuePolicy,
    ) -> list[NextTokens]:
        """Each text's share of the rows' scores; None stands for no row at all.

        Raises:
            CaptureError: a number is not finite, and the policy does not allow it.
        """
        is_finite = scores is None or all(bool(part.isfinite().all()) for part in scores if part.is_floating_point())
        if not is_finite and not policy.may_be_nonfinite:
            raise CaptureError(
                f"log-probabilities of the next token: not finite in a {traced.info.dtype} model; use another --dtype"
            )
        stops = np.cumsum([len(some) for some in self.positions]).tolist()
        return [
            _numbers_of(
                None if scores is None else Scores(*(column[stop - len(some) : stop] for column in scores)),
                text,
                some,
                kept,
                config,
                num_best,
            )
            for text, some, kept, stop in zip(texts, self.positions, self.kept, stops, strict=True)
        ]


def _next_tokens(
    traced: TracedModel,
    output: Any,
    texts: Sequence[Text],
    config: CaptureConfig,
    num_best: int,
    policy: ValuePolicy,
) -> list[NextTokens]:
    """Numbers of each text's scored tokens, and the top-k of its kept positions where asked for.

    The rows of all texts go through the head together, in chunks: texts may be short, and the head's weights large.
    """
    wanted = WantedRows.of(texts, config, num_best)
    scores = None
    if any(wanted.positions):
        rows = torch.cat([output.last_hidden_state[i, some] for i, some in enumerate(wanted.positions)])
        asked = asked_of(texts, wanted.positions)
        scores = head_scores(traced, rows, type(output), wanted.following(texts), asked, wanted.width)
    return wanted.numbers(traced, scores, texts, config, num_best, policy)


def head_scores(
    traced: TracedModel, rows: Tensor, output_type: Callable[..., Any], following: Tensor, asked: Tensor, width: int
) -> Scores:
    """Numbers, on the CPU, of rows (N, D) of the last hidden state: as `score` gives them of their logits."""
    parts: list[Scores] = []
    done = 0
    for logits in head_logits(traced, rows, output_type):
        place = slice(done, done + len(logits))
        parts.append(score(logits, following[place].to(logits.device), asked[place].to(logits.device), width))
        done += len(logits)
    return Scores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _topk_positions(text: Text, config: CaptureConfig) -> range:
    """Positions of a text whose most likely next tokens are a site of their own."""
    wants_topk = any(SITES[site].source == "head" for site in resolve_sites(config.sites))
    return range(*_kept_positions(text, config)) if wants_topk else range(0)


def _head_positions(text: Text, config: CaptureConfig) -> list[int]:
    """Positions of a text that go through the head."""
    if config.numbers == "none":
        assert not text.asked_ids, text.asked_ids
        return []
    after_prompt = [text.prompt_length - 1] if text.asked_ids else []
    return sorted({*_topk_positions(text, config), *text.scored, *after_prompt})


def asked_of(texts: Sequence[Text], positions: Sequence[Sequence[int]]) -> Tensor:
    """Ids that each row's text asks for (n, A), filled up with 0; `positions` are the rows of each text."""
    width = max(len(text.asked_ids) for text in texts)
    rows = [
        [*text.asked_ids, *[0] * (width - len(text.asked_ids))]
        for text, some in zip(texts, positions, strict=True)
        for _ in some
    ]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)


def _numbers_of(
    scores: Scores | None, text: Text, positions: list[int], kept: range, config: CaptureConfig, num_best: int
) -> NextTokens:
    """One text's share of the rows."""
    if scores is None:
        none = torch.zeros(0)
        empty = none.reshape(0, max(1, num_best))
        scores = Scores(none, none, empty, empty, none.reshape(0, 0), none.reshape(0, 0))
    scored = [row for row, position in enumerate(positions) if position in text.scored]
    topk = [row for row, position in enumerate(positions) if position in kept]
    asked = positions.index(text.prompt_length - 1) if text.asked_ids else None
    count = len(text.asked_ids)
    return NextTokens(
        scores.logprobs[scored].numpy().astype(np.float32),
        scores.entropies[scored].numpy().astype(np.float32),
        scores.best[scored, 0].numpy().astype(np.int64),
        scores.best[scored, :num_best].numpy().astype(np.int64),
        scores.best_logprobs[scored, :num_best].numpy().astype(np.float32),
        scores.best[topk, : config.topk].numpy().astype(np.int64),
        scores.best_logprobs[topk, : config.topk].numpy().astype(np.float32),
        np.zeros(0, np.float32) if asked is None else scores.asked_logits[asked, :count].numpy(),
        np.zeros(0, np.float32) if asked is None else scores.asked_logprobs[asked, :count].numpy(),
    )


def _kept_positions(text: Text, config: CaptureConfig) -> tuple[int, int]:
    """`[start, stop)` of the positions that `tokens` keeps."""
    total, prompt = len(text.token_ids), text.prompt_length
    return {"all": (0, total), "prompt": (0, prompt), "answer": (prompt, total), "last": (prompt - 1, prompt)}[
        config.tokens
    ]


def _right_pad(texts: Sequence[Text], device: torch.device) -> dict[str, Tensor]:
    """Input ids, attention mask and, where there are, segments (B, T) and further inputs.

    The pad id does not matter, the mask decides.
    """
    longest = max(len(text.token_ids) for text in texts)

    def padded(rows: Sequence[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)

    inputs = {
        "input_ids": padded([text.token_ids for text in texts]),
        "attention_mask": padded([[1] * len(text.token_ids) for text in texts]),
    }
    segments = [text.token_type_ids for text in texts if text.token_type_ids is not None]
    assert len(segments) in (0, len(texts)), "segments are given for all texts or for none"
    assert len({tuple(text.inputs) for text in texts}) == 1, "further inputs are the same for all texts"
    further = {name: torch.cat([text.inputs[name] for text in texts]).to(device) for name in texts[0].inputs}
    return inputs | further | ({"token_type_ids": padded(segments)} if segments else {})


def _cannot_give(traced: TracedModel, missing: Sequence[str]) -> str:
    return (
        f"{traced.anatomy.model_type} ({traced.info.id}) cannot give {', '.join(missing)}; "
        f"it can give: {', '.join(traced.layouts)}. Choose with --sites"
    )


@lru_cache(maxsize=64)
def _pack_indices(start: int, stop: int, row_stride: int, left: int, device: torch.device) -> Tensor:
    """Places of the packed values of rows `[start, stop)` of a text that begins at `left`, in a flat (T, T)."""
    packed = pack_indices(np.arange(start, stop), row_stride) + left * (row_stride + 1)
    return torch.from_numpy(packed).to(device)


def _sees_others(value_HTT: Tensor, left: int, length: int) -> bool:
    """Whether a text that begins at `left` attends to padding before it or to its future: whether anything there is not
    exactly zero (padded rows may be)."""
    rows = value_HTT[:, left : left + length]
    return bool(rows[..., :left].any()) or bool(rows[..., left : left + length].triu(1).any())


class Stand(NamedTuple):
    """Where a text stands in the tensors of its batch."""

    row: int
    """Its row."""
    left: int
    """Position of its first token: padding before it."""


class _Target(NamedTuple):
    """One tensor to be stored, for every text of the batch."""

    name: str
    site: str
    layers: list[int]
    layout: str
    values: list[Tensor]


class Buffers:
    """The sink of a capture pass: final tensors of every text, filled layer by layer. `stands` says where texts stand
    in the tensors that come; by default each in the row of its number, from the first position on.

    `is_finite` says whether all that came, padding included, was finite; it is watched where it need not be.
    """

    def __init__(
        self,
        traced: TracedModel,
        texts: Sequence[Text],
        sites: tuple[str, ...],
        config: CaptureConfig,
        policy: ValuePolicy = FINITE,
        stands: Sequence[Stand] | None = None,
    ) -> None:
        self._traced, self._texts, self._config, self._policy = traced, texts, config, policy
        self._stands = [Stand(row, 0) for row in range(len(texts))] if stands is None else stands
        self._num_overflowed = [0] * len(texts)
        self._is_causal = traced.is_causal and not texts[0].inputs  # parts of a picture may see one another
        self.is_finite = True
        self._ranges = [_kept_positions(text, config) for text in texts]
        self._rules = AttentionRules(self._is_causal, traced.rows_sum_to_one)
        self._rows = [stand.row for stand in self._stands]
        lefts = [stand.left for stand in self._stands]
        kept = [(left + start, left + stop) for left, (start, stop) in zip(lefts, self._ranges, strict=True)]
        real = [(left, left + len(text.token_ids)) for left, text in zip(lefts, texts, strict=True)]
        self._checks = PassChecks(kept, real, self._rules)
        self._targets: dict[tuple[str, int], tuple[_Target, int]] = {}
        self._by_name: dict[str, _Target] = {}
        for site in sites:
            if SITES[site].source != "head":
                self._allocate(site, traced.layouts[site])

    def _allocate(self, site: str, layout: SiteLayout) -> None:
        has_layers = "L" in SITES[site].axes
        layers = resolve_layers(self._config.layers, layout.layers) if has_layers else [layout.layers[0]]
        groups = [layers] if layout.is_uniform else [[layer] for layer in layers]
        is_own = self._config.store_dtype == "same" or self._config.is_quantized  # what is quantised is so on storing
        dtype = layout.dtype if is_own else getattr(torch, self._config.store_dtype)
        is_packed = self._is_causal and self._traced.head == "lm"
        form = "dense" if site != "attentions" else "causal" if is_packed else "full"
        for group in groups:
            tail = layout.tails[layout.layers.index(group[0])]
            shapes = [self._shape(site, form, tail, i) for i in range(len(self._texts))]
            lead = (len(group),) if has_layers else ()
            values = [torch.empty(lead + shape, dtype=dtype) for shape in shapes]
            name = site if layout.is_uniform else f"{site}.{group[0]}"
            target = _Target(name, site, group if has_layers else [], form, values)
            self._by_name[name] = target
            for row, layer in enumerate(group):
                self._targets[site, layer] = (target, row)

    def _shape(self, site: str, form: str, tail: tuple[int, ...], i: int) -> tuple[int, ...]:
        """Shape of one layer of one text."""
        start, stop = self._ranges[i]
        if form == "causal":
            return (tail[0], num_packed(np.arange(start, stop)))
        if form == "full":
            return (tail[0], stop - start, len(self._texts[i].token_ids))
        if site in ATTENTION_SITES:
            return (tail[0], stop - start, tail[1])
        return (stop - start, tail[0])

    @property
    def wanted(self) -> set[tuple[str, int]]:
        """Site and layer of all that is to be handed over."""
        return set(self._targets)

    def put(self, site: str, layer: int, value: Tensor) -> None:
        """Copy what is kept of a batch tensor (B, ...) into the texts' own tensors."""
        if (site, layer) not in self._targets:
            return
        target, row = self._targets[site, layer]
        value = value.detach()
        self._check(site, layer, value, target)
        if target.layout == "causal":
            value = value.contiguous()
        elif value.device.type != "cpu":
            value = value.cpu()
        for i, (start, stop) in enumerate(self._ranges):
            whole, (place, left) = target.values[i], self._stands[i]
            out, own = whole[row] if target.layers else whole, value[place]
            if target.layout == "causal":
                index = _pack_indices(start, stop, value.shape[-1], left, value.device)
                flat = own.view(value.shape[1], -1)
                if out.dtype == flat.dtype and flat.device.type == "cpu":
                    torch.index_select(flat, 1, index, out=out)
                else:
                    out.copy_(flat.index_select(1, index))
            elif target.layout == "full":
                out.copy_(own[:, left + start : left + stop, left : left + len(self._texts[i].token_ids)])
            elif site in ATTENTION_SITES:
                out.copy_(own[:, left + start : left + stop])
            else:
                out.copy_(own[left + start : left + stop])

    def settle(self) -> None:
        """See that all that came is as it should be: once a pass, since it waits for the device.

        Raises: as `capture`.
        """
        self._checks.settle()

    def _check(self, site: str, layer: int, value: Tensor, target: _Target) -> None:
        """Finite, and within the dtype it is stored in. Where values may be anything, each layer is looked at as it
        comes, and closely where the whole batch does not pass."""
        stored = target.values[0].dtype
        if self._policy == FINITE:
            is_whole = self._rows == list(range(len(value)))
            self._checks.add(site, layer, value if is_whole else value[self._rows], stored)
            return
        largest = torch.finfo(stored).max if stored != value.dtype else float("inf")
        if not value.abs().amax().item() < largest:  # true for NaN, too
            self.is_finite &= bool(torch.isfinite(value).all())
            for i, stand in enumerate(self._stands):
                self._check_closely(site, layer, value[stand.row], i, target.values[i].dtype)
        if site == "attentions":
            self._check_attention(layer, value)

    def _check_closely(self, site: str, layer: int, value: Tensor, i: int, stored: torch.dtype) -> None:
        """The same for what is kept of text `i`."""
        start, stop = self._ranges[i]
        left = self._stands[i].left
        rows = slice(left + start, left + stop)
        kept = value[rows] if site not in ATTENTION_SITES else value[:, rows]
        kept = kept[..., left : left + len(self._texts[i].token_ids)] if site == "attentions" else kept
        kept = kept[torch.isfinite(kept)]
        if self._policy.may_overflow:
            self._num_overflowed[i] += int((~torch.isfinite(kept.to(stored))).sum())
        elif kept.numel():
            check_fits(site, layer, kept.abs().amax().item(), stored)

    def _check_attention(self, layer: int, value_BHTT: Tensor) -> None:
        sums_BHT = value_BHTT.sum(-1, dtype=torch.float32)
        for text, (row, left) in zip(self._texts, self._stands, strict=True):
            real, rows_HTT = sums_BHT[row, :, left : left + len(text.token_ids)], value_BHTT[row]
            if not self.is_finite:
                rows_HTT = rows_HTT.masked_fill(~sums_BHT[row, ..., None].isfinite(), 0)
                real = real[real.isfinite()]
                if not real.numel():
                    continue
            lowest, highest = real.min().item(), real.max().item()
            future = float(self._is_causal and _sees_others(rows_HTT, left, len(text.token_ids)))
            check_rows(layer, value_BHTT.dtype, lowest=lowest, highest=highest, future=future, rules=self._rules)

    def tensors(self, i: int) -> tuple[dict[str, np.ndarray], list[TensorSpec]]:
        """Captured tensors of text `i`, and what they are."""
        self.settle()
        text = self._texts[i]
        start, stop = self._ranges[i]
        positions = [[start, stop]] if stop > start else []
        tensors: dict[str, np.ndarray] = {}
        specs: list[TensorSpec] = []
        for name, target in self._by_name.items():
            tensors[name] = to_numpy(target.values[i])
            axes = list(SITES[target.site].axes)
            if target.layout == "causal":
                axes = ["L", "H", "S"]
            keys = len(text.token_ids) if target.site == "attentions" else 0
            specs.append(_spec(name, tensors[name], axes, target.layers, positions, target.layout, keys))
        return tensors, specs

    def trace(self, i: int, numbers: NextTokens) -> Trace:
        """Everything of text `i`."""
        tensors, specs = self.tensors(i)
        start, stop = self._ranges[i]
        positions = [[start, stop]] if stop > start else []
        for name in ("topk_ids", "topk_logprobs"):
            if name in resolve_sites(self._config.sites):
                array = getattr(numbers, name).reshape(stop - start, self._config.topk)
                tensors[name] = array
                specs.append(_spec(name, array, ["T", "k"], [], positions, "dense", 0))
        return Trace(tensors, specs, numbers, self._policy, self._num_overflowed[i])


def _spec(
    name: str, array: np.ndarray, axes: list[str], layers: list[int], positions: list[list[int]], layout: str, keys: int
) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype=str(array.dtype),
        shape=list(array.shape),
        axes=axes,
        layers=layers,
        positions=positions,
        layout=layout,
        num_keys=keys,
        choice_offsets=[],
    )
