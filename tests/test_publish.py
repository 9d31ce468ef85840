"""Publishing, end to end: real clients in fresh processes against a Hub of our own, in both ways of uploading."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import COMMAND, REPO, large_files, make_run, publish, tell
from tests.runs_for_tests import run_trivia
from tracekit import TraceStore
from tracekit.card.readme import split_card
from tracekit.errors import DatasetError
from tracekit.format.shards import sha256_file
from tracekit.publish.snapshot import read_local

OWN_LINE = "Our own words, which nobody takes away."
BEGIN = "<!-- yours: begin -->"


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 questions in 2 shards. Not to be changed."""
    return make_run(tmp_path_factory.mktemp("small") / "run", model, limit=10)


@pytest.fixture(scope="module")
def made_larger(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("larger") / "run", model, limit=20)


@pytest.fixture
def larger(made_larger: Path, tmp_path: Path) -> Path:
    """20 questions in 4 shards, the first two those of `small`."""
    return Path(shutil.copytree(made_larger, tmp_path / "larger"))


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions answered at more length: other shards, under the same names. Not to be changed."""
    return make_run(tmp_path_factory.mktemp("other") / "run", model, 10, generation={"max_new_tokens": 8})


@pytest.fixture(scope="module")
def second(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another configuration. Not to be changed."""
    return make_run(tmp_path_factory.mktemp("second") / "run", model, 5, output={"dataset_config": "second"})


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy of `small` of one's own."""
    return Path(shutil.copytree(small, tmp_path / "run"))


def titles(hub: TestHub, branch: str = "main") -> list[str]:
    """Titles of the commits of a branch, oldest first, the initial one left out."""
    return [commit.title for commit in reversed(hub.hub.history(REPO, branch))][1:]


def changes(hub: TestHub) -> list[str]:
    """Requests since the log was cleared that change something: validating a card and asking for paths do not."""
    asking = ("/validate-yaml", "/paths-info/")
    return [r.path for r in hub.log() if r.method not in ("GET", "HEAD") and not any(one in r.path for one in asking)]


def section(card: str, text: str | None = None) -> str:
    """The person's own section of a card; with `text` the card with that one."""
    begin, end = card.index(BEGIN) + len(BEGIN), card.index("<!-- yours: end -->")
    return card[begin:end].strip() if text is None else f"{card[:begin]}\n{text}\n{card[end:]}"


def card_of(hub: TestHub, version: str, repo: str = REPO) -> str:
    """The card of a version."""
    return hub.hub.read(repo, version, "README.md").decode()


def is_released(hub: TestHub, folder: Path, version: str) -> bool:
    """Whether a version holds every large file of a folder."""
    files = hub.hub.files(REPO, version)
    return large_files(folder).items() <= files.items()


LOAD = """
import hashlib, sys
import datasets, numpy as np, tracekit, webdataset as wds
from huggingface_hub import snapshot_download
from safetensors.numpy import load

local, repo = tracekit.TraceStore(sys.argv[1]), "tester/traces"
keys, at = local.keys, {"revision": "v1.0.0"}

records = datasets.load_dataset(repo, **at)["validation"]
assert sorted(records["__key__"]) == keys and "safetensors" not in records.column_names
for streaming in (False, True):
    rows = list(datasets.load_dataset(repo, "trivia_qa", streaming=streaming, **at)["validation"])
    assert sorted(row["__key__"] for row in rows) == keys
    for row in rows:
        assert (load(row["safetensors"])["hidden_states"] == local.hidden_states(row["__key__"])).all()
        assert row["json"]["question"] == local.record(row["__key__"]).question
flat = datasets.load_dataset(repo, data_files="records/trivia_qa/validation.parquet", **at)["train"]
assert flat["key"] == keys
for streaming in (False, True):
    rows = list(tracekit.load_dataset(repo, "trivia_qa", split="validation", streaming=streaming, **at))
    assert sorted(row["key"] for row in rows) == keys
    for row in rows:
        assert (row["hidden_states"] == local.hidden_states(row["key"])).all()
store = tracekit.TraceStore(f"hf://datasets/{repo}@v1.0.0", config="trivia_qa")
for key in keys:
    assert store.record(key) == local.record(key)
    assert (store.attention(key) == local.attention(key)).all()
    assert store.hidden_states(key, layer=1).dtype == local.hidden_states(key, layer=1).dtype
url = f"hf://datasets/{repo}@v1.0.0/data/trivia_qa/validation-{{00000..00001}}.tar"
seen = list(wds.WebDataset(url, shardshuffle=False).decode(tracekit.wds_decoder()))
assert sorted(sample["__key__"] for sample in seen) == keys
for sample in seen:
    assert (sample["safetensors"]["hidden_states"] == local.hidden_states(sample["__key__"])).all()
folder = snapshot_download(repo, repo_type="dataset", **at)
report = tracekit.verify(__import__("pathlib").Path(folder))  # links into the client's cache
assert report.problems == [] and report.num_samples == len(keys), report
print("loaded", len(keys), folder)
"""


def test_a_published_version_is_loaded_in_every_way(hub: TestHub, folder: Path):
    done = publish(hub, folder, "v1.0.0")
    assert "released" in done.stdout
    assert titles(hub) == ["Release v1.0.0"]
    assert is_released(hub, folder, "v1.0.0")
    assert not any(name.startswith("staging") for name in hub.hub.repos[REPO].branches)
    names = hub.hub.files(REPO, "v1.0.0")
    for name in ("README.md", "manifest.json", "load_traces.py", "plans/trivia_qa.json", "schemas/trivia_qa.json"):
        assert name in names
    assert not [name for name in names if name.startswith(("sidecars", "logs", "hub"))]
    assert "loaded 10" in hub.python(LOAD, folder, TRACEKIT_CACHE=str(hub.new_home())).stdout


def test_the_same_again_sends_nothing_and_commits_nothing(hub: TestHub, folder: Path):
    publish(hub, folder, "v1.0.0")
    hub.log()
    done = publish(hub, folder, "v1.0.0")
    assert "nothing to do" in done.stdout
    assert {request.method for request in hub.log()} <= {"GET", "HEAD"}
    assert titles(hub) == ["Release v1.0.0"]


def test_a_dry_run_sends_nothing(xet_hub: TestHub, folder: Path):
    done = publish(xet_hub, folder, "v1.0.0", "--dry-run")
    assert "would send      4 files" in done.stdout
    assert changes(xet_hub) == []
    assert REPO not in xet_hub.hub.repos
    nobody = publish(xet_hub, folder, "v1.0.0", "--dry-run", token=None)
    assert "would send      4 files" in nobody.stdout
    publish(xet_hub, folder, "v1.0.0")
    xet_hub.log()
    next_one, same, foreign = tell(
        xet_hub,
        ["publish", folder, REPO, "--version", "v1.0.1", "--dry-run"],
        ["publish", folder, REPO, "--version", "v1.0.0", "--dry-run"],
        ["publish", folder, "other/traces", "--version", "v1.0.0", "--dry-run"],
    )
    assert "would send      0 files" in next_one.out
    assert f"nothing to do: {REPO} has this content as v1.0.0" in same.out
    assert "would" not in same.out
    assert foreign.code == 1
    assert "namespaces there are: tester, org" in foreign.err
    assert changes(xet_hub) == []


def test_the_ways_of_loading_in_the_readme_are_true(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0")
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python no-run\n(.*?)```", readme, re.DOTALL)
    for there, here in (("owner/name", REPO), ("train", "validation"), ("000042", "000004"), ("12", "1")):
        code = code.replace(there, here)
    imports = "import tracekit, webdataset as wds\nfrom datasets import load_dataset\nfrom tracekit import TraceStore\n"
    xet_hub.python(imports + code, TRACEKIT_CACHE=str(xet_hub.new_home()))


# ---------------------------------------------------------------- versions


def test_other_content_under_a_version_is_refused_with_the_next_free_one(xet_hub: TestHub, folder: Path, larger: Path):
    publish(xet_hub, folder, "v1.0.0")
    done = publish(xet_hub, larger, "v1.0.0", check=False)
    assert done.returncode == 1
    assert "v1.0.0 already, with other content" in done.stderr
    assert "is v1.1.0" in done.stderr
    assert titles(xet_hub) == ["Release v1.0.0"]
    for version in ("v1.0.1", "v0.9.0"):
        done = publish(xet_hub, larger, version, check=False)
        assert done.returncode == 1
        assert "v1.1.0" in done.stderr
    assert titles(xet_hub) == ["Release v1.0.0"]


def test_added_shards_are_a_minor_version_and_leave_the_published_ones_alone(hub: TestHub, folder: Path, larger: Path):
    publish(hub, folder, "v1.0.0")
    before = hub.hub.files(REPO, "v1.0.0")
    hub.log()
    done = publish(hub, larger, "v1.1.0")
    assert "2 shards of trivia_qa are new" in done.stdout
    sent = sum(request.received for request in hub.log())
    new = sum((larger / f"data/trivia_qa/validation-0000{n}.tar").stat().st_size for n in (2, 3))
    assert sent < 1.2 * new + 500_000
    assert hub.hub.files(REPO, "v1.0.0") == before
    after = hub.hub.files(REPO, "v1.1.0")
    for path, sha256 in before.items():
        if path.startswith("data/"):
            assert after[path] == sha256
    assert is_released(hub, larger, "v1.1.0")
    code = """
    import datasets
    for version, expected in (("v1.0.0", 10), ("v1.1.0", 20), ("main", 20)):
        for name in ("trivia_qa", "trivia_qa_records"):
            loaded = datasets.load_dataset("tester/traces", name, revision=version)["validation"]
            assert loaded.num_rows == expected, (version, name, loaded.num_rows)
    """
    hub.python(code)


def test_changed_shards_need_a_major_version(xet_hub: TestHub, folder: Path, other: Path):
    publish(xet_hub, folder, "v1.0.0")
    done = publish(xet_hub, other, "v1.1.0", check=False)
    assert done.returncode == 1
    assert "2 published shards of trivia_qa changed or went" in done.stderr
    assert "v2.0.0" in done.stderr
    publish(xet_hub, other, "v2.0.0")
    assert is_released(xet_hub, other, "v2.0.0")
    assert is_released(xet_hub, folder, "v1.0.0")


def test_a_second_configuration_keeps_the_first(xet_hub: TestHub, folder: Path, second: Path):
    publish(xet_hub, folder, "v1.0.0")
    done = publish(xet_hub, second, "v1.1.0")
    assert "configuration second is new" in done.stdout
    assert is_released(xet_hub, folder, "v1.1.0")
    assert is_released(xet_hub, second, "v1.1.0")
    card = xet_hub.hub.read(REPO, "v1.1.0", "README.md").decode()
    assert card.index("## Configuration `trivia_qa`") < card.index("## Configuration `second`")
    assert (
        card.index("config_name: trivia_qa_records") < card.index("default: true") < card.index("config_name: second")
    )
    code = """
    import datasets, tracekit
    for name, expected in ((None, 10), ("trivia_qa", 10), ("second", 5), ("second_records", 5)):
        assert datasets.load_dataset("tester/traces", name, revision="v1.1.0")["validation"].num_rows == expected
    assert len(tracekit.TraceStore("hf://datasets/tester/traces@v1.1.0", config="second")) == 5
    try:
        tracekit.TraceStore("hf://datasets/tester/traces@v1.1.0")
    except tracekit.errors.DatasetError as error:
        assert "second, trivia_qa" in str(error)
    """
    xet_hub.python(code)
    assert first_of_script(xet_hub.hub.read(REPO, "v1.1.0", "load_traces.py").decode()) == "trivia_qa"


def first_of_script(text: str) -> str:
    """The first configuration of a loading script, whose records are its default."""
    namespace: dict[str, Any] = {"__file__": "load_traces.py", "__name__": "load_traces"}
    exec(compile(text, "load_traces.py", "exec"), namespace)  # noqa: S102
    first = next(iter(namespace["DATASET"]))
    default = namespace["LoadTraces"].DEFAULT_CONFIG_NAME
    assert default == f"{first}_records"
    return first


def test_a_configuration_that_is_added_here_is_not_the_default_either(xet_hub: TestHub, folder: Path, model: Path):
    run_trivia(folder, model, source={"limit": 2}, output={"dataset_config": "another"})

    def firsts(index: str, card: str, script: str) -> list[str]:
        default = re.search(r"config_name: (\w+)_records\n(?:(?!- config_name).*\n)*  default: true", card)
        assert default is not None
        return [json.loads(index)["configs"][0]["name"], default[1], first_of_script(script)]

    names = ("manifest.json", "README.md", "load_traces.py")
    assert firsts(*((folder / name).read_text() for name in names)) == ["trivia_qa"] * 3
    publish(xet_hub, folder, "v1.0.0")
    assert firsts(*(xet_hub.hub.read(REPO, "v1.0.0", name).decode() for name in names)) == ["trivia_qa"] * 3
    (said,) = tell(xet_hub, ["show", folder])
    assert {"trivia_qa", "another"} <= {*re.findall(r"\w+", said.out)}


# ---------------------------------------------------------------- faults

FAULTS: dict[str, dict[str, Any]] = {
    "creating the repository: 500": {"match": "repos/create", "action": "status"},
    "creating the repository: answer lost": {"match": "repos/create", "action": "lose_response"},
    "refs: 503": {"match": "/refs", "action": "status", "status": 503},
    "branch: 500": {"match": "/branch/", "method": "POST", "action": "status"},
    "branch: answer lost": {"match": "/branch/", "method": "POST", "action": "lose_response"},
    "preupload: 429": {
        "match": "/preupload/",
        "action": "status",
        "status": 429,
        "headers": {"RateLimit": '"api";r=0;t=1', "Retry-After": "1"},
    },
    "upload: dropped": {"match": "/_cas/v1/xorbs|/_lfs/[0-9a-f]", "action": "drop", "after": 100_000},
    "upload: 500": {"match": "/_cas/v1/xorbs|/_lfs/[0-9a-f]", "action": "status"},
    "staging: 500": {"match": "/commit/staging", "action": "status"},
    "staging: dropped": {"match": "/commit/staging", "action": "drop"},
    "staging: answer lost": {"match": "/commit/staging", "action": "lose_response"},
    "card: 502": {"match": "validate-yaml", "action": "status", "status": 502},
    "release: 500": {"match": "/commit/main", "action": "status"},
    "release: 429": {"match": "/commit/main", "action": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "release: answer lost": {"match": "/commit/main", "action": "lose_response"},
    "tag: 500": {"match": "/tag/", "action": "status"},
    "tag: answer lost": {"match": "/tag/", "action": "lose_response"},
    "cleaning up: answer lost": {"match": "/branch/", "method": "DELETE", "action": "lose_response"},
}


def test_every_fault_that_passes_is_survived_without_a_second_commit(hub: TestHub, folder: Path, tmp_path: Path):
    for number, (name, fault) in enumerate(FAULTS.items()):
        hub.hub.repos.clear()
        hub.faults(fault)
        fresh = Path(shutil.copytree(folder, tmp_path / f"fault{number}"))
        done = publish(hub, fresh, "v1.0.0", limits="GROUP_FILES=2", check=False)
        assert done.returncode == 0, (name, done.stderr)
        assert titles(hub) == ["Release v1.0.0"], name
        assert is_released(hub, fresh, "v1.0.0"), name
        assert list(hub.hub.repos[REPO].branches) == ["main"], name


@pytest.mark.parametrize(
    ("match", "status", "expected"),
    [("/preupload/", 401, "Log in"), ("/commit/main", 403, "write access"), ("whoami", 401, "Log in")],
)
def test_a_refusal_says_what_to_do_and_the_same_command_goes_on(
    xet_hub: TestHub, folder: Path, match: str, status: int, expected: str
):
    xet_hub.faults({"match": match, "action": "status", "status": status, "times": 100})
    done = publish(xet_hub, folder, "v1.0.0", check=False)
    assert done.returncode == 1
    assert expected in done.stderr
    assert str(status) in done.stderr
    assert "Traceback" not in done.stderr
    assert "hf_test" not in done.stderr + done.stdout
    xet_hub.faults()
    publish(xet_hub, folder, "v1.0.0")
    assert titles(xet_hub) == ["Release v1.0.0"]


def test_a_hub_that_stays_away_ends_in_one_line(xet_hub: TestHub, folder: Path):
    xet_hub.faults({"match": "/commit/staging", "action": "status", "status": 503, "times": 100})
    done = publish(xet_hub, folder, "v1.0.0", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: committing to staging/v1.0.0 of tester/traces: the Hub answers"
    )
    assert done.stderr.endswith("7 times. Try again later; nothing is lost\n")


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_an_upload_whose_connection_stays_lost_ends_in_one_line(hub: TestHub, folder: Path):
    hub.faults({"match": "/_lfs/[0-9a-f]", "action": "drop", "after": 1000, "times": 10_000})
    patient = "import time; time.sleep = lambda seconds: None\n"  # the client waits too, half a minute each time
    done = hub.python(patient + COMMAND, "", "publish", folder, REPO, "--version", "v1.0.0", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: sending data/trivia_qa/validation-00000.tar to tester/traces: ")
    assert last.endswith("7 times. Try again later; nothing is lost")
    hub.faults()
    publish(hub, folder, "v1.0.0")
    assert is_released(hub, folder, "v1.0.0")


def test_nobody_publishes_without_logging_in(xet_hub: TestHub, folder: Path):
    done = publish(xet_hub, folder, "v1.0.0", check=False, token=None)
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    done = publish(xet_hub, folder, "v1.0.0", check=False, token="hf_wrongSecretToken")
    assert done.returncode == 1
    assert "hf_wrongSecretToken" not in done.stderr + done.stdout


def test_no_token_in_any_file(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0")
    for path in [*folder.rglob("*"), *(xet_hub.folder / "hub").rglob("*")]:
        if path.is_file():
            assert b"hf_test" not in path.read_bytes(), path


# ---------------------------------------------------------------- kills, races, damage


def killer(process: Any, wait: float) -> Any:
    """Kills a process a moment later."""
    return lambda: (time.sleep(wait), process.send_signal(signal.SIGKILL))


def test_kill_9_at_random_moments(hub: TestHub, larger: Path, tmp_path: Path):
    folder, home = Path(shutil.copytree(larger, tmp_path / "run")), hub.new_home()
    arguments = ("GROUP_FILES=1", "publish", folder, REPO, "--version", "v1.0.0")
    draw, kills = random.Random(7), 0
    watched = ["/preupload/", "/xorbs/|/_lfs/", "/commit/staging", "/commit/staging", "/commit/main", "/tag/"]
    for match in watched:  # at the moment of each kind of request, a little later each time
        process = hub.start(COMMAND, *arguments, home=home)
        hub.hub.on(match, killer(process, draw.uniform(0, 0.05)))
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    publish(hub, folder, "v1.0.0", limits="GROUP_FILES=1", home=home)
    assert kills >= 4
    assert titles(hub) == ["Release v1.0.0"]
    assert is_released(hub, folder, "v1.0.0")
    staged = [commit.title for commit in hub.hub.repos[REPO].commits.values() if commit.title.startswith("Stage")]
    assert len(staged) == len(set(staged)) == len(large_files(folder)), "a file was staged twice"
    total = sum((folder / path).stat().st_size for path in large_files(folder))
    largest = max((folder / path).stat().st_size for path in large_files(folder))
    sent = sum(r.received for r in hub.log() if "xorbs" in r.path or "/_lfs/" in r.path)
    assert sent <= total + kills * largest + 1_000_000


def test_a_lost_race_on_main_is_run_again(xet_hub: TestHub, folder: Path, larger: Path):
    publish(xet_hub, folder, "v1.0.0")
    card = xet_hub.hub.read(REPO, "main", "README.md").decode()
    changed = section(card, OWN_LINE)
    xet_hub.hub.on(
        "/commit/main",
        lambda: xet_hub.hub.commit(REPO, "main", {"README.md": changed.encode()}, "Words"),
        method="POST",
    )
    done = publish(xet_hub, larger, "v1.1.0")
    assert "somebody else has committed" in done.stderr
    assert titles(xet_hub) == ["Release v1.0.0", "Words", "Release v1.1.0"]
    assert OWN_LINE in xet_hub.hub.read(REPO, "v1.1.0", "README.md").decode()
    assert is_released(xet_hub, larger, "v1.1.0")


def test_an_altered_shard_is_not_published(hub: TestHub, folder: Path):
    shard = folder / "data/trivia_qa/validation-00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    done = publish(hub, folder, "v1.0.0", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "v1.0.0" not in hub.hub.repos[REPO].tags
    assert titles(hub) == []
    shard.write_bytes(whole)
    publish(hub, folder, "v1.0.0")
    assert is_released(hub, folder, "v1.0.0")


def test_a_wrong_count_in_the_card_is_caught_by_datasets(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0")
    card = xet_hub.hub.read(REPO, "main", "README.md")
    xet_hub.hub.commit(REPO, "main", {"README.md": card.replace(b"num_examples: 10", b"num_examples: 11")}, "wrong")
    done = xet_hub.python("import datasets; datasets.load_dataset('tester/traces', revision='main')", check=False)
    assert "NonMatchingSplitsSizesError" in done.stderr


def test_a_large_release_gathers_shards_that_no_reader_sees_yet(xet_hub: TestHub, folder: Path, larger: Path):
    publish(xet_hub, folder, "v1.0.0")
    publish(xet_hub, larger, "v1.1.0", limits="MAX_COPIES=3")
    assert [title.split(",")[0] for title in titles(xet_hub)] == [
        "Release v1.0.0",
        "Gather shards for v1.1.0",
        "Release v1.1.0",
    ]
    between = xet_hub.hub.history(REPO, "main")[1].oid
    assert "data/trivia_qa/validation-00002.tar" in xet_hub.hub.files(REPO, between)
    code = """
    import datasets, sys, tracekit
    for streaming in (False, True):
        rows = datasets.load_dataset("tester/traces", "trivia_qa", revision=sys.argv[1], streaming=streaming)
        assert len(list(rows["validation"])) == 10
    assert len(tracekit.TraceStore("hf://datasets/tester/traces@" + sys.argv[1])) == 10
    """
    xet_hub.python(code, between)
    assert is_released(xet_hub, larger, "v1.1.0")


def test_the_first_release_of_many_shards_cannot_be_read_half(xet_hub: TestHub, larger: Path):
    publish(xet_hub, larger, "v1.0.0", limits="MAX_COPIES=2")
    assert [title.split(",")[0] for title in titles(xet_hub)] == ["Gather shards for v1.0.0"] * 2 + ["Release v1.0.0"]
    between = xet_hub.hub.history(REPO, "main")[1].oid
    assert len([path for path in xet_hub.hub.files(REPO, between) if path.startswith(("data/", "records/"))]) == 4
    code = """
    import datasets, sys, tracekit
    def fails(function, *arguments, **options):
        try:
            found = function(*arguments, **options)
        except Exception as error:
            return print(type(error).__name__, error)
        raise SystemExit(f"loaded {found}")
    for name in (None, "trivia_qa", "default"):
        for streaming in (False, True):
            fails(datasets.load_dataset, "tester/traces", name, revision=sys.argv[1], streaming=streaming)
    fails(tracekit.load_dataset, "tester/traces", revision=sys.argv[1])
    fails(tracekit.TraceStore, "hf://datasets/tester/traces@" + sys.argv[1])
    for name in ("trivia_qa", "trivia_qa_records"):
        assert datasets.load_dataset("tester/traces", name, revision="v1.0.0")["validation"].num_rows == 20
    """
    xet_hub.python(code, between)
    assert is_released(xet_hub, larger, "v1.0.0")
    assert "being published" not in card_of(xet_hub, "v1.0.0")


# ---------------------------------------------------------------- what was staged


def test_shards_staged_for_another_version_are_copied_and_their_branch_stays_until_then(
    xet_hub: TestHub, folder: Path, second: Path, tmp_path: Path
):
    xet_hub.faults({"match": "/commit/main", "action": "status", "status": 403, "times": 100})
    assert publish(xet_hub, folder, "v1.0.0", check=False).returncode == 1
    for shard in folder.rglob("data/*/*.tar"):  # as `--free-local` of a builder does
        shard.unlink()
    xet_hub.faults()
    theirs = Path(shutil.copytree(second, tmp_path / "theirs"))
    done = publish(xet_hub, theirs, "v1.0.0")
    assert "4 files on it are not in v1.0.0, data/trivia_qa/validation-00000.tar" in done.stderr
    assert {*xet_hub.hub.repos[REPO].branches} == {"main", "staging/v1.0.0"}
    assert "The next free version for this content is v1.1.0" in publish(xet_hub, folder, "v1.0.0", check=False).stderr
    xet_hub.log()
    done = publish(xet_hub, folder, "v1.1.0")
    assert "sent            0 files" in done.stdout
    assert not [path for path in changes(xet_hub) if "/preupload/staging" in path or "/commit/staging" in path]
    released = xet_hub.hub.files(REPO, "v1.1.0")
    assert {"data/trivia_qa/validation-00000.tar", "data/trivia_qa/validation-00001.tar"} <= released.keys()
    assert large_files(second).items() <= released.items()
    assert [*xet_hub.hub.repos[REPO].branches] == ["main"]


def test_other_bytes_that_somebody_stages_in_between_are_not_released(xet_hub: TestHub, folder: Path):
    path = "data/trivia_qa/validation-00001.tar"
    xet_hub.hub.create_repo(REPO)

    def stage_other() -> None:
        xet_hub.hub.commit(REPO, "staging/v1.0.0", {path: b"other bytes"}, "Stage other bytes")

    xet_hub.hub.on("/commit/staging", lambda: xet_hub.hub.on("/refs", stage_other))
    done = publish(xet_hub, folder, "v1.0.0", check=False)
    assert done.returncode == 1
    assert f"{path} is not on staging/v1.0.0" in done.stderr
    assert titles(xet_hub) == []
    assert xet_hub.hub.repos[REPO].tags == {}
    publish(xet_hub, folder, "v1.0.0")
    assert titles(xet_hub) == ["Release v1.0.0"]
    assert is_released(xet_hub, folder, "v1.0.0")


def test_shards_that_are_nowhere_are_named_before_anything_is_made(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0", "--free-local")
    xet_hub.log()
    elsewhere, dry = tell(
        xet_hub,
        ["publish", folder, "tester/another", "--version", "v1.0.0"],
        ["publish", folder, "tester/another", "--version", "v1.0.0", "--dry-run"],
    )
    assert elsewhere.code == dry.code == 1
    assert elsewhere.err == dry.err
    assert "2 files are neither in" in dry.err
    assert "sent to tester/traces as v1.0.0: publish there" in dry.err
    assert changes(xet_hub) == []
    assert [*xet_hub.hub.repos] == [REPO]
    del xet_hub.hub.repos[REPO]
    (gone,) = tell(xet_hub, ["publish", folder, REPO, "--version", "v1.0.0"])
    assert gone.code == 1
    assert "delete the journal in hub/" in gone.err
    assert "publish there" not in gone.err, "they are not there"
    assert changes(xet_hub) == []


READ_ONLY = """
from pathlib import Path
make = Path.mkdir
def mkdir(self, *args, **kwargs):
    if self.name == "hub":
        raise PermissionError(13, "Permission denied", str(self))
    make(self, *args, **kwargs)
Path.mkdir = mkdir
"""
"""Root, which runs the tests, may write anywhere: the folder only looks as if it could not be written."""


def test_a_folder_that_cannot_be_written_is_published_without_a_journal(xet_hub: TestHub, folder: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command = COMMAND.replace("from tracekit.cli", READ_ONLY + "from tracekit.cli")
    done = xet_hub.python(command, "", "publish", str(folder), REPO, "--version", "v1.0.0")
    assert f"no journal can be kept in {folder}; the Hub is asked about every file instead" in done.stderr
    assert is_released(xet_hub, folder, "v1.0.0")
    assert [*xet_hub.hub.repos[REPO].branches] == ["main"]
    again = xet_hub.python(command, "", "publish", str(folder), REPO, "--version", "v1.0.0")
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_file_in_place_of_the_journals_folder_is_refused(xet_hub: TestHub, folder: Path):
    (folder / "hub").write_text("in the way")
    done = publish(xet_hub, folder, "v1.0.0", check=False)
    assert done.returncode == 1
    assert f"error: {folder}/hub is a file, expected a folder" in done.stderr


# ---------------------------------------------------------------- the card, and what is refused


THREE_WAYS = """
import re, sys
from pathlib import Path
from huggingface_hub import HfApi
import tracekit.publish.contents
from tracekit.card.readme import own_section as section
from tracekit.errors import DatasetError
from tracekit.publish.publisher import publish

tracekit.publish.contents.draw = lambda manifest: {}  # figures take most of the time

root, numbers = Path(sys.argv[1]), {}
here = root / "README.md"

def with_section(card, text):
    mark = "<!-- yours: {} -->"
    begin, end = card.index(mark.format("begin")), card.index(mark.format("end"))
    return f"{card[:begin]}{mark.format('begin')}\\n{text}\\n{card[end:]}"

def write(text):
    here.write_text(with_section(here.read_text(), text))

def there(repo):
    path = HfApi().hf_hub_download(repo, "README.md", repo_type="dataset")
    return Path(path).read_text()

def edit(repo, text):
    card = with_section(there(repo), text).encode()
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo, repo_type="dataset")

def release(repo):
    publish(root, repo, f"v1.0.{numbers.get(repo, 0)}")
    numbers[repo] = numbers.get(repo, 0) + 1
    return section(there(repo))

one, two = "tester/traces", "tester/two"
write("S1")
assert release(one) == "S1"
edit(one, "S2")
assert release(one) == "S2", "edited on the Hub"
assert release(one) == "S2", "nobody edited it"
write("S3")
assert release(one) == "S3", "edited here"
edit(one, "S4")
write("S5")
try:
    release(one)
except DatasetError as error:
    assert "edited here and on the Hub, differently" in str(error)
else:
    raise SystemExit("two edits, and no error")
write("S4")
assert release(one) == "S4", "the same text on both sides"
assert release(two) == "S4", "another repository"
edit(one, "S6")
assert release(two) == "S4"
assert release(one) == "S6", "edited on one Hub, as it was here"
write("S7")
assert release(two) == "S7"
assert release(one) == "S7", "edited here after S6 was published"
"""


def test_what_a_person_changed_in_the_head_stays_in_the_next_releases(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0")
    card = card_of(xet_hub, "v1.0.0")
    edited = card.replace("task_categories:\n", "task_categories:\n- text-generation\n").replace("- webdataset\n", "")
    edited = edited.replace("license: unknown\n", "license: mit  # ours\narxiv: ['2601.00001']\n# a comment\n")
    assert edited.count("\n") == card.count("\n") + 2
    xet_hub.hub.commit(REPO, "main", {"README.md": edited.encode()}, "Edited on the Hub")
    notes = publish(xet_hub, folder, "v1.0.1").stderr
    assert "published card holds comments" in notes
    publish(xet_hub, folder, "v1.0.2")
    head, _ = split_card(card_of(xet_hub, "v1.0.2"))
    assert head["task_categories"] == ["question-answering", "text-generation"]
    assert (head["license"], head["arxiv"]) == ("mit", ["2601.00001"])
    assert "webdataset" not in head["tags"]


def test_an_ordinary_release_leaves_no_staging_branch(xet_hub: TestHub, folder: Path, model: Path, second: Path):
    def figures(version: str) -> dict[str, str]:
        files = xet_hub.hub.files(REPO, version)
        return {path: sha256 for path, sha256 in files.items() if path.startswith("figures/")}

    publish(xet_hub, folder, "v1.0.0")
    for limit, version in ((20, "v1.1.0"), (24, "v1.2.0")):
        run_trivia(folder, model, source={"limit": limit})
        done = publish(xet_hub, folder, version)
        assert "stays" not in done.stderr
        assert [*xet_hub.hub.repos[REPO].branches] == ["main"]
    assert figures("v1.1.0") != figures("v1.0.0")
    done = publish(xet_hub, second, "v1.3.0")
    assert [*xet_hub.hub.repos[REPO].branches] == ["main"]


def test_the_own_section_is_that_of_whoever_edited_it_last(xet_hub: TestHub, folder: Path):
    xet_hub.python(THREE_WAYS, folder)


def test_a_card_that_would_differ_names_the_next_patch(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0", "--license", "mit")
    again = ["publish", folder, REPO, "--version", "v1.0.0"]
    same, licence, asked = tell(xet_hub, again, [*again, "--license", "cc-by-4.0"], [*again, "--license", "mit"])
    (folder / "README.md").write_text(section((folder / "README.md").read_text(), OWN_LINE))
    (words,) = tell(xet_hub, again)
    for said in (same, licence, asked, words):
        assert said.code == 0
        assert f"nothing to do: {REPO} has this content as v1.0.0" in said.out
    note = "note: the card would differ from the published one; to publish it, give --version v1.0.1\n"
    assert note in licence.err
    assert note in words.err
    assert "note" not in same.err + asked.err
    assert titles(xet_hub) == ["Release v1.0.0"]


def test_the_head_of_the_card_here_counts_until_there_is_a_published_one(xet_hub: TestHub, folder: Path):
    readme = folder / "README.md"
    made = readme.read_text()
    readme.write_text(made.replace("license: unknown\n", "license: mit\nextra_gated_prompt: Say who you are.\n", 1))
    done = publish(xet_hub, folder, "v1.0.0")
    assert "note:" not in done.stderr
    first = card_of(xet_hub, "v1.0.0")
    assert "\nlicense: mit\n" in first
    assert "\nextra_gated_prompt: Say who you are.\n" in first
    theirs = first.replace("license: mit", "license: cc-by-4.0").replace("who you are.", "what for.")
    theirs = section(theirs, OWN_LINE).replace("\n", "\r\n")
    xet_hub.hub.commit(REPO, "main", {"README.md": theirs.encode()}, "Edited on Windows")
    readme.write_text(readme.read_text() + "\nWords at the end.\n")
    done = publish(xet_hub, folder, "v1.0.1")
    assert "note: README.md here says license 'mit', the published card 'cc-by-4.0'" in done.stderr
    assert "README.md here holds text that tracekit did not write" in done.stderr
    after = card_of(xet_hub, "v1.0.1")
    for words in ("\nlicense: cc-by-4.0\n", "\nextra_gated_prompt: Say what for.\n", f"\n{OWN_LINE}\n"):
        assert words in after
    assert "\r" not in after
    assert "Words at the end." not in after


def test_a_card_that_the_hub_refuses_stops_before_shards_are_sent(xet_hub: TestHub, folder: Path):
    xet_hub.faults({"match": "/validate-yaml", "action": "status", "status": 400, "times": 100})
    done = publish(xet_hub, folder, "v1.0.0", check=False)
    assert done.returncode == 1
    assert "error: the Hub refuses the card: " in done.stderr
    assert "Traceback" not in done.stderr
    assert changes(xet_hub) == []
    assert REPO not in xet_hub.hub.repos


def test_a_private_release_into_a_public_repository_is_refused(xet_hub: TestHub, folder: Path):
    xet_hub.hub.create_repo(REPO)
    done = publish(xet_hub, folder, "v1.0.0", "--private", check=False)
    assert done.returncode == 1
    assert f"error: {REPO} is public. " in done.stderr
    assert changes(xet_hub) == []
    assert [*xet_hub.hub.repos[REPO].branches] == ["main"]


@pytest.mark.parametrize("split", ["all", "dev-1", "a..b"])
def test_a_split_that_datasets_would_not_take_is_not_published(folder: Path, split: str):
    path = folder / "manifests/trivia_qa.json"
    manifest = json.loads(path.read_text())
    manifest["splits"][0]["name"] = split
    path.write_text(json.dumps(manifest))
    index = json.loads((folder / "manifest.json").read_text())
    index["configs"][0]["manifest_sha256"] = sha256_file(path)
    (folder / "manifest.json").write_text(json.dumps(index))
    with pytest.raises(DatasetError, match=re.escape(f"`datasets` takes no split named {split!r}")):
        read_local(folder)


def test_the_own_section_of_the_card_is_kept(xet_hub: TestHub, folder: Path, larger: Path, tmp_path: Path):
    publish(xet_hub, folder, "v1.0.0", "--license", "cc-by-4.0", "--pretty-name", "Our traces")
    card = xet_hub.hub.read(REPO, "main", "README.md").decode()
    xet_hub.hub.commit(REPO, "main", {"README.md": section(card, OWN_LINE).encode()}, "Words")
    publish(xet_hub, larger, "v1.1.0")
    after = xet_hub.hub.read(REPO, "v1.1.0", "README.md").decode()
    for words in (OWN_LINE, "license: cc-by-4.0", "pretty_name: Our traces"):
        assert words in after
    own = Path(shutil.copytree(larger, tmp_path / "own", ignore=shutil.ignore_patterns("hub")))
    (own / "README.md").write_text(section((own / "README.md").read_text(), "Other words."))
    done = publish(xet_hub, own, "v1.1.1", check=False)
    assert done.returncode == 1
    assert "edited here and on the Hub" in done.stderr


def test_what_is_refused(xet_hub: TestHub, folder: Path, tmp_path: Path):
    def refused(*arguments: object) -> str:
        done = xet_hub.python(COMMAND, "", "publish", *arguments, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "no semantic version" in refused(folder, REPO, "--version", "1.0")
    assert "load_traces" in refused(folder, "tester/load_traces", "--version", "v1.0.0")
    assert "owner/name" in refused(folder, "name", "--version", "v1.0.0")
    assert "no such folder" in refused(tmp_path / "nothing", REPO, "--version", "v1.0.0")
    xet_hub.hub.create_repo("tester/foreign")
    xet_hub.hub.commit("tester/foreign", "main", {"train.csv": b"a,b\n"}, "data")
    assert "train.csv" in refused(folder, "tester/foreign", "--version", "v1.0.0")
    xet_hub.hub.create_repo("tester/latin")
    xet_hub.hub.commit("tester/latin", "main", {"README.md": "Überblick".encode("latin-1")}, "words")
    assert "README.md of tester/latin is not UTF-8" in refused(folder, "tester/latin", "--version", "v1.0.0")
    (folder / "manifest.json").unlink()
    assert "not finished" in refused(folder, REPO, "--version", "v1.0.0")


def test_a_private_dataset_needs_its_owner(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0", "--private")
    assert xet_hub.hub.repos[REPO].private
    code = """
    import sys, tracekit
    try:
        print(len(tracekit.TraceStore("hf://datasets/tester/traces@v1.0.0")))
    except tracekit.errors.HubError as error:
        print(error)
    """
    assert xet_hub.python(code).stdout.strip() == "10"
    assert "log in" in xet_hub.python(code, token=None).stdout.lower()


def test_the_store_of_a_folder_goes_on_after_publishing(xet_hub: TestHub, folder: Path):
    publish(xet_hub, folder, "v1.0.0", "--free-local")
    assert not list(folder.rglob("data/*/*.tar"))
    assert len(TraceStore(folder)) == 10
    at = "hf://datasets/tester/traces@v1.0.0"
    verified, asked, here, there, one, again = tell(
        xet_hub,
        ["verify", folder],
        ["verify", folder, "--hub"],
        ["show", folder],
        ["show", at, "--dataset-config", "trivia_qa"],
        ["show", at, "--key", "000004"],
        ["publish", folder, REPO, "--version", "v1.0.0"],
    )
    assert "not here: 2 shards, 4 MB;" in verified.out
    assert "sent to tester/traces v1.0.0" in verified.out
    assert verified.err.endswith(f"next: tracekit verify {folder} --hub  # asks the Hub\n")
    assert asked.err.endswith(f"next: tracekit show {folder}\n")
    assert "on the Hub: all 2 shards" in asked.out
    for said in (here, there):
        assert "10 in validation" in said.out
        assert re.search(r"^accuracy +\S+", said.out, re.MULTILINE)
        assert "000000  " in said.out
    assert f"next: tracekit show {at} --dataset-config trivia_qa --key 000000" in there.err
    assert f"next: tracekit show {folder} --key 000000" in here.err
    assert "prompt_sha256" in one.out
    assert "nothing to do" in again.out
    assert {said.code for said in (verified, asked, here, there, one, again)} == {0}
    other = xet_hub.hub.read(REPO, "v1.0.0", "data/trivia_qa/validation-00000.tar") + b"x"
    xet_hub.hub.repos[REPO].tags["v1.0.0"] = xet_hub.hub.commit(
        REPO, "main", {"data/trivia_qa/validation-00001.tar": other}, "other bytes"
    )
    (changed,) = tell(xet_hub, ["verify", folder, "--hub"])
    del xet_hub.hub.repos[REPO]
    (gone,) = tell(xet_hub, ["verify", folder, "--hub"])
    assert (changed.code, gone.code) == (1, 1)
    assert f"wrong: {REPO} does not have data/trivia_qa/validation-00001.tar" in changed.out
    assert "FAILED: 1 of 2 shards are not on the Hub" in changed.out
    assert "FAILED: 2 of 2 shards are not on the Hub" in gone.out
    assert "makes them anew" in gone.err
