"""Adapters of every kind: the traced model is the adapted one, or the adapter is refused by name."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMultipleChoice

from builders.degradation.weight_groups import find_group
from tests.tiny_checkpoint import CHAT_TEMPLATE, save_tiny_checkpoint, tiny_tokenizer
from tracekit.config import ModelConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.traced import TracedModel

IDS = [3, 5, 20, 7, 9, 6, 30, 41]
PROJECTIONS = ["q_proj", "v_proj"]
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
TARGETED: dict[str, Any] = {**COMMON, "target_modules": PROJECTIONS}

INSIDE: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETED),
    "rslora, all linear layers": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_rslora=True, **COMMON),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETED),
    "lora with biases": lambda: peft.LoraConfig(r=2, bias="all", **TARGETED),
    "lora of embeddings and head": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], **COMMON),
    "lora of the head": lambda: peft.LoraConfig(r=2, target_modules=["lm_head"], **COMMON),
    "lora and a whole head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETED),
    "lora and tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[5, 6], **TARGETED),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[45, 46], target_modules=["embed_tokens"], **COMMON),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **TARGETED),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETED),
    "loha": lambda: peft.LoHaConfig(r=2, **TARGETED),
    "lokr": lambda: peft.LoKrConfig(r=2, **TARGETED),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **TARGETED),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETED),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **COMMON),
    "vera, projections drawn again": lambda: peft.VeraConfig(
        r=4, target_modules=["q_proj"], save_projection=False, **COMMON
    ),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **TARGETED),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, **TARGETED),
    "hra": lambda: peft.HRAConfig(r=2, **TARGETED),
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **COMMON),
}
"""Kinds that change modules of the model."""
OF_TABLES = ("lora of embeddings and head", "lora of the head", "lora and a whole head", "lora and tokens", "tokens")
"""Those that change tables which a tied model shares."""

OUTSIDE: dict[str, Callable[[], Any]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **COMMON),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **COMMON),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **COMMON),
    "CPT": lambda: peft.CPTConfig(cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], **COMMON),
    "LORA, activated": lambda: peft.LoraConfig(r=2, alora_invocation_tokens=[7, 9], **TARGETED),
    "POLY": lambda: peft.PolyConfig(r=2, n_tasks=2, n_skills=2, n_splits=1, **TARGETED),
}
"""Kinds that work in peft's wrapper: its forward, its prompt, or further arguments of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tied", is_tied=True)


def saved(folder: Path, target: Path, make: Callable[[], Any], *, num_rows: int | None = None, **how: Any) -> Path:
    """An adapter that was trained: every weight of its own is moved."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    if num_rows is not None:
        base.resize_token_embeddings(num_rows)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft warns of much that is as wanted here
        wrapped = get_peft_model(base, make())
        torch.manual_seed(1)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape) * 0.3
        wrapped.save_pretrained(target, **how)
    return target


def loaded(folder: Path, adapter: Path, **settings: Any) -> TracedModel:
    config = ModelConfig(model=str(folder), device="cpu", adapter=str(adapter), **settings)
    tokenizer = load_tokenizer(config)
    return load_model(config, model_info(config, variant="base"), tokenizer, ("hidden_states",))


def of_peft(folder: Path, adapter: Path, *, num_rows: int | None = None) -> torch.Tensor:
    """Logits of peft's own model."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    if num_rows is not None:
        base.resize_token_embeddings(num_rows)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=torch.tensor([IDS])).logits


def of_traced(traced: TracedModel) -> torch.Tensor:
    with torch.no_grad():
        return traced.run(torch.tensor([IDS])).logits


@pytest.mark.parametrize(("kind", "which"), [*((kind, "folder") for kind in INSIDE), *((k, "tied") for k in OF_TABLES)])
def test_the_traced_model_is_the_adapted_one(kind: str, which: str, request: pytest.FixtureRequest, tmp_path: Path):
    base = request.getfixturevalue(which)
    adapter = saved(base, tmp_path / "adapter", INSIDE[kind])
    expected = of_peft(base, adapter)
    for is_merged in (False, True):
        traced = loaded(base, adapter, merge_adapter=is_merged)
        torch.testing.assert_close(of_traced(traced), expected, atol=2e-4, rtol=1e-3)
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([IDS])).logits
    assert kind == "tokens" or (expected - bare).abs().max() > 0.05


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_an_adapter_that_works_in_the_wrapper_alone_is_refused_by_its_type(
    kind: str, is_merged: bool, folder: Path, tmp_path: Path
):
    adapter = saved(folder, tmp_path / "adapter", OUTSIDE[kind])
    with pytest.raises(ModelError, match=rf"adapter '.*' \({kind}\)"):
        loaded(folder, adapter, merge_adapter=is_merged)


def rename_all(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("base_model.model.", "base_model.model.other."): value for name, value in weights.items()}


def rename_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first, *others = weights
    renamed = first.replace("base_model.model.", "base_model.model.other.")
    return {renamed: weights[first]} | {name: weights[name] for name in others}


def drop_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(name for name in weights if "base_layer" not in name)  # that one is the model's own
    return {name: value for name, value in weights.items() if name != first}


def add_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}


def cut_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(name for name, value in weights.items() if value.dim() > 0 and value.shape[0] > 1)
    return weights | {first: weights[first][:-1].contiguous()}


def empty(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {}


@pytest.mark.attack
@pytest.mark.parametrize("damage", [rename_all, rename_one, drop_one, add_one, cut_one, empty])
@pytest.mark.parametrize("kind", INSIDE)
def test_keys_that_do_not_fit_the_model_are_refused(
    kind: str, damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: Path, tmp_path: Path
):
    adapter = saved(folder, tmp_path / "adapter", INSIDE[kind])
    path = adapter / "adapter_model.safetensors"
    save_file(damage(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="adapter"):
        loaded(folder, adapter)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("name", "data"),
    [
        *(("adapter_config.json", data) for data in (b"", b"[]", b"null", b"{}", b'{"peft_type": "MAGIC"}', b"\xff")),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "x"}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "target_modules": 5, "r": 2}'),
        *(("adapter_model.safetensors", data) for data in (b"", b"x" * 99, b"\xff" * 99)),
        *(("adapter_model.bin", data) for data in (b"", b"x" * 99, b"\x80\x04cos\nsystem\n.", b"PK\x03\x04")),
    ],
)
def test_files_that_are_no_adapter_are_refused(name: str, data: bytes, folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    if name == "adapter_model.bin":
        (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(data)
    with pytest.raises(ModelError, match="adapter"):
        loaded(folder, adapter)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "nf4"}], ids=str)
def test_an_adapter_works_beside_other_weights(settings: dict[str, str], folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    assert loaded(folder, adapter, **settings).num_layers == 2


def test_an_adapter_of_an_encoder_is_active_in_it(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMultipleChoice(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    wrapped = get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    config = ModelConfig(model=str(tmp_path / "bert"), device="cpu", adapter=str(tmp_path / "adapter"))
    info = model_info(config, variant="base")
    traced = load_model(config, info, load_tokenizer(config), ("hidden_states",), loads="choices")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=ids[:, None]).logits
        torch.testing.assert_close(traced.run(ids).logits, expected)


def test_keys_that_do_not_fit_are_named(folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    path = adapter / "adapter_model.safetensors"
    weights = {name.replace("v_proj", "w_proj"): value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"of 8 keys .* 4 keys that the model .*w_proj.* 4 keys missing .*v_proj"):
        loaded(folder, adapter)


def test_an_adapter_that_was_trained_and_changes_nothing_is_refused(folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 0}))
    with pytest.raises(ModelError, match="changes nothing"):
        loaded(folder, adapter)


@pytest.mark.parametrize("kind", ["lora", "adalora", "ia3", "loha", "oft", "vera"])
def test_an_adapter_as_peft_begins_it_is_let_pass_and_said_to_change_nothing(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), INSIDE[kind]()).save_pretrained(tmp_path / "fresh")
    loaded(folder, tmp_path / "fresh")
    assert "changes nothing" in capsys.readouterr().err


@pytest.mark.attack
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "lora of embeddings and head", "ln tuning"])
def test_values_that_are_not_finite_are_named_by_their_key(kind: str, value: float, folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE[kind])
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    last = [*weights][-1]
    weights[last].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 of its \d+ weights .* not finite \({last}\)"):
        loaded(folder, adapter)


@pytest.mark.attack
@pytest.mark.parametrize(
    "path",
    [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("kind", [name for name in INSIDE if name not in OF_TABLES])
def test_an_adapter_that_would_replace_weights_of_the_base_is_refused(
    kind: str, path: str, folder: Path, tmp_path: Path
):
    adapter = saved(folder, tmp_path / "adapter", INSIDE[kind])
    own = AutoModelForCausalLM.from_pretrained(folder).state_dict()[path.replace(".base_layer", "")]
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{path}": own + 0.1}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 keys that the model has no place for"):
        loaded(folder, adapter)


@pytest.mark.parametrize(("trained", "is_said"), [("org/Tiny", False), ("org/other", True), (None, False)])
def test_an_adapter_of_a_base_with_another_name_is_said_to_be_that(
    trained: str | None, is_said: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": trained}))
    loaded(folder, adapter)
    assert (f"was trained on {trained!r}" in capsys.readouterr().err) == is_said


@pytest.mark.parametrize("group", ["attn", "embed", "mlp"])
@pytest.mark.parametrize("kind", [name for name in INSIDE if name != "ln tuning"])
def test_weights_with_any_adapter_beside_them_are_not_damaged(kind: str, group: str, folder: Path, tmp_path: Path):
    traced = loaded(folder, saved(folder, tmp_path / "adapter", INSIDE[kind]))
    with pytest.raises(ConfigError, match=r"has an adapter beside its weights, .*--merge-adapter"):
        find_group(traced.model, traced.anatomy, group)


def test_weights_beside_tuned_norms_are_all_there_is_and_are_damaged(folder: Path, tmp_path: Path):
    traced = loaded(folder, saved(folder, tmp_path / "adapter", INSIDE["ln tuning"]))
    assert find_group(traced.model, traced.anatomy, "attn").num_weights == 6144


# ---------------------------------------------------------------- what an adapter brings beside its weights


def test_the_tokenizer_and_chat_template_of_an_adapter_are_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    own = AutoTokenizer.from_pretrained(folder)
    config = ModelConfig(model=str(folder), adapter=str(adapter))
    assert load_tokenizer(config).chat_template is None
    (adapter / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert load_tokenizer(config).chat_template == CHAT_TEMPLATE
    own.chat_template = "{{ messages[0]['content'] }}"
    own.add_tokens(["<new>"])
    own.save_pretrained(adapter)
    found = load_tokenizer(config)
    assert not capsys.readouterr().err
    assert found.chat_template == own.chat_template
    assert found.convert_tokens_to_ids("<new>") == len(own) - 1
    (adapter / "tokenizer_config.json").unlink()
    assert load_tokenizer(config).convert_tokens_to_ids("<new>") is None
    assert "tokenizer of adapter" in capsys.readouterr().err


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("which", ["folder", "tied"])
@pytest.mark.parametrize("kind", ["lora", "lora of embeddings and head"])
def test_an_adapter_with_added_tokens_brings_their_rows(
    kind: str, which: str, is_merged: bool, request: pytest.FixtureRequest, tmp_path: Path
):
    base = request.getfixturevalue(which)
    num_rows = AutoModelForCausalLM.from_pretrained(base).config.vocab_size + 3
    adapter = saved(base, tmp_path / "adapter", INSIDE[kind], num_rows=num_rows, save_embedding_layers=True)
    own = AutoTokenizer.from_pretrained(base)
    own.add_tokens(["<one>", "<two>", "<three>"])
    own.save_pretrained(adapter)
    traced = loaded(base, adapter, merge_adapter=is_merged)
    assert traced.num_rows == num_rows
    expected = of_peft(base, adapter, num_rows=num_rows)
    torch.testing.assert_close(of_traced(traced), expected, atol=2e-4, rtol=1e-3)


def test_an_adapter_that_lacks_rows_of_its_added_tokens_is_refused(folder: Path, tmp_path: Path):
    num_rows = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size + 3
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"], num_rows=num_rows, save_embedding_layers=True)
    path = adapter / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "lm_head" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tables of \[323, 320\] rows \(embeddings, head\)"):
        loaded(folder, adapter)


def test_a_head_that_no_checkpoint_has_stays_refused_under_an_adapter(folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora of embeddings and head"])
    shutil.copytree(folder, tmp_path / "body")
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(tmp_path / "body")
    path = adapter / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "lm_head.base_layer" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has no language-model head"):
        loaded(tmp_path / "body", adapter)


def test_an_adapter_is_no_model(folder: Path, tmp_path: Path):
    adapter = saved(folder, tmp_path / "adapter", INSIDE["lora"])
    AutoTokenizer.from_pretrained(folder).save_pretrained(adapter)
    shutil.copytree(folder, tmp_path / "both")
    for path in adapter.glob("adapter_*"):
        shutil.copy(path, tmp_path / "both")
    for model, fault in ((adapter, "it is an adapter.* --adapter"), (tmp_path / "both", "has an adapter beside it")):
        config = ModelConfig(model=str(model), device="cpu")
        with pytest.raises(ModelError, match=fault):
            load_model(config, model_info(config, variant="base"), load_tokenizer(config), ("hidden_states",))
