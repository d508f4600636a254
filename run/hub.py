"""One file from the network, whole or not at all, and the Hugging Face cache on top of it."""
import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

from run.folder import atomic_write, lock
from run.report import Progress

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
    with lock(cache / "blobs"):
        if path.is_file():
            return path
        arrived = cache / "blobs" / filename
        # only small files come with the revision's commit: config.json is asked for before weights
        commit = download(url, arrived, sha256, env("HF_TOKEN")) or commit
        if commit != revision:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
        path = cache / "snapshots" / commit / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        return arrived.replace(path)


def download(url: str, path: Path, sha256: str | None = None, token: str | None = None,
             tries: int = 3) -> str | None:
    """Bring `url` to `path`, which appears only when every byte is there and `sha256` is right.

    A download that is cut, or silent for TIMEOUT seconds, starts again. Return the hub's commit.
    Raise NotThere on a 404, otherwise ValueError, each one line with the url.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "lst"})
    digest, done = hashlib.sha256(), 0
    if token:  # for this server, not for the one that it may redirect to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
        with reply, atomic_write(path) as partial:
            if reply.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} gave a web page, not a file; log in to the network?")
            total = int(reply.headers.get("Content-Length") or 0)
            progress = Progress(f"{path.name}, byte", total)
            with open(partial, "wb") as file:
                while chunk := reply.read1(1 << 18):
                    digest.update(chunk)
                    done += file.write(chunk)
                    if total:
                        progress.step(done)
            if total not in (0, done):
                raise ConnectionError(f"the connection was cut after {done} of {total} bytes")
            if sha256 not in (None, digest.hexdigest()):
                raise ValueError(f"{url} has sha256 {digest.hexdigest()}, not {sha256}; try again")
        return reply.headers.get("X-Repo-Commit")
    except (OSError, HTTPException) as error:
        if tries > 1 and isinstance(error, (ConnectionError, TimeoutError, HTTPException)):
            return download(url, path, sha256, token, tries - 1)
        reason = " ".join(str(error).split())  # a circle of redirects is told in several lines
        kind = NotThere if getattr(error, "code", None) == 404 else ValueError
        raise kind(f"{url} could not be downloaded ({reason}): check address, network and "
                   "HF_TOKEN, then try again") from error
