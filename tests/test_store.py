"""Reading: what was put in comes out, and what is not there is said."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from datasets_for_tests import (
    CHOICE_SITES,
    D_MODEL,
    MODEL,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    VERIFICATION,
    Made,
    MadeChoices,
    make_choices,
    make_sample,
    write_dataset,
)

from tracekit.errors import ConfigError, CorruptShardError, DatasetError, SampleNotFoundError
from tracekit.format.layout import Layout, write_atomic
from tracekit.format.manifest import Manifest, read_struct, to_bytes
from tracekit.read.remote import ByteRange, RemoteShards
from tracekit.read.stacking import Stacked
from tracekit.read.store import TraceStore
from tracekit.sites import SITES


@pytest.fixture
def made() -> list[Made]:
    """Four samples of different lengths, every site; the third has no answer."""
    return [
        make_sample(
            f"{i:06d}", sites=tuple(SITES), num_tokens=7 + i, prompt_length=6 if i == 2 else 4, has_answer=i != 2
        )
        for i in range(4)
    ]


@pytest.fixture
def store(tmp_path: Path, made: list[Made]) -> TraceStore:
    """Those samples in two shards, the first shard's in reverse order of key."""
    write_dataset(tmp_path, {"train-00000": [made[1], made[0]], "train-00001": made[2:]})
    return TraceStore(tmp_path)


def _only(tmp_path: Path, made: Made) -> TraceStore:
    write_dataset(tmp_path, {"train-00000": [made]})
    return TraceStore(tmp_path)


# ---------------------------------------------------------------- samples


def test_samples_stand_by_key_whatever_the_order_in_the_tar(store: TraceStore) -> None:
    assert len(store) == 4
    assert store.keys == ["000000", "000001", "000002", "000003"]
    assert [sample.key for sample in store] == store.keys
    assert store[0].key == "000000"
    assert store[-1].key == "000003"
    assert store[np.int64(2)].key == "000002"
    assert store["000002"].key == "000002"
    assert "000002" in store
    assert "nothing" not in store


def test_an_unknown_key_names_the_range_and_its_neighbours(store: TraceStore) -> None:
    with pytest.raises(
        SampleNotFoundError, match=r"no sample '000001x'; 4 samples from '000000' to '000003', nearest: "
    ):
        store["000001x"]
    with pytest.raises(SampleNotFoundError, match=r"'000001', '000002'"):
        store.hidden_states("000001x")
    with pytest.raises(SampleNotFoundError, match="no sample 4; the dataset has 4 samples"):
        store[4]
    with pytest.raises(SampleNotFoundError, match="no sample -5"):
        store[-5]


def test_a_shard_is_read_in_the_order_of_its_tar(store: TraceStore) -> None:
    assert [sample.key for sample in store.shard(0)] == ["000001", "000000"]
    assert [sample.key for sample in store.shard(1, split="train")] == ["000002", "000003"]
    with pytest.raises(SampleNotFoundError, match="no shard 7 in split 'train'; shards: train 0, train 1"):
        store.shard(7)


def test_iterating_holds_one_shard_at_a_time(store: TraceStore, made: list[Made]) -> None:
    (folder,), (part,) = store._folders, store._rows._parts
    held: list[tuple[list[str], list[int]]] = []
    arrays: list[np.ndarray] = []
    for sample in store:
        arrays.append(sample.hidden_states(layer=1))
        held.append(([path.stem for path in folder.bytes_of._maps], list(part._groups)))
    first, second = (["train-00000"], [0]), (["train-00001"], [1])
    assert held == [first, first, second, second]
    for array, one in zip(arrays, made, strict=True):  # also those of the shard that was let go
        np.testing.assert_array_equal(array, one.expected["hidden_states"][1])
    np.testing.assert_array_equal(store[0].hidden_states(layer=1), arrays[0])


def test_opening_reads_keys_and_offsets_and_no_entry_record_or_shard(store: TraceStore) -> None:
    (folder,), (part,) = store._folders, store._rows._parts
    assert len(store) == 4
    assert "000002" in store
    assert not part._groups
    assert not folder.bytes_of._maps
    store["000002"].hidden_states(layer=1)
    assert list(part._groups) == [1]
    assert [path.stem for path in folder.bytes_of._maps] == ["train-00001"]


def test_what_is_released_is_read_again(store: TraceStore) -> None:
    (folder,) = store._folders
    before = store["000003"].hidden_states(layer=0)
    store.release("000003")
    assert not folder.bytes_of._maps
    np.testing.assert_array_equal(store["000003"].hidden_states(layer=0), before)
    with pytest.raises(SampleNotFoundError, match="no sample '9'"):
        store.release("9")


def test_records_are_typed_and_a_table(store: TraceStore, made: list[Made]) -> None:
    for one in made:
        assert store.record(one.record.key) == one.record
        assert store[one.record.key].record == one.record
    assert store.records.num_rows == 4
    assert store.records["key"].to_pylist() == store.keys
    assert {"question", "tokens", "tensors", "is_correct"} <= {*store.records.column_names}
    assert not {"_shard", "_json_offset", "_tensor_index"} & {*store.records.column_names}
    assert store.records is store.records


def test_some_fields_of_all_records_are_a_table(store: TraceStore, made: list[Made]) -> None:
    table = store.columns(["question", "key"])
    assert table.column_names == ["question", "key"]
    assert table["question"].to_pylist() == [one.record.question for one in made]
    with pytest.raises(ConfigError, match=r"'_shard'.*: task, schema_version, key"):
        store.columns(["key", "_shard"])


def test_prompts_are_found_by_text_and_by_hash(store: TraceStore, made: list[Made]) -> None:
    record = made[2].record
    for what in (record.prompt, record.question, record.prompt_sha256, record.input_sha256.upper()):
        assert [sample.key for sample in store.by_prompt(what)] == ["000002"]
    with pytest.raises(SampleNotFoundError, match=r"prompt 'What\?'"):
        store.by_prompt("What?")
    with pytest.raises(SampleNotFoundError, match="0" * 64):
        store.by_prompt("0" * 64)


def test_one_question_asked_twice_gives_two_samples(tmp_path: Path) -> None:
    first = make_sample("000000")
    second = make_sample("000001")
    record = msgspec.structs.replace(second.record, input_sha256=first.record.input_sha256)
    write_dataset(tmp_path, {"train-00000": [first, second._replace(record=record)]})
    found = TraceStore(tmp_path).by_prompt(first.record.question)
    assert [sample.key for sample in found] == ["000000", "000001"]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["causal", "full"])
def test_every_site_comes_back_as_it_was_put_in(tmp_path: Path, dtype: str, layout: str) -> None:
    one = make_sample("000000", sites=tuple(SITES), dtype=dtype, layout=layout)
    store = _only(tmp_path, one)
    for site, expected in one.expected.items():
        read = store.tensor("000000", site)
        assert read.dtype == expected.dtype
        np.testing.assert_array_equal(read, expected)
        if "L" in SITES[site].axes:
            for layer in range(len(expected)):
                np.testing.assert_array_equal(store.tensor("000000", site, layer=layer), expected[layer])
    for name, stored in store["000000"].tensors().items():
        assert stored.dtype == one.stored[name].dtype
        np.testing.assert_array_equal(stored, one.stored[name])


def test_accessors_name_the_sites(store: TraceStore, made: list[Made]) -> None:
    expected, sample = made[0].expected, store["000000"]
    assert sample.hidden_states().shape == (NUM_LAYERS + 1, 7, D_MODEL)
    np.testing.assert_array_equal(sample.hidden_states(layer=2), expected["hidden_states"][2])
    np.testing.assert_array_equal(sample.attention(layer=1, head=-1), expected["attentions"][1, -1])
    np.testing.assert_array_equal(sample.attention(head=2), expected["attentions"][:, 2])
    for letter, site in (("q", "queries"), ("k", "keys"), ("v", "values")):
        np.testing.assert_array_equal(sample.qkv(letter, layer=0), expected[site][0])
    np.testing.assert_array_equal(sample.resid(), expected["resid_post_mlp"])
    np.testing.assert_array_equal(sample.resid("pre_attn", layer=1), expected["resid_pre_attn"][1])
    np.testing.assert_array_equal(sample.resid("embed"), expected["resid_embed"])
    np.testing.assert_array_equal(sample.tensor("topk_ids", tokens="answer"), expected["topk_ids"][4:6])
    with pytest.raises(ConfigError, match=r"'mid'.*embed, pre_attn"):
        sample.resid("mid")
    with pytest.raises(ConfigError, match="no 'keys' in qkv, expected q, k, v"):
        sample.qkv("keys")


def test_reading_copies_nothing_and_cannot_write(store: TraceStore) -> None:
    values = store.hidden_states("000000", layer=1)
    again = store.hidden_states("000000", layer=1, tokens=slice(2, 5))
    assert np.shares_memory(values, again)
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        store["000000"].tensors()["attentions"][0] = 1.0


def test_layers_are_numbers_not_places(tmp_path: Path) -> None:
    one = make_sample("000000", layers=[0, 2])
    store = _only(tmp_path, one)
    np.testing.assert_array_equal(store.hidden_states("000000", layer=2), one.expected["hidden_states"][1])
    np.testing.assert_array_equal(store.hidden_states("000000", layer=-1), one.expected["hidden_states"][1])
    np.testing.assert_array_equal(store.hidden_states("000000", layer=-2), one.expected["hidden_states"][0])
    with pytest.raises(SampleNotFoundError, match="stores no layer 1 of 'hidden_states'; stored: 0, 2"):
        store.hidden_states("000000", layer=1)
    with pytest.raises(SampleNotFoundError, match="stores no layer -3"):
        store.attention("000000", layer=-3)


def test_what_is_not_stored_is_named_with_what_is(tmp_path: Path) -> None:
    store = _only(tmp_path, make_sample("000000", sites=("hidden_states", "resid_embed")))
    with pytest.raises(SampleNotFoundError, match=r"'attentions'.*hidden_states \(layers 0-3\), resid_embed$"):
        store.attention("000000")
    with pytest.raises(ConfigError, match="'resid_embed' has no layers; leave `layer` out"):
        store.resid("000000", "embed", layer=0)
    with pytest.raises(ConfigError, match="hidden_states of sample '000000' has no heads"):
        store.tensor("000000", "hidden_states", head=0)


def test_grouped_heads_are_repeated_when_asked(store: TraceStore, made: list[Made]) -> None:
    keys = made[0].expected["keys"]
    repeated = np.repeat(keys, NUM_HEADS // NUM_KV_HEADS, axis=1)
    np.testing.assert_array_equal(store.qkv("000000", "k", expand_heads=True), repeated)
    np.testing.assert_array_equal(store.qkv("000000", "k", layer=1, expand_heads=True), repeated[1])
    for head in (-1, *range(NUM_HEADS)):
        np.testing.assert_array_equal(
            store.qkv("000000", "k", layer=2, head=head, expand_heads=True), repeated[2, head]
        )
    np.testing.assert_array_equal(store.qkv("000000", "k", layer=2, head=1), keys[2, 1])
    np.testing.assert_array_equal(store.qkv("000000", "q", expand_heads=True), made[0].expected["queries"])
    with pytest.raises(SampleNotFoundError, match="keys of sample '000000': no head 2; heads are 0 to 1"):
        store.qkv("000000", "k", head=2)


def test_repeating_heads_needs_their_number(tmp_path: Path) -> None:
    from_attention = make_sample("000000", sites=("attentions", "values"))
    unknown = make_sample("000001", sites=("keys", "values"))
    write_dataset(tmp_path, {"train-00000": [from_attention, unknown]})
    store = TraceStore(tmp_path)
    assert store.qkv("000000", "v", expand_heads=True).shape[1] == NUM_HEADS
    with pytest.raises(DatasetError, match=r"queries.*attentions.*heads"):
        store.qkv("000001", "v", expand_heads=True)


def test_sites_whose_shapes_differ_by_layer_read_like_others(tmp_path: Path) -> None:
    one = make_sample(
        "000000", sites=("queries", "keys"), heads_by_layer={"queries": [4, 8, 6], "keys": [2, 4, 1]}, layers=[0, 1, 2]
    )
    store = _only(tmp_path, one)
    assert sorted(one.stored) == ["keys.0", "keys.1", "keys.2", "queries.0", "queries.1", "queries.2"]
    np.testing.assert_array_equal(store.qkv("000000", "k", layer=-1), one.expected["keys.2"][0])
    np.testing.assert_array_equal(store.qkv("000000", "q", layer=1, head=7), one.expected["queries.1"][0, 7])
    assert store.qkv("000000", "k", layer=1, expand_heads=True).shape[0] == 8
    assert [keys.shape[0] for keys in store.qkv("000000", "k")] == [2, 4, 1]
    assert [keys.shape[0] for keys in store.qkv("000000", "k", expand_heads=True)] == [4, 8, 6]
    np.testing.assert_array_equal(store.tensor("000000", "keys.1"), one.expected["keys.1"])
    with pytest.raises(SampleNotFoundError, match="stores no layer 3 of 'keys'; stored: 0-2"):
        store.qkv("000000", "k", layer=3)


# ---------------------------------------------------------------- tokens


def test_tokens_by_name_position_and_slice(store: TraceStore, made: list[Made]) -> None:
    hidden = made[3].expected["hidden_states"]  # 10 tokens, prompt 4, answer 4..8, end-of-sequence 9
    sample = store["000003"]
    for tokens, rows in [
        ("last_prompt", 3),
        ("first_answer", 4),
        ("last_answer", 8),
        (-1, 9),
        (0, 0),
        ("prompt", slice(0, 4)),
        ("answer", slice(4, 9)),
        ("all", slice(None)),
        (slice(2, None, 3), slice(2, None, 3)),
        (slice(None, None, -1), slice(None, None, -1)),
        ([7, 1, 1, -1], [7, 1, 1, 9]),
        ([], []),
    ]:
        np.testing.assert_array_equal(sample.hidden_states(tokens=tokens), hidden[:, rows])
        np.testing.assert_array_equal(sample.hidden_states(layer=1, tokens=tokens), hidden[1, rows])


@pytest.mark.parametrize("layout", ["causal", "full"])
def test_tokens_of_attention_are_query_rows(tmp_path: Path, layout: str) -> None:
    one = make_sample("000000", layout=layout)
    store, expected = _only(tmp_path, one), one.expected["attentions"]
    for tokens, rows in [("last_prompt", 4), ("answer", slice(5, 8)), ([6, 0, 3], [6, 0, 3]), ([], []), (-1, -1)]:
        np.testing.assert_array_equal(store.attention("000000", tokens=tokens), expected[:, :, rows])
        np.testing.assert_array_equal(store.attention("000000", layer=1, head=2, tokens=tokens), expected[1, 2, rows])


@pytest.mark.parametrize("layout", ["causal", "full"])
def test_positions_are_those_of_the_sequence_when_few_were_kept(tmp_path: Path, layout: str) -> None:
    one = make_sample("000000", sites=("hidden_states", "attentions", "keys"), kept=[[1, 3], [5, 9]], layout=layout)
    store = _only(tmp_path, one)
    hidden, attention = one.expected["hidden_states"], one.expected["attentions"]
    assert store.attention("000000").shape == (NUM_LAYERS, NUM_HEADS, 6, 9)
    np.testing.assert_array_equal(store.attention("000000"), attention)
    np.testing.assert_array_equal(store.hidden_states("000000", tokens="answer"), hidden[:, 2:5])
    np.testing.assert_array_equal(store.hidden_states("000000", tokens=[2, 5]), hidden[:, 1:3])
    np.testing.assert_array_equal(store.attention("000000", tokens=[8, 2]), attention[:, :, [5, 1]])
    np.testing.assert_array_equal(store.qkv("000000", "k", tokens=-1), one.expected["keys"][:, :, 5])
    np.testing.assert_array_equal(store.hidden_states("000000", tokens="all"), hidden)
    with pytest.raises(SampleNotFoundError, match=r"hidden_states of sample '000000': position 4 .*1 to 2, 5 to 8"):
        store.hidden_states("000000", tokens="last_prompt")
    with pytest.raises(SampleNotFoundError, match="position 0 was not kept"):
        store.attention("000000", tokens=slice(0, 2))


def test_an_empty_answer_has_no_tokens(store: TraceStore) -> None:
    sample = store["000002"]
    assert sample.hidden_states(tokens="answer").shape == (NUM_LAYERS + 1, 0, D_MODEL)
    assert sample.attention(layer=0, tokens="answer").shape == (NUM_HEADS, 0, 9)
    with pytest.raises(SampleNotFoundError, match="'000002': the sample has no such token"):
        sample.hidden_states(tokens="first_answer")


def test_nothing_kept_reads_as_nothing(tmp_path: Path) -> None:
    store = _only(tmp_path, make_sample("000000", sites=("hidden_states", "attentions", "topk_ids"), kept=[[9, 9]]))
    assert store.hidden_states("000000", layer=0).shape == (0, D_MODEL)
    assert store.attention("000000").shape == (NUM_LAYERS, NUM_HEADS, 0, 9)
    assert store.tensor("000000", "topk_ids").shape == (0, 2)
    with pytest.raises(SampleNotFoundError, match="position 0 was not kept; kept: none"):
        store.hidden_states("000000", tokens=0)


def test_tokens_that_are_none_are_refused(store: TraceStore) -> None:
    with pytest.raises(ConfigError, match=r"'last'.*last_prompt, first_answer, last_answer, prompt"):
        store.hidden_states("000000", tokens="last")
    with pytest.raises(SampleNotFoundError, match=r"'000000': no token 7;.* 7 tok"):
        store.hidden_states("000000", tokens=[0, 7])
    with pytest.raises(SampleNotFoundError, match="no such token"):
        store.hidden_states("000000", tokens=7)


# ---------------------------------------------------------------- torch


def test_reading_loads_no_torch(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train-00000": [make_sample("000000", dtype="bfloat16")]})
    code = (
        "import sys, tracekit\n"
        "with tracekit.TraceStore(sys.argv[1]) as store:\n"
        "    store[0].record, store[0].hidden_states(layer=1), store[0].attention(), store.records, store.info()\n"
        "    store.stack('hidden_states', layer=0), store.graph('000000', 0)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_torch_tensors_keep_dtype_and_values_and_can_be_written(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    one = make_sample("000000", sites=("hidden_states", "attentions", "keys"), dtype=dtype)
    store = _only(tmp_path, one)
    for site in one.expected:
        tensor = store.tensor("000000", site, layer=1, torch=True)
        assert tensor.dtype == getattr(torch, dtype)
        expected = one.expected[site][1].astype(np.float32)
        np.testing.assert_array_equal(tensor.float().numpy(), expected)
    tensor = store.hidden_states("000000", layer=1, torch=True)
    tensor[:] = 0
    assert store.hidden_states("000000", layer=1).astype(np.float32).all()


def test_torch_everywhere(store: TraceStore) -> None:
    torch = pytest.importorskip("torch")
    stacked = store.stack("hidden_states", layer=1, torch=True)
    assert stacked.values.dtype == torch.float32
    assert stacked.mask.dtype == torch.bool
    graph = store.graph("000000", 1, torch=True)
    assert graph.edge_index.dtype == torch.int64
    assert graph.x.shape == (7, D_MODEL)


# ---------------------------------------------------------------- many samples


def test_one_token_of_every_sample_is_stacked(store: TraceStore, made: list[Made]) -> None:
    stacked = store.stack("hidden_states", layer=2)
    assert stacked.keys == store.keys
    assert stacked.mask.tolist() == [True] * 4
    for row, one in zip(stacked.values, made, strict=True):
        np.testing.assert_array_equal(row, one.expected["hidden_states"][2, one.record.last_prompt_index])
    assert store.stack("hidden_states").values.shape == (4, NUM_LAYERS + 1, D_MODEL)
    chosen = store.stack("hidden_states", keys=["000003", "000001"], layer=-1, tokens="last_answer")
    assert chosen.keys == ["000003", "000001"]
    np.testing.assert_array_equal(chosen.values[0], made[3].expected["hidden_states"][-1, 8])


def test_samples_without_the_token_are_masked_and_zero(store: TraceStore, made: list[Made]) -> None:
    for tokens in ("first_answer", "last_answer", "answer_mean"):
        stacked = store.stack("hidden_states", layer=1, tokens=tokens)
        assert stacked.mask.tolist() == [True, True, False, True]
        assert not stacked.values[2].any()
        assert stacked.values[3].all()
    at_8 = store.stack("hidden_states", layer=1, tokens=8)
    assert at_8.mask.tolist() == [False, False, True, True]


def test_the_mean_over_the_answer_is_float32(tmp_path: Path) -> None:
    samples = [make_sample(f"{i:06d}", num_tokens=8 + i, dtype="bfloat16") for i in range(2)]
    write_dataset(tmp_path, {"train-00000": samples})
    stacked = TraceStore(tmp_path).stack("hidden_states", tokens="answer_mean")
    assert stacked.values.dtype == np.float32
    for row, one in zip(stacked.values, samples, strict=True):
        answer = one.expected["hidden_states"][:, 5 : one.record.last_answer_index + 1].astype(np.float32)
        np.testing.assert_allclose(row, answer.mean(axis=1), rtol=1e-6)


def test_all_tokens_are_padded(store: TraceStore, made: list[Made]) -> None:
    stacked = store.stack("hidden_states", layer=1, tokens="all")
    assert stacked.values.shape == (4, 10, D_MODEL)
    assert stacked.mask.sum(axis=1).tolist() == [7, 8, 9, 10]
    for values, mask, one in zip(stacked.values, stacked.mask, made, strict=True):
        np.testing.assert_array_equal(values[mask], one.expected["hidden_states"][1])
        assert not values[~mask].any()
    assert store.stack("hidden_states", tokens="all").values.shape == (4, NUM_LAYERS + 1, 10, D_MODEL)


def test_attention_is_padded_on_both_sides(store: TraceStore, made: list[Made]) -> None:
    stacked = store.stack("attentions", layer=1, tokens="all")
    assert stacked.values.shape == (4, NUM_HEADS, 10, 10)
    assert stacked.mask.shape == (4, 10)
    for values, one in zip(stacked.values, made, strict=True):
        length = len(one.record.token_ids)
        np.testing.assert_array_equal(values[:, :length, :length], one.expected["attentions"][1])
        assert not values[:, length:].any()
        assert not values[:, :, length:].any()
    assert store.stack("attentions", layer=1).values.shape == (4, NUM_HEADS, 10)


def test_only_tokens_may_differ_in_a_stack(tmp_path: Path) -> None:
    write_dataset(
        tmp_path, {"train-00000": [make_sample("000000", layers=[0, 1]), make_sample("000001", layers=[1, 2])]}
    )
    store = TraceStore(tmp_path)
    assert store.stack("hidden_states", layer=1).values.shape == (2, D_MODEL)
    with pytest.raises(DatasetError, match=r"cannot stack .*'000001' .*layers=\[1, 2\].* with .*layers=\[0, 1\]"):
        store.stack("hidden_states")
    with pytest.raises(DatasetError, match=r"layers=\[2\]"):
        store.stack("hidden_states", layer=-1)
    with pytest.raises(ConfigError, match="nothing to stack"):
        store.stack("hidden_states", keys=[])


def test_a_site_stored_by_layer_is_stacked_by_layer(tmp_path: Path) -> None:
    store = _only(tmp_path, make_sample("000000", sites=("keys",), heads_by_layer={"keys": [2, 4, 1]}))
    assert store.stack("keys", layer=1).values.shape == (1, 4, 3)
    with pytest.raises(DatasetError, match=r"'keys' .*'000000'.*`layer`"):
        store.stack("keys")


def test_no_question_is_on_both_sides_of_a_split(tmp_path: Path) -> None:
    samples = [make_sample(f"{i:06d}", sites=(), question_id=f"q{i // 3}") for i in range(30)]
    write_dataset(tmp_path, {"train-00000": samples})
    store = TraceStore(tmp_path)
    train, test = store.split(test_size=0.3)
    assert sorted(train + test) == store.keys
    assert len(test) == 9
    question = dict(zip(store.keys, store.records["question_id"].to_pylist(), strict=True))
    assert not {question[key] for key in train} & {question[key] for key in test}
    assert TraceStore(tmp_path).split(test_size=0.3) == (train, test)
    assert store.split(test_size=0.3, seed=1).test != test
    assert len(store.split(test_size=0.001).test) == 3


@pytest.mark.parametrize("test_size", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_a_stratified_split_has_every_class_on_both_sides_in_its_share(tmp_path: Path, test_size: float, seed: int):
    is_right = {f"q{i}": i % 8 == 0 for i in range(40)}
    samples = [make_sample(f"{i:06d}", sites=(), question_id=f"q{i // 2}") for i in range(80)]
    judged = [
        one._replace(record=msgspec.structs.replace(one.record, is_correct=is_right[one.record.question_id]))
        for one in samples
    ]
    write_dataset(tmp_path, {"train-00000": judged})
    store = TraceStore(tmp_path)
    sides = store.split(test_size=test_size, stratify="is_correct", seed=seed)
    questions = [{store.record(key).question_id for key in side} for side in sides]
    assert not questions[0] & questions[1]
    assert questions[0] | questions[1] == is_right.keys()
    for verdict, num in ((True, 5), (False, 35)):
        expected = min(max(round(test_size * num), 1), num - 1)
        assert sum(is_right[question] == verdict for question in questions[1]) == expected
    assert TraceStore(tmp_path).split(test_size=test_size, stratify="is_correct", seed=seed) == sides


def test_a_question_of_both_classes_is_a_class_of_its_own(tmp_path: Path):
    samples = [make_sample(f"{i:06d}", sites=(), question_id=f"q{i // 2}") for i in range(10)]
    right = [True, True, True, True, False, False, False, False, True, False]
    judged = [
        one._replace(record=msgspec.structs.replace(one.record, is_correct=is_right))
        for one, is_right in zip(samples, right, strict=True)
    ]
    write_dataset(tmp_path, {"train-00000": judged})
    train, test = TraceStore(tmp_path).split(test_size=0.5, stratify="is_correct")
    assert {"000008", "000009"} <= set(train)
    assert {right[int(key)] for key in test} == {True, False}


def test_a_split_is_stratified_by_a_column_of_few_values_alone(store: TraceStore) -> None:
    with pytest.raises(ConfigError, match="stratify by 'topic'"):
        store.split(stratify="topic")
    with pytest.raises(ConfigError, match="stratify by 'seed': all 4"):
        store.split(stratify="seed")
    with pytest.raises(ConfigError, match=r"stratify by 'key': .*question_id '.*'0000"):
        store.split(stratify="key")


def test_a_split_by_nothing_is_refused(store: TraceStore) -> None:
    with pytest.raises(ConfigError, match=r"split by 'topic'.*: task, schema_ver"):
        store.split(by="topic")
    with pytest.raises(ConfigError, match="cannot split by 'tokens'"):
        store.split(by="tokens")
    with pytest.raises(ConfigError, match="split by 'seed': all 4"):
        store.split(by="seed")
    with pytest.raises(ConfigError, match=r"test_size is 20.0.*0 .*1"):
        store.split(test_size=20.0)


def test_a_graph_holds_the_attention_of_one_layer(store: TraceStore, made: list[Made]) -> None:
    attention, hidden = made[0].expected["attentions"], made[0].expected["hidden_states"]
    graph = store.graph("000000", -1)
    assert graph.layer == NUM_LAYERS - 1
    assert graph.num_nodes == 7
    assert graph.tokens == made[0].record.tokens
    rebuilt = np.zeros((7, 7), np.float32)
    source, target = graph.edge_index
    rebuilt[target, source] = graph.edge_weight
    np.testing.assert_allclose(rebuilt, attention[-1].mean(axis=0), rtol=1e-6)
    assert (source <= target).all()
    np.testing.assert_array_equal(graph.x, hidden[NUM_LAYERS - 1])
    one_head = store.graph("000000", 0, heads=1)
    np.testing.assert_array_equal(one_head.edge_weight, attention[0, 1][np.tril_indices(7)])
    assert [graph.layer for graph in store["000000"].graphs(top_k=1)] == list(range(NUM_LAYERS))
    with pytest.raises(ConfigError, match=r"heads is 'all'.*'mean'"):
        store.graph("000000", 0, heads="all")


def test_a_graph_of_few_query_rows_keeps_the_places_of_tokens(tmp_path: Path) -> None:
    one = make_sample("000000", kept=[[5, 7]])
    graph = _only(tmp_path, one).graph("000000", 1, top_k=2)
    assert graph.edge_index[1].tolist() == [5, 5, 6, 6]
    assert graph.num_nodes == 9
    assert graph.x is None  # two of nine tokens' states are stored


# ---------------------------------------------------------------- many samples of several choices


CHOSEN = ((3, 2, 4), (5, 1), (2, 2, 2))
"""Lengths of the choices of three samples."""


@pytest.fixture
def made_choices() -> list[MadeChoices]:
    return [make_choices(f"{i:06d}", lengths=lengths, dtype="bfloat16") for i, lengths in enumerate(CHOSEN)]


@pytest.fixture
def choices(tmp_path: Path, made_choices: list[MadeChoices]) -> TraceStore:
    write_dataset(tmp_path, {"train-00000": made_choices[:2], "train-00001": made_choices[2:]}, config="csqa_mcq")
    return TraceStore(tmp_path)


def _check_choices(stacked: Stacked, made: list[MadeChoices], site: str, index: Any) -> None:
    """That each choice stands at its place, and that all else is zero and masked."""
    axis = SITES[site].axes.index("T")
    num_real = 0
    for values, mask, one in zip(stacked.values, stacked.mask, made, strict=True):
        for number, expected in enumerate(one.expected[site]):
            length = expected.shape[axis]
            expected = expected[index]
            assert mask[number].tolist() == [True] * length + [False] * (5 - length)
            place = tuple(slice(length) for length in expected.shape)
            np.testing.assert_array_equal(values[number][place], expected)
            num_real += np.count_nonzero(expected.astype(np.float32))
        assert not mask[len(one.expected[site]) :].any()
    assert np.count_nonzero(stacked.values.astype(np.float32)) == num_real


@pytest.mark.parametrize("site", CHOICE_SITES)
def test_choices_are_stacked_and_masked(choices: TraceStore, made_choices: list[MadeChoices], site: str) -> None:
    stacked = choices.stack(site)
    assert stacked.values.shape[:2] == (3, 3)
    assert stacked.mask.shape == (3, 3, 5)
    assert stacked.values.dtype == made_choices[0].stored[site].dtype
    assert stacked.keys == choices.keys
    _check_choices(stacked, made_choices, site, ())
    if "L" in SITES[site].axes:
        _check_choices(choices.stack(site, layer=-1, tokens="all"), made_choices, site, -1)


def test_stacks_of_choices_have_their_shapes(choices: TraceStore) -> None:
    assert choices.stack("hidden_states").values.shape == (3, 3, NUM_LAYERS + 1, 5, D_MODEL)
    assert choices.stack("hidden_states", layer=1).values.shape == (3, 3, 5, D_MODEL)
    assert choices.stack("attentions", layer=1).values.shape == (3, 3, NUM_HEADS, 5, 5)
    assert choices.stack("keys", ["000001"], layer=1).values.shape == (1, 2, NUM_KV_HEADS, 5, 3)
    assert choices.stack("hidden_states", layer=1, tokens=slice(2)).values.shape == (3, 3, 2, D_MODEL)
    torch = pytest.importorskip("torch")
    stacked = choices.stack("hidden_states", layer=1, torch=True)
    assert (stacked.values.dtype, stacked.mask.dtype) == (torch.bfloat16, torch.bool)


def test_the_first_and_a_late_token_of_each_choice(choices: TraceStore, made_choices: list[MadeChoices]) -> None:
    first = choices.stack("hidden_states", layer=2, tokens=0)
    assert first.values.shape == (3, 3, D_MODEL)
    assert first.mask.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    np.testing.assert_array_equal(first.values[1, 1], made_choices[1].expected["hidden_states"][1][2, 0])
    assert choices.stack("hidden_states", layer=2, tokens=3).mask.tolist() == [
        [False, False, True],
        [True, False, False],
        [False] * 3,
    ]
    last = choices.stack("attentions", tokens=-1)
    assert last.values.shape == (3, 3, NUM_LAYERS, NUM_HEADS, 5)
    np.testing.assert_array_equal(last.values[0, 2, 1, 1, :4], made_choices[0].expected["attentions"][2][1, 1, 3])


@pytest.mark.parametrize("tokens", ["last_prompt", "answer_mean", "answer", "prompt"])
def test_stacks_of_choices_know_no_answer(choices: TraceStore, tokens: str) -> None:
    with pytest.raises(ConfigError, match=f"hidden_states of sample '000000' holds choices, .* no tokens '{tokens}'"):
        choices.stack("hidden_states", tokens=tokens)


def test_samples_with_and_without_choices_do_not_go_together(tmp_path: Path) -> None:
    plain = make_sample("000000", sites=("hidden_states",))
    one = make_choices("000001", sites=("hidden_states",))
    plain = plain._replace(record=msgspec.structs.replace(one.record, key="000000", tensors=plain.record.tensors))
    write_dataset(tmp_path, {"train-00000": [plain, one]}, config="csqa_mcq")
    with pytest.raises(DatasetError, match=r"hidden_states of sample '000000'.*no choices"):
        TraceStore(tmp_path).stack("hidden_states", layer=0)


class _Noted(RemoteShards):
    """Shards far away that only note what would be fetched."""

    def __init__(self) -> None:
        self.asked: list[ByteRange] = []

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        self.asked = list(ranges)


def test_of_a_published_dataset_the_bytes_of_one_choice_are_fetched(choices: TraceStore) -> None:
    noted = _Noted()
    choices._bytes_of = dict.fromkeys(choices._bytes_of, noted)
    choices._folders = [folder._replace(bytes_of=noted) for folder in choices._folders]
    choices.prefetch(["000001"], sites=["hidden_states"], layers=[0, 2], choice=-1)
    start = choices._row("000001").tensors["hidden_states"].start
    item = D_MODEL * 2  # bfloat16; six tokens a layer, of which the last is the second choice
    assert [(one.start, one.stop) for one in noted.asked] == [
        (start + 6 * item * layer, start + 6 * item * (layer + 1))
        for layer in (0, 2)  # whole: pieces are checked
    ]
    choices.prefetch(["000001"], sites=["hidden_states"], layers=[0])
    assert [(one.start, one.stop) for one in noted.asked] == [(start, start + 6 * item)]


# ---------------------------------------------------------------- everything at once


def test_arrays_are_stacks_of_every_site(store: TraceStore, made: list[Made]) -> None:
    arrays = store.arrays()
    assert {*arrays} == {*SITES}
    for site, stacked in arrays.items():
        whole = store.stack(site, tokens="all")
        np.testing.assert_array_equal(stacked.values, whole.values)
        np.testing.assert_array_equal(stacked.mask, whole.mask)
    chosen = store.arrays(["attentions", "resid_embed"], layers=[-1, 0], keys=["000003", "000000"])
    assert {site: one.values.shape for site, one in chosen.items()} == {
        "attentions": (2, 2, NUM_HEADS, 10, 10),
        "resid_embed": (2, 10, D_MODEL),
    }
    assert chosen["attentions"].keys == ["000003", "000000"]
    np.testing.assert_array_equal(chosen["attentions"].values[0], made[3].expected["attentions"][[-1, 0]])
    np.testing.assert_array_equal(chosen["attentions"].values[1, :, :, :7, :7], made[0].expected["attentions"][[-1, 0]])


def test_arrays_of_choices(choices: TraceStore, made_choices: list[MadeChoices]) -> None:
    arrays = choices.arrays()
    assert {*arrays} == {*CHOICE_SITES}
    for site, stacked in arrays.items():
        _check_choices(stacked, made_choices, site, ())
    chosen = choices.arrays(["hidden_states"], layers=[2, 0])["hidden_states"]
    assert chosen.values.shape == (3, 3, 2, 5, D_MODEL)
    np.testing.assert_array_equal(chosen.values[0, 1, :, :2], made_choices[0].expected["hidden_states"][1][[2, 0]])


def test_arrays_of_shapes_that_differ_by_layer_are_one_a_layer(tmp_path: Path) -> None:
    one = make_sample("000000", sites=("hidden_states", "keys"), heads_by_layer={"keys": [2, 4, 1]})
    store = _only(tmp_path, one)
    assert [*store.arrays()] == ["hidden_states", "keys.0", "keys.1", "keys.2"]
    assert store.arrays()["keys.1"].values.shape == (1, 4, 9, 3)
    chosen = store.arrays(["keys"], layers=[-1])
    np.testing.assert_array_equal(chosen["keys.2"].values[0], one.expected["keys.2"][0])
    with pytest.raises(SampleNotFoundError, match="stores no 'queries'"):
        store.arrays(["queries"])
    with pytest.raises(ConfigError, match="nothing to stack"):
        store.arrays(keys=[])
    with pytest.raises(ConfigError, match="`layers` is empty; leave it out"):
        store.arrays(layers=[])


# ---------------------------------------------------------------- datasets


def test_meta_is_what_the_manifest_says(store: TraceStore, tmp_path: Path, made: list[Made]) -> None:
    manifest = read_struct(Layout(tmp_path, "trivia_qa").manifest, Manifest)
    plain = msgspec.to_builtins(manifest)
    meta = store.meta
    shared = {*plain} & {*meta}
    assert shared >= {"model", "source", "run", "versions", "tensors", "splits", "schema_version", "verification"}
    assert {name: meta[name] for name in shared} == {name: plain[name] for name in shared}
    assert (meta["num_samples"], meta["num_shards"], meta["is_open"]) == (4, 2, False)
    assert meta["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.tar"))
    msgspec.json.encode(meta)
    write_dataset(tmp_path / "b", {"train-00000": [make_sample("000009")]}, planned=["train-00001"], is_finished=False)
    both = TraceStore([tmp_path, tmp_path / "b"]).meta
    assert both[0] == meta
    assert (both[1]["num_samples"], both[1]["is_open"], both[1]["model"]["id"]) == (1, True, "test/model")


def test_info_sums_up(store: TraceStore, tmp_path: Path) -> None:
    info = store.info()
    assert (info.configs, info.task, info.models, info.num_samples) == (["trivia_qa"], "trivia_qa", [MODEL], 4)
    assert [(split.name, split.num_samples) for split in info.splits] == [("train", 4)]
    assert info.num_bytes == sum(path.stat().st_size for path in (tmp_path / "data").rglob("*.tar"))
    assert [(one.name, one.layout) for one in info.tensors][:2] == [
        ("hidden_states", "dense"),
        ("attentions", "causal"),
    ]
    assert info.verification == VERIFICATION
    assert not info.is_open
    msgspec.json.encode(info)


def test_an_open_dataset_is_read_as_far_as_it_goes(tmp_path: Path, made: list[Made]) -> None:
    shards = {"train-00000": made[:2], "train-00001": made[2:]}
    write_dataset(tmp_path, shards, planned=["train-00002"], is_finished=False)
    with TraceStore(tmp_path) as store:
        assert store.is_open
        assert store.keys == ["000000", "000001", "000002", "000003"]
        for one in made:
            assert store.record(one.record.key) == one.record
            for site, expected in one.expected.items():
                np.testing.assert_array_equal(store.tensor(one.record.key, site), expected)
        assert [sample.key for sample in store.shard(1)] == ["000002", "000003"]
        info = store.info()
        assert info.is_open
        assert {one.name: one.num_bytes for one in info.tensors} == {
            site: sum(one.stored[site].nbytes for one in made) for site in SITES
        }
        assert info.verification.num_replayed == 4  # each batch noted one
        with pytest.raises(SampleNotFoundError, match="no shard 2 in split 'train'"):
            store.shard(2)


def test_a_run_that_has_just_begun_is_empty(tmp_path: Path) -> None:
    write_dataset(tmp_path, {}, planned=["train-00000"], is_finished=False)
    store = TraceStore(tmp_path)
    assert (len(store), list(store), store.records.num_rows, store.info().num_samples) == (0, [], 0, 0)
    with pytest.raises(SampleNotFoundError, match="the dataset has no sample yet"):
        store["000000"]
    with pytest.raises(SampleNotFoundError, match="shards: none yet"):
        store.shard(0)


def test_splits_are_read_together(tmp_path: Path) -> None:
    train, test = make_sample("000001"), make_sample("000000", split="test")
    write_dataset(tmp_path, {"train-00000": [train], "test-00000": [test]})
    store = TraceStore(tmp_path)
    assert store.keys == ["000001", "000000"]
    assert store.records["split"].to_pylist() == ["train", "test"]
    for one in (train, test):
        np.testing.assert_array_equal(store.hidden_states(one.record.key), one.expected["hidden_states"])
    assert [sample.key for sample in store.shard(0, split="test")] == ["000000"]
    with pytest.raises(ConfigError, match=r"shard 0 .*`split`: test, train"):
        store.shard(0)


def test_several_configurations_need_a_name(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    write_dataset(tmp_path, {"train-00000": [make_sample("000001")]}, config="other")
    with pytest.raises(DatasetError, match=r"\(other, trivia_qa\).*`config`"):
        TraceStore(tmp_path)
    assert TraceStore(tmp_path, config="other").keys == ["000001"]
    with pytest.raises(DatasetError, match=r"'third'.*other, trivia_qa"):
        TraceStore(str(tmp_path), "third")


def test_folders_read_as_one(tmp_path: Path) -> None:
    samples = [make_sample("000003"), make_sample("000001", model=msgspec.structs.replace(MODEL, id="other/model"))]
    for name, one in zip("ab", samples, strict=True):
        write_dataset(tmp_path / name, {"train-00000": [one]})
    store = TraceStore([tmp_path / "a", str(tmp_path / "b")])
    assert store.keys == ["000003", "000001"]
    for one in samples:
        np.testing.assert_array_equal(store.hidden_states(one.record.key), one.expected["hidden_states"])
    assert [sample.key for sample in store.shard(0)] == store.keys
    info = store.info()
    assert [model.id for model in info.models] == ["test/model", "other/model"]
    assert info.splits[0].num_samples == 2
    assert info.verification.num_replayed == 2
    assert store.records["key"].to_pylist() == store.keys


def test_a_key_in_two_folders_is_named(tmp_path: Path) -> None:
    for name, keys in (("a", ["000000", "000001"]), ("b", ["000001", "000002"])):
        write_dataset(tmp_path / name, {"train-00000": [make_sample(key) for key in keys]})
    with pytest.raises(DatasetError, match=r"key '000001' .*a, .*b; "):
        TraceStore([tmp_path / "a", tmp_path / "b"])


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        TraceStore(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="is not a tracekit dataset"):
        TraceStore(tmp_path)
    with pytest.raises(DatasetError, match="no folder was given"):
        TraceStore([])


def test_another_contract_is_refused(tmp_path: Path) -> None:
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    manifest = read_struct(layout.manifest, Manifest)
    for change, text in (
        (
            {"schema_version": "3.0"},
            "written by tracekit schema 3.0; .*1.0 to 2.x.*pip install -U",
        ),
        ({"schema_version": "0.9"}, "written by tracekit schema 0.9; this one reads 1.0 to 2.x"),
        ({"schema_version": "two"}, "written by tracekit schema two; this one reads"),
        ({"task": "chess"}, r"schemas/trivia_qa\.json .*'trivia_qa'.*'chess'"),
    ):
        write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, **change)))
        with pytest.raises(DatasetError, match=text):
            TraceStore(tmp_path)
    later = msgspec.to_builtins(manifest) | {"schema_version": "3.1", "shards": {"of": "another shape"}}
    write_atomic(layout.manifest, json.dumps(later).encode())
    with pytest.raises(DatasetError, match=r"written by tracekit schema 3\.1"):
        TraceStore(tmp_path)
    for version in ("1.7", "2.7"):
        write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, schema_version=version)))
        assert len(TraceStore(tmp_path)) == 1


def test_names_in_a_manifest_lead_nowhere_else(tmp_path: Path) -> None:
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    manifest = json.loads(layout.manifest.read_text())
    file = {"path": "records/c/dev.one.parquet", "num_bytes": 1, "sha256": "0" * 64}
    for where, field, good, bad in [
        ("shards", "name", "dev.one-00000", ["../x-00000", "/x-00000", "a/b-00000", "train", ""]),
        ("shards", "sha256", "a" * 64, ["", "A" * 64, "a" * 63, f"../{'a' * 61}"]),
        ("shards", "num_bytes", 0, [-1]),
        ("splits", "name", "dev.one", ["..", "../x", "a/b", ""]),
        ("files", "path", "records/c/dev.one.parquet", ["../x", "/etc/passwd", "a/../b", "a//b", ".hidden", "a/.b"]),
        ("files", "sha256", "0" * 64, [""]),
    ]:
        for value in [good, *bad]:
            changed = json.loads(json.dumps({**manifest, "files": [file]}))
            changed[where][0][field] = value
            layout.manifest.write_text(json.dumps(changed))
            if value == good:
                read_struct(layout.manifest, Manifest)
                continue
            with pytest.raises(DatasetError, match=rf"is not a tracekit manifest: .*`\$\.{where}\[0\]\.{field}`"):
                TraceStore(tmp_path)


# ---------------------------------------------------------------- damage


def _layout(root: Path) -> Layout:
    return Layout(root, "trivia_qa")


def test_a_missing_shard_is_named_with_the_next_step(store: TraceStore, tmp_path: Path) -> None:
    _layout(tmp_path).shard("train-00000").unlink()
    message = r"train-00000.tar cannot be read \(.*No such file.*\).*`tracekit verify`"
    with pytest.raises(DatasetError, match=message):
        store.hidden_states("000000")
    assert store.hidden_states("000002").shape[1] == 9


def test_a_shard_cut_short_is_never_read(store: TraceStore, tmp_path: Path) -> None:
    shard = _layout(tmp_path).shard("train-00000")
    size = shard.stat().st_size
    for cut in (size - 1, size // 2, 0):
        os.truncate(shard, cut)
        with pytest.raises(
            CorruptShardError, match=rf"has {cut} bytes, the manifest says {size}. Run `tracekit verify`"
        ):
            store.hidden_states("000001", layer=0)


def test_offsets_past_the_end_never_give_a_short_array(tmp_path: Path) -> None:
    one = make_sample("000000")
    layout = write_dataset(tmp_path, {"train-00000": [one]})
    shard = layout.shard("train-00000")
    os.truncate(shard, 4096)
    manifest = read_struct(layout.manifest, Manifest)
    lying = [msgspec.structs.replace(info, num_bytes=4096) for info in manifest.shards]
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, shards=lying)))
    with pytest.raises(CorruptShardError, match=r"bytes \d+ to \d+ .*4096.*`tracekit"):
        TraceStore(tmp_path).attention("000000")


def test_another_record_in_its_place_is_noticed(store: TraceStore, tmp_path: Path) -> None:
    shard = _layout(tmp_path).shard("train-00001")
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'"key":"000002"', b'"key":"000009"'))
    with pytest.raises(CorruptShardError, match=r"'000009'.*'000002'"):
        store.record("000002")
    shard.write_bytes(data.replace(b'"key":"000003"', b'"kee":"000003"'))
    with pytest.raises(CorruptShardError, match=r"train-00001.tar: record '000003': .*`key`"):
        TraceStore(tmp_path).record("000003")


def test_a_record_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    manifest = read_struct(layout.manifest, Manifest)
    wrong = [msgspec.structs.replace(split, num_samples=2) for split in manifest.splits]
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, splits=wrong)))
    with pytest.raises(DatasetError, match=r"train.parquet .*1 .*2.*`tracekit verify`"):
        TraceStore(tmp_path)
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, shards=[])))
    with pytest.raises(DatasetError, match="names shards that the manifest does not: train-00000"):
        TraceStore(tmp_path)
    write_atomic(layout.manifest, to_bytes(manifest))
    pa.parquet.write_table(pa.table({"key": ["000000"]}), layout.records_table("train"))
    with pytest.raises(DatasetError, match="no column _checksums, _data_offset"):
        TraceStore(tmp_path)
    layout.records_table("train").write_bytes(b"not parquet at all")
    with pytest.raises(DatasetError, match=r"train.parquet cannot be read"):
        TraceStore(tmp_path)
    layout.records_table("train").unlink()
    with pytest.raises(DatasetError, match=r"train.parquet cannot be read"):
        TraceStore(tmp_path)


def test_a_tensor_that_contradicts_its_entry_is_refused(tmp_path: Path) -> None:
    one = make_sample("000000")
    for change, text in [
        ({"shape": [4, 9, 9]}, "does not go with its"),
        ({"positions": [[0, 8]]}, "with 8 rows does not go"),
        ({"positions": [[0, 1 << 32]]}, "names positions outside a text of 9 tokens"),
        ({"positions": [[1 << 32, (1 << 32) + 9]]}, "names positions outside a text"),
        ({"positions": [[-(1 << 32), 9]]}, "names positions outside a"),
        ({"positions": [[0, 9], [0, 9]]}, "names positions outside a text of 9"),
        ({"positions": [[0, 9, 9]]}, "names positions"),
        ({"num_keys": 1 << 32}, "names positions outside"),
        ({"layers": [1 << 32]}, r"names 1 layers, it has \[4, 9, 8\]"),
        ({"shape": [1 << 32, 9, 8]}, "names 4 layers, it has"),
        ({"shape": [4, 9, 1 << 32]}, "with 9 rows does not go with its"),
        ({"shape": [4, 9, 1 << 62]}, "does not go with its 1152 bytes"),
        ({"dtype": "complex64"}, "has an unknown dtype"),
        ({"choice_offsets": [0, 4, 8]}, r"positions \[\[0, 9\]\] and num_keys 0, expected \[\[0, 8\]\] and 0"),
    ]:
        specs = [msgspec.structs.replace(one.record.tensors[0], **change), one.record.tensors[1]]
        record = msgspec.structs.replace(one.record, tensors=specs)
        folder = tmp_path / hashlib.sha256(repr(change).encode()).hexdigest()[:8]
        write_dataset(folder, {"train-00000": [one._replace(record=record)]})
        tracemalloc.start()
        with pytest.raises(DatasetError, match=f"sample '000000': tensor 'hidden_states'.*{text}"):
            TraceStore(folder).hidden_states("000000")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


# ---------------------------------------------------------------- lifetime


def test_arrays_outlive_the_store(tmp_path: Path) -> None:
    one = make_sample("000000")
    write_dataset(tmp_path, {"train-00000": [one]})
    with TraceStore(tmp_path) as store:
        values = store.hidden_states("000000")
        sample = store[0]
    np.testing.assert_array_equal(values, one.expected["hidden_states"])
    for read in (sample.hidden_states, lambda: store.records, lambda: store.by_prompt("x"), lambda: sample.record):
        with pytest.raises(DatasetError, match="closed; open"):
            read()


def test_a_store_can_be_handed_to_another_process(store: TraceStore) -> None:
    sample = pickle.loads(pickle.dumps(store["000001"]))  # noqa: S301 our own bytes
    np.testing.assert_array_equal(sample.hidden_states(), store.hidden_states("000001"))


def _num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the files of this process in /proc")
def test_mapped_shards_hold_no_file_open(tmp_path: Path) -> None:
    names = [f"train-{i:05d}" for i in range(20)]
    write_dataset(tmp_path, {name: [make_sample(name)] for name in names})
    store = TraceStore(tmp_path)
    store.hidden_states(names[0])
    before = _num_open_files()
    values = [store.hidden_states(name) for name in names]
    assert len(values) == 20
    assert _num_open_files() <= before
