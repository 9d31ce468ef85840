"""Multiple choice: every number of every encoder family against plain transformers, eager, padded, in one call."""

from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    BertConfig,
    CamembertConfig,
    ConvBertConfig,
    Data2VecTextConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ErnieConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    RobertaPreLayerNormConfig,
    XLMRobertaConfig,
    XLMRobertaXLConfig,
)

from tests.tiny_models import model_info
from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, ConfigError, UnsupportedSiteError
from tracekit.model.capture import Text
from tracekit.model.choices import Choices, ChoiceTrace, capture_choices, check_choice_config
from tracekit.model.proof import prove, replay
from tracekit.model.traced import TracedModel
from tracekit.sites import resolve_sites

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
DEBERTA: dict[str, Any] = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=37, max_position_embeddings=64, initializer_range=0.3
    ),
    "camembert": CamembertConfig(**SIZES),
    "mpnet": MPNetConfig(**SIZES),
    "deberta-v2": DebertaV2Config(**DEBERTA, type_vocab_size=0),
    "deberta-v3": DebertaV2Config(
        **DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0
    ),
    "xlm-roberta": XLMRobertaConfig(**SIZES),
    "ernie": ErnieConfig(**SIZES),
    "data2vec-text": Data2VecTextConfig(**SIZES),
    "xlm-roberta-xl": XLMRobertaXLConfig(**SIZES),
    "roberta-prelayernorm": RobertaPreLayerNormConfig(**SIZES),
    "modernbert": ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}
FAMILIES = tuple(CONFIGS)
PRE_LN = ("xlm-roberta-xl", "roberta-prelayernorm", "modernbert")
"""Families whose last hidden state is after a final norm."""
SITES = ("hidden", "attn", "qkv", "resid")
QUESTIONS = ((5, 9, 7), (12, 4))
"""Tokens of each option of each question: mixed lengths, and different numbers of options."""


class Made(NamedTuple):
    traced: TracedModel
    items: list[Choices]
    traces: list[ChoiceTrace]
    outputs: list[Any]
    """Plain transformers' output of each question, options padded to one length: (1, C, T)."""


def items_of(name: str) -> list[Choices]:
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> Text:
        ids = torch.randint(5, 99, (length,), generator=generator).tolist()
        has_segments = name in ("bert", "electra")
        return Text(
            ids, length, token_type_ids=[int(i >= length // 2) for i in range(length)] if has_segments else None
        )

    return [Choices([text(length) for length in lengths]) for lengths in QUESTIONS]


def build(name: str) -> TracedModel:
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(CONFIGS[name])
    return TracedModel(model, None, model_info(name), head="choices")


@cache
def made(name: str) -> Made:
    traced = build(name)
    prove(traced, resolve_sites(SITES))
    items = items_of(name)
    outputs = [plain(traced, item) for item in items]
    return Made(traced, items, capture_choices(traced, items, CaptureConfig(sites=SITES)), outputs)


def plain(traced: TracedModel, item: Choices) -> Any:
    model = traced.model
    longest = max(len(text.token_ids) for text in item.texts)

    def padded(rows: list[list[int]], value: int = 0) -> torch.Tensor:
        return torch.tensor([[row + [value] * (longest - len(row)) for row in rows]])

    inputs = {
        "input_ids": padded([text.token_ids for text in item.texts], model.config.pad_token_id or 0),
        "attention_mask": padded([[1] * len(text.token_ids) for text in item.texts]),
    }
    if item.texts[0].token_type_ids is not None:
        inputs["token_type_ids"] = padded([list(text.token_type_ids or []) for text in item.texts])
    before = model.config._attn_implementation
    if traced.anatomy.family is None:
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    if traced.anatomy.family is None:
        model.set_attn_implementation(before)
    return output


def options(item: Choices) -> list[tuple[int, int, int]]:
    """Number, first and last token of each option."""
    return [(c, a, b) for c, (a, b) in enumerate(zip(item.offsets, item.offsets[1:], strict=False))]


def attention_of(trace: ChoiceTrace, item: Choices, number: int) -> np.ndarray:
    """(L, H, T, T) of one option."""
    lengths = np.diff(item.offsets)
    start = int((lengths[:number] ** 2).sum())
    length = int(lengths[number])
    packed = trace.tensors["attentions"][:, :, start : start + length**2]
    return packed.reshape(*packed.shape[:2], length, length)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_hidden_states_and_attention_are_those_of_plain_transformers(name: str):
    traced, items, traces, outputs = made(name)
    assert not traced.is_causal
    for item, trace, output in zip(items, traces, outputs, strict=True):
        assert np.allclose(trace.logits, output.logits[0].numpy(), atol=1e-5)
        for number, start, stop in options(item):
            length = stop - start
            hidden = torch.stack([layer[number, :length] for layer in output.hidden_states]).numpy()
            assert np.allclose(trace.tensors["hidden_states"][:, start:stop], hidden, atol=2e-5)
            given = torch.stack([layer[number, :, :length, :length] for layer in output.attentions]).numpy()
            assert np.allclose(attention_of(trace, item, number), given, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_stream_is_that_of_the_hidden_states(name: str):
    _, _, traces, _ = made(name)
    for trace in traces:
        hidden = trace.tensors["hidden_states"]
        assert np.array_equal(trace.tensors["resid_embed"], hidden[0])
        assert np.array_equal(trace.tensors["resid_pre_attn"], hidden[:-1])
        last = -1 if name in PRE_LN else None
        assert np.array_equal(trace.tensors["resid_post_mlp"][:last], hidden[1:last])
        assert not np.allclose(trace.tensors["resid_post_attn"], hidden[1:], atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_keys_and_values_make_the_attention_and_the_output(name: str):
    """softmax(QK^T * scale + bias) is the stored attention; where there is a bias, Q and K are the projections' own."""
    traced, items, traces, _ = made(name)
    has_bias = name in ("mpnet", "deberta-v2", "deberta-v3")
    for item, trace in zip(items, traces, strict=True):
        for number, start, stop in options(item):
            queries, keys, values = (trace.tensors[site][:, :, start:stop] for site in ("queries", "keys", "values"))
            if not has_bias:
                scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(queries.shape[-1])
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                assert np.allclose(weights, attention_of(trace, item, number), atol=1e-5)
                continue
            family = traced.anatomy.family
            assert family is not None
            for layer, block in enumerate(traced.anatomy.blocks):
                x = torch.from_numpy(trace.tensors["hidden_states"][layer, start:stop])
                for path, mine in zip(family.projections, (queries, keys, values), strict=True):
                    with torch.inference_mode():
                        whole = block.get_submodule(family.attention).get_submodule(path)(x)
                    heads = whole.view(len(x), 4, -1).transpose(0, 1).numpy()
                    assert np.allclose(mine[layer], heads, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_its_neighbours(name: str):
    traced, items, traces, _ = made(name)
    for item, trace in zip(items, traces, strict=True):
        verification = replay(traced, "000000", item, trace, CaptureConfig(sites=SITES))
        assert verification.num_replayed == verification.num_agreeing == 1
        assert max(error.max_rel_error for error in verification.sites) < 1e-5
        assert {"choice_logits", "hidden_states", "attentions", "queries"} <= {e.site for e in verification.sites}


def test_what_is_stored_says_what_it_is():
    _, items, traces, _ = made("bert")
    for item, trace in zip(items, traces, strict=True):
        specs = {spec.name: spec for spec in trace.specs}
        assert specs["hidden_states"].axes == ["L", "T", "D"]
        assert specs["attentions"].axes == ["L", "H", "S"]
        for name, spec in specs.items():
            assert spec.shape == list(trace.tensors[name].shape)
            assert spec.choice_offsets == item.offsets
            assert spec.positions == [[0, item.offsets[-1]]]


def test_a_replay_sees_a_changed_value():
    traced, items, traces, _ = made("bert")
    hidden = traces[0].tensors["hidden_states"].copy()
    hidden[2, 11] += 1
    changed = traces[0]._replace(tensors={**traces[0].tensors, "hidden_states": hidden})
    with pytest.raises(CaptureError, match="sample 000000: hidden_states differs"):
        replay(traced, "000000", items[0], changed, CaptureConfig(sites=SITES))
    other = traces[0]._replace(logits=traces[0].logits + np.float32([0, 0, 0.5]))
    with pytest.raises(CaptureError, match="choice_logits differs"):
        replay(traced, "000000", items[0], other, CaptureConfig(sites=SITES))


def test_what_has_no_meaning_for_encoders_is_refused():
    for change, text in (({"tokens": "answer"}, "--tokens answer"), ({"sites": ("topk",)}, "predicts no next token")):
        with pytest.raises(ConfigError, match=text):
            check_choice_config(msgspec.structs.replace(CaptureConfig(), **change))


def test_a_family_without_a_row_is_refused_by_name():
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(ConvBertConfig(**SIZES, embedding_size=32))
    traced = TracedModel(model, None, model_info("convbert"), head="choices")
    with pytest.raises(UnsupportedSiteError, match=r"convbert .* nothing arrived from attentions"):
        prove(traced, ("attentions",))
    prove(traced, ("hidden_states",))


def test_rows_that_influence_one_another_run_alone():
    traced, items, traces, _ = made("distilbert")
    traced.is_row_coupled = True
    try:
        alone = capture_choices(traced, items, CaptureConfig(sites=SITES))
    finally:
        traced.is_row_coupled = False
    for one, other in zip(alone, traces, strict=True):
        assert one.specs == other.specs
        assert np.allclose(one.tensors["hidden_states"], other.tensors["hidden_states"], atol=1e-5)
