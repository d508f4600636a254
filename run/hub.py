"""One file from the network, whole or not at all, and the Hugging Face cache on top of it."""
import contextlib
import fcntl
import hashlib
import os
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit

TIMEOUT = 15  # seconds of silence that end a try


class NotThere(ValueError):
    """The server has no such file, or offline the cache has none: another name may be tried."""


def sha256_of(*paths: Path) -> str:
    """Return the hex sha256 of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 18):
                digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(folder: Path):
    """Let one process at a time fill `folder`. The others wait here."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that fills {folder}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def hub_file(repo: str, filename: str, revision: str = "main", sha256: str | None = None) -> Path:
    """Return a file of a Hugging Face repository from huggingface_hub's cache, or download it."""
    env = os.environ.get
    home = env("HF_HOME") or (env("XDG_CACHE_HOME") or "~/.cache") + "/huggingface"
    hub = Path(env("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    for name in (repo.rpartition("/")[2], repo):  # google-t5/t5-small was once t5-small
        cache = hub / f"models--{name.replace('/', '--')}"
        ref = cache / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else revision
        path = cache / "snapshots" / commit / filename
        if path.is_file():
            return path
    if env("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise NotThere(f"{repo}/{filename} is not in {cache} and HF_HUB_OFFLINE is set: unset it")
    endpoint = (env("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repo}/resolve/{quote(commit, safe='')}/{quote(filename)}"
    token = {"Authorization": f"Bearer {env('HF_TOKEN')}"} if env("HF_TOKEN") else {}
    with lock(cache / "blobs"):
        if path.is_file():
            return path
        arrived = cache / "blobs" / filename
        found = download(url, arrived, sha256, token)
        if found and found.isalnum() and found != commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(found)
            path = cache / "snapshots" / found / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        return arrived.replace(path)


def download(url: str, path: Path, sha256: str | None = None, headers: dict | None = None,
             tries: int = 3) -> str | None:
    """Bring `url` to `path`, which appears only when every byte is there and `sha256` is right.

    A download that is cut, or silent for TIMEOUT seconds, starts again. Return the hub's commit.
    Raise NotThere on a 404, otherwise ValueError, each one line with the url.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "lst", **(headers or {})})
    partial, redirects = path.with_name(path.name + ".partial"), _Redirects()
    opener, digest, done = urllib.request.build_opener(redirects), hashlib.sha256(), 0
    every, end = (1 << 20, "\r") if sys.stderr.isatty() else (100 << 20, "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opener.open(request, timeout=TIMEOUT) as reply, open(partial, "wb") as file:
            if reply.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} gave a web page, not a file; log in to the network?")
            total = int(reply.headers.get("Content-Length") or 0)
            while chunk := reply.read1(1 << 18):
                digest.update(chunk)
                done += file.write(chunk)
                if done % every < len(chunk) or done == total > every:
                    print(f"{path.name[-40:]}: {done >> 20} of {total >> 20} MiB",
                          end="\n" if done == total else end, file=sys.stderr, flush=True)
        if total not in (0, done):
            raise ConnectionError(f"the connection was cut after {done} of {total} bytes")
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"{url} has sha256 {digest.hexdigest()}, not {sha256}; try again")
        partial.replace(path)
        return redirects.commit or reply.headers.get("X-Repo-Commit")
    except (OSError, HTTPException) as error:
        if tries > 1 and isinstance(error, (ConnectionError, TimeoutError, HTTPException)):
            return download(url, path, sha256, headers, tries - 1)
        reason = " ".join(str(error).split())  # a circle of redirects is told in several lines
        kind = NotThere if getattr(error, "code", None) == 404 else ValueError
        raise kind(f"{url} could not be downloaded ({reason}): check address, network and "
                   "HF_TOKEN, then try again") from error
    finally:
        partial.unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Show the token to no other host, and keep the commit that the first one names."""

    commit = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.commit = self.commit or headers.get("X-Repo-Commit")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:  # scheme, host, port
            request.remove_header("Authorization")
        return request
