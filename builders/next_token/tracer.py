"""next_token at work: a batch of windows is read once."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from builders.next_token.config import NextTokenConfig
from builders.next_token.record import NextTokenRecord
from builders.next_token.windows import Window, place_in_text
from tracekit.answering import read_fields
from tracekit.errors import ConfigError
from tracekit.model.capture import NextTokens, Text, Trace, capture
from tracekit.model.prompts import sha256_text
from tracekit.model.traced import TracedModel
from tracekit.model.vocabulary import token_strings
from tracekit.read.store import Sample
from tracekit.run.metrics import exp_or_none
from tracekit.run.recheck import Replay
from tracekit.task import Place, TracedSample, Tracer

__all__ = ["NextTokenReplay", "NextTokenTracer"]


class NextTokenTracer(Tracer[Window]):
    """One configuration at work."""

    def __init__(self, config: NextTokenConfig, tokenizer: Any, examples: Sequence[Window]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self.variant = "chat" if getattr(tokenizer, "chat_template", None) else "base"
        if config.capture.topk > len(tokenizer):
            raise ConfigError(f"--topk {config.capture.topk} - at `$.capture.topk`; there are {len(tokenizer)} tokens")

    def length(self, example: Window) -> int:
        """Tokens of a window."""
        return example.stop - example.start

    def num_positions(self, example: Window) -> int:
        """The same: nothing is generated."""
        return self.length(example)

    def trace(self, traced: TracedModel, examples: Sequence[Window], place: Place) -> list[TracedSample]:
        """Read a batch of windows once."""
        ids = [window.whole.token_ids[window.start : window.stop].tolist() for window in examples]
        texts = [Text(token_ids, len(token_ids), scored_from=1) for token_ids in ids]
        traces = capture(traced, texts, self._config.capture, num_best=self._config.capture.topk)
        return [
            TracedSample(self._record(traced, window, text, trace, place), text, trace)
            for window, text, trace in zip(examples, texts, traces, strict=True)
        ]

    def _record(self, traced: TracedModel, window: Window, text: Text, trace: Trace, place: Place) -> NextTokenRecord:
        document, token_ids = window.whole.document, text.token_ids
        written, offsets, words = place_in_text(window)
        eos = self._tokenizer.eos_token_id
        shared = read_fields(traced, written, token_ids, offsets, trace, place)
        shared["eos_included"] = eos is not None and token_ids[-1] == eos
        return NextTokenRecord(
            **shared,
            key=window.key,
            example_id=document.id,
            question_id=document.id,
            split=self._config.source.split,
            input_sha256=sha256_text(document.text),
            template_sha256=None,
            spans=[],
            seed=self._config.output.seed,
            text=written,
            kind=document.kind,
            document_id=document.id,
            window_index=window.number,
            window_start=window.start,
            num_context=window.num_context,
            num_document_tokens=len(window.whole.token_ids),
            words=words,
            labels=document.labels,
            question=document.question,
            answer=document.answer,
            **self._predictions(token_ids, trace, window.num_context),
        )

    def _predictions(self, token_ids: list[int], trace: Trace, num_context: int) -> dict[str, Any]:
        """The fields of a record that say how its tokens were predicted."""
        own = trace.next_tokens
        best = own.best_ids.tolist()
        true = token_ids[1:] if self._config.capture.numbers == "all" else []
        predicted = [ids[0] for ids in best]
        topk = own.best_ids.shape[1]
        strings = token_strings(self._tokenizer, own.best_ids.ravel().tolist())
        probs = np.exp(own.best_logprobs)
        scored = own.logprobs[max(num_context - 1, 0) :].astype(np.float64)
        loss = float(-scored.mean()) if len(scored) else None
        return {
            "next_pos": list(range(len(true))),
            "next_true_id": true,
            "next_pred_id": predicted,
            "next_correct": [a == b for a, b in zip(true, predicted, strict=True)],
            "next_true_prob": np.exp(own.logprobs).tolist(),
            "next_true_logprob": own.logprobs.tolist(),
            "next_pred_prob": probs[:, 0].tolist(),
            "next_entropy": own.entropies.tolist(),
            "next_topk_ids": best,
            "next_topk_tokens": [strings[i : i + topk] for i in range(0, len(strings), topk)],
            "next_topk_probs": probs.tolist(),
            "num_scored": len(scored),
            "loss": loss,
            "perplexity": None if loss is None else exp_or_none(loss),
        }


class NextTokenReplay(Replay[NextTokenRecord]):
    """A stored window, read again."""

    def text(self, record: NextTokenRecord) -> Text:
        """The text of a window: every token but the first is scored."""
        return Text(record.token_ids, record.prompt_length, scored_from=1)

    def trace(self, sample: Sample, record: NextTokenRecord) -> Trace:
        """What is stored of it."""
        numbers = NextTokens(
            logprobs=np.array(record.next_true_logprob, np.float64),
            entropies=np.array(record.next_entropy, np.float64),
            predicted_ids=np.array(record.next_pred_id, np.int64),
        )
        return Trace(sample.tensors(), record.tensors, numbers)
