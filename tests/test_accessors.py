"""Choices: what was put in, one after the other, comes out one by one, and everything is refused that means nothing."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.datasets_for_tests import (
    CHOICE_SITES,
    D_MODEL,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    MadeChoices,
    make_choices,
    make_sample,
    write_dataset,
)
from tracekit.errors import ConfigError, SampleNotFoundError
from tracekit.read.accessors import handed_out
from tracekit.read.store import TraceStore
from tracekit.sites import SITES

LENGTHS = (3, 2, 4)


@pytest.fixture
def made() -> MadeChoices:
    return make_choices("000000", lengths=LENGTHS)


@pytest.fixture
def store(tmp_path: Path, made: MadeChoices) -> TraceStore:
    """That sample, and one with two choices."""
    write_dataset(tmp_path, {"train-00000": [made, make_choices("000001", lengths=(5, 1))]}, config="csqa_mcq")
    return TraceStore(tmp_path)


# ---------------------------------------------------------------- one choice


@pytest.mark.parametrize("site", CHOICE_SITES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_choice_of_every_site_comes_back(tmp_path: Path, site: str, dtype: str) -> None:
    one = make_choices("000000", lengths=LENGTHS, dtype=dtype)
    write_dataset(tmp_path, {"train-00000": [one]}, config="csqa_mcq")
    store = TraceStore(tmp_path)
    for choice in range(-3, 3):
        expected = one.expected[site][choice]
        read = store.tensor("000000", site, choice=choice)
        assert read.dtype == expected.dtype == one.stored[site].dtype
        np.testing.assert_array_equal(read, expected)
        for layer in range(-len(expected), len(expected)) if "L" in SITES[site].axes else ():
            np.testing.assert_array_equal(store.tensor("000000", site, layer=layer, choice=choice), expected[layer])


def test_accessors_take_a_choice(store: TraceStore, made: MadeChoices) -> None:
    sample, expected = store["000000"], made.expected
    assert sample.record == made.record
    assert sample.hidden_states(choice=1).shape == (NUM_LAYERS + 1, 2, D_MODEL)
    np.testing.assert_array_equal(sample.hidden_states(layer=2, choice=-1), expected["hidden_states"][2][2])
    np.testing.assert_array_equal(sample.attention(layer=1, head=-1, choice=0), expected["attentions"][0][1, -1])
    np.testing.assert_array_equal(sample.attention(head=2, choice=2), expected["attentions"][2][:, 2])
    assert sample.attention(layer=0, choice=1).shape == (NUM_HEADS, 2, 2)
    for letter, site in (("q", "queries"), ("k", "keys"), ("v", "values")):
        np.testing.assert_array_equal(sample.qkv(letter, layer=0, head=1, choice=2), expected[site][2][0, 1])
    np.testing.assert_array_equal(sample.resid("pre_attn", layer=1, choice=0), expected["resid_pre_attn"][0][1])
    np.testing.assert_array_equal(sample.resid("embed", choice=2), expected["resid_embed"][2])
    np.testing.assert_array_equal(sample.hidden_states(choice=np.int64(1)), expected["hidden_states"][1])


def test_a_choice_is_a_view_of_the_shard(store: TraceStore) -> None:
    for choice in range(3):
        whole, part = store.hidden_states("000000", layer=1), store.hidden_states("000000", layer=1, choice=choice)
        assert np.shares_memory(whole, part)
        assert np.shares_memory(store["000000"].tensors()["attentions"], store.attention("000000", choice=choice))


def test_grouped_heads_of_a_choice_are_repeated(store: TraceStore, made: MadeChoices) -> None:
    repeated = np.repeat(made.expected["values"][1], NUM_HEADS // NUM_KV_HEADS, axis=1)
    np.testing.assert_array_equal(store.qkv("000000", "v", choice=1, expand_heads=True), repeated)
    np.testing.assert_array_equal(
        store.qkv("000000", "v", layer=2, head=3, choice=1, expand_heads=True), repeated[2, 3]
    )


def test_positions_count_within_the_choice(store: TraceStore, made: MadeChoices) -> None:
    hidden, attention = made.expected["hidden_states"][2], made.expected["attentions"][2]
    rows: Any
    for tokens, rows in [(0, 0), (-1, 3), ([3, 0], [3, 0]), (slice(1, 9), slice(1, 4)), ("all", slice(None))]:
        np.testing.assert_array_equal(store.hidden_states("000000", choice=2, tokens=tokens), hidden[:, rows])
        np.testing.assert_array_equal(
            store.attention("000000", layer=0, choice=2, tokens=tokens), attention[0][:, rows]
        )
    with pytest.raises(SampleNotFoundError, match="hidden_states of sample '000000': no token 2; the sample has 2 tok"):
        store.hidden_states("000000", choice=1, tokens=[0, 2])
    with pytest.raises(SampleNotFoundError, match="no such token"):
        store.hidden_states("000000", choice=1, tokens=2)


@pytest.mark.parametrize("tokens", ["prompt", "answer", "last_prompt", "first_answer", "last_answer", "CLS"])
def test_names_of_tokens_mean_nothing_in_choices(store: TraceStore, tokens: str) -> None:
    text = (
        f"hidden_states of sample '000000' holds choices, in which there are no tokens '{tokens}'; expected all, a pos"
    )
    for choice in (None, 1):
        with pytest.raises(ConfigError, match=text):
            store.hidden_states("000000", choice=choice, tokens=tokens)


# ---------------------------------------------------------------- all choices


def test_without_a_choice_dense_sites_are_as_stored_and_attention_a_list(store: TraceStore, made: MadeChoices) -> None:
    for site in CHOICE_SITES:
        if site != "attentions":
            np.testing.assert_array_equal(store.tensor("000000", site), made.stored[site])
    np.testing.assert_array_equal(store.hidden_states("000000", layer=1), made.stored["hidden_states"][1])
    np.testing.assert_array_equal(
        store.hidden_states("000000", tokens=[3, -1]), made.stored["hidden_states"][:, [3, 8]]
    )
    for read, index in [
        (store.attention("000000"), ()),
        (store.attention("000000", layer=1), (1,)),
        (store.attention("000000", layer=-1, head=2, tokens=0), (-1, 2, 0)),
    ]:
        assert isinstance(read, list)
        for array, expected in zip(read, made.expected["attentions"], strict=True):
            np.testing.assert_array_equal(array, expected[index])
    np.testing.assert_array_equal(store["000000"].tensors()["attentions"], made.stored["attentions"])


def test_a_choice_that_is_not_there_is_named(store: TraceStore, tmp_path: Path) -> None:
    for choice in (3, -4):
        with pytest.raises(
            SampleNotFoundError, match=f"keys of sample '000000': no choice {choice}; choices are 0 to 2"
        ):
            store.qkv("000000", "k", choice=choice)
    with pytest.raises(SampleNotFoundError, match="choices are 0 to 1"):
        store.attention("000001", choice=2)
    write_dataset(tmp_path / "plain", {"train-00000": [make_sample("000000")]})
    plain = TraceStore(tmp_path / "plain")
    for read in (plain.hidden_states, plain.attention, lambda key, choice: plain.graph(key, 0, choice=choice)):
        with pytest.raises(ConfigError, match="of sample '000000' has no choices; leave `choice` out"):
            read("000000", choice=0)


def test_a_graph_is_of_one_choice(store: TraceStore, made: MadeChoices) -> None:
    graph = store.graph("000000", -1, choice=-1)
    assert (graph.num_nodes, graph.tokens, graph.layer) == (4, ["t5", "t6", "t7", "t8"], NUM_LAYERS - 1)
    rebuilt = np.zeros((4, 4), np.float32)
    rebuilt[graph.edge_index[1], graph.edge_index[0]] = graph.edge_weight
    np.testing.assert_allclose(rebuilt, made.expected["attentions"][2][-1].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(graph.x, made.expected["hidden_states"][2][NUM_LAYERS - 1])
    assert [one.num_nodes for one in store["000000"].graphs(choice=1, heads=0)] == [2] * NUM_LAYERS
    with pytest.raises(
        ConfigError, match=r"attentions of sample '000000' holds 3 choices; choose one with `choice`, 0 to 2"
    ):
        store.graph("000000", 0)


# ---------------------------------------------------------------- torch, other processes


def test_choices_as_torch_tensors_keep_their_dtype(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    one = make_choices("000000", dtype="bfloat16")
    write_dataset(tmp_path, {"train-00000": [one]}, config="csqa_mcq")
    store = TraceStore(tmp_path)
    tensors = store.attention("000000", layer=1, torch=True)
    for tensor, expected in zip(tensors, one.expected["attentions"], strict=True):
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), expected[1].astype(np.float32))
    tensor = store.hidden_states("000000", choice=1, torch=True)
    np.testing.assert_array_equal(tensor.float().numpy(), one.expected["hidden_states"][1].astype(np.float32))
    tensor.zero_()
    assert store.hidden_states("000000", choice=1).astype(np.float32).all()


def test_a_sample_of_choices_goes_to_another_process(store: TraceStore, made: MadeChoices) -> None:
    sample = pickle.loads(pickle.dumps(store["000000"]))  # noqa: S301 our own bytes
    np.testing.assert_array_equal(sample.resid(choice=1), made.expected["resid_post_mlp"][1])


def test_arrays_are_handed_out_as_they_are_and_tensors_are_copies() -> None:
    torch = pytest.importorskip("torch")
    array = np.arange(6.0).reshape(2, 3)
    array.flags.writeable = False
    assert handed_out(array, False) is array
    tensor = handed_out(array.T, True)
    tensor[0, 0] = 9
    assert torch.equal(tensor[1:], torch.tensor([[1.0, 4.0], [2.0, 5.0]], dtype=torch.float64))
    assert array[0, 0] == 0
