"""Generation: prompts in, answers out, in batches, with the attention that transformers itself selects.

The deterministic answer is greedy or beam search. Sampled answers use one random generator each, seeded by (run
seed, key, sample index): the Gumbel-max trick turns argmax over noisy scores into an exact draw from their softmax, so
a text does not depend on what else is in its batch. Prompts whose rows would influence one another by their length
(tracekit.model.lengths) are answered apart. Prompts are padded on the left; where a model takes padding for text
(Bart, XLM, ...), prompts of one length run together.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import (
    GenerationConfig as HFGenerationConfig,
)
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tracekit.config import DrawConfig, GenerationConfig
from tracekit.model.lengths import groups_within
from tracekit.model.memory import is_out_of_memory
from tracekit.model.references import LOAD_ERRORS
from tracekit.model.traced import TracedModel, rounding_of
from tracekit.model.vocabulary import check_rows
from tracekit.records import GenerationSettings

__all__ = [
    "Decoding",
    "Generated",
    "Listener",
    "NewToken",
    "SomeDrawn",
    "StepScorer",
    "answer_once",
    "answer_variously",
    "draws",
    "find_padding_rule",
    "generate",
    "in_groups",
    "left_padded",
    "settings_of",
]

AnswerT = TypeVar("AnswerT")
_NO_TOKEN = 2**31 - 1
"""In the place of end tokens where none is to end an answer: transformers would fill in the model's own for None."""


class Generated(NamedTuple):
    """One generated answer."""

    token_ids: list[int]
    """Generated ids, end-of-sequence included where there is one."""
    finish_reason: str
    """`stop` or `length`."""

    @property
    def eos_included(self) -> bool:
        """Whether the last id is an end-of-sequence token."""
        return self.finish_reason == "stop"


class Decoding(NamedTuple):
    """How one row of a batch is decoded, whatever the others are."""

    max_new_tokens: int
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all."""
    seed: str = ""
    """Decides the draw; unused where greedy."""
    num_best: int | None = None
    """Most likely tokens to be told of at each step, with the token's own log-probability; None for neither."""


class NewToken(NamedTuple):
    """One token of one row, as it is generated."""

    token_id: int
    """The token."""
    logprob: float | None
    """Its log-probability under the raw model, nats; None where it was not asked for."""
    best: list[tuple[int, float]]
    """The most likely tokens in its place with their log-probabilities, best first."""


class Listener(NamedTuple):
    """Whom generation tells of its rows while it goes on."""

    step: Callable[[int, NewToken], bool]
    """Given the row and every token but an end of sequence; returns True to end the row after it."""
    end: Callable[[int, "Generated"], object]
    """Given the row once it has ended, with its answer."""


class StepScorer(LogitsProcessor):
    """Sees the raw logits of every step, and then the tokens that it has chosen."""

    def take(self, tokens: Tensor) -> None:
        """The tokens (B,) that a step has chosen."""
        raise NotImplementedError


Recording: TypeAlias = Callable[[list[int]], AbstractContextManager[StepScorer | None]]
"""Given the numbers of rows that are about to run together: open while they do, with who sees their steps, or None."""


def answer_variously(
    traced: TracedModel,
    prompts: Sequence[list[int]],
    decodings: Sequence[Decoding],
    listener: Listener,
    *,
    recording: Recording = lambda rows: nullcontext(),
) -> list[Generated]:
    """One answer to each prompt, each decoded in its own way. Rows that `listener` ended finish by `length`.

    `recording` is open while the rows that it is given run together.
    """

    def answer(rows: list[int]) -> list[Generated]:
        step, end = listener
        own = Listener(lambda row, made: step(rows[row], made), lambda row, made: end(rows[row], made))
        with recording(rows) as scorer:
            return _answer_variously(
                traced, [prompts[row] for row in rows], [decodings[row] for row in rows], own, scorer
            )

    lengths = [len(prompt) for prompt in prompts]
    return in_groups(traced, lengths, max(decoding.max_new_tokens for decoding in decodings), answer)


def _answer_variously(
    traced: TracedModel,
    prompts: Sequence[list[int]],
    decodings: Sequence[Decoding],
    listener: Listener,
    scorer: StepScorer | None,
) -> list[Generated]:
    """The same of prompts that may run together."""
    processors = LogitsProcessorList([] if scorer is None else [scorer])
    scores = None
    if any(decoding.num_best is not None for decoding in decodings):
        scores = _RawLogprobs()
        processors.append(scores)
    if any(decoding.temperature > 0 for decoding in decodings):
        processors.append(_EachRow(decodings))
    watch = _Watch(decodings, set(traced.model.generation_config.eos_token_id or []), listener, scores)
    longest = GenerationConfig(max_new_tokens=max(decoding.max_new_tokens for decoding in decodings))
    generate(traced, prompts, longest, num_beams=1, processors=processors, stopping=watch, late=scorer)
    return watch.answers()


def answer_once(
    traced: TracedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    seeds: Sequence[str] | None = None,
    *,
    inputs: Sequence[Mapping[str, Tensor]] = (),
    segments: Sequence[Sequence[int]] = (),
) -> list[Generated]:
    """One answer to each prompt: drawn by `seeds`, deterministic where there are none.

    `inputs` is what the model takes beside the tokens of each prompt (`pixel_values`), `segments` their token types.
    """

    def answer(rows: list[int]) -> list[Generated]:
        processors = LogitsProcessorList()
        if seeds is not None:
            assert isinstance(config, DrawConfig), "what is drawn needs a temperature"
            processors = draws(config, [seeds[row] for row in rows])
        return generate(
            traced,
            [prompts[row] for row in rows],
            config,
            num_beams=config.num_beams if seeds is None else 1,
            processors=processors,
            inputs=[inputs[row] for row in rows] if inputs else (),
            segments=[segments[row] for row in rows] if segments else (),
        )

    return in_groups(traced, [len(prompt) for prompt in prompts], config.max_new_tokens, answer)


def in_groups(
    traced: TracedModel,
    lengths: Sequence[int],
    max_new_tokens: int,
    answer: Callable[[list[int]], list[AnswerT]],
    *,
    by_length: bool = False,
) -> list[AnswerT]:
    """Answers to prompts of these lengths, by calls of `answer` with the numbers of those that may run together: of one
    length each, where padding changes an answer, or with `by_length`.

    A finished row is padded for as long as others of its batch run, so each counts with the most tokens of any.
    """
    answers: dict[int, AnswerT] = {}
    for group in groups_within([length + max_new_tokens for length in lengths], traced.length_limit):
        alike: dict[int, list[int]] = {}
        for row in group:
            alike.setdefault(lengths[row] if traced.is_moved_by_padding or by_length else 0, []).append(row)
        for rows in alike.values():
            answers |= zip(rows, answer(rows), strict=True)
    return [answers[row] for row in range(len(lengths))]


def find_padding_rule(traced: TracedModel) -> None:
    """Measure whether padding before a prompt changes its answer; sets `is_moved_by_padding`."""
    if traced.is_row_coupled:
        return
    model: Any = traced.model
    settings = HFGenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=model.generation_config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = traced.probe_ids()[0].tolist()
    short = ids[: max(1, len(ids) // 3)]
    try:
        beside, alone = (_run(traced, prompts, settings).logits for prompts in ([short, ids], [short]))
    except LOAD_ERRORS as error:  # some cannot take rows of several lengths
        if is_out_of_memory(error):
            raise
        traced.is_moved_by_padding = True
        return
    num_steps = 1 + bool(beside[0][0].argmax() == alone[0][0].argmax())  # then another token was taken
    changes = [
        (one[0] - other[0]).float().abs().max() / other[0].float().abs().max()
        for one, other in zip(beside[:num_steps], alone, strict=False)  # the answer may end before
    ]
    # transformers tells most models the positions of their tokens: those that it does not tell are looked at closely
    is_told = "position_ids" in signature(model.forward).parameters
    allowed = rounding_of(traced.info) / (1 if is_told else 3)
    traced.is_moved_by_padding = not all(change <= allowed for change in changes)


def settings_of(config: GenerationConfig, *, do_sample: bool) -> GenerationSettings:
    """What a record says of how its answer was generated; a drawn one by a DrawConfig."""
    draw = config if do_sample and isinstance(config, DrawConfig) else DrawConfig()
    return GenerationSettings(
        do_sample=do_sample,
        num_beams=1 if do_sample else config.num_beams,
        max_new_tokens=config.max_new_tokens,
        temperature=draw.temperature,
        top_p=draw.top_p,
        top_k=draw.top_k,
    )


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise row by row, so that argmax is a draw from the softmax."""

    def __init__(self, seeds: Sequence[str]) -> None:
        digests = [hashlib.sha256(seed.encode()).digest() for seed in seeds]
        self._generators = [torch.Generator().manual_seed(int.from_bytes(d[:8], "little") >> 1) for d in digests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores + gumbel.to(device=scores.device, dtype=torch.float32)


def draws(config: DrawConfig | Decoding, seeds: Sequence[str]) -> LogitsProcessorList:
    """What makes of scores noisy ones, so that their argmax is a draw."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    processors.append(_GumbelNoise(seeds))
    return processors


class SomeDrawn(LogitsProcessor):
    """Draws the rows that have a seed, and leaves the others."""

    def __init__(self, config: DrawConfig, seeds: Sequence[str | None]) -> None:
        self._rows = [row for row, seed in enumerate(seeds) if seed is not None]
        self._draws = draws(config, [seed for seed in seeds if seed is not None])
        self._are_all = len(self._rows) == len(seeds)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._are_all:
            return self._draws(input_ids, scores)
        made = scores.clone()
        made[self._rows] = self._draws(input_ids[self._rows], scores[self._rows])
        return made


class _EachRow(LogitsProcessor):
    """Draws rows that are sampled, each by its own settings, and leaves the others."""

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        self._rows = [draws(one, [one.seed]) if one.temperature > 0 else None for one in decodings]

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        rows = zip(self._rows, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([row if draw is None else draw(ids, row) for draw, ids, row in rows])


class _Ends(StoppingCriteria):
    """Ends each row at its end token."""

    def __init__(self, eos_ids: Tensor) -> None:
        self._eos_ids = eos_ids

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.isin(input_ids[:, -1], self._eos_ids)


class _OneLater(StoppingCriteria):
    """Ends each row a token after it ends, so that the model has read all of it."""

    def __init__(self, ends: StoppingCriteria, taker: StepScorer) -> None:
        self._ends, self._taker = ends, taker
        self._has_ended: Any = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._taker.take(input_ids[:, -1])
        late = self._has_ended
        now: Any = self._ends(input_ids, scores, **kwargs)
        self._has_ended = now if late is None else late | now
        return torch.zeros_like(now) if late is None else late


class _RawLogprobs(LogitsProcessor):
    """Keeps the last step's log-probabilities under the raw model, (B, V), nats."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last = scores.float().log_softmax(-1)
        return scores


class _Watch(StoppingCriteria):
    """Tells a listener of every token, and ends each row where it ends, whatever the others do."""

    def __init__(
        self, decodings: Sequence[Decoding], eos_ids: set[int], listener: Listener, scores: _RawLogprobs | None
    ) -> None:
        self._decodings, self._eos_ids, self._listener, self._scores = decodings, eos_ids, listener, scores
        self._token_ids: list[list[int]] = [[] for _ in decodings]
        self._reasons = [""] * len(decodings)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._reasons[row]:
                self._take(row, token)
        return torch.tensor([bool(reason) for reason in self._reasons], device=input_ids.device)

    def answers(self) -> list[Generated]:
        """Every row's answer."""
        return [Generated(ids, reason) for ids, reason in zip(self._token_ids, self._reasons, strict=True)]

    def _take(self, row: int, token: int) -> None:
        ids = self._token_ids[row]
        ids.append(token)
        if token in self._eos_ids:
            self._reasons[row] = "stop"
        elif self._listener.step(row, self._step(row, token)) or len(ids) == self._decodings[row].max_new_tokens:
            self._reasons[row] = "length"
        if self._reasons[row]:
            self._listener.end(row, Generated(ids, self._reasons[row]))

    def _step(self, row: int, token: int) -> NewToken:
        num_best = self._decodings[row].num_best
        if num_best is None or self._scores is None:
            return NewToken(token, None, [])
        assert self._scores.last is not None
        logprobs_V = self._scores.last[row]
        values, ids = logprobs_V.topk(num_best)
        return NewToken(token, float(logprobs_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def generate(
    traced: TracedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    num_beams: int,
    processors: Sequence[LogitsProcessor],
    inputs: Sequence[Mapping[str, Tensor]] = (),
    segments: Sequence[Sequence[int]] = (),
    stopping: StoppingCriteria | None = None,
    late: StepScorer | None = None,
    cache: Any = None,
) -> list[Generated]:
    """Answers to prompts that run together. `cache` is of all tokens of the prompts but the last, padded on the left; a
    row for each beam.

    With `late` the model reads the last token of every answer too, in a step more than the answers need; it is told of
    the tokens of every step.
    """
    for prompt in prompts:
        check_rows(traced.tokenizer, prompt)
    assert cache is None or not (inputs or segments), "what is read beside tokens is read with the prompts"
    own = traced.model.generation_config
    longest = max(len(prompt) for prompt in prompts)
    names = inputs[0] if inputs else ()
    further: dict[str, Any] = {name: torch.cat([one[name] for one in inputs]).to(traced.device) for name in names}
    further |= {} if cache is None else {"past_key_values": cache}
    if segments:
        rows = [[0] * (longest - len(row)) + list(row) for row in segments]
        further["token_type_ids"] = torch.tensor(rows, device=traced.device)
    settings = HFGenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        bos_token_id=own.bos_token_id,
    )
    eos_ids = set(own.eos_token_id or [])
    if late is not None:
        ends = _Ends(torch.tensor(sorted(eos_ids), device=traced.device)) if stopping is None else stopping
        stopping = _OneLater(ends, late)
        settings.max_new_tokens += 1
        settings.eos_token_id = [_NO_TOKEN]
    output = _run(
        traced,
        prompts,
        settings,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=None if stopping is None else StoppingCriteriaList([stopping]),
        **further,
    )
    return [_cut(row[: config.max_new_tokens], eos_ids) for row in output[:, longest:].tolist()]


def _run(traced: TracedModel, prompts: Sequence[list[int]], settings: HFGenerationConfig, **further: Any) -> Any:
    """What transformers' `generate` gives for prompts, padded on the left to one length."""
    model: Any = traced.model
    ids, mask = left_padded(traced, prompts, settings.pad_token_id)
    traced.begin_pass()
    with torch.inference_mode():
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **further)


def left_padded(traced: TracedModel, prompts: Sequence[Sequence[int]], pad: int | None) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left to one length, and their mask, both (B, T)."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad or 0] * (longest - len(p)) + list(p) for p in prompts], device=traced.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=traced.device)
    return ids, mask


def _cut(ids: list[int], eos_ids: set[int]) -> Generated:
    """An answer ends with its first end-of-sequence token; what follows is padding, whatever its id."""
    for length, token in enumerate(ids, start=1):
        if token in eos_ids:
            return Generated(ids[:length], "stop")
    return Generated(ids, "length")
