"""One file from the network, whole or not at all, and the Hugging Face cache on top of it."""
import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

from run.folder import atomic_write, lock
from run.report import Progress

TIMEOUT = 15  # seconds of silence that end a try


class NotThere(ValueError):
    """The server has no such file, or offline the cache has none: another name may be tried."""


def sha256_of(*paths: Path) -> str:
    """The hex sha256 of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 18):
                digest.update(chunk)
    return digest.hexdigest()


def hub_file(repo: str, filename: str, revision: str = "main", sha256: str | None = None) -> Path:
    """A file of a Hugging Face repository: from huggingface_hub's cache, or downloaded into it."""
    env = os.environ.get
    hub = Path(env("HF_HUB_CACHE", env("HF_HOME", "~/.cache/huggingface") + "/hub")).expanduser()
    for name in (repo.rpartition("/")[2], repo):  # google-t5/t5-small was once t5-small
        cache = hub / f"models--{name.replace('/', '--')}"
        ref = cache / "refs" / revision  # there if huggingface_hub knows the branch's commit
        commit = ref.read_text() if ref.is_file() else revision
        path = cache / "snapshots" / commit / filename
        if path.is_file():
            return path
    if env("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise NotThere(f"{path} is not there and HF_HUB_OFFLINE is set: unset it")
    url = f"{env('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/{commit}/{filename}"
    with lock(path.parent):
        if not path.is_file():
            download(url, path, sha256, env("HF_TOKEN"))
    return path


def download(url: str, path: Path, sha256: str | None = None, token: str | None = None,
             tries: int = 3) -> None:
    """Bring `url` to `path`, which appears only when every byte is there and `sha256` is right.

    A download that is cut, or silent for TIMEOUT seconds, starts again. ValueError with the url if
    that does not help, NotThere on a 404.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "lst"})
    if token:  # for this server, not for the one that it may redirect to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
        with reply, atomic_write(path) as temporary:
            if reply.headers.get_content_type() == "text/html":
                raise ValueError(f"{url} gave a web page, not a file; log in to the network?")
            total, done = int(reply.headers.get("Content-Length", 0)), 0
            progress = Progress(f"{path.name}, byte", total)
            with open(temporary, "wb") as file:
                while chunk := reply.read1(1 << 18):
                    done += file.write(chunk)
                    if total:
                        progress.step(done)
            if total not in (0, done):
                raise ConnectionError(f"the connection was cut after {done} of {total} bytes")
            if sha256 and sha256_of(temporary) != sha256:
                raise ValueError(f"{url} does not have the sha256 {sha256}; try again")
    except (OSError, HTTPException) as error:
        if tries > 1 and isinstance(error, (ConnectionError, TimeoutError, HTTPException)):
            return download(url, path, sha256, token, tries - 1)
        kind = NotThere if getattr(error, "code", None) == 404 else ValueError
        raise kind(f"{url} could not be downloaded ({error}): check address, network and "
                   "HF_TOKEN, then try again") from error
