"""Groups of weights: every matrix in one group, told apart by what a change of it does to the model."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CodeGenConfig, GPTBigCodeConfig, PersimmonConfig, Phi3Config

from builders.degradation.weight_groups import GROUPS, Group, find_group, find_pieces
from tests import tiny_models
from tests.tiny_models import FAMILIES, OTHERS, model_info, tiny_model
from tracekit.config import ModelConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.model.hooks import record
from tracekit.model.models import load_model, load_tokenizer
from tracekit.model.models import model_info as info_of
from tracekit.model.traced import TracedModel

_SIZES: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
FUSED = {
    "phi3": lambda: Phi3Config(**_SIZES, **_WIDTHS, num_key_value_heads=2),
    "persimmon": lambda: PersimmonConfig(**_SIZES, **_WIDTHS),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**_SIZES, **_GPT),
    "gpt_bigcode_many": lambda: GPTBigCodeConfig(**_SIZES, **_GPT, multi_query=False),
    "codegen": lambda: CodeGenConfig(**_SIZES, **_GPT, n_ctx=128, rotary_dim=4),
}
"""Further families that keep several matrices in one tensor."""

ALL = [*FAMILIES, *OTHERS, *FUSED]
ATTENTION_ONLY = ("gptj", "gpt_neo", "mpt", "codegen")
"""Families that hand out attention, but no Q, K and V."""
WITH_GATE = [
    name
    for name in ALL
    if not name.startswith(
        ("gpt2", "gpt_n", "gpt_b", "gptj", "opt", "phi", "bloom", "falcon", "mpt", "bert", "codegen")
    )
    and name != "persimmon"
] + ["phi3"]

IN_NO_GROUP = {
    "opt": {"model.decoder.project_in.weight", "model.decoder.project_out.weight"},
    "opt_post_norm": {"model.decoder.project_in.weight", "model.decoder.project_out.weight"},
    "mixtral": {f"model.layers.{i}.mlp.gate.weight" for i in range(3)},
    "deepseek_v3": {f"model.layers.{i}.mlp.gate.weight" for i in (1, 2)},
    "qwen2_moe": {f"model.layers.{i}.mlp.{name}.weight" for i in range(3) for name in ("gate", "shared_expert_gate")},
    "gpt_oss": {
        f"model.layers.{i}.mlp.{name}"
        for i in range(3)
        for name in ("router.weight", "experts.gate_up_proj_bias", "experts.down_proj_bias")
    },
    "lfm2": {f"model.layers.{i}.conv.{name}.weight" for i in (0, 2) for name in ("conv", "in_proj", "out_proj")},
    "bert": {"cls.predictions.transform.dense.weight"},
}
"""Besides the output head."""


@pytest.fixture(autouse=True)
def _known_to_tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "OTHERS", OTHERS | FUSED)


def made(name: str, **settings: Any) -> TracedModel:
    return TracedModel(tiny_model(name, **settings), None, model_info(name))


def group(traced: TracedModel, name: str) -> Group:
    return find_group(traced.model, traced.anatomy, name)


def refusal(traced: TracedModel, name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        group(traced, name)
    return str(caught.value)


def parts_of(traced: TracedModel) -> set[str]:
    return {piece.part for piece in find_pieces(traced.model, traced.anatomy)}


# ---------------------------------------------------------------- every matrix is in one group


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_is_in_one_piece_and_what_is_in_none_is_named(name: str) -> None:
    traced = made(name)
    head = traced.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for parameter in traced.model.parameters():
            parameter.zero_()
        for piece in find_pieces(traced.model, traced.anatomy):
            piece.weight.add_(1)
    left_out = set()
    for path, parameter in traced.model.named_parameters():
        if parameter.dim() < 2 or not parameter.any():
            left_out |= {path} if parameter.dim() > 1 else set()
            assert not parameter.any()
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), path
    head_path = next(path for path, parameter in traced.model.named_parameters() if parameter is head.weight)
    assert left_out == IN_NO_GROUP.get(name, set()) | {head_path}


@pytest.mark.parametrize("name", ALL)
def test_attn_and_mlp_are_the_sums_of_their_parts(name: str) -> None:
    traced = made(name)
    present = parts_of(traced)
    for whole in ("attn", "mlp"):
        pieces = {(piece.path, piece.part) for piece in group(traced, whole).pieces}
        finer = [part for part in GROUPS[whole] if part in present]
        sums = [(piece.path, piece.part) for part in finer for piece in group(traced, part).pieces]
        joined = [key for key in pieces if "+" in key[1]]
        assert pieces == {*sums, *joined}
        assert len(sums) == len(set(sums))
        assert bool(joined) == (name == "deepseek_v3" and whole == "attn")


# ---------------------------------------------------------------- what a change does


@cache
def recorded(name: str, changed: str | None, factor: float = 0.5) -> dict[tuple[str, int], Tensor]:
    """Everything captured of a text, with one group of the model multiplied by a factor."""
    traced = made(name)
    traced.find_resid_rule()
    if changed is not None:
        with torch.no_grad():
            for piece in group(traced, changed).pieces:
                piece.weight.mul_(factor)
    sites = ("attentions",) if name in ATTENTION_ONLY else ("queries", "keys", "values")
    if name == "falcon_alibi":
        sites = ()
    seen: dict[tuple[str, int], Tensor] = {}

    def sink(site: str, layer: int, value: Tensor) -> None:
        seen[site, layer] = value.detach().clone()

    resid = ("resid_embed", "resid_pre_attn", "resid_post_attn", "resid_post_mlp")
    with torch.no_grad(), record(traced.model, traced.anatomy, (*sites, *resid), sink, resid_rule=traced.resid_rule):
        traced.run(traced.probe_ids())
    return seen


def moved(name: str, changed: str, factor: float = 0.5) -> set[str]:
    """Sites of layer 1 that a change of a group moves."""
    before, after = recorded(name, None), recorded(name, changed, factor)
    return {
        site for (site, layer), value in before.items() if layer == 1 and not torch.equal(value, after[site, layer])
    }


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("falcon_alibi", "deepseek_v3")])
def test_a_change_of_q_k_or_v_is_seen_in_that_alone(name: str) -> None:
    stream = {"resid_post_attn", "resid_post_mlp"}
    if name in ATTENTION_ONLY:
        expected = {"q": {"attentions"}, "k": {"attentions"}, "v": set()}
    else:
        expected = {"q": {"queries"}, "k": {"keys"}, "v": {"values"}}
    for part, sites in expected.items():
        factor = -1.0 if name in ("qwen3", "gemma3", "olmo2", "lfm2") else 0.5  # a norm of q and k undoes a factor
        assert moved(name, f"{part}:1", factor) == sites | stream, part
    assert moved(name, "o:1", -1.0) == stream


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("falcon_alibi", "deepseek_v3")])
def test_all_of_q_k_and_v_is_their_group(name: str) -> None:
    """Without its group nothing of it is left: the recorded tensor no longer depends on the tokens."""
    if name in ATTENTION_ONLY:
        without_v = recorded(name, "v:1", 0.0)
        difference = without_v["resid_post_attn", 1] - without_v["resid_pre_attn", 1]
        assert torch.allclose(difference, difference[:, :1].expand_as(difference), atol=1e-6)
        without_q, without_k = (recorded(name, f"{part}:1", 0.0)["attentions", 1] for part in "qk")
        assert torch.equal(without_q, without_k)  # all scores are 0, but for ALiBi
        return
    value = recorded(name, "v:1", 0.0)["values", 1]
    assert torch.allclose(value, value[:, :, :1].expand_as(value), atol=1e-6)
    for part, site in (("q", "queries"), ("k", "keys")):
        norms = recorded(name, f"{part}:1", 0.0)[site, 1].norm(dim=-1)  # rotation keeps the norm of a bias
        assert torch.allclose(norms, norms[..., :1].expand_as(norms), atol=1e-5)


def test_a_shared_factor_moves_what_it_is_a_factor_of() -> None:
    stream = {"resid_post_attn", "resid_post_mlp"}
    assert moved("deepseek_v3", "q:1") == {"queries"} | stream
    assert moved("deepseek_v3", "o:1") == stream


@pytest.mark.parametrize("name", ALL)
def test_a_change_of_the_mlp_is_seen_after_it_and_one_of_the_embeddings_from_the_start(name: str) -> None:
    present = parts_of(made(name))
    for part in ("mlp", *(part for part in ("gate", "up", "down") if part in present)):
        assert moved(name, f"{part}:1", -0.5) == {"resid_post_mlp"}, part
    before, after = recorded(name, None), recorded(name, "embed", -1.0)
    assert not torch.equal(before["resid_embed", 0], after["resid_embed", 0])


def mlp_output(name: str, part: str, factor: float) -> Tensor:
    """What the MLP of layer 1 gives, with one of its parts multiplied."""
    traced = made(name)
    with torch.no_grad():
        for piece in group(traced, f"{part}:1").pieces:
            piece.weight.mul_(factor)
        block: Any = traced.anatomy.blocks[1]
        kept: list[Tensor] = []
        mlp = block.feed_forward if hasattr(block, "feed_forward") else block.mlp
        mlp.register_forward_hook(
            lambda module, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        traced.run(traced.probe_ids())
    return kept[0].double()


def bend(function: Callable[[float], Tensor]) -> float:
    """How far a function of a factor is from a straight line, relative to its slope."""
    low, middle, high = (function(factor) for factor in (0.5, 1.5, 2.5))
    return ((low - 2 * middle + high).abs().max() / (high - low).abs().max()).item()


@pytest.mark.parametrize("name", WITH_GATE)
def test_an_mlp_is_linear_in_up_and_down_and_not_in_gate(name: str) -> None:
    bends = {part: bend(lambda factor, part=part: mlp_output(name, part, factor)) for part in ("gate", "up", "down")}
    assert bends["up"] < 1e-5
    assert bends["down"] < 1e-5
    assert bends["gate"] > 1e-3


# ---------------------------------------------------------------- names


def test_layers_are_counted_as_those_of_a_capture() -> None:
    traced = made("llama")

    def layers(name: str) -> list[int | None]:
        return [piece.layer for piece in group(traced, name).pieces]

    assert layers("q") == [0, 1, 2]
    assert layers("q:all") == [0, 1, 2]
    assert layers("q:0") == [0]
    assert layers("q:1-2") == [1, 2]
    assert layers("q:-1") == [2]
    assert layers("mlp:-1") == [2, 2, 2]
    assert layers("embed") == [None]
    lfm2 = made("lfm2")
    assert [piece.layer for piece in group(lfm2, "q:-1").pieces] == [3]
    assert [piece.path for piece in group(traced, "attn:1").pieces] == [
        f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"
    ]
    assert group(traced, "attn:1").num_weights == 2 * (32 * 32 + 16 * 32)


def test_experts_are_pieces_of_their_own() -> None:
    pieces = group(made("mixtral"), "gate:2").pieces
    assert [piece.path for piece in pieces] == [f"model.layers.2.mlp.experts.gate_up_proj[{e}]" for e in range(4)]


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (
            "llama",
            "heads",
            "group 'heads'; expected one of attn, mlp, embed, q, k, v, o, gate, up, down, with layers as in mlp:4-8, "
            "q:0, attn:-1",
        ),
        (
            "gpt2",
            "gate:0",
            "group 'gate:0': gpt2 has none; it has attn (12,288), mlp (24,576), embed (7,200), q (3,072), k (3,072), "
            "v (3,072), o (3,072), up (12,288), down (12,288)",
        ),
        ("llama", "mlp:3", "layer '3' - at `mlp:3`; the model has layers 0 to 2 there"),
        ("llama", "mlp:", "layer '' - at `mlp:`; expected all, 12, -1 or 4-8"),
        ("lfm2", "q:2", "layers '2' - at `q:2`; none of them gives this site"),
        ("llama", "embed:0", "group 'embed:0': embeddings are in no layer; give embed"),
        (
            "deepseek_v3",
            "k:0",
            "group 'k:0': in deepseek_v3 model.layers.0.self_attn.kv_a_proj_with_mqa.weight holds k+v in one tensor, "
            "and they cannot be told apart; the coarser group attn exists",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_name(family: str, name: str, message: str) -> None:
    assert refusal(made(family), name) == message


def test_a_fused_tensor_of_an_unknown_arrangement_is_one_piece() -> None:
    traced = made("gpt_neox")
    unknown = traced.anatomy._replace(model_type="novel")
    assert {piece.part for piece in find_group(traced.model, unknown, "attn").pieces} == {"q+k+v", "o"}
    with pytest.raises(ConfigError, match=r"holds q\+k\+v in one tensor, and they cannot be told apart; the coarser"):
        find_group(traced.model, unknown, "v")


def test_tied_embeddings_are_noticed() -> None:
    assert group(made("gpt2"), "embed").note == "embed is tied to the output head: damaging it changes both"
    assert group(made("llama"), "embed").note is None
    assert group(made("gpt2"), "mlp").note is None


# ---------------------------------------------------------------- what cannot be


def test_a_matrix_that_no_row_knows_is_refused() -> None:
    traced = made("llama")
    traced.anatomy.blocks[1].register_module("mixer", nn.Linear(32, 32))
    with pytest.raises(ModelError, match=r"llama: mixer is a matrix of its blocks that .* has no row for"):
        group(traced, "mlp")


def test_a_fused_tensor_whose_size_contradicts_the_configuration_is_refused() -> None:
    traced = made("gpt_neox")
    traced.model.config.num_attention_heads = 3
    with pytest.raises(
        ModelError, match=r"query_key_value\.weight \(96, 32\) should hold q, k, v along axis 0, of 3 \+"
    ):
        group(traced, "q")


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantised_weights_are_refused(quantize: Any, model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(model=str(model), quantize=quantize, device="cpu")
    loaded = load_model(config, info_of(config, variant="base"), load_tokenizer(config), ())
    kind = "int8" if quantize == "int8" else "uint8"
    with pytest.raises(
        ConfigError, match=rf"the weights are quantised \({kind}\): .* Leave --quantize out; .* give the one"
    ):
        group(loaded, "mlp")


def test_an_adapter_beside_the_weights_is_refused() -> None:
    traced = made("llama")
    adapted = get_peft_model(traced.model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"has an adapter beside its weights, .* load it with --merge-adapter"):
        find_group(adapted, traced.anatomy, "q")
