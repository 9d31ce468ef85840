"""What the test Hub remembers: repositories with their commits and refs, the request log, faults, and things to call.

Tests use `Hub` directly, without a client: to commit, to read what was published, to make requests fail.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import msgspec

from tests.hubserver_objects import Objects

__all__ = ["Commit", "Entry", "Fault", "Hub", "HubError", "Repo", "Request", "git_blob_oid", "is_large", "lfs_pointer"]

# text files above this go to LFS, as on the real Hub
LFS_THRESHOLD = 10 << 20
LFS_SUFFIXES = {".tar", ".parquet", ".npz", ".npy", ".bin", ".safetensors", ".zip", ".gz", ".zst", ".arrow"}
GIT_ATTRIBUTES = b"*.tar filter=lfs diff=lfs merge=lfs -text\n"
# the log is complete a moment after the client has its last answer
QUIET_SECONDS = 10.0


def git_blob_oid(data: bytes) -> str:
    """The name git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The file git keeps in place of a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants a file as an LFS object; `sample` is how it begins."""
    return PurePosixPath(path).suffix.lower() in LFS_SUFFIXES or size > LFS_THRESHOLD or b"\0" in sample


class HubError(Exception):
    """An answer other than success: HTTP status, the `X-Error-Code` clients look at, and a message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Entry(NamedTuple):
    """A file at a commit."""

    oid: str
    """Git's name of the file, or of its LFS pointer."""
    size: int
    sha256: str | None = None
    """Of a large file; None for one kept in git."""
    xet: str | None = None
    """Hash in the Xet storage, if it was uploaded there."""


class Commit(NamedTuple):
    """A commit and every file at it."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    tree: dict[str, Entry]


class Request(NamedTuple):
    """A line of the log."""

    method: str
    path: str
    """With the query, percent-encoded as it came."""
    status: int | str
    """HTTP status; "drop": the connection was cut; "lost": done, but not answered; "error": see `Hub.errors`."""
    received: int
    """Bytes of the request's body that were read."""
    sent: int
    """Bytes of the response's body that were written; a client that hangs up early may have read fewer."""
    range: str | None
    has_token: bool
    seconds: float
    started: float
    """By the monotonic clock; the log is sorted by it, as an answer may be read before its line is written."""


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Something that goes wrong with requests whose address matches."""

    action: Literal["drop", "status", "stall", "lose_response"]
    """drop: cut the connection; status: answer at once; stall: wait; lose_response: do the work, then hang up."""
    match: str
    """Regular expression, searched in the address."""
    method: str | None = None
    times: int = 1
    """Matching requests that are hit."""
    skip: int = 0
    """Matching requests that pass before."""
    after: int | None = None
    """For drop: bytes of the body after which it happens; None: before the request is handled."""
    where: Literal["request", "response"] = "request"
    """For drop: which body is cut."""
    status: int = 500
    headers: dict[str, str] = {}
    seconds: float = 0.0
    """For stall."""


class Watch(NamedTuple):
    """A function to call before a request."""

    match: str
    method: str | None
    callback: Callable[[], object]


class Repo:
    """A dataset repository: commits, branches and tags; small files lie in `root`."""

    def __init__(self, root: Path, repo_id: str, *, private: bool) -> None:
        self.root, self.id, self.private = root, repo_id, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        root.mkdir(parents=True, exist_ok=True)
        self.commit("main", {".gitattributes": self.add_blob(GIT_ATTRIBUTES)}, "initial commit")

    def add_blob(self, data: bytes) -> Entry:
        """Keep a small file."""
        oid = git_blob_oid(data)
        (self.root / oid).write_bytes(data)
        return Entry(oid, len(data))

    def commit(self, branch: str, tree: dict[str, Entry], title: str, message: str = "") -> str:
        """Put a commit with these files on a branch, which is made if there is none."""
        parent = self.branches.get(branch)
        files = sorted((path, entry.oid) for path, entry in tree.items())
        # the clock makes two commits of the same content two commits, as in git
        body = json.dumps([parent, title, message, files, time.time_ns()]).encode()
        oid = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.commits[oid] = Commit(oid, parent, title, message, date, tree)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or the beginning of a commit's name stands for; 404 for any other."""
        name = revision.removeprefix("refs/heads/")
        for table in (self.branches, self.tags):
            if name in table:
                return table[name]
        if re.fullmatch(r"[0-9a-f]{5,40}", name):
            hits = [oid for oid in self.commits if oid.startswith(name)]
            if len(hits) == 1:
                return hits[0]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def at(self, revision: str) -> Commit:
        """The commit of a revision."""
        return self.commits[self.resolve(revision)]

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


class Hub:
    """All of it, in a folder of its own. `serve` in hubserver.py puts it on the network."""

    def __init__(self, root: Path, *, xet: bool) -> None:
        self.root, self.xet = root, xet
        self.url = self.cdn_url = ""
        self.tokens = {"hf_test": "tester"}
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects = Objects(root)
        self.faults: list[Fault] = []
        self.watches: list[Watch] = []
        self.log: list[Request] = []
        self.unrouted: list[str] = []
        """Requests that the server does not know."""
        self.errors: list[str] = []
        """Tracebacks of the server and of callbacks."""
        self.page_size = 1000
        self.multipart_over: int | None = None
        """LFS objects of more bytes are uploaded in parts; None: none are."""
        self.part_size = 5 << 20
        self.cdn_signature = 1
        self.in_flight = 0
        self.idle = threading.Condition(self.lock)

    # what tests do without a client

    def create_repo(self, repo_id: str, *, private: bool = False) -> Repo:
        """Make an empty repository."""
        with self.lock:
            assert repo_id not in self.repos, repo_id
            repo = self.repos[repo_id] = Repo(self.root / "repos" / repo_id, repo_id, private=private)
            return repo

    def commit(self, repo_id: str, branch: str, files: Mapping[str, bytes | None], title: str) -> str:
        """Commit files (None deletes one) to a branch; returns the commit's name."""
        with self.lock:
            repo = self.repos[repo_id]
            tree = dict(repo.commits[repo.branches[branch]].tree)
            for path, data in files.items():
                if data is None:
                    del tree[path]
                elif is_large(path, len(data), data[:512]):
                    tree[path] = self.large_entry(self.objects.add(data), len(data))
                else:
                    tree[path] = repo.add_blob(data)
            return repo.commit(branch, tree, title)

    def files(self, repo_id: str, revision: str) -> dict[str, str]:
        """Every path at a revision with its SHA-256, or with git's SHA-1 where the file is kept in git."""
        return {
            path: entry.sha256 or entry.oid for path, entry in sorted(self.repos[repo_id].at(revision).tree.items())
        }

    def read(self, repo_id: str, revision: str, path: str) -> bytes:
        """The bytes of a file at a revision."""
        repo = self.repos[repo_id]
        return self.file_of(repo, repo.at(revision).tree[path]).read_bytes()

    def history(self, repo_id: str, branch: str) -> list[Commit]:
        """The commits of a branch, newest first."""
        return self.repos[repo_id].history(branch)

    def on(self, match: str, callback: Callable[[], object], *, method: str | None = None) -> None:
        """Call `callback` once, in the server's thread, before the next request whose address matches is handled."""
        with self.lock:
            self.watches.append(Watch(match, method, callback))

    def expire_cdn(self) -> None:
        """Make every address of file content that was handed out until now answer 403."""
        with self.lock:
            self.cdn_signature += 1

    def set_faults(self, *faults: Mapping[str, Any]) -> None:
        """Replace the faults; an unknown field is an error."""
        with self.lock:
            self.faults[:] = [msgspec.convert(fault, Fault) for fault in faults]

    def take_log(self, *, clear: bool) -> list[Request]:
        """The requests so far, once none is being answered."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.in_flight == 0, QUIET_SECONDS), f"{self.in_flight} requests hang"
            log = sorted(self.log, key=lambda request: request.started)
            if clear:
                self.log.clear()
            return log

    # what the server asks

    def large_entry(self, sha256: str, size: int) -> Entry:
        """A large file as a commit holds it."""
        pointer = git_blob_oid(lfs_pointer(sha256, size))
        return Entry(pointer, size, sha256, self.objects.xet_by_sha256.get(sha256))

    def file_of(self, repo: Repo, entry: Entry) -> Path:
        """Where the bytes of an entry lie."""
        return repo.root / entry.oid if entry.sha256 is None else self.objects.lfs / entry.sha256

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request, counted down."""
        with self.lock:
            for fault in self.faults:
                if not fault.times or fault.method not in (None, method) or not re.search(fault.match, path):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def call_watches(self, method: str, path: str) -> None:
        """Call, once, what tests want called before this request."""
        with self.lock:
            due = [w for w in self.watches if w.method in (None, method) and re.search(w.match, path)]
            self.watches = [w for w in self.watches if w not in due]
        for watch in due:
            watch.callback()
