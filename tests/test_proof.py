"""The proof on loading and the replay of captured samples: good models pass, every planted fault is named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    BigBirdConfig,
    Gemma3nTextConfig,
    MambaConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import causal_mask_function, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from tests.tiny_configs import tiny_config
from tests.tiny_models import CAUSAL, FAMILIES, few_first, model_info, proven, sites_of, tiny_model, token_ids, traced
from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, ModelError, UnsupportedSiteError
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.hooks import EAGER, SDPA, own_eager_attention, record
from tracekit.model.proof import prove, replay
from tracekit.model.traced import SiteLayout, TracedModel, tolerance_of
from tracekit.sites import QKV_SITES

TEXTS = (Text(token_ids(20), 12), Text(token_ids(9, start=5), 4))
SIZES: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def failure_of(model: Any, name: str, sites: tuple[str, ...] | None = None) -> str:
    """What the proof says of a model."""
    with pytest.raises(ModelError) as caught:
        proven(model, name, sites)
    return str(caught.value)


def failed(what: str, name: str = "llama") -> str:
    return f"{name} (tiny/{name}) did not pass its proof: {what}"


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("name", few_first(FAMILIES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_family_passes_and_its_facts_are_measured(name: str, dtype: str) -> None:
    made = traced(name, dtype)
    assert made.is_causal == (name in CAUSAL)
    assert made.rows_sum_to_one == (name != "gpt_oss")
    assert set(made.layouts) == {site for site in sites_of(name) if not site.startswith("topk")}
    assert {layout.dtype for layout in made.layouts.values()} == {getattr(torch, dtype)}


def test_layouts_say_layers_and_sizes() -> None:
    def layout(num_layers: int, *tail: int) -> SiteLayout:
        return SiteLayout(tuple(range(num_layers)), (tail,) * num_layers, torch.float32)

    assert traced("deepseek_v3").layouts == {
        "hidden_states": layout(4, 32),
        "attentions": layout(3, 4),
        "queries": layout(3, 4, 16),
        "keys": layout(3, 4, 16),
        "values": layout(3, 4, 12),
        "resid_embed": layout(1, 32),
        "resid_pre_attn": layout(3, 32),
        "resid_post_attn": layout(3, 32),
        "resid_post_mlp": layout(3, 32),
    }
    keys = traced("llama").layouts["keys"]
    assert keys.tails == ((2, 8),) * 3
    assert keys.is_uniform


def test_a_site_whose_shapes_differ_by_layer_is_not_uniform() -> None:
    hidden = traced("opt").layouts["hidden_states"]
    assert hidden.tails == ((32,), (32,), (32,), (16,))
    assert not hidden.is_uniform


@pytest.mark.parametrize(
    ("name", "path", "side"),
    [
        ("gpt2", "ln_2", "input"),
        ("llama", "post_attention_layernorm", "input"),
        ("gemma2", "pre_feedforward_layernorm", "input"),
        ("opt", "final_layer_norm", "input"),
        ("opt_post_norm", "self_attn_layer_norm", "output"),
        ("bloom", "self_attention", "output"),
        ("bert", "attention.output.LayerNorm", "output"),
        ("gpt_neox", "attention.dense", "derived"),
        ("phi", "self_attn.dense", "derived"),
        ("falcon", "self_attention.dense", "derived"),
        ("gptj", "attn.out_proj", "derived"),
    ],
)
def test_the_place_of_resid_post_attn_is_found(name: str, path: str, side: str) -> None:
    assert traced(name).resid_rule == (path, side)


@pytest.mark.parametrize("name", ["gpt_neox"])
def test_a_parallel_block_is_recognised_whatever_its_weights(name: str) -> None:
    rules = []
    for seed in range(40):
        made = TracedModel(tiny_model(name, seed=seed), None, model_info(name))
        made.find_resid_rule()
        rules.append(made.resid_rule)
    assert {rule and rule.side for rule in rules} == {"derived"}


# ---------------------------------------------------------------- masks


def sees_everything(**arguments: Any) -> Tensor:
    """A mask function that hides nothing."""
    shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
    return torch.zeros(shape, dtype=arguments["dtype"]) if "dtype" in arguments else torch.ones(shape, dtype=torch.bool)


def without_window(**arguments: Any) -> Tensor | None:
    """The eager mask of a model without sliding windows."""
    return eager_mask(**arguments | {"mask_function": causal_mask_function})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("mask", [sees_everything, None])
def test_a_mask_that_lets_the_future_through(
    name: str, mask: Callable[..., Any] | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mask is None:
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, EAGER)
    else:
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, EAGER, mask)
    for sites in (sites_of(name), ("attentions",)):
        with pytest.raises(ModelError) as caught:
            traced(name, dtype, sites=sites)
        assert str(caught.value) in {
            failed("the logits differ while hooks are attached", name),
            failed("attention of layer 0 differs from output_attentions=True", name),
        }


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_mask_for_sdpa_that_lets_the_future_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, SDPA, sees_everything)
    model = tiny_model(name, attention="sdpa")
    assert failure_of(model, name, QKV_SITES) == failed("the logits differ while hooks are attached", name)


def test_a_mask_without_the_models_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, EAGER, without_window)
    assert failure_of(tiny_model("mistral"), "mistral") == failed(
        "the logits differ while hooks are attached", "mistral"
    )


def test_a_decoder_that_sees_the_future_in_plain_transformers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for implementation in ("eager", EAGER):
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, implementation, sees_everything)
    assert failure_of(tiny_model("llama"), "llama") == failed("it attends to the future, and declares itself causal")


def test_a_causal_model_whose_attention_is_not_zero_above_the_diagonal() -> None:
    model = tiny_model("bloom")

    def leak(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0], output[1] + 1e-9

    model.transformer.h[1].self_attention.register_forward_hook(leak)
    assert failure_of(model, "bloom") == failed(
        "a causal model whose attention is not zero above the diagonal", "bloom"
    )


# ---------------------------------------------------------------- hooks and sites


def changed_attention(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[nn.Module], Any]:
    """A stand-in for hooks.own_eager_attention whose output and probabilities are changed."""

    def stand_in(module: nn.Module) -> Any:
        own = own_eager_attention(module)
        return lambda *args, **kwargs: change(*own(*args, **kwargs))

    return stand_in


def test_hooks_that_change_what_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    change = changed_attention(lambda output, probs: (output * 1.2, probs))
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", change)
    assert failure_of(tiny_model("llama"), "llama") == failed("the logits differ while hooks are attached")


def test_probabilities_that_are_not_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    change = changed_attention(lambda output, probs: (output, probs.flip(1)))
    monkeypatch.setattr("tracekit.model.hooks.own_eager_attention", change)
    assert failure_of(tiny_model("llama"), "llama") == failed(
        "attention of layer 0 differs from output_attentions=True"
    )


def test_a_hook_that_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def forgetful(model: Any, anatomy: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with record(model, anatomy, *args, **kwargs):
            yield
        anatomy.blocks[0].register_forward_hook(lambda module, args, output: output + 1e-5)

    monkeypatch.setattr("tracekit.model.proof.record", forgetful)
    assert failure_of(tiny_model("llama"), "llama") == failed("the logits changed after the hooks were taken off")


@pytest.mark.parametrize("site", QKV_SITES)
def test_a_site_whose_replacement_is_ignored(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tracekit.model.hooks._offer",
        lambda sink, sites, layer, qkv: [
            [sink(name, layer, part) for name, part in zip(QKV_SITES, qkv, strict=True) if name in sites],
            qkv,
        ][1],
    )
    assert failure_of(tiny_model("llama"), "llama", (site,)) == failed(f"changing {site} does not change the logits")


def test_a_block_whose_input_does_not_matter() -> None:
    model = tiny_model("llama")
    block, seen = model.model.layers[0], []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(output))
    own = block.forward
    block.forward = lambda hidden_states, **kwargs: own(seen[-1], **kwargs)
    assert failure_of(model, "llama", ("resid_embed",)) == failed("changing resid_embed does not change the logits")


def test_a_stream_that_is_changed_between_two_blocks() -> None:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    assert failure_of(model, "llama", ("resid_pre_attn", "resid_post_mlp")) == failed(
        "resid_post_mlp[0] is not resid_pre_attn[1]"
    )


def test_blocks_in_which_nothing_proves_to_be_resid_post_attn() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: output * 0.9)
    assert failure_of(model, "llama") == "llama: no place in its blocks proves to be resid_post_attn"
    others = tuple(site for site in sites_of("llama") if site != "resid_post_attn")
    assert set(proven(model, "llama", others).layouts) >= {"resid_pre_attn", "resid_post_mlp"}


def test_a_head_that_mixes_positions() -> None:
    class Mixing(nn.Module):
        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, hidden_BTD: Tensor) -> Tensor:
            return self.own(hidden_BTD + hidden_BTD.cumsum(1))

    model = tiny_model("llama")
    model.lm_head = Mixing(model.lm_head)
    assert failure_of(model, "llama", ("hidden_states",)) == failed("its head, run alone, gives other logits")


@pytest.mark.parametrize("sites", [None, ("hidden_states",), ("attentions",), ("topk_ids",)])
@pytest.mark.parametrize("part", ["model.layers.1.mlp.down_proj", "lm_head"])
def test_a_model_with_a_weight_that_is_not_finite(sites: tuple[str, ...] | None, part: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(part).weight[3, 3] = torch.nan
    assert failure_of(model, "llama", sites) == failed(
        "its logits are not finite in float32; use another --dtype or checkpoint"
    )


# ---------------------------------------------------------------- architectures


def from_config(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("sites", [None, ("attentions",)])
def test_a_family_off_the_interface_has_to_be_loaded_eager_for_its_attentions(sites: tuple[str, ...] | None) -> None:
    assert failure_of(tiny_model("falcon", attention="sdpa"), "falcon", sites) == (
        "falcon was loaded with sdpa attention, which returns no probabilities; "
        'load it with attn_implementation="eager"'
    )


def test_a_family_off_the_interface_gives_all_else_with_sdpa() -> None:
    sites = ("hidden_states", *QKV_SITES)
    with_sdpa = capture(
        proven(tiny_model("falcon", attention="sdpa"), "falcon", sites), TEXTS, CaptureConfig(sites=sites)
    )
    eager = capture(traced("falcon", sites=sites), TEXTS, CaptureConfig(sites=sites))
    for mine, other in zip(with_sdpa, eager, strict=True):
        for site in sites:
            np.testing.assert_allclose(mine.tensors[site], other.tensors[site], atol=1e-5)


FAULT = "in transformers' eager attention its ALiBi bias is added twice, in the mask and in the attention"


def test_a_family_whose_eager_attention_is_wrong_in_transformers_must_not_run_in_it() -> None:
    """Falcon with ALiBi: logits up to 2 are off by 0.3."""
    assert failure_of(tiny_model("falcon_alibi", attention="eager"), "falcon_alibi") == (
        f"falcon (tiny/falcon_alibi) did not pass its proof: {FAULT}; load it with sdpa attention"
    )


@pytest.mark.parametrize("sites", [("attentions",), ("hidden_states", "attentions", "queries")])
def test_a_family_whose_eager_attention_is_wrong_gives_no_attentions(sites: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedSiteError) as caught:
        traced("falcon_alibi", sites=sites)
    assert str(caught.value) == f"falcon gives no attentions: {FAULT}; it gives all else"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_attention_that_computes_something_else_than_sdpa(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = modeling_llama.eager_attention_forward

    def sharper(module: nn.Module, *args: Any, scaling: float, **kwargs: Any) -> Any:
        return own(module, *args, scaling=scaling * 3, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sharper)
    model = tiny_model("llama", attention=attention)
    if attention == "sdpa":
        assert failure_of(model, "llama") == failed(
            "its eager attention computes something else than the attention transformers selects"
        )
    else:
        proven(model, "llama")  # a model loaded eager is what eager attention makes of it


@pytest.mark.parametrize("sites", [("attentions",), ("queries", "values")])
def test_a_family_nobody_knows_is_refused_by_name(sites: tuple[str, ...]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = from_config(BigBirdConfig(**SIZES, **sizes, is_decoder=True, attention_type="original_full"))
    with pytest.raises(UnsupportedSiteError) as caught:
        proven(model, "unknown", sites)
    assert str(caught.value) == (
        f"big_bird (tiny/unknown): nothing arrived from {', '.join(sites)}; its attention does not go through "
        "transformers' AttentionInterface and tracekit/model/families.py has no row for it"
    )
    assert proven(model, "unknown", ("hidden_states", "resid_post_attn")).is_causal


def test_a_model_without_a_head() -> None:
    model = AutoModel.from_config(FAMILIES["llama"]())
    with pytest.raises(ModelError) as caught:
        TracedModel(model, None, model_info("llama"))
    assert str(caught.value) == (
        "LlamaModel: no inner model was called; tracekit needs a transformers model with a separate head"
    )


def test_attention_that_does_not_know_its_layer_is_placed_by_its_block() -> None:
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.layer_idx
    made = TracedModel(model, None, model_info("llama"))
    prove(made, ("attentions", "values"))
    assert made.layouts["attentions"].layers == made.layouts["values"].layers == (0, 1, 2)


def test_a_modeling_file_without_eager_attention_is_named() -> None:
    with pytest.raises(ModelError, match=r"^Linear: its modeling file defines no eager_attention_forward$"):
        own_eager_attention(nn.Linear(1, 1))


def test_a_model_without_a_list_of_blocks() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM: found no list of 5 blocks inside LlamaModel$"):
        TracedModel(model, None, model_info("llama"))


def test_a_model_without_attention_is_refused_by_name() -> None:
    model = from_config(MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert "mamba" in failure_of(model, "mamba", ("attentions",))


def test_a_model_without_attention_gives_the_rest() -> None:
    model = from_config(MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4))
    made = proven(model, "mamba", ("resid_embed", "resid_pre_attn", "resid_post_mlp"))
    assert made.is_causal


def test_hidden_states_that_begin_after_the_first_block_are_refused() -> None:
    model = from_config(MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert failure_of(model, "mamba", ("hidden_states",)) == (
        "mamba: transformers' hidden_states do not begin with the embeddings, so its layers would be counted wrongly; "
        "take --sites resid"
    )


def test_a_model_that_draws_its_hashes_anew_is_refused_by_name() -> None:
    model = from_config(tiny_config("reformer"))
    assert failure_of(model, "reformer", ("resid_embed",)) == (
        "reformer (tiny/reformer) cannot be traced: the hashes of its LSH attention are drawn anew in every pass"
    )


def test_a_site_that_a_layer_hands_over_twice_is_refused() -> None:
    model = from_config(tiny_config("diffllama"))
    assert failure_of(model, "diffllama", ("values",)) == (
        "diffllama (tiny/diffllama): values, layer 0, is handed over twice in a pass, with other values; there is one "
        "place for a layer"
    )
    assert {*proven(model, "diffllama", ("attentions", "queries", "keys")).layouts} == {"attentions", "queries", "keys"}


def test_a_head_that_takes_more_than_the_last_hidden_state_is_refused() -> None:
    model = from_config(tiny_config("prophetnet"))
    assert "its head does not run alone, on the last hidden state" in failure_of(model, "prophetnet", ("topk_ids",))


def test_padding_that_changes_a_row_is_measured() -> None:
    assert not proven(tiny_model("llama"), "llama").is_row_coupled
    config = tiny_config("fnet")
    made = TracedModel(AutoModelForMultipleChoice.from_config(config), None, model_info("fnet"), head="choices")
    prove(made, ("hidden_states",))
    assert made.is_row_coupled


def test_a_model_without_token_embeddings() -> None:
    model = AutoModelForMultipleChoice.from_config(tiny_config("canine"))
    with pytest.raises(ModelError, match=r"^CanineForMultipleChoice: it has no table of token embeddings$"):
        TracedModel(model, None, model_info("canine"), head="choices")


def test_an_audio_tower_without_sdpa_keeps_its_own_attention() -> None:
    model = from_config(tiny_config("gemma4"))
    before = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert {*before} == {"eager", "sdpa"}
    proven(model, "gemma4", QKV_SITES)
    after = [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert after == before


@pytest.mark.parametrize("sites", [QKV_SITES, ("attentions",)])
def test_an_indexer_masks_under_the_name_it_knows_and_transformers_own_functions_come_back(
    sites: tuple[str, ...],
) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    proven(from_config(tiny_config("deepseek_v32")), "deepseek_v32", sites)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_several_residual_streams_are_refused_by_name() -> None:
    model = from_config(
        Gemma3nTextConfig(
            **SIZES,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0, 0.0],
        )
    )
    assert "hidden_states" in failure_of(model, "gemma3n", ("hidden_states",))


def test_a_block_may_hand_out_a_list() -> None:
    model = from_config(OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    proven(model, "openai-gpt", ("hidden_states", "resid_pre_attn", "resid_post_mlp"))


@pytest.mark.parametrize("sink", [-6.0, -9.0])
def test_a_weak_sink_is_a_sink(sink: float) -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.sinks.fill_(sink)
    capture(proven(model, "gpt_oss"), TEXTS, CaptureConfig(sites=("attn",)))


# ---------------------------------------------------------------- replay

ANSWER_NUMBERS = {"token_logprobs", "token_entropies"}
REPLAYED = ("llama", "gpt2", "gemma2", "mistral", "gpt_oss", "opt", "bloom", "falcon", "gpt_neo", "deepseek_v3", "bert")


@cache
def captured(name: str, dtype: str = "float32") -> tuple[TracedModel, list[Trace]]:
    """Never altered."""
    made = traced(name, dtype)
    return made, capture(made, TEXTS, CaptureConfig(sites=sites_of(name)))


def altered(trace: Trace, name: str, change: Callable[[np.ndarray], None]) -> Trace:
    """The trace with one tensor changed in place."""
    tensor = trace.tensors[name].copy()
    change(tensor)
    return trace._replace(tensors=trace.tensors | {name: tensor})


@pytest.mark.parametrize("name", few_first(REPLAYED))
def test_a_good_trace_passes(name: str) -> None:
    made, traces = captured(name)
    for text, trace in zip(TEXTS, traces, strict=True):
        result = replay(made, "000001", text, trace, CaptureConfig(sites=sites_of(name)))
        assert result.num_replayed == 1
        assert result.num_positions == result.num_agreeing == len(text.token_ids) - text.prompt_length
        assert {error.site for error in result.sites} == (set(sites_of(name)) | ANSWER_NUMBERS) - {"topk_ids"}
        for error in result.sites:
            assert 0 <= error.max_rel_error < 1e-5
            assert error.min_cosine > 0.999999
            assert error.tolerance == 1e-3


@pytest.mark.parametrize("name", few_first(REPLAYED))
def test_a_good_trace_in_bfloat16_passes(name: str) -> None:
    made, traces = captured(name, "bfloat16")
    result = replay(made, "000001", TEXTS[0], traces[0], CaptureConfig(sites=sites_of(name)))
    assert {error.tolerance for error in result.sites} == {0.1}


@pytest.mark.parametrize(
    "config",
    [
        CaptureConfig(sites=("all",), layers=("-1",), tokens="answer"),
        CaptureConfig(sites=("all",), layers=("0", "2"), tokens="last"),
        CaptureConfig(sites=("all",), tokens="prompt"),
        CaptureConfig(sites=("all",), store_dtype="float16"),
        CaptureConfig(sites=("all",), store_dtype="bfloat16"),
    ],
    ids=["last-layer-answer", "two-layers-last", "prompt", "float16", "bfloat16"],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_part_of_a_trace_passes(name: str, config: CaptureConfig) -> None:
    made = traced(name)
    for text, trace in zip(TEXTS, capture(made, TEXTS, config), strict=True):
        assert replay(made, "000001", text, trace, config).num_replayed == 1


def test_a_text_without_answer_passes() -> None:
    made, config = traced("llama"), CaptureConfig(sites=("all",), tokens="answer")
    text = Text(TEXTS[0].token_ids, len(TEXTS[0].token_ids))
    result = replay(made, "000001", text, capture(made, [text], config)[0], config)
    assert (result.num_positions, result.num_agreeing) == (0, 0)


@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
@pytest.mark.parametrize("site", [site for site in sites_of("llama") if site != "topk_ids"])
def test_a_value_past_the_tolerance_is_named_and_one_within_passes(name: str, site: str) -> None:
    made, traces = captured(name)
    config = CaptureConfig(sites=("all",))

    def shift(share: float) -> Callable[[np.ndarray], None]:
        """Moves a value beside the largest one, so that its layer is the one with the largest value, too."""

        def change(tensor: np.ndarray) -> None:
            flat = tensor.reshape(-1)
            place = int(np.abs(flat).argmax())
            flat[place + 1 if place + 1 < flat.size else place - 1] += share * abs(flat[place])

        return change

    replay(made, "000007", TEXTS[0], altered(traces[0], site, shift(0.9e-3)), config)
    with pytest.raises(CaptureError) as caught:
        replay(made, "000007", TEXTS[0], altered(traces[0], site, shift(1.2e-3)), config)
    assert str(caught.value).startswith(f"sample 000007: {site} differs from a lone eager run by ")
    assert "; tolerance 0.001 and 0.99999. Its batch was not written. " in str(caught.value)


@pytest.mark.parametrize("site", ["hidden_states", "attentions", "keys", "resid_post_attn"])
def test_a_value_that_is_not_a_number_is_past_every_tolerance(site: str) -> None:
    made, traces = captured("llama")

    def change(tensor: np.ndarray) -> None:
        tensor.reshape(-1)[0] = np.nan

    with pytest.raises(CaptureError, match=f"sample 000007: {site} differs"):
        replay(made, "000007", TEXTS[0], altered(traces[0], site, change), CaptureConfig(sites=("all",)))


def test_a_value_that_is_not_a_number_is_seen_in_every_layer_of_a_site_stored_layer_by_layer() -> None:
    made, traces = captured("opt")
    assert "hidden_states.2" in traces[0].tensors
    with pytest.raises(CaptureError, match="sample 000007: hidden_states differs"):
        replay(
            made,
            "000007",
            TEXTS[0],
            altered(traces[0], "hidden_states.2", lambda tensor: tensor.fill(np.nan)),
            CaptureConfig(sites=("all",)),
        )


def test_many_small_errors_are_seen_by_their_cosine() -> None:
    made, traces = captured("llama")

    def change(tensor: np.ndarray) -> None:
        tensor[...] += np.random.default_rng(0).choice([-0.95e-3, 0.95e-3], tensor.shape)

    with pytest.raises(CaptureError, match=r"attentions differs .*, cosine 0\.9999\d+\)"):
        replay(made, "000007", TEXTS[0], altered(traces[0], "attentions", change), CaptureConfig(sites=("all",)))


@pytest.mark.parametrize(
    ("site", "change"),
    [
        ("hidden_states", lambda tensor: tensor.__setitem__(slice(None), np.roll(tensor, 1, axis=1))),  # tokens
        ("hidden_states", lambda tensor: tensor.__setitem__(slice(None), np.roll(tensor, 1, axis=0))),  # layers
        ("attentions", lambda tensor: tensor.__setitem__(slice(None), tensor[:, ::-1].copy())),  # heads
        ("keys", lambda tensor: tensor.__setitem__(slice(None), tensor[:, ::-1].copy())),
        ("values", lambda tensor: tensor.fill(0)),
        ("resid_embed", lambda tensor: tensor.fill(0)),
    ],
)
def test_what_stands_in_the_wrong_place_is_seen(site: str, change: Callable[[np.ndarray], None]) -> None:
    made, traces = captured("llama")
    with pytest.raises(CaptureError, match=f"sample 000007: {site} differs"):
        replay(made, "000007", TEXTS[0], altered(traces[0], site, change), CaptureConfig(sites=("all",)))


def test_a_wrong_layer_is_seen_beside_a_much_larger_one() -> None:
    """Residual streams grow from 0.1 to some 10,000 in real models; here layer 0 is lost whole."""
    made = traced("llama")
    with torch.no_grad():
        made.model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    config = CaptureConfig(sites=("hidden",))
    trace = capture(made, TEXTS[:1], config)[0]
    with pytest.raises(CaptureError, match="hidden_states differs"):
        replay(made, "000007", TEXTS[0], altered(trace, "hidden_states", lambda tensor: tensor[0].fill(0)), config)


@pytest.mark.parametrize("numbers", ["logprobs", "entropies"])
def test_numbers_of_the_answers_tokens_are_replayed(numbers: str) -> None:
    made, traces = captured("llama")
    own = traces[0].next_tokens
    wrong = traces[0]._replace(next_tokens=own._replace(**{numbers: getattr(own, numbers) + np.float32(0.01)}))
    with pytest.raises(CaptureError, match=f"sample 000007: token_{numbers} differs"):
        replay(made, "000007", TEXTS[0], wrong, CaptureConfig(sites=("all",)))


def test_tokens_that_are_predicted_otherwise_are_counted() -> None:
    made, traces = captured("llama")
    own = traces[0].next_tokens
    wrong = own.predicted_ids.copy()
    wrong[2:4] += 1
    other = traces[0]._replace(next_tokens=own._replace(predicted_ids=wrong))
    result = replay(made, "1", TEXTS[0], other, CaptureConfig(sites=("all",)))
    assert (result.num_positions, result.num_agreeing) == (8, 6)


def test_a_trace_of_another_text_is_refused() -> None:
    made, traces = captured("llama")
    other = Text([*TEXTS[0].token_ids[:5], 50, *TEXTS[0].token_ids[6:]], TEXTS[0].prompt_length)
    with pytest.raises(CaptureError, match="sample 000007: "):
        replay(made, "000007", other, traces[0], CaptureConfig(sites=("all",)))


def test_tolerances_go_with_the_dtype_and_quantised_models_are_held_to_the_widest() -> None:
    assert tolerance_of(model_info("llama", "float32")) == (1e-3, 0.99999)
    assert tolerance_of(model_info("llama", "float16")) == (3e-2, 0.999)
    assert tolerance_of(model_info("llama", "bfloat16")) == (1e-1, 0.99)
    quantised = msgspec.structs.replace(model_info("llama"), quantization="nf4")
    assert tolerance_of(quantised) == (1e-1, 0.99)


def test_replay_and_proof_leave_the_attention_as_it_was() -> None:
    made = traced("llama")
    assert made.model.config._attn_implementation == "sdpa"
    config = CaptureConfig(sites=("all",))
    replay(made, "000001", TEXTS[0], capture(made, TEXTS, config)[0], config)
    prove(made, ("attentions",))
    assert made.model.config._attn_implementation == "sdpa"
