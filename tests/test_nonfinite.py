"""Values that are not finite: refused by default; where they are allowed, kept as plain transformers gives them."""

import math
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny_models import proven, sites_of, tiny_model, token_ids, traced
from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, DtypeOverflowError, ModelError
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.hooks import own_eager_attention
from tracekit.model.proof import Scored, _compare, replay, replay_scored
from tracekit.model.traced import TracedModel
from tracekit.model.values import FINITE, ValuePolicy
from tracekit.tensors import unpack_causal

TEXTS = (Text(token_ids(20), 12), Text(token_ids(9, start=5), 4), Text(token_ids(31, start=7), 30))
FAMILIES = ("llama", "gpt2", "gpt_neox", "bloom", "gemma2", "gpt_oss")
ALL_SITES = CaptureConfig(sites=("all",))
DAMAGED = ValuePolicy(may_be_nonfinite=True)
OVERFLOWING = ValuePolicy(may_be_nonfinite=True, may_overflow=True)


def spoil(model: Any, name: str, value: float) -> Any:
    """One weight of the middle block's MLP, and so one feature of the stream from there on."""
    path = {
        "llama": "model.layers.1.mlp.down_proj.weight",
        "gpt2": "transformer.h.1.mlp.c_proj.weight",
        "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h.weight",
        "bloom": "transformer.h.1.mlp.dense_4h_to_h.weight",
        "gemma2": "model.layers.1.mlp.down_proj.weight",
        "gpt_oss": "model.layers.1.mlp.experts.down_proj",
    }[name]
    with torch.no_grad():
        weight = dict(model.named_parameters())[path]
        weight.view(-1)[77] = value
    return model


def made(name: str, value: float) -> TracedModel:
    """Proven while it was whole."""
    ready = traced(name)
    spoil(ready.model, name, value)
    return ready


def spoilt_token(value: float, token: int) -> TracedModel:
    """Only texts with the token have it."""
    ready = traced("llama")
    with torch.no_grad():
        ready.model.model.embed_tokens.weight[token] = value
    return ready


@cache
def captured(name: str, value: float) -> list[Trace]:
    return capture(made(name, value), TEXTS, CaptureConfig(sites=sites_of(name)), policy=DAMAGED)


def plain(model: Any, text: Text) -> Any:
    with torch.no_grad():
        return model(torch.tensor([text.token_ids]), output_hidden_states=True, output_attentions=True, use_cache=False)


def same(mine: np.ndarray, reference: Tensor) -> None:
    np.testing.assert_allclose(mine, reference.numpy(), atol=1e-5, rtol=1e-4, equal_nan=True)


# ---------------------------------------------------------------- capture


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_default(name: str, value: float) -> None:
    with pytest.raises(CaptureError, match="not finite"):
        capture(made(name, value), TEXTS, CaptureConfig(sites=sites_of(name)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_where_it_is_allowed_it_is_what_plain_transformers_gives(name: str, value: float) -> None:
    model = spoil(tiny_model(name), name, value)
    for text, trace in zip(TEXTS, captured(name, value), strict=True):
        reference = plain(model, text)
        hidden = torch.stack(reference.hidden_states)[:, 0]
        assert not hidden.isfinite().all()
        assert hidden[:2].isfinite().all()
        same(trace.tensors["hidden_states"], hidden)
        probs = torch.stack(reference.attentions)[:, 0]
        spec = next(spec for spec in trace.specs if spec.name == "attentions")
        length = len(text.token_ids)
        same(unpack_causal(trace.tensors["attentions"], np.arange(length), spec.num_keys), probs.tril())
        logprobs = reference.logits[0].float().log_softmax(-1)[text.scored.start : text.scored.stop]
        same(
            trace.next_tokens.logprobs,
            logprobs.gather(1, torch.tensor(text.token_ids[text.prompt_length :])[:, None])[:, 0],
        )
        same(trace.next_tokens.entropies, torch.special.entr(logprobs.exp()).sum(-1))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_before_the_damage_is_as_it_was(name: str) -> None:
    whole = capture(traced(name), TEXTS, CaptureConfig(sites=sites_of(name)))
    for trace, other in zip(captured(name, math.nan), whole, strict=True):
        for site in ("queries", "keys", "values"):
            np.testing.assert_allclose(trace.tensors[site][:2], other.tensors[site][:2], atol=1e-5)
            assert np.isnan(trace.tensors[site][2]).any()


def test_a_finite_model_gives_the_same_where_it_is_allowed() -> None:
    ready = traced("llama")
    whole = capture(ready, TEXTS, ALL_SITES, num_best=3)
    for mine, other in zip(capture(ready, TEXTS, ALL_SITES, num_best=3, policy=DAMAGED), whole, strict=True):
        assert mine.specs == other.specs
        for site, tensor in mine.tensors.items():
            np.testing.assert_array_equal(tensor, other.tensors[site])
        np.testing.assert_array_equal(mine.next_tokens.best_logprobs, other.next_tokens.best_logprobs)


@pytest.mark.parametrize("sites", [("all",), ("hidden",), ("qkv",), ("none",)])
@pytest.mark.parametrize("token", [0, TEXTS[1].token_ids[3]])
def test_neither_padding_nor_other_texts_of_a_batch_spoil_a_text(token: int, sites: tuple[str, ...]) -> None:
    """Padding is token 0: a lone text has none of it."""
    ready = spoilt_token(math.inf, token)
    config = CaptureConfig(sites=sites)
    together = capture(ready, TEXTS, config, policy=DAMAGED)
    for text, trace in zip(TEXTS, together, strict=True):
        alone = capture(ready, [text], config, policy=DAMAGED)[0]
        assert np.isfinite(trace.next_tokens.logprobs).all() == (token not in text.token_ids)
        np.testing.assert_allclose(trace.next_tokens.logprobs, alone.next_tokens.logprobs, atol=1e-5)
        for site, tensor in trace.tensors.items():
            np.testing.assert_allclose(tensor, alone.tensors[site], atol=1e-5)


def test_the_attention_implementation_is_put_back() -> None:
    ready = made("llama", math.nan)
    assert ready.model.config._attn_implementation == "sdpa"
    capture(ready, TEXTS, ALL_SITES, policy=DAMAGED)
    assert ready.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("sites", [("hidden",), ("topk",), ("none",)])
def test_logits_that_are_not_finite_come_out_as_they_are(sites: tuple[str, ...]) -> None:
    ready = traced("llama")
    with torch.no_grad():
        ready.model.lm_head.weight[11] = torch.nan
    text = TEXTS[0]._replace(asked_ids=(11, 12))
    trace = capture(ready, [text], CaptureConfig(sites=sites), policy=DAMAGED, num_best=2)[0]
    for numbers in (
        trace.next_tokens.logprobs,
        trace.next_tokens.entropies,
        trace.next_tokens.best_logprobs,
        trace.next_tokens.asked_logprobs,
    ):
        assert len(numbers)
        assert np.isnan(numbers).all()
    assert np.isnan(trace.next_tokens.asked_logits).tolist() == [True, False]
    assert "hidden_states" not in trace.tensors or np.isfinite(trace.tensors["hidden_states"]).all()


def test_finite_values_still_have_to_fit_what_they_are_stored_in() -> None:
    ready = loud()
    spoil(ready.model, "llama", math.nan)
    config = CaptureConfig(sites=("resid_post_mlp",), store_dtype="float16")
    with pytest.raises(DtypeOverflowError, match=r"^resid_post_mlp, layer 0: .* does not fit torch\.float16"):
        capture(ready, TEXTS, config, policy=DAMAGED)


def loud(scale: float = 1e8) -> TracedModel:
    """A model with a feature that float16 does not reach, in its first block."""
    ready = traced("llama")
    with torch.no_grad():
        ready.model.model.layers[0].mlp.down_proj.weight[3].mul_(scale)
    return ready


@pytest.mark.parametrize("is_spoilt", [False, True])
def test_where_overflow_is_allowed_it_is_inf_and_counted(is_spoilt: bool) -> None:
    config = CaptureConfig(sites=("resid_post_mlp", "hidden_states"), store_dtype="float16")
    ready = loud()
    if is_spoilt:
        spoil(ready.model, "llama", math.nan)
    whole = capture(ready, TEXTS, msgspec.structs.replace(config, store_dtype="same"), policy=DAMAGED)
    traces = capture(ready, TEXTS, config, policy=OVERFLOWING)
    for trace, wide in zip(traces, whole, strict=True):
        num_beyond = 0
        for name, stored in trace.tensors.items():
            with np.errstate(over="ignore"):
                expected = wide.tensors[name].astype(np.float16)
            is_beyond = np.isinf(stored) & np.isfinite(wide.tensors[name])
            num_beyond += int(is_beyond.sum())
            np.testing.assert_array_equal(stored, expected)
        assert trace.num_overflowed == num_beyond > 0
        assert wide.num_overflowed == 0


def test_what_overflows_alike_is_replayed_and_what_does_not_is_seen() -> None:
    config = CaptureConfig(sites=("resid_post_mlp", "hidden_states"), store_dtype="float16")
    ready = loud()
    trace = capture(ready, TEXTS, config, policy=OVERFLOWING)[0]
    assert replay(ready, "000001", TEXTS[0], trace, config).num_replayed == 1
    stored = trace.tensors["hidden_states"]
    stored[np.isinf(stored)] *= -1
    with pytest.raises(CaptureError, match="hidden_states differs from a lone eager run by inf"):
        replay(ready, "000001", TEXTS[0], trace, config)


def test_a_value_at_the_limit_may_be_on_either_side_of_it() -> None:
    near, over = np.array([1.0, 65500.0], np.float16), np.array([1.0, np.inf], np.float16)
    far = np.array([1.0, 60000.0], np.float16)
    for a, b in ((near, over), (over, near), (over, np.array([1.0, 7e9]))):
        assert _compare("x", a, b, 1e-2, allow_nonfinite=True).max_rel_error == 0
    assert _compare("x", over, far, 1e-2, allow_nonfinite=True).max_rel_error == math.inf


def test_values_that_are_not_finite_are_stored_in_another_dtype() -> None:
    config = CaptureConfig(sites=("resid_post_mlp",), store_dtype="float16")
    trace = capture(made("llama", -math.inf), TEXTS, config, policy=DAMAGED)[0]
    stored = trace.tensors["resid_post_mlp"]
    assert stored.dtype == np.float16
    same(np.isfinite(stored), torch.from_numpy(np.isfinite(captured("llama", -math.inf)[0].tensors["resid_post_mlp"])))


def with_a_spoilt_row(change: Any) -> Any:
    """Attention whose fourth row is NaN in the first head, and the rest changed."""

    def altered(module: Any) -> Any:
        own = own_eager_attention(module)

        def function(*args: Any, **kwargs: Any) -> Any:
            output, probs = own(*args, **kwargs)
            changed = change(probs).clone()
            changed[:, 0, 3] = torch.nan
            return output, changed

        return function

    return altered


def test_a_row_that_is_not_finite_is_kept_among_finite_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = traced("llama")
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", with_a_spoilt_row(lambda probs: probs))
    trace = capture(ready, TEXTS, CaptureConfig(sites=("attn",)), policy=DAMAGED)[0]
    probs = unpack_causal(trace.tensors["attentions"], np.arange(20), 20)
    assert np.argwhere(np.isnan(probs).any(-1))[:, 1:].tolist() == [[0, 3]] * 3


def test_a_long_text_is_as_in_plain_transformers_whatever_blocks_a_kernel_skips() -> None:
    text = Text(token_ids(1200), 100)
    last = text.token_ids[-1]
    text = text._replace(token_ids=[token if token != last else last - 1 for token in text.token_ids[:-1]] + [last])
    ready = spoilt_token(math.inf, last)
    trace = capture(ready, [text], CaptureConfig(sites=("hidden",), tokens="last"), policy=DAMAGED)[0]
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[last] = math.inf
    hidden = torch.stack(plain(model, text).hidden_states)[:, 0, 99:100]
    same(trace.tensors["hidden_states"], hidden)
    assert not hidden.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda probs: probs * 0.9, r"^attentions, layer 0: rows sum to 0\.9"),
        (lambda probs: probs.flip(-1), r"^attentions, layer 0: a causal model attends to the future, or to padding$"),
    ],
)
def test_rows_that_are_finite_are_still_checked(change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = traced("llama")
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", with_a_spoilt_row(change))
    with pytest.raises(CaptureError, match=message):
        capture(ready, TEXTS, CaptureConfig(sites=("attn",)), policy=DAMAGED)


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_replay_agrees(name: str, value: float) -> None:
    ready = made(name, value)
    config = CaptureConfig(sites=sites_of(name))
    for text, trace in zip(TEXTS, captured(name, value), strict=True):
        result = replay(ready, "000001", text, trace, config)
        assert result.num_replayed == 1
        assert all(math.isfinite(error.max_abs_error) for error in result.sites)


def test_a_replay_refuses_it_by_default() -> None:
    trace = captured("llama", math.nan)[0]._replace(policy=FINITE)
    with pytest.raises(CaptureError, match="not finite"):
        replay(made("llama", math.nan), "000001", TEXTS[0], trace, ALL_SITES)


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf])
@pytest.mark.parametrize("site", ["hidden_states", "attentions", "queries", "resid_post_mlp"])
def test_a_replay_sees_a_value_of_another_kind(site: str, value: float) -> None:
    trace = captured("llama", math.nan)[0]
    tensor = trace.tensors[site].copy()
    tensor[np.unravel_index(np.flatnonzero(np.isnan(tensor))[-1], tensor.shape)] = value
    wrong = trace._replace(tensors={**trace.tensors, site: tensor})
    with pytest.raises(CaptureError, match=f"sample 000007: {site} differs from a lone eager run by inf"):
        replay(made("llama", math.nan), "000007", TEXTS[0], wrong, ALL_SITES)


def test_a_replay_sees_a_finite_value_that_should_not_be_and_one_that_differs() -> None:
    trace = captured("llama", math.nan)[0]
    for value, message in ((math.nan, "by inf"), (9.0, "by [0-9.]+ ")):
        tensor = trace.tensors["hidden_states"].copy()
        tensor[0, 0, 0] = value
        wrong = trace._replace(tensors={**trace.tensors, "hidden_states": tensor})
        with pytest.raises(CaptureError, match=f"hidden_states differs from a lone eager run {message}"):
            replay(made("llama", math.nan), "000007", TEXTS[0], wrong, ALL_SITES)


def test_scores_that_are_not_finite_are_refused() -> None:
    nan = Scored("logprobs", [5, 6], math.nan)
    with pytest.raises(CaptureError, match="logprobs differs"):
        replay_scored(made("llama", math.nan), "000001", TEXTS[0].token_ids, [nan])


def test_arrays_are_compared_kind_by_kind() -> None:
    values = np.array([1.0, math.nan, math.inf, -math.inf])
    near = np.array([1.001, math.nan, math.inf, -math.inf])
    assert _compare("x", values, near, 1e-3, allow_nonfinite=True).max_abs_error == pytest.approx(1e-3)
    for other in ([1.0, math.inf, math.inf, -math.inf], [1.0, math.nan, -math.inf, -math.inf], [math.nan] * 4):
        error = _compare("x", values, np.array(other), 1e-3, allow_nonfinite=True)
        assert (error.max_abs_error, error.max_rel_error, error.min_cosine) == (math.inf, math.inf, 0.0)
    nothing = _compare("x", values[1:], values[1:], 1e-3, allow_nonfinite=True)
    assert (nothing.max_abs_error, nothing.min_cosine) == (0.0, 1.0)


def test_a_model_that_is_not_finite_does_not_pass_its_proof() -> None:
    """Damage comes after loading."""
    with pytest.raises(ModelError, match="its logits are not finite in float32"):
        proven(spoil(tiny_model("llama"), "llama", math.nan), "llama")
