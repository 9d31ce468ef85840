"""Vocabulary: the tokens of a tokenizer against the rows of a model's embedding table; either may have more.

token without a row     `[PAD]` that was added and never trained: a prompt that holds it is refused by name
row without a token     padding of the table, which a model may draw: it stays an id, and reads as an empty string
"""

from collections.abc import Sequence
from typing import Any

from tracekit.errors import ConfigError

__all__ = ["check_rows", "missing_rows", "note_num_rows", "token_strings"]

_NOTE = "tracekit_num_rows"
_MAX_SHOWN = 5


def note_num_rows(tokenizer: Any, num_rows: int | None) -> None:
    """Have a tokenizer know how many rows its model's table has; None where only the loaded model can tell."""
    setattr(tokenizer, _NOTE, num_rows)


def check_rows(tokenizer: Any, token_ids: Sequence[int]) -> None:
    """See that every token of a prompt has a row, where the number of rows is known.

    Raises:
        ConfigError: one has none; the message names it.
    """
    num_rows = getattr(tokenizer, _NOTE, None)
    if num_rows is not None and (wrong := max(token_ids, default=0)) >= num_rows:
        (name,) = token_strings(tokenizer, [wrong])
        raise ConfigError(
            f"the prompt holds the token {name!r} (id {wrong}), and the model's embedding table has {num_rows} rows, "
            "0 to {}: the tokenizer has tokens that this model was not trained with. Leave the token out, or give the "
            "checkpoint that the tokenizer belongs to".format(num_rows - 1)
        )


def token_strings(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The tokens as the tokenizer writes them; an id without a token is an empty string."""
    return [token or "" for token in tokenizer.convert_ids_to_tokens(list(token_ids))]


def missing_rows(tokenizer: Any, num_rows: int) -> str | None:
    """What to say of tokens that have no row; None where all have one."""
    rowless = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= num_rows)
    if not rowless:
        return None
    shown = ", ".join(f"{token!r} ({i})" for i, token in rowless[:_MAX_SHOWN]) + ", ..." * (len(rowless) > _MAX_SHOWN)
    return (
        f"{len(rowless)} tokens of the tokenizer have no row in the model's embedding table of {num_rows}: {shown}. "
        "A prompt that holds one is refused"
    )
