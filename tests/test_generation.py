"""Generation: a batch's answers are those of lone runs, draws follow their softmax, and nothing else is in force."""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig as HFGenerationConfig

from tests.tiny_models import VOCAB_SIZE, few_first, tiny_model, token_ids, traced
from tracekit.config import CaptureConfig, DrawConfig
from tracekit.model.capture import Text, capture
from tracekit.model.generation import (
    Decoding,
    Generated,
    Listener,
    _GumbelNoise,
    answer_once,
    answer_variously,
)
from tracekit.model.models import _clean_generation_config
from tracekit.model.traced import TracedModel

PROMPTS = (token_ids(12), token_ids(5, start=3), token_ids(20, start=9), token_ids(1, start=4))
FAMILIES = ("gpt2", "opt", "opt_post_norm", "llama", "bloom", "falcon", "falcon_alibi", "mistral", "gemma2", "gpt_oss")
NUM_NEW = 12


def settings(**changes: Any) -> DrawConfig:
    return DrawConfig(**{"num_beams": 1, "max_new_tokens": NUM_NEW} | changes)


def lone_run(model: Any, prompt: list[int], num_beams: int) -> Any:
    """Plain transformers: one prompt, no padding."""
    with torch.inference_mode():
        return model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=NUM_NEW,
            return_dict_in_generate=True,
            output_scores=True,
        )


def with_eos(made: Any, eos: Sequence[int], pad: int = 0) -> Any:
    """The same model with other special tokens."""
    model = made.model if isinstance(made, TracedModel) else made
    model.generation_config.eos_token_id = list(eos) or None
    model.generation_config.pad_token_id = pad
    return made


def end_tokens(made: TracedModel, num_beams: int = 1) -> list[int]:
    """Tokens that end some of the answers early where they are end tokens, but not all of them at once."""
    config = settings(num_beams=num_beams)
    answers = answer_once(with_eos(made, []), PROMPTS, config)
    common = Counter(token for answer in answers for token in {*answer.token_ids}).most_common()
    for number in range(1, len(common) + 1):
        tokens = [token for token, _ in common[:number]]
        ended = answer_once(with_eos(made, tokens), PROMPTS, config)
        with_eos(made, [])
        if len({len(answer.token_ids) for answer in ended}) > 1:
            return tokens
    raise AssertionError("no tokens end some of the answers early")


# ---------------------------------------------------------------- greedy and beams


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_answers_of_a_padded_batch_are_those_of_lone_runs(name: str, num_beams: int) -> None:
    model = tiny_model(name)
    answers = answer_once(traced(name, sites=()), PROMPTS, settings(num_beams=num_beams))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.token_ids == lone_run(model, prompt, num_beams).sequences[0, len(prompt) :].tolist()
        assert answer.finish_reason == "length"
        assert not answer.eos_included


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_answers_that_end_early_are_those_of_lone_runs(name: str, num_beams: int) -> None:
    made = traced(name, sites=())
    eos = end_tokens(made, num_beams)
    model = with_eos(tiny_model(name), eos)
    answers = answer_once(with_eos(made, eos), PROMPTS, settings(num_beams=num_beams))
    assert "stop" in {answer.finish_reason for answer in answers}
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.token_ids == lone_run(model, prompt, num_beams).sequences[0, len(prompt) :].tolist()
        assert answer.eos_included == (answer.token_ids[-1] in eos)
        assert not {*eos} & {*answer.token_ids[:-1]}


@pytest.mark.parametrize("ends_early", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bloom", "falcon_alibi"])
def test_captured_logprobs_make_the_scores_of_the_beams(name: str, ends_early: bool) -> None:
    made, model = traced(name, sites=()), tiny_model(name, attention=None)
    if ends_early:
        eos = end_tokens(made, 5)
        with_eos(made, eos)
        with_eos(model, eos)
    answers = answer_once(made, PROMPTS, settings(num_beams=5))
    texts = [Text(prompt + answer.token_ids, len(prompt)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    traces = capture(made, texts, CaptureConfig(sites=("none",)))
    scores = [lone_run(model, prompt, 5).sequences_scores.item() for prompt in PROMPTS]
    np.testing.assert_allclose([trace.next_tokens.logprobs.mean() for trace in traces], scores, atol=1e-4)


def test_beams_find_what_greedy_search_does_not() -> None:
    made = traced("llama", sites=())
    scores = []
    for num_beams in (1, 5):
        answers = answer_once(made, PROMPTS, settings(num_beams=num_beams))
        texts = [Text(prompt + answer.token_ids, len(prompt)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
        scores.append(
            [trace.next_tokens.logprobs.mean() for trace in capture(made, texts, CaptureConfig(sites=("none",)))]
        )
    assert (np.array(scores[1]) >= np.array(scores[0])).all()
    assert scores[0] != scores[1]


def test_greedy_answers_are_what_the_captured_pass_predicts() -> None:
    made = traced("gpt2", sites=())
    answers = answer_once(made, PROMPTS, settings())
    texts = [Text(prompt + answer.token_ids, len(prompt)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    for answer, trace in zip(answers, capture(made, texts, CaptureConfig(sites=("none",))), strict=True):
        assert trace.next_tokens.predicted_ids.tolist() == answer.token_ids


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_of_one(num_beams: int) -> None:
    made = traced("opt", sites=())
    together = answer_once(made, PROMPTS, settings(num_beams=num_beams))
    alone = [answer_once(made, [prompt], settings(num_beams=num_beams))[0] for prompt in PROMPTS]
    assert together == alone


# ---------------------------------------------------------------- where an answer ends


@pytest.mark.parametrize("num_beams", [1, 5])
def test_padding_is_cut_off_though_it_is_the_end_token(num_beams: int) -> None:
    made = traced("llama", sites=())
    eos = end_tokens(made, num_beams)
    answers = [answer_once(with_eos(made, eos, pad), PROMPTS, settings(num_beams=num_beams)) for pad in (0, eos[0])]
    assert answers[0] == answers[1]
    assert len({len(answer.token_ids) for answer in answers[0]}) > 1


def test_the_padding_token_may_stand_in_prompt_and_answer() -> None:
    made = traced("llama", sites=())
    own = answer_once(made, PROMPTS, settings())
    pad = own[0].token_ids[1]
    assert answer_once(with_eos(made, [], pad), PROMPTS, settings()) == own
    pad = PROMPTS[2][0]
    assert answer_once(with_eos(made, [], pad), PROMPTS, settings()) == own


@pytest.mark.parametrize("num_new", [1, 2, 4])
def test_an_end_token_at_the_limit_is_an_end(num_new: int) -> None:
    made = traced("llama", sites=())
    tokens = answer_once(made, PROMPTS[:1], settings(max_new_tokens=num_new))[0].token_ids
    assert len(tokens) == num_new
    first = tokens.index(tokens[-1]) + 1
    answer = answer_once(with_eos(made, [tokens[-1]]), PROMPTS[:1], settings(max_new_tokens=num_new))[0]
    assert answer == Generated(tokens[:first], "stop")


def test_any_of_several_end_tokens_ends_an_answer() -> None:
    made = traced("llama", sites=())
    whole = answer_once(made, PROMPTS, settings())
    ends = [answer.token_ids[3] for answer in whole[:2]]
    for answer, uncut in zip(answer_once(with_eos(made, ends), PROMPTS, settings()), whole, strict=True):
        stop = next((i + 1 for i, token in enumerate(uncut.token_ids) if token in ends), None)
        assert answer == Generated(uncut.token_ids[:stop], "length" if stop is None else "stop")


# ---------------------------------------------------------------- sampling


def seeds(*numbers: int) -> list[str]:
    return [f"41/{number:06d}/1" for number in numbers]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_sampled_answers_do_not_depend_on_the_batch(name: str) -> None:
    made = traced(name, sites=())
    together = answer_once(made, PROMPTS, settings(), seeds(0, 1, 2, 3))
    alone = [answer_once(made, [prompt], settings(), seeds(i))[0] for i, prompt in enumerate(PROMPTS)]
    backwards = answer_once(made, PROMPTS[::-1], settings(), seeds(3, 2, 1, 0))[::-1]
    assert together == alone == backwards


def test_sampled_answers_do_not_depend_on_when_the_others_end() -> None:
    made = traced("llama", sites=())
    whole = answer_once(made, PROMPTS, settings(), seeds(0, 1, 2, 3))
    cut = answer_once(with_eos(made, [whole[1].token_ids[2]]), PROMPTS, settings(), seeds(0, 1, 2, 3))
    assert cut[1].finish_reason == "stop"
    for answer, uncut in zip(cut, whole, strict=True):
        assert answer.token_ids == uncut.token_ids[: len(answer.token_ids)]


def test_sampled_answers_differ_by_seed_and_repeat_with_it() -> None:
    made = traced("llama", sites=())
    first, again, other = (
        answer_once(made, [PROMPTS[0]] * 3, settings(), seeds(*numbers)) for numbers in ((0, 1, 2),) * 2 + ((3, 4, 5),)
    )
    assert first == again
    assert len({tuple(answer.token_ids) for answer in (*first, *other)}) == 6


def test_global_randomness_is_neither_used_nor_moved() -> None:
    made = traced("llama", sites=())
    answers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        answers.append(answer_once(made, PROMPTS, settings(), seeds(0, 1, 2, 3)))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("changes", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}])
def test_what_leaves_one_token_is_greedy_search(changes: dict[str, Any]) -> None:
    made = traced("llama", sites=())
    greedy = answer_once(made, PROMPTS, settings())
    assert answer_once(made, PROMPTS, settings(**changes), seeds(0, 1, 2, 3)) == greedy


def test_the_number_of_beams_is_for_the_deterministic_answer_only() -> None:
    made = traced("llama", sites=())
    one, five = (answer_once(made, PROMPTS, settings(num_beams=n), seeds(0, 1, 2, 3)) for n in (1, 5))
    assert one == five


def misfit(counts: np.ndarray, probs: np.ndarray) -> float:
    """Pearson's chi-square over its degrees of freedom: about 1 where these probabilities were drawn from."""
    expected = counts.sum() * probs
    return float((np.square(counts - expected) / expected).sum() / (len(counts) - 1))


def test_argmax_of_noisy_scores_is_a_draw_from_their_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf]])
    probs = scores.softmax(-1)[0].numpy()
    num_draws = 6000
    over_seeds = _GumbelNoise([f"seed {i}" for i in range(num_draws)])
    one = _GumbelNoise(["seed"])
    ids = torch.zeros((1, 1), dtype=torch.long)
    for draws in (
        over_seeds(ids, scores.expand(num_draws, -1)).argmax(-1),
        torch.cat([one(ids, scores).argmax(-1) for _ in range(num_draws)]),
    ):
        counts = np.bincount(draws.numpy(), minlength=6)
        assert counts[5] == 0
        assert misfit(counts[:5], probs[:5]) < 4
        assert misfit(counts[:5], np.full(5, 0.2)) > 50


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.3}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.7}],
)
def test_the_first_token_is_drawn_as_temperature_top_k_and_top_p_say(changes: dict[str, Any]) -> None:
    made, num_draws = traced("llama", sites=()), 3000
    config = settings(max_new_tokens=1, **changes)
    prompt = PROMPTS[1]
    answers = answer_once(made, [prompt] * num_draws, config, seeds(*range(num_draws)))
    counts = np.bincount([answer.token_ids[0] for answer in answers], minlength=VOCAB_SIZE)
    with torch.inference_mode():
        probs = wanted_distribution(tiny_model("llama")(torch.tensor([prompt])).logits[0, -1], config)
    assert counts[probs == 0].sum() == 0
    kept = probs * num_draws >= 5
    counts = np.append(counts[kept], counts[~kept].sum())
    probs = np.append(probs[kept], probs[~kept].sum())
    present = probs > 0
    assert misfit(counts[present], probs[present]) < 2


def wanted_distribution(logits: Tensor, config: DrawConfig) -> np.ndarray:
    """Softmax at a temperature, cut to the k most likely, then to the fewest that hold the nucleus' mass."""
    probs = (logits.double() / config.temperature).softmax(-1).numpy()
    order = np.argsort(-probs)
    if config.top_k:
        probs[order[config.top_k :]] = 0
        probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= config.top_p]] = 0
    return probs / probs.sum()


# ---------------------------------------------------------------- the checkpoint's own defaults

DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 2,
    "num_beams": 3,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 3,
    "length_penalty": 4.0,
    "suppress_tokens": list(range(40)),
    "max_length": 14,
    "bos_token_id": 1,
    "pad_token_id": 7,
}


@pytest.mark.parametrize("num_beams", [1, 5])
def test_generation_defaults_of_a_checkpoint_are_ignored(num_beams: int) -> None:
    plain, other = traced("llama", sites=()), traced("llama", sites=())
    eos = end_tokens(plain, num_beams)
    other.model.generation_config = HFGenerationConfig(**DEFAULTS, eos_token_id=eos)
    _clean_generation_config(other.model, None)
    assert other.model.generation_config.to_diff_dict().keys() - {"transformers_version"} == {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
    config = settings(num_beams=num_beams)
    assert answer_once(other, PROMPTS, config) == answer_once(with_eos(plain, eos), PROMPTS, config)
    assert answer_once(other, PROMPTS, config, seeds(0, 1, 2, 3)) == answer_once(
        plain, PROMPTS, config, seeds(0, 1, 2, 3)
    )


@pytest.mark.parametrize(
    ("own", "tokenizers_eos", "eos", "pad"),
    [
        ({"eos_token_id": 5}, None, [5], 5),
        ({"eos_token_id": 5}, 5, [5], 5),
        ({"eos_token_id": 5}, 2, [2, 5], 2),
        ({"eos_token_id": [9, 5]}, 7, [5, 7, 9], 5),
        ({"eos_token_id": [9, 5], "pad_token_id": 3}, None, [5, 9], 3),
        ({"eos_token_id": 5, "pad_token_id": 0}, None, [5], 0),
        ({}, 4, [4], 4),
        ({}, None, None, 0),
    ],
)
def test_special_tokens_are_those_of_checkpoint_and_tokenizer(
    own: dict[str, Any], tokenizers_eos: int | None, eos: list[int] | None, pad: int
) -> None:
    table = SimpleNamespace(weight=torch.empty(8, 1))
    config = HFGenerationConfig(**own, bos_token_id=1)
    model = SimpleNamespace(generation_config=config, get_input_embeddings=lambda: table)
    _clean_generation_config(model, SimpleNamespace(eos_token_id=tokenizers_eos))
    cleaned = model.generation_config
    assert (cleaned.bos_token_id, cleaned.eos_token_id, cleaned.pad_token_id) == (1, eos, pad)


def test_a_model_without_end_token_runs_to_the_limit() -> None:
    made = traced("gpt2", sites=())
    assert made.model.generation_config.eos_token_id is None
    answers = answer_once(made, PROMPTS, settings(max_new_tokens=40))
    assert [len(answer.token_ids) for answer in answers] == [40] * 4
    assert {answer.finish_reason for answer in answers} == {"length"}


# ---------------------------------------------------------------- rows of their own


def heard(made: TracedModel, decodings: Sequence[Decoding], stop_after: int | None = None) -> tuple[Any, Any, Any]:
    """Answers, the steps of each row, and what was told at each row's end."""
    steps: list[list[Any]] = [[] for _ in decodings]
    ends: dict[int, Generated] = {}

    def step(row: int, made: Any) -> bool:
        assert row not in ends, "a row that has ended goes on"
        steps[row].append(made)
        return stop_after is not None and len(steps[row]) == stop_after

    answers = answer_variously(made, PROMPTS, decodings, Listener(step, lambda row, answer: ends.update({row: answer})))
    return answers, steps, [ends[row] for row in range(len(decodings))]


def test_rows_of_one_batch_are_decoded_each_in_its_own_way() -> None:
    made = traced("llama", sites=())
    hot = {"temperature": 0.8, "top_p": 0.9, "top_k": 20}
    decodings = [
        Decoding(NUM_NEW),
        Decoding(NUM_NEW, **hot, seed="a"),
        Decoding(3),
        Decoding(NUM_NEW, temperature=1.5, seed="b"),
    ]
    answers, steps, ends = heard(made, decodings)
    greedy = answer_once(made, PROMPTS, settings())
    drawn = answer_once(made, PROMPTS, settings(**hot), ["a"] * 4)
    hotter = answer_once(made, PROMPTS, settings(temperature=1.5), ["b"] * 4)
    assert answers == [greedy[0], drawn[1], Generated(greedy[2].token_ids[:3], "length"), hotter[3]]
    assert ends == answers
    assert [[one.token_id for one in row] for row in steps] == [answer.token_ids for answer in answers]


def test_a_row_ends_with_its_own_end_of_sequence_which_is_no_step() -> None:
    made = traced("llama", sites=())
    eos = end_tokens(made)
    answers, steps, _ = heard(with_eos(made, eos), [Decoding(NUM_NEW)] * 4)
    assert answers == answer_once(made, PROMPTS, settings())
    with_eos(made, [])
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer, row in zip(answers, steps, strict=True):
        assert len(row) == len(answer.token_ids) - answer.eos_included


def test_a_listener_ends_rows() -> None:
    made = traced("llama", sites=())
    answers, _, _ = heard(made, [Decoding(NUM_NEW)] * 4, stop_after=2)
    greedy = answer_once(made, PROMPTS, settings())
    assert answers == [Generated(answer.token_ids[:2], "length") for answer in greedy]


def test_steps_tell_the_raw_models_log_probabilities_where_they_are_asked_for() -> None:
    made = traced("llama", sites=())
    decodings = [Decoding(4, num_best=2), Decoding(4, temperature=0.5, seed="x", num_best=0), Decoding(4), Decoding(4)]
    answers, steps, _ = heard(made, decodings)
    texts = [Text(prompt + answer.token_ids, len(prompt)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    traces = capture(made, texts, CaptureConfig(sites=("none",)), num_best=2)
    for row in (0, 1):
        np.testing.assert_allclose([one.logprob for one in steps[row]], traces[row].next_tokens.logprobs, atol=1e-5)
    assert [[token for token, _ in one.best] for one in steps[0]] == traces[0].next_tokens.best_ids.tolist()
    assert {one.logprob for row in steps[2:] for one in row} == {None}
