"""The Hub: the one file that talks to it. Every call is made through `_call`, which retries, or says what to do.

    HubPath     hf://datasets/owner/name@v1.0.0, in parts
    HubRepo     one dataset repository: refs, files, commits, tags
    HubFile     one file at one revision, read by byte ranges

huggingface_hub (2.4) retries its own GETs and uploads; it does not retry `create_repo`, `create_commit`,
`create_branch` and `create_tag`. Here they are, and because an answer may be lost after the work was done, the remote
is looked at before a write is repeated. The token is the client's own affair, by environment or login; it is in no
message.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tracekit.console import say
from tracekit.errors import CorruptShardError, HubAccessError, HubError

__all__ = [
    "HubFile",
    "HubPath",
    "HubRepo",
    "Refs",
    "RemoteFile",
    "StaleParentError",
    "Upload",
    "fetch",
    "quiet_client",
]

MAX_TRIES = 7
"""Tries of one call: with waits that double they span about two minutes, longer than a redeployment of the Hub."""
FIRST_WAIT_SECONDS = 2.0
"""Wait before the second try; each further one waits twice as long."""
MAX_WAIT_SECONDS = 300.0
"""Longest wait, also where the Hub asks for a longer one: its rate limits count in windows of five minutes."""

READ_SECONDS, CONNECT_SECONDS = 60.0, 10.0
"""Longest silence of a server that is read from; the client itself waits for ever."""

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_SECRET = re.compile(r"hf_[\w.-]+|(?<=Bearer )\S+|(?<=\?)\S+")
_PREFIX = "hf://datasets/"

ResultT = TypeVar("ResultT")


class HubPath(NamedTuple):
    """A dataset repository at a revision."""

    repo_id: str
    """`owner/name`."""
    revision: str
    """Tag, branch or commit."""

    @classmethod
    def parse(cls, text: str) -> "HubPath | None":
        """Read `hf://datasets/owner/name[@revision]`; None where the text does not start with `hf://`.

        Raises:
            HubError: it starts so, and is not such a path.
        """
        if not text.startswith("hf://"):
            return None
        found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?", text, re.ASCII)
        if not found:
            raise HubError(f"{text!r} is not the path of a dataset; expected {_PREFIX}owner/name@v1.0.0")
        return cls(found[1], found[2] or "main")

    def at(self, revision: str | None) -> "HubPath":
        """The same repository at another revision; unchanged where None is given."""
        return self if revision is None else self._replace(revision=revision)

    def __str__(self) -> str:
        return f"{_PREFIX}{self.repo_id}@{self.revision}"


class RemoteFile(NamedTuple):
    """A file of a repository."""

    size: int
    """Bytes."""
    sha256: str | None
    """SHA-256; None for small text files, which git keeps."""
    git_sha1: str
    """git's own hash of the content (of large files: of the pointer)."""


class Upload(NamedTuple):
    """A file to be sent."""

    path: str
    """Path in the repository."""
    source: Path
    """Where it is here."""
    num_bytes: int
    """Size."""
    sha256: str
    """What its SHA-256 must be."""


class StaleParentError(HubError):
    """Somebody else has committed in between; read the branch again."""


class HubRepo:
    """One dataset repository.

    Raises:
        HubAccessError: not logged in, or no right to do this.
        HubError: no such repository or revision, or the Hub cannot be reached.
    """

    def __init__(self, repo_id: str) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise HubError(f"{repo_id!r} is no name of a repository: {error}") from error
        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id!r} is no name of a repository; expected owner/name")
        if repo_id.endswith("/load_traces"):
            raise HubError(
                f"{repo_id!r}: `datasets` refuses a repository that holds a script of its own name, and every dataset "
                "holds load_traces.py; choose another name"
            )
        self.repo_id = repo_id
        self._api = HfApi(library_name="tracekit")

    def check_access(self, *, private: bool = False, to_write: bool = True) -> bool:
        """See that somebody is logged in who may publish here; returns whether the repository is there. Where nothing
        is to be written nobody has to be.

        Raises:
            HubAccessError: nobody is logged in, or a new repository would be somebody else's.
            HubError: `private` is asked for and the repository is public.
        """
        from huggingface_hub import get_token

        if not to_write and get_token() is None:
            return self.exists()
        who = _call(f"logging in for {self.repo_id}", self._api.whoami)
        found = _call(f"looking for {self.repo_id}", self._info)
        owner = self.repo_id.partition("/")[0]
        names = [who["name"], *(one["name"] for one in who.get("orgs", []))]
        if found is None and owner not in names:
            raise HubAccessError(
                f"{self.repo_id} does not exist, and {who['name']} may not create it; namespaces there are: "
                f"{', '.join(names)}"
            )
        if found is not None and private and not found.private:
            raise HubError(
                f"{self.repo_id} is public. Make it private in its settings on the Hub, choose another name, or leave "
                "--private out"
            )
        return found is not None

    def exists(self) -> bool:
        """Whether there is such a repository, as far as this user may see."""
        return _call(f"looking for {self.repo_id}", self._info) is not None

    def _info(self) -> Any:
        """What the Hub says of the repository; None where there is none, as far as this user may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self._api.dataset_info(self.repo_id)
        except RepositoryNotFoundError:
            return None

    def create(self, *, private: bool) -> None:
        """Create the repository; one that is there is left as it is."""
        _call(
            f"creating {self.repo_id}",
            lambda: self._api.create_repo(self.repo_id, repo_type="dataset", private=private or None, exist_ok=True),
        )

    def refs(self) -> "Refs":
        """Branches and tags, each with its commit."""
        found = _call(
            f"reading the branches and tags of {self.repo_id}",
            lambda: self._api.list_repo_refs(self.repo_id, repo_type="dataset"),
        )
        return Refs(
            branches={ref.name: ref.target_commit for ref in found.branches},
            tags={ref.name: ref.target_commit for ref in found.tags},
        )

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Every file at a revision, by path."""
        return _call(f"listing {self.repo_id}@{revision}", lambda: self._files(revision))

    def read(self, path: str, revision: str) -> bytes:
        """A small file, whole.

        Raises:
            HubError: there is no such file.
        """
        found = fetch(HubPath(self.repo_id, revision), [path]) / path
        if not found.exists():
            raise HubError(f"{self.repo_id}@{revision} holds no {path}")
        return found.read_bytes()

    def files_at(self, paths: Sequence[str], revision: str) -> dict[str, RemoteFile]:
        """Those of these files that a revision has."""
        found = _call(
            f"looking at {self.repo_id}@{revision}",
            lambda: self._api.get_paths_info(self.repo_id, list(paths), repo_type="dataset", revision=revision),
        )
        return {entry.path: _remote_file(entry) for entry in found if hasattr(entry, "blob_id")}

    def create_branch(self, name: str, *, at: str) -> None:
        """Create a branch at a commit; one that is there is left as it is."""
        _call(
            f"creating the branch {name} of {self.repo_id}",
            lambda: self._api.create_branch(self.repo_id, repo_type="dataset", branch=name, revision=at, exist_ok=True),
        )

    def delete_branch(self, name: str) -> None:
        """Delete a branch; one that is gone is no error."""
        _call(
            f"deleting the branch {name} of {self.repo_id}",
            lambda: self._api.delete_branch(self.repo_id, repo_type="dataset", branch=name),
            done=lambda: True if name not in self.refs().branches else None,
        )

    def stage(self, branch: str, uploads: Sequence[Upload], *, progress: Callable[[int], object]) -> None:
        """Send files and commit them to a branch, all of them or none.

        Raises:
            CorruptShardError: a file is not what its hash says; nothing was committed.
        """
        from huggingface_hub import CommitOperationAdd

        operations = []
        for upload in uploads:
            operation = CommitOperationAdd(upload.path, upload.source)
            if not _has_xet():  # the client would read the file once more to hash it; the storage checks this hash
                operation.upload_info.sha256 = bytes.fromhex(upload.sha256)
            _call(f"sending {upload.path} to {self.repo_id}", lambda op=operation: self._send(op, branch))
            if operation.upload_info.sha256.hex() != upload.sha256:
                raise CorruptShardError(
                    f"{upload.source}: its SHA-256 is {operation.upload_info.sha256.hex()}, expected {upload.sha256}; "
                    "it was not published. Run `tracekit verify` on the dataset"
                )
            operations.append(operation)
            progress(upload.num_bytes)

        def is_there() -> bool | None:
            there = self.files_at([upload.path for upload in uploads], branch)
            are_there = all(one.path in there and there[one.path].sha256 == one.sha256 for one in uploads)
            return True if are_there else None

        first, last = uploads[0].path, uploads[-1].path
        title = f"Stage {first}" if len(uploads) == 1 else f"Stage {len(uploads)} files, {first} to {last}"
        _call(
            f"committing to {branch} of {self.repo_id}",
            lambda: self._commit(branch, operations, title, None),
            done=is_there,
        )

    def release(
        self,
        *,
        parent: str,
        title: str,
        copies: dict[str, str],
        contents: dict[str, bytes],
        deleted: Sequence[str],
    ) -> str:
        """Make one commit on main: copy files, write small ones, delete others. Returns its hash.

        Args:
            parent: Commit at which main has to be.
            title: Title of the commit.
            copies: Large files, each with the commit it is copied from.
            contents: Small files.
            deleted: Files that go.

        Raises:
            StaleParentError: main is no longer at `parent`; nothing was changed.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        told = hashlib.sha256(repr((parent, copies, sorted(contents.items()), deleted)).encode()).hexdigest()
        message = f"tracekit {told}"  # tells our commit from somebody else's of the same title

        def operations() -> list[Any]:
            made: list[Any] = [CommitOperationDelete(path) for path in deleted]
            made += [CommitOperationCopy(path, path, src_revision=source) for path, source in copies.items()]
            return made + [CommitOperationAdd(path, data) for path, data in contents.items()]

        def is_there() -> str | None:
            head = self.refs().branches.get("main")
            if head is None or head == parent:
                return None
            if self._message(head) != message:
                raise StaleParentError(f"{self.repo_id}: main has moved on from {parent}")
            return head

        return _call(
            f"committing to main of {self.repo_id}",
            lambda: self._commit("main", operations(), title, parent, message),
            done=is_there,
        )

    def tag(self, name: str, commit: str) -> None:
        """Tag a commit.

        Raises:
            HubError: the tag is there and names another commit; it is not moved.
        """

        def is_there() -> bool | None:
            target = self.refs().tags.get(name)
            if target is not None and target != commit:
                raise HubError(
                    f"{self.repo_id}: the tag {name} is there at {target}, not at {commit}; it is never moved"
                )
            return True if target == commit else None

        if is_there() is None:
            _call(
                f"tagging {name} in {self.repo_id}",
                lambda: self._api.create_tag(self.repo_id, repo_type="dataset", tag=name, revision=commit),
                done=is_there,
            )

    def check_card(self, text: str) -> None:
        """Have the client read, and the Hub validate, a card.

        Raises:
            HubError: the Hub refuses its YAML; the message is the Hub's.
        """
        import yaml
        from huggingface_hub import DatasetCard

        def validate() -> None:
            try:
                DatasetCard(text).validate()
            except (ValueError, yaml.YAMLError) as error:
                raise HubError(f"the Hub refuses the card: {_clean(str(error))}") from error

        _call("validating the card", validate)

    def _message(self, revision: str) -> str:
        commits = _call(
            f"reading the commits of {self.repo_id}",
            lambda: self._api.list_repo_commits(self.repo_id, repo_type="dataset", revision=revision),
        )
        return commits[0].message

    def _files(self, revision: str) -> dict[str, RemoteFile]:
        tree = self._api.list_repo_tree(self.repo_id, repo_type="dataset", revision=revision, recursive=True)
        return {entry.path: _remote_file(entry) for entry in tree if hasattr(entry, "blob_id")}

    def _send(self, operation: Any, branch: str) -> None:
        self._api.preupload_lfs_files(
            self.repo_id, [operation], repo_type="dataset", revision=branch, free_memory=False
        )

    def _commit(self, branch: str, operations: Sequence[Any], title: str, parent: str | None, message: str = "") -> str:
        made = self._api.create_commit(
            self.repo_id,
            operations,
            repo_type="dataset",
            revision=branch,
            commit_message=title,
            commit_description=message,
            parent_commit=parent,
        )
        return str(made.oid)


class Refs(NamedTuple):
    """Names that stand for commits."""

    branches: dict[str, str]
    tags: dict[str, str]


class HubFile:
    """One large file at one revision, read by byte ranges. Its address is resolved once, and again when it expires."""

    def __init__(self, path: HubPath, name: str, *, num_bytes: int, sha256: str) -> None:
        self._path, self._name, self._num_bytes, self._sha256 = path, name, num_bytes, sha256
        self._lock = threading.Lock()
        self._address: str | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)`.

        Raises:
            HubError: the file is not there, or cannot be reached.
            CorruptShardError: the Hub holds another file than the manifest says.
        """
        return _call(f"reading {self._name} of {self._path}", lambda: self._read(start, stop))

    def _read(self, start: int, stop: int) -> bytes:
        address = self._resolve()
        data = _get(address, start, stop, self._num_bytes)
        if data is None:  # a signed address lives for about an hour
            with self._lock:
                self._address = None if self._address == address else self._address
            data = _get(self._resolve(), start, stop, self._num_bytes)
        if data is None:
            raise HubAccessError(f"reading {self._name} of {self._path}: the storage refuses you; log in, or try later")
        return data

    def _resolve(self) -> str:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with self._lock:
            if self._address is None:
                url = hf_hub_url(self._path.repo_id, self._name, repo_type="dataset", revision=self._path.revision)
                found = get_hf_file_metadata(url, token=None)
                if found.size != self._num_bytes or found.etag != self._sha256:
                    raise CorruptShardError(
                        f"{self._name} of {self._path}: the Hub holds {found.size} bytes with SHA-256 {found.etag}, "
                        f"the manifest says {self._num_bytes} and {self._sha256}"
                    )
                self._address = found.location
            return self._address


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's own progress bars away: there is one of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            enable_progress_bars()


def _get(address: str, start: int, stop: int, num_bytes: int) -> bytes | None:
    """Bytes `[start, stop)` of a file of `num_bytes`; None where the address is refused.

    The token goes to the Hub itself only, never to the storage that it points to. An answer counts only if it says that
    it is exactly these bytes, or is the whole file: what a proxy or a server without ranges sends must not be taken
    for a tensor.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

    own = build_hf_headers(library_name="tracekit") if address.startswith(f"{constants.ENDPOINT}/") else {}
    headers = {**own, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    with get_session().stream("GET", address, headers=headers, timeout=timeout) as response:
        if response.status_code in (401, 403):
            return None
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        range_sent = response.headers.get("Content-Range", "")
        if response.status_code == 206 and range_sent == f"bytes {start}-{stop - 1}/{num_bytes}":
            data = response.read()
        elif response.status_code == 200 and response.headers.get("Content-Length") == str(num_bytes):
            data = _cut(response.iter_bytes(), start, stop)
        else:
            raise ConnectionError(
                f"asked for bytes {start} to {stop} of {num_bytes}, got status {response.status_code}, {range_sent!r}"
            )
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} bytes came for {stop - start}")
    return data


def _cut(blocks: Iterator[bytes], start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a stream, read no further and kept no longer than needed."""
    kept: list[bytes] = []
    position = 0
    for block in blocks:
        kept.append(block[max(start - position, 0) : max(stop - position, 0)])
        position += len(block)
        if position >= stop:
            break
    return b"".join(kept)


def fetch(path: HubPath, patterns: Sequence[str], *, show_progress: bool = False, again: bool = False) -> Path:
    """Download files that match any of these patterns; the local folder that holds them.

    With `again` also those that are here already: their bytes are damaged.

    Raises:
        HubError: no such repository or revision, no right to read it, or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download() -> str:
        try:
            with nullcontext() if show_progress else quiet_client():
                return snapshot_download(
                    path.repo_id,
                    repo_type="dataset",
                    revision=path.revision,
                    allow_patterns=list(patterns),
                    library_name="tracekit",
                    force_download=again,
                )
        except LocalEntryNotFoundError as error:  # what is behind it says why
            raise error.__cause__ or ConnectionError(str(error)) from error

    return Path(_call(f"reading {path}", download))


def _call(what: str, function: Callable[[], ResultT], *, done: Callable[[], ResultT | None] | None = None) -> ResultT:
    """Call, and call again where the failure may pass.

    `done` looks whether a write was made although its answer was lost; what it returns, unless None, is the result.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled, httpx

    tries = 0
    while True:
        tries += 1
        try:
            return function()
        except UnicodeEncodeError:  # of a header: the message would show what could not be encoded
            raise HubAccessError(f"{what}: the token holds a character that no token has. {_LOG_IN}") from None
        except LocalTokenNotFoundError as error:
            raise HubAccessError(f"{what}: nobody is logged in. {_LOG_IN}") from error
        except OfflineModeIsEnabled as error:
            raise HubError(f"{what}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
        except (HfHubHTTPError, httpx.HTTPError, ConnectionError, RuntimeError) as error:
            if isinstance(error, HubError):
                raise
            response = _response_of(error)
            is_lost = any(isinstance(one, httpx.HTTPError | ConnectionError) for one in _causes(error))
            if response is None and isinstance(error, RuntimeError) and not is_lost:
                raise
            if response is None and re.search(r"\b40[13]\b", str(error)):  # the Xet client wraps them in text
                raise HubAccessError(
                    f"{what}: the storage refuses you. Use a token with the right to write to this repository"
                ) from error
            if response is not None and response.status_code not in _TRANSIENT:
                found = done() if done is not None and response.status_code in (404, 409, 412) else None
                if found is not None:
                    return found
                raise _translated(what, error, response) from error
            if tries == MAX_TRIES:
                raise HubError(f"{what}: {_short(error)}, {tries} times. Try again later; nothing is lost") from error
            wait = _wait_seconds(tries, response)
            say(f"{what}: {_short(error)}; trying again in {wait:.0f} s")
            time.sleep(wait)
            found = done() if done is not None else None
            if found is not None:
                return found


_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"


def _translated(what: str, error: Exception, response: Any) -> HubError:
    """An error that says what to do, without addresses or tokens."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = response.status_code
    said = getattr(error, "server_message", None) or response.headers.get("X-Error-Message")
    server = _clean(said or "no reason given")
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{what}: no such revision ({status}). Look at the repository's tags for the versions there are"
        )
    if isinstance(error, GatedRepoError):
        return HubAccessError(f"{what}: the dataset is gated ({status}); ask for access on its page, and log in")
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        return HubError(f"{what}: no such dataset ({status}). If it is private, log in as somebody who may read it")
    if status == 401:
        return HubAccessError(f"{what}: the Hub does not know you (401), or there is no such dataset. {_LOG_IN}")
    if status == 403:
        return HubAccessError(
            f"{what}: you may not do this (403): {server}. Ask the owner for write access, or use a token with the "
            "right to write"
        )
    if status == 412:
        return StaleParentError(f"{what}: somebody else has committed in between (412)")
    return HubError(f"{what}: the Hub answers {status}: {server}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those behind it that the client wrapped."""
    while error is not None:
        yield error
        error = error.__cause__


def _response_of(error: BaseException) -> Any:
    """The HTTP response behind an error, also behind one that the client wrapped; None for a lost connection."""
    found = (getattr(one, "response", None) for one in _causes(error))
    return next((response for response in found if response is not None), None)


def _wait_seconds(tries: int, response: Any) -> float:
    """Seconds to wait: what the Hub asks for, or twice as long each time."""
    headers = response.headers if response is not None else {}
    asked = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(
        r"(?<=;t=)\d+", headers.get("RateLimit", "")
    )
    wait = float(asked[0]) + 1 if asked else FIRST_WAIT_SECONDS * 2 ** (tries - 1)
    return min(wait, MAX_WAIT_SECONDS)


def _short(error: Exception) -> str:
    """An error in a few words."""
    response = _response_of(error)
    if response is not None:
        return f"the Hub answers {response.status_code}"
    return f"the connection failed ({_clean(str(error)).splitlines()[0][:100] if str(error) else type(error).__name__})"


def _clean(text: str) -> str:
    """A message without tokens and without the queries of addresses, which hold signatures."""
    return _SECRET.sub("...", text).strip()


def _has_xet() -> bool:
    """Whether the client uploads by Xet, which hashes while it sends."""
    from importlib.util import find_spec

    from huggingface_hub import constants

    return find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _remote_file(entry: Any) -> RemoteFile:
    return RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
