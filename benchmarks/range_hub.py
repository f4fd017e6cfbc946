"""A Hub on 127.0.0.1 that answers ranges, as huggingface.co does: for tests and benchmarks.

A request for a large file is redirected to a store on another port, by a signed link that may
expire; the store answers ranges (206), and knows no token. Files may be made as they are read, so
that a model of any size is served without being on a disk. Faults are answered on demand.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 20  # bytes written at a time


class Served:
    """A file: its bytes, or a function that makes them.

    Args:
        data: all of them; or ``read(start, stop)``, with ``size`` and ``etag``.
    """

    def __init__(
        self, data: bytes | Callable[[int, int], bytes], size: int = 0, etag: str = ""
    ) -> None:
        if isinstance(data, bytes):
            self.size, self.etag = len(data), etag or hashlib.sha256(data).hexdigest()
            self.read: Callable[[int, int], bytes] = lambda start, stop: data[start:stop]
        else:
            self.size, self.etag, self.read = size, etag, data


class RangeHub:
    """Repositories, their store, and what was asked of it.

    Attributes:
        repositories: name → file name → file.
        token: that the Hub wants; ``""``: none.
        lasts: requests that a signed link is good for; 0: any number.
        faults: of the next requests to the store, one each: ``truncated`` (a third of the bytes,
            then the end), ``reset``, ``whole`` (no ranges), ``other`` (another range), a status;
            ``""`` for none. The last one stays if ``always``.
        ranges: file, start and stop of each request to the store that was answered, in order.
        refused: statuses that the store answered.
        leaked: whether the store was sent a token.
        on_range: is called before each answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Served]] = {}
        self.token, self.lasts, self.always = "", 0, False
        self.faults: list[str | int] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.refused: list[int] = []
        self.heads: list[str] = []
        self.leaked = False
        self.on_range: Callable[[], None] = lambda: None
        self.lock = threading.Lock()
        self._links: dict[str, int] = {}
        self.hub, self.store = Server(self.answer), Server(self.answer_range)
        self.endpoint = f"http://127.0.0.1:{self.hub.server_port}"

    def add(self, name: str, folder: Path) -> None:
        """A repository of the files in a folder."""
        self.repositories[name] = {f.name: Served(f.read_bytes()) for f in folder.iterdir()}

    @property
    def fetched(self) -> int:
        """Bytes of all ranges."""
        return sum(stop - start for _, start, stop in self.ranges)

    def close(self) -> None:
        """Stop both servers."""
        for server in (self.hub, self.store):
            server.shutdown()
            server.server_close()

    # --- the Hub -----------------------------------------------------------------------------

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path).path.lstrip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, repository, verb, revision, *rest = [*(parts[2:] if api else parts), "", "", ""]
        name, file = f"{owner}/{repository}", "/".join(part for part in rest if part)
        files = self.repositories.get(name)
        if files is None:
            return send(request, 404, {"X-Error-Code": "RepoNotFound"})
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return send(request, 401, {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT, ""):
            return send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        if api and verb == "tree":  # which huggingface_hub 2 asks for
            rows = [
                {"type": "file", "path": file, "size": one.size, "oid": one.etag[:40]}
                for file, one in files.items()
            ]
            return send(request, 200, {}, json.dumps(rows).encode())
        if api:
            siblings = [{"rfilename": file} for file in files]
            body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            return send(request, 200, {}, json.dumps(body).encode())
        if verb != "resolve" or file not in files:
            return send(request, 404, {"X-Error-Code": "EntryNotFound"})
        one = files[file]
        headers = {"ETag": f'"{one.etag}"', "X-Repo-Commit": COMMIT}
        if not file.endswith(".safetensors"):
            return send(request, 200, headers, one.read(0, one.size))
        with self.lock:
            self.heads.append(file)
            signature = f"secret-{len(self._links)}"
            self._links[signature] = self.lasts
        headers["Location"] = (
            f"http://127.0.0.1:{self.store.server_port}/{name}/{file}?X-Amz-Signature={signature}"
        )
        headers |= {"X-Linked-Size": str(one.size), "X-Linked-ETag": f'"{one.etag}"'}
        return send(request, 302, headers)

    # --- its store ---------------------------------------------------------------------------

    def answer_range(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        owner, repository, file = parts.path.strip("/").split("/")
        signature = parse_qs(parts.query).get("X-Amz-Signature", [""])[0]
        one = self.repositories[f"{owner}/{repository}"].get(file)
        if one is None:
            self.refused.append(404)
            return send(request, 404, {})
        with self.lock:
            self.leaked |= "Authorization" in request.headers
            left = self._links.get(signature, -1)
            expired = left < 0 or (self.lasts > 0 and left == 0)
            if not expired:
                self._links[signature] = left - 1 if self.lasts else left
            fault = self.faults[0] if self.faults else ""
            if self.faults and not self.always and not expired:
                self.faults.pop(0)
        if expired or isinstance(fault, int):
            self.refused.append(403 if expired else int(fault))
            return send(request, self.refused[-1], {})
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if found is None or fault == "whole":
            return stream(request, 200, {"ETag": '"s"'}, one, 0, one.size)
        start, stop = int(found[1]), min(int(found[2]) + 1, one.size)
        if start >= one.size:
            self.refused.append(416)
            return send(request, 416, {"Content-Range": f"bytes */{one.size}"})
        if fault == "reset":
            return None  # without an answer
        with self.lock:
            self.ranges.append((file, start, stop))
            self.on_range()
        shown = start + 1 if fault == "other" else start
        headers = {
            "Content-Range": f"bytes {shown}-{stop - 1}/{one.size}",
            "ETag": f'"store-{one.etag[:8]}"',
        }
        end = start + (stop - start) // 3 if fault == "truncated" else stop
        return stream(request, 206, headers, one, start, stop, end)


class Server(ThreadingHTTPServer):
    """Answers HEAD and GET by a function, a thread for each connection."""

    daemon_threads = True

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                answer(self)

            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that closed its connection is none."""


def send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b""
) -> None:
    """A whole answer."""
    stream(request, status, headers, Served(body), 0, len(body))


def stream(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    file: Served,
    start: int,
    stop: int,
    end: int | None = None,
) -> None:
    """An answer of the bytes ``start:stop`` of a file; the connection ends at ``end``."""
    request.send_response(status)
    for key, value in (headers | {"Content-Length": str(stop - start)}).items():
        request.send_header(key, value)
    request.end_headers()
    if request.command == "GET":
        for begin, after in pieces(start, stop if end is None else end):
            request.wfile.write(file.read(begin, after))


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """``start:stop`` in pieces."""
    for begin in range(start, stop, PIECE):
        yield begin, min(begin + PIECE, stop)
