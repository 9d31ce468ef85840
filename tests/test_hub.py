"""The client of the Hub: names, retries, and what errors say. No server, except where the client itself is asked."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import huggingface_hub
import huggingface_hub.errors as hf_errors
import pytest
from huggingface_hub.utils import HfHubHTTPError, httpx

from tests.hub_for_tests import TestHub
from tracekit import hub
from tracekit.errors import CorruptShardError, HubAccessError, HubError
from tracekit.hub import HubFile, HubPath, HubRepo, Refs, RemoteFile, StaleParentError, Upload

# ---------------------------------------------------------------- paths and names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://datasets/owner/name@v1.0.0", ("owner/name", "v1.0.0")),
        ("hf://datasets/owner/name", ("owner/name", "main")),
        ("hf://datasets/owner/name/", ("owner/name", "main")),
        ("hf://datasets/o-w.n_er/na.me-1@staging/v1.0.0", ("o-w.n_er/na.me-1", "staging/v1.0.0")),
        ("traces/run", None),
        ("/traces/run@v1", None),
        ("datasets/owner/name", None),
        ("", None),
    ],
)
def test_a_path_is_read(text: str, expected: tuple[str, str] | None):
    found = HubPath.parse(text)
    assert (None if found is None else tuple(found)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://owner/name",
        "hf://models/owner/name",
        "hf://datasets/name",
        "hf://datasets/owner/name@",
        "hf://datasets/owner/name/data/x.tar",
        "hf://datasets/owner/name@v1 0",
        "hf://",
    ],
)
def test_a_path_that_names_no_dataset_is_refused(text: str):
    with pytest.raises(HubError) as caught:
        HubPath.parse(text)
    assert str(caught.value) == (f"{text!r} is not the path of a dataset; expected hf://datasets/owner/name@v1.0.0")


def test_a_path_is_written_as_it_is_read_and_moves_to_another_revision():
    path = HubPath("owner/name", "v1.0.0")
    assert HubPath.parse(str(path)) == path
    assert path.at(None) is path
    assert str(path.at("main")) == "hf://datasets/owner/name@main"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("name", "expected owner/name"),
        ("a/b/c", "'a/b/c' is no name of a repository"),
        ("owner/na me", "'owner/na me' is no name of a repository"),
        ("owner/name..x", "'owner/name..x' is no name of a repository"),
        ("owner/load_traces", "choose another name"),
    ],
)
def test_a_name_that_cannot_be_a_repository(name: str, expected: str):
    with pytest.raises(HubError) as caught:
        HubRepo(name)
    assert expected in str(caught.value)


# ---------------------------------------------------------------- what messages leave out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token hf_abcDEF123 is wrong", "token ... is wrong"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ..."),
        ("GET https://cdn/x?X-Amz-Signature=12&a=b failed", "GET https://cdn/x?... failed"),
        ("two: hf_a https://h/?sig=1 hf_b", "two: ... https://h/?... ..."),
        ("what? Nothing.", "what? Nothing."),
        ("by hf_oauth_ab.CD-ef_1, hf_jwt_eyJh.eyJz.sig-_x", "by ..., ..."),
        ("  nothing secret\n", "nothing secret"),
    ],
)
def test_secrets_are_left_out_of_messages(text: str, expected: str):
    assert hub._clean(text) == expected


# ---------------------------------------------------------------- waiting


def answer(status: int, message: str = "", **headers: str) -> Any:
    """An answer of the Hub."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if message:
        fields["X-Error-Message"] = message
    return httpx.Response(status, headers=fields, request=httpx.Request("GET", "https://hub/x?sig=secret"))


@pytest.mark.parametrize(
    ("tries", "headers", "expected"),
    [
        (1, None, 2.0),
        (2, None, 4.0),
        (6, None, 64.0),
        (1, {}, 2.0),
        (1, {"Retry_After": "7"}, 8.0),
        (5, {"Retry_After": "0"}, 1.0),
        (1, {"Retry_After": "100000"}, 300.0),
        (1, {"RateLimit": '"api";r=0;t=55'}, 56.0),
        (3, {"RateLimit": '"api";r=0'}, 8.0),
        (1, {"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 2.0),
    ],
)
def test_how_long_to_wait(tries: int, headers: dict[str, str] | None, expected: float):
    assert hub._wait_seconds(tries, None if headers is None else answer(429, **headers)) == expected


def test_all_waits_together_span_a_redeployment_of_the_hub():
    assert 100 < sum(hub._wait_seconds(tries, None) for tries in range(1, hub.MAX_TRIES)) < 200


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited; nobody does."""
    found: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", found.append)
    return found


def failing(*errors: Exception | str) -> Callable[[], str]:
    """A function that raises these one after another, or returns a text among them."""
    left = list(errors)

    def function() -> str:
        one = left.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    return function


def refused(status: int, message: str = "", kind: type[HfHubHTTPError] = HfHubHTTPError, **headers: str) -> Any:
    """The client's error for an answer."""
    return kind("what the client says", response=answer(status, message, **headers), server_message=message or None)


def raised_at_last(error: Exception) -> str:
    """What the error becomes after every try, in words."""
    with pytest.raises(HubError) as caught:
        hub._call("doing it", failing(*[error] * hub.MAX_TRIES))
    return str(caught.value)


def raised(error: Exception) -> str:
    """What the error becomes, in words."""
    with pytest.raises(HubError) as caught:
        hub._call("doing it", failing(error))
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        *(refused(status) for status in (408, 425, 429, 500, 502, 503, 504)),
        ConnectionError("lost"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(error: Exception, waits: list[float], capsys: pytest.CaptureFixture[str]):
    assert hub._call("doing it", failing(error, error, "done")) == "done"
    assert waits == [2.0, 4.0]
    assert capsys.readouterr().err.count("doing it: ") == 2


def test_a_failure_that_stays_ends_in_one_message(waits: list[float]):
    with pytest.raises(HubError) as caught:
        hub._call("doing it", failing(*[refused(503)] * hub.MAX_TRIES))
    assert str(caught.value) == ("doing it: the Hub answers 503, 7 times. Try again later; nothing is lost")
    assert len(waits) == 6


def test_a_lost_connection_names_no_signature(waits: list[float], capsys: pytest.CaptureFixture[str]):
    error = ConnectionError("no route to https://hub/x?sig=secret with hf_secret\nand more")
    with pytest.raises(HubError) as caught:
        hub._call("doing it", failing(*[error] * hub.MAX_TRIES))
    said = str(caught.value) + capsys.readouterr().err
    assert "the connection failed (no route to https://hub/x?... with ...)" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (refused(401), HubAccessError, "does not know you (401), or there is no such dataset. Log in with `hf auth"),
        (refused(401, kind=hf_errors.RepositoryNotFoundError), HubAccessError, "Log in with `hf auth login`, or set"),
        (refused(403, "no rights"), HubAccessError, "you may not do this (403): no rights. Ask the owner for write"),
        (refused(403, kind=hf_errors.GatedRepoError), HubAccessError, "the dataset is gated (403); ask for access"),
        (refused(404, kind=hf_errors.RepositoryNotFoundError), HubError, "no such dataset (404). If it is private"),
        (refused(404, kind=hf_errors.RevisionNotFoundError), HubError, "no such revision (404). Look at the"),
        (refused(412), StaleParentError, "somebody else has committed in between (412)"),
        (refused(400, "bad ?sig=abc hf_abc"), HubError, "doing it: the Hub answers 400: bad ?... ..."),
        (refused(422), HubError, "doing it: the Hub answers 422: no reason given"),
        (ConnectionError("Data processing error: 403 Forbidden"), HubAccessError, "the storage refuses you. Use a"),
        (hf_errors.OfflineModeIsEnabled("x"), HubError, "HF_HUB_OFFLINE is set; unset it to reach the Hub"),
    ],
    ids=str,
)
def test_what_stays_refused_is_not_tried_again_and_says_what_to_do(
    error: Exception, kind: type[HubError], expected: str, waits: list[float]
):
    with pytest.raises(kind) as caught:
        hub._call("doing it", failing(error))
    assert expected in str(caught.value)
    assert str(caught.value).startswith("doing it: ")
    assert type(caught.value) is kind
    assert waits == []


def test_the_answer_behind_a_wrapped_error_counts(waits: list[float]):
    wrapped = RuntimeError("upload failed")
    wrapped.__cause__ = refused(403, "no")
    assert "you may not do this (403): no" in raised(wrapped)
    wrapped.__cause__ = refused(503)
    assert hub._call("doing it", failing(wrapped, "done")) == "done"


def test_a_lost_connection_behind_a_wrapped_error_may_pass(waits: list[float]):
    wrapped = RuntimeError("Error while uploading 'a.tar' to the Hub.")
    wrapped.__cause__ = httpx.ConnectError("refused")
    assert hub._call("doing it", failing(wrapped, "done")) == "done"
    assert "the connection failed (Error while uploading" in raised_at_last(wrapped)


def test_a_token_of_other_letters_is_not_shown(waits: list[float]):
    text = raised(UnicodeEncodeError("ascii", "hf_secr\u00e9t", 7, 8, "ordinal not in range(128)"))
    assert text == (
        "doing it: the token holds a character that no token has. Log in with `hf auth login`, or set HF_TOKEN"
    )


def test_an_error_of_the_program_is_let_through(waits: list[float]):
    with pytest.raises(RuntimeError, match="a bug") as caught:
        hub._call("doing it", failing(RuntimeError("a bug")))
    assert not isinstance(caught.value, HubError)
    assert waits == []


def test_our_own_errors_are_let_through_as_they_are(waits: list[float]):
    for error in (HubError("ours"), CorruptShardError("ours")):
        with pytest.raises(type(error), match=r"^ours$"):
            hub._call("doing it", failing(error))
    assert waits == []


# ---------------------------------------------------------------- writes whose answer is lost


def test_a_write_is_looked_for_before_it_is_repeated(waits: list[float]):
    write = failing(ConnectionError("lost"))  # a second call would fail
    assert hub._call("doing it", write, done=failing("there")) == "there"


def test_a_write_that_is_not_there_is_repeated(waits: list[float]):
    looks: list[int] = []

    def look() -> None:
        looks.append(1)

    assert hub._call("doing it", failing(refused(500), refused(502), "written"), done=look) == "written"
    assert len(looks) == len(waits) == 2


@pytest.mark.parametrize("status", [404, 409, 412])
def test_a_write_that_is_there_already_may_answer_so(status: int, waits: list[float]):
    assert hub._call("doing it", failing(refused(status)), done=failing("there")) == "there"
    with pytest.raises(HubError):
        hub._call("doing it", failing(refused(status)), done=lambda: None)


def test_a_write_that_is_refused_is_not_looked_for(waits: list[float]):
    def look() -> str:
        raise AssertionError("looked")

    with pytest.raises(HubAccessError):
        hub._call("doing it", failing(refused(403)), done=look)


class Client:
    """Stands in for the client's API: answers by name, and counts."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self._functions, self.calls = functions, list[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.calls.append(name)
        return self._functions[name]


class CommitMade:
    """What `create_commit` hands back."""

    def __init__(self, oid: str) -> None:
        self.oid = oid


def repo_with(**functions: Callable[..., Any]) -> tuple[HubRepo, Client]:
    repo, client = HubRepo("owner/name"), Client(**functions)
    repo._api = client  # pyright: ignore[reportAttributeAccessIssue]
    return repo, client


def test_a_tag_that_is_there_is_not_made_again_and_never_moved(monkeypatch: pytest.MonkeyPatch, waits: list[float]):
    repo, client = repo_with()
    monkeypatch.setattr(repo, "refs", lambda: Refs({}, {"v1.0.0": "abc"}))
    repo.tag("v1.0.0", "abc")
    with pytest.raises(HubError, match=r"the tag v1\.0\.0 is there at abc, not at def; it is never moved"):
        repo.tag("v1.0.0", "def")
    assert client.calls == []


def test_a_tag_whose_answer_is_lost_is_looked_for(monkeypatch: pytest.MonkeyPatch, waits: list[float]):
    tags: dict[str, str] = {}

    def create_tag(name: str, **options: Any) -> None:
        tags[options["tag"]] = options["revision"]
        raise ConnectionError("lost")

    repo, client = repo_with(create_tag=create_tag)
    monkeypatch.setattr(repo, "refs", lambda: Refs({}, dict(tags)))
    repo.tag("v1.0.0", "abc")
    assert client.calls == ["create_tag"]


def test_a_branch_that_is_gone_after_a_lost_answer_is_deleted(monkeypatch: pytest.MonkeyPatch, waits: list[float]):
    answers = failing(ConnectionError("lost"), "deleted twice")
    repo, client = repo_with(delete_branch=lambda *arguments, **options: answers())
    monkeypatch.setattr(repo, "refs", lambda: Refs({}, {}))
    repo.delete_branch("staging/v1.0.0")
    assert client.calls == ["delete_branch"]


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_release_whose_answer_is_lost_is_known_by_its_message_and_not_its_title(
    is_ours: bool, monkeypatch: pytest.MonkeyPatch, waits: list[float]
):
    heads, messages = {"main": "old"}, list[str]()

    def create_commit(*arguments: Any, **options: Any) -> None:
        assert options["parent_commit"] == "old"
        assert options["commit_message"] == "Release v1.0.0"
        heads["main"] = "new"
        messages.append(options["commit_description"])
        raise ConnectionError("lost")

    class Written:
        title = "Release v1.0.0"

        @property
        def message(self) -> str:
            return messages[0] if is_ours else f"tracekit {'0' * 64}"

    repo, client = repo_with(
        create_commit=create_commit, list_repo_commits=lambda *arguments, **options: [Written(), None]
    )
    monkeypatch.setattr(repo, "refs", lambda: Refs(dict(heads), {}))
    arguments: dict[str, Any] = {"copies": {"a.tar": "s"}, "contents": {"a": b"a"}, "deleted": []}
    if is_ours:
        assert repo.release(parent="old", title="Release v1.0.0", **arguments) == "new"
    else:
        with pytest.raises(StaleParentError, match="main has moved on from old"):
            repo.release(parent="old", title="Release v1.0.0", **arguments)
    assert client.calls == ["create_commit", "list_repo_commits"]


def test_another_release_has_another_message(monkeypatch: pytest.MonkeyPatch, waits: list[float]):
    messages: list[str] = []

    def create_commit(*arguments: Any, **options: Any) -> Any:
        messages.append(options["commit_description"])
        return CommitMade("new")

    repo, _ = repo_with(create_commit=create_commit)
    same: dict[str, Any] = {"copies": {"a.tar": "s"}, "contents": {"a": b"a", "b": b"b"}, "deleted": ["c"]}
    others: list[dict[str, Any]] = [{"copies": {"a.tar": "t"}}, {"contents": {"a": b"b"}}, {"deleted": []}]
    for change in ({}, {"contents": {"b": b"b", "a": b"a"}}, *others):
        repo.release(parent="old", title="Release v1.0.0", **{**same, **change})
    repo.release(parent="older", title="Release v1.0.0", **same)
    assert messages[0] == messages[1]
    assert len(set(messages)) == 5


@pytest.mark.parametrize("is_there", [True, False])
def test_a_staging_commit_is_repeated_only_if_it_is_not_there(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
):
    source = tmp_path / "a.tar"
    source.write_bytes(b"bytes of a shard")
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    commits: list[str] = []

    def create_commit(*arguments: Any, **options: Any) -> Any:
        commits.append(options["commit_message"])
        if len(commits) == 1:
            raise ConnectionError("lost")
        return CommitMade("new")

    repo, _ = repo_with(create_commit=create_commit, preupload_lfs_files=lambda *arguments, **options: None)
    there = {"data/a.tar": RemoteFile(16, sha256, "oid")} if is_there else {}
    monkeypatch.setattr(repo, "files_at", lambda paths, revision: there)
    sent: list[int] = []
    repo.stage("staging/v1.0.0", [Upload("data/a.tar", source, 16, sha256)], progress=sent.append)
    assert commits == ["Stage data/a.tar"] * (1 if is_there else 2)
    assert sent == [16]


def test_a_file_that_is_not_what_its_hash_says_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
):
    source = tmp_path / "a.tar"
    source.write_bytes(b"other bytes")
    monkeypatch.setattr(hub, "_has_xet", lambda: True)  # the client hashes what it sends
    repo, client = repo_with(preupload_lfs_files=lambda *arguments, **options: None)
    with pytest.raises(CorruptShardError, match="it was not published"):
        repo.stage("staging/v1.0.0", [Upload("data/a.tar", source, 11, "0" * 64)], progress=lambda num_bytes: None)
    assert client.calls == ["preupload_lfs_files"]


# ---------------------------------------------------------------- ranges


SHARD = bytes(range(200))


class Storage:
    """Stands in for addresses and ranged GETs; `refusals` says of each GET whether its address is refused."""

    def __init__(self, *refusals: bool) -> None:
        self.refusals = list(refusals)
        self.num_resolved = 0
        self.asked: list[str] = []

    def resolve(self, url: str, token: object) -> Any:
        self.num_resolved += 1
        return huggingface_hub.HfFileMetadata(
            commit_hash="c", etag="e" * 64, location=f"https://cdn/{self.num_resolved}", size=200, xet_file_data=None
        )

    def get(self, address: str, start: int, stop: int, num_bytes: int) -> bytes | None:
        assert num_bytes == len(SHARD)
        self.asked.append(address)
        return None if self.refusals and self.refusals.pop(0) else SHARD[start:stop]


@pytest.fixture
def file_on(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Callable[..., HubFile]:
    """Makes a file that lies in a storage."""

    def make(storage: Storage, sha256: str = "e" * 64) -> HubFile:
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", storage.resolve)
        monkeypatch.setattr(hub, "_get", storage.get)
        return HubFile(HubPath("owner/name", "c"), "data/a/train-00000.tar", num_bytes=200, sha256=sha256)

    return make


def test_an_address_is_resolved_once_by_many_threads(file_on: Callable[..., HubFile]):
    storage = Storage()
    file = file_on(storage)
    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(lambda n: file.read(n, n + 10), range(50))) == [SHARD[n : n + 10] for n in range(50)]
    assert storage.num_resolved == 1
    assert len(storage.asked) == 50


def test_an_address_that_has_expired_is_resolved_again(file_on: Callable[..., HubFile]):
    storage = Storage(False, True)
    file = file_on(storage)
    assert file.read(0, 10) + file.read(10, 20) + file.read(20, 30) == SHARD[:30]
    assert storage.asked == ["https://cdn/1", "https://cdn/1", "https://cdn/2", "https://cdn/2"]


def test_an_address_that_stays_refused_is_an_error(file_on: Callable[..., HubFile], waits: list[float]):
    message = r"reading data/a/train-00000.tar of hf://datasets/owner/name@c: the storage refuses you"
    with pytest.raises(HubAccessError, match=message):
        file_on(Storage(True, True)).read(0, 10)
    assert waits == []


def test_a_file_that_is_not_the_manifests_is_not_read(file_on: Callable[..., HubFile]):
    storage = Storage()
    with pytest.raises(CorruptShardError) as caught:
        file_on(storage, sha256="f" * 64).read(0, 10)
    assert str(caught.value) == (
        "data/a/train-00000.tar of hf://datasets/owner/name@c: the Hub holds 200 bytes with SHA-256 "
        f"{'e' * 64}, the manifest says 200 and {'f' * 64}"
    )
    assert storage.asked == []


# ---------------------------------------------------------------- one ranged GET


class Range(NamedTuple):
    """What a server answers to a ranged GET, instead of the range itself."""

    status: int = 206
    data: bytes | None = None
    """Body; the range by default."""
    said: str | None = None
    """Content-Range; what was asked for by default."""
    stall_seconds: float = 0.0


class RangeServer:
    """A storage on this machine: answers one after another, then ranges of SHARD. Counts what it sent."""

    def __init__(self, *answers: Range) -> None:
        self.answers, self.sent, self.headers = list(answers), list[int](), list[dict[str, str]]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (RangeHandler,), {"owner": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/shard?sig=1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> "RangeServer":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, start: int, stop: int, num_bytes: int = len(SHARD)) -> bytes | None:
        return hub._get(self.address, start, stop, num_bytes)


class RangeHandler(BaseHTTPRequestHandler):
    """Answers as its server's owner says."""

    owner: RangeServer

    def do_GET(self) -> None:
        owner = self.owner
        owner.headers.append(dict(self.headers))
        answer = owner.answers.pop(0) if owner.answers else Range()
        start, stop = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
        data = SHARD[start : stop + 1] if answer.data is None else answer.data
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(data)))
        if answer.status == 206:
            self.send_header("Content-Range", answer.said or f"bytes {start}-{stop}/{len(SHARD)}")
        self.end_headers()
        sleep(answer.stall_seconds)
        owner.sent.append(0)
        try:
            for position in range(0, len(data), 65536):
                owner.sent[-1] += self.wfile.write(data[position : position + 65536])
        except ConnectionError:  # the client has read enough
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is said."""


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RangeServer]]:
    """Starts a storage, and lets this process reach it: tests are offline otherwise."""
    started: list[RangeServer] = []

    def start(*answers: Range) -> RangeServer:
        started.append(RangeServer(*answers))
        return started[-1]

    with httpx.Client(trust_env=False) as client:
        monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: client)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        yield start
    for one in started:
        one.__exit__()


def test_a_range_is_asked_for_as_it_is_and_the_token_stays_here(
    serving: Callable[..., RangeServer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server = serving()
    assert server.get(150, 160) == SHARD[150:160]
    assert server.headers[0]["Range"] == "bytes=150-159"
    assert server.headers[0]["Accept-Encoding"] == "identity"
    assert "authorization" not in {name.lower() for name in server.headers[0]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Range(said="bytes 0-9/200"), "got status 206, 'bytes 0-9/200'"),
        (Range(said="bytes 150-159/201"), "got status 206, 'bytes 150-159/201'"),
        (Range(said="bytes 150-159/*"), "got status 206"),
        (Range(data=SHARD[150:155]), "5 bytes came for 10"),
        (Range(data=SHARD[150:165]), "15 bytes came for 10"),
        (Range(status=200, data=b"<html>Log in to the network</html>"), "got status 200, ''"),
        (Range(status=200, data=SHARD[150:160]), "got status 200, ''"),
        (Range(status=204, data=b""), "got status 204"),
    ],
)
def test_an_answer_that_is_not_these_bytes_is_no_answer(
    serving: Callable[..., RangeServer], answer: Range, expected: str
):
    server = serving(answer)
    with pytest.raises(ConnectionError) as caught:
        server.get(150, 160)
    assert expected in str(caught.value)
    assert server.get(150, 160) == SHARD[150:160]


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (60, 140), (190, 200)])
def test_a_storage_without_ranges_is_cut_to_them(serving: Callable[..., RangeServer], start: int, stop: int):
    assert serving(Range(status=200, data=SHARD)).get(start, stop) == SHARD[start:stop]


def test_nothing_is_read_beyond_what_is_needed(serving: Callable[..., RangeServer]):
    large = bytes(100_000_000)
    server = serving(Range(status=200, data=large), Range(said="bytes 0-9/7", data=large))
    assert server.get(10, 20, len(large)) == bytes(10)
    with pytest.raises(ConnectionError):
        server.get(10, 20, len(large))
    assert all(sent < len(large) // 2 for sent in server.sent)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_address_is_none(serving: Callable[..., RangeServer], status: int):
    assert serving(Range(status=status, data=b"AccessDenied")).get(0, 10) is None


def test_a_failing_storage_is_an_error_of_the_client(serving: Callable[..., RangeServer]):
    server = serving(Range(status=503, data=b"slow down"), Range(status=416, data=b""))
    for status in (503, 416):
        with pytest.raises(HfHubHTTPError) as caught:
            server.get(0, 10)
        assert caught.value.response.status_code == status


def test_a_silent_storage_is_given_up_and_asked_again(
    serving: Callable[..., RangeServer], monkeypatch: pytest.MonkeyPatch, waits: list[float]
):
    monkeypatch.setattr(hub, "READ_SECONDS", 0.1)
    server = serving(Range(stall_seconds=0.5))
    assert hub._call("doing it", lambda: server.get(0, 10)) == SHARD[:10]
    assert len(waits) == 1


# ---------------------------------------------------------------- a real client


def test_offline_means_offline(waits: list[float]):  # tests run with HF_HUB_OFFLINE=1
    for call in (
        HubRepo("owner/name").refs,
        lambda: hub.fetch(HubPath("owner/nowhere", "v1.0.0"), ["*.json"]),
    ):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it to reach the Hub"):
            call()
    assert waits == []


SAYS = """
import tracekit.hub
from tracekit.errors import HubError
from tracekit.hub import HubPath, HubRepo, fetch

tracekit.hub.FIRST_WAIT_SECONDS = 0.01

def says(name, function):
    try:
        print(name, "->", function())
    except HubError as error:
        print(name, "->", type(error).__name__, error)

"""

OPEN = (
    SAYS
    + """
says("head", lambda: fetch(HubPath("tester/open", "main"), ["*.json"]).name)
says("revision", lambda: fetch(HubPath("tester/open", "v9"), ["*.json"]))
says("no repository", lambda: fetch(HubPath("tester/none", "main"), ["*.json"]))
says("no file", lambda: HubRepo("tester/open").read("b.json", "main"))
says("file", lambda: HubRepo("tester/open").read("a.json", "main"))
says("listing", lambda: HubRepo("tester/none").files("main"))
says("theirs", lambda: HubRepo("other/theirs").create_branch("b", at="main"))
says("no such branch", lambda: HubRepo("tester/open").delete_branch("b"))
HubRepo("tester/open").create(private=False)
HubRepo("tester/open").create_branch("b", at="main")
HubRepo("tester/open").create_branch("b", at="main")
says("branches", lambda: sorted(HubRepo("tester/open").refs().branches))
says("card", lambda: HubRepo("tester/open").check_card(chr(10).join(["---", "license: [", "---", ""])))
"""
)


def test_what_a_real_client_says(xet_hub: TestHub):
    xet_hub.hub.create_repo("tester/open")
    oid = xet_hub.hub.commit("tester/open", "main", {"a.json": b"{}"}, "data")
    xet_hub.hub.create_repo("other/theirs")
    lines = dict(line.split(" -> ", 1) for line in xet_hub.python(OPEN).stdout.splitlines() if " -> " in line)
    assert lines["head"] == oid
    assert lines["revision"].startswith("HubError reading hf://datasets/tester/open@v9: no such revision (404)")
    assert "no such dataset (404)" in lines["no repository"]
    assert lines["no file"] == "HubError tester/open@main holds no b.json"
    assert lines["file"] == "b'{}'"
    assert lines["listing"].startswith("HubError listing tester/none@main: no such dataset (404)")
    assert lines["theirs"].startswith("HubAccessError creating the branch b of other/theirs: you may not do this (403)")
    assert lines["no such branch"] == "None"
    assert lines["branches"] == "['b', 'main']"
    assert lines["card"].startswith("HubError ")


SECRET = (
    SAYS
    + """
says("whoami", lambda: HubRepo("tester/secret").check_access())
says("refs", lambda: HubRepo("tester/secret").refs())
says("fetch", lambda: fetch(HubPath("tester/secret", "main"), ["*.json"]))
"""
)


@pytest.mark.parametrize("token", [None, "hf_wrongSecret", "hf_wrongSecr\u00e9t"])
def test_nobody_is_told_to_log_in(xet_hub: TestHub, token: str | None):
    xet_hub.hub.create_repo("tester/secret", private=True)
    lines = xet_hub.python(SECRET, token=token).stdout.splitlines()
    assert [line.split(" -> ")[0] for line in lines] == ["whoami", "refs", "fetch"]
    for line in lines:
        assert "-> HubAccessError " in line
        assert "hf auth login" in line
        assert "wrongSecr" not in line
