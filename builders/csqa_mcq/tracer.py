"""csqa_mcq at work: every option of a question is a row of the encoder's batch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from builders.csqa_mcq.record import CsqaMcqRecord
from builders.csqa_mcq.task import CsqaMcqConfig
from builders.kit.csqa_questions import CsqaQuestion, EncodedChoice, choice_fields, encode_choices
from tracekit.answering import read_fields
from tracekit.console import say
from tracekit.model.capture import Text
from tracekit.model.choices import Choices, ChoiceTrace, capture_choices, check_choice_config
from tracekit.model.continuations import softmax
from tracekit.model.models import max_positions
from tracekit.model.traced import Loads, TracedModel
from tracekit.read.store import Sample
from tracekit.records import Span
from tracekit.run.recheck import Replay
from tracekit.task import Place, TracedSample, Tracer

__all__ = ["CsqaMcqReplay", "CsqaMcqTracer"]

_MAX_AUTO_LENGTH = 512


class CsqaMcqTracer(Tracer[CsqaQuestion]):
    """One configuration at work."""

    loads = "choices"

    def __init__(self, config: CsqaMcqConfig, tokenizer: Any, examples: Sequence[CsqaQuestion]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._capture = config.capture.whole
        check_choice_config(self._capture)
        self.variant = "base"
        longest = config.max_seq_len
        if longest == "auto":
            longest = min(max_positions(config.model) or _MAX_AUTO_LENGTH, _MAX_AUTO_LENGTH)
        self._longest = longest
        self._lengths: dict[int, list[int]] = {}
        num_cut = 0
        for example in examples:
            encoded = self._encode(example)
            self._lengths[example.index] = [len(choice.input_ids) for choice in encoded]
            num_cut += any(choice.num_cut for choice in encoded)
        if num_cut:
            say(f"{num_cut} of {len(examples)} questions exceed --max-seq-len {longest}; their start is cut")
        self._has_warned = False

    def length(self, example: CsqaQuestion) -> int:
        """Tokens of all options."""
        return sum(self._lengths[example.index])

    def num_positions(self, example: CsqaQuestion) -> int:
        """Positions that the longest option takes."""
        return max(self._lengths[example.index])

    def trace(self, traced: TracedModel, examples: Sequence[CsqaQuestion], place: Place) -> list[TracedSample]:
        """Score and capture a batch of questions."""
        if traced.is_head_fresh and not self._has_warned:
            self._has_warned = True
            say(
                f"WARNING: {traced.info.id} has no multiple-choice head; a random one stands in, so its predictions "
                "mean nothing. Fine-tune first (python -m builders.finetune_csqa), then pass --model-path"
            )
        encoded = [self._encode(example) for example in examples]
        items = [Choices([_text(choice) for choice in choices]) for choices in encoded]
        traces = capture_choices(traced, items, self._capture)
        return [
            TracedSample(self._record(traced, example, choices, item, trace, place), item, trace)
            for example, choices, item, trace in zip(examples, encoded, items, traces, strict=True)
        ]

    def _encode(self, example: CsqaQuestion) -> list[EncodedChoice]:
        return encode_choices(self._tokenizer, example.question, example.choices, self._longest)

    def _record(
        self,
        traced: TracedModel,
        example: CsqaQuestion,
        encoded: Sequence[EncodedChoice],
        item: Choices,
        trace: ChoiceTrace,
        place: Place,
    ) -> CsqaMcqRecord:
        prompt = "\n".join(choice.text for choice in encoded)
        probs = softmax(trace.logits)
        segments = [text.token_type_ids for text in item.texts]
        return CsqaMcqRecord(
            **read_fields(traced, prompt, item.token_ids, _offsets(encoded), trace, place),
            **choice_fields(example, probs),
            split=self._config.source.split,
            template_sha256=None,
            spans=[
                Span(name=f"choice_{number}", start=start, stop=stop)
                for number, (start, stop) in enumerate(zip(item.offsets, item.offsets[1:], strict=False))
            ],
            seed=self._config.output.seed,
            num_truncated=sum(choice.num_cut for choice in encoded),
            choice_offsets=item.offsets,
            choice_logits=[float(logit) for logit in trace.logits],
            choice_probs=[float(prob) for prob in probs],
            is_head_fresh=traced.is_head_fresh,
            token_type_ids=None if segments[0] is None else [kind for row in segments for kind in row or []],
        )


def _text(choice: EncodedChoice) -> Text:
    return Text(choice.input_ids, len(choice.input_ids), token_type_ids=choice.token_type_ids)


def _offsets(encoded: Sequence[EncodedChoice]) -> list[list[int]]:
    """Characters of every token in the prompt, where the options stand one a line."""
    offsets: list[list[int]] = []
    line = 0
    for choice in encoded:
        offsets += [[line + start, line + stop] for start, stop in choice.offsets]
        line += len(choice.text) + 1
    return offsets


class CsqaMcqReplay(Replay[CsqaMcqRecord]):
    """A stored question, its options run again."""

    loads: Loads = "choices"

    def text(self, record: CsqaMcqRecord) -> Choices:
        """The options of a question."""
        kinds = record.token_type_ids
        return Choices(
            [
                Text(record.token_ids[a:b], b - a, token_type_ids=None if kinds is None else kinds[a:b])
                for a, b in pairwise(record.choice_offsets)
            ]
        )

    def trace(self, sample: Sample, record: CsqaMcqRecord) -> ChoiceTrace:
        """What is stored of it."""
        return ChoiceTrace(sample.tensors(), record.tensors, np.array(record.choice_logits, np.float32))
