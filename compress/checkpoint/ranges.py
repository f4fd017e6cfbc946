"""Files on servers, read by byte ranges: of the Hub by HTTP, of other stores by fsspec.

A broken transfer goes on where it broke off. A file whose version, or length, is not that of its
opening is refused, so that no artifact is made of two versions. The Hub answers a request for a
large file with a signed link to its store, which expires: the link is kept, used without the
token, renewed when the store refuses it, and never printed.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlsplit

from compress import __version__
from compress.checkpoint.hub import failure
from compress.checkpoint.remote import version_tag
from compress.errors import CheckpointError, PacklightError, one_line

__all__ = ["HubFile", "Interrupted", "RemoteFile", "StoreFile", "Traffic"]

TRIES = 7  # in a row without a byte; the pauses between them add up to half a minute
PAUSE = 1.0  # seconds before the third try, doubled before each further one; none before the second
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20  # bytes in memory at a time, of an HTTP transfer

Sink = Callable[[int, bytes], None]
"""``sink(offset, data)`` takes the bytes at an offset of the file, in order."""


class Interrupted(OSError):
    """A transfer that failed, and may succeed when it is tried again."""


class Traffic:
    """What was transferred, of all files of a checkpoint.

    Attributes:
        bytes: received, those of broken transfers included.
        requests: for ranges of bytes.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.requests = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int = 0, requests: int = 0) -> None:
        """Count; by any thread."""
        with self._lock:
            self.bytes += nbytes
            self.requests += requests


class RemoteFile:
    """A file on a server.

    Attributes:
        name: without a folder.
        source: the checkpoint, for messages; without secrets.
        size: in bytes.
        tag: its version: ETag or checksum; where a store has none, size and time.
        sha256: as the server states it, or ``""``.
        traffic: of all files of the checkpoint.
    """

    size: int
    tag: str

    def __init__(self, name: str, source: str, traffic: Traffic, pause: float = PAUSE) -> None:
        self.name, self.source, self.traffic = name, source, traffic
        self._pause = pause

    @property
    def sha256(self) -> str:
        """The tag where it is a SHA-256, as that of the Hub's large files."""
        return self.tag if re.fullmatch("[0-9a-f]{64}", self.tag) else ""

    def read(self, start: int, stop: int, sink: Sink) -> None:
        """Pass the bytes ``start:stop`` to a sink.

        Raises:
            CheckpointError: they cannot be had, after some tries; or the file has changed.
        """
        tries = 0
        while start < stop:
            self.traffic.add(requests=1)
            before = start
            try:
                for data in self._transfer(start, stop):
                    self.traffic.add(len(data))
                    sink(start, data)
                    start += len(data)
                if start < stop:
                    raise Interrupted(f"the connection broke off {stop - start:,} bytes too early")
            except Interrupted as error:
                tries = 0 if start > before else tries + 1
                if tries == TRIES:
                    raise CheckpointError(
                        f"cannot fetch {self.name} of {self.source}: {error}",
                        hint="try again; a build with --resume keeps what it has written",
                    ) from error
                time.sleep(self._pause * 2 ** (tries - 2) if tries > 1 else 0)

    def _transfer(self, start: int, stop: int) -> Iterator[bytes]:
        """One request for a range; may end early.

        Raises:
            Interrupted: it failed, and may be tried again.
            CheckpointError: trying again is no use.
        """
        raise NotImplementedError

    def changed(self, what: str) -> NoReturn:
        """Refuse a file that is not that of its opening.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{self.name} of {self.source} has changed since it was opened ({what}): nobody can "
            "say what this is made of",
            hint="begin again, once nothing writes to it",
        )

    def without_ranges(self) -> NoReturn:
        """Refuse a server that sends whole files only.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"the server of {self.source} does not send parts of {self.name}, only the whole file",
            hint="--fetch download, on a disk that holds the checkpoint",
        )


class HubFile(RemoteFile):
    """A file of a Hub repository at a commit.

    Args:
        repo_id: of the repository.
        url: of the file at a commit (``huggingface_hub.hf_hub_url``).
        token: Hub token; None: ``HF_TOKEN`` or the stored login.

    Raises:
        FileNotFoundError: the repository has no such file.
        CheckpointError: the Hub refuses it, or cannot be reached.
    """

    def __init__(
        self, name: str, repo_id: str, url: str, token: str | None, traffic: Traffic,
        pause: float = PAUSE,
    ) -> None:  # fmt: skip
        super().__init__(name, repo_id, traffic, pause)
        self._url, self._token = url, token
        self._lock = threading.Lock()
        self._link, self._link_tag = self._resolve()

    def _resolve(self) -> tuple[str, str]:
        """The link to the bytes, signed where they are in another store, and no tag of it yet.

        The first call sets ``size`` and ``tag``, later ones compare them.
        """
        from huggingface_hub import errors, get_hf_file_metadata

        known = hasattr(self, "tag")
        try:
            found = get_hf_file_metadata(self._url, token=self._token)
        except errors.EntryNotFoundError:
            if known:
                self.changed("it is gone")
            raise FileNotFoundError(self.name) from None
        except Exception as error:  # huggingface_hub's client is requests, or httpx
            if known and not isinstance(error, errors.RepositoryNotFoundError):
                raise Interrupted(one_line(error)) from None
            raise failure(self.source, error, None) from error
        if found.size is None or not found.etag:
            raise CheckpointError(
                f"the Hub does not say how long {self.name} of {self.source} is",
                hint="--fetch download",
            )
        if not known:
            self.size, self.tag = found.size, found.etag
        if found.size != self.size:
            self.changed(f"{self.size:,} bytes, now {found.size:,}")
        if found.etag != self.tag:
            self.changed("another version")
        return found.location, ""

    def _renew(self, link: str) -> None:
        """Replace a link that the store has refused, unless another thread has done so."""
        with self._lock:
            if self._link == link:
                self._link, self._link_tag = self._resolve()

    @cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        """Opens links; certificates are those that huggingface_hub's own client uses."""
        import ssl

        import certifi

        chosen = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        context = ssl.create_default_context(cafile=chosen or certifi.where())
        return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))

    def _request(self, link: str, start: int, stop: int) -> urllib.request.Request:
        """A request for a range; with the token only where the Hub itself has the bytes."""
        from huggingface_hub import get_token

        request = urllib.request.Request(link, headers={"User-Agent": f"packlight/{__version__}"})
        token = self._token or get_token()
        if token and urlsplit(link).netloc == urlsplit(self._url).netloc:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        request.add_header("Range", f"bytes={start}-{stop - 1}")
        request.add_header("Accept-Encoding", "identity")
        return request

    def _transfer(self, start: int, stop: int) -> Iterator[bytes]:
        link = self._link
        try:
            with self._opener.open(self._request(link, start, stop), timeout=TIMEOUT) as answer:
                self._check(answer, start, stop)
                while start < stop and (data := answer.read(min(CHUNK, stop - start))):
                    start += len(data)
                    yield data
        except urllib.error.HTTPError as error:
            self._refused(error, link)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split())[:200]
            raise Interrupted(reason or type(error).__name__) from None

    def _check(self, answer: Any, start: int, stop: int) -> None:
        """Refuse an answer that is not the range of the file that was opened."""
        if answer.status != 206:
            self.without_ranges()
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if found is None or (int(found[1]), int(found[2])) != (start, stop - 1):
            raise CheckpointError(
                f"the server of {self.source} sent other bytes of {self.name} than asked for",
                hint="--fetch download",
            )
        if int(found[3]) != self.size:
            self.changed(f"{self.size:,} bytes, now {int(found[3]):,}")
        tag = answer.headers.get("ETag", "").removeprefix("W/").strip('"')
        with self._lock:  # a store's tag is another one than the Hub's, but stays the same
            if self._link_tag and tag and tag != self._link_tag:
                self.changed("another version")
            self._link_tag = self._link_tag or tag

    def _refused(self, error: urllib.error.HTTPError, link: str) -> NoReturn:
        """Raise for an answer with an error's status; a link that has expired is renewed."""
        code = error.code
        if code in (401, 403):
            self._renew(link)
            raise Interrupted(f"the store refuses the link to it (HTTP {code})") from None
        if code == 416:
            self.changed("it is shorter now")
        if code in (404, 410):
            self.changed("it is gone")
        if code in (408, 425, 429) or code >= 500:
            raise Interrupted(f"the server answers HTTP {code}") from None
        raise CheckpointError(f"cannot fetch {self.name} of {self.source}: HTTP {code}") from None


class StoreFile(RemoteFile):
    """A file of a store that fsspec reads.

    Args:
        fs: the file system.
        path: of the file in it.

    Raises:
        OSError: it is not there, or cannot be read.
    """

    def __init__(
        self, name: str, source: str, fs: Any, path: str, traffic: Traffic, pause: float = PAUSE
    ) -> None:
        super().__init__(name, source, traffic, pause)
        self._fs, self._path = fs, path
        self.size, self.tag = self._facts()

    def _facts(self) -> tuple[int, str]:
        """The store's current size and version of it, not cached ones."""
        self._fs.invalidate_cache()
        row = self._fs.info(self._path)
        if row.get("size") is None:
            self.without_ranges()
        return int(row["size"]), version_tag(row)

    def _transfer(self, start: int, stop: int) -> Iterator[bytes]:
        try:
            data = bytes(self._fs.cat_file(self._path, start=start, end=stop))
            size, tag = self._facts()
        except FileNotFoundError:
            self.changed("it is gone")
        except (ValueError, NotImplementedError):  # fsspec's HTTP file system, without ranges
            self.without_ranges()
        except PacklightError:
            raise
        except Exception as error:  # clients of stores have exceptions of their own
            raise Interrupted(one_line(error)) from None
        if size != self.size:
            self.changed(f"{self.size:,} bytes, now {size:,}")
        if tag != self.tag:
            self.changed("another version")
        if len(data) > stop - start:
            self.without_ranges()
        yield data
