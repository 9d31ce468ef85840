"""The Hub protocol as unmodified clients speak it, against the test Hub; and what the test Hub itself promises.

The clients run in fresh processes: huggingface_hub and datasets read their settings when they are imported.
"""

import hashlib
import http.client
import io
import json
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from tests.hub_for_tests import TestHub
from tests.hubserver_objects import Term, decode_chunk

REPO = "tester/trace"
NUM_SAMPLES = 8
lfs_only = pytest.mark.parametrize("hub", ["lfs"], indirect=True)

CARD = """\
---
license: mit
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: data/shard-00000.tar
- config_name: full
  data_files:
  - split: train
    path: data/*.tar
---
# Traces
"""

# two versions: a folder at once, then one more shard uploaded, deleted locally and committed
PUBLISH = """
import os, sys
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

def status(call, *args, **kwargs):
    try:
        call(*args, **kwargs, repo_type="dataset")
    except HfHubHTTPError as error:
        return error.response.status_code

repo, folder, extra = sys.argv[1:]
api = HfApi()
api.create_repo(repo, repo_type="dataset")
assert status(api.create_repo, repo) == 409
assert status(api.create_repo, repo, exist_ok=True) is None
first = api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder).oid
again = api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder).oid
assert again == first, "nothing changed"
api.create_tag(repo, tag="v1.0.0", repo_type="dataset", revision=first)

add = CommitOperationAdd("data/shard-00002.tar", extra)
api.preupload_lfs_files(repo, [add], repo_type="dataset")
os.remove(extra)
head = api.repo_info(repo, repo_type="dataset").sha
second = api.create_commit(repo, [add], commit_message="one more", repo_type="dataset", parent_commit=head).oid
stale = [CommitOperationAdd("late.txt", b"late")]
assert status(api.create_commit, repo, stale, commit_message="late", parent_commit=head) == 412
api.create_tag(repo, tag="v1.1.0", repo_type="dataset", revision=second)
assert status(api.create_tag, repo, tag="v1.1.0", revision=first) == 409
api.create_branch(repo, branch="staging/v2", repo_type="dataset", revision="v1.0.0")
"""

READ = """
import sys
import datasets, webdataset
from huggingface_hub import HfApi, HfFileSystem

repo, num_samples = sys.argv[1], int(sys.argv[2])
for revision, num_shards in (("v1.0.0", 2), ("v1.1.0", 3)):
    rows = datasets.load_dataset(repo, "full", revision=revision, split="train")
    assert len(rows) == num_shards * num_samples, len(rows)
    stream = datasets.load_dataset(repo, "full", revision=revision, split="train", streaming=True)
    assert [row["json"] for row in stream] == rows["json"][:]
assert len(datasets.load_dataset(repo, revision="v1.1.0", split="train")) == num_samples
try:
    datasets.load_dataset(repo, "full", revision="v9.9.9")
    raise SystemExit("there is no such version")
except datasets.exceptions.DatasetNotFoundError as error:
    assert "v9.9.9" in str(error), error

url = f"hf://datasets/{repo}@v1.1.0/data/shard-{{00000..00002}}.tar"
samples = list(webdataset.WebDataset(url, shardshuffle=False))
assert len(samples) == 3 * num_samples, len(samples)
with HfFileSystem().open(f"datasets/{repo}@v1.1.0/data/shard-00000.tar", "rb") as file:
    file.seek(257)
    assert file.read(5) == b"ustar"

api = HfApi()
assert {tag.name for tag in api.list_repo_refs(repo, repo_type="dataset").tags} == {"v1.0.0", "v1.1.0"}
tree = api.list_repo_tree(repo, repo_type="dataset", recursive=True, revision="v1.1.0", expand=True)
print(*sorted(entry.path for entry in tree))
"""

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], repo_type="dataset", revision=sys.argv[2]))
"""


class Answer(NamedTuple):
    """What a plain HTTP request came back with."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Shows redirects as they are."""

    def redirect_request(self, *args: object) -> None:
        """Follow nothing."""


def ask(url: str, *, method: str = "GET", data: bytes | None = None, **headers: str) -> Answer:
    """One request with the test token, without a client library."""
    request = urllib.request.Request(url, data, {"Authorization": "Bearer hf_test", **headers}, method=method)  # noqa: S310
    try:
        with urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({})).open(request) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def write_shard(path: Path, shard: int) -> None:
    """A WebDataset shard with noise, numbers and text: one kind for each way in which Xet stores chunks."""
    rng = np.random.default_rng(shard)
    with tarfile.open(path, "w") as tar:
        for i in range(NUM_SAMPLES):
            numbers = rng.standard_normal(50_000).astype("f4").tobytes()
            text = json.dumps({"id": f"{shard}-{i}", "text": "the same words " * 2000}).encode()
            for suffix, data in (("json", text), ("bin", rng.bytes(100_000) + numbers)):
                member = tarfile.TarInfo(f"{shard:03d}-{i:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small dataset of two shards."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for shard in range(2):
        write_shard(folder / "data" / f"shard-{shard:05d}.tar", shard)
    return folder


def test_what_one_client_publishes_others_read_at_each_version(hub: TestHub, folder: Path, tmp_path: Path):
    extra = tmp_path / "extra.tar"
    write_shard(extra, 2)
    expected = {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*.tar")}
    sizes = {path: (folder / path).stat().st_size for path in expected}
    expected_later = {**expected, "data/shard-00002.tar": sha256(extra)}

    hub.python(PUBLISH, REPO, folder, extra)
    for revision, wanted in (("v1.0.0", expected), ("v1.1.0", expected_later), ("staging/v2", expected)):
        tars = {path: name for path, name in hub.hub.files(REPO, revision).items() if path.endswith(".tar")}
        assert tars == wanted
    assert hub.hub.read(REPO, "v1.0.0", "README.md").decode() == CARD
    assert hub.hub.history(REPO, "main")[0].title == "one more"
    uploads = [r for r in hub.log() if "/_cas/v1/xorbs/" in r.path or (r.method == "PUT" and "/_lfs/" in r.path)]
    assert {"/_cas/" in r.path for r in uploads} == {hub.mode == "xet"}
    assert all(r.received > 0 for r in uploads)

    listed = hub.python(READ, REPO, NUM_SAMPLES).stdout.split()
    assert listed == sorted([".gitattributes", "README.md", "data", *expected_later])
    hub.log()

    snapshot = Path(hub.python(DOWNLOAD, REPO, "v1.0.0").stdout.strip())
    assert {path: sha256(snapshot / path) for path in expected} == expected
    content = [r for r in hub.log() if "/_cdn/" in r.path or "/_cas/xorb/" in r.path]
    assert not any(r.has_token for r in content)
    sent = sum(r.sent for r in content)
    if hub.mode == "lfs":
        assert sent == sum(sizes.values())
    else:
        assert 0 < sent < sum(sizes.values()), "text and numbers travel compressed"


@lfs_only
def test_uploads_in_parts_and_listings_in_pages(hub: TestHub, folder: Path, tmp_path: Path):
    extra = tmp_path / "extra.tar"
    write_shard(extra, 2)
    expected = sha256(extra)
    hub.hub.multipart_over, hub.hub.part_size, hub.hub.page_size = 500_000, 400_000, 2
    hub.python(PUBLISH, REPO, folder, extra)
    assert hub.hub.files(REPO, "v1.1.0")["data/shard-00002.tar"] == expected
    assert {r.received for r in hub.log() if "part=1" in r.path} == {400_000}
    listing = """
        import sys
        from huggingface_hub import HfApi
        print(len(list(HfApi().list_repo_tree(sys.argv[1], repo_type="dataset", recursive=True))))
    """
    assert hub.python(listing, REPO).stdout.strip() == "6"
    assert len([r for r in hub.log() if "/tree/" in r.path]) == 3


def test_an_upload_that_is_cut_is_sent_again(hub: TestHub, folder: Path):
    hub.hub.create_repo(REPO)
    hub.faults({"action": "drop", "match": "/_lfs/[0-9a-f]{64}|/v1/xorbs/", "after": 100_000})
    upload = """
        import sys
        from huggingface_hub import HfApi
        HfApi().upload_folder(repo_id=sys.argv[1], repo_type="dataset", folder_path=sys.argv[2])
    """
    hub.python(upload, REPO, folder)
    [cut] = [r for r in hub.log() if r.status == "drop"]
    assert 100_000 <= cut.received < 100_000 + (1 << 16)
    assert hub.hub.files(REPO, "main")["data/shard-00001.tar"] == sha256(folder / "data" / "shard-00001.tar")


def test_a_lost_response_hides_work_that_was_done(xet_hub: TestHub):
    hub = xet_hub.hub
    calls = """
        import sys
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import httpx

        repo, api = sys.argv[1], HfApi()
        add = [CommitOperationAdd("a.txt", b"a")]
        for call, options in (
            (api.create_repo, {}),
            (api.create_branch, {"branch": "staging"}),
            (api.create_commit, {"operations": add, "commit_message": "a", "revision": "staging"}),
            (api.create_tag, {"tag": "v1", "revision": "staging"}),
        ):
            try:
                call(repo, repo_type="dataset", **options)
            except httpx.HTTPError as error:
                print(call.__name__, type(error).__name__)
    """
    routes = ("/repos/create", "/branch/", "/commit/", "/tag/")
    xet_hub.faults(*({"action": "lose_response", "match": route, "method": "POST"} for route in routes))
    lost = [line.split()[0] for line in xet_hub.python(calls, REPO).stdout.splitlines()]
    assert lost == ["create_repo", "create_branch", "create_commit", "create_tag"]
    assert hub.read(REPO, "v1", "a.txt") == b"a"
    assert len(hub.history(REPO, "staging")) == 2
    assert [r.path.split("/")[-2] for r in xet_hub.log() if r.status == "lost"] == ["repos", "branch", "commit", "tag"]


def test_a_commit_in_between_loses_the_race(xet_hub: TestHub):
    hub = xet_hub.hub
    hub.create_repo(REPO)
    hub.on("/commit/main", lambda: hub.commit(REPO, "main", {"other.txt": b"other"}, "theirs"), method="POST")
    race = """
        import sys
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        repo, api = sys.argv[1], HfApi()
        for title in ("lost", "won"):
            head = api.repo_info(repo, repo_type="dataset").sha
            add = [CommitOperationAdd("a.txt", b"a")]
            try:
                api.create_commit(repo, add, commit_message=title, repo_type="dataset", parent_commit=head)
            except HfHubHTTPError as error:
                print(title, error.response.status_code)
    """
    assert xet_hub.python(race, REPO).stdout.split() == ["lost", "412"]
    assert [c.title for c in hub.history(REPO, "main")] == ["won", "theirs", "initial commit"]
    hub.commit(REPO, "main", {"other.txt": None}, "clean")
    assert sorted(hub.files(REPO, "main")) == [".gitattributes", "a.txt"]


def test_a_client_can_be_killed_at_a_request(xet_hub: TestHub):
    hub = xet_hub.hub
    hub.create_repo(REPO)
    upload = """
        import sys
        from huggingface_hub import HfApi
        HfApi().upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=sys.argv[1], repo_type="dataset")
    """
    hub.on("/preupload/", lambda: (client.kill(), client.wait()))
    client = xet_hub.start(upload, REPO)
    assert client.wait(60) == -9
    assert len(hub.history(REPO, "main")) == 1


def test_addresses_of_content_expire(hub: TestHub):
    hub.hub.create_repo(REPO)
    data = np.random.default_rng(0).bytes(200_000)
    hub.hub.commit(REPO, "main", {"data/a.tar": data}, "a shard")
    resolve = f"{hub.url}/datasets/{REPO}/resolve/main/data/a.tar"
    first = ask(resolve, method="HEAD")
    assert (first.status, first.headers["X-Linked-Size"]) == (302, "200000")
    assert not first.headers["Location"].startswith(hub.url), "another origin, as on the real Hub"
    assert ask(first.headers["Location"]).body == data
    hub.hub.expire_cdn()
    assert ask(first.headers["Location"]).status == 403
    hub.log()
    part = ask(ask(resolve).headers["Location"], Range="bytes=1000-1099")
    assert (part.status, part.body, part.headers["Content-Range"]) == (206, data[1000:1100], "bytes 1000-1099/200000")
    assert [(r.status, r.sent, r.range) for r in hub.log()] == [(302, 0, None), (206, 100, "bytes=1000-1099")]


def test_the_storage_client_asks_again_when_addresses_expire(xet_hub: TestHub, folder: Path):
    xet_hub.hub.create_repo(REPO)
    upload = """
        import sys
        from huggingface_hub import HfApi
        repo, path = sys.argv[1:]
        HfApi().upload_file(path_or_fileobj=path, path_in_repo="a.tar", repo_id=repo, repo_type="dataset")
    """
    path = folder / "data" / "shard-00000.tar"
    xet_hub.python(upload, REPO, path)
    xet_hub.hub.on("/_cas/xorb/", xet_hub.hub.expire_cdn)
    snapshot = Path(xet_hub.python(DOWNLOAD, REPO, "main").stdout.strip())
    assert sha256(snapshot / "a.tar") == sha256(path)
    assert 403 in {r.status for r in xet_hub.log() if "/_cas/xorb/" in r.path}


def test_content_that_is_not_what_its_hash_says_is_refused(xet_hub: TestHub, folder: Path):
    hub, wrong = xet_hub.hub, "0" * 64
    hub.create_repo(REPO)
    value = {"path": "a.tar", "algo": "sha256", "oid": wrong, "size": 5}
    lines = [{"key": "header", "value": {"summary": "a"}}, {"key": "lfsFile", "value": value}]
    commit = f"{xet_hub.url}/api/datasets/{REPO}/commit/main"
    assert ask(commit, method="POST", data=b"\n".join(json.dumps(x).encode() for x in lines)).status == 400
    xorb = b"\0\5\0\0\0\5\0\0hello"
    (hub.objects.cas / wrong).write_bytes(xorb)
    hub.objects.xet_files["file"] = [Term(wrong, 5, 0, 1)]
    hub.objects.xet_by_sha256[wrong] = "file"
    assert ask(commit, method="POST", data=b"\n".join(json.dumps(x).encode() for x in lines)).status == 422
    assert len(hub.history(REPO, "main")) == 1


@pytest.mark.parametrize("size", [1, 4, 7, 1002])
def test_chunks_grouped_by_byte_are_put_back_in_order(size: int):
    raw = np.random.default_rng(size).bytes(size)
    grouped = b"".join(raw[k::4] for k in range(4))
    assert decode_chunk(2, pa.compress(grouped, codec="lz4", asbytes=True), size) == raw


def test_faults_hit_the_requests_they_name(xet_hub: TestHub):
    xet_hub.hub.create_repo(REPO)
    data = np.random.default_rng(0).bytes(200_000)
    xet_hub.hub.commit(REPO, "main", {"a.tar": data, "a.txt": b"text"}, "a shard")
    info = f"{xet_hub.url}/api/datasets/{REPO}"
    xet_hub.faults(
        {"action": "status", "match": "/api/datasets", "skip": 1, "status": 429, "headers": {"Retry-After": "1"}}
    )
    assert [ask(info).status for _ in range(3)] == [200, 429, 200]

    content = ask(f"{xet_hub.url}/datasets/{REPO}/resolve/main/a.tar").headers["Location"]
    xet_hub.faults({"action": "drop", "match": "/_cdn/", "method": "GET", "where": "response", "after": 100_001})
    xet_hub.log()
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(content)
    assert cut.value.partial == data[:100_001]
    assert ask(content).body == data
    assert [(r.status, r.sent) for r in xet_hub.log()] == [("drop", 100_001), (200, 200_000)]

    xet_hub.faults({"action": "drop", "match": "a.txt"}, {"action": "stall", "match": "a.txt", "seconds": 0.2})
    with pytest.raises(http.client.RemoteDisconnected):
        ask(f"{xet_hub.url}/datasets/{REPO}/resolve/main/a.txt")
    assert ask(f"{xet_hub.url}/datasets/{REPO}/resolve/main/a.txt").body == b"text"
    assert xet_hub.log()[-1].seconds >= 0.2

    with pytest.raises(msgspec.ValidationError, match="tims"):
        xet_hub.faults({"action": "drop", "match": "x", "tims": 2})


def test_private_repositories_and_wrong_tokens(xet_hub: TestHub):
    xet_hub.hub.create_repo(REPO, private=True)
    info = f"{xet_hub.url}/api/datasets/{REPO}"
    assert [ask(info, Authorization=f"Bearer {token}").status for token in ("hf_test", "hf_wrong")] == [200, 401]
    whoami = """
        import os
        from huggingface_hub import HfApi, get_token, constants
        assert not constants.HF_HUB_OFFLINE
        print(get_token(), HfApi().repo_exists("tester/trace", repo_type="dataset"))
    """
    assert xet_hub.python(whoami, token=None).stdout.split() == ["None", "False"]
    assert xet_hub.python(whoami).stdout.split() == ["hf_test", "True"]
    failed = xet_hub.python("raise SystemExit(3)", check=False)
    assert failed.returncode == 3
    with pytest.raises(AssertionError, match="what went wrong"):
        xet_hub.python("raise ValueError('what went wrong')")


def test_closing_fails_after_an_unknown_request_or_an_error_in_the_server(tmp_path: Path):
    running = TestHub(tmp_path / "unknown", mode="xet")
    assert [server.server_address[0] for server in running.serving.servers] == ["127.0.0.1"] * 2
    assert ask(f"{running.url}/api/models?search=x").status == 404
    with pytest.raises(AssertionError, match="GET /api/models"):
        running.close()

    running = TestHub(tmp_path / "broken", mode="xet")
    running.hub.on("whoami", lambda: running.hub.commit("no/repo", "main", {}, "x"))
    with pytest.raises(http.client.RemoteDisconnected):
        ask(f"{running.url}/api/whoami-v2")
    assert [r.status for r in running.log()] == ["error"]
    with pytest.raises(AssertionError, match="no/repo"):
        running.close()
