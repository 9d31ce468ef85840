"""Text as its tokens come: whole characters, stop strings held back, and in sum what the tokenizer decodes."""

from collections.abc import Sequence

import pytest

from tests.tiny_checkpoint import tiny_tokenizer
from tracekit.serve.texts import TextStream

TEXTS = ["Hello there.", "東京 und Grüße — naïve 🙂🏽 ok", "   spaces  kept ", "line\n\nline"]
TOKENIZER = tiny_tokenizer()


def streamed(text: str, stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """Pieces of a text whose tokens come one by one after a prompt."""
    stream = TextStream(TOKENIZER, TOKENIZER("The prompt:").input_ids, stop)
    pieces = []
    for token in TOKENIZER(text).input_ids:
        pieces.append(stream.add(token))
        if stream.stop_string is not None:
            break
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_no_character_is_cut(text: str):
    pieces, stream = streamed(text)
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 3


def test_bytes_that_are_no_character_come_out_at_the_end():
    stream = TextStream(TOKENIZER, [], [])
    ids = TOKENIZER("é").input_ids
    assert len(ids) == 2
    assert [stream.add(ids[0]), stream.finish()] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "expected", "by"),
    [
        (["there"], "Hello ", "there"),
        (["there", "the"], "Hello ", "the"),
        (["."], "Hello there", "."),
        (["lo th", "H"], "", "H"),
        (["there", "he"], "Hello t", "he"),
        (["there!"], "Hello there.", None),
        (["..", "Hellx"], "Hello there.", None),
    ],
)
def test_nothing_of_a_stop_string_gets_out(stop: list[str], expected: str, by: str | None):
    pieces, stream = streamed("Hello there.", stop)
    assert ("".join(pieces), stream.text, stream.stop_string) == (expected, expected, by)


def test_special_tokens_are_no_text():
    stream = TextStream(TOKENIZER, [], [])
    ids = [*TOKENIZER("ab").input_ids, TOKENIZER.eos_token_id, *TOKENIZER("c").input_ids]
    assert "".join([*map(stream.add, ids), stream.finish()]) == "abc"
