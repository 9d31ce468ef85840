"""How content reaches the test Hub and leaves it: Git LFS, the Xet storage, and the CDN that downloads are sent to."""

import hashlib
import re
import threading
import time
from typing import Any

from tests.hubserver_objects import hash_file
from tests.hubserver_request import RequestHandler, route
from tests.hubserver_state import HubError

__all__ = ["TransferHandler"]


class TransferHandler(RequestHandler):
    """The requests that carry bytes."""

    routes = [  # noqa: RUF012
        route("POST", r"/datasets/{repo}\.git/info/lfs/objects/batch", "lfs_batch"),
        route("PUT", r"/_lfs/{hash}", "lfs_put"),
        route("POST", r"/_lfs/{hash}", "lfs_complete"),
        route("POST", r"/_lfs/verify", "lfs_verify"),
        route("GET HEAD", r"/_cdn/{hash}", "cdn"),
        route("GET", r"/api/datasets/{repo}/xet-(?P<kind>read|write)-token/{rev}", "xet_token"),
        route("POST", r"/_cas/v1/xorbs/default/{hash}", "xorb_put"),
        route("POST", r"/_cas/v1/shards", "shard_put"),
        route("GET", r"/_cas/v1/reconstructions/{hash}", "reconstruction"),
        route("GET", r"/_cas/xorb/{hash}", "xorb_get"),
        route("POST", r"/_cas/v1/telemetry", "sink"),
        # what the storage client tries first, and does without
        route("GET", r"/_cas/v1/chunks/.*", "missing"),
        route("GET POST", r"/_cas/v2/.*", "missing"),
        route("GET POST", r"/_cas/v1/xorb-grants/.*", "missing"),
    ]

    def require_object(self, sha256: str, size: int | None) -> int:
        """Bytes of an uploaded object, checked against its hash; an error if it is not there or is another."""
        stored = self.hub.objects.size(sha256)
        if stored is None or (size is not None and stored != size):
            raise HubError(400, None, f"LFS pointer pointed to a file that does not exist: {sha256}, {size} bytes")
        if not self.hub.objects.rebuild(sha256):
            raise HubError(422, None, f"the uploaded file does not hash to {sha256}")
        return stored

    def check_signature(self) -> None:
        """Refuse an address from before `expire_cdn`."""
        if self.query.get("sig") != str(self.hub.cdn_signature):
            raise HubError(403, None, "Request has expired")

    def cdn(self, name: str) -> None:
        """A large file."""
        self.check_signature()
        path = self.hub.objects.lfs / name
        if not path.exists():
            raise HubError(404, None, "gone")
        self.send_file(path, {"ETag": f'"{name}"'})

    # Git LFS

    def lfs_batch(self, repo_id: str) -> None:
        """Where to upload objects; none for those that are there."""
        self.repo(repo_id, write=True)
        batch, over = self.json_body(), self.hub.multipart_over
        answer = []
        for wanted in batch["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            item: dict[str, Any] = {"oid": oid, "size": size}
            if self.hub.objects.size(oid) != size:
                url = f"{self.base}/_lfs/{oid}"
                upload: dict[str, Any] = {"href": url}
                if over is not None and size > over:
                    num_parts = -(-size // self.hub.part_size)
                    parts = {f"{part:05d}": f"{url}?part={part}" for part in range(1, num_parts + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.base}/_lfs/verify"}}
            answer.append(item)
        transfer = "multipart" if over is not None and "multipart" in batch["transfers"] else "basic"
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self.send(200, {"transfer": transfer, "objects": answer}, headers)

    def lfs_put(self, name: str) -> None:
        """An object, or a part of one."""
        part = self.query.get("part")
        partial = self.hub.objects.lfs / f"{name}.{part or 'whole'}.{threading.get_ident()}"
        with partial.open("wb") as file:
            self.read_body(file.write)
        sha256 = hash_file(partial)
        if part:
            partial.rename(self.hub.objects.lfs / f"{name}.part{part}")
        elif sha256 == name:
            partial.rename(self.hub.objects.lfs / name)
        else:
            raise HubError(400, None, "sha256 mismatch")
        self.send(200, None, {"ETag": f'"{sha256[:32]}"'})

    def lfs_complete(self, name: str) -> None:
        """Put the parts of an object together."""
        folder, joined = self.hub.objects.lfs, hashlib.sha256()
        partial = folder / f"{name}.joined"
        with partial.open("wb") as file:
            for part in sorted(self.json_body()["parts"], key=lambda part: part["partNumber"]):
                data = (folder / f"{name}.part{part['partNumber']}").read_bytes()
                joined.update(data)
                file.write(data)
        if joined.hexdigest() != name:
            raise HubError(400, None, "sha256 mismatch")
        partial.rename(folder / name)
        self.send(200, {})

    def lfs_verify(self) -> None:
        """Whether an object has arrived."""
        wanted = self.json_body()
        self.require_object(wanted["oid"], wanted["size"])
        self.send(200, {})

    # Xet

    def xet_token(self, repo_id: str, kind: str, rev: str) -> None:
        """Address of the storage and a token for it: in the body for hf_xet, in headers for huggingface_hub."""
        self.repo(repo_id, write=kind == "write")
        if not self.hub.xet:
            raise HubError(404, None, "xet is disabled")
        expires, url = int(time.time()) + 3600, f"{self.hub.url}/_cas"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self.send(200, {"accessToken": "xet", "exp": expires, "casUrl": url}, headers)

    def xorb_put(self, name: str) -> None:
        """A xorb."""
        partial = self.hub.objects.cas / f"{name}.{threading.get_ident()}"
        with partial.open("wb") as file:
            self.read_body(file.write)
        is_new = not (self.hub.objects.cas / name).exists()
        partial.rename(self.hub.objects.cas / name)
        self.send(200, {"was_inserted": is_new})

    def shard_put(self) -> None:
        """What files are made of."""
        missing = self.hub.objects.add_shard(self.body())
        if missing:
            raise HubError(400, None, f"the shard needs xorbs that were not uploaded: {missing}")
        self.send(200, {"result": 1})

    def reconstruction(self, name: str) -> None:
        """Which chunks make the asked range of a file, and where they are."""
        terms = self.hub.objects.xet_files.get(name)
        if terms is None:
            raise HubError(404, None, "unknown file")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, 1 << 62)
        at, skip, answer, fetch = 0, 0, [], {}
        for xorb, size, start, end in terms:
            if at + size > first and at <= last:
                if not answer:
                    skip = first - at
                chunks, offsets = {"start": start, "end": end}, self.hub.objects.chunk_offsets(xorb)
                answer.append({"hash": xorb, "unpacked_length": size, "range": chunks})
                place = {
                    "range": chunks,
                    "url": f"{self.hub.cdn_url}/_cas/xorb/{xorb}?sig={self.hub.cdn_signature}",
                    "url_range": {"start": offsets[start], "end": offsets[end] - 1},
                }
                if place not in fetch.setdefault(xorb, []):
                    fetch[xorb].append(place)
            at += size
        if not answer:
            return self.send(416)
        return self.send(200, {"offset_into_first_range": skip, "terms": answer, "fetch_info": fetch})

    def xorb_get(self, name: str) -> None:
        """A range of a xorb."""
        self.check_signature()
        self.send_file(self.hub.objects.cas / name, {})
