"""Checkpoints that are stored quantised: the record names it, and tolerance and row coupling follow."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.runs_for_tests import run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_tokenizer
from tracekit import TraceStore
from tracekit.config import ModelConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_plan
from tracekit.model import demo, references
from tracekit.model.gguf_file import gguf_type
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.quantisation import _name
from tracekit.model.traced import TracedModel, is_quantized, tolerance_of
from tracekit.records import ModelInfo
from tracekit.run.recheck import replay_stored

INT8 = BitsAndBytesConfig(load_in_8bit=True)
EXACT_INT8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def info_of(folder: Path, **settings: Any) -> ModelInfo:
    return model_info(ModelConfig(model=str(folder), device="cpu", **settings), variant="base")


def loaded(folder: Path, **settings: Any) -> TracedModel:
    config = ModelConfig(model=str(folder), device="cpu", **settings)
    sites = ("hidden_states", "attentions", "queries")
    return load_model(config, model_info(config, variant="base"), load_tokenizer(config), sites)


def stored(folder: Path, target: Path, how: BitsAndBytesConfig) -> Path:
    """The checkpoint, saved as bitsandbytes quantised it."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"})
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def declared(folder: Path, target: Path, settings: dict[str, Any]) -> Path:
    """The checkpoint, whose config.json says that it is quantised."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return target


@pytest.mark.parametrize(
    ("how", "name", "is_coupled"),
    [
        (INT8, "int8(threshold=6)", True),
        (EXACT_INT8, "int8(threshold=0)", False),
        (NF4, "nf4", False),
        (FP4, "fp4(double_quant, compute=bfloat16)", False),
    ],
)
def test_a_checkpoint_stored_by_bitsandbytes_is_as_one_quantised_on_loading(
    how: BitsAndBytesConfig, name: str, is_coupled: bool, folder: Path, tmp_path: Path
):
    traced = loaded(stored(folder, tmp_path / "stored", how))
    assert traced.info.quantization == name
    assert traced.is_row_coupled == is_coupled
    assert tolerance_of(traced.info) == tolerance_of(info_of(folder, quantize="nf4"))
    if how is INT8:
        ids = torch.tensor([[3, 7, 11, 30, 41]])
        with torch.no_grad():
            ours, flagged = (one.run(ids).logits for one in (traced, loaded(folder, quantize="int8")))
        assert torch.equal(ours, flagged)


@pytest.mark.parametrize(("width", "inner"), [(33, 65), (30, 50)])
def test_a_4_bit_model_of_odd_width_runs(width: int, inner: int, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert loaded(stored(tmp_path / "plain", tmp_path / "stored", NF4)).num_layers == 2
    assert loaded(tmp_path / "plain", quantize="nf4").num_layers == 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq-4bit"),
        ({"quant_method": "gptq", "bits": 3, "dynamic": {}}, "gptq-3bit"),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq-4bit"),
        ({"quant_method": "awq", "w_bit": 4}, "awq-4bit"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "quanto", "weights": "int8", "activations": None}, "quanto(int8)"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "hqq-4bit"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}},
            },
            "compressed-tensors-4bit",
        ),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
            "torchao(Int8WeightOnlyConfig)",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 3.5}, "int8(threshold=3.5)"),
    ],
)
def test_every_method_has_a_name(settings: dict[str, Any], name: str):
    assert _name(settings, "float32") == name


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"quant_method": "aqlm"}, "aqlm"),
    ],
)
def test_a_quantisation_whose_package_is_missing_names_the_package(
    settings: dict[str, Any], package: str, folder: Path, tmp_path: Path
):
    if importlib.util.find_spec("compressed_tensors" if package == "compressed" else package) is not None:
        pytest.skip(f"{package} is installed here")
    method = settings["quant_method"]
    with pytest.raises(ModelError, match=rf"is quantised \({method}(?s:.)*{package}"):
        info_of(declared(folder, tmp_path / "stored", settings))


@pytest.mark.attack
@pytest.mark.parametrize("settings", [{"quant_method": "magic"}, {"bits": 4}, {"quant_method": None}])
def test_an_unknown_method_is_refused(settings: dict[str, Any], folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"transformers .* does not know"):
        info_of(declared(folder, tmp_path / "stored", settings))


@pytest.mark.attack
@pytest.mark.parametrize(
    "settings",
    [[1], "int8", 5, {"quant_method": []}, {"load_in_8bit": True, "llm_int8_threshold": "x"}, {"load_in_8bit": "x"}],
)
def test_a_malformed_quantisation_is_refused(settings: Any, folder: Path, tmp_path: Path):
    with pytest.raises(ModelError):
        info_of(declared(folder, tmp_path / "stored", settings))


def test_a_quantised_checkpoint_is_not_quantised_again(folder: Path, tmp_path: Path):
    target = stored(folder, tmp_path / "stored", INT8)
    with pytest.raises(ConfigError, match=r"--quantize nf4: .*'stored' is quantised already \(int8\(threshold=6\)\)"):
        info_of(target, quantize="nf4")
    with pytest.raises(ConfigError, match="--merge-adapter: the weights of 'stored' are quantised"):
        info_of(target, adapter=str(target), merge_adapter=True)


def test_fp8_without_a_gpu_says_what_it_computes_in(folder: Path, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("here fp8 may compute as fp8")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    target = declared(folder, tmp_path / "stored", settings | {"modules_to_not_convert": ["lm_head"]})
    weights = load_file(target / "model.safetensors")
    plain = {}
    for name, value in list(weights.items()):
        if "proj" in name:
            blocks = value.reshape(value.shape[0] // 16, 16, value.shape[1] // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            plain[name] = (packed.float() * scale[:, None, :, None]).reshape(value.shape)
            weights[name] = packed.reshape(value.shape)
            weights[f"{name}_scale_inv"] = scale
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    traced = loaded(target, dtype="float32")
    assert traced.info.quantization == "fp8, dequantised to float32"
    assert not is_quantized(traced.info)
    assert tolerance_of(traced.info) == tolerance_of(info_of(folder))
    for name, value in plain.items():
        torch.testing.assert_close(traced.model.get_parameter(name), value, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- GGUF


def save_gguf(folder: Path, path: Path, kind: Kind, file_type: FileType | None) -> Path:
    """The tiny Llama as a GGUF file whose matrices are of a type."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if file_type is not None:
        writer.add_file_type(file_type)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    parts = gguf.TensorNameMap(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        target = parts.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        data = value.float().numpy()
        own = kind if data.ndim == 2 else Kind.F32
        writer.add_tensor(target, gguf.quants.quantize(data.astype(np.float32), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "file_type", "name"),
    [
        (Kind.Q4_0, FileType.MOSTLY_Q4_0, "Q4_0"),
        (Kind.Q4_1, FileType.MOSTLY_Q4_1, "Q4_1"),
        (Kind.Q5_0, FileType.MOSTLY_Q5_0, "Q5_0"),
        (Kind.Q5_1, None, "Q5_1"),
        (Kind.Q8_0, FileType.MOSTLY_Q8_0, "Q8_0"),
        (Kind.Q8_0, FileType.GUESSED, "Q8_0"),
        (Kind.Q8_0, FileType.ALL_F32, "Q8_0"),
        (Kind.Q4_0, FileType.MOSTLY_Q4_K_M, "Q4_K_M"),
        (Kind.F32, FileType.ALL_F32, None),
        (Kind.F16, FileType.MOSTLY_F16, None),
        (Kind.BF16, FileType.MOSTLY_BF16, None),
        (Kind.F16, FileType.MOSTLY_Q4_0, None),
    ],
)
def test_the_type_of_a_gguf_file_is_named(
    kind: Kind, file_type: FileType | None, name: str | None, folder: Path, tmp_path: Path
):
    path = save_gguf(folder, tmp_path / "model.gguf", kind, file_type)
    assert gguf_type(path) == name
    info = info_of(path)
    assert info.quantization == (None if name is None else f"{name}, dequantised to float32")
    assert info.dtype == "float32"
    assert tolerance_of(info) == tolerance_of(info_of(folder))


def test_a_gguf_file_that_is_quantised_loads_and_says_so(folder: Path, tmp_path: Path):
    path = save_gguf(folder, tmp_path / "model.gguf", Kind.Q8_0, FileType.MOSTLY_Q8_0)
    assert loaded(path, dtype="bfloat16").info.quantization == "Q8_0, dequantised to bfloat16"
    with pytest.raises(ConfigError, match=r"--quantize int8: .*is quantised already \(Q8_0, dequantised"):
        info_of(path, quantize="int8")


def test_a_gguf_file_that_was_cut_is_named_and_said_to_be_cut(folder: Path, tmp_path: Path):
    path = save_gguf(folder, tmp_path / "model.gguf", Kind.F32, FileType.ALL_F32)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ModelError, match=r"model\.gguf' cannot be loaded: a file is cut or damaged"):
        load_tokenizer(ModelConfig(model=str(path)))


@pytest.mark.attack
@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + bytes(60), b"GGUF\x03\0\0\0" + b"\xff" * 40, b"x" * 999])
def test_a_gguf_file_that_is_none_is_refused(data: bytes, tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="cannot be loaded"):
        gguf_type(tmp_path / "model.gguf")


def test_the_demo_model_keeps_the_type_that_it_was_converted_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = save_gguf(folder, tmp_path / "model.gguf", Kind.Q4_1, FileType.MOSTLY_Q4_1)
    monkeypatch.setenv("TRACEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_find_gguf", lambda: path)
    converted = info_of(Path("demo"))
    assert converted.quantization == "Q4_1, dequantised to float32"
    config = Path(references.resolve("demo").path) / "config.json"
    settings = json.loads(config.read_text())
    del settings["dequantised_from"]  # as folders were converted before
    config.write_text(json.dumps(settings))
    assert info_of(Path("demo")).quantization == "Q4_1, dequantised to float32"
    assert loaded(Path("demo")).info == info_of(Path("demo"))
    monkeypatch.setattr(demo, "_find_gguf", lambda: pytest.fail("the type is known"))
    assert info_of(Path("demo")).quantization == "Q4_1, dequantised to float32"


# ---------------------------------------------------------------- a dataset of such a model


@pytest.mark.parametrize("kind", ["int8", "gguf"])
def test_plan_records_manifest_and_card_name_it_and_a_replay_loads_it_again(kind: str, folder: Path, tmp_path: Path):
    if kind == "int8":
        model, name = stored(folder, tmp_path / "stored", INT8), "int8(threshold=6)"
    else:
        model = save_gguf(folder, tmp_path / "model.gguf", Kind.Q4_0, FileType.MOSTLY_Q4_0)
        name = "Q4_0, dequantised to float32"
    out = tmp_path / "out"
    manifest = run_trivia(out, model, source={"limit": 4}, generation={"max_new_tokens": 3}).manifest
    assert manifest is not None
    assert manifest.model.quantization == name
    assert read_plan(Layout(out, "trivia_qa")).model.quantization == name
    assert {sample.record.model.quantization for sample in TraceStore(out)} == {name}
    assert name in (out / "README.md").read_text()
    again = replay_stored(Layout(out, "trivia_qa"), 2, model=str(model), adapter=None, device="cpu")
    assert again.num_replayed == 2
