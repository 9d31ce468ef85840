"""Letters as answers: how tokenizers spell them, and their scores against plain transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from builders.kit.letters import LetterScores, Spelling, asked_ids, score_letters, spellings_of
from tests.tiny_checkpoint import tiny_tokenizer
from tests.tiny_models import tiny_model, token_ids, traced
from tracekit.config import CaptureConfig
from tracekit.errors import ConfigError
from tracekit.model.capture import Text, capture

LETTERS = list("ABCD")


# How tokenizers spell letters


def word_piece(words: Sequence[str] = ("Answer", ":", *LETTERS)) -> PreTrainedTokenizerFast:
    vocab = {word: number for number, word in enumerate(["[UNK]", *words])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def metaspace(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """Unigram as SentencePiece makes it: a space is part of the word after it, and one stands before the text."""
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -2.0 - i / 8) for i, piece in enumerate(pieces))], 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def spelled(tokenizer: Any, prompt: str = "Answer:") -> list[tuple[str, list[list[str]]]]:
    return [
        (one.form, [tokenizer.convert_ids_to_tokens(ids) for ids in one.token_ids])
        for one in spellings_of(tokenizer, prompt, LETTERS)
    ]


def test_where_the_space_is_a_token_of_its_own_one_spelling_is_a_sequence():
    tokenizer = tiny_tokenizer()
    assert spelled(tokenizer) == [("A", [[x] for x in LETTERS]), (" A", [["Ġ", x] for x in LETTERS])]
    spellings = spellings_of(tokenizer, "Answer:", LETTERS)
    assert [one.is_single for one in spellings] == [True, False]
    assert asked_ids(spellings) == tuple(tokenizer.convert_tokens_to_ids(LETTERS))


def test_gpt2_knows_both_spellings_as_single_tokens(shared: Path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    assert spelled(tokenizer) == [("A", [[x] for x in LETTERS]), (" A", [["Ġ" + x] for x in LETTERS])]
    spellings = spellings_of(tokenizer, "Answer:", LETTERS)
    assert asked_ids(spellings) == (32, 33, 34, 35, 317, 347, 327, 360)


def tokenizers_of_every_kind(shared: Path) -> dict[str, Any]:
    return {
        "gpt2": GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2"),
        "stories260K": AutoTokenizer.from_pretrained(shared / "models/stories260K-hf"),
        "tiny": tiny_tokenizer(chat=True),
        "word_piece": word_piece(["Answer", ":", "<", "|", "assistant", ">", "(", *LETTERS]),
        "unigram": metaspace(
            ["▁Answer", ":", "▁", "\n", "(", "<|assistant|>", *LETTERS, *("▁" + letter for letter in LETTERS)]
        ),
    }


@pytest.mark.parametrize("prompt", ["Answer:", "Answer: ", "\n", "<|assistant|>", "("])
@pytest.mark.parametrize("kind", ["gpt2", "stories260K", "tiny", "word_piece", "unigram"])
def test_every_letter_of_a_spelling_reads_after_the_prompt_as_the_spelling_says(shared: Path, kind: str, prompt: str):
    tokenizer = tokenizers_of_every_kind(shared)[kind]
    base = tokenizer(prompt, add_special_tokens=False).input_ids
    spellings = spellings_of(tokenizer, prompt, LETTERS)
    assert [one.form for one in spellings] == (["A"] if kind == "word_piece" else ["A", " A"])
    for one in spellings:
        for letter, ids in zip(LETTERS, one.token_ids, strict=True):
            text = prompt + one.form[:-1] + letter
            whole = tokenizer(text, add_special_tokens=False).input_ids
            shown = " ".join(tokenizer.convert_ids_to_tokens(whole)) if kind == "word_piece" else text
            assert tokenizer.decode(base + ids) == shown
            if whole[: len(base)] == base:
                assert base + ids == whole


def test_where_prompt_and_letter_merge_no_letter_is_taken_in_another_spelling(shared: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K-hf")
    bare, spaced = spelled(tokenizer, "Answer: ")
    assert bare == ("A", [[x] for x in LETTERS])
    assert spaced == (" A", [["▁", "A"], ["▁B"], ["▁", "C"], ["▁", "D"]])


def test_letters_that_merge_with_every_sign_are_found_in_the_vocabulary():
    merged = [sign + x for sign in "\n:(" for x in LETTERS]
    tokenizer = metaspace(["▁Answer", ":", "▁", "\n", "(", *("▁" + x for x in LETTERS), *merged, *LETTERS])
    assert spelled(tokenizer, "Answer: ")[0] == ("A", [[x] for x in LETTERS])


def test_a_spelling_that_cannot_be_told_from_the_end_of_the_prompt_is_none():
    tokenizer = metaspace(["▁Answer", ":", "▁", *("▁" + x for x in LETTERS)])
    assert spelled(tokenizer, "Answer: ") == [(" A", [["▁" + x] for x in LETTERS])]


def test_a_prompt_after_which_no_spelling_can_stand_is_refused():
    tokenizer = metaspace(["▁Answer", *(f"▁Answer{joint}{x}" for joint in ("", "▁") for x in LETTERS)])
    with pytest.raises(ConfigError, match="no tokens for 'A' after a prompt that ends in 'Answer': it merges the two"):
        spellings_of(tokenizer, "Answer", LETTERS)


def test_word_piece_has_one_spelling():
    assert spelled(word_piece()) == [("A", [[x] for x in LETTERS])]


def test_a_sentence_piece_tokenizer_has_two():
    tokenizer = metaspace(["▁Answer", ":", "▁", *LETTERS, *("▁" + x for x in LETTERS)])
    assert spelled(tokenizer) == [("A", [[x] for x in LETTERS]), (" A", [["▁" + x] for x in LETTERS])]


def test_a_sentence_piece_tokenizer_without_letters_after_a_space_spells_them_as_a_sequence():
    tokenizer = metaspace(["▁Answer", ":", "▁", *LETTERS])
    assert spelled(tokenizer) == [("A", [[x] for x in LETTERS]), (" A", [["▁", x] for x in LETTERS])]


def test_a_spelling_whose_letters_are_all_unknown_is_none():
    tokenizer = metaspace(["▁Answer", ":", *("▁" + x for x in LETTERS)])
    assert spelled(tokenizer) == [(" A", [["▁" + x] for x in LETTERS])]


def test_a_tokenizer_that_knows_no_letters_is_refused():
    with pytest.raises(ConfigError, match=r"several of the letters A B C D as the same tokens, .*; use a model"):
        spellings_of(word_piece(["Answer", ":", "A", "B"]), "Answer:", LETTERS)


# Scores

SHARP = {"logits_scaling": 0.5}
"""Settings of a tiny model that is sure enough of some tokens for two of them to be likelier than one."""
PROMPTS = [token_ids(9), token_ids(4, start=2), token_ids(14, start=5), token_ids(1, start=11)]


def plain_logits(ids: list[int]) -> torch.Tensor:
    """(T, V) of a lone text, plain transformers."""
    with torch.inference_mode():
        return tiny_model("granite", **SHARP)(torch.tensor([ids])).logits[0].double()


def plain_logprob(prompt: list[int], ids: list[int]) -> float:
    logprobs = plain_logits(prompt + ids).log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


def scored(prompts: list[list[int]], spellings: Sequence[Sequence[Spelling]]) -> list[LetterScores]:
    model = traced("granite", sites=("hidden_states",), **SHARP)
    texts = [
        Text([*prompt, 7, 8], len(prompt), asked_ids=asked_ids(some))
        for prompt, some in zip(prompts, spellings, strict=True)
    ]
    return score_letters(model, prompts, spellings, capture(model, texts, CaptureConfig(sites=("none",))))


def check(prompt: list[int], spellings: Sequence[Spelling], scores: LetterScores) -> None:
    every = [[plain_logprob(prompt, ids) for ids in one.token_ids] for one in spellings]
    masses = [np.exp(logprobs).sum() for logprobs in every]
    best = int(np.argmax(masses))
    assert scores.spelling == spellings[best]
    np.testing.assert_allclose(scores.logprobs, every[best], atol=1e-4)
    assert scores.mass == pytest.approx(masses[best], abs=1e-5)
    assert scores.other_mass == pytest.approx(sum(masses) - masses[best], abs=1e-5)
    if scores.spelling.is_single:
        raw = plain_logits(prompt)[-1, [ids[0] for ids in scores.spelling.token_ids]]
        np.testing.assert_allclose(scores.logits, raw.numpy(), atol=1e-4)
    else:
        assert scores.logits == scores.logprobs


def test_single_tokens_are_scored_as_plain_transformers_does_in_a_batch_of_mixed_lengths():
    some = [Spelling("A", [[5], [6], [7], [8]]), Spelling(" A", [[15], [16], [17], [18]])]
    found = scored(PROMPTS, [some] * len(PROMPTS))
    for prompt, scores in zip(PROMPTS, found, strict=True):
        check(prompt, some, scores)
    assert len({scores.spelling.form for scores in found}) == 2, "the same spelling is the better one everywhere"


def test_sequences_are_scored_as_plain_transformers_does_whichever_spelling_is_better():
    """Prompt by prompt, the sequence begins with the most or the least likely token, so that it wins or loses."""
    spellings: list[list[Spelling]] = []
    for number, prompt in enumerate(PROMPTS):
        order = plain_logits(prompt)[-1].argsort(descending=True).tolist()
        first, others = (order[0], order[-4:]) if number % 2 else (order[-1], order[:4])
        then = plain_logits([*prompt, first])[-1].argsort(descending=True).tolist()[:4]
        spellings.append([Spelling("A", [[x] for x in others]), Spelling(" A", [[first, x] for x in then])])
    found = scored(PROMPTS, spellings)
    for prompt, some, scores in zip(PROMPTS, spellings, found, strict=True):
        check(prompt, some, scores)
    assert [scores.spelling.is_single for scores in found] == [True, False, True, False]


def test_letters_of_different_lengths_are_a_sequence_each_by_its_own_tokens():
    some = [Spelling("A", [[5], [6, 7], [8, 9, 10], [8, 9, 11]])]
    assert asked_ids(some) == ()
    for prompt, scores in zip(PROMPTS, scored(PROMPTS, [some] * len(PROMPTS)), strict=True):
        check(prompt, some, scores)
        assert scores.other_mass == 0


def test_two_sequences_are_kept_apart_and_each_prompt_has_its_own():
    spellings = [
        [Spelling("A", [[5, 20 + i], [6, 21]]), Spelling(" A", [[30 + i, 5], [30 + i, 6]])] for i in range(len(PROMPTS))
    ]
    for prompt, some, scores in zip(PROMPTS, spellings, scored(PROMPTS, spellings), strict=True):
        check(prompt, some, scores)


def test_letters_of_the_tiny_tokenizer_end_to_end():
    tokenizer = tiny_tokenizer()
    prompts = ["Answer:", "Which fox jumps over the dog?\nA. Paris\nB. London\nAnswer:"]
    model = traced("llama", sites=("hidden_states",), vocab_size=len(tokenizer))
    plain = tiny_model("llama", vocab_size=len(tokenizer))
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    spellings = [spellings_of(tokenizer, prompt, LETTERS) for prompt in prompts]
    texts = [Text(one, len(one), asked_ids=asked_ids(some)) for one, some in zip(ids, spellings, strict=True)]
    found = score_letters(model, ids, spellings, capture(model, texts, CaptureConfig(sites=("none",))))
    for prompt, scores in zip(ids, found, strict=True):
        with torch.inference_mode():
            logprobs = plain(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        letters = tokenizer.convert_tokens_to_ids(LETTERS)
        assert scores.spelling.form == "A"
        np.testing.assert_allclose(scores.logprobs, logprobs[letters].numpy(), atol=1e-4)
        assert 0 < scores.other_mass < scores.mass < 1
