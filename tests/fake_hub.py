"""A local Hub on 127.0.0.1 with the endpoints that huggingface_hub calls to publish a folder.

Endpoints as the clients call them (hf_api.py, _commit_api.py and lfs.py of 0.36, 1.33 and 2.4), Git
LFS's batch API with basic transfers
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_for_this_test_only"
LARGE = 10_000_000  # bytes: from here on a file goes through LFS, as on the Hub
LFS_NAMES = (".gguf", ".bin", ".onnx_data")


@dataclass
class Repository:
    private: bool | None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


class Hub:
    """Repositories, large objects, and every request.

    Attributes:
        refusals: "METHOD /path prefix" → status of the response.
        requests: "METHOD /path" in their order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.refusals: dict[str, int] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with hub.lock:
                    status, document = hub.answer(self.command, self.path, self.headers, body)
                text = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def read(self) -> None:
                name, _, place = urlsplit(self.path).path.strip("/").partition("/resolve/")
                if not place:
                    return self.answer()
                with hub.lock:
                    hub.requests.append(f"{self.command} {self.path}")
                    files = hub.repositories[name].branches["main"]
                data = files.get(unquote(place).partition("/")[2])
                self.send_response(404 if data is None else 200)
                if data is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", "f" * 40)
                self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data or b"")

            do_GET = do_HEAD = read
            do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def puts(self) -> list[str]:
        return [request for request in self.requests if request.startswith("PUT")]

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> tuple[int, Any]:
        parts = urlsplit(url)
        request = f"{method} {parts.path}"
        self.requests.append(request)
        for prefix, status in self.refusals.items():
            if request.startswith(prefix):
                return status, {"error": "told to"}
        path = parts.path.strip("/").split("/")
        if path[0] == "lfs":  # signed links of a store, which need no token
            return self.store(path, body)
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}
        if path == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if path[:2] == ["api", "models"]:
            name = "/".join(path[2:4])
            if name not in self.repositories:
                return 404, {"error": "Repository not found"}
            verb, revision = path[4:6] or ("", "main")
            repository = self.repositories[name]
            if verb == "branch":
                there = revision in repository.branches
                repository.branches.setdefault(revision, dict(repository.branches["main"]))
                return (409 if there else 201), {}
            if revision == "f" * 40:
                revision = "main"
            if revision not in repository.branches:
                return 404, {"error": "Invalid rev id"}
            files = repository.branches[revision]
            if verb == "preupload":
                return 200, {"files": [self.mode(f, files) for f in json.loads(body)["files"]]}
            if verb == "commit":
                pull_request = parse_qs(parts.query).get("create_pr") == ["1"]
                return self.commit(name, repository, revision, body, pull_request)
            if verb == "tree":
                return 200, [
                    {"type": "file", "path": file, "size": len(data),
                     "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
                    for file, data in sorted(files.items())
                ]  # fmt: skip
            siblings = [{"rfilename": file} for file in sorted(repository.branches["main"])]
            return 200, {"id": name, "sha": "f" * 40, "siblings": siblings}
        if url.endswith(".git/info/lfs/objects/batch"):
            return 200, self.batch(json.loads(body))
        return 404, {"error": f"no {request} here"}

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        if wanted["organization"] == "stranger":
            return 403, {"error": "You don't have the rights"}
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        private = wanted.get("private")
        if "visibility" in wanted:  # of huggingface_hub 1 and 2
            private = wanted["visibility"] == "private"
        self.repositories[name] = Repository(private)
        return 200, {"url": url, "name": name}

    @staticmethod
    def mode(file: dict[str, Any], there: dict[str, bytes]) -> dict[str, Any]:
        large = file["size"] >= LARGE or file["path"].endswith(LFS_NAMES)
        old, oid = there.get(file["path"]), None
        if old is not None and large:
            oid = hashlib.sha256(old).hexdigest()
        elif old is not None:
            oid = hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest()
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256"
        objects = []
        for one in wanted["objects"]:
            if one["oid"] not in self.objects:
                link = {"href": f"{self.endpoint}/lfs/{one['oid']}"}
                check = {"href": f"{self.endpoint}/lfs/verify/{one['oid']}"}
                one = one | {"actions": {"upload": link, "verify": check}}
            objects.append(one)
        return {"transfer": "basic", "objects": objects}

    def store(self, path: list[str], body: bytes) -> tuple[int, Any]:
        if path[1] == "verify":
            wanted = json.loads(body)
            there = self.objects.get(wanted["oid"])
            return (200 if there is not None and len(there) == wanted["size"] else 404), {}
        assert hashlib.sha256(body).hexdigest() == path[1]
        self.objects[path[1]] = body
        return 200, {}

    def commit(
        self, name: str, repository: Repository, revision: str, body: bytes, pull_request: bool
    ) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines.pop(0)["value"]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return 400, {"error": "LFS pointer pointed to a file that does not exist"}
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "file" and value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
        number = len(repository.commits) + 1
        if pull_request:
            revision = f"refs/pr/{number}"
            repository.branches[revision] = dict(repository.branches["main"])
        repository.branches[revision] |= files
        repository.commits.append(header)
        oid = f"{number:040x}"
        url = f"{self.endpoint}/{name}"
        return 200, {
            "commitUrl": f"{url}/commit/{oid}",
            "commitOid": oid,
            "pullRequestUrl": f"{url}/discussions/{number}" if pull_request else None,
        }
