"""Every text architecture of transformers: verified, or refused by name, as builders/ARCHITECTURES.md says.

A few classes here; a slice and all of it under `-m slow`, some minutes.
"""

import gc
import warnings

import numpy as np
import pytest
import torch
import transformers

from tests.architecture_checks import explain_attention, mixes_values, relative
from tests.architecture_page import PAGE, TOLERANCE, Row, cells, committed, counts, status, table
from tests.every_architecture import CASES, judge
from tests.tiny_configs import tiny_config

SLICE = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",  # mixture of experts
    "Llama4ForCausalLM",
    "Gemma2ForCausalLM",  # sliding windows, soft-caps
    "Gemma4ForConditionalGeneration",  # an audio tower without sdpa
    "GptOssForCausalLM",  # sinks
    "DeepseekV3ForCausalLM",  # latent attention
    "DeepseekV32ForCausalLM",  # with an indexer that goes by the name of the implementation
    "JambaForCausalLM",  # state-space hybrids
    "Zamba2ForCausalLM",
    "Qwen3NextForCausalLM",
    "MambaForCausalLM",
    "RwkvForCausalLM",
    "BloomForCausalLM",  # ALiBi
    "MptForCausalLM",
    "GPTJForCausalLM",  # parallel blocks
    "CodeGenForCausalLM",
    "GPTNeoXJapaneseForCausalLM",
    "OPTForCausalLM",
    "XGLMForCausalLM",
    "Gemma3nForCausalLM",  # several residual streams
    "ReformerModelWithLMHead",
    "BertForMultipleChoice",  # encoders
    "ModernBertForMultipleChoice",
    "RoFormerForMultipleChoice",
    "FNetForMultipleChoice",  # padding changes its rows
    "DebertaForMaskedLM",
)


FEW = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM", "JambaForCausalLM", "Gemma3nForCausalLM"),
    *("MptForCausalLM", "BertForMultipleChoice"),
)
"""One of each kind: plain, fused, sinks, hybrid, refused, ALiBi, an encoder."""


def judged(name: str) -> Row:
    """What a sweep says now, whatever transformers warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = judge(CASES[name])
    gc.collect()
    return row


@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in FEW else pytest.mark.slow) for one in SLICE])
def test_a_class_is_what_the_page_says(name: str) -> None:
    row = judged(name)
    assert cells(row) == committed()[name]
    assert row.max_error <= TOLERANCE


def test_the_page_is_of_the_installed_transformers_and_has_every_class() -> None:
    assert f"transformers {transformers.__version__};" in PAGE.read_text("utf-8"), "write it anew: see its first line"
    assert sorted(committed()) == sorted(CASES)


def test_the_reach() -> None:
    verified = [CASES[name].kind for name, row in committed().items() if row[1] == "verified"]
    decoders, encoders = verified.count("decoder"), verified.count("encoder")
    assert decoders >= 150
    assert encoders >= 20
    readme = (PAGE.parents[1] / "README.md").read_text("utf-8")
    assert f"{decoders} decoder and {encoders} encoder classes" in " ".join(readme.split())
    assert not [name for name, row in committed().items() if "WRONG" in row or row[1] == "wrong"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_class_is_what_the_page_says() -> None:
    rows = [judged(name) for name in CASES]
    assert {row.name: cells(row) for row in rows} == committed()
    assert max(row.max_error for row in rows) <= TOLERANCE


# ---------------------------------------------------------------- the measures themselves


def test_a_row_is_read_back_from_the_page_as_it_was_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = {"hidden": "yes", "attn": "alone", "qkv": "no", "resid": "yes", "post_attn": "no", "next": "yes"}
    row = Row("LlamaForCausalLM", "decoder", sites, 3e-7, "it has none")
    (tmp_path / "page.md").write_text(table([row]), "utf-8")
    monkeypatch.setattr("tests.architecture_page.PAGE", tmp_path / "page.md")
    assert committed() == {"LlamaForCausalLM": cells(row)}
    assert (status(row), counts([row], "decoder")) == (
        "in part",
        "0 verified, 1 in part, 0 refused, 0 not run, 0 wrong",
    )


@pytest.mark.parametrize(
    ("sites", "reason", "expected"),
    [
        ({"hidden": "yes", "attn": "wrong"}, "", "wrong"),
        ({"hidden": "no", "attn": "no"}, "why", "refused"),
        ({}, "sees the future", "refused"),
        ({}, "not run here: no library", "not run"),
    ],
)
def test_status(sites: dict[str, str], reason: str, expected: str) -> None:
    assert status(Row("x", "decoder", sites, 0.0, reason)) == expected


def test_tensors_that_differ_in_shape_or_are_not_finite_are_infinitely_far() -> None:
    assert relative(np.ones(3), np.ones(4)) == relative(np.array([np.nan]), np.ones(1)) == float("inf")
    assert relative(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25


def test_attention_follows_from_its_own_queries_and_keys_alone() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, 9, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8))
    hidden = torch.full((9, 9), -torch.inf).triu(1)
    probs = (query @ key.repeat_interleave(2, 0).mT * 0.3 + hidden).softmax(-1)
    assert explain_attention(query, key, probs, cap=None, scale=1.0) < 1e-5
    assert explain_attention(query, key.flip(1), probs, cap=None, scale=1.0) > 0.1
    mixed = (probs @ value.repeat_interleave(2, 0)).transpose(0, 1).reshape(1, 9, 32)
    assert mixes_values(probs, value, [torch.randn(1, 9, 32), mixed]) < 1e-6
    assert mixes_values(probs, value.flip(1), [mixed]) > 0.1


def test_a_tiny_configuration_has_every_kind_of_layer_and_windows_that_bite() -> None:
    config = tiny_config("gemma3_text")
    assert {*config.layer_types} == {"sliding_attention", "full_attention"}
    assert (config.num_hidden_layers, config.hidden_size, config.sliding_window) == (4, 32, 5)
