"""Reading a published dataset by byte ranges: the right values, by few requests of few bytes, whatever goes wrong."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_for_tests import TestHub
from tests.hubserver_state import Request
from tests.publishing_for_tests import REPO, publish
from tracekit.read.remote import MAX_GAP_BYTES, MAX_RANGE_BYTES, ByteRange, merge_ranges

SHARD = "data/trivia_qa/validation-{:05d}.tar"

PRELUDE = """
import json, sys
import numpy as np
import tracekit, tracekit.hub, tracekit.read.remote
from tracekit.errors import TracekitError
tracekit.hub.FIRST_WAIT_SECONDS = 0.01
local = tracekit.TraceStore(sys.argv[1])

def open_store(revision="v1.0.0", repo="tester/traces", **options):
    return tracekit.TraceStore(f"hf://datasets/{repo}@{revision}", **options)

def says(function):
    try:
        return f"no error: {function()!r}"
    except TracekitError as error:
        return f"{type(error).__name__}: {error}"

"""


@pytest.fixture(scope="module")
def published(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestHub]:
    """A Hub with the 12 questions of `finished`, in 3 shards, as v1.0.0."""
    folder = tmp_path_factory.mktemp("published")
    running = TestHub(folder / "hub", mode="xet")
    publish(running, Path(shutil.copytree(finished, folder / "run")), "v1.0.0")
    yield running
    running.close()


@pytest.fixture
def remote(published: TestHub) -> Iterator[TestHub]:
    """That Hub, its log empty and nothing wrong with it. Commits are not undone: make branches."""
    published.faults()
    published.hub.watches.clear()
    published.log()
    yield published
    published.faults()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty folder for ranges."""
    return tmp_path / "cache"


def read(hub: TestHub, code: str, folder: Path, cache: Path, **options: Any) -> Any:
    """Run client code in a fresh process; what its last line says, as JSON."""
    done = hub.python(PRELUDE + code, folder, TRACEKIT_CACHE=str(cache), **options)
    return json.loads(done.stdout.splitlines()[-1])


def shard_reads(log: list[Request]) -> list[Request]:
    """The requests that fetched bytes of shards; fails if one asked for a whole file."""
    found = [r for r in log if r.method == "GET" and "/_cdn/" in r.path and r.status in (200, 206)]
    assert all(r.range for r in found), "a whole file was fetched"
    assert not [r for r in log if r.method == "GET" and re.search(r"/resolve/.*\.tar", r.path)]
    return found


def num_heads(log: list[Request]) -> Counter[str]:
    """How often the address of each shard was resolved."""
    found = (re.search(r"/resolve/[^/]+/(.*\.tar)", r.path) for r in log if r.method == "HEAD")
    return Counter(match[1].replace("%2F", "/") for match in found if match)


# ---------------------------------------------------------------- what is moved


def test_one_layer_of_one_sample_moves_its_bytes_and_no_more(remote: TestHub, finished: Path, cache: Path):
    code = """
store, key = open_store(), local.keys[3]
there = store.hidden_states(key, layer=1)
here = local.hidden_states(key, layer=1)
assert (there == here).all() and there.dtype == here.dtype and not there.flags.writeable
print(json.dumps(here.nbytes))
"""
    num_bytes = read(remote, code, finished, cache)
    log = remote.log()
    reads = shard_reads(log)
    assert len(reads) == 1
    assert sum(r.sent for r in reads) <= 1.2 * num_bytes
    assert list(num_heads(log).values()) == [1]
    assert not any(r.has_token for r in reads), "the token went to the storage"


def test_opening_and_reading_records_fetches_no_shard(remote: TestHub, finished: Path, cache: Path):
    code = """
store = open_store()
assert store.keys == local.keys and store.records.equals(local.records)
assert all(store.record(key) == local.record(key) for key in local.keys)
assert [s.key for s in store.by_prompt(local.record(local.keys[2]).question)] == [local.keys[2]]
assert len(open_store(config="trivia_qa").info().tensors) == len(local.info().tensors)
print(json.dumps(len(store)))
"""
    assert read(remote, code, finished, cache) == 12
    log = remote.log()
    assert shard_reads(log) == []
    assert not num_heads(log)
    paths = " ".join(r.path for r in log)
    assert "README.md" not in paths
    assert "load_traces.py" not in paths


def test_every_sample_of_a_shard_shares_one_resolved_address(remote: TestHub, finished: Path, cache: Path):
    code = """
store = open_store()
for key in local.keys:
    assert (store.hidden_states(key, layer=2) == local.hidden_states(key, layer=2)).all()
    assert (store.attention(key, layer=0) == local.attention(key, layer=0)).all()
print(len(local.keys))
"""
    assert read(remote, code, finished, cache) == 12
    log = remote.log()
    assert num_heads(log) == {SHARD.format(n): 1 for n in range(3)}
    assert len(shard_reads(log)) == 24


def test_a_stack_asks_once_for_neighbours(remote: TestHub, finished: Path, cache: Path):
    code = """
tracekit.read.remote.MAX_GAP_BYTES = 1_000_000
there, here = (s.stack("hidden_states", layer=1, tokens="all") for s in (open_store(), local))
assert (there.values == here.values).all() and (there.mask == here.mask).all() and there.keys == here.keys
print(1)
"""
    read(remote, code, finished, cache)
    log = remote.log()
    assert len(shard_reads(log)) == 3, "one request a shard"
    assert num_heads(log) == {SHARD.format(n): 1 for n in range(3)}


def test_prefetching_fetches_neighbours_together_and_little_else(remote: TestHub, finished: Path, cache: Path):
    code = """
tracekit.read.remote.MAX_GAP_BYTES = 64
store = open_store()
store.prefetch(sites=["hidden_states"], layers=[0, 1])
asked = sum(local.hidden_states(key, layer=layer).nbytes for key in local.keys for layer in (0, 1))
tracekit.hub.HubFile.read = None  # what is prefetched is not asked for again
for key in local.keys:
    for layer in (0, 1):
        assert (store.hidden_states(key, layer=layer) == local.hidden_states(key, layer=layer)).all()
store.prefetch(sites=["hidden_states"], layers=[0, 1])
print(asked)
"""
    num_bytes = read(remote, code, finished, cache)
    reads = shard_reads(remote.log())
    assert len(reads) <= 12
    assert num_bytes <= sum(r.sent for r in reads) <= 1.3 * num_bytes


def test_requests_run_side_by_side(remote: TestHub, finished: Path, cache: Path):
    code = """
import time
tracekit.read.remote.MAX_GAP_BYTES = 0
store = open_store()
for shard in (0, 1, 2):
    next(iter(store.shard(shard))).hidden_states(layer=2)
started = time.monotonic()
store.prefetch(sites=["hidden_states"], layers=[0])
print(time.monotonic() - started)
"""
    remote.faults({"match": "/_cdn/", "action": "stall", "seconds": 0.3, "skip": 3, "times": 100})
    seconds = read(remote, code, finished, cache)
    assert len(shard_reads(remote.log())) == 15
    assert 0.6 <= seconds < 0.3 * 12 / 1.5


def test_a_second_process_with_the_same_cache_moves_no_shard(remote: TestHub, finished: Path, cache: Path):
    code = """
values = open_store().stack("hidden_states", layer=1).values
assert (values == local.stack("hidden_states", layer=1).values).all()
print(1)
"""
    home = remote.new_home()
    read(remote, code, finished, cache, home=home)
    assert shard_reads(remote.log())
    read(remote, code, finished, cache, home=home)
    log = remote.log()
    assert shard_reads(log) == []
    assert not num_heads(log)
    assert sum(r.sent for r in log if "_cas" in r.path) == 0, "the index was fetched again"


def test_what_was_read_once_is_read_without_a_network(remote: TestHub, finished: Path, cache: Path):
    code = """
for revision in ("v1.0.0", "main", sys.argv[2]):
    store = open_store(revision)
    assert (store.stack("hidden_states", layer=1).values == local.stack("hidden_states", layer=1).values).all()
    assert store.record(local.keys[3]) == local.record(local.keys[3])
rows = tracekit.load_dataset("tester/traces@v1.0.0", "trivia_qa", split="validation", sites="hidden", layers=1,
                             streaming=True)
assert sorted(row["key"] for row in rows) == local.keys
print(json.dumps([repr(open_store("v1.0.0")), says(lambda: store.attention(local.keys[0])), says(open_store)]))
"""
    home, commit = remote.new_home(), remote.hub.repos[REPO].tags["v1.0.0"]
    read(remote, code.replace("sys.argv[2]", repr(commit)), finished, cache, home=home)
    remote.log()
    code = code.replace("sys.argv[2]", repr(commit)).replace("says(open_store)", "says(lambda: open_store('v9.9.9'))")
    shown, uncached, unknown = read(remote, code, finished, cache, home=home, HF_HUB_OFFLINE="1")
    assert remote.log() == []
    assert "tester/traces@v1.0.0: 12 samples" in shown
    assert uncached.startswith("no error"), "the first run read it"
    assert unknown.startswith("HubError: reading hf://datasets/tester/traces@v9.9.9: HF_HUB_OFFLINE is set")


def test_threads_read_the_right_values(remote: TestHub, finished: Path, cache: Path):
    code = """
from concurrent.futures import ThreadPoolExecutor
asked = [(key, layer) for key in local.keys for layer in (0, 1, 2)] * 4
expected = {one: local.hidden_states(one[0], layer=one[1]).copy() for one in asked}
records = {key: local.record(key) for key in local.keys}
sys.setswitchinterval(1e-5)
def check(store, one):
    assert (store.hidden_states(one[0], layer=one[1]) == expected[one]).all()
    assert store.record(one[0]) == records[one[0]]
    return store.attention(one[0], layer=0).shape[-1]
for store in (open_store(), tracekit.TraceStore(sys.argv[1])):
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(lambda one: check(store, one), asked))
    assert found == [len(records[key].token_ids) for key, _ in asked]
print(len(asked))
"""
    assert read(remote, code, finished, cache) == 144
    assert max(num_heads(remote.log()).values()) == 1


# ---------------------------------------------------------------- what goes wrong

READ_ALL = """
store = open_store()
for key in local.keys:
    assert (store.hidden_states(key, layer=1) == local.hidden_states(key, layer=1)).all(), key
print(1)
"""


def test_an_expired_address_is_resolved_again(remote: TestHub, finished: Path, cache: Path):
    expire = remote.hub.expire_cdn
    remote.hub.on("/_cdn/", lambda: remote.hub.on("/_cdn/", expire))  # before the second range
    read(remote, READ_ALL, finished, cache)
    log = remote.log()
    assert num_heads(log) == {SHARD.format(0): 2, SHARD.format(1): 1, SHARD.format(2): 1}
    assert [r.status for r in log if "/_cdn/" in r.path].count(403) == 1
    assert len(shard_reads(log)) == 12


@pytest.mark.parametrize(
    "faults",
    [
        [{"match": "/_cdn/", "action": "drop", "where": "response", "after": 100, "skip": 1}],
        [{"match": "/_cdn/", "action": "drop"}, {"match": "/_cdn/", "action": "status", "status": 503, "skip": 4}],
        [{"match": "/_cdn/", "action": "status", "status": 429, "headers": {"Retry-After": "0"}, "skip": 2}],
        [{"match": r"resolve/.*\.tar", "method": "HEAD", "action": "status", "status": 503}],
        [{"match": r"resolve/.*\.tar", "method": "HEAD", "action": "drop", "skip": 1}],
        [{"match": "/revision/", "action": "status", "status": 502}, {"match": "/tree/", "action": "status"}],
    ],
    ids=["cut in the middle", "dropped, then 503", "429", "503 while resolving", "dropped while resolving", "index"],
)
def test_a_fault_that_passes_leaves_the_right_values(
    remote: TestHub, finished: Path, cache: Path, faults: list[dict[str, Any]]
):
    remote.faults(*faults)
    read(remote, READ_ALL, finished, cache)
    assert all(fault.times == 0 for fault in remote.hub.faults), "a fault was not met"
    assert len([r for r in shard_reads(remote.log()) if r.sent > 100]) == 12


def test_a_storage_that_stays_away_ends_in_one_message(remote: TestHub, finished: Path, cache: Path):
    remote.faults({"match": "/_cdn/", "action": "status", "status": 503, "times": 100})
    text = read(
        remote, "print(json.dumps(says(lambda: open_store().stack('hidden_states', layer=1))))", finished, cache
    )
    assert text.startswith("HubError: reading data/trivia_qa/validation-0000")
    assert "the Hub answers 503, 7 times" in text


ERRORS = """
store, key = open_store(), local.keys[0]
print(json.dumps({
    "revision": says(lambda: open_store("v9.9.9")),
    "repository": says(lambda: open_store(repo="tester/none")),
    "foreign": says(lambda: open_store("main", repo="tester/foreign")),
    "configuration": says(lambda: open_store(config="other")),
    "key": says(lambda: store.hidden_states("999999", layer=1)),
    "layer": says(lambda: store.hidden_states(key, layer=7)),
    "site": says(lambda: store.tensor(key, "nonsense")),
    "prefetched key": says(lambda: store.prefetch(["999999"])),
    "prefetched layer": says(lambda: store.prefetch(layers=[7])),
    "streamed layer": says(lambda: list(tracekit.load_dataset(
        "tester/traces", split="validation", layers=[-99], streaming=True))),
    "mistyped folder": says(lambda: tracekit.load_dataset("traces/dmo")),
    "mistyped store": says(lambda: tracekit.TraceStore("tester/traces")),
    "loaded": says(lambda: tracekit.load_dataset("tester/traces", revision="v9.9.9")),
    "path": says(lambda: tracekit.TraceStore("hf://tester/traces")),
    "closed": says(lambda: (store.close(), store.hidden_states(key, layer=1))),
}))
"""


def test_errors_say_what_is_wrong(remote: TestHub, finished: Path, cache: Path):
    if "tester/foreign" not in remote.hub.repos:
        remote.hub.create_repo("tester/foreign")
        remote.hub.commit("tester/foreign", "main", {"train.csv": b"a\n"}, "data")
    said = read(remote, ERRORS, finished, cache)
    assert said["revision"].startswith("HubError: reading hf://datasets/tester/traces@v9.9.9: no such revision (404)")
    assert said["repository"].startswith("HubError: reading hf://datasets/tester/none@v1.0.0: no such dataset (404)")
    assert said["foreign"].startswith("DatasetError: hf://datasets/tester/foreign@main is not a tracekit dataset")
    assert said["configuration"] == (
        "DatasetError: hf://datasets/tester/traces@v1.0.0 holds no configuration 'other'; it holds: trivia_qa"
    )
    assert said["key"].startswith("SampleNotFoundError: no sample '999999'; 12 samples from '000000' to '000011'")
    assert said["layer"].startswith("SampleNotFoundError: sample '000000' stores no layer 7 of 'hidden_states'")
    assert said["site"].startswith("SampleNotFoundError: sample '000000' stores no 'nonsense'; stored: hidden_states")
    assert "stores no layer -99 of 'hidden_states'; stored: 0-2" in said["streamed layer"]
    assert said["streamed layer"].startswith("SampleNotFoundError: ")
    assert said["mistyped folder"].startswith("HubError: reading hf://datasets/traces/dmo@main: no such dataset (404)")
    assert said["mistyped folder"].endswith(". If a folder is meant: 'traces/dmo' is none here")
    assert said["mistyped store"] == (
        "DatasetError: no such folder: 'tester/traces'; if a dataset on the Hub is meant, write "
        "hf://datasets/tester/traces@v1.0.0"
    )
    assert said["prefetched key"].startswith("SampleNotFoundError: no sample '999999'")
    assert said["prefetched layer"].startswith("SampleNotFoundError: sample '000000' stores no layer 7")
    assert "no such revision (404)" in said["loaded"]
    assert "expected hf://datasets/owner/name@v1.0.0" in said["path"]
    assert said["closed"].startswith("DatasetError: the store is closed")
    assert shard_reads(remote.log()) == []


def test_a_private_dataset_is_for_those_who_may_read_it(remote: TestHub, finished: Path, cache: Path):
    remote.hub.repos[REPO].private = True
    try:
        code = "print(json.dumps(says(lambda: len(open_store()))))"
        text = read(remote, code, finished, cache, token=None)
        assert text.startswith("HubAccessError: reading hf://datasets/tester/traces@v1.0.0: the Hub does not know you")
        assert "hf auth login" in text
        read(remote, READ_ALL, finished, cache)
        assert not any(r.has_token for r in remote.log() if "/_cdn/" in r.path)
    finally:
        remote.hub.repos[REPO].private = False


def branch(hub: TestHub, name: str) -> None:
    """A branch at the published version."""
    repo = hub.hub.repos[REPO]
    repo.branches[name] = repo.tags["v1.0.0"]


def test_another_shard_than_the_manifests_is_refused(remote: TestHub, finished: Path, cache: Path):
    branch(remote, "altered")
    whole = (finished / SHARD.format(1)).read_bytes()
    changed = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    remote.hub.commit(REPO, "altered", {SHARD.format(1): changed, SHARD.format(2): whole}, "other bytes")
    code = """
store = open_store("altered")
assert (store[0].hidden_states(layer=1) == local[0].hidden_states(layer=1)).all()
print(json.dumps([says(lambda: store[row].hidden_states(layer=1)) for row in (5, 11)]))
"""
    for text in read(remote, code, finished, cache):
        assert text.startswith("CorruptShardError: data/trivia_qa/validation-0000")
        assert "the Hub holds" in text
        assert "the manifest says" in text


DAMAGED = """
from pathlib import Path
from tracekit.errors import CorruptShardError

def flip_all(paths, at):
    paths = [path.resolve() for path in paths]
    assert paths
    for path in paths:
        data = bytearray(path.read_bytes())
        data[at % len(data)] ^= 16
        path.write_bytes(data)

def flip_fetched(at, times):
    whole = tracekit.hub._get
    left = [times]
    def get(*arguments):
        data = whole(*arguments)
        if data is not None and left[0]:
            left[0] -= 1
            data = bytearray(data)
            data[at % len(data)] ^= 16
        return None if data is None else bytes(data)
    tracekit.hub._get = get

def equal(store, site, layer):
    read = lambda store, key: store.tensor(key, site, layer=layer)
    return all((read(store, key) == read(local, key)).all() for key in local.keys)

"""


@pytest.mark.attack
@pytest.mark.parametrize("at", [0, 100, -1])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_damaged_range_of_the_cache_is_dropped_and_fetched_again(
    remote: TestHub, finished: Path, cache: Path, at: int, ahead: bool
):
    code = f"""
store = open_store()
if {ahead}:
    store.prefetch(sites=["hidden_states"], layers=[1])
assert equal(store, "hidden_states", 1)
ranges = [one for one in Path({str(cache)!r}).rglob("*-*") if one.is_file()]
flip_all(ranges, {at})
for store in (store, open_store()):
    assert equal(store, "hidden_states", 1)
tracekit.hub.HubFile.read = None  # what was fetched again is kept, and right
assert equal(open_store(), "hidden_states", 1)
print(len(ranges))
"""
    assert read(remote, DAMAGED + code, finished, cache) > 0


@pytest.mark.attack
@pytest.mark.parametrize("at", [0, 100, -1])
@pytest.mark.parametrize("site", ["hidden_states", "attentions"])
def test_damaged_bytes_from_the_hub_are_refused_and_not_kept(
    remote: TestHub, finished: Path, cache: Path, site: str, at: int
):
    code = f"""
store, key = open_store(), local.keys[5]
flip_fetched({at}, 1)
said = says(lambda: store.tensor(key, {site!r}, layer=1))
assert not [one for one in Path({str(cache)!r}).rglob("*-*") if one.is_file()]
assert equal(store, {site!r}, 1)
print(json.dumps(said))
"""
    text = read(remote, DAMAGED + code, finished, cache)
    assert re.match(
        rf"CorruptShardError: \S+validation-00001.tar: sample '000005': {site}, layer 1, \(bytes \d+ to", text
    )
    assert "is damaged: its checksum is not that of the index. hf://datasets/tester/traces@" in text


@pytest.mark.attack
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_shards_are_never_loaded(remote: TestHub, finished: Path, cache: Path, streaming: bool):
    code = f"""
import os
options = {{"split": "validation", "streaming": {streaming}}}
load = lambda: list(tracekit.load_dataset("tester/traces@v1.0.0", "trivia_qa", **options))
rows = {{row["key"]: row["hidden_states"] for row in load()}}
assert all((rows[key] == local.hidden_states(key)).all() for key in local.keys)
kept = Path(os.environ["HF_HOME"]).rglob("*.tar")
flip_all([one for one in Path({str(cache)!r}).rglob("*-*") if one.is_file()] if {streaming} else kept, 9000)
print(json.dumps(says(lambda: [(row["hidden_states"] == rows[row["key"]]).all() for row in load()])))
"""
    text = read(remote, DAMAGED + code, finished, cache)
    if streaming:  # fetched again
        assert text == f"no error: {[True] * 12!r}".replace("True", "np.True_")
    else:
        assert text.startswith("CorruptShardError: ")
        assert "is damaged" in text


@pytest.mark.attack
@pytest.mark.parametrize(
    "name", ["records/trivia_qa/validation.parquet", "manifests/trivia_qa.json", "plans/trivia_qa.json"]
)
def test_a_damaged_index_is_fetched_again_and_else_refused(remote: TestHub, finished: Path, cache: Path, name: str):
    code = f"""
import os
open_store()
path = next(one for one in Path(os.environ["HF_HOME"]).rglob({name!r}))
whole = path.read_bytes()
flip_all([path], 300)
assert open_store().keys == local.keys
assert path.read_bytes() == whole
flip_all([path], 300)
fetch = tracekit.read.remote.fetch
tracekit.read.remote.fetch = lambda *arguments, again=False: None if again else fetch(*arguments)
print(json.dumps(says(open_store)))
"""
    text = read(remote, DAMAGED + code, finished, cache)
    assert text.startswith(f"CorruptShardError: {name} of hf://datasets/tester/traces@")
    assert "is damaged: its SHA-256 is " in text


def test_a_store_stays_at_its_commit_while_the_branch_moves(remote: TestHub, finished: Path, cache: Path):
    branch(remote, "moving")
    changes = {SHARD.format(1): b"another shard", "manifest.json": b"{}", "manifests/trivia_qa.json": None}
    remote.hub.on("/_cdn/", lambda: remote.hub.commit(REPO, "moving", changes, "moved"))
    code = """
import pickle
store = open_store("moving")
for row in (0, 5):
    assert (store[row].hidden_states(layer=1) == local[row].hidden_states(layer=1)).all()
again = pickle.loads(pickle.dumps(store))
assert (again[6].hidden_states(layer=1) == local[6].hidden_states(layer=1)).all()
print(json.dumps([repr(again), says(lambda: open_store("moving"))]))
"""
    shown, text = read(remote, code, finished, cache)
    assert remote.hub.repos[REPO].tags["v1.0.0"] in shown
    assert text.startswith("DatasetError: ")


# ---------------------------------------------------------------- workers and `datasets`


def layer_sums(samples: list[Any]) -> list[tuple[str, float]]:
    """What a worker of a data loader hands back."""
    return [(sample.key, float(sample.hidden_states(layer=1).astype("float64").sum())) for sample in samples]


WORKERS = """
from torch.utils.data import DataLoader
from tests.test_remote import layer_sums

store = open_store()
store[0].hidden_states(layer=1)  # what is open here is not shared with the workers
expected = sorted(layer_sums(list(local)))
for method in ("fork", "spawn"):
    loader = DataLoader(store, batch_size=3, num_workers=2, collate_fn=layer_sums, multiprocessing_context=method)
    assert sorted(pair for batch in loader for pair in batch) == expected, method
print(len(expected))
"""


def test_workers_of_a_data_loader_read_for_themselves(remote: TestHub, finished: Path, cache: Path):
    assert read(remote, WORKERS, finished, cache) == 12
    assert len(shard_reads(remote.log())) >= 12


DATASETS = """
tracekit.read.remote.MAX_GAP_BYTES = 0
chosen = {"split": "validation", "sites": ["hidden_states"], "layers": [1], "revision": "v1.0.0"}
rows = list(tracekit.load_dataset("tester/traces", "trivia_qa", streaming=True, **chosen))
assert sorted(row["key"] for row in rows) == local.keys
for row in rows:
    value = local.hidden_states(row["key"], layer=1)
    assert row["hidden_states"].shape == (1, *value.shape) and (row["hidden_states"][0] == value).all()
    assert row["question"] == local.record(row["key"]).question and "attentions" not in row
print(sum(local.hidden_states(key, layer=1).nbytes for key in local.keys))
"""

MAPPED = """
chosen = {"split": "validation", "sites": ["hidden_states"], "layers": [1, -1]}
there = tracekit.load_dataset("tester/traces", revision="v1.0.0", **chosen)
here = tracekit.load_dataset(sys.argv[1], **chosen)
assert there.column_names == here.column_names and len(there) == len(here)
for a, b in zip(there, here, strict=True):
    assert (a.pop("hidden_states") == b.pop("hidden_states")).all()
    assert a == b
print(len(there))
"""


def test_streaming_one_layer_through_datasets_moves_that_layer(remote: TestHub, finished: Path, cache: Path):
    num_bytes = read(remote, DATASETS, finished, cache)
    log = remote.log()
    reads = shard_reads(log)
    assert num_bytes <= sum(r.sent for r in reads) <= 1.2 * num_bytes
    assert max(num_heads(log).values()) == 1


def test_map_style_rows_are_those_of_the_folder(remote: TestHub, finished: Path, cache: Path):
    assert read(remote, MAPPED, finished, cache) == 12


# ---------------------------------------------------------------- merging, without a Hub


A, B = Path("a.tar"), Path("b.tar")


def test_ranges_are_joined_where_little_lies_between():
    near, far = 100 + MAX_GAP_BYTES, 101 + MAX_GAP_BYTES
    assert merge_ranges([ByteRange(A, near, near + 5), ByteRange(A, 0, 100)]) == [ByteRange(A, 0, near + 5)]
    assert merge_ranges([ByteRange(A, 0, 100), ByteRange(A, far, far + 5)]) == [
        ByteRange(A, 0, 100),
        ByteRange(A, far, far + 5),
    ]


def test_ranges_of_different_shards_are_never_joined():
    assert merge_ranges([ByteRange(B, 0, 10), ByteRange(A, 10, 20), ByteRange(A, 0, 10)]) == [
        ByteRange(A, 0, 20),
        ByteRange(B, 0, 10),
    ]


def test_ranges_in_one_another_and_twice():
    ranges = [ByteRange(A, 0, 100), ByteRange(A, 0, 100), ByteRange(A, 10, 20), ByteRange(A, 50, 120)]
    assert merge_ranges(ranges) == [ByteRange(A, 0, 120)]
    assert merge_ranges([]) == []


def test_joined_ranges_do_not_grow_beyond_a_request():
    half = MAX_RANGE_BYTES // 2
    ranges = [ByteRange(A, n * half, (n + 1) * half) for n in range(4)]
    assert merge_ranges(ranges) == [ByteRange(A, 0, 2 * half), ByteRange(A, 2 * half, 4 * half)]
    large = ByteRange(A, 0, 3 * MAX_RANGE_BYTES)  # one tensor is never cut
    inside = ByteRange(A, MAX_RANGE_BYTES, MAX_RANGE_BYTES + 1)
    assert merge_ranges([inside, large]) == [large]
