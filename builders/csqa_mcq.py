"""CommonsenseQA for encoders: each option read together with its question, scored by a multiple-choice head.

Address, paper, licence and a row: builders/csqa_questions.py

    python -m builders.csqa_mcq --model google-bert/bert-base-uncased --model-path runs/bert-csqa --split validation

`--model-path` is what `python -m builders.finetune_csqa --out` wrote. A checkpoint without a multiple-choice head gets
a random one, the same on every run; that is said in the output, in every record and on the card, because predictions
then mean nothing (the traces are the encoder's own all the same).
"""

from builders.configs import CsqaMcqConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.csqa_mcq", CsqaMcqConfig)

from collections.abc import Sequence
from typing import Any

import numpy as np

from builders.csqa_questions import CsqaQuestion, EncodedChoice, encode_choices, read_questions
from tracekit.config import PromptConfig
from tracekit.errors import ConfigError
from tracekit.format.manifest import SourceInfo
from tracekit.model.capture import Text
from tracekit.model.choices import Choices, ChoiceTrace, capture_choices, check_choice_config
from tracekit.model.models import max_positions
from tracekit.model.prompts import sha256_text
from tracekit.model.traced import TracedModel
from tracekit.model.vocabulary import token_strings
from tracekit.records import NOTHING_GENERATED, SCHEMA_VERSION, CsqaMcqRecord, Span
from tracekit.run.task import Place, Sample, Task
from tracekit.talk import say

__all__ = ["BUILDER", "CsqaMcqBuilder", "CsqaMcqConfig"]

_MAX_AUTO_LENGTH = 512


class CsqaMcqBuilder:
    """Questions in, scored and traced samples out."""

    name = "csqa_mcq"

    def examples(self, config: CsqaMcqConfig) -> tuple[Sequence[CsqaQuestion], SourceInfo]:
        """The questions of the source."""
        check_choice_config(config.capture)
        if config.prompt != PromptConfig() or config.generation != type(config)().generation:
            raise ConfigError(
                "an encoder reads question and option as they stand, and generates nothing - at `$.prompt`, "
                "`$.generation`; leave their flags out"
            )
        found = read_questions(config.source)
        return found.examples, found.info

    def open(self, config: CsqaMcqConfig, tokenizer: Any, examples: Sequence[CsqaQuestion]) -> "CsqaMcqTask":
        """Encode every option of every question."""
        return CsqaMcqTask(config, tokenizer, examples)


class CsqaMcqTask(Task[CsqaQuestion]):
    """One configuration at work."""

    loads = "choices"

    def __init__(self, config: CsqaMcqConfig, tokenizer: Any, examples: Sequence[CsqaQuestion]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self.variant = "base"
        longest = config.max_seq_len
        if longest == "auto":
            longest = min(max_positions(config.model) or _MAX_AUTO_LENGTH, _MAX_AUTO_LENGTH)
        self._encoded = {e.index: encode_choices(tokenizer, e.question, e.choices, longest) for e in examples}
        num_cut = sum(any(choice.num_cut for choice in choices) for choices in self._encoded.values())
        if num_cut:
            say(f"{num_cut} of {len(examples)} questions exceed --max-seq-len {longest}; their start is cut")
        self._has_warned = False

    def length(self, example: CsqaQuestion) -> int:
        """Tokens of all options."""
        return sum(len(choice.input_ids) for choice in self._encoded[example.index])

    def num_positions(self, example: CsqaQuestion) -> int:
        """Positions that the longest option takes."""
        return max(len(choice.input_ids) for choice in self._encoded[example.index])

    def trace(self, traced: TracedModel, examples: Sequence[CsqaQuestion], place: Place) -> list[Sample]:
        """Score and capture a batch of questions."""
        if traced.is_head_fresh and not self._has_warned:
            self._has_warned = True
            say(
                f"WARNING: {traced.info.id} has no multiple-choice head; a random one stands in, so its predictions "
                "mean nothing. Fine-tune first (python -m builders.finetune_csqa), then pass --model-path"
            )
        items = [Choices([_text(choice) for choice in self._encoded[example.index]]) for example in examples]
        traces = capture_choices(traced, items, self._config.capture)
        return [
            Sample(self._record(traced, example, item, trace, place), item, trace)
            for example, item, trace in zip(examples, items, traces, strict=True)
        ]

    def _record(
        self, traced: TracedModel, example: CsqaQuestion, item: Choices, trace: ChoiceTrace, place: Place
    ) -> CsqaMcqRecord:
        encoded = self._encoded[example.index]
        prompt = "\n".join(choice.text for choice in encoded)
        probs = _softmax(trace.logits)
        predicted = int(trace.logits.argmax())
        best = np.sort(probs)[::-1]
        segments = [text.token_type_ids for text in item.texts]
        return CsqaMcqRecord(
            schema_version=SCHEMA_VERSION,
            key=f"{example.index:06d}",
            example_id=example.example_id,
            question_id=example.example_id,
            sample_index=0,
            config=place.config,
            split=self._config.source.split,
            model=traced.info,
            prompt=prompt,
            prompt_sha256=sha256_text(prompt),
            input_sha256=sha256_text(example.question),
            template_sha256=None,
            token_ids=item.token_ids,
            tokens=token_strings(self._tokenizer, item.token_ids),
            token_offsets=_offsets(encoded),
            prompt_length=item.prompt_length,
            spans=[
                Span(name=f"choice_{number}", start=start, stop=stop)
                for number, (start, stop) in enumerate(zip(item.offsets, item.offsets[1:], strict=False))
            ],
            last_prompt_index=item.prompt_length - 1,
            first_answer_index=None,
            last_answer_index=None,
            eos_included=False,
            tensors=trace.specs,
            generation=NOTHING_GENERATED,
            seed=self._config.output.seed,
            question=example.question,
            concept=example.concept,
            choices=example.choices,
            label_idx=example.label_idx,
            gold_label=example.gold_label,
            pred_idx=predicted,
            pred_label=example.choices[predicted].label,
            is_correct=None if example.label_idx is None else predicted == example.label_idx,
            entropy=float(-(probs * np.log(np.clip(probs, 1e-300, None))).sum()),
            margin=float(best[0] - best[1]),
            num_layers=traced.num_layers,
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


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of the options, float64 (C,)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted / shifted.sum()


BUILDER = CsqaMcqBuilder()
