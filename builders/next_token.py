"""Next-token predictions: a language model reads texts, and every prediction it makes on the way is kept.

Label-free: one teacher-forced pass over treebank sentences (UD EWT), comments (GoEmotions), questions (CommonsenseQA),
encyclopedic articles (WikiText) or any other text; nothing is generated. builders/texts.py says where they come from.

A document longer than `--max-seq-len` tokens is cut into windows; each is an example of its own. Perplexity over a run
is the usual sliding-window one: windows advance by `--stride` tokens, only tokens that no earlier window has scored
count, and the first token of a document (without overlap: of every window) is predicted by nothing.

    tokens     0 1 2 3 4 5 6 7 8 9      --max-seq-len 6 --stride 4
    window 0   0 1 2 3 4 5                scores 1 2 3 4 5
    window 1           4 5 6 7 8 9        scores 6 7 8 9 (num_context 2)

    python -m builders.next_token --model demo --source wikitext2 --split test --sites hidden_states
"""

from builders.configs import NextTokenConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.next_token", NextTokenConfig)

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from builders.texts import Document, read_documents
from tracekit.config import PromptConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import TOO_LONG, SourceInfo
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.models import load_tokenizer, max_positions
from tracekit.model.prompts import sha256_text, tokens_of, with_bos
from tracekit.model.traced import TracedModel
from tracekit.model.vocabulary import check_rows, token_strings
from tracekit.records import NOTHING_GENERATED, SCHEMA_VERSION, NextTokenRecord, Word
from tracekit.run.metrics import perplexity
from tracekit.run.plan import Example
from tracekit.run.task import Place, Sample, Task

__all__ = ["BUILDER", "NextTokenBuilder", "NextTokenConfig", "Tokenized", "Window", "cut", "place_in_text", "tokenize"]

_MAX_AUTO = 1024
_MAX_CHARACTERS = 2**25
"""Longest document: it is tokenised whole, which takes some 6 GB for so many characters."""
_WINDOWS_A_DOCUMENT = 10**9
"""Room for window numbers in an index; more tokens than a document can have."""


class Tokenized(NamedTuple):
    """A document as the model reads it."""

    document: Document
    """The document."""
    token_ids: np.ndarray
    """Its ids, with the special tokens that the tokenizer puts around a text, int32 (T,)."""
    offsets: np.ndarray
    """Characters of each token in the text, int32 (T, 2); special tokens have none of their own."""


class Window(Example, frozen=True, kw_only=True):
    """A piece of a document that fits the model. `index` is document and number of the window in one."""

    whole: Tokenized
    """The document it is of."""
    number: int
    """Number of the window in its document."""
    start: int
    """First token, in the document."""
    stop: int
    """One past the last."""
    num_context: int
    """Tokens at its start that an earlier window has, too."""

    @property
    def key(self) -> str:
        """Key of its sample: unique in a configuration, also after a merge."""
        return f"{self.whole.document.index:06d}_{self.number:03d}"


def cut(num_tokens: int, max_seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Start, stop and context of the windows of a text; the last ends with the text, and none lies in another."""
    windows: list[tuple[int, int, int]] = []
    stop = 0
    while stop < num_tokens:
        start = len(windows) * stride
        windows.append((start, min(start + max_seq_len, num_tokens), stop - start))
        stop = windows[-1][1]
    return windows


def tokenize(tokenizer: Any, document: Document, bos: str) -> Tokenized:
    """A document's ids and the characters of each; special tokens once, as the tokenizer adds them and `--bos` says.

    Raises:
        ConfigError: `--bos always`, and the tokenizer has none.
    """
    encoded = tokenizer(
        document.text,
        add_special_tokens=bos != "never",
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids, pairs = with_bos(tokenizer, encoded.input_ids, encoded.offset_mapping, bos)
    check_rows(tokenizer, ids)
    offsets = np.array(pairs, np.int32).reshape(-1, 2)
    is_special = ~offsets.any(axis=1)  # (0, 0), also at the end of a text, where its place is after the last character
    offsets[is_special] = np.maximum.accumulate(offsets[:, 1])[is_special, None]
    return Tokenized(document, np.array(ids, np.int32), offsets)


class NextTokenBuilder:
    """Texts in, windows with every next-token prediction out."""

    name = "next_token"

    def examples(self, config: NextTokenConfig) -> tuple[Sequence[Window], SourceInfo]:
        """The windows of the source's documents, in order.

        Text, ids and offsets of all documents stay in memory, 12 bytes a token besides the text. A text is tokenised
        whole, so that its tokens are those of the usual computation; that takes some 700 bytes a token (GPT-2's
        tokenizer) for a moment: 0.2 GB for a test split of WikiText. `--offset` and `--limit` cut WikiText-103's
        training split, which would take 80 GB, into slices of lines. A document of over 32 MiB is too long.

        Raises:
            ConfigError: a setting has no meaning here, or windows do not fit the model.
            SourceError: as builders.texts.read_documents, or a document has no tokens.
        """
        length, stride = _window_sizes(config)
        found = read_documents(config.source, config.kind)
        tokenizer = load_tokenizer(config.model)
        windows: list[Window] = []
        skipped: list[str] = []
        for document in found.examples:
            if (size := len(document.text)) > _MAX_CHARACTERS:
                skipped.append(
                    f"{found.info.id} row {document.index}: {TOO_LONG}: a text of {size} characters; expected at "
                    f"most {_MAX_CHARACTERS}; cut it, or take fewer lines of it with --offset and --limit"
                )
                continue
            whole = tokenize(tokenizer, document, config.prompt.bos)
            pieces = cut(len(whole.token_ids), length, stride)
            if not pieces:
                skipped.append(f"{found.info.id} row {document.index}: the tokenizer makes no tokens of its text")
            for number, (start, stop, num_context) in enumerate(pieces):
                index = document.index * _WINDOWS_A_DOCUMENT + number
                windows.append(
                    Window(index=index, whole=whole, number=number, start=start, stop=stop, num_context=num_context)
                )
        if skipped and (config.source.on_bad_row == "error" or not windows):
            raise SourceError(f"{skipped[0]}; leave the row out, or pass --on-bad-row skip")
        info = msgspec.structs.replace(
            found.info, num_used=found.info.num_used - len(skipped), skipped=[*found.info.skipped, *skipped]
        )
        return windows, info

    def open(self, config: NextTokenConfig, tokenizer: Any, examples: Sequence[Window]) -> "NextTokenTask":
        """Nothing is left to prepare: the windows hold their ids."""
        return NextTokenTask(config, tokenizer)


def _window_sizes(config: NextTokenConfig) -> tuple[int, int]:
    """Tokens of a window and of a step.

    Raises:
        ConfigError: a setting has no meaning here, windows are longer than the model has positions, or a step is longer
            than a window.
    """
    if config.capture.tokens == "answer":
        raise ConfigError(
            "tokens 'answer' - at `$.capture.tokens`; nothing is generated here, so there are none; give all or last"
        )
    if config.prompt != PromptConfig(bos=config.prompt.bos):
        raise ConfigError("a text has no prompt around it - at `$.prompt`; leave all its flags out but --bos")
    positions = max_positions(config.model)
    asked = config.max_seq_len
    length = min(positions or _MAX_AUTO, _MAX_AUTO) if asked == "auto" else asked
    if positions is not None and length > positions:
        raise ConfigError(f"--max-seq-len {length} - at `$.max_seq_len`; the model has positions for {positions}")
    stride = length if config.stride is None else config.stride
    if stride > length:
        raise ConfigError(f"--stride {stride} - at `$.stride`; it would leave tokens out of windows of {length}")
    return length, stride


class NextTokenTask(Task[Window]):
    """One configuration at work."""

    def __init__(self, config: NextTokenConfig, tokenizer: Any) -> None:
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

    def trace(self, traced: TracedModel, examples: Sequence[Window], place: Place) -> list[Sample]:
        """Read a batch of windows once."""
        ids = [window.whole.token_ids[window.start : window.stop].tolist() for window in examples]
        texts = [Text(token_ids, len(token_ids), scored_from=1) for token_ids in ids]
        traces = capture(traced, texts, self._config.capture, num_best=self._config.capture.topk)
        return [
            Sample(self._record(traced, window, text, trace, place.config), text, trace)
            for window, text, trace in zip(examples, texts, traces, strict=True)
        ]

    def _record(self, traced: TracedModel, window: Window, text: Text, trace: Trace, config: str) -> NextTokenRecord:
        document, token_ids = window.whole.document, text.token_ids
        written, offsets, words = place_in_text(window)
        eos = self._tokenizer.eos_token_id
        return NextTokenRecord(
            schema_version=SCHEMA_VERSION,
            key=window.key,
            example_id=document.id,
            question_id=document.id,
            sample_index=0,
            config=config,
            split=self._config.source.split,
            model=traced.info,
            prompt=written,
            prompt_sha256=sha256_text(written),
            input_sha256=sha256_text(document.text),
            template_sha256=None,
            token_ids=token_ids,
            tokens=self._strings(token_ids),
            token_offsets=offsets,
            prompt_length=len(token_ids),
            spans=[],
            last_prompt_index=len(token_ids) - 1,
            first_answer_index=None,
            last_answer_index=None,
            eos_included=eos is not None and token_ids[-1] == eos,
            tensors=trace.specs,
            generation=NOTHING_GENERATED,
            seed=self._config.output.seed,
            text=written,
            kind=document.kind,
            document_id=document.id,
            window_index=window.number,
            window_start=window.start,
            num_context=window.num_context,
            num_document_tokens=len(window.whole.token_ids),
            num_layers=traced.num_layers,
            words=words,
            labels=document.labels,
            question=document.question,
            answer=document.answer,
            **self._predictions(token_ids, trace, window.num_context),
        )

    def _predictions(self, token_ids: list[int], trace: Trace, num_context: int) -> dict[str, Any]:
        """The fields of a record that say how its tokens were predicted."""
        best = trace.best_ids.tolist()
        true, predicted = token_ids[1:], [ids[0] for ids in best]
        topk = trace.best_ids.shape[1]
        strings = self._strings(trace.best_ids.ravel().tolist())
        probs = np.exp(trace.best_logprobs)
        scored = trace.logprobs[max(num_context - 1, 0) :].astype(np.float64)
        loss = float(-scored.mean()) if len(scored) else None
        return {
            "next_pos": list(range(len(true))),
            "next_true_id": true,
            "next_pred_id": predicted,
            "next_correct": [a == b for a, b in zip(true, predicted, strict=True)],
            "next_true_prob": np.exp(trace.logprobs).tolist(),
            "next_true_logprob": trace.logprobs.tolist(),
            "next_pred_prob": probs[:, 0].tolist(),
            "next_entropy": trace.entropies.tolist(),
            "next_topk_ids": best,
            "next_topk_tokens": [strings[i : i + topk] for i in range(0, len(strings), topk)],
            "next_topk_probs": probs.tolist(),
            "num_scored": len(scored),
            "loss": loss,
            "perplexity": perplexity(loss),
        }

    def _strings(self, ids: list[int]) -> list[str]:
        """Tokens as the tokenizer writes them; empty for ids that a model has beyond its tokenizer's."""
        return token_strings(self._tokenizer, ids)


def place_in_text(window: Window) -> tuple[str, list[list[int]], list[Word]]:
    """A window's text, the characters of its tokens in it, and the gold words in it with their characters and tokens.

    White space that no token has belongs to the token after it; a character whose bytes lie in two windows, to both.
    Words that the window cuts have the characters that it has of them; empty nodes stay with the word before.
    """
    document, offsets = window.whole.document, window.whole.offsets
    first = min(int(offsets[window.start - 1, 1]), int(offsets[window.start, 0])) if window.start else 0
    is_last = window.stop == len(offsets)
    last = len(document.text) if is_last else int(offsets[window.stop - 1, 1])
    here = (offsets[window.start : window.stop] - first).clip(0, last - first).tolist()
    words: list[Word] = []
    is_inside = window.start == 0
    for word in document.words:
        if word.start_char is None or word.stop_char is None:
            words += [word] if is_inside else []
            continue
        start, stop = max(word.start_char, first) - first, min(word.stop_char, last) - first
        is_inside = start < stop
        if is_inside:
            tokens = tokens_of(here, start, stop)
            known = {"start_token": tokens[0], "stop_token": tokens[1]} if tokens[1] else {}
            words.append(msgspec.structs.replace(word, start_char=start, stop_char=stop, **known))
    return document.text[first:last], here, words


BUILDER = NextTokenBuilder()
