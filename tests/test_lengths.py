"""Length rules: a row has the values and the text that it has alone in a model that was just loaded, whatever runs
beside it and whatever ran before it."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice

from tests import every_architecture
from tests.architecture_checks import relative
from tests.tiny_checkpoint import tiny_tokenizer
from tests.tiny_configs import VOCAB_SIZE, tiny_config
from tests.tiny_models import model_info
from tracekit.config import CaptureConfig, DrawConfig, GenerationConfig, ModelConfig
from tracekit.errors import CaptureError, ModelError
from tracekit.model.capture import Text, capture
from tracekit.model.choices import Choices, capture_choices
from tracekit.model.continuations import score_continuations
from tracekit.model.generation import (
    Decoding,
    Listener,
    answer_once,
    answer_variously,
    find_padding_rule,
)
from tracekit.model.lengths import groups_within, length_limit
from tracekit.model.models import _clean_generation_config, load_model, load_tokenizer
from tracekit.model.models import model_info as model_info_of
from tracekit.model.proof import prove, replay
from tracekit.model.traced import TracedModel
from tracekit.tensors import unpack_causal

LIMIT = 16
HALF_HEAD = 4
NUM_NEW = 8
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0] * HALF_HEAD,
    "long_factor": [4.0] * HALF_HEAD,
    "factor": 4.0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": LIMIT}
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}


class Rule(NamedTuple):
    """A model whose configuration has a length rule, or has none."""

    model_type: str
    settings: dict[str, Any]
    limit: int | None = LIMIT


RULES = {
    "phi3 longrope": Rule("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": LIMIT}),
    "phimoe longrope": Rule("phimoe", {"rope_parameters": _LONG | {"short_mscale": 1.0, "long_mscale": 1.2}}),
    "llama dynamic": Rule("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": LIMIT}),
    "qwen2 dynamic": Rule("qwen2", {"rope_parameters": _DYNAMIC, "max_position_embeddings": LIMIT}),
    "one of two layer types": Rule(
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _PLAIN},
            "max_position_embeddings": LIMIT,
        },
    ),
    "two rules in a model": Rule(
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _LONG},
            "max_position_embeddings": LIMIT + 8,
        },
    ),
    "doge keeps a window": Rule("doge", {"keep_window_size": LIMIT}),
    "llama yarn": Rule("llama", {"rope_parameters": _YARN}, None),
    "mistral default": Rule("mistral", {}, None),
}
BATCHES = [(17, 16, 15), (5, 40, 16, 23), (3, 9, 12), (33, 20, 20), (17, 1)]


def ids(length: int) -> list[int]:
    return [3 + (11 * length + i * (i + 7)) % (VOCAB_SIZE - 3) for i in range(length)]


_MADE: dict[str, Any] = {}


def made(rule: Rule, attention: str | None = None, *, auto: Any = AutoModelForCausalLM) -> Any:
    """A random model that has run nothing; the same weights whatever its attention."""
    key = repr((rule, attention))
    if key not in _MADE:
        _MADE[key] = _made(rule, attention, auto)
    return copy.deepcopy(_MADE[key])


def _made(rule: Rule, attention: str | None, auto: Any) -> Any:
    config: Any = tiny_config(rule.model_type, **copy.deepcopy(rule.settings))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = auto.from_config(config, attn_implementation=attention).eval()
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * 0.3
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    if auto is AutoModelForCausalLM:
        _clean_generation_config(model, None)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def proven(rule: Rule, sites: Sequence[str] = ("hidden_states", "attentions")) -> TracedModel:
    traced = TracedModel(made(rule), None, model_info(rule.model_type))
    prove(traced, sites)
    return traced


def plain(rule: Rule, token_ids: list[int]) -> Any:
    """A text alone in transformers' eager mode, in a model that has run nothing before."""
    with torch.inference_mode():
        return made(rule, "eager")(
            input_ids=torch.tensor([token_ids]), output_hidden_states=True, output_attentions=True, use_cache=False
        )


def check_capture(traced: TracedModel, rule: Rule, lengths: Sequence[int]) -> None:
    config = CaptureConfig(sites=("hidden_states", "attentions"))
    texts = [Text(ids(length), max(1, length - 3)) for length in lengths]
    for text, trace in zip(texts, capture(traced, texts, config), strict=True):
        length, alone = len(text.token_ids), plain(rule, text.token_ids)
        hidden = torch.stack(alone.hidden_states)[:, 0].numpy()
        np.testing.assert_allclose(trace.tensors["hidden_states"], hidden, rtol=0, atol=2e-4 * abs(hidden).max())
        attention = unpack_causal(trace.tensors["attentions"], np.arange(length), length)
        np.testing.assert_allclose(attention, torch.stack(alone.attentions)[:, 0].numpy(), rtol=0, atol=2e-4)
        logprobs = alone.logits[0, text.scored.start : -1].log_softmax(-1)
        wanted = logprobs.gather(1, torch.tensor(text.token_ids[text.scored.start + 1 :])[:, None])[:, 0].numpy()
        np.testing.assert_allclose(trace.next_tokens.logprobs, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_a_batch_on_both_sides_of_the_limit_is_captured_as_each_text_alone(name: str):
    traced = proven(RULES[name])
    assert traced.length_limit == RULES[name].limit
    assert not traced.is_row_coupled
    for lengths in BATCHES:  # by one model: a long pass must not change a later one
        check_capture(traced, RULES[name], lengths)


def test_texts_that_bigbird_computes_with_sparse_attention_are_refused():
    """Its first short text makes its attention full for good: what a long one gives depends on what ran before."""
    traced = proven(Rule("big_bird", {"is_decoder": True}, None), ("hidden_states",))
    config = CaptureConfig(sites=("hidden_states",))
    assert len(capture(traced, [Text(ids(44), 40), Text(ids(9), 6)], config)) == 2
    with pytest.raises(CaptureError, match=r"a text of 45 tokens; .* up to 44 tokens"):
        capture(traced, [Text(ids(45), 40), Text(ids(9), 6)], config)


@hypothesis_settings(max_examples=6, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(1, 3 * LIMIT), min_size=1, max_size=4), min_size=1, max_size=3),
    name=st.sampled_from(["phi3 longrope", "llama dynamic", "two rules in a model"]),
)
def test_any_batches_one_after_the_other(batches: list[list[int]], name: str):
    traced = proven(RULES[name])
    for lengths in batches:
        check_capture(traced, RULES[name], lengths)


def test_a_batch_that_ran_together_past_its_limit_is_noticed():
    """What this is about: without the rule the short row has other values, and a replay says so."""
    rule = RULES["phi3 longrope"]
    traced = proven(rule)
    traced.length_limit = None
    texts, config = [Text(ids(30), 20), Text(ids(9), 6)], CaptureConfig(sites=("hidden_states",))
    trace = capture(traced, texts, config)[1]
    with pytest.raises(CaptureError, match="differs from a lone eager run"):
        replay(traced, "000001", texts[1], trace, config)


def test_a_model_that_has_run_long_texts_before_it_was_traced_gives_the_same():
    rule = RULES["llama dynamic"]
    model = made(rule)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids(60)]))
    traced = TracedModel(model, None, model_info("llama"))
    prove(traced, ("hidden_states", "attentions"))
    check_capture(traced, rule, (12, 20))


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_the_model_itself_still_runs_outside_of_a_capture(name: str):
    traced = proven(RULES[name])
    check_capture(traced, RULES[name], (12, 20))
    output = traced.model(input_ids=torch.tensor([ids(20)]), use_cache=False).logits
    output.sum().backward()
    torch.testing.assert_close(output, plain(RULES[name], ids(20)).logits, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- what runs together


@pytest.mark.parametrize(
    ("lengths", "limit", "groups"),
    [
        ((3, 900, 5), None, [[0, 1, 2]]),
        ((3, 16, 17, 5, 40), 16, [[0, 1, 3], [2], [4]]),
        ((17, 40), 16, [[0], [1]]),
        ((3, 5), 0, [[0], [1]]),
    ],
)
def test_rows_within_the_limit_run_together_and_each_longer_one_alone(
    lengths: Sequence[int], limit: int | None, groups: list[list[int]]
):
    assert groups_within(lengths, limit) == groups


@pytest.mark.parametrize("name", RULES)
def test_no_more_passes_are_made_than_the_rule_needs(name: str):
    rule = RULES[name]
    traced = proven(rule, ("hidden_states",))
    sizes: list[int] = []
    traced.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    texts = [Text(ids(length), length) for length in (5, 30, 7, 40)]
    capture(traced, texts, CaptureConfig(sites=("hidden_states",)))
    assert sizes == ([4] if rule.limit is None else [2, 1, 1])


def test_rope_types_of_old_configurations_are_known():
    for name in ("type", "rope_type"):
        config: Any = tiny_config("llama")
        config.rope_parameters = {name: "dynamic", "factor": 2.0}
        assert length_limit(config) == config.max_position_embeddings


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
@pytest.mark.parametrize("changes_from", [0, LIMIT])
def test_a_rule_that_the_configuration_does_not_tell_is_measured(model_type: str, changes_from: int):
    """A rotary module of somebody's own, which scales by the last position of the batch."""
    rule = Rule(model_type, {}, None)
    model = made(rule)
    (rotary,) = [m for m in model.modules() if "RotaryEmbedding" in type(m).__name__]
    own = rotary.forward

    def forward(x: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cos, sin = own(x, position_ids, *args, **kwargs)
        scale = 1 + max(0, int(position_ids.max()) - changes_from) / 100
        return cos * scale, sin * scale

    rotary.forward = forward
    fresh = copy.deepcopy(model)
    traced = TracedModel(model, None, model_info(model_type))
    prove(traced, ("hidden_states",))
    assert traced.length_limit == 0
    texts = [Text(ids(length), length) for length in (30, 9)]
    for text, trace in zip(texts, capture(traced, texts, CaptureConfig(sites=("hidden_states",))), strict=True):
        with torch.inference_mode():
            alone = fresh(input_ids=torch.tensor([text.token_ids]), output_hidden_states=True, use_cache=False)
        np.testing.assert_allclose(trace.tensors["hidden_states"][-1], alone.hidden_states[-1][0], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- answers


PROMPT_LENGTHS = (2 * LIMIT, LIMIT - NUM_NEW, 3, LIMIT - 2, LIMIT + 1)


def lone_answer(rule: Rule, prompt: list[int], **arguments: Any) -> list[int]:
    """Plain `generate` of one prompt, in a model that has run nothing before."""
    row = torch.tensor([prompt])
    with torch.inference_mode():
        made_ids = made(rule).generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=NUM_NEW, do_sample=False, **arguments
        )
    return made_ids[0, len(prompt) :].tolist()


Answer = Callable[[TracedModel, list[list[int]]], list[list[int]]]


def _variously(traced: TracedModel, prompts: list[list[int]]) -> list[list[int]]:
    heard: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
    ended: dict[int, list[int]] = {}
    listener = Listener(
        lambda row, step: bool(heard[row].append(step.token_id)),
        lambda row, answer: ended.update({row: answer.token_ids}),
    )
    answers = answer_variously(traced, prompts, [Decoding(NUM_NEW - row % 3) for row in range(len(prompts))], listener)
    assert heard == ended == {row: answer.token_ids for row, answer in enumerate(answers)}
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_answers_are_those_of_lone_plain_generation(name: str, num_beams: int):
    rule = RULES[name]
    traced = proven(rule, ())
    prompts = [ids(length) for length in PROMPT_LENGTHS]
    config = GenerationConfig(num_beams=num_beams, max_new_tokens=NUM_NEW)
    answers = answer_once(traced, prompts, config)
    assert [a.token_ids for a in answers] == [lone_answer(rule, p, num_beams=num_beams) for p in prompts]


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic", "llama yarn"])
def test_answers_of_the_server_are_those_of_lone_plain_generation(name: str):
    rule = RULES[name]
    prompts = [ids(length) for length in PROMPT_LENGTHS]
    for row, tokens in enumerate(_variously(proven(rule, ()), prompts)):
        assert tokens == lone_answer(rule, prompts[row])[: NUM_NEW - row % 3]


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_drawn_answers_do_not_depend_on_their_batch(name: str):
    traced = proven(RULES[name], ())
    prompts, config = [ids(length) for length in PROMPT_LENGTHS], DrawConfig(num_beams=1, max_new_tokens=NUM_NEW)
    seeds = [f"seed {row}" for row in range(len(prompts))]
    together = answer_once(traced, prompts, config, seeds)
    alone = [answer_once(proven(RULES[name], ()), [p], config, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone


def test_scores_of_continuations_are_those_of_lone_passes():
    rule = RULES["phi3 longrope"]
    prompts = [ids(length) for length in (5, LIMIT - 2, LIMIT + 3)]
    options = [[[7], [8, 9, 10, 11]]] * len(prompts)
    for prompt, scores in zip(prompts, score_continuations(proven(rule, ()), prompts, options), strict=True):
        for option, score in zip(options[0], scores, strict=True):
            logprobs = plain(rule, [*prompt, *option]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert score == pytest.approx(logprobs.gather(1, torch.tensor(option)[:, None]).sum().item(), abs=2e-3)


def test_options_of_an_encoder_are_those_of_lone_passes():
    settings = {"rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _PLAIN}}
    rule = Rule("modernbert", {**settings, "max_position_embeddings": LIMIT, "global_attn_every_n_layers": 2})
    model = made(rule, auto=AutoModelForMultipleChoice)
    fresh = copy.deepcopy(model)
    traced = TracedModel(model, None, model_info("modernbert"), head="choices")
    prove(traced, ("hidden_states",))
    items = [Choices([Text(ids(n), n) for n in lengths]) for lengths in ((5, 30, 12), (17, 16))]
    for item, trace in zip(items, capture_choices(traced, items, CaptureConfig(sites=("hidden_states",))), strict=True):
        for number, text in enumerate(item.texts):
            with torch.inference_mode():
                alone = copy.deepcopy(fresh)(input_ids=torch.tensor([[text.token_ids]]), output_hidden_states=True)
            start, stop = item.offsets[number : number + 2]
            hidden = torch.stack(alone.hidden_states)[:, 0].numpy()
            np.testing.assert_allclose(trace.tensors["hidden_states"][:, start:stop], hidden, rtol=0, atol=1e-4)
            assert trace.logits[number] == pytest.approx(alone.logits[0, 0].item(), abs=1e-4)


# ---------------------------------------------------------------- every architecture


def _rope_of(rope: dict[str, Any], config: Any, kind: str) -> dict[str, Any]:
    """Rotary parameters with a length rule, of as many frequencies as there were."""
    size = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "short_mscale": 1.0, "long_mscale": 1.2}
    return rope | (_DYNAMIC if kind == "dynamic" else _LONG | factors)


def _with_rule(model_type: str, kind: str) -> Any:
    """A tiny configuration with a length rule in every type of layer; None where it cannot have one."""
    whole: Any = tiny_config(model_type)
    config = whole.get_text_config()
    ropes = getattr(config, "rope_parameters", None)
    if not ropes:
        return None
    nested = [name for name, part in ropes.items() if isinstance(part, dict)]
    rules = {name: _rope_of(ropes[name], config, kind) for name in nested} if nested else _rope_of(ropes, config, kind)
    config.rope_parameters = rules
    config.max_position_embeddings = LIMIT if kind == "dynamic" else 8 * LIMIT
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = LIMIT
    return whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_rules_of_every_architecture(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Each class that transformers itself can run with such a rule, in a batch on both sides of the limit."""
    num_compared = 0
    for case in every_architecture.CASES.values():
        try:
            config = _with_rule(case.model_type, kind)
            if config is None or case.name in every_architecture.NO_TEXT:
                continue
            monkeypatch.setattr(every_architecture, "tiny_config", lambda model_type, config=config: config)
            model = every_architecture.build(case)
            fresh = copy.deepcopy(model)
            fresh.set_attn_implementation("eager")
            rows = [ids(length) for length in (40, 7, 13, 17, 16)]
            alone = [_hidden_alone(case, copy.deepcopy(fresh), row) for row in rows]
        except every_architecture._BUILD_ERRORS:  # transformers has no such rule for it
            continue
        traced = every_architecture._traced(case, model)
        try:
            prove(traced, ("hidden_states",))
        except ModelError:
            continue
        assert traced.length_limit == LIMIT, case.name
        texts = [Text(row, len(row) - 2) for row in rows]
        captured = every_architecture._captured(case, traced, texts, CaptureConfig(sites=("hidden_states",)))
        for mine, theirs in zip(captured, alone, strict=True):
            errors = [relative(mine["hidden_states"][layer], hidden) for layer, hidden in enumerate(theirs)]
            assert max(errors) <= 1e-4, case.name
        num_compared += 1
    assert num_compared >= 90


def _hidden_alone(case: every_architecture.Case, model: Any, row: list[int]) -> list[Any]:
    inputs, without_cache = every_architecture._inputs(case, row), every_architecture._without_cache(case)
    with torch.inference_mode():
        return [hidden[0] for hidden in model(**inputs, output_hidden_states=True, **without_cache).hidden_states]


# ---------------------------------------------------------------- padding before a prompt

MOVED = ("BartForCausalLM", "GitForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel", "MarianForCausalLM")
"""Classes that count padding as text: they take no positions, or take them in the first pass alone."""


@pytest.mark.parametrize(
    "name", [*MOVED, "GPT2LMHeadModel", "BloomForCausalLM", "LlamaForCausalLM", "MambaForCausalLM"]
)
def test_an_answer_does_not_depend_on_the_length_of_the_prompts_beside_it(name: str):
    model = every_architecture.build(every_architecture.CASES[name])
    _clean_generation_config(model, None)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    traced = TracedModel(model, None, model_info(name))
    find_padding_rule(traced)
    assert traced.is_moved_by_padding == (name in MOVED)
    prompts = [ids(length) for length in (5, 23, 11, 5)]
    config = GenerationConfig(num_beams=1, max_new_tokens=NUM_NEW)
    together = answer_once(traced, prompts, config)
    assert together == [answer_once(traced, [prompt], config)[0] for prompt in prompts]
    if name in MOVED:
        traced.is_moved_by_padding = False
        unfit = answer_once(traced, prompts, config)
        assert unfit != together, "the padding would not have been noticed here"


def test_the_loader_measures_it(tmp_path: Path):
    every_architecture.build(every_architecture.CASES["BartForCausalLM"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(model=str(tmp_path), device="cpu")
    traced = load_model(config, model_info_of(config, variant="base"), load_tokenizer(config), ("hidden_states",))
    assert traced.is_moved_by_padding
