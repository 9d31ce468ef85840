"""Continuations: their ids after a prompt; summed log-probabilities against plain transformers, with shared stems."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

import tracekit.model.continuations as continuations_module
from tests.tiny_checkpoint import tiny_tokenizer
from tests.tiny_models import tiny_model, token_ids, traced
from tracekit.errors import ConfigError
from tracekit.model.capture import Text, Trace
from tracekit.model.continuations import continuation_ids, score_continuations, softmax
from tracekit.model.traced import TracedModel

PROMPTS = [token_ids(7), token_ids(1, start=3), token_ids(16, start=5)]
SHARED = [[5, 6, 7], [5, 6, 8], [5, 9], [5, 6, 7, 7], [10], [11], [5]]
"""Stems: 5 6 (twice), 5 (once), 5 6 7 (once), none (three times)."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> TracedModel:
    return traced(name, sites=("hidden_states",))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Text]]:
    """The texts of every pass through the model that follows."""
    kept: list[list[Text]] = []
    whole = continuations_module.capture

    def counted(model: TracedModel, texts: list[Text], *args: object) -> list[Trace]:
        kept.append(list(texts))
        return whole(model, texts, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(continuations_module, "capture", counted)
    return kept


def plain(name: str, prompt: list[int], ids: list[int]) -> float:
    """Log-probability of ids after a prompt: one lone text, plain transformers, float64 sum."""
    with torch.inference_mode():
        logprobs = tiny_model(name)(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


def check(name: str, prompts: list[list[int]], options: list[list[list[int]]], found: list[list[float]]) -> None:
    wanted = [[plain(name, prompt, ids) for ids in some] for prompt, some in zip(prompts, options, strict=True)]
    assert [len(some) for some in found] == [len(some) for some in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_shared_stems_give_what_each_gives_alone(name: str, model: TracedModel):
    options = [SHARED] * len(PROMPTS)
    found = score_continuations(model, PROMPTS, options)
    check(name, PROMPTS, options, found)
    alone = [[score_continuations(model, [prompt], [[ids]])[0][0] for ids in SHARED] for prompt in PROMPTS]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert len({round(value, 3) for some in found for value in some}) == len(PROMPTS) * len(SHARED)


def test_each_prompt_has_continuations_of_its_own_and_as_many_as_it_likes(name: str, model: TracedModel):
    options = [[[20]], [], [[5, 6], [7, 8, 9], [7, 8, 10], [5]]]
    found = score_continuations(model, PROMPTS, options)
    check(name, PROMPTS, options, found)
    assert found[1] == []


def test_order_and_duplicates_stay(name: str, model: TracedModel):
    options = [SHARED[::-1] + SHARED[:3] + [[5, 6, 8]], [[9, 9], [9, 9], [9]], [[4], [3], [4]]]
    found = score_continuations(model, PROMPTS, options)
    check(name, PROMPTS, options, found)
    assert found[0][7:10] == found[0][6:3:-1]
    assert found[1][0] == found[1][1]
    assert found[2][0] == found[2][2]


def test_continuations_that_differ_in_their_last_token_share_a_pass(model: TracedModel, passes: list[list[Text]]):
    score_continuations(model, PROMPTS, [[[5, 6], [5, 7], [5, 8], [5, 9]]] * len(PROMPTS))
    assert [len(texts) for texts in passes] == [3]
    passes.clear()
    score_continuations(model, PROMPTS, [SHARED] * len(PROMPTS))
    assert [len(texts) for texts in passes] == [3, 3, 3, 3]
    stems = [text.token_ids[text.scored_from :] for texts in passes for text in texts]
    assert stems == [[], [5], [5, 6], [5, 6, 7]] * len(PROMPTS)


def test_without_continuations_nothing_runs(model: TracedModel, passes: list[list[Text]]):
    assert score_continuations(model, PROMPTS, [[], [], []]) == [[], [], []]
    assert passes == []


@cache
def llama() -> TracedModel:
    return traced("llama", sites=("hidden_states",))


@given(
    st.lists(st.lists(st.lists(st.sampled_from([5, 6, 7]), min_size=1, max_size=3), max_size=5), min_size=3, max_size=3)
)
@settings(max_examples=25, deadline=None)
def test_any_continuations_are_scored_as_plain_transformers_does(options: list[list[list[int]]]):
    check("llama", PROMPTS, options, score_continuations(llama(), PROMPTS, options))


@pytest.mark.parametrize("values", [[0.0], [1.0, 2.0, 3.0], [-1000.0, -1001.0], [1000.0, 0.0], [-5.0, float("-inf")]])
def test_softmax(values: list[float]):
    wanted = torch.tensor(values, dtype=torch.float64).softmax(0).numpy()
    found = softmax(values)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, atol=1e-12)


# Ids


def unigram(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that puts no space before a text and splits nowhere: every piece may merge with its neighbours."""
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -2.0 - i / 8) for i, piece in enumerate(pieces))], 0))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("$^"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("joint", ["", " ", "\n"])
@pytest.mark.parametrize("prompt", ["Answer:", "Answer: ", "Answer:\n", "It is sunf", "<|assistant|>", "("])
@pytest.mark.parametrize("name", ["gpt2", "stories260K", "tiny"])
def test_ids_read_after_the_prompt_as_the_text_does(shared: Path, name: str, prompt: str, joint: str):
    tokenizer = {
        "gpt2": lambda: GPT2TokenizerFast.from_pretrained(shared / "tokenizers/gpt2"),
        "stories260K": lambda: AutoTokenizer.from_pretrained(shared / "models/stories260K-hf"),
        "tiny": tiny_tokenizer,
    }[name]()
    base = tokenizer(prompt, add_special_tokens=False).input_ids
    texts = ["B", "lower", "new york", "a b", "été", "10 %", ": no"]
    for text, ids in zip(texts, continuation_ids(tokenizer, prompt, joint, texts), strict=True):
        assert tokenizer.decode(base + ids) == prompt + joint + text
        whole = tokenizer(prompt + joint + text, add_special_tokens=False).input_ids
        if whole[: len(base)] == base:
            assert base + ids == whole


def test_a_word_that_a_tokenizer_puts_a_space_before_is_cut_off_from_a_sign(shared: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K-hf")
    prompt = "Answer: "
    alone = tokenizer("Ben", add_special_tokens=False).input_ids
    [ids] = continuation_ids(tokenizer, prompt, "", ["Ben"])
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "B"


def test_a_text_that_no_ids_give_after_this_prompt_is_refused():
    tokenizer = unigram(["x", "A", "xB"])
    with pytest.raises(
        ConfigError, match=r"no tokens for 'B' after a prompt that ends in 'x': it merges the two, .*use another tokeni"
    ):
        continuation_ids(tokenizer, "x", "", ["A", "B"])
