"""Surface features of a question: what is said of hand-made ones, and rarity in each kind of tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

import builders.introspection.surface as surface_module
from builders.introspection.surface import Rarity, Surface, surface_of

MERGES = [("l", "o"), ("lo", "w"), ("e", "r"), ("low", "er")]
"""Ranks 1 to 4."""
VOCAB = ["<unk>", "l", "o", "w", "e", "r", "lower", "low", "lo", "er"]
"""Ids do not follow the ranks."""


def wrapped(model: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def bpe(**settings: Any) -> PreTrainedTokenizerFast:
    vocab = {token: number for number, token in enumerate(VOCAB)}
    return wrapped(models.BPE(vocab, MERGES, unk_token="<unk>", **settings))


def surface(question: str) -> Surface:
    tokenizer = bpe()
    return surface_of(tokenizer, Rarity(tokenizer), question)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What is it?", "what"),
        ("WHAT IS IT?", "what"),
        ("What's the time?", "what"),
        ("Where is it?", "where"),
        ("When was it?", "when"),
        ("Who was it?", "who"),
        ("Dr WHO was it?", "who"),
        ("Whom did she see?", "who"),
        ("Whose is it?", "who"),
        ("How is it?", "how"),
        ("Why is it so?", "why"),
        ("In which year was it?", "which"),
        ("The planet which is the largest, and what it weighs", "which"),
        ("“How”?", "how"),
        ("However, it is whatever it is.", "other"),
        ("Somewhat anyhow showy", "other"),
        ("The largest planet is", "other"),
        ("", "other"),
    ],
)
def test_the_first_question_word_is_the_type(question: str, kind: str):
    assert surface(question).question_type == kind


def listed(after: str, before: str) -> list[str]:
    """The words that the module's docstring lists between two of its phrases."""
    text = " ".join(str(surface_module.__doc__).split())
    part = text.split(after, 1)[1].split(before, 1)[0]
    return [word.split()[0] for word in part.split(", ")]


def test_every_negation_and_hedge_of_the_docstring_counts_in_any_case_and_in_no_longer_word():
    negations = listed("A negation is one of these as a whole word, without regard to case: ", " (but not")
    hedges = listed("A hedge is one of these as a whole word, without regard to case: ", "; or may")
    assert (len(negations), len(hedges)) == (13, 19)
    for word in negations:
        assert all(surface(f"It is {form} so").has_negation for form in (word, word.upper(), word.title()))
        assert not surface(f"It is {word}y so").has_negation
    for word in hedges:
        assert all(surface(f"It is {form} so").has_ambiguity for form in (word, word.upper(), word.title()))
        assert not surface(f"It is {word}y so").has_ambiguity


@pytest.mark.parametrize(
    ("question", "is_negated"),
    [
        ("Which is not a planet?", True),
        ("Which is NOT a planet?", True),
        ("All of these EXCEPT one", True),
        ("Which isn't a planet?", True),
        ("Which isn’t a planet?", True),
        ("It cannot be", True),
        ("Which is the least likely?", True),
        ("None of these", True),
        ("Neither is", True),
        ("Without water", True),
        ("Who is unable to do the impossible?", False),
        ("Who has at least two moons?", False),
        ("Which note is a knot in nothingness?", False),
        ("A hint to a nation", False),
        ("Does it snow in November?", False),
        ("'n'tuple", False),
        ("", False),
    ],
)
def test_negations(question: str, is_negated: bool):
    assert surface(question).has_negation is is_negated


@pytest.mark.parametrize(
    ("question", "is_hedged"),
    [
        ("Which is most likely?", True),
        ("Which is LIKELY?", True),
        ("Which BEST describes it?", True),
        ("What may follow?", True),
        ("What MAY follow?", True),
        ("Usually it is", True),
        ("What happened in May 1968?", False),
        ("The bestiary of the mayor is mighty unlikely", False),
        ("What is it?", False),
        ("", False),
    ],
)
def test_hedges(question: str, is_hedged: bool):
    assert surface(question).has_ambiguity is is_hedged


def test_lengths_are_those_of_the_text_and_its_tokens():
    found = surface("lower low é🐎")
    assert found.char_length == 12
    tokens = bpe().tokenize("lower low é🐎")
    assert tokens[:2] == ["lower", "low"]
    assert found.token_length == len(tokens)


def test_the_length_in_tokens_leaves_special_tokens_out():
    tokenizer = bpe()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    rarity = Rarity(tokenizer)
    assert rarity(tokenizer.bos_token_id) == 0
    assert surface_of(tokenizer, rarity, "low").token_length == 1


@pytest.mark.parametrize("text", ["lower low er w", "w er low lower"])
def test_rarity_of_bpe_is_the_rank_of_the_merge(text: str):
    found = surface(text)
    assert found.frequency_rarity_source == "bpe_merge_rank"
    assert found.frequency_rarity_mean == (4 + 2 + 3 + 0) / 4
    assert found.frequency_rarity_max == 4
    assert found.token_rarity_mean == (6 + 7 + 9 + 3) / 4
    assert found.token_rarity_max == 9


def test_a_token_of_several_merges_has_the_rank_of_the_first():
    vocab = {token: number for number, token in enumerate(["a", "b", "ab", "ba", "aba"])}
    tokenizer = wrapped(models.BPE(vocab, [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]))
    rarity = Rarity(tokenizer)
    assert [rarity(token) for token in range(5)] == [0, 0, 1, 2, 3]


def test_bpe_whose_tokens_carry_a_mark_inside_words_has_ranks():
    vocab = {token: number for number, token in enumerate(["a", "##b", "##c", "ab", "##bc", "abc"])}
    merges = [("a", "##b"), ("##b", "##c"), ("ab", "##c")]
    tokenizer = wrapped(models.BPE(vocab, merges, continuing_subword_prefix="##"))
    assert tokenizer.tokenize("abc ab") == ["abc", "ab"]
    rarity = Rarity(tokenizer)
    assert [rarity(token) for token in range(6)] == [0, 0, 0, 1, 2, 3]


def test_ranks_of_the_real_gpt2_tokenizer(shared: Path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2")
    lines = (shared / "tokenizers/gpt2/merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    rarity = Rarity(tokenizer)
    for rank in (1, 2, 1000, 50_000):
        token = tokenizer.convert_tokens_to_ids(lines[rank - 1].replace(" ", ""))
        assert rarity(token) == rank
    assert rarity(tokenizer.convert_tokens_to_ids("A")) == rarity(tokenizer.eos_token_id) == 0
    the, rare = (surface_of(tokenizer, rarity, text) for text in ("the of and in", "photosynthesis Timbuktu"))
    assert the.frequency_rarity_mean < rare.frequency_rarity_mean


def test_rarity_of_unigram_is_the_negative_log_probability():
    scores = [("<unk>", 0.0), ("low", -2.5), ("er", -4.0), ("l", -6.0), ("o", -6.5), ("w", -7.0)]
    tokenizer = wrapped(models.Unigram(scores, 0))
    found = surface_of(tokenizer, Rarity(tokenizer), "lower o")
    assert tokenizer.tokenize("lower o") == ["low", "er", "o"]
    assert found.frequency_rarity_source == "unigram_nll"
    assert found.frequency_rarity_mean == pytest.approx((2.5 + 4 + 6.5) / 3)
    assert found.frequency_rarity_max == 6.5
    assert (found.token_rarity_mean, found.token_rarity_max) == ((1 + 2 + 4) / 3, 4)


@pytest.mark.parametrize("kind", [models.WordPiece, models.WordLevel])
def test_rarity_of_a_sorted_vocabulary_is_the_rank_in_it(kind: Any):
    vocab = {token: number for number, token in enumerate(["<unk>", "the", "low", "er", "tower"])}
    tokenizer = wrapped(kind(vocab, unk_token="<unk>"))
    found = surface_of(tokenizer, Rarity(tokenizer), "the tower")
    assert found.frequency_rarity_source == "vocab_rank"
    assert (found.frequency_rarity_mean, found.frequency_rarity_max) == ((1 + 4) / 2, 4)


def test_in_a_sorted_vocabulary_characters_have_ranks_and_only_added_tokens_have_none():
    tokenizer = wrapped(models.WordPiece({"<unk>": 0, "[PAD]": 1, "[CLS]": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "bos_token": "<s>"})
    rarity = Rarity(tokenizer)
    assert rarity(tokenizer.convert_tokens_to_ids("a")) == 3
    assert rarity(tokenizer.cls_token_id) == 2
    assert tokenizer.bos_token_id == 4
    assert rarity(tokenizer.bos_token_id) == 0


def test_a_question_without_tokens_has_rarity_zero():
    found = surface("")
    assert (found.char_length, found.token_length) == (0, 0)
    assert (found.token_rarity_mean, found.token_rarity_max) == (0, 0)
    assert (found.frequency_rarity_mean, found.frequency_rarity_max) == (0, 0)
