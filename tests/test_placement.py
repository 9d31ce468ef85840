"""Models shared out over devices, host memory and disk: the same bits as on one device, or refused with what to do."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMultipleChoice, BertConfig, XLNetConfig, XLNetLMHeadModel

from builders.degradation.damage import Damaged
from builders.degradation.weight_groups import find_group
from tests.pretend_devices import PretendDevices, spread
from tests.runs_for_tests import hashes, log_lines, run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny_models import VOCAB_SIZE, proven, sites_of, tiny_model, token_ids, traced
from tracekit.cli import main
from tracekit.config import CaptureConfig, DrawConfig, GenerationConfig, ModelConfig, RunConfig, check, memory_limits
from tracekit.errors import ConfigError, ModelError
from tracekit.model.capture import Text, capture
from tracekit.model.choices import Choices, capture_choices
from tracekit.model.generation import answer_once
from tracekit.model.memory import memory_reader, num_fitting
from tracekit.model.models import load_model, model_info
from tracekit.model.patching import patch
from tracekit.model.placement import computing_device, input_device, watch_offloaded
from tracekit.model.traced import Loads, TracedModel
from tracekit.ranks import has_own_devices
from tracekit.run.runner import Ended

TEXTS = [Text(token_ids(14), 9), Text(token_ids(5, start=3), 3), Text(token_ids(9, start=5), 9)]
ENCODER_SITES = ("hidden_states", "attentions", "queries", "keys", "values", "resid_post_mlp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint of a family."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(name: str) -> Path:
        if not (folder / name).exists():
            tiny_model(name, attention=None).save_pretrained(folder / name)
        return folder / name

    return save


def load(folder: Path, sites: tuple[str, ...], *, loads: Loads = "lm", **settings: Any) -> TracedModel:
    config = check(RunConfig(model=ModelConfig(model=str(folder), **settings))).model
    return load_model(config, model_info(config, variant="base", sites=sites), None, sites, loads=loads)


def shared_out(folder: Path, scratch: Path, share: float) -> dict[str, Any]:
    """Settings that leave so much of a checkpoint's size to the host's memory, and the rest to the disk."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"device_map": "auto", "max_memory": (f"cpu={int(size * share)}",), "offload_folder": str(scratch)}


def everything(made: TracedModel, sites: tuple[str, ...]) -> list[np.ndarray]:
    """All that is captured of texts and generated after them."""
    arrays: list[np.ndarray] = []
    for trace in capture(made, TEXTS, CaptureConfig(sites=sites)):
        arrays += [*trace.tensors.values(), trace.next_tokens.logprobs, trace.next_tokens.entropies]
    prompts = [text.token_ids for text in TEXTS]
    for beams in (1, 3):
        answers = answer_once(made, prompts, GenerationConfig(num_beams=beams, max_new_tokens=4))
        arrays += [np.array(answer.token_ids) for answer in answers]
    drawn = answer_once(made, prompts, DrawConfig(max_new_tokens=4), ["a", "b", "c"])
    return arrays + [np.array(answer.token_ids) for answer in drawn]


def assert_same(mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(mine) == len(theirs)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("llama", 0.6),
        ("gpt2", 0.0),
        *[
            pytest.param(name, share, marks=pytest.mark.slow)
            for name, share in (("gemma2", 0.6), ("mixtral", 0.6), ("falcon", 0.0), ("deepseek_v3", 0.6))
        ],
    ],
)
def test_a_model_half_or_wholly_on_the_disk_gives_the_same_bits(
    name: str, share: float, saved: Callable[[str], Path], tmp_path: Path
):
    sites = sites_of(name)
    one = load(saved(name), sites, device="cpu")
    split = load(saved(name), sites, **shared_out(saved(name), tmp_path, share))
    on_disk = [parameter.is_meta for parameter in split.model.parameters()]
    assert any(on_disk)
    assert all(on_disk) == (share == 0)
    assert (split.device, split.is_offloaded, one.is_offloaded) == (torch.device("cpu"), True, False)
    assert_same(everything(split, sites), everything(one, sites))


def test_weights_are_cast_on_their_way_from_the_disk(saved: Callable[[str], Path], tmp_path: Path):
    sites = sites_of("llama")
    one = load(saved("llama"), sites, device="cpu", dtype="bfloat16")
    split = load(saved("llama"), sites, dtype="bfloat16", **shared_out(saved("llama"), tmp_path, 0.2))
    assert_same(
        [array.view(np.uint16) if array.dtype.name == "bfloat16" else array for array in everything(split, sites)],
        [array.view(np.uint16) if array.dtype.name == "bfloat16" else array for array in everything(one, sites)],
    )


def test_weights_that_accelerate_keeps_in_host_memory_give_the_same_bits():
    sites = sites_of("gemma2")
    model = accelerate.cpu_offload(tiny_model("gemma2", attention=None), execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    assert_same(everything(proven(model, "gemma2"), sites), everything(traced("gemma2"), sites))


@pytest.mark.parametrize(
    "name", ["gpt2", *[pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mixtral", "cohere")]]
)
def test_tensors_of_several_accelerators_are_collected(name: str):
    settings = {"_experts_implementation": "eager"} if name == "mixtral" else {}  # the other way asks the driver
    model, sites = tiny_model(name, attention=None, **settings), sites_of(name)
    size = sum(parameter.nbytes for parameter in model.parameters())
    limits: dict[int | str, int | str] = {0: int(size * 0.9), 1: 2 * size}
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    device_map: Any = accelerate.infer_auto_device_map(
        model, limits, no_split_module_classes=[*model._no_split_modules]
    )
    assert set(device_map.values()) == {0, 1}
    with PretendDevices() as pretended:
        split = proven(spread(model, device_map), name)
        assert [str(device) for device in split.devices] == ["cuda:0", "cuda:1"]
        mine = everything(split, sites)
        stored = torch.linspace(-1, 1, model.config.hidden_size)
        with patch(split, "hidden_states", 2, -1, stored), torch.inference_mode():
            patched = split.run(torch.tensor([token_ids(6)], device="cuda:0"), output_hidden_states=True)
        mine += [patched.logits.cpu().numpy(), patched.hidden_states[2].cpu().numpy()]
    assert pretended.num_moved > 100
    one = traced(name, **settings)
    with patch(one, "hidden_states", 2, -1, stored), torch.inference_mode():
        patched = one.run(torch.tensor([token_ids(6)]), output_hidden_states=True)
    assert_same(mine, [*everything(one, sites), patched.logits.numpy(), patched.hidden_states[2].numpy()])


def test_a_patch_reaches_an_offloaded_model(saved: Callable[[str], Path], tmp_path: Path):
    value = torch.linspace(-1, 1, 32)
    logits: list[Tensor] = []
    for settings in ({"device": "cpu"}, shared_out(saved("llama"), tmp_path, 0.0)):
        model = load(saved("llama"), (), **settings).model
        with torch.inference_mode():
            logits.append(model(torch.tensor([token_ids(6)])).logits)
            for site, layer in (("resid_post_attn", 1), ("hidden_states", 3)):
                with patch(model, site, layer, -1, value):
                    logits.append(model(torch.tensor([token_ids(6)])).logits)
    plain, block, last, *split = logits
    assert all(torch.equal(a, b) for a, b in zip((plain, block, last), split, strict=True))
    assert not torch.equal(plain, block)
    assert not torch.equal(plain, last)


def test_an_encoder_is_shared_out_unless_its_head_is_drawn(tmp_path: Path):
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    model = AutoModelForMultipleChoice.from_config(config)
    model.save_pretrained(tmp_path / "whole")
    model.bert.save_pretrained(tmp_path / "headless")
    found = []
    for settings in ({"device": "cpu"}, shared_out(tmp_path / "whole", tmp_path / "disk", 0.6)):
        made = load(tmp_path / "whole", ENCODER_SITES, loads="choices", **settings)
        trace = capture_choices(made, [Choices(TEXTS)], CaptureConfig(sites=ENCODER_SITES))[0]
        found.append([*trace.tensors.values(), trace.logits])
    assert_same(*found)
    for share, message in (
        (3.0, "no multiple-choice head, and with --device-map a random one would be another than on one device"),
        (0.6, "no 'classifier.bias', and what is drawn at random cannot be read from the disk"),
    ):
        with pytest.raises(ModelError, match=message):
            load(tmp_path / "headless", (), loads="choices", **shared_out(tmp_path / "whole", tmp_path / "disk", share))


def run(out: Path, model: Path, limit: int, /, **settings: Any) -> Ended:
    """TriviaQA into a folder, or on with what is there; not on an accelerator, if this machine has one."""
    return run_trivia(
        out,
        model,
        model={"device": "auto"} | settings,
        source={"limit": limit},
        capture={"sites": ("all",), "num_replays": 1},
        generation={"num_beams": 2, "num_samples": 2, "max_new_tokens": 5},
        output={"batch_size": 4},
    )


def test_a_dataset_made_from_the_disk_has_the_same_bytes_and_goes_on_with_one_from_memory(tmp_path: Path):
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny", dtype="bfloat16")
    split = shared_out(checkpoint, tmp_path / "disk", 0.6)
    run(tmp_path / "one", checkpoint, 4, device="cpu")
    run(tmp_path / "one", checkpoint, 7, device="cpu")
    run(tmp_path / "both", checkpoint, 4, **split)
    assert not run(tmp_path / "both", checkpoint, 7, device="cpu").was_complete
    run(tmp_path / "split", checkpoint, 4, device="cpu")
    run(tmp_path / "split", checkpoint, 7, **split)
    data = [
        {name: digest for name, digest in hashes(tmp_path / folder).items() if name.startswith(("data", "records"))}
        for folder in ("one", "split", "both")
    ]
    assert data[0] == data[1] == data[2]
    assert any(name.endswith(".tar") for name in data[0])
    assert run(tmp_path / "split", checkpoint, 7, device="cpu").was_complete
    assert {line["device"] for line in log_lines(tmp_path / "split")} == {"cpu"}
    placement = {"device_map", "max_memory", "offload_folder"}
    text = (tmp_path / "split" / "manifests" / "trivia_qa.json").read_text()
    assert not any(f'"{name}"' in text for name in placement)
    assert str(tmp_path / "disk") not in text


def test_verify_replays_with_a_shared_out_model(model: Path, finished: Path, tmp_path: Path, capsys: Any):
    split = ["--device-map", "auto", "--max-memory", "cpu=80KiB", "--offload-folder", str(tmp_path)]
    assert main(["verify", str(finished), "--replay", "2", "--model", str(model), *split]) == 0
    assert "2 samples" in capsys.readouterr().out
    assert main(["verify", str(finished), "--replay", "1", "--model", str(model), *split[2:]]) == 1
    assert "--max-memory says how a model is shared out, and goes with --device-map" in capsys.readouterr().err


def test_two_models_do_not_share_their_files_and_leave_none(saved: Callable[[str], Path], tmp_path: Path):
    settings = shared_out(saved("mixtral"), tmp_path, 0.0)
    first = load(saved("mixtral"), (), **settings)
    second = load(saved("mixtral"), (), **settings)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    assert all(any(folder.iterdir()) for folder in folders)
    assert first.model is not second.model
    del first, second
    gc.collect()
    assert not any(tmp_path.iterdir())
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(saved("mixtral"), (), quantize="nf4", **settings)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_memory": ("cpu=1GiB",)}, "--max-memory says how .*; add --device-map auto"),
        ({"offload_folder": "x"}, "--offload-folder says how .*; add --device-map auto"),
        ({"device_map": "auto", "device": "cuda:1"}, "--device cuda:1 with --device-map auto - at `\\$.model.device`"),
        ({"device_map": "auto", "max_memory": ("cuda=1GiB",)}, "'cuda=1GiB' - at .* expected DEVICE=SIZE"),
        ({"device_map": "auto", "max_memory": ("0=20Gib",)}, "'0=20Gib' - at .* as in 0=20GiB cpu=60GiB"),
        ({"device_map": "auto", "max_memory": ("cpu",)}, "'cpu' - at `\\$.model.max_memory`"),
        ({"device_map": "auto", "max_memory": ("0=1GB", "0=2GB")}, "'0=2GB' - at .*; 0 is named twice"),
        ({"device_map": "evenly"}, "Invalid enum value 'evenly' - at `\\$.model.device_map`"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check(RunConfig(model=ModelConfig(**settings)))


def test_limits_are_read_as_bytes():
    config = ModelConfig(device_map="auto", max_memory=("1=20GiB", "0=1.5GB", "cpu=500"))
    assert memory_limits(config) == {1: 20 * 2**30, 0: 1_500_000_000, "cpu": 500}


def test_the_device_that_computes_is_known_before_loading(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def computing(*limits: str) -> str:
        return str(computing_device(ModelConfig(device_map="auto", max_memory=limits)))

    assert computing("cpu=1GiB") == computing("0=0GiB", "cpu=1GiB") == "cpu"
    assert (computing("cpu=1GiB", "1=1GiB"), computing("1=1GiB", "0=2GiB")) == ("cuda:1", "cuda:0")
    with pytest.raises(
        ConfigError, match=r"2 - at `\$.model.max_memory`; this machine has no such accelerator \(0 to 1"
    ):
        computing("2=1GiB")


def test_an_accelerator_too_small_for_any_layer_is_not_left_out_in_silence(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "tracekit.model.placement.computing_device", lambda config: torch.device("cuda", 0)
    )  # as if 0=1B had been given where there is one
    with pytest.raises(ModelError, match="no layer fits on an accelerator, so that cpu would compute and not cuda"):
        load(saved("llama"), (), **shared_out(saved("llama"), tmp_path, 0.6))


def test_weights_that_fit_nowhere_need_a_folder(saved: Callable[[str], Path]):
    for name, message in (("llama", "'model.layers.1' and . more"), ("mixtral", "--offload-folder DIR")):
        with pytest.raises(ModelError, match=message):
            load(saved(name), (), device_map="auto", max_memory=("cpu=100KiB",))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_a_module_in_pieces_is_refused(tmp_path: Path):
    config = XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=4, n_head=4, d_inner=64)
    XLNetLMHeadModel(config).save_pretrained(tmp_path / "xlnet")
    with pytest.raises(ModelError, match="would lie on the disk apart from the rest of its module"):
        load(tmp_path / "xlnet", (), **shared_out(tmp_path / "xlnet", tmp_path / "disk", 0.6))


def test_a_weight_that_is_read_past_its_module_is_found():
    model = accelerate.cpu_offload(tiny_model("llama", attention=None), execution_device=torch.device("cpu"))
    model.hf_device_map = {"": "cpu"}
    ids, head = torch.tensor([token_ids(4)]), model.lm_head

    def careless(module: Any, args: Any, output: Tensor) -> Tensor:
        return nn.functional.linear(args[0], head.weight)  # torch computes with whatever lies in memory

    handle = head.register_forward_hook(careless)
    read = pytest.raises(ModelError, match="weights that are offloaded are read past the module that they belong to")
    with read, watch_offloaded(model, "tiny"), torch.inference_mode():
        model(ids)
    handle.remove()
    with watch_offloaded(model, "tiny"), torch.inference_mode():
        assert torch.equal(model(ids).logits, tiny_model("llama", attention=None)(ids).logits)
    refused = pytest.raises(ModelError, match=r"tiny does not run shared out over devices: .*meta.* \(--max-memory\)")
    with refused, watch_offloaded(model, "tiny"):
        torch.ones(97, 32) * head.weight


def test_an_adapter_beside_offloaded_weights_is_refused(tmp_path: Path):
    checkpoint, adapter = save_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        ModelError, match=r"--adapter, and weights that are offloaded to cpu and disk: .* Merge the adapter"
    ):
        load(checkpoint, (), adapter=str(adapter), **shared_out(checkpoint, tmp_path / "disk", 0.6))


def test_offloaded_weights_are_not_damaged_and_others_are(saved: Callable[[str], Path], tmp_path: Path):
    split = load(saved("gpt2"), (), **shared_out(saved("gpt2"), tmp_path, 0.85))
    with pytest.raises(ConfigError, match=r"group 'mlp': transformer.h.* more of its weights are offloaded"):
        find_group(split.model, split.anatomy, "mlp")
    group = find_group(split.model, split.anatomy, "mlp:0")
    ids = torch.tensor([token_ids(6)])
    with torch.inference_mode():
        before = split.run(ids).logits
        with Damaged(group) as damaged:
            damaged.apply("mult_gauss", level=0.5, seed=1)
            assert not torch.equal(split.run(ids).logits, before)
        assert torch.equal(split.run(ids).logits, before)


@pytest.mark.parametrize(
    ("environment", "has_own"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "4"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_GPUS_PER_TASK": "2"}, True),
    ],
)
def test_ranks_share_out_models_only_over_devices_of_their_own(
    environment: dict[str, str], has_own: bool, monkeypatch: pytest.MonkeyPatch
):
    assert has_own_devices(environment) == has_own
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = ModelConfig(device_map="auto", max_memory=("cpu=1GiB",))
    if has_own:
        assert computing_device(config).type == "cpu"
        return
    with pytest.raises(ConfigError, match=r"--device-map auto in . processes .* srun --gpus-per-task N"):
        computing_device(config)


def test_the_fullest_of_several_devices_is_watched(monkeypatch: pytest.MonkeyPatch):
    free = {torch.device("cuda", 0): (50, 100), torch.device("cuda", 1): (20, 100)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free[device])
    reader = memory_reader(*free, torch.device("mps"))
    assert reader.read is not None
    assert reader.read() == 0.8
    assert reader.name == "the fullest of memory of cuda:0, memory of cuda:1, memory of mps"


def test_a_batch_fits_where_memory_is_shortest(monkeypatch: pytest.MonkeyPatch):
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    peak = {first: 1000, second: 5000}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 900)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[device])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    assert num_fitting([first, second, torch.device("cpu")], lambda: None, share=0.82) == 2
    assert num_fitting([first], lambda: None, share=0.82) == 82
    assert num_fitting([torch.device("cpu")], lambda: None, share=0.82) is None


def test_inputs_go_where_the_first_module_computes_wherever_its_weights_are():
    model = tiny_model("llama")
    assert input_device(model) == torch.device("cpu")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert input_device(model) == torch.device("cpu")
