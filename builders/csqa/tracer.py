"""csqa at work: prompts captured, every option scored after them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from builders.csqa.record import CsqaRecord
from builders.csqa.task import SYSTEM, CsqaConfig
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import CsqaQuestion, choice_fields, cut_to_fit, read_questions, with_options
from tracekit.answering import read_fields
from tracekit.console import say
from tracekit.errors import ConfigError
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.continuations import answer_joint, continuation_ids, score_continuations, softmax
from tracekit.model.models import max_positions
from tracekit.model.prompts import Exchange, Prompt, Prompter, draw_shots
from tracekit.model.proof import Scored
from tracekit.model.traced import TracedModel
from tracekit.run.recheck import Replay
from tracekit.task import Place, TracedSample, Tracer

__all__ = ["CsqaReplay", "CsqaTracer", "scored_of"]


def scored_of(record: CsqaRecord) -> list[Scored]:
    """The options that a record has scores of."""
    letters = zip(record.letter_token_ids, record.letter_logprobs, strict=True)
    texts = zip(record.text_token_ids, record.text_logprobs, strict=True)
    return [Scored("letter_logprobs", *p) for p in letters] + [Scored("text_logprobs", *p) for p in texts]


class CsqaReplay(Replay[CsqaRecord]):
    """A stored prompt and its options, run again."""

    def scored(self, record: CsqaRecord) -> list[Scored]:
        """The options that a record has scores of."""
        return scored_of(record)


class _Size(NamedTuple):
    """What is kept of a question until its batch: prompts of a whole source are too many to hold."""

    num_tokens: int
    """Tokens of the prompt."""
    num_needed: int
    """Tokens of the prompt and its longest continuation."""
    num_truncated: int
    """Tokens cut off the question."""


class _Prepared(NamedTuple):
    """A question as the model reads it."""

    prompt: Prompt
    letters: list[list[int]]
    """Ids of each option's letter after the prompt."""
    texts: list[list[int]]
    """Ids of each option's text after the prompt."""
    num_truncated: int
    """Tokens cut off the question."""

    @property
    def size(self) -> _Size:
        """What is kept of it."""
        num_tokens = len(self.prompt.token_ids)
        return _Size(num_tokens, num_tokens + max(map(len, [*self.letters, *self.texts])), self.num_truncated)


class CsqaTracer(Tracer[CsqaQuestion]):
    """One configuration of CommonsenseQA at work."""

    def __init__(self, config: CsqaConfig, tokenizer: Any, examples: Sequence[CsqaQuestion]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompter = Prompter(tokenizer, config.prompt, default_system=SYSTEM)
        self.variant = self._prompter.variant
        self._pool = read_questions(ChoiceSource(source="sample")).examples
        self._joint = answer_joint(self._prompter)
        self._limit = _limit(config)
        self._sizes = {example.index: self._prepare(example).size for example in examples}
        self._check_fit(examples)

    def length(self, example: CsqaQuestion) -> int:
        """Prompt tokens."""
        return self._sizes[example.index].num_tokens

    def num_positions(self, example: CsqaQuestion) -> int:
        """Positions that the prompt and its longest option take."""
        return self._sizes[example.index].num_needed

    def trace(self, traced: TracedModel, examples: Sequence[CsqaQuestion], place: Place) -> list[TracedSample]:
        """Capture the prompts of a batch, then score their options."""
        prepared = [self._prepare(example) for example in examples]
        texts = [Text(one.prompt.token_ids, len(one.prompt.token_ids)) for one in prepared]
        traces = capture(traced, texts, self._config.capture)
        ids = [one.prompt.token_ids for one in prepared]
        letters = score_continuations(traced, ids, [one.letters for one in prepared])
        options = score_continuations(traced, ids, [one.texts for one in prepared])
        samples = []
        for i, example in enumerate(examples):
            here = place._replace(first_index=place.first_index + i)
            record = self._record(traced, example, prepared[i], traces[i], letters[i], options[i], here)
            samples.append(TracedSample(record, texts[i], traces[i], scored_of(record)))
        return samples

    def _prepare(self, example: CsqaQuestion) -> _Prepared:
        """Render a question, without as much of its beginning as does not fit."""
        whole = self._render(example, example.question)
        if self._limit is None or whole.size.num_needed <= self._limit:
            return whole
        limit = self._limit
        kept = cut_to_fit(
            self._tokenizer, example.question, lambda text: self._render(example, text).size.num_needed - limit
        )
        if kept is None:
            return whole
        cut = self._render(example, kept)
        return cut._replace(num_truncated=len(whole.prompt.token_ids) - len(cut.prompt.token_ids))

    def _render(self, example: CsqaQuestion, question: str) -> _Prepared:
        prompt = self._prompter.prompt(self._asked(example, question), self._shots(example))
        letters = continuation_ids(self._tokenizer, prompt.text, self._joint, [c.label for c in example.choices])
        texts = continuation_ids(self._tokenizer, prompt.text, self._joint, [c.text for c in example.choices])
        return _Prepared(prompt, letters, texts, 0)

    def _asked(self, example: CsqaQuestion, question: str) -> str:
        """The question and its options; a plain prompt's "Answer:" is the Prompter's, a chat message has its own."""
        asked = with_options(question, example.choices)
        return f"{asked}\nAnswer:" if self.variant == "chat" else asked

    def _shots(self, example: CsqaQuestion) -> list[Exchange]:
        """Solved examples for one question."""
        shots = draw_shots(
            self._pool,
            self._config.prompt.num_shots,
            seed=self._config.output.seed,
            index=example.index,
            asked=lambda other: other.question == example.question,
        )
        return [Exchange(self._asked(other, other.question), str(other.gold_label)) for other in shots]

    def _check_fit(self, examples: Sequence[CsqaQuestion]) -> None:
        """Say what was cut. What cannot be cut enough is refused: here where a flag is at fault, by the run
        where the model has too few positions."""
        sizes = [self._sizes[example.index] for example in examples]
        unfit = [e for e, size in zip(examples, sizes, strict=True) if size.num_needed > (self._limit or 10**9)]
        if unfit and self._config.max_seq_len != "auto":
            least = max(self._render(example, example.question[-1:]).size.num_needed for example in unfit)
            raise ConfigError(
                f"{len(unfit)} questions do not fit {self._config.max_seq_len} tokens - at `$.max_seq_len`; the first, "
                f"{unfit[0].example_id!r}: options and the words around them are never cut; give {least} at least"
            )
        cut = [size.num_truncated for size in sizes if size.num_truncated]
        if cut:
            say(
                f"{len(cut)} of {len(examples)} questions lost their beginning, {sum(cut)} tokens in all, to fit "
                f"{self._limit} tokens (--max-seq-len)"
            )

    def _record(
        self,
        traced: TracedModel,
        example: CsqaQuestion,
        prepared: _Prepared,
        trace: Trace,
        letter_logprobs: list[float],
        text_logprobs: list[float],
        place: Place,
    ) -> CsqaRecord:
        prompt, label = prepared.prompt, example.label_idx
        probs = softmax(letter_logprobs)
        normalized = [total / len(ids) for total, ids in zip(text_logprobs, prepared.texts, strict=True)]
        best_by_text = int(np.argmax(normalized))
        return CsqaRecord(
            **read_fields(traced, prompt.text, prompt.token_ids, prompt.offsets, trace, place),
            **choice_fields(example, probs),
            split=self._config.source.split,
            template_sha256=prompt.template_sha256,
            spans=prompt.spans,
            seed=self._config.output.seed,
            num_truncated=prepared.num_truncated,
            letter_token_ids=prepared.letters,
            letter_logprobs=letter_logprobs,
            letter_probs=probs.tolist(),
            text_token_ids=prepared.texts,
            text_logprobs=text_logprobs,
            text_logprobs_normalized=normalized,
            pred_idx_by_text=best_by_text,
            is_correct_by_text=None if label is None else best_by_text == label,
        )


def _limit(config: CsqaConfig) -> int | None:
    """Most tokens of a text; None where neither the flag nor the model sets a limit."""
    positions = max_positions(config.model)
    if config.max_seq_len == "auto":
        return positions
    if positions is not None and config.max_seq_len > positions:
        raise ConfigError(
            f"max_seq_len {config.max_seq_len} - at `$.max_seq_len`; the model has {positions} positions; give at most "
            "that, or auto"
        )
    return config.max_seq_len
