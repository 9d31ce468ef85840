"""Storage forms: fewer bits with scales, and sparse attention; alone, and through a run and every way of reading it."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tracekit
from builders.degradation.configs import DegradationConfig
from builders.trivia_qa.task import TriviaQAConfig
from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import publish
from tests.runs_for_tests import hashes, run_trivia
from tracekit import TraceStore
from tracekit.analysis.diff import diff
from tracekit.analysis.showing import metric_lines
from tracekit.config import CaptureConfig, check
from tracekit.errors import CaptureError, ConfigError, CorruptShardError, SampleNotFoundError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, read_struct
from tracekit.format.shards import iter_samples
from tracekit.model.choices import check_choice_config
from tracekit.read.verifier import verify
from tracekit.run.merge import merge
from tracekit.run.recheck import replay_stored
from tracekit.storage import (
    QUANTIZED_DTYPES,
    StorageForm,
    StorageLoss,
    content_problem,
    for_storage,
    keep_top_p,
    problem_of,
    quantize,
    spread,
    unpacked,
    upscale,
)
from tracekit.tensors import TensorSpec

ALL = {"sites": ("all",)}
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
WEIGHTS = st.floats(0, 1, width=32)


def loss_of(folder: Path, name: str) -> StorageLoss:
    return {loss.name: loss for loss in read_struct(Layout(folder, "trivia_qa").manifest, Manifest).losses}[name]


# ---------------------------------------------------------------- fewer bits


ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=FINITE)


@settings(deadline=None)
@given(ARRAYS)
def test_int8_is_off_by_half_its_scales_at_most(array: np.ndarray):
    values, scales, token_scales = quantize(array, np.dtype(np.int8))
    assert values.dtype == np.int8
    assert scales.shape == (*array.shape[:-2], array.shape[-1])
    assert token_scales.shape == array.shape[:-1]
    error = np.abs(upscale(values, scales, token_scales).astype(np.float64) - array)
    both = scales.astype(np.float64)[..., None, :] * token_scales[..., None]
    assert (error <= both * (0.5 + 1e-4)).all()
    assert (error <= np.abs(array).max(-1, keepdims=True) / 253 + 1e-36).all()


@settings(deadline=None)
@given(ARRAYS)
def test_float8_is_off_by_a_sixteenth_of_a_value_or_less(array: np.ndarray):
    values, scales, token_scales = quantize(array, np.dtype(ml_dtypes.float8_e4m3fn))
    back = upscale(values, scales, token_scales)
    assert np.isfinite(back).all()
    error = np.abs(back.astype(np.float64) - array)
    both = scales.astype(np.float64)[..., None, :] * token_scales[..., None]
    assert (error <= np.maximum(np.abs(array) / 16, both / 1024) * 1.001 + 1e-36).all()


def test_channels_and_tokens_have_scales_of_their_own():
    array = np.array([[1.0, 1000.0], [-0.5, 10.0]], np.float32)
    values, scales, token_scales = quantize(array, np.dtype(np.int8))
    assert token_scales.tolist() == [1000.0, 10.0]
    np.testing.assert_allclose(scales, [0.05 / 127, 1 / 127], rtol=1e-6)
    assert values.tolist() == [[3, 127], [-127, 127]]


def test_a_huge_first_token_does_not_hide_the_others():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(1, 20, 64)).astype(np.float32)
    array[0, 0, :3] *= 5000
    array[0, :, 7] *= 40
    back = upscale(*quantize(array, np.dtype(np.int8)))
    errors = np.linalg.norm(back - array, axis=-1) / np.linalg.norm(array, axis=-1)
    assert errors.max() < 0.02


def test_zeros_stay_zeros_and_the_smallest_values_do_not_overflow():
    array = np.array([[0.0, 1e-45], [0.0, -1e-40], [0.0, 0.0]], np.float32)
    for dtype in QUANTIZED_DTYPES.values():
        back = upscale(*quantize(array, dtype))
        assert (back[:, 0] == 0).all()
        assert np.isfinite(back).all()


# ---------------------------------------------------------------- the largest weights


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=7), elements=WEIGHTS), st.floats(0.01, 1)
)
def test_the_fewest_largest_weights_that_reach_the_mass_are_kept(weights: np.ndarray, top_p: float):
    kept = keep_top_p(weights, top_p)
    back = spread(*kept[:3], weights.shape[-1])
    for row, again, count, mass in zip(
        weights.reshape(-1, weights.shape[-1]),
        back.reshape(-1, weights.shape[-1]),
        kept.counts.ravel(),
        kept.mass.ravel(),
        strict=True,
    ):
        largest = np.sort(row)[::-1].astype(np.float64)
        wanted = top_p * largest.sum()
        assert ((again == row) | (again == 0)).all()
        assert np.count_nonzero(again) == count
        np.testing.assert_array_equal(np.sort(again)[::-1][:count], largest[:count])
        assert largest[:count].sum() >= wanted * (1 - 1e-9)
        assert count == 0 or largest[: count - 1].sum() < wanted * (1 + 1e-9)
        np.testing.assert_allclose(mass, largest[:count].sum(), rtol=1e-6)


def test_of_equal_weights_those_of_earlier_keys_are_kept():
    kept = keep_top_p(np.full((1, 4), 0.25, np.float32), 0.5)
    assert spread(*kept[:3], 4).tolist() == [[0.25, 0.25, 0, 0]]


def test_weights_that_do_not_go_with_their_counts_are_refused():
    values, indices, counts = np.ones(2, np.float32), np.array([0, 1], np.uint16), np.array([2], np.uint16)
    with pytest.raises(CorruptShardError, match="3 weights are counted, 2 are there"):
        spread(values, indices, counts + np.uint16(1), 4)
    with pytest.raises(CorruptShardError, match="a weight of key 1, in a text of 1 tokens"):
        spread(values, indices, counts, 1)


# ---------------------------------------------------------------- what is refused


def test_settings_without_a_meaning_are_refused():
    for dtype in QUANTIZED_DTYPES:
        config = CaptureConfig(store_dtype=dtype, tokens="last")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match=f"--store-dtype {dtype} with --tokens last"):
            check(TriviaQAConfig(capture=config))
    with pytest.raises(ConfigError, match=r"capture\.attention_top_p"):
        check(TriviaQAConfig(capture=CaptureConfig(attention_top_p=0.0)))
    with pytest.raises(ConfigError, match=r"--attention-top-p 0\.9 .* attention of options is stored whole"):
        check_choice_config(CaptureConfig(attention_top_p=0.9))


@pytest.mark.parametrize(("name", "value"), [("store_dtype", "int8"), ("attention_top_p", 0.9)])
def test_damaged_models_are_not_stored_so(name: str, value: object):
    config = DegradationConfig()
    capture = msgspec.structs.replace(config.capture, **{name: value})
    with pytest.raises(ConfigError, match=rf"\$\.capture\.{name}"):
        check(msgspec.structs.replace(config, capture=capture))


def a_spec(name: str, array: np.ndarray, axes: str, layout: str, num_keys: int = 0) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype=str(array.dtype),
        shape=list(array.shape),
        axes=list(axes),
        layers=[0],
        positions=[[0, 2]],
        layout=layout,
        num_keys=num_keys,
        choice_offsets=[],
    )


def test_values_that_are_not_finite_are_refused():
    hidden = np.array([[[1.0, np.nan], [0.0, 1.0]]], np.float32)
    spec = a_spec("hidden_states", hidden, "LTD", "dense")
    with pytest.raises(CaptureError, match="hidden_states: not finite, which int8 with scales does not know"):
        for_storage([spec], {"hidden_states": hidden}, dtype="int8", top_p=1)
    weights = np.array([[[1.0, np.inf, 0.0]]], np.float32)
    spec = a_spec("attentions", weights, "LHS", "causal", num_keys=2)
    with pytest.raises(CaptureError, match="attentions: not finite"):
        for_storage([spec], {"attentions": weights}, dtype="same", top_p=0.5)


# ---------------------------------------------------------------- through a run

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"store_dtype": "int8"},
    "float8": {"store_dtype": "float8"},
    "sparse": {"attention_top_p": 0.9},
    "both": {"store_dtype": "int8", "attention_top_p": 0.5, "tokens": "answer", "layers": ("1",)},
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tensors stand as they were captured."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_trivia(folder, model, capture=ALL)
    return folder


@pytest.fixture(scope="module", params=FORMS)
def packed(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The same run in a smaller form, and what was asked for."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    run_trivia(folder, model, capture=ALL | FORMS[request.param])
    return folder, FORMS[request.param]


def test_what_is_read_is_what_was_captured_up_to_the_loss_that_is_written_down(
    whole: Path, packed: tuple[Path, dict[str, Any]]
):
    folder, form = packed
    report = verify(folder)
    assert not report.problems
    a, b = TraceStore(whole), TraceStore(folder)
    key = a.keys[3]
    tokens = form.get("tokens")
    layers = [1] if "layers" in form else None
    for site in ("hidden_states", "queries", "keys", "values", "resid_embed", "resid_post_mlp"):
        is_layered = layers is not None and site != "resid_embed"
        for layer in layers if is_layered and layers else [None]:
            before = a.tensor(key, site, layer=layer, tokens=tokens)
            after = b.tensor(key, site, layer=layer)
            assert after.dtype == np.float32
            bound = {"int8": 0.5 / 127, "float8": 1 / 16}.get(form.get("store_dtype", ""), 0.0)
            assert np.abs(after - before).max() <= bound * np.abs(before).max() * 1.001
            if bound:
                assert np.abs(after - before).max() > 0
                assert 0 < loss_of(folder, site).relative_error < 0.05
                assert loss_of(folder, site).max_abs_error >= np.abs(after - before).max() * 0.999
    before, after = a.attention(key, layer=1, tokens=tokens), b.attention(key, layer=1)
    assert before.shape == after.shape
    if "attention_top_p" in form:
        assert ((after == 0) | (after == before)).all()
        assert (after == 0).sum() > (before == 0).sum()
        np.testing.assert_allclose(after.sum(-1), b.attention_mass(key, layer=1), rtol=1e-5)
        assert b.attention_mass(key, layer=1).min() >= form["attention_top_p"] - 1e-5
        loss = loss_of(folder, "attentions")
        assert form["attention_top_p"] <= loss.min_mass <= loss.mass / loss.num_rows < 1
        assert 0 < loss.num_kept < loss.num_values
    else:
        np.testing.assert_array_equal(before, after)
        with pytest.raises(SampleNotFoundError, match="stores its attention whole"):
            b.attention_mass(key)


def test_one_layer_head_and_token_are_parts_of_the_whole(packed: tuple[Path, dict[str, Any]]):
    store = TraceStore(packed[0])
    key = store.keys[0]
    for site in ("hidden_states", "queries", "attentions"):
        layers = [1] if "layers" in packed[1] else [0, 1, 2] if site == "hidden_states" else [0, 1]
        for number, layer in enumerate(layers):
            every = store.tensor(key, site)
            one = store.tensor(key, site, layer=layer)
            np.testing.assert_array_equal(one, every[number])
            if site != "hidden_states":
                np.testing.assert_array_equal(store.tensor(key, site, layer=layer, head=1), every[number][1])
    last = store.attention(key, layer=1, tokens=-1)
    np.testing.assert_array_equal(last, store.attention(key, layer=1)[:, -1])
    if "attention_top_p" in packed[1]:
        mass = store.attention_mass(key)
        np.testing.assert_array_equal(store.attention_mass(key, layer=1, head=1), mass[-1, 1])
        np.testing.assert_array_equal(store[key].attention_mass(layer=1, tokens=-1), mass[-1, :, -1])
    expanded = store.qkv(key, "k", layer=1, expand_heads=True)
    assert expanded.shape == store.qkv(key, "q", layer=1).shape
    graph = store.graph(key, layer=1, torch=True)
    assert graph.edge_weight.min() > 0


def test_every_way_of_loading_gives_the_same(
    packed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    imported: Callable[[Path], Any],
):
    folder = packed[0]
    store = TraceStore(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    mapped: Any = tracekit.load_dataset(folder, split="validation")
    streamed: Any = tracekit.load_dataset(folder, split="validation", streaming=True)
    scripted = imported(folder)(config_name="trivia_qa", cache_dir=str(tmp_path / "own"))
    scripted.download_and_prepare()
    rows: Any = scripted.as_dataset(split="validation").with_format("numpy")
    by_key = {row["key"]: row for row in rows}
    sites = ("hidden_states", "queries", "keys", "values", "resid_embed", "resid_post_attn", "attentions")
    for row, other in zip(mapped, streamed, strict=True):
        key = row["key"]
        specs = {one["name"]: one for one in row["tensors"]}
        assert {*specs} >= {*sites}
        for site in sites:
            expected = store.tensor(key, site)
            assert specs[site]["shape"] == list(expected.shape)
            assert specs[site]["dtype"] == str(expected.dtype)
            for values in (row[site], other[site] if other["key"] == key else expected, by_key[key][site]):
                np.testing.assert_array_equal(np.asarray(values.tolist(), np.float32), expected)


def test_layers_are_chosen_when_loading(
    packed: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    row: Any = tracekit.load_dataset(
        packed[0], split="validation", sites=["hidden_states", "attentions"], layers=[-1, 1], torch=True
    )[0]  # pyright: ignore[reportArgumentType]
    store = TraceStore(packed[0])
    for site in ("hidden_states", "attentions"):
        expected = np.stack([store.tensor(row["key"], site, layer=layer) for layer in (-1, 1)])
        np.testing.assert_array_equal(row[site].numpy(), expected)


def test_webdataset_multiplies_with_the_scales(packed: tuple[Path, dict[str, Any]]):
    store = TraceStore(packed[0])
    shards = [str(path) for path in sorted((packed[0] / "data/trivia_qa").glob("*.tar"))]
    for sample in wds.WebDataset(shards, shardshuffle=False).decode(tracekit.wds_decoder()):
        arrays, key = sample["safetensors"], sample["__key__"]
        assert not any(name.endswith(".scales") for name in arrays)
        np.testing.assert_array_equal(arrays["hidden_states"], store.tensor(key, "hidden_states"))


def test_stacked_samples_are_what_each_gives(packed: tuple[Path, dict[str, Any]]):
    store = TraceStore(packed[0])
    stacked = store.stack("hidden_states", layer=1, tokens="all")
    for row, mask, key in zip(*stacked, strict=True):
        np.testing.assert_array_equal(row[mask], store.hidden_states(key, layer=1))
    assert store.arrays(sites=["attentions"])["attentions"].values.dtype == np.float32


def test_stored_samples_are_replayed(packed: tuple[Path, dict[str, Any]], model: Path):
    result = replay_stored(Layout(packed[0], "trivia_qa"), 3, model=str(model), adapter=None, device="cpu")
    assert result.num_replayed == 3
    errors = {error.site: error for error in result.sites}
    assert errors["attentions"].max_rel_error < 1e-4
    assert errors["hidden_states"].max_rel_error < {"int8": 5e-3, "float8": 0.07}.get(
        packed[1].get("store_dtype", ""), 1e-4
    )


def test_it_is_smaller(whole: Path, packed: tuple[Path, dict[str, Any]]):
    sizes = [
        {one.name: one.num_bytes for one in read_struct(Layout(folder, "trivia_qa").manifest, Manifest).tensors}
        for folder in (whole, packed[0])
    ]
    if "store_dtype" in packed[1]:
        assert sizes[1]["hidden_states"] <= sizes[0]["hidden_states"] / 4
        assert sizes[1]["hidden_states.scales"] < sizes[1]["hidden_states"]
    if packed[1].get("attention_top_p", 1) < 1:
        assert sizes[1]["attentions"] < sizes[0]["attentions"]


def test_card_and_show_say_what_it_cost(packed: tuple[Path, dict[str, Any]]):
    manifest = read_struct(Layout(packed[0], "trivia_qa").manifest, Manifest)
    card = (packed[0] / "README.md").read_text()
    lines = "\n".join(metric_lines(manifest))
    assert manifest.losses
    assert "\n\n\n" not in card.partition("### Tensors")[2]
    for loss in manifest.losses:
        assert f"| `{loss.name}` | {loss.form} | {loss.in_words()} |" in card
        assert loss.in_words() in lines
    assert ("of a token's vector" in card) == ("store_dtype" in packed[1])
    assert ("of a row's mass" in card) == ("attention_top_p" in packed[1])


def test_a_whole_dataset_has_no_loss(whole: Path):
    assert not read_struct(Layout(whole, "trivia_qa").manifest, Manifest).losses
    assert "less exact" not in (whole / "README.md").read_text()


def test_an_interrupted_run_ends_in_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    form = {"capture": {"store_dtype": "int8", "attention_top_p": 0.9}}
    run_trivia(tmp_path / "straight", model, **form)
    from tracekit.format.shards import ShardWriter

    own, calls = ShardWriter.append, iter(range(100))

    def append(self: ShardWriter, *args: Any, **more: Any) -> None:
        own(self, *args, **more)
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(KeyboardInterrupt):
        run_trivia(tmp_path / "broken", model, **form)
    monkeypatch.setattr(ShardWriter, "append", own)
    run_trivia(tmp_path / "broken", model, **form)
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "straight")


def test_merged_parts_cost_what_they_cost(model: Path, tmp_path: Path):
    form: dict[str, Any] = {"capture": {"store_dtype": "float8"}}
    for name, offset in (("a", 0), ("b", 5)):
        run_trivia(tmp_path / name, model, source={"offset": offset, "limit": 5}, **form)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    losses = [loss_of(tmp_path / name, "hidden_states") for name in ("a", "b", "both")]
    assert losses[2] == losses[0].with_more(losses[1])


def test_the_loss_is_the_mean_over_tokens_whatever_their_size():
    hidden = np.array([[[1e4, 8.0, 6.0], [3.0, 4.3, 0.1], [0.0, 0.0, 0.0]]], np.float32)
    spec = a_spec("hidden_states", hidden, "LTD", "dense")
    stored = for_storage([spec], {"hidden_states": hidden}, dtype="int8", top_p=1)
    back = unpacked(stored.specs[0], stored.tensors)
    (loss,) = stored.losses
    expected = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9) for a, b in zip(back[0], hidden[0], strict=True)]
    assert loss.num_vectors == 3
    assert loss.relative_error == pytest.approx(np.mean(expected), rel=1e-6)
    assert loss.max_error == pytest.approx(max(expected), rel=1e-6)
    assert loss.max_error > 0


def test_damage_to_sparse_attention_is_found(model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model, capture={"attention_top_p": 0.9}, source={"limit": 2})
    assert not verify(tmp_path / "run").problems
    store = TraceStore(tmp_path / "run")
    row = store._row(store.keys[0])
    with row.shard.open("r+b") as file:
        file.seek(row.tensors["attentions"].companions["counts"].start)
        (count,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([count + 1]))
    assert any("weights are counted" in problem for problem in verify(tmp_path / "run").problems)
    store = TraceStore(tmp_path / "run")
    for layer in (None, 0):
        with pytest.raises(CorruptShardError, match="weights are counted"):
            store.attention(store.keys[0], layer=layer)


def test_a_tensor_of_one_layer_has_companions_of_its_own():
    keys = np.ones((1, 2, 2, 3), np.float32)
    stored = for_storage([a_spec("keys.1", keys, "LKTE", "dense")], {"keys.1": keys}, dtype="int8", top_p=1)
    assert [(spec.name, spec.axes, spec.shape) for spec in stored.specs] == [
        ("keys.1", ["L", "K", "T", "E"], [1, 2, 2, 3]),
        ("keys.1.scales", ["L", "K", "E"], [1, 2, 3]),
        ("keys.1.token_scales", ["L", "K", "T"], [1, 2, 2]),
    ]
    assert [loss.name for loss in stored.losses] == ["keys.1"]


def test_forms_that_gain_nothing_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"store_dtype": "int8", "sites": ("attn",)}, "no site that is stored has channels"),
        ({"attention_top_p": 0.9, "sites": ("hidden",)}, "no attention is stored"),
        ({"store_dtype": "int8", "sites": ("hidden",), "tokens": "answer"}, "as much room as the values"),
        ({"store_dtype": "int8", "attention_top_p": 0.9, "sites": ("all",)}, ""),
    ]
    for number, (capture, note) in enumerate(cases):
        run_trivia(
            tmp_path / str(number), model, capture=capture, source={"limit": 2}, generation={"max_new_tokens": 1}
        )
        said = capsys.readouterr().err
        assert (note in said) if note else ("--store-dtype" not in said)


def test_an_empty_answer_has_rows_of_nothing():
    hidden, weights = np.zeros((1, 0, 4), np.float32), np.zeros((1, 2, 0), np.float32)
    specs = [a_spec("hidden_states", hidden, "LTD", "dense"), a_spec("attentions", weights, "LHS", "causal", 5)]
    specs = [msgspec.structs.replace(spec, positions=[]) for spec in specs]
    stored = for_storage(specs, {"hidden_states": hidden, "attentions": weights}, dtype="int8", top_p=0.9)
    by_name = {spec.name: spec for spec in stored.specs}
    assert unpacked(by_name["hidden_states"], stored.tensors).shape == (1, 0, 4)
    assert unpacked(by_name["attentions"], stored.tensors).shape == (1, 2, 0, 5)
    assert all(problem_of(spec, by_name) is None for spec in stored.specs)
    assert all(loss.relative_error == 0 for loss in stored.losses)


def test_long_texts_are_sorted_block_by_block(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    whole = np.tril(rng.random((2, 3, 9, 9)).astype(np.float32))
    packed = whole[..., *np.tril_indices(9)]
    spec = msgspec.structs.replace(a_spec("attentions", packed, "LHS", "causal", 9), positions=[[0, 9]], layers=[0, 1])
    at_once = for_storage([spec], {"attentions": packed}, dtype="same", top_p=0.7)
    for size in (1, 20, 100, 200):
        monkeypatch.setattr("tracekit.storage._BLOCK_VALUES", size)
        in_blocks = for_storage([spec], {"attentions": packed}, dtype="same", top_p=0.7)
        for name, array in at_once.tensors.items():
            np.testing.assert_array_equal(in_blocks.tensors[name], array)
        assert in_blocks.losses[0].relative_error == pytest.approx(at_once.losses[0].relative_error)


def changed(spec: TensorSpec, **changes: Any) -> TensorSpec:
    return msgspec.structs.replace(spec, **changes)


def in_both_forms() -> StorageForm:
    """A sample with scaled hidden states and sparse attention, of two tokens."""
    hidden = np.ones((1, 2, 4), np.float32)
    weights = np.array([[[1.0, 0.4, 0.6], [1.0, 0.5, 0.5]]], np.float32)
    specs = [a_spec("hidden_states", hidden, "LTD", "dense"), a_spec("attentions", weights, "LHS", "causal", 2)]
    return for_storage(specs, {"hidden_states": hidden, "attentions": weights}, dtype="int8", top_p=0.9)


def test_what_does_not_go_together_is_named():
    stored = in_both_forms()
    good = {spec.name: spec for spec in stored.specs}
    assert all(problem_of(spec, good) is None for spec in good.values())
    for name, change, message in (
        ("hidden_states.scales", {"shape": [1, 5]}, "scales"),
        ("hidden_states.token_scales", {"dtype": "float16"}, "with scales in"),
        ("hidden_states", {"dtype": "uint8"}, "expected int8"),
        ("hidden_states", {"axes": ["L", "H", "S"]}, "end in no tokens"),
        ("hidden_states", {"layout": "dense"}, "belongs to no tensor"),
        ("hidden_states.scales", {"layers": [3]}, "of layers"),
        ("attentions.counts", {"shape": [1, 0, 2]}, "query rows"),
        ("attentions.indices", {"dtype": "int16"}, "indices int16"),
        ("attentions", {"dtype": "int64"}, "attention in"),
        ("attentions", {"choice_offsets": [0, 2]}, "alone has"),
    ):
        bad = good | {name: changed(good[name], **change)}
        problems = [problem for spec in bad.values() if (problem := problem_of(spec, bad)) is not None]
        assert any(message in problem for problem in problems), (name, change, problems)
    missing = {name: spec for name, spec in good.items() if name != "attentions.mass"}
    assert "attentions.mass is missing" in str(problem_of(missing["attentions"], missing))
    by_layer = changed(good["hidden_states"], name="hidden_states.0", layout="dense", layers=[])
    assert "is of layers []" in str(problem_of(by_layer, {"hidden_states.0": by_layer}))


def test_values_that_do_not_go_together_are_named():
    stored = in_both_forms()
    by_name = {spec.name: spec for spec in stored.specs}
    for site in ("hidden_states", "attentions"):
        assert content_problem(by_name[site], stored.tensors) is None
    for site, name, array, message in (
        ("hidden_states", "hidden_states.scales", np.full((1, 4), np.nan, np.float32), "not finite"),
        ("attentions", "attentions.mass", stored.tensors["attentions.mass"] + 1, "add up to their mass"),
        ("attentions", "attentions.indices", stored.tensors["attentions.indices"][::-1], "do not rise|key"),
        ("attentions", "attentions.counts", stored.tensors["attentions.counts"] + np.uint16(1), "are counted"),
    ):
        problem = content_problem(by_name[site], stored.tensors | {name: array})
        assert problem is not None
        assert re.search(message, problem), problem


def test_a_damaged_loss_is_refused():
    loss = {"name": "x", "form": "int8", "layers": [0, 1], "errors": [], "num_vectors": 0, "max_error": 0}
    loss |= {"max_abs_error": 0, "num_values": 0, "num_kept": 0}
    with pytest.raises(msgspec.ValidationError, match="0 errors of 2 layers"):
        msgspec.convert(loss, StorageLoss)


def test_a_diff_says_that_forms_differ(whole: Path, packed: tuple[Path, dict[str, Any]]):
    found = diff(whole, packed[0])
    notes = "; ".join(found.configs[0].notes)
    assert ("hidden_states is stored as float32 in a" in notes) == ("store_dtype" in packed[1])
    assert ("attentions is stored as float32 in a and as sparse in b" in notes) == ("attention_top_p" in packed[1])


def test_the_loading_script_decodes_payloads(packed: tuple[Path, dict[str, Any]], imported: Callable[[Path], Any]):
    script = sys.modules[imported(packed[0]).__module__]
    store = TraceStore(packed[0])
    row = store._row(store.keys[0])
    payload = row.shard.read_bytes()
    with row.shard.open("rb") as file:
        first = next(iter_samples(file, where="shard"))
    arrays = script.decode_tensors(payload[first.payload.offset :][: first.payload.size])
    np.testing.assert_array_equal(arrays["hidden_states"], store.hidden_states(first.key))
    with pytest.raises(ValueError, match="scales"):
        script.upscale(np.ones((2, 3, 4), np.int8), np.ones((1, 4), np.float32), np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="expected uint16"):
        script.spread(np.ones(1), np.array([-1], np.int16), np.ones((1, 1, 1), np.uint16), 4)


def test_a_layer_of_published_sparse_attention_is_fetched_together(model: Path, tmp_path: Path, xet_hub: TestHub):
    run_trivia(tmp_path / "run", model, capture={"attention_top_p": 0.9, "store_dtype": "int8"})
    store = TraceStore(tmp_path / "run")
    expected = [float(store.attention(key, layer=1).sum()) for key in store.keys]
    publish(xet_hub, tmp_path / "run", "v1.0.0")
    xet_hub.log()
    code = """
import tracekit
store = tracekit.TraceStore("hf://datasets/tester/traces@v1.0.0")
values = store.stack("attentions", layer=1, tokens="all").values
print([float(store.attention(key, layer=1).sum()) for key in store.keys])
print(values.shape, store.hidden_states(store.keys[0], layer=1).shape)
"""
    said = xet_hub.python(code, TRACEKIT_CACHE=str(tmp_path / "cache")).stdout
    assert said.splitlines()[0] == str(expected)
    num_requests = sum("/_cdn/" in request.path and request.method == "GET" for request in xet_hub.log())
    assert num_requests < 2 * len(store)  # counts, weights and keys of a sample one by one would be three a sample
