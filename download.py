"""One file from the network, whole or not at all, and the Hugging Face cache on top of it. Standard library only."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import queue
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

CHUNK = 1 << 18  # bytes


class NotThere(ValueError):
    """The server answers, but does not have the file (404), or offline the cache does not: a caller may try another name."""


def sha256_of(*paths: Path) -> str:
    """The hex sha256 of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Several runs may start on a fresh machine: the first to come here downloads into `folder`, the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks; then a hash still catches a mix
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that fills {folder}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(url: str, path: Path, sha256: str | None = None, size: int | None = None, headers: dict[str, str] | None = None,
             timeout: float = 15, progress: bool = True) -> Path:
    """Brings `url` to `path`, which appears only when every byte is there and `sha256` and `size`, where given, are right.

    Until then the bytes are in `<path>.partial`. A cut download continues there if `sha256` is given: only a hash can tell that
    both halves belong to the same file. Raises NotThere on a 404, otherwise ValueError, each one line with the url.
    `timeout` is for silence: a server that keeps sending is waited for, however slow, and `progress` tells how long.
    """
    _fetch(url, Path(path), sha256, size, headers, timeout, progress)
    return Path(path)


def hub_file(repo: str, filename: str, revision: str = "main", sha256: str | None = None) -> Path:
    """Path of one file of a Hugging Face repository, from the cache or downloaded into it; errors as `download`.

    Layout: models--{org}--{name}/{refs/<revision>, snapshots/<commit>/<file>}, where huggingface_hub looks too.
    HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and XDG_CACHE_HOME mean what they mean there.
    `sha256` is for downloads only.
    """
    home = os.environ.get("HF_HOME") or (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/huggingface"
    hub = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub"))
    for name in (repo.rpartition("/")[2], repo):  # google-t5/t5-small was t5-small, and programs may still call it so
        cache = hub / f"models--{name.replace('/', '--')}"
        ref = cache / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else revision
        path = cache / "snapshots" / commit / filename
        if path.is_file():
            return path
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise NotThere(f"{repo}/{filename} is not in {cache} and HF_HUB_OFFLINE is set; unset it or fill the cache")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(filename)}"
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}
    arrived = cache / "blobs" / f"{commit}-{filename}".replace("/", "--")  # the commit is known when the answer is
    try:
        with one_at_a_time(cache / "blobs"):
            if path.is_file():
                return path
            said = _fetch(url, arrived, sha256, headers=headers) or ""
            if re.fullmatch("[0-9a-f]{40}", said) and said != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(said)
                path = cache / "snapshots" / said / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived, path)
            return path
    except OSError as error:
        raise ValueError(f"{repo}/{filename} does not get into the cache ({error}); let HF_HOME be a writable folder") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Shows a token to no other host, and keeps the hub's X-Repo-Commit, which the file server behind the hub does not send."""

    commit = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.commit = self.commit or headers.get("X-Repo-Commit")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:  # scheme, host and port
            request.remove_header("Authorization")
        return request


def _open(opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """opener.open, given up after `timeout` seconds in all: a socket's timeout covers neither the look-up of the name
    nor several addresses tried in turn."""
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def work():
        try:
            answer.put(opener.open(request, timeout=timeout))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        reply = answer.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout:g} seconds") from None
    if isinstance(reply, Exception):
        raise reply
    return reply


def _fetch(url: str, path: Path, sha256: str | None = None, size: int | None = None, headers: dict[str, str] | None = None,
           timeout: float = 15, progress: bool = True) -> str | None:
    """`download`; returns the X-Repo-Commit of the answer."""
    partial = path.with_name(path.name + ".partial")
    redirects = _Redirects()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if sha256 and partial.is_file() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "ladder-side-tuning", **(headers or {})})
        if start:
            request.add_header("Range", f"bytes={start}-")
        with _open(urllib.request.build_opener(redirects), request, timeout) as reply:
            if reply.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} gave a web page instead of a file; log in to the network, or check the address, and try again")
            if not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                start = 0  # the server knows no Range and sends the whole file
            length = reply.headers.get("Content-Length")
            total = size if length is None else start + int(length)
            if size is not None and total != size:
                raise ValueError(f"{url} offers {total} bytes where {size} are expected; check the address")
            with open(partial, "r+b" if start else "wb") as file:
                file.seek(start)
                _copy(reply, file, path.name, total, progress)
                got = file.tell()
        if total is not None and got != total:
            raise OSError(f"the connection was cut after {got} of {total} bytes")
        if sha256 and (found := sha256_of(partial)) != sha256:
            partial.unlink()
            raise ValueError(f"{url} has sha256 {found} where {sha256} is expected; nothing was kept, try again or check the address")
        os.replace(partial, path)
    except HTTPError as error:
        if error.code == 416 and start:  # nothing comes after the partial file: it is whole, or too long
            if sha256_of(partial) == sha256:
                os.replace(partial, path)
                return redirects.commit or error.headers.get("X-Repo-Commit")
            partial.unlink()
            return _fetch(url, path, sha256, size, headers, timeout, progress)
        if error.code == 404:
            raise NotThere(f"{url} is not there (404); check the name") from error
        login = "check the address" if headers is None else "if it needs a login, set HF_TOKEN"  # the hub's files have headers
        hint = login if error.code in (401, 403) else "try again later"
        reason = " ".join(str(error.reason).split())  # a circle of redirects is told in several lines
        raise ValueError(f"{url} was refused ({error.code} {reason}); {hint}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        what = str(reason) or type(error).__name__
        raise ValueError(f"{url} could not be downloaded: {what}; check network and disk, try again") from error
    return redirects.commit or reply.headers.get("X-Repo-Commit")


def _copy(reply, file, name: str, total: int | None, progress: bool) -> None:
    """Reads to the end; says on stderr how far it is: a line that redraws itself on a terminal, else one every ten seconds."""
    terminal, first, began = sys.stderr.isatty(), file.tell(), time.monotonic()
    shown = began
    try:
        while chunk := reply.read1(CHUNK):  # read() would sit on what a slow server has sent, and lose it when the connection breaks
            file.write(chunk)
            now, done = time.monotonic(), file.tell()
            if progress and now - shown > (0.2 if terminal else 10):
                speed, shown = (done - first) / (now - began), now
                left = f" of {total / 1e6:.1f} MB, {(total - done) / speed:.0f} s left" if total else " MB"
                print(f"\r{name}: {done / 1e6:.1f}{left}  " if terminal else f"{name}: {done / 1e6:.1f}{left}",
                      end="" if terminal else "\n", file=sys.stderr, flush=True)
    finally:
        if terminal and shown > began:
            print(file=sys.stderr)
