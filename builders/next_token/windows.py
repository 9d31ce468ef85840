"""Windows: documents cut into pieces that fit a model, each an example of its own."""

from typing import Any, NamedTuple

import msgspec
import numpy as np

from builders.next_token.config import NextTokenConfig
from builders.next_token.record import Word
from builders.next_token.texts import Document, read_documents
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import TOO_LONG
from tracekit.model.models import load_tokenizer, max_positions
from tracekit.model.prompts import tokens_of, with_bos
from tracekit.model.vocabulary import check_rows
from tracekit.task import Example, Examples

__all__ = ["Tokenized", "Window", "cut", "place_in_text", "tokenize", "windows"]

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


def windows(config: NextTokenConfig) -> Examples[Window]:
    """The windows of the source's documents, in order.

    Text, ids and offsets of all documents stay in memory, 12 bytes a token besides the text. A text is tokenised
    whole, so that its tokens are those of the usual computation; that takes some 700 bytes a token (GPT-2's
    tokenizer) for a moment: 0.2 GB for a test split of WikiText. `--offset` and `--limit` cut WikiText-103's
    training split, which would take 80 GB, into slices of lines. A document of over 32 MiB is too long.

    Raises:
        ConfigError: a setting has no meaning here, or windows do not fit the model.
        SourceError: as builders.next_token.texts.read_documents, or a document has no tokens.
    """
    length, stride = _window_sizes(config)
    found = read_documents(config.source, config.kind)
    tokenizer = load_tokenizer(config.model)
    found_windows: list[Window] = []
    skipped: list[str] = []
    for document in found.examples:
        if (size := len(document.text)) > _MAX_CHARACTERS:
            skipped.append(
                f"{found.source.id} row {document.index}: {TOO_LONG}: a text of {size} characters; expected at "
                f"most {_MAX_CHARACTERS}; cut it, or take fewer lines of it with --offset and --limit"
            )
            continue
        whole = tokenize(tokenizer, document, config.prompt.bos)
        pieces = cut(len(whole.token_ids), length, stride)
        if not pieces:
            skipped.append(f"{found.source.id} row {document.index}: the tokenizer makes no tokens of its text")
        for number, (start, stop, num_context) in enumerate(pieces):
            index = document.index * _WINDOWS_A_DOCUMENT + number
            found_windows.append(
                Window(index=index, whole=whole, number=number, start=start, stop=stop, num_context=num_context)
            )
    if skipped and (config.source.on_bad_row == "error" or not found_windows):
        raise SourceError(f"{skipped[0]}; leave the row out, or pass --on-bad-row skip")
    info = msgspec.structs.replace(
        found.source, num_used=found.source.num_used - len(skipped), skipped=[*found.source.skipped, *skipped]
    )
    return Examples(found_windows, info)


def _window_sizes(config: NextTokenConfig) -> tuple[int, int]:
    """Tokens of a window and of a step.

    Raises:
        ConfigError: a setting has no meaning here, windows are longer than the model has positions, or a step is longer
            than a window.
    """
    positions = max_positions(config.model)
    asked = config.max_seq_len
    length = min(positions or _MAX_AUTO, _MAX_AUTO) if asked == "auto" else asked
    if positions is not None and length > positions:
        raise ConfigError(f"--max-seq-len {length} - at `$.max_seq_len`; the model has positions for {positions}")
    stride = length if config.stride is None else config.stride
    if stride > length:
        raise ConfigError(f"--stride {stride} - at `$.stride`; it would leave tokens out of windows of {length}")
    return length, stride


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
