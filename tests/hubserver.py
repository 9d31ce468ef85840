"""A Hugging Face Hub for tests, on the loopback interface only.

It speaks what huggingface_hub 2.4 and datasets 5.2 ask of dataset repositories: create, preupload, commit, LFS and Xet
uploads, refs, tags, branches, tree, paths, downloads by redirect and by range. Every request is logged, requests can
be made to fail, and a request it does not know is kept in `Hub.unrouted`. There are no pull requests, no gated
repositories and no git protocol.

    hubserver.py            this file: routes of the API, and `serve`
    hubserver_transfers.py  routes that carry content
    hubserver_request.py    one HTTP request: bodies, faults, log
    hubserver_state.py      Hub, Repo, Fault: what tests look at and change
    hubserver_objects.py    content: LFS objects, Xet xorbs and shards
"""

import base64
import json
import re
import sys
import threading
import traceback
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode

import yaml

from tests.hubserver_request import RequestHandler, route
from tests.hubserver_state import Entry, Hub, HubError, Repo, git_blob_oid, is_large, lfs_pointer
from tests.hubserver_transfers import TransferHandler

__all__ = ["Serving", "serve"]

LOOPBACK = "127.0.0.1"
ZERO_ID = "0" * 24
# how often a server looks whether it is to stop
POLL_SECONDS = 0.02


def directory(path: str) -> dict[str, Any]:
    """A folder as listings have it."""
    return {"type": "directory", "oid": git_blob_oid(path.encode()), "size": 0, "path": path}


class Handler(TransferHandler):
    """The requests of the Hub's API."""

    routes = [  # noqa: RUF012
        route("GET", r"/api/whoami-v2", "whoami"),
        route("GET", r"/api/agent-harnesses", "missing"),
        route("POST", r"/api/validate-yaml", "validate_yaml"),
        route("POST", r"/api/repos/create", "create_repo"),
        route("DELETE", r"/api/repos/delete", "delete_repo"),
        route("GET", r"/api/datasets/{repo}", "info"),
        route("GET", r"/api/datasets/{repo}/revision/{rev}", "info"),
        route("GET", r"/api/datasets/{repo}/refs", "refs"),
        route("GET", r"/api/datasets/{repo}/commits/{rev}", "commits"),
        route("GET", r"/api/datasets/{repo}/tree/{rev}(?:/(?P<path>.*))?", "tree"),
        route("POST", r"/api/datasets/{repo}/paths-info/{rev}", "paths_info"),
        route("POST", r"/api/datasets/{repo}/preupload/{rev}", "preupload"),
        route("POST", r"/api/datasets/{repo}/commit/{rev}", "commit"),
        route("POST", r"/api/datasets/{repo}/(?P<kind>tag|branch)/{rev}", "add_ref"),
        route("DELETE", r"/api/datasets/{repo}/(?P<kind>tag|branch)/{rev}", "delete_ref"),
        route("GET HEAD", r"/datasets/{repo}/resolve/{rev}/(?P<path>.+)", "resolve"),
        *TransferHandler.routes,
    ]

    # account and repositories

    def whoami(self) -> None:
        """The user of the token."""
        user = self.known_user()
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        organizations = [{"name": "org", "type": "org"}]
        self.send(
            200, {"type": "user", "id": ZERO_ID, "name": user, "fullname": user, "orgs": organizations, "auth": token}
        )

    def validate_yaml(self) -> None:
        """Whether the head of a card is a YAML mapping."""
        errors = []
        head = re.match(r"---\r?\n(.*?)\r?\n---", self.json_body()["content"], re.S)
        try:
            if head and not isinstance(yaml.safe_load(head[1]) or {}, dict):
                errors.append({"message": "metadata must be a mapping"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def named_repo(self, body: dict[str, Any]) -> str:
        """The id of the repository that a request names in its body."""
        user = self.known_user()
        owner = body.get("organization") or user
        if owner not in (user, "org"):
            raise HubError(403, None, "You don't have the rights to create a dataset under this namespace")
        return f"{owner}/{body['name']}"

    def create_repo(self) -> None:
        """A new repository; 409 with the same answer if it exists."""
        body = self.json_body()
        repo_id = self.named_repo(body)
        answer = {"url": f"{self.base}/datasets/{repo_id}", "name": repo_id, "id": ZERO_ID}
        with self.hub.lock:
            exists = repo_id in self.hub.repos
            if not exists:
                self.hub.create_repo(repo_id, private=body.get("visibility") == "private")
        if exists:
            return self.send(409, {"error": "You already created this dataset repo", **answer})
        return self.send(200, answer)

    def delete_repo(self) -> None:
        """No repository any more."""
        repo_id = self.named_repo(self.json_body())
        self.repo(repo_id, write=True)
        del self.hub.repos[repo_id]
        self.send(200, {})

    # reading

    def describe(self, path: str, entry: Entry) -> dict[str, Any]:
        """A file as listings have it."""
        answer: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
        if entry.sha256 is not None:
            pointer = len(lfs_pointer(entry.sha256, entry.size))
            answer["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer}
            if self.hub.xet and entry.xet:
                answer["xetHash"] = entry.xet
        return answer

    def info(self, repo_id: str, rev: str = "main") -> None:
        """A repository at a revision."""
        repo = self.repo(repo_id)
        commit, siblings = repo.at(rev), []
        for path, entry in sorted(commit.tree.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if self.query.get("blobs"):
                sibling |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256 is not None:
                    pointer = len(lfs_pointer(entry.sha256, entry.size))
                    sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer}
            siblings.append(sibling)
        dates = {"lastModified": commit.date, "createdAt": repo.history("main")[-1].date}
        counts = {"downloads": 0, "likes": 0, "usedStorage": 0}
        flags = {"private": repo.private, "gated": False, "disabled": False, "tags": []}
        names = {"_id": ZERO_ID, "id": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid}
        self.send(200, {**names, **dates, **flags, **counts, "siblings": siblings})

    def refs(self, repo_id: str) -> None:
        """Branches and tags."""
        repo = self.repo(repo_id)
        with self.hub.lock:
            tables = {"branches": ("heads", dict(repo.branches)), "tags": ("tags", dict(repo.tags))}
        answer: dict[str, list] = {
            kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in table.items()]
            for kind, (folder, table) in tables.items()
        }
        self.send(200, {**answer, "converts": []})

    def commits(self, repo_id: str, rev: str) -> None:
        """The history of a revision, newest first."""
        self.send(
            200,
            [
                {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": "tester"}]}
                for c in self.repo(repo_id).history(rev)
            ],
        )

    def listing(self, tree: dict[str, Entry], path: str, *, recursive: bool) -> dict[str, dict[str, Any]]:
        """Files and folders under a path, or the file at it."""
        items = {path: self.describe(path, tree[path])} if path in tree else {}
        prefix = f"{path}/" if path else ""
        for name, entry in tree.items():
            if not name.startswith(prefix):
                continue
            parents = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                folder = prefix + "/".join(parents[:depth])
                items.setdefault(folder, directory(folder))
            if recursive or not parents:
                items[name] = self.describe(name, entry)
        return items

    def asks(self, name: str) -> bool:
        """Whether the query says yes to an option."""
        return self.query.get(name, "").lower() in ("1", "true")

    def tree(self, repo_id: str, rev: str, path: str = "") -> None:
        """A page of a listing; the `Link` header leads to the next."""
        commit, path = self.repo(repo_id).at(rev), path.strip("/")
        items = self.listing(commit.tree, path, recursive=self.asks("recursive"))
        if path and not items:
            raise HubError(404, "EntryNotFound", f'{path} does not exist on "{rev}"')
        names = sorted(items)
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        page = [items[name] for name in names[start:stop]]
        if self.asks("expand"):
            for item in page:
                item["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
        headers = {}
        if stop < len(names):
            query = urlencode({**self.query, "cursor": stop})
            headers["Link"] = f'<{self.base}{self.address}?{query}>; rel="next"'
        self.send(200, page, headers)

    def paths_info(self, repo_id: str, rev: str) -> None:
        """The entries at some paths; those that do not exist are left out."""
        tree, answer = self.repo(repo_id).at(rev).tree, []
        for path in parse_qs(self.body().decode()).get("paths", []):
            if path in tree:
                answer.append(self.describe(path, tree[path]))
            elif any(name.startswith(f"{path.rstrip('/')}/") for name in tree):
                answer.append(directory(path))
        self.send(200, answer)

    def resolve(self, repo_id: str, rev: str, path: str) -> None:
        """A file: itself if it is kept in git, else a redirect to the CDN, on another origin as on the real Hub."""
        repo = self.repo(repo_id)
        commit = repo.at(rev)
        headers, entry = {"X-Repo-Commit": commit.oid}, commit.tree.get(path)
        if entry is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, {"error": "Entry not found"}, {**headers, **missing})
        if entry.sha256 is None:
            return self.send_file(self.hub.file_of(repo, entry), {**headers, "ETag": f'"{entry.oid}"'})
        headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size), "ETag": f'"{entry.sha256}"'}
        headers["Location"] = f"{self.hub.cdn_url}/_cdn/{entry.sha256}?sig={self.hub.cdn_signature}"
        if self.hub.xet and entry.xet:
            headers["X-Xet-Hash"] = entry.xet
            headers["X-Xet-Refresh-Route"] = f"{self.base}/api/datasets/{repo_id}/xet-read-token/{commit.oid}"
        return self.send(302, None, headers)

    # writing

    def preupload(self, repo_id: str, rev: str) -> None:
        """How each file is to be uploaded, and what is at its path now."""
        tree, answer = self.repo(repo_id, write=True).at(rev).tree, []
        for file in self.json_body()["files"]:
            path, entry = file["path"], tree.get(file["path"])
            mode = "lfs" if is_large(path, file["size"], base64.b64decode(file["sample"])) else "regular"
            present = {"oid": entry.sha256 or entry.oid} if entry else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **present})
        self.send(200, {"files": answer})

    def commit(self, repo_id: str, rev: str) -> None:
        """A commit on a branch; 412 if the client saw an older head than the branch has."""
        repo = self.repo(repo_id, write=True)
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            if rev not in repo.branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            parent = head.get("parentCommit")
            if parent and not repo.branches[rev].startswith(parent):
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            tree = dict(repo.at(rev).tree)
            for line in lines:
                self.apply(repo, tree, line["key"], line["value"])
            oid = repo.commit(rev, tree, head["summary"], head.get("description") or "")
        url = f"{self.base}/datasets/{repo_id}/commit/{oid}"
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def apply(self, repo: Repo, tree: dict[str, Entry], kind: str, value: dict[str, Any]) -> None:
        """Change `tree` by one line of a commit."""
        path = value.get("path", "")
        if kind == "file":
            tree[path] = repo.add_blob(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            # copies come without a size
            size = self.require_object(value["oid"], value.get("size"))
            tree[path] = self.hub.large_entry(value["oid"], size)
        elif kind == "deletedFile":
            if tree.pop(path, None) is None:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif kind == "deletedFolder":
            for name in [name for name in tree if name.startswith(f"{path.rstrip('/')}/")]:
                del tree[name]
        elif kind != "header":
            raise HubError(400, None, f"unknown operation {kind}")

    def add_ref(self, repo_id: str, kind: str, rev: str) -> None:
        """A tag on a revision, or a branch from one."""
        repo, body = self.repo(repo_id, write=True), self.json_body()
        with self.hub.lock:
            if kind == "tag":
                table, name, target = repo.tags, body["tag"], repo.resolve(rev)
            else:
                table, name, target = repo.branches, rev, repo.resolve(body.get("startingPoint") or "main")
            if name in table:
                raise HubError(409, None, f"{kind} {name} already exists")
            table[name] = target
        self.send(200, {})

    def delete_ref(self, repo_id: str, kind: str, rev: str) -> None:
        """No tag or branch of this name any more."""
        repo = self.repo(repo_id, write=True)
        table = repo.tags if kind == "tag" else repo.branches
        if table.pop(rev, None) is None:
            raise HubError(404, "RevisionNotFound", f"no such {kind}: {rev}")
        self.send(200, {})


class Server(ThreadingHTTPServer):
    """A server whose own errors are kept for the test to see."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, handler: type[RequestHandler]) -> None:
        super().__init__((LOOPBACK, 0), handler)
        self.hub = hub
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(POLL_SECONDS,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the traceback, unless the client just went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(traceback.format_exc())


class Serving(NamedTuple):
    """A running Hub."""

    hub: Hub
    servers: tuple[Server, ...]

    def close(self) -> None:
        """Stop listening."""
        for server in self.servers:
            server.shutdown()
            server.server_close()


def serve(root: Path, *, xet: bool) -> Serving:
    """Serve an empty Hub from a folder, on two free ports: its `url`, and `cdn_url` for large files.

    Clients follow redirects that stay on an origin even for HEAD and send the token along: the CDN must be another.
    """
    hub = Hub(root, xet=xet)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    api, cdn = Server(hub, handler), Server(hub, handler)
    hub.url, hub.cdn_url = api.url, cdn.url
    return Serving(hub, (api, cdn))
