"""Settings of next_token."""

from typing import Annotated, ClassVar, Literal

import msgspec

from builders.kit.columns import TextSource
from tracekit.config import Positive, ReadingConfig, RunConfig

__all__ = ["Kind", "NextTokenConfig", "TextPromptConfig"]

Kind = Literal["ud_ewt", "go_emotions", "csqa", "wikitext2", "wikitext103", "text"]
"""What a text is."""


class TextPromptConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a text is read: there is no prompt around it."""

    bos: Literal["auto", "always", "never"] = "auto"
    """Beginning-of-sequence token: `auto` does what the tokenizer does, never two."""


class NextTokenConfig(RunConfig, frozen=True, kw_only=True):
    """Texts, and how a language model predicts each of their tokens.

    --source: ud_ewt, go_emotions, csqa, wikitext2 (default) or wikitext103 on the Hub; sample or sample:KIND; a
    CoNLL-U, TSV, JSONL, Parquet, CSV, .txt, .raw or .tokens file; or a Hub id. --limit and --offset count rows: in
    WikiText lines. Nothing is generated.
    """

    needs_numbers: ClassVar[bool] = False
    source: TextSource = TextSource()
    """Which data."""
    prompt: TextPromptConfig = TextPromptConfig()
    """How a text is read."""
    capture: ReadingConfig = ReadingConfig()
    """What is recorded."""
    kind: Kind | Literal["auto"] = "auto"
    """What the source is, where neither its name nor its columns say so."""
    max_seq_len: Annotated[int, msgspec.Meta(ge=2)] | Literal["auto"] = "auto"
    """Most tokens of a window; `auto`: as many as the model has positions, at most 1024."""
    stride: Positive | None = None
    """Tokens by which windows of a long text advance; as long as a window by default, so that they do not overlap."""
