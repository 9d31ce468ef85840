"""Vocabulary: the tokens of a tokenizer against the rows of a model's embedding table; either may have more.

token without a row     `[PAD]` that was added and never trained: a prompt that holds it is refused by name
row without a token     padding of the table, which a model may draw: it stays an id, and reads as an empty string
"""

from collections.abc import Sequence
from typing import Any

from tracekit.console import say
from tracekit.errors import ConfigError

__all__ = ["check_rows", "note_num_rows", "say_missing_rows", "token_strings", "without_row"]

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
        raise ConfigError(without_row(tokenizer, wrong, num_rows))


def without_row(tokenizer: Any, token_id: int, num_rows: int) -> str:
    """What to say of a token that has no row in a table of so many."""
    known = {} if tokenizer is None else tokenizer.get_vocab()
    name = next((token for token, i in known.items() if i == token_id), None)
    if name is None:
        return f"token id {token_id} is not in the vocabulary: the model's embedding table has {num_rows} rows"
    return (
        f"the text holds the token {name!r} (id {token_id}), and the model's embedding table has {num_rows} rows: the "
        "model was not trained with this token. Leave the token out, or give the checkpoint that has a row for it"
    )


def token_strings(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The tokens as the tokenizer writes them; an id without a token is an empty string."""
    return [token or "" for token in tokenizer.convert_ids_to_tokens(list(token_ids))]


def say_missing_rows(tokenizer: Any, num_rows: int) -> None:
    """Name the tokens that have no row, if there are any."""
    rowless = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= num_rows)
    if not rowless:
        return
    shown = ", ".join(f"{token!r} ({i})" for i, token in rowless[:_MAX_SHOWN]) + ", ..." * (len(rowless) > _MAX_SHOWN)
    say(
        f"the model's embedding table has {num_rows} rows, and the tokenizer has {len(rowless)} token(s) past them: "
        f"{shown}. A prompt that holds one is refused"
    )
