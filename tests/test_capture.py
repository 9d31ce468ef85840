"""Capture against plain transformers: every site of every family, batched, padded, cut to layers and positions.

The references never touch the library: a second model with the same weights runs each text alone, unpadded and eager,
and what a block carries is put together from its own modules. Letters after an underscore are the axes of a tensor.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.tiny_models import (
    CAUSAL,
    FAMILIES,
    NUM_LAYERS,
    VOCAB_SIZE,
    WITH_ATTENTIONS,
    few_first,
    proven,
    sites_of,
    tiny_model,
    token_ids,
    traced,
)
from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, ConfigError, DtypeOverflowError, UnsupportedSiteError
from tracekit.model.capture import Text, Trace, capture, resolve_layers
from tracekit.model.hooks import _ACTIVE, _PROBABILITIES, record
from tracekit.model.traced import TracedModel
from tracekit.sites import QKV_SITES, SITES
from tracekit.tensors import TensorSpec, unpack_causal

TEXTS = (Text(token_ids(20), 12), Text(token_ids(9, start=5), 4), Text(token_ids(31, start=7), 30))
TOPK = 5
ALL_SITES = CaptureConfig(sites=("all",))

BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "opt_post_norm": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "falcon_new": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neo": "transformer.h",
    "mpt": "transformer.blocks",
    "bert": "bert.encoder.layer",
}
"""Where the blocks are, if not in `model.layers`."""

OUT_PROJECTIONS = {
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "opt_post_norm": "self_attn.out_proj",
    "phi": "self_attn.dense",
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "falcon_new": "self_attention.dense",
    "gptj": "attn.out_proj",
    "gpt_neo": "attn.attention.out_proj",
    "mpt": "attn.out_proj",
    "bert": "attention.output.dense",
}
"""Last linear map of attention inside a block, if not `self_attn.o_proj`."""

POST_NORMS = dict.fromkeys(("gemma2", "gemma3", "olmo2"), "post_attention_layernorm")
"""Norms of attention's output, before it is added."""

NORMS_OF_SUM = {"opt_post_norm": "self_attn_layer_norm", "bert": "attention.output.LayerNorm"}
"""LayerNorms after the addition."""

RESIDUAL_SCALES = {"granite": 0.3}
ATTENTION_SCALES = {
    "gemma2": 8**-0.5,
    "gemma3": 8**-0.5,
    "granite": 0.7,
    "opt": 1.0,
    "opt_post_norm": 1.0,
    "gpt_neo": 1.0,
}
"""What scores are multiplied by, if not one over the square root of a head's size; OPT scales its queries before."""

WINDOWS = {
    "gemma2": (4, None, 4),
    "gemma3": (4, None, 4),
    "mistral": (5, 5, 5),
    "gpt_oss": (4, None, 4),
    "gpt_neo": (None, 4, None),
}
"""How many tokens each layer looks back, itself included."""


class Reference(NamedTuple):
    """One text in plain transformers."""

    hidden_states: list[np.ndarray]
    attentions: list[np.ndarray]
    logits: Tensor
    """(T, V) in float32."""
    contexts: list[np.ndarray]
    """Per layer what goes into attention's last linear map (T, H * E)."""
    carried: list[np.ndarray]
    """Per layer what the MLP's output is added to (T, D)."""


class Family(NamedTuple):
    """The three texts, captured in one batch and run one by one."""

    traces: list[Trace]
    references: list[Reference]
    model: Any
    """The reference model."""


@cache
def family(name: str) -> Family:
    """Never altered: one run of a family serves all tests of this module."""
    model = tiny_model(name)
    references = [reference_of(name, model, text) for text in TEXTS]
    return Family(capture(traced(name), TEXTS, CaptureConfig(sites=sites_of(name))), references, model)


def reference_of(name: str, model: Any, text: Text) -> Reference:
    """Plain transformers: alone, unpadded, eager."""
    contexts: list[np.ndarray] = []
    carried: list[np.ndarray] = []
    with torch.inference_mode(), watched(name, model) as seen:
        output = model(
            torch.tensor([text.token_ids]),
            use_cache=False,
            output_hidden_states=True,
            output_attentions=name in WITH_ATTENTIONS,
        )
    for layer, block in enumerate(model.get_submodule(BLOCKS.get(name, "model.layers"))):
        contexts.append(seen[layer, "context"][0].numpy())
        total = seen[layer, "x"] + seen[layer, "added"] * RESIDUAL_SCALES.get(name, 1.0)
        if name in NORMS_OF_SUM:
            norm = block.get_submodule(NORMS_OF_SUM[name])
            total = nn.functional.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        carried.append(total[0].detach().numpy())
    return Reference(
        [hidden[0].numpy() for hidden in output.hidden_states],
        [attention[0].numpy() for attention in output.attentions or ()],
        output.logits[0].float(),
        contexts,
        carried,
    )


@contextmanager
def watched(name: str, model: Any) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Keeps what goes into each block, and in and out of its attention's last linear map."""
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []

    def keep_input(key: tuple[int, str]) -> Any:
        return lambda module, args, kwargs: seen.update({key: (args[0] if args else kwargs["hidden_states"]).clone()})

    def keep_output(key: tuple[int, str]) -> Any:
        return lambda module, args, output: seen.update({key: output.clone()})

    for layer, block in enumerate(model.get_submodule(BLOCKS.get(name, "model.layers"))):
        last = block.get_submodule(OUT_PROJECTIONS.get(name, "self_attn.o_proj"))
        added = block.get_submodule(POST_NORMS[name]) if name in POST_NORMS else last
        handles.append(block.register_forward_pre_hook(keep_input((layer, "x")), with_kwargs=True))
        handles.append(last.register_forward_pre_hook(keep_input((layer, "context")), with_kwargs=True))
        handles.append(added.register_forward_hook(keep_output((layer, "added"))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def assert_close(mine: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal shapes, and the largest difference is small beside the largest value."""
    assert mine.shape == expected.shape
    largest = np.abs(mine.astype(np.float64) - expected.astype(np.float64)).max(initial=0)
    assert largest <= tolerance * np.abs(expected.astype(np.float64)).max(initial=1e-30), largest


def attentions_of(trace: Trace) -> np.ndarray:
    """Stored attention as (L, H, T, T), whatever its layout; by the drawing in tensors.py, not by its code."""
    spec = spec_of(trace, "attentions")
    stored = trace.tensors["attentions"]
    if spec.layout == "full":
        return stored
    whole = np.zeros((*stored.shape[:2], spec.num_keys, spec.num_keys), stored.dtype)
    whole[:, :, *np.tril_indices(spec.num_keys)] = stored
    return whole


def layers_of(trace: Trace, site: str) -> list[np.ndarray]:
    """A site layer by layer, also where the layers are stored each by itself (`site.<layer>`)."""
    return [layer for name, tensor in trace.tensors.items() if name.split(".")[0] == site for layer in tensor]


def spec_of(trace: Trace, name: str) -> TensorSpec:
    return next(spec for spec in trace.specs if spec.name == name)


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_hidden_states_are_those_of_plain_transformers(name: str) -> None:
    made = family(name)
    for trace, reference in zip(made.traces, made.references, strict=True):
        for mine, expected in zip(layers_of(trace, "hidden_states"), reference.hidden_states, strict=True):
            assert_close(mine, expected)


@pytest.mark.parametrize("name", few_first(WITH_ATTENTIONS))
def test_attentions_are_those_of_plain_transformers(name: str) -> None:
    made = family(name)
    for trace, reference in zip(made.traces, made.references, strict=True):
        assert spec_of(trace, "attentions").layout == ("causal" if name in CAUSAL else "full")
        for mine, expected in zip(attentions_of(trace), reference.attentions, strict=True):
            assert_close(mine, expected)


@pytest.mark.parametrize("name", few_first(sorted({*CAUSAL} & {*WITH_ATTENTIONS})))
def test_packed_attention_is_unpacked_by_the_reader_to_the_same(name: str) -> None:
    trace = family(name).traces[0]
    stored, length = trace.tensors["attentions"], len(TEXTS[0].token_ids)
    np.testing.assert_array_equal(unpack_causal(stored, np.arange(length), length), attentions_of(trace))


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_the_residual_stream_is_handed_on(name: str) -> None:
    for trace in family(name).traces:
        hidden, before, after = (
            layers_of(trace, site) for site in ("hidden_states", "resid_pre_attn", "resid_post_mlp")
        )
        np.testing.assert_array_equal(trace.tensors["resid_embed"], hidden[0])
        np.testing.assert_array_equal(before, hidden[:-1])
        np.testing.assert_array_equal(after[:-1], before[1:])


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_resid_post_attn_is_what_the_mlp_is_added_to(name: str) -> None:
    made = family(name)
    for trace, reference in zip(made.traces, made.references, strict=True):
        for mine, expected in zip(trace.tensors["resid_post_attn"], reference.carried, strict=True):
            assert_close(mine, expected)


@pytest.mark.parametrize("name", few_first(WITH_ATTENTIONS))
def test_queries_and_keys_make_the_attentions(name: str) -> None:
    made = family(name)
    for trace in made.traces:
        for layer in range(NUM_LAYERS):
            expected = attention_by_hand(name, made.model, trace, layer)
            assert_close(attentions_of(trace)[layer], expected, 2e-5)


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_attentions_and_values_make_what_attention_puts_out(name: str) -> None:
    made = family(name)
    for trace, reference in zip(made.traces, made.references, strict=True):
        for layer, expected in enumerate(reference.contexts):
            known = name in WITH_ATTENTIONS
            probs_HTT = attentions_of(trace)[layer] if known else attention_by_hand(name, made.model, trace, layer)
            mixed_HTE = probs_HTT @ for_every_head(trace.tensors["values"][layer], len(probs_HTT))
            assert_close(mixed_HTE.swapaxes(0, 1).reshape(expected.shape), expected)


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_next_token_numbers_are_those_of_the_models_logits(name: str) -> None:
    made = family(name)
    for text, trace, reference in zip(TEXTS, made.traces, made.references, strict=True):
        logprobs_TV = reference.logits.log_softmax(-1)
        before_answer = slice(text.prompt_length - 1, -1)
        answer = torch.tensor(text.token_ids[text.prompt_length :])
        predicting_nV = logprobs_TV[before_answer]
        picked = predicting_nV[range(len(answer)), answer]
        np.testing.assert_allclose(trace.next_tokens.logprobs, picked, atol=1e-5)
        entropies = -(predicting_nV.exp() * predicting_nV).sum(-1)
        np.testing.assert_allclose(trace.next_tokens.entropies, entropies, atol=1e-5)
        np.testing.assert_array_equal(trace.next_tokens.predicted_ids, predicting_nV.argmax(-1))
        ids, values = trace.tensors["topk_ids"], trace.tensors["topk_logprobs"]
        np.testing.assert_allclose(values, logprobs_TV.topk(TOPK).values, atol=1e-5)
        np.testing.assert_allclose(values, logprobs_TV.gather(1, torch.from_numpy(ids)), atol=1e-5)


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_every_site_is_there_in_the_models_dtype(name: str) -> None:
    for trace in family(name).traces:
        assert [spec.name for spec in trace.specs] == list(trace.tensors)
        kinds = {stored.split(".")[0]: str(tensor.dtype) for stored, tensor in trace.tensors.items()}
        assert kinds == dict.fromkeys(sites_of(name), "float32") | {"topk_ids": "int64"}
        assert list(kinds) == list(sites_of(name))


def attention_by_hand(name: str, model: Any, trace: Trace, layer: int) -> np.ndarray:
    """softmax(scale * q k^T + bias) in float64, with the family's own cap, window and sinks."""
    queries_HTE = torch.from_numpy(trace.tensors["queries"][layer]).double()
    keys_HTE = torch.from_numpy(for_every_head(trace.tensors["keys"][layer], len(queries_HTE))).double()
    num_heads, length, head_size = queries_HTE.shape
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    scale = ATTENTION_SCALES.get(name, head_size**-0.5)
    scores_HTT = queries_HTE @ keys_HTE.mT
    slopes_H = torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)])
    scores_HTT = scores_HTT * scale
    if name in ("bloom", "mpt"):
        scores_HTT = scores_HTT + slopes_H[:, None, None] * key
    if name == "gemma2":
        scores_HTT = 1.5 * torch.tanh(scores_HTT / 1.5)
    window = WINDOWS.get(name, (None,) * NUM_LAYERS)[layer]
    visible = key <= query if name in CAUSAL else torch.ones(length, length, dtype=torch.bool)
    if window is not None:
        visible = visible & (query - key < window)
    scores_HTT = scores_HTT.masked_fill(~visible, -torch.inf)
    if name == "gpt_oss":
        sinks_H = model.model.layers[layer].self_attn.sinks.detach().double()
        with_sink = torch.cat([scores_HTT, sinks_H[:, None, None].expand(-1, length, 1)], dim=-1)
        return with_sink.softmax(-1)[..., :-1].numpy()
    return scores_HTT.softmax(-1).numpy()


def for_every_head(grouped_KTE: np.ndarray, num_heads: int) -> np.ndarray:
    """Keys or values once for each query head."""
    return grouped_KTE.repeat(num_heads // len(grouped_KTE), axis=0)


@pytest.mark.parametrize(("name", "num_heads"), [("llama", 2), ("falcon", 1), ("gpt2", 4), ("deepseek_v3", 4)])
def test_keys_and_values_keep_their_own_number_of_heads(name: str, num_heads: int) -> None:
    tensors = family(name).traces[0].tensors
    assert tensors["queries"].shape[1] == 4
    assert tensors["keys"].shape[1] == tensors["values"].shape[1] == num_heads


def test_grouped_heads_of_falcon_are_stored_once() -> None:
    assert family("falcon_new").traces[0].tensors["keys"].shape[1] == 2


def test_latent_attention_has_smaller_values_than_keys() -> None:
    tensors = family("deepseek_v3").traces[0].tensors
    assert tensors["queries"].shape[-1] == tensors["keys"].shape[-1] == 16
    assert tensors["values"].shape[-1] == 12


@pytest.mark.parametrize("text", range(len(TEXTS)))
def test_llamas_queries_keys_and_values_are_its_projections_turned_by_position(text: int) -> None:
    made = family("llama")
    tensors, length = made.traces[text].tensors, len(TEXTS[text].token_ids)
    for layer, block in enumerate(made.model.model.layers):
        x_TD = torch.from_numpy(tensors["resid_pre_attn"][layer]).double()
        normed_TD = x_TD / (x_TD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.input_layernorm.weight.double()
        for site, projection in zip(QKV_SITES, "qkv", strict=True):
            weight = block.self_attn.get_submodule(f"{projection}_proj").weight.double()
            expected_HTE = (normed_TD @ weight.mT).reshape(length, -1, 8).transpose(0, 1)
            if site != "values":
                expected_HTE = turned(expected_HTE)
            assert_close(tensors[site][layer], expected_HTE.detach().numpy())


def turned(heads_HTE: Tensor) -> Tensor:
    """Rotary embedding as complex numbers: the pair (i, i + E/2) turns by position / 10000^(2i/E)."""
    _, length, size = heads_HTE.shape
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    pairs = torch.complex(*heads_HTE.split(size // 2, dim=-1)) * torch.polar(torch.ones(()).double(), angles.double())
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def test_the_heads_own_scales_and_caps_are_in_the_logits_that_count() -> None:
    """The families whose head does more than multiply: without it the numbers would be others."""
    for name, change in (("gemma2", {"final_logit_softcapping": None}), ("cohere", {"logit_scale": 1.0})):
        trace = family(name).traces[0]
        other = tiny_model(name, **change)(torch.tensor([TEXTS[0].token_ids])).logits[0].detach()
        others = other.log_softmax(-1).topk(TOPK).values.numpy()
        assert np.abs(trace.tensors["topk_logprobs"] - others).max() > 0.05, name


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bloom", "falcon", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lone_text_is_stored_bit_by_bit(name: str, dtype: str) -> None:
    text = TEXTS[0]
    trace = capture(traced(name, dtype), [text], CaptureConfig(sites=("hidden", "attn")))[0]
    with torch.inference_mode():
        output = tiny_model(name, dtype)(
            torch.tensor([text.token_ids]), use_cache=False, output_hidden_states=True, output_attentions=True
        )
    assert {str(tensor.dtype) for tensor in trace.tensors.values()} == {dtype}
    for mine, expected in (
        (layers_of(trace, "hidden_states"), output.hidden_states),
        (attentions_of(trace), output.attentions),
    ):
        for layer, wanted in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(layer.astype(np.float32), wanted[0].float().numpy())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "bloom", "falcon", "phi", "gpt_oss"])
def test_a_batch_in_bfloat16_is_near_the_lone_run(name: str) -> None:
    model = tiny_model(name, "bfloat16")
    traces = capture(traced(name, "bfloat16"), TEXTS, CaptureConfig(sites=sites_of(name)))
    for text, trace in zip(TEXTS, traces, strict=True):
        with torch.inference_mode():
            output = model(torch.tensor([text.token_ids]), output_hidden_states=True)
        for mine, expected in zip(layers_of(trace, "hidden_states"), output.hidden_states, strict=True):
            assert_close(mine, expected[0].float().numpy(), 0.03)
        assert {trace.tensors[site].dtype for site in QKV_SITES} == {np.dtype(ml_dtypes.bfloat16)}
        assert trace.next_tokens.logprobs.dtype == trace.tensors["topk_logprobs"].dtype == np.float32


@pytest.mark.parametrize(("dtype", "store"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")])
def test_stored_dtype_is_the_models_rounded_or_widened(dtype: str, store: str) -> None:
    made = traced("llama", dtype)
    own = capture(made, TEXTS, ALL_SITES)
    other = capture(made, TEXTS, CaptureConfig(sites=("all",), store_dtype=store))
    for mine, theirs in zip(own, other, strict=True):
        for site, tensor in mine.tensors.items():
            wanted = tensor if site.startswith("topk") else tensor.astype(theirs.tensors["queries"].dtype)
            np.testing.assert_array_equal(theirs.tensors[site], wanted)
            assert spec_of(theirs, site).dtype == str(wanted.dtype)
        assert theirs.tensors["queries"].dtype == store


def test_a_value_that_does_not_fit_names_site_layer_and_value() -> None:
    made = traced("llama")
    with torch.no_grad():
        made.model.model.layers[1].mlp.down_proj.weight.mul_(3e6)
    with pytest.raises(DtypeOverflowError) as caught:
        capture(made, TEXTS[:1], CaptureConfig(sites=("resid_post_mlp",), store_dtype="float16"))
    values = capture(made, TEXTS[:1], CaptureConfig(sites=("resid_post_mlp",)))[0].tensors["resid_post_mlp"]
    largest = np.abs(values[1]).max()
    assert largest > 65504
    assert str(caught.value).startswith("resid_post_mlp, layer 1: ")
    assert f"{largest:g} does not fit torch.float16 (largest 65504)" in str(caught.value)
    assert "--store-dtype" in str(caught.value)


def test_padding_does_not_count_as_a_value_that_does_not_fit() -> None:
    made = traced("llama")
    with torch.no_grad():
        made.model.model.embed_tokens.weight[0] = 1e6  # id 0 pads and stands in no text
    capture(made, TEXTS, CaptureConfig(sites=("hidden",), store_dtype="float16"))


def test_a_position_that_is_not_kept_may_overflow() -> None:
    made = traced("llama")
    with torch.no_grad():
        made.model.model.embed_tokens.weight[TEXTS[0].token_ids[0]] = 1e6
    capture(made, TEXTS[:1], CaptureConfig(sites=("hidden",), store_dtype="float16", tokens="last"))


# ---------------------------------------------------------------- layers and positions


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        (("all",), [0, 1, 2]),
        (("0",), [0]),
        (("-1",), [2]),
        (("-3",), [0]),
        (("1-2",), [1, 2]),
        (("2-2",), [2]),
        (("0", "-1"), [0, 2]),
        (("-1", "0", "2", "0-1"), [0, 1, 2]),
    ],
)
def test_layers_are_numbers_from_either_end_and_ranges(chosen: tuple[str, ...], layers: list[int]) -> None:
    assert resolve_layers(chosen, range(3)) == layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", "the model has layers 0 to 2 there"),
        ("-4", "the model has layers 0 to 2 there"),
        ("1-3", "the model has layers 0 to 2 there"),
        ("2-1", "the model has layers 0 to 2 there"),
        ("last", "expected all, 12, -1 or 4-8"),
        ("1-", "expected all, 12, -1 or 4-8"),
        ("1.5", "expected all, 12, -1 or 4-8"),
        ("-2--1", "expected all, 12, -1 or 4-8"),
        ("", "expected all, 12, -1 or 4-8"),
    ],
)
def test_a_layer_that_is_none_is_refused_with_its_path(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_layers(("0", text), range(3))
    assert str(caught.value) == f"layer {text!r} - at `$.capture.layers`; {expected}"


def test_layers_that_do_not_give_a_site_are_left_out_or_refused() -> None:
    assert resolve_layers(("all",), (1, 3)) == [1, 3]
    assert resolve_layers(("0-3",), (1, 3)) == [1, 3]
    assert resolve_layers(("-1",), (1, 3)) == [3]
    with pytest.raises(ConfigError, match=r"layers '0 2' - at `\$.capture.layers`; none of them gives this site"):
        resolve_layers(("0", "2"), (1, 3))


def test_no_layer_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of them gives this site"):
        resolve_layers((), range(3))


@pytest.mark.parametrize(
    ("chosen", "hidden", "others"),
    [
        (("0",), [0], [0]),
        (("-1",), [3], [2]),
        (("1-2",), [1, 2], [1, 2]),
        (("0", "-1"), [0, 3], [0, 2]),
    ],
)
def test_chosen_layers_are_what_is_stored(chosen: tuple[str, ...], hidden: list[int], others: list[int]) -> None:
    whole = family("llama").traces
    for mine, everything in zip(
        capture(traced("llama"), TEXTS, CaptureConfig(sites=("all",), layers=chosen)), whole, strict=True
    ):
        for site, tensor in mine.tensors.items():
            has_layers = "L" in SITES[site].axes
            layers = (hidden if site == "hidden_states" else others) if has_layers else []
            assert spec_of(mine, site).layers == layers
            wanted = everything.tensors[site]
            np.testing.assert_array_equal(tensor, wanted[layers] if has_layers else wanted)


def test_a_layer_that_only_hidden_states_have_is_refused_beside_other_sites() -> None:
    made = traced("llama")
    last = capture(made, TEXTS, CaptureConfig(sites=("hidden",), layers=("3",)))
    for trace, whole in zip(last, family("llama").traces, strict=True):
        assert_close(trace.tensors["hidden_states"][0], whole.tensors["hidden_states"][3])
    with pytest.raises(ConfigError, match=r"layer '3' - at `\$.capture.layers`; the model has layers 0 to 2"):
        capture(made, TEXTS, CaptureConfig(sites=("hidden", "attn"), layers=("3",)))


@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
@pytest.mark.parametrize("tokens", ["all", "prompt", "answer", "last"])
def test_kept_positions_are_cut_out_of_every_site(name: str, tokens: str) -> None:
    config = CaptureConfig(sites=("all",), tokens=tokens)
    for text, mine, everything in zip(TEXTS, capture(traced(name), TEXTS, config), family(name).traces, strict=True):
        length, prompt = len(text.token_ids), text.prompt_length
        kept = {
            "all": range(length),
            "prompt": range(prompt),
            "answer": range(prompt, length),
            "last": range(prompt - 1, prompt),
        }[tokens]
        for site, tensor in mine.tensors.items():
            whole = attentions_of(everything) if site == "attentions" else everything.tensors[site]
            axes = list(SITES[site].axes)
            wanted = np.take(whole, kept, axis=axes.index("T"))
            spec = spec_of(mine, site)
            if spec.layout == "causal":
                rows = [wanted[:, :, i, : row + 1] for i, row in enumerate(kept)]
                wanted, axes = np.concatenate(rows, axis=-1), ["L", "H", "S"]
            assert_close(tensor, wanted, 1e-6)
            assert spec.axes == axes
            assert spec.shape == list(wanted.shape)
            assert spec.positions == [[kept.start, kept.stop]]
        np.testing.assert_allclose(mine.next_tokens.logprobs, everything.next_tokens.logprobs, atol=1e-5)
        np.testing.assert_array_equal(mine.next_tokens.predicted_ids, everything.next_tokens.predicted_ids)


def test_a_text_without_answer_has_no_answer_positions() -> None:
    texts = [Text(TEXTS[0].token_ids, len(TEXTS[0].token_ids)), TEXTS[1]]
    trace = capture(traced("llama"), texts, CaptureConfig(sites=("all",), tokens="answer"))[0]
    assert (
        trace.next_tokens.logprobs.shape
        == trace.next_tokens.entropies.shape
        == trace.next_tokens.predicted_ids.shape
        == (0,)
    )
    assert {tuple(spec.positions) for spec in trace.specs} == {()}
    shapes = {site: tensor.shape for site, tensor in trace.tensors.items()}
    assert shapes == {
        "hidden_states": (4, 0, 32),
        "attentions": (3, 4, 0),
        "queries": (3, 4, 0, 8),
        "keys": (3, 2, 0, 8),
        "values": (3, 2, 0, 8),
        "resid_embed": (0, 32),
        "resid_pre_attn": (3, 0, 32),
        "resid_post_attn": (3, 0, 32),
        "resid_post_mlp": (3, 0, 32),
        "topk_ids": (0, TOPK),
        "topk_logprobs": (0, TOPK),
    }


def test_entries_say_what_every_tensor_is() -> None:
    trace = family("llama").traces[0]
    length = len(TEXTS[0].token_ids)
    layers = list(range(NUM_LAYERS))

    def entry(name: str, shape: list[int], axes: str, layers: list[int], **others: Any) -> TensorSpec:
        usual = {"dtype": "float32", "layout": "dense", "num_keys": 0, "choice_offsets": []}
        return TensorSpec(
            name=name, shape=shape, axes=list(axes), layers=layers, positions=[[0, length]], **usual | others
        )

    assert trace.specs == [
        entry("hidden_states", [4, length, 32], "LTD", [0, 1, 2, 3]),
        entry("attentions", [3, 4, 210], "LHS", layers, layout="causal", num_keys=length),
        entry("queries", [3, 4, length, 8], "LHTE", layers),
        entry("keys", [3, 2, length, 8], "LKTE", layers),
        entry("values", [3, 2, length, 8], "LKTE", layers),
        entry("resid_embed", [length, 32], "TD", []),
        entry("resid_pre_attn", [3, length, 32], "LTD", layers),
        entry("resid_post_attn", [3, length, 32], "LTD", layers),
        entry("resid_post_mlp", [3, length, 32], "LTD", layers),
        entry("topk_ids", [length, TOPK], "Tk", [], dtype="int64"),
        entry("topk_logprobs", [length, TOPK], "Tk", []),
    ]


def test_both_ways_attention_is_stored_whole_and_says_so() -> None:
    length = len(TEXTS[0].token_ids)
    spec = spec_of(family("bert").traces[0], "attentions")
    assert (spec.layout, spec.axes, spec.shape) == ("full", list("LHTT"), [3, 4, length, length])
    assert spec.num_keys == length


def test_no_site_leaves_the_answers_numbers() -> None:
    for trace, whole in zip(
        capture(traced("llama"), TEXTS, CaptureConfig(sites=("none",))), family("llama").traces, strict=True
    ):
        assert trace.tensors == {}
        assert trace.specs == []
        np.testing.assert_allclose(trace.next_tokens.logprobs, whole.next_tokens.logprobs, atol=1e-5)


def test_k_of_topk_is_chosen() -> None:
    config = CaptureConfig(sites=("topk",), topk=VOCAB_SIZE)
    trace = capture(traced("gpt2"), TEXTS, config)[0]
    assert trace.tensors["topk_ids"].shape == (20, VOCAB_SIZE)
    np.testing.assert_allclose(np.exp(trace.tensors["topk_logprobs"]).sum(-1), 1, atol=1e-5)
    assert all(set(row) == set(range(VOCAB_SIZE)) for row in trace.tensors["topk_ids"].tolist())


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_head_may_run_over_any_number_of_rows_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracekit.model.capture._HEAD_ROWS", rows)
    for trace, whole in zip(capture(traced("gemma2"), TEXTS, ALL_SITES), family("gemma2").traces, strict=True):
        np.testing.assert_allclose(trace.tensors["topk_logprobs"], whole.tensors["topk_logprobs"], atol=1e-5)
        np.testing.assert_allclose(trace.next_tokens.logprobs, whole.next_tokens.logprobs, atol=1e-5)
        np.testing.assert_allclose(trace.next_tokens.entropies, whole.next_tokens.entropies, atol=1e-5)


# ---------------------------------------------------------------- layers that differ


def uneven() -> TracedModel:
    """A llama whose middle layer has two heads, and one for keys and values."""
    model = tiny_model("llama")
    narrow = LlamaAttention(LlamaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8), 1)
    narrow.config = model.config
    model.model.layers[1].self_attn = narrow.eval()
    return proven(model, "llama")


def test_a_site_with_different_shapes_is_stored_layer_by_layer() -> None:
    trace = capture(uneven(), TEXTS, ALL_SITES)[0]
    shapes = {name: tensor.shape for name, tensor in trace.tensors.items() if "." in name}
    assert shapes == {
        "attentions.0": (1, 4, 210),
        "attentions.1": (1, 2, 210),
        "attentions.2": (1, 4, 210),
        "queries.0": (1, 4, 20, 8),
        "queries.1": (1, 2, 20, 8),
        "queries.2": (1, 4, 20, 8),
        "keys.0": (1, 2, 20, 8),
        "keys.1": (1, 1, 20, 8),
        "keys.2": (1, 2, 20, 8),
        "values.0": (1, 2, 20, 8),
        "values.1": (1, 1, 20, 8),
        "values.2": (1, 2, 20, 8),
    }
    assert [spec_of(trace, f"queries.{layer}").layers for layer in range(3)] == [[0], [1], [2]]
    assert trace.tensors["hidden_states"].shape == (4, 20, 32)


def test_its_values_are_the_models_own() -> None:
    made = uneven()
    trace = capture(made, TEXTS, ALL_SITES)[2]
    made.model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = made.model(torch.tensor([TEXTS[2].token_ids]), output_attentions=True)
    for layer, expected in enumerate(output.attentions):
        assert_close(trace.tensors[f"attentions.{layer}"][0], expected[0][:, *np.tril_indices(31)].numpy())


def test_one_layer_of_it_can_be_chosen() -> None:
    trace = capture(uneven(), TEXTS, CaptureConfig(sites=("qkv",), layers=("1",)))[0]
    assert {name: tensor.shape for name, tensor in trace.tensors.items()} == {
        "queries.1": (1, 2, 20, 8),
        "keys.1": (1, 1, 20, 8),
        "values.1": (1, 1, 20, 8),
    }


def test_a_hybrid_gives_queries_where_it_has_attention() -> None:
    sites = ("hidden_states", *QKV_SITES, "resid_pre_attn")
    trace = capture(traced("lfm2", sites=sites), TEXTS, CaptureConfig(sites=sites))[0]
    assert spec_of(trace, "queries").layers == [1, 3]
    assert spec_of(trace, "resid_pre_attn").layers == [0, 1, 2, 3]


def test_a_hybrid_gives_attentions_where_it_has_attention() -> None:
    sites = ("hidden_states", "attentions")
    traces = capture(traced("lfm2", sites=sites), TEXTS, CaptureConfig(sites=sites))
    model = tiny_model("lfm2")
    for text, trace in zip(TEXTS, traces, strict=True):
        with torch.inference_mode():
            output = model(torch.tensor([text.token_ids]), use_cache=False, output_attentions=True)
        assert spec_of(trace, "attentions").layers == [1, 3]
        assert len(output.attentions) == 2
        for mine, expected in zip(attentions_of(trace), output.attentions, strict=True):
            assert_close(mine, expected[0].numpy())


# ---------------------------------------------------------------- the model is left alone


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "bloom", "falcon"])
def test_after_a_capture(name: str) -> None:
    made = traced(name)
    before = State.of(made)
    capture(made, TEXTS, CaptureConfig(sites=sites_of(name)))
    assert State.of(made) == before


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("site", ["attentions", *QKV_SITES, "resid_embed", "resid_post_attn", "resid_post_mlp"])
def test_after_a_sink_that_raised_while_the_model_ran(name: str, site: str) -> None:
    made = traced(name)
    before = State.of(made)

    def sink(where: str, layer: int, value: Tensor) -> None:
        if where == site and layer == (0 if site == "resid_embed" else 1):
            raise InterruptedError(where)

    ids = made.probe_ids()
    sites = tuple(name for name in SITES if SITES[name].source in ("attention", "block"))
    with (
        pytest.raises(InterruptedError, match=site),
        torch.inference_mode(),
        record(made.model, made.anatomy, sites, sink, resid_rule=made.resid_rule),
    ):
        made.model(ids, use_cache=False)
    assert State.of(made) == before


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_after_a_capture_that_was_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced(name)
    before = State.of(made)
    with torch.no_grad():
        made.model.get_input_embeddings().weight[TEXTS[1].token_ids[0]] *= torch.inf
    with pytest.raises(CaptureError, match="not finite"):
        capture(made, TEXTS, CaptureConfig(sites=("all",)))
    with torch.no_grad():
        made.model.get_input_embeddings().weight.copy_(tiny_model(name).get_input_embeddings().weight)
    assert State.of(made) == before


def test_after_a_head_that_failed() -> None:
    made = traced("llama")
    before = State.of(made)
    num_calls = 0

    def fail_second(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise MemoryError("head")

    handle = made.model.lm_head.register_forward_hook(fail_second)
    with pytest.raises(MemoryError, match="head"):
        capture(made, TEXTS, ALL_SITES)
    handle.remove()
    assert State.of(made) == before


def test_captures_are_repeatable_bit_by_bit() -> None:
    made = traced("llama")
    first, second = (capture(made, TEXTS, ALL_SITES) for _ in range(2))
    for mine, other in zip(first, second, strict=True):
        for site, tensor in mine.tensors.items():
            np.testing.assert_array_equal(tensor, other.tensors[site])


def test_tensors_do_not_belong_to_the_model() -> None:
    made = traced("llama")
    trace = capture(made, TEXTS[:1], ALL_SITES)[0]
    copies = {site: tensor.copy() for site, tensor in trace.tensors.items()}
    capture(made, TEXTS[1:], ALL_SITES)
    for site, tensor in trace.tensors.items():
        np.testing.assert_array_equal(tensor, copies[site])


class State(NamedTuple):
    """What a capture may not change."""

    attention: str
    hooks: tuple[tuple[str, int, int, bool], ...]
    sinks: tuple[object, object]
    logits: bytes

    @classmethod
    def of(cls, made: TracedModel) -> "State":
        with torch.inference_mode():
            logits = made.model(torch.tensor([TEXTS[0].token_ids]), use_cache=False).logits
        hooks = tuple(
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
            for name, module in made.model.named_modules()
        )
        implementations = {
            module.config._attn_implementation for module in made.model.modules() if hasattr(module, "config")
        }
        sinks = (_ACTIVE.get(), _PROBABILITIES.get())
        return cls(" ".join(sorted(implementations)), hooks, sinks, logits.numpy().tobytes())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("value", "layer"), [(torch.nan, 2), (torch.inf, 0), (-torch.inf, 1)])
def test_a_value_that_is_not_finite(value: float, layer: int) -> None:
    made = traced("llama")
    with torch.no_grad():
        made.model.model.layers[layer].mlp.down_proj.weight[5, 7] = value
    with pytest.raises(CaptureError) as caught:
        capture(made, TEXTS, CaptureConfig(sites=("resid_post_mlp",)))
    assert str(caught.value) == (
        f"resid_post_mlp, layer {layer}: not finite in a torch.float32 model; use another --dtype"
    )


@pytest.mark.parametrize("site", ["hidden_states", "attentions", "queries", "resid_post_attn"])
def test_a_value_that_is_not_finite_at_any_site(site: str) -> None:
    made = traced("llama")
    with torch.no_grad():
        made.model.model.embed_tokens.weight[TEXTS[1].token_ids[3]] = torch.nan
    with pytest.raises(CaptureError, match=rf"^{site}, layer 0: not finite"):
        capture(made, TEXTS, CaptureConfig(sites=(site,)))


@pytest.mark.parametrize("sites", [("hidden",), ("topk",), ("none",)])
def test_logits_that_are_not_finite(sites: tuple[str, ...]) -> None:
    made = traced("llama")
    with torch.no_grad():
        made.model.lm_head.weight[11] = torch.nan
    with pytest.raises(CaptureError, match="not finite"):
        capture(made, TEXTS, CaptureConfig(sites=sites))


def test_what_is_not_finite_in_padding_alone_does_not_count() -> None:
    made = traced("llama")
    padding = np.zeros((len(TEXTS), 31), dtype=bool)
    for i, text in enumerate(TEXTS):
        padding[i, len(text.token_ids) :] = True

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output.masked_fill(torch.from_numpy(padding)[..., None], torch.inf) if len(output) == 3 else None

    handle = made.model.model.norm.register_forward_hook(spoil)
    traces = capture(made, TEXTS, CaptureConfig(sites=("hidden",)))
    handle.remove()
    for trace, whole in zip(traces, family("llama").traces, strict=True):
        assert_close(trace.tensors["hidden_states"], whole.tensors["hidden_states"])


def test_rows_that_do_not_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced("llama")
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", with_probabilities(lambda probs: probs * 0.9))
    with pytest.raises(CaptureError, match=r"^attentions, layer 0: rows sum to 0\.9\d*\.\.0\.9\d*, expected 1"):
        capture(made, TEXTS, CaptureConfig(sites=("attn",)))


def test_rows_that_do_not_sum_to_one_beside_padding_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced("llama")
    length = len(TEXTS[1].token_ids)

    def change(probs_BHTT: Tensor) -> Tensor:
        changed = probs_BHTT * 0.9
        changed[1, :, length:] = torch.nan
        return changed

    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", with_probabilities(change))
    with pytest.raises(CaptureError, match=r"^attentions, layer 0: rows sum to"):
        capture(made, TEXTS, CaptureConfig(sites=("attn",)))


def test_rows_of_a_sink_model_may_sum_to_less_but_not_to_more(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced("gpt_oss")
    assert attentions_of(capture(made, TEXTS, CaptureConfig(sites=("attn",)))[0]).sum(-1).min() < 0.9
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", with_probabilities(lambda probs: probs * 2))
    with pytest.raises(CaptureError, match=r"^attentions, layer 0: rows sum to .*, expected 1"):
        capture(made, TEXTS, CaptureConfig(sites=("attn",)))


def test_attention_to_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    made = traced("llama")
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", with_probabilities(lambda probs: probs.flip(-1)))
    with pytest.raises(
        CaptureError, match=r"^attentions, layer 0: a causal model attends to the future, or to padding$"
    ):
        capture(made, TEXTS, CaptureConfig(sites=("attn",)))


def test_a_site_that_was_not_proven() -> None:
    made = traced("gpt_neo", sites=tuple(site for site in sites_of("gpt_neo") if site not in QKV_SITES))
    with pytest.raises(UnsupportedSiteError) as caught:
        capture(made, TEXTS, ALL_SITES)
    assert str(caught.value) == (
        "gpt_neo (tiny/gpt_neo) cannot give queries, keys, values; it can give: hidden_states, attentions, "
        "resid_embed, resid_pre_attn, resid_post_attn, resid_post_mlp. Choose with --sites"
    )


def with_probabilities(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Any]:
    """A stand-in for hooks.own_eager_attention: the module's own attention, but other probabilities."""

    def own_eager_attention(module: nn.Module) -> Any:
        own = sys.modules[type(module).__module__].eager_attention_forward

        def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            output, probs_BHTT = own(*args, **kwargs)
            return output, change(probs_BHTT)

        return attention

    return own_eager_attention


# ---------------------------------------------------------------- batches


def batch_sizes(made: TracedModel) -> list[int]:
    sizes: list[int] = []
    run = made.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 1:  # the head alone runs with one token
            sizes.append(len(kwargs["input_ids"]))
        return run(*args, **kwargs)

    made.model.forward = forward
    capture(made, TEXTS, ALL_SITES)
    return sizes


def test_texts_run_together() -> None:
    assert batch_sizes(traced("llama")) == [3]


def test_models_whose_rows_are_coupled_run_them_one_by_one() -> None:
    made = traced("llama")
    made.is_row_coupled = True
    assert batch_sizes(made) == [1, 1, 1]


def test_one_by_one_gives_the_same_in_the_same_order() -> None:
    made = traced("llama")
    made.is_row_coupled = True
    for text, trace, whole in zip(TEXTS, capture(made, TEXTS, ALL_SITES), family("llama").traces, strict=True):
        assert spec_of(trace, "resid_embed").positions == [[0, len(text.token_ids)]]
        for site in ("hidden_states", "attentions", "queries"):
            assert_close(trace.tensors[site], whole.tensors[site])


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_the_order_of_texts_does_not_matter(order: tuple[int, ...]) -> None:
    traces = capture(traced("gpt2"), [TEXTS[i] for i in order], CaptureConfig(sites=("all",)))
    for i, trace in zip(order, traces, strict=True):
        for site in ("hidden_states", "attentions", "queries"):
            assert_close(trace.tensors[site], family("gpt2").traces[i].tensors[site])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "phi", "deepseek_v3"])
def test_queries_without_attentions_are_the_same(name: str) -> None:
    """Without probabilities sdpa runs, where the model was loaded with it."""
    made = traced(name, sites=("hidden_states", *QKV_SITES))
    assert made.model.config._attn_implementation == "sdpa"
    traces = capture(made, TEXTS, CaptureConfig(sites=("hidden", "qkv")))
    for trace, whole in zip(traces, family(name).traces, strict=True):
        for site in ("hidden_states", *QKV_SITES):
            for mine, expected in zip(layers_of(trace, site), layers_of(whole, site), strict=True):
                assert_close(mine, expected)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_models_that_sdpa_would_get_wrong_stay_eager(name: str) -> None:
    made = traced(name, sites=("hidden_states", *QKV_SITES))
    assert made.model.config._attn_implementation == "eager"
    for trace, whole in zip(
        capture(made, TEXTS, CaptureConfig(sites=("hidden", "qkv"))), family(name).traces, strict=True
    ):
        assert_close(trace.tensors["hidden_states"], whole.tensors["hidden_states"])


def test_falcon_with_alibi_gives_all_but_the_probabilities_that_transformers_computes_wrongly() -> None:
    sites = ("hidden_states", *QKV_SITES, "resid_post_attn")
    traces = capture(traced("falcon_alibi", sites=sites), TEXTS, CaptureConfig(sites=sites))
    plain = tiny_model("falcon_alibi", attention="sdpa")
    for text, trace in zip(TEXTS, traces, strict=True):
        with torch.inference_mode():
            output = plain(torch.tensor([text.token_ids]), use_cache=False, output_hidden_states=True)
        for mine, expected in zip(trace.tensors["hidden_states"], output.hidden_states, strict=True):
            assert_close(mine, expected[0].numpy())
    with pytest.raises(UnsupportedSiteError, match=r"falcon gives no attentions: .* ALiBi bias is added twice"):
        traced("falcon_alibi", sites=("attentions",))
