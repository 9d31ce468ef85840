"""Letters as answers: what outputs name, how tokenizers spell letters, and their scores against plain transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from builders.introspection_prompts import bins_of
from builders.letters import LetterScores, Spelling, asked_ids, name_letter, score_letters, spellings_of
from tests.tiny_checkpoint import tiny_tokenizer
from tests.tiny_models import tiny_model, token_ids, traced
from tracekit.capture import Text, capture
from tracekit.config import CaptureConfig
from tracekit.errors import ConfigError

LETTERS = list("ABCD")
PLANETS = {"A": "Mars", "B": "Jupiter", "C": "Venus", "D": "Earth"}
BINS = {one.label: one.text() for one in bins_of((0, 5, 10, 20, 40, 60, 80, 90, 100))}
NOT_STATED = "no letter of A, B, C, D at the start, and none stated"


# What an output names


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        " B\n",
        "B.",
        "B)",
        "B!",
        "b)",
        "(b)",
        "[B]",
        "“B”",
        "‘B’",
        "'B'",
        '"B"',
        "`B`",
        "**B**",
        "__B__",
        "* B",
        "<B>",
        "<b>B</b>",
        "<answer>B</answer>",
        "B</s>",
        "$B$",
        "\\(B\\)",
        "\\boxed{B}",
        "$\\boxed{\\text{B}}$",
        "\\textbf{B}",
        "**B.** Jupiter",
        "B. Jupiter",
        "B.Jupiter",
        "(B)Jupiter",
        "B Jupiter",
        "B\tJupiter",
        "B (Jupiter)",
        "B (the largest)",
        "B - Jupiter",
        "B – the largest",
        "B — Jupiter",
        "B: the largest",
        "B = Jupiter",
        "B **Jupiter**",
        "B is right",
        "B because it is large",
        "B, because A is small",
        "B, not A",
        "B, A is wrong",
        "The answer is B, and A is not",
        "B, a planet",
        "B\n\nA is wrong",
        "B\nAnswer: B",
        "B. Jupiter is the largest, A is small",
        "The answer is B",
        "The answer is **B**.",
        "The correct answer is (B)",
        "The answer is 'B'.",
        "The answer is b",
        "the answer is: B",
        "The answer is $\\boxed{B}$.",
        "The answer is B Jupiter",
        "The best answer is B, not A",
        "**Answer:** B",
        "Answer: b",
        "ANSWER：B",
        "Sure, the answer is:\n\n**B. Jupiter**",
        "Option B",
        "option b",
        "I take choice B",
        "The letter is B",
        "Option B seems right",
        "A is wrong, the answer is B",
        "(A) isn't right; the answer is B",
        "Option A is wrong. Option B is right.",
        "Option (A) is incorrect, so the answer must be option B",
    ],
)
def test_an_output_that_names_b(text: str):
    named = name_letter(text, PLANETS)
    assert (named.letter, named.failure) == ("B", None)
    assert text[named.start] in "Bb"
    assert not text[named.start - 1 : named.start].isalnum()
    assert not text[named.start + 1 : named.start + 2].isalnum()


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("  (b)", 3),
        ("\n**B.** Jupiter", 3),
        ("A is wrong, the answer is B", 26),
        ("\\boxed{B}", 7),
        ("Better: option B, or B.", 15),
        (" Jupiter", 1),
        ("“Jupiter”", 0),
    ],
)
def test_start_is_where_the_letter_or_its_text_begins(text: str, start: int):
    named = name_letter(text, PLANETS)
    assert (named.letter, named.start) == ("B", start)


@pytest.mark.parametrize(
    "text",
    [
        "A cat",
        "a cat",
        "A.D. 476",
        "A's",
        "A’ll do",
        "A-level",
        "A long time ago",
        "B?",
        "AB",
        "ABCD",
        "A B C D",
        "C# and others",
        "D-Day",
        "B12",
        "E",
        "Option E",
        "The answer is E",
        "The answer is A cat",
        "The answer is a cat",
        "the answer is A's",
        "The answer is B.C. 44",
        "Answer: C-reactive protein",
        "Answer: C++",
        "The answer is not A",
        "Option A is wrong",
        "A: is not a planet",
        "<b>Mars</b>",
        "(A) is wrong",
        "I don't know",
        "Neither A nor B",
        "Both A and C are right",
        "The answer is Jupiter",
        "Jupiter and Mars",
        "Jupiters",
        "答",
        "...",
        "70%",
    ],
)
def test_an_output_that_names_no_letter(text: str):
    assert name_letter(text, PLANETS) == (None, 0, NOT_STATED)


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_output_names_no_letter(text: str):
    assert name_letter(text, PLANETS) == (None, 0, "the output is empty")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A, B, C or D", "A, B, ..."),
        ("a, b, c or d", "A, B, ..."),
        ("A and B", "A, B, ..."),
        ("B or C?", "B, C, ..."),
        ("A, and B", "A, B, ..."),
        ("A/B", "A, B, ..."),
        ("A & B", "A, B, ..."),
        ("(A), (B)", "A, B, ..."),
        ("**A** or **B**", "A, B, ..."),
        ('"B" or "C"', "B, C, ..."),
        ("A\nB\nC\nD", "A, B, ..."),
        ("A. Mars\nB. Jupiter\nC. Ve", "A, B, ..."),
        ("The answer is A or B", "A, ..."),
        ("Answer: B, C", "B, ..."),
        ("Option A is good. Option B is better.", "A, B"),
    ],
)
def test_an_output_of_several_letters_names_none_and_says_so(text: str, names: str):
    assert name_letter(text, PLANETS) == (None, 0, f"several letters: {names}")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("60 to 80 %", "F"),
        ("60 to 80%", "F"),
        ("60 to 80", "F"),
        ("F. 60 to 80 %", "F"),
        ("F 60 to 80 %", "F"),
        ("F (60-80%)", "F"),
        ("A under 5 %", "A"),
        ("Under 5%.", "A"),
        ("over 90 %", "H"),
        ("Range: F", "F"),
        ("The range is f.", "F"),
        ("5 to 10 %", "B"),
        ("70%", None),
        ("70", None),
        ("5", None),
        ("60", None),
        ("80 to 60 %", None),
        ("A 70% chance", None),
        ("A high chance", None),
        ("a very high one", None),
        ("I", None),
        ("G or H", None),
    ],
)
def test_bins_are_named_by_letter_or_by_their_whole_text(text: str, letter: str | None):
    assert name_letter(text, BINS).letter == letter


@pytest.mark.parametrize(
    ("options", "text", "letter"),
    [
        (["a dog", "A cat", "cat", "A dog"], "A cat", "B"),
        (["a dog", "A cat", "cat", "A dog"], "a Cat.", "B"),
        (["a dog", "A cat", "cat", "A dog"], "A dog", None),
        (["cat", "x", "y", "z"], "A cat", "A"),
        (["cat", "x", "y", "z"], "A catalyst", None),
        (["red", "x", "y", "red blood cell"], "A red blood cell", None),
        (["red", "x", "y", "red blood cell"], "A red one", "A"),
        (["476 B.C.", "A.D. 476", "B.C. 44", "D.C."], "A.D. 476.", "B"),
        (["476 B.C.", "A.D. 476", "B.C. 44", "D.C."], "B.C. 44", "C"),
        (["A", "B", "A and B", "neither"], "A and B", "C"),
        (["A", "B", "A and B", "neither"], "A or B", None),
        (["Dijkstra", "A* search", "depth first", "greedy"], "A* search", "B"),
        (["C. elegans", "D. melanogaster", "E. coli", "yeast"], "D. melanogaster", "B"),
        (["vitamin C", "vitamin A", "vitamin D", "hepatitis B"], "Vitamin C", "A"),
        (["B", "A", "C", "E"], "A", "A"),
        (["B", "A", "C", "E"], "b", "B"),
        (["B", "A", "C", "E"], "E", "D"),
        (["E", "F", "G", "H"], "“g”", "C"),
        (["(x+y)*", ".*", "C++", "[a-z]"], "(x+y)*", "A"),
        (["(x+y)*", ".*", "C++", "[a-z]"], ".*", "B"),
        (["(x+y)*", ".*", "C++", "[a-z]"], "anything", None),
        (["(x+y)*", ".*", "C++", "[a-z]"], "C++", "C"),
        (["(x+y)*", ".*", "C++", "[a-z]"], "C", "C"),
        (["x", "C++", "y", "z"], "C#", None),
        (["1", "-1", "0", "2"], "-1", "B"),
        (["1", "0", "2", "3"], "-1", None),
        (["1", "0", "2", "3"], "1.", "A"),
        (["1.5", "15", "1", "5"], "1.5", "A"),
        (["1.5", "15", "1", "5"], "15", "B"),
        (["5", "5%", "50", "50%"], "5%", "B"),
        (["+", "-", "*", "/"], "-", "B"),
        (["+", "-", "*", "/"], "...", None),
        (["x", "x", "y", "z"], "x", None),
        (["x", "x", "y", "z"], "A", "A"),
        (["x", "x", "y", "z"], "B. x", "B"),
        (["Saint-Exupéry", "x", "y", "z"], "*saint exupéry*", "A"),
        (["Jupiter, the planet", "x", "y", "z"], "“Jupiter the planet”.", "A"),
    ],
)
def test_the_texts_of_options_tell_letters_from_words(options: list[str], text: str, letter: str | None):
    named = name_letter(text, dict(zip(LETTERS, options, strict=True)))
    assert named.letter == letter
    assert (named.failure is None) == (letter is not None)
    assert named.start == 0


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


def test_a_prompt_that_ends_with_a_space_leaves_gpt2_the_bare_letters(shared: Path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    prompt = "Answer: "
    base = tokenizer(prompt).input_ids
    for one in spellings_of(tokenizer, prompt, LETTERS):
        for letter, ids in zip(LETTERS, one.token_ids, strict=True):
            assert tokenizer.decode(base + ids) == prompt + one.form[:-1] + letter


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
