"""Interventions against torch hooks written by hand, in families of every kind; positions, generation, restoring.

The references know nothing of the library: hooks on the modules of the very same weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.test_capture import BLOCKS, NORMS_OF_SUM, OUT_PROJECTIONS, POST_NORMS, RESIDUAL_SCALES
from tests.tiny_models import CAUSAL, FAMILIES, NUM_LAYERS, few_first, proven, tiny_model, token_ids
from tracekit import patch
from tracekit.config import CaptureConfig
from tracekit.errors import ConfigError, ModelError, UnsupportedSiteError
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.families import OFF_INTERFACE
from tracekit.model.hooks import record
from tracekit.model.traced import TracedModel
from tracekit.sites import QKV_SITES

PARALLEL = ("gpt_neox", "phi", "falcon", "falcon_new", "cohere", "gptj")
"""Families that add attention and MLP to the same input."""
ON_INTERFACE = tuple(name for name, config in FAMILIES.items() if config().model_type not in OFF_INTERFACE)
LENGTH, LAYER, PLACE, SIZE = 9, 1, 4, 32
IDS = torch.tensor([token_ids(LENGTH)])
OTHER_IDS = torch.tensor([token_ids(LENGTH, start=11)])


@cache
def plain(name: str) -> Any:
    """A plain model, as a user loads it; every test leaves it as it was."""
    return tiny_model(name, attention="plain" if name in OFF_INTERFACE or name.startswith("falcon") else None)


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def blocks_of(name: str, model: Any) -> Any:
    return model.get_submodule(BLOCKS.get(name, "model.layers"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changed_at(x: Tensor, place: int | slice, change: Callable[[Tensor], Tensor]) -> Tensor:
    x = x.clone()
    x[:, place] = change(x[:, place])
    return x


@contextmanager
def by_hand(module: nn.Module, place: int | slice, change: Callable[[Tensor], Tensor], *, at: str) -> Iterator[None]:
    """A torch hook that changes the input or output of a module at one place."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (changed_at(args[0], place, change), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed_at(kwargs["hidden_states"], place, change)}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (changed_at(output[0], place, change), *output[1:])
        return changed_at(output.view(1, -1, output.shape[-1]), place, change).view(output.shape)

    hook = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if at == "input"
        else module.register_forward_hook(after)
    )
    with hook:
        yield


def seen_by_hand(module: nn.Module, model: Any, ids: Tensor = IDS, *, at: str = "output") -> Tensor:
    kept: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        value = (output[0] if isinstance(output, tuple) else output) if at == "output" else args[0]
        kept.append(value.detach().clone())

    with module.register_forward_hook(note, with_kwargs=True):
        logits_of(model, ids)
    return kept[0]


def recorded(model: TracedModel, site: str, ids: Tensor = IDS) -> list[Tensor]:
    """Every layer of a site."""
    layers: dict[int, Tensor] = {}

    def sink(site: str, layer: int, x: Tensor) -> None:
        layers[layer] = x.clone()

    with record(model.model, model.anatomy, (site,), sink, resid_rule=model.resid_rule):
        logits_of(model.model, ids)
    return [layers[layer] for layer in sorted(layers)]


def hidden_of(trace: Trace) -> list[np.ndarray]:
    """Every hidden state; OPT's last has another width, and each its own tensor."""
    if "hidden_states" in trace.tensors:
        return list(trace.tensors["hidden_states"])
    return [trace.tensors[f"hidden_states.{number}"][0] for number in range(NUM_LAYERS + 1)]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_replacing_a_block_s_input_or_output_is_what_a_hook_by_hand_does(name: str):
    model = plain(name)
    untouched = logits_of(model)
    value = drawn(SIZE)
    for site, layer, at in (
        ("resid_embed", 0, "input"),
        ("resid_pre_attn", LAYER, "input"),
        ("resid_post_mlp", LAYER, "output"),
        ("resid_post_mlp", -1, "output"),
    ):
        with by_hand(blocks_of(name, model)[layer], PLACE, lambda x: value.expand_as(x), at=at):
            expected = logits_of(model)
        with patch(model, site, layer, PLACE, value):
            mine = logits_of(model)
        assert same(mine, expected), site
        assert not same(mine, untouched), site
    assert torch.equal(logits_of(model), untouched)


@pytest.mark.parametrize("name", few_first(name for name in FAMILIES if name not in PARALLEL))
def test_resid_post_attn_is_the_sum_that_the_block_goes_on_with(name: str):
    """By hand: the difference is added to what attention adds; after a post-LN, its output is exchanged."""
    model = plain(name)
    made = proven(model, name, ("resid_post_attn",))
    block = blocks_of(name, model)[LAYER]
    value = drawn(SIZE)
    difference = (value - recorded(made, "resid_post_attn")[LAYER][:, PLACE]) / RESIDUAL_SCALES.get(name, 1)
    if name in NORMS_OF_SUM:
        module, change = block.get_submodule(NORMS_OF_SUM[name]), lambda x: value.expand_as(x)
    else:
        path = POST_NORMS.get(name) or OUT_PROJECTIONS.get(name, "self_attn.o_proj")
        module, change = block.get_submodule(path), lambda x: x + difference
    with by_hand(module, PLACE, change, at="output"):
        expected = logits_of(model)
    for given in (model, made):
        with patch(given, "resid_post_attn", LAYER, PLACE, value):
            mine = logits_of(model)
            assert same(recorded(made, "resid_post_attn")[LAYER][:, PLACE], value)
        assert same(mine, expected)
    assert not same(expected, logits_of(model))


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_a_model_s_own_values_put_back_change_nothing(name: str):
    model = plain(name)
    sites = ["resid_pre_attn", "resid_post_mlp"]
    sites += [] if name in PARALLEL else ["resid_post_attn"]
    sites += list(QKV_SITES) if name in ON_INTERFACE else []
    made = proven(model, name, tuple(sites))
    untouched = logits_of(model)
    for site in sites:
        own = recorded(made, site)[LAYER]
        for positions, value in ((PLACE, own[..., PLACE, :][0]), ("all", own[0]), ([2, 7], own[..., [2, 7], :])):
            with patch(made, site, LAYER, positions, value):
                assert same(logits_of(model), untouched), (site, positions)


@pytest.mark.parametrize("name", few_first(FAMILIES))
def test_hidden_states_count_as_transformers_does(name: str):
    """Another prompt's states are put in; from there on the model says what it says of the other prompt."""
    model = plain(name)
    with torch.no_grad():
        other = model(OTHER_IDS, output_hidden_states=True, use_cache=False)
    for number in (0, 1, NUM_LAYERS - 1, NUM_LAYERS, -1):
        stored = other.hidden_states[number]
        with patch(model, "hidden_states", number, None, stored), torch.no_grad():
            output = model(IDS, output_hidden_states=True, use_cache=False)
        assert torch.equal(output.hidden_states[number], stored)
        if name != "mpt":
            assert same(output.logits, other.logits), number
        if number > 0:
            assert not torch.equal(output.hidden_states[number - 1], other.hidden_states[number - 1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "phi", "gemma2"])
def test_add_and_project_out(name: str):
    model = plain(name)
    block = blocks_of(name, model)[LAYER]
    value = drawn(SIZE)
    unit = value / value.norm()
    made = proven(model, name, ("resid_post_mlp",))
    changes: dict[Any, Callable[[Tensor], Tensor]] = {
        "add": lambda x: x + value,
        "project_out": lambda x: x - (x @ unit)[..., None] * unit,
    }
    for mode, change in changes.items():
        with by_hand(block, slice(2, 6), change, at="output"):
            expected = logits_of(model)
        with patch(model, "resid_post_mlp", LAYER, slice(2, 6), value, mode=mode):
            assert same(logits_of(model), expected)
            after = recorded(made, "resid_post_mlp")[LAYER]
    assert (after[:, 2:6] @ unit).abs().max() < 1e-5
    assert (after[:, :2] @ unit).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_queries_keys_and_values_are_those_that_attention_reads(attention: str, monkeypatch: pytest.MonkeyPatch):
    """By hand: values behind their projection, queries and keys behind the rotary embedding."""
    model = tiny_model("llama", attention=attention)
    values = {"queries": drawn(4, 8), "keys": drawn(2, 8, seed=1), "values": drawn(2, 8, seed=2)}
    import transformers.models.llama.modeling_llama as modeling

    rotate = modeling.apply_rotary_pos_emb
    calls: list[int] = []

    def changing(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        query, key = rotate(query, key, *args, **kwargs)
        if len(calls) == LAYER:
            chosen = query if site == "queries" else key
            chosen[:, :, PLACE] = values[site]
        calls.append(1)
        return query, key

    for site in QKV_SITES:
        calls.clear()
        if site == "values":
            put = values[site].flatten().expand
            projection = model.model.layers[LAYER].self_attn.v_proj
            with by_hand(projection, PLACE, lambda x, put=put: put(x.shape), at="output"):
                expected = logits_of(model)
        else:
            with monkeypatch.context() as patched:
                patched.setattr(modeling, "apply_rotary_pos_emb", changing)
                expected = logits_of(model)
        with patch(model, site, LAYER, PLACE, values[site]):
            mine = logits_of(model)
        assert same(mine, expected)
        assert not same(mine, logits_of(model))
        assert model.config._attn_implementation == attention


def test_project_out_of_queries_goes_head_by_head_and_leaves_a_zero_row_alone():
    model = plain("llama")
    made = proven(model, "llama", ("queries",))
    directions = drawn(4, 8)
    directions[2] = 0
    before = recorded(made, "queries")[LAYER]
    with patch(made, "queries", LAYER, "all", directions, mode="project_out"):
        after = recorded(made, "queries")[LAYER]
    along = torch.einsum("bhte,he->bht", after, directions).abs().amax((0, 2))
    assert along.max() < 1e-5
    assert torch.equal(after[:, 2], before[:, 2])
    assert not same(after[:, 1], before[:, 1])


GENERATIONS: list[tuple[str, str, Any, str]] = [
    ("llama", "resid_post_mlp", -1, "replace"),
    ("llama", "resid_pre_attn", [1, LENGTH + 2], "replace"),
    ("llama", "resid_post_attn", slice(-2, None), "add"),
    ("llama", "hidden_states", "all", "project_out"),
    ("llama", "queries", slice(LENGTH, None), "replace"),
    ("llama", "keys", [3, LENGTH + 1], "replace"),
    ("llama", "values", "all", "add"),
    ("gpt2", "values", slice(3, 12, 2), "replace"),
    ("gpt2", "resid_post_mlp", "all", "add"),
    ("opt", "resid_post_attn", slice(4, LENGTH + 2), "replace"),
    ("bloom", "resid_post_attn", [2, LENGTH], "replace"),
    ("falcon", "resid_pre_attn", slice(LENGTH - 1, None), "add"),
    ("mistral", "keys", [7, LENGTH + 2], "replace"),
    ("gemma2", "values", slice(6, None), "add"),
    ("gemma2", "resid_embed", slice(6, None), "add"),
    ("deepseek_v3", "keys", [2, LENGTH], "replace"),
]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("name", "site", "positions", "mode"), GENERATIONS)
def test_generating_with_a_cache_is_generating_without(name: str, site: str, positions: Any, mode: Any, num_beams: int):
    model = plain(name)
    layer = 0 if site == "resid_embed" else LAYER
    made = proven(model, name, ("resid_post_mlp", *((site,) if site in QKV_SITES else ())))
    tail = made.layouts[site].tails[layer] if site in QKV_SITES else (SIZE,)
    value = 3 * drawn(*tail)

    def generated(*, use_cache: bool) -> Any:
        return model.generate(
            torch.cat([IDS, OTHER_IDS]),
            attention_mask=torch.ones(2, LENGTH, dtype=torch.long),
            max_new_tokens=6,
            num_beams=num_beams,
            use_cache=use_cache,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )

    untouched = generated(use_cache=True)
    with patch(model, site, layer, positions, value, mode=mode):
        cached, whole = generated(use_cache=True), generated(use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    assert same(torch.stack(cached.scores), torch.stack(whole.scores))
    assert not same(cached.scores[-1], untouched.scores[-1])


@pytest.mark.parametrize("site", ["keys", "resid_post_mlp"])
def test_a_static_cache_is_as_good(site: str):
    """Its keys are as long as the cache, and the first places are the first tokens."""
    model = plain("llama")
    value = 20 * drawn(2, 8) if site == "keys" else drawn(SIZE)
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with patch(model, site, LAYER, [2, LENGTH + 1], value):
        static = model.generate(IDS, cache_implementation="static", disable_compile=True, **arguments)
        assert torch.equal(static, model.generate(IDS, **arguments))
    assert not torch.equal(static, model.generate(IDS, **arguments))


def test_a_cache_filled_before_counts():
    model = plain("llama")
    value = drawn(SIZE)
    with torch.no_grad():
        past = model(IDS[:, :6], use_cache=True).past_key_values
        with patch(model, "resid_post_mlp", LAYER, [7, -1], value):
            rest = model(IDS[:, 6:], past_key_values=past).logits
        with patch(model, "resid_post_mlp", LAYER, [7, 8], value):
            expected = model(IDS, use_cache=False).logits[:, 6:]
    assert same(rest, expected)


@pytest.mark.parametrize("shape", [(3, SIZE), (2, 3, SIZE)])
def test_rows_go_to_their_positions(shape: tuple[int, ...]):
    model = plain("gpt2")
    made = proven(model, "gpt2", ("resid_post_mlp",))
    value = drawn(*shape)
    ids = torch.cat([IDS, OTHER_IDS])
    for positions, columns in (([5, 0, -1], [5, 0, 8]), (slice(-3, None), [6, 7, 8]), (slice(1, 6, 2), [1, 3, 5])):
        with patch(model, "resid_post_mlp", LAYER, positions, value):
            after = recorded(made, "resid_post_mlp", ids)[LAYER]
        assert torch.equal(after[:, columns], value.expand(2, 3, SIZE))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_arrays_of_a_dataset_are_taken_as_they_are(dtype: Any):
    model = plain("llama")
    array = drawn(SIZE).numpy().astype(dtype)
    array.flags.writeable = False  # as mapped from a shard
    with patch(model, "hidden_states", 1, 3, array), torch.inference_mode():
        hidden = model(IDS, output_hidden_states=True).hidden_states[1]
    assert np.array_equal(hidden[0, 3].numpy(), array.astype(np.float32))


def test_a_low_precision_model_gets_its_own_dtype():
    model = tiny_model("llama", "bfloat16")
    value = drawn(SIZE)
    for mode in ("replace", "add", "project_out"):
        with patch(model, "resid_post_mlp", LAYER, 3, value, mode=mode), torch.no_grad():
            hidden = model(IDS, output_hidden_states=True).hidden_states[LAYER + 1]
        assert hidden.dtype == torch.bfloat16
    assert abs((hidden[0, 3].float() @ value / value.norm()).item()) < 0.02


@pytest.mark.parametrize("site", ["resid_post_mlp", "resid_post_attn", "keys", "hidden_states"])
@pytest.mark.parametrize("mode", ["replace", "add", "project_out"])
def test_gradients_flow_into_the_value(site: str, mode: Any):
    """Against finite differences, in float64; the weights want gradients too."""
    model = tiny_model("gpt2", "float64", None)  # llama's norms compute in float32 whatever the dtype
    value = drawn(*((4, 8) if site == "keys" else (SIZE,))).double().requires_grad_()

    def loss(value: Tensor) -> Tensor:
        with patch(model, site, LAYER, [1, PLACE], value, mode=mode):
            return model(IDS, use_cache=False).logits.log_softmax(-1)[0, :, 5].sum()

    (gradient,) = torch.autograd.grad(loss(value), value)
    direction = drawn(*value.shape, seed=5).double()
    with torch.no_grad():
        slope = (loss(value + 1e-5 * direction) - loss(value - 1e-5 * direction)) / 2e-5
    assert gradient.abs().max() > 0
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)


def test_a_patch_opened_first_is_applied_first():
    model = plain("llama")
    made = proven(model, "llama", ("resid_post_mlp", "resid_post_attn", "values"))
    for site, shape in (("resid_post_mlp", (SIZE,)), ("resid_post_attn", (SIZE,)), ("values", (2, 8))):
        value, more = drawn(*shape), drawn(*shape, seed=1)
        with patch(made, site, 1, 3, value), patch(made, site, 1, 3, more, mode="add"):
            inner_adds = recorded(made, site)[1][..., 3, :]
        with patch(made, site, 1, 3, more, mode="add"), patch(made, site, 1, 3, value):
            inner_replaces = recorded(made, site)[1][..., 3, :]
        assert torch.equal(inner_adds[0], value + more)
        assert torch.equal(inner_replaces[0], value)


def test_patches_of_several_sites_and_layers_work_together():
    model = plain("llama")
    untouched = model.config._attn_implementation
    made = proven(model, "llama", ("queries", "values", "resid_post_mlp"))
    query, value, stream = drawn(4, 8), drawn(2, 8), drawn(SIZE)
    with (
        patch(model, "queries", 0, 2, query),
        patch(model, "values", 1, 5, value),
        patch(model, "resid_post_mlp", 1, 7, stream),
    ):
        assert torch.equal(recorded(made, "queries")[0][0, :, 2], query)
        assert torch.equal(recorded(made, "values")[1][0, :, 5], value)
        assert torch.equal(recorded(made, "resid_post_mlp")[1][0, 7], stream)
    assert model.config._attn_implementation == untouched


def test_the_proof_of_an_inner_patch_leaves_an_outer_one_in_peace():
    model = tiny_model("llama")
    value = drawn(2, LENGTH, SIZE)  # would fit no other batch than its own
    ids = torch.cat([IDS, OTHER_IDS])
    with patch(model, "resid_pre_attn", 1, "all", value), patch(model, "values", 2, 0, drawn(2, 8)):
        first = logits_of(model, ids)
    with patch(model, "values", 2, 0, drawn(2, 8)), patch(model, "resid_pre_attn", 1, "all", value):
        assert torch.equal(first, logits_of(model, ids))


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "phi"])
def test_captured_replaced_and_captured_again(name: str):
    """States of one text put into another: from there on the capture is that of the first text."""
    model = plain(name)
    made = proven(model, name, ("hidden_states", "attentions", "resid_post_mlp"))
    config = CaptureConfig(sites=("hidden_states", "attentions", "resid_post_mlp"))
    texts = [Text(ids[0].tolist(), 4) for ids in (IDS, OTHER_IDS)]
    stored, untouched = (capture(made, [text], config)[0] for text in texts)
    for number in (1, NUM_LAYERS):
        states = hidden_of(stored)[number]
        with patch(made, "hidden_states", number, None, states):
            again = capture(made, [texts[1]], config)[0]
        hidden = hidden_of(again)
        assert np.array_equal(hidden[number], states)
        for later in range(number, NUM_LAYERS + 1):
            assert np.allclose(hidden[later], hidden_of(stored)[later], atol=1e-5)
        for earlier in range(number):
            assert np.array_equal(hidden[earlier], hidden_of(untouched)[earlier])
        assert np.array_equal(again.next_tokens.predicted_ids, stored.next_tokens.predicted_ids)
        if number == 1:
            assert np.array_equal(again.tensors["resid_post_mlp"][0], states)
            assert np.allclose(again.tensors["attentions"][1:], stored.tensors["attentions"][1:], atol=1e-5)
    assert not np.array_equal(stored.next_tokens.predicted_ids, untouched.next_tokens.predicted_ids)
    final = capture(made, [texts[1]], config)[0]
    assert all(np.array_equal(a, b) for a, b in zip(hidden_of(final), hidden_of(untouched), strict=True))


def test_steering_at_the_last_hidden_state_reaches_the_head_once():
    """The head is run by itself in a capture; what was added must not be added there again."""
    model = plain("llama")
    made = proven(model, "llama", ("hidden_states",))
    text = Text(IDS[0].tolist(), 1)
    with patch(made, "hidden_states", -1, "all", 2 * drawn(SIZE), mode="add"):
        logprobs = logits_of(model).log_softmax(-1)
        trace = capture(made, [text], CaptureConfig(sites=("hidden_states",)))[0]
    expected = logprobs[0, :-1].gather(1, IDS[0, 1:, None])[:, 0]
    assert np.allclose(trace.next_tokens.logprobs, expected.numpy(), atol=1e-5)


def test_sinks_of_nested_records_are_both_called():
    model = plain("llama")
    made = proven(model, "llama", ("attentions", "queries"))
    calls: list[tuple[str, str, int]] = []

    def sink(who: str) -> Callable[[str, int, Tensor], None]:
        return lambda site, layer, x: calls.append((who, site, layer))

    with (
        record(model, made.anatomy, ("attentions", "queries"), sink("outer")),
        record(model, made.anatomy, ("queries",), sink("inner")),
    ):
        logits_of(model)
    expected = [("outer", "queries"), ("inner", "queries"), ("outer", "attentions")]
    assert calls == [(who, site, layer) for layer in range(NUM_LAYERS) for who, site in expected]


def test_a_patch_of_one_model_does_not_touch_another():
    model, other = tiny_model("llama", attention=None), tiny_model("llama", attention=None, seed=2)
    untouched = logits_of(other)
    made = proven(other, "llama", ("queries",))
    queries = recorded(made, "queries")
    with patch(model, "queries", 1, 3, drawn(4, 8)):
        assert torch.equal(logits_of(other), untouched)
        assert torch.equal(recorded(made, "queries")[1], queries[1])
        logits_of(model)


@pytest.mark.parametrize("site", ["resid_post_attn", "values", "hidden_states"])
def test_everything_is_restored_after_an_exception(site: str):
    model = tiny_model("llama", attention="sdpa").train()
    shape = (2, 8) if site == "values" else (SIZE,)
    with patch(model, site, 1, 3, drawn(*shape)):
        pass  # the proof is done, and transformers has put its own hooks on
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    untouched = logits_of(model)
    with pytest.raises(IndexError), patch(model, site, 1, 3, drawn(*shape)):
        logits_of(model, IDS + 97)  # no such ids
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert torch.equal(logits_of(model), untouched)


def test_positions_that_no_pass_reached_are_an_error_on_leaving():
    model = plain("llama")
    with (
        pytest.raises(ConfigError, match=r"resid_post_mlp, layer 1: positions \[20\] were never reached.*first pass"),
        patch(model, "resid_post_mlp", 1, [3, 20], drawn(SIZE)),
    ):
        logits_of(model)
    with (
        pytest.raises(ConfigError, match=r"positions slice\(20, 30, None\) were never reached"),
        patch(model, "resid_post_mlp", 1, slice(20, 30), drawn(SIZE)),
    ):
        logits_of(model)
    with patch(model, "resid_post_mlp", 1, 20, drawn(SIZE)):
        pass  # nothing ran, so nothing was missed


@pytest.mark.parametrize(
    ("site", "layer", "positions", "value", "message"),
    [
        ("resid_post_mlp", 1, 3, torch.zeros(5), r"a value of \(5,\); expected \(32,\) or \(P, 32\) or \(B, P, 32\)"),
        ("resid_post_mlp", 1, 3, torch.zeros(1, 1, 1, 32), r"a value of \(1, 1, 1, 32\); expected \(32,\) or"),
        ("keys", 1, 3, torch.zeros(4, 8), r"a value of \(4, 8\); expected \(2, 8\) or \(2, P, 8\) or \(B, 2, P, 8\)"),
        ("resid_post_mlp", 1, [3, 4], torch.zeros(3, 32), r"has 3 rows for 2 positions"),
        ("resid_post_mlp", 1, "all", torch.zeros(8, 32), r"has 8 rows for 9 positions"),
        ("resid_post_mlp", 1, [3, 4], torch.zeros(3, 2, 32), r"a value \(3, 2, 32\) for 1 rows"),
        ("resid_post_mlp", 1, 3, torch.full((32,), torch.nan), "the value is not finite in the model's torch.float32"),
        ("resid_post_mlp", 3, 3, torch.zeros(32), "resid_post_mlp, layer 3: the model has layers 0, 1, 2 there"),
        ("hidden_states", -5, 3, torch.zeros(32), "hidden_states, layer -5: the model has layers 0, 1, 2, 3 there"),
        ("resid_embed", 1, 3, torch.zeros(32), "resid_embed, layer 1: the model has layers 0 there"),
        ("resid_post_mlp", 1, -10, torch.zeros(32), r"positions \[-10\]: before the start"),
        ("resid_post_mlp", 1, [8, -1], torch.zeros(32), "twice the same, in a first pass of 9"),
        ("resid_post_mlp", 1, [], torch.zeros(32), r"positions \[\]: none at all"),
        ("resid_post_mlp", 1, slice(5, 2, -1), torch.zeros(32), "a step of -1; expected 1 or more"),
        ("resid_post_mlp", 1, "last", torch.zeros(32), "positions 'last'; expected a number"),
        ("logits", 1, 3, torch.zeros(32), "unknown site 'logits'; sites that can be patched: hidden_states, resid_emb"),
        ("attentions", 1, 3, torch.zeros(32), "attentions cannot be patched: the model hands it out beside"),
        ("topk_ids", 1, 3, torch.zeros(32), "topk_ids cannot be patched"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(site: str, layer: int, positions: Any, value: Tensor, message: str):
    model = plain("llama")
    untouched = logits_of(model)
    with (
        pytest.raises((ConfigError, UnsupportedSiteError), match=message),
        patch(model, site, layer, positions, value),
    ):
        logits_of(model)
    assert torch.equal(logits_of(model), untouched)


def test_modes_and_directions_that_cannot_be_are_refused():
    model = plain("llama")
    for mode, value, message in (
        ("scale", drawn(SIZE), "unknown mode 'scale'; expected one of add, replace, project_out"),
        ("project_out", torch.zeros(SIZE), "the direction to project out is zero"),
        ("project_out", drawn(2, SIZE), r"a value of \(2, 32\); expected \(32,\) for project_out"),
    ):
        with pytest.raises(ConfigError, match=message), patch(model, "resid_post_mlp", 1, 3, value, mode=mode):
            pass


def test_a_value_too_large_for_the_model_s_dtype_is_refused():
    with (
        pytest.raises(ConfigError, match=r"not finite in the model's torch\.float16"),
        patch(tiny_model("llama", "float16"), "resid_post_mlp", 1, 3, np.full(SIZE, 1e6)),
    ):
        pass


def test_rows_end_where_the_prompt_ends():
    model = plain("llama")
    with (
        pytest.raises(ConfigError, match=r"no row of the value \(9, 32\) for position 9; give positions with an end"),
        patch(model, "resid_post_mlp", 1, "all", drawn(LENGTH, SIZE)),
    ):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", PARALLEL)
def test_resid_post_attn_of_parallel_blocks_is_refused_with_the_reason(name: str):
    with (
        pytest.raises(
            UnsupportedSiteError, match="resid_post_attn cannot be patched: its blocks add attention and MLP"
        ),
        patch(plain(name), "resid_post_attn", 1, 3, drawn(SIZE)),
    ):
        pass


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "mpt"])
def test_queries_outside_the_attention_interface_are_refused_with_the_reason(name: str):
    with (
        pytest.raises(UnsupportedSiteError, match="does not go through transformers' AttentionInterface"),
        patch(plain(name), "queries", 1, 3, drawn(4, 8)),
    ):
        pass


def test_a_change_that_the_block_does_not_go_on_with_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A block that keeps the residual in a copy of its own."""
    model = tiny_model("llama")
    made = proven(model, "llama", ("resid_post_attn",))
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    with (
        pytest.raises(UnsupportedSiteError, match="a change of it is not what the MLP's output is added to"),
        patch(made, "resid_post_attn", 1, 3, drawn(SIZE)),
    ):
        pass


def test_hidden_states_that_no_module_gives_are_refused():
    """A model that scales its last hidden state after the final norm."""
    model = tiny_model("llama")

    forward = model.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output["last_hidden_state"] = output.last_hidden_state * 2
        if output.hidden_states is not None:
            output["hidden_states"] = (*output.hidden_states[:-1], output.last_hidden_state)
        return output

    model.model.forward = scaled
    with (
        pytest.raises(UnsupportedSiteError, match=r"hidden_states \[3\] cannot be patched: no module gives them"),
        patch(model, "hidden_states", 1, 3, drawn(SIZE)),
    ):
        pass


def test_a_model_that_fails_its_proof_is_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with (
        pytest.raises(ModelError, match="did not pass its proof: its logits are not finite"),
        patch(model, "resid_post_mlp", 1, 3, drawn(SIZE)),
    ):
        pass


def test_a_sweep_runs_the_proof_once(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    passes: list[int] = []
    with model.register_forward_hook(lambda *_: passes.append(1)):
        with patch(model, "resid_post_mlp", 0, 3, drawn(SIZE)):
            pass
        proof = len(passes)
        assert proof > 3
        for layer in range(NUM_LAYERS):
            with patch(model, "resid_post_mlp", layer, 3, drawn(SIZE)):
                logits_of(model)
        assert len(passes) == proof + NUM_LAYERS
        model.model.layers[0] = tiny_model("llama", seed=3).model.layers[0]
        with patch(model, "resid_post_mlp", 0, 3, drawn(SIZE)):
            pass
        assert len(passes) > proof + NUM_LAYERS + 3


def test_every_causal_family_is_covered_by_one_kind_or_the_other():
    assert {*PARALLEL} <= {*CAUSAL}
    for name in CAUSAL:
        made = proven(plain(name), name, ("resid_post_attn",))
        assert made.resid_rule is not None
        assert (made.resid_rule.side == "derived") == (name in PARALLEL), name
