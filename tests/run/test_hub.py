"""Downloads over real HTTP: two local servers behave as the Hugging Face hub and the file server
behind it do, or fail. A file comes whole or not at all, and the cache is huggingface_hub's."""
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import model
from data import TASKS
from model import PUBLIC, load_t5, load_tokenizer
from run import hub
from run.hub import NotThere, download, hub_file

ROOT = Path(model.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL, SMALL_COMMIT, _ = PUBLIC["t5-small"]
FLAN = "google/flan-t5-small"
TINY = ROOT / "tests" / "fixtures" / "relu-tied"
SHARDS = '{"weight_map": {"shared.weight": "model-00001-of-00001.safetensors"}}'
TEXT = "a gripping , beautifully acted film"
BYTES = bytes(range(256)) * 12_000  # 3 MB


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------------------- servers

class Handler(BaseHTTPRequestHandler):
    """Gives server.files, sends on by server.moved; server.trouble[path] goes wrong in turn."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, trouble = self.server, self.server.trouble.get(self.path, [])
        trouble = trouble.pop(0) if trouble else None
        server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        status, (headers, body) = 200, server.files.get(self.path, ({}, b""))
        if self.path in server.moved:
            status, headers = server.moved[self.path]
        elif isinstance(trouble, int) or self.path not in server.files:
            status, headers, body = trouble or 404, {"Content-Type": "text/html"}, b"an error"
        elif trouble == "page":
            headers, body = {"Content-Type": "text/html; charset=utf-8"}, b"<html>please log in"
        elif trouble == "wrong":
            body = bytes(len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        with contextlib.suppress(OSError):  # the reader gave up
            if trouble == "slow":
                for start in range(0, len(body), len(body) // 5 + 1):
                    self.wfile.write(body[start:start + len(body) // 5 + 1])
                    time.sleep(0.1)
            else:
                self.wfile.write(body[:half] if trouble in ("cut", "stall") else body)
            if trouble == "stall":
                server.hold.wait(30)
                self.wfile.write(body[half:])
        self.close_connection = self.close_connection or trouble is not None

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


class World:
    """The hub, the file server behind it, which has GLUE as well, and an empty home."""

    def __init__(self, home, start):
        self.home, self.hub, self.store = home, start(), start()
        self.cache = home / "huggingface" / "hub"

    def publish(self, repo, revision, commit, files):
        """As the hub does: small files are redirected within it, large ones to the file server."""
        for name, content in files.items():
            asked, tag = f"/{repo}/resolve/{revision}/{name}", f'"{sha256(content)}"'
            said = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": tag}
            if name.endswith(".json"):
                there = f"/api/resolve-cache/models/{repo}/{commit}/{name}"
                self.hub.moved[asked] = 307, {"X-Repo-Commit": commit, "Location": there}
                self.hub.files[there] = {"X-Repo-Commit": commit, "ETag": tag}, content
            else:
                there = f"/repos/{sha256(content)}?name={name}&Expires=1"  # signed for a while
                self.hub.moved[asked] = 302, said | {"X-Repo-Commit": commit,
                                                     "Location": self.store.url + there}
                self.store.files[there] = {"ETag": tag}, content

    def serve(self, name="/file", trouble=(), content=BYTES):
        """The url of a file on the file server."""
        self.store.files[name], self.store.trouble[name] = ({}, content), list(trouble)
        return self.store.url + name

    def stop(self):
        for server in (self.hub, self.store):
            server.hold.set()
            server.shutdown()
            server.server_close()


def python(code, *args):
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def world(tmp_path, monkeypatch):
    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url, server.hold = f"http://127.0.0.1:{server.server_port}", threading.Event()
        server.files, server.moved, server.trouble, server.seen = {}, {}, {}, []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                         daemon=True).start()
        return server

    world = World(tmp_path / "home", start)
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": world.home, "HF_HOME": world.home / "huggingface", "no_proxy": "*",
                        "HF_ENDPOINT": world.hub.url,
                        "GLUE_BASE_URL": f"{world.store.url}/glue/data"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(hub, "TIMEOUT", 0.4)
    yield world
    world.stop()


@pytest.fixture
def models(world, monkeypatch):
    """t5-small at its commit, with its hashes, and flan-t5-small on main, as a shard."""
    files = {path.name: path.read_bytes() for path in TINY.iterdir()}
    files["spiece.model"] = (model.NANO / "spiece.model").read_bytes()
    monkeypatch.setattr(model, "T5_V1_SPIECE", sha256(files["spiece.model"]))
    weights = sha256(files["model.safetensors"])
    monkeypatch.setitem(PUBLIC, "t5-small", (SMALL, SMALL_COMMIT, weights))
    world.publish(SMALL, SMALL_COMMIT, SMALL_COMMIT, files)
    world.files = {"model-00001-of-00001.safetensors": files["model.safetensors"],
                   "model.safetensors.index.json": SHARDS.encode(),
                   **{name: files[name] for name in ("config.json", "spiece.model")}}
    for revision in ("main", COMMIT):
        world.publish(FLAN, revision, COMMIT, world.files)
    return world


def is_tiny(t5):
    whole = load_t5(TINY).state_dict()
    return all(torch.equal(tensor, whole[name]) for name, tensor in t5.state_dict().items())


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------------- one file

TROUBLE = {  # what the server does: (what the line says, how often it was tried)
    "cut": ("the connection was cut after [0-9]+ of [0-9]+ bytes.*try again", 3),
    "stall": ("timed out.*try again", 3),
    "wrong": ("does not have the sha256 .*try again", 1),
    "page": ("gave a web page, not a file", 1),
    403: (r"HTTP Error 403: Forbidden.*HF_TOKEN", 1),
    404: (r"HTTP Error 404: Not Found", 1),
    500: (r"HTTP Error 500: .*try again", 1),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_download_that_fails_is_one_line_leaves_nothing_and_the_next_succeeds(
        world, tmp_path, trouble):
    words, tries = TROUBLE[trouble]
    url = world.serve(trouble=[trouble] * tries)
    with pytest.raises(ValueError, match=words) as caught:
        download(url, tmp_path / "file", sha256(BYTES))
    assert str(caught.value).startswith(url)
    assert isinstance(caught.value, NotThere) == (trouble == 404)
    assert left(tmp_path) == [] and len(world.store.seen) == tries
    download(url, tmp_path / "file", sha256(BYTES))
    assert (tmp_path / "file").read_bytes() == BYTES and left(tmp_path) == ["file"]


@pytest.mark.parametrize("trouble", [["cut", "stall"], ["slow"]])
def test_what_breaks_off_starts_again_and_what_is_slow_is_waited_for(
        world, tmp_path, capsys, trouble):
    download(world.serve(trouble=trouble), tmp_path / "file")  # slow: 0.6 s, never 0.4 s silent
    assert (tmp_path / "file").read_bytes() == BYTES and left(tmp_path) == ["file"]
    assert len(world.store.seen) == len(trouble) + (trouble != ["slow"])
    shown = capsys.readouterr().out.splitlines()
    assert 1 < len(shown) <= 30 and shown[-1].startswith(f"file, byte {len(BYTES)}/{len(BYTES)}")


def test_nobody_there_is_one_line(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening: refused
        with pytest.raises(ValueError, match="could not be downloaded.*refused"):
            download(f"http://127.0.0.1:{s.getsockname()[1]}/file", tmp_path / "file")


# --------------------------------------------------------------------------------------- the hub

def test_a_hub_file_lies_in_the_cache_of_huggingface_hub(models):
    path = hub_file(FLAN, "config.json")
    repo = models.cache / "models--google--flan-t5-small"
    assert path == repo / "snapshots" / "main" / "config.json"
    assert path.read_bytes() == models.files["config.json"]
    asked = len(models.hub.seen)
    assert hub_file(FLAN, "config.json") == path  # from the cache
    assert len(models.hub.seen) == asked == 2 and models.store.seen == []


def test_the_token_goes_to_the_hub_and_to_no_other_host(models, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub_file(FLAN, "config.json")  # redirected within the hub
    hub_file(FLAN, "spiece.model")
    assert [token for *_, token in models.hub.seen] == ["Bearer secret", None, "Bearer secret"]
    assert [token for *_, token in models.store.seen] == [None]


@pytest.mark.parametrize("variable, folder", [("HF_HUB_CACHE", ""), ("HF_HOME", "hub")])
def test_the_cache_lies_where_the_environment_says(models, tmp_path, monkeypatch, variable, folder):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    path = hub_file(FLAN, "config.json")
    assert path.is_relative_to(tmp_path / "elsewhere" / folder / "models--google--flan-t5-small")


def test_an_existing_cache_is_used_without_network(world, monkeypatch):
    repo = world.cache / "models--org--name"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs" / "abc").write_bytes(b"weights")
    os.symlink("../../blobs/abc", repo / "snapshots" / COMMIT / "model.safetensors")
    old = world.cache / "models--name" / "snapshots" / COMMIT / "config.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"{}")  # from before the repository had an organisation
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_file("org/name", "config.json", COMMIT) == old
    assert hub_file("org/name", "model.safetensors").read_bytes() == b"weights"
    assert hub_file("org/name", "model.safetensors", COMMIT).read_bytes() == b"weights"
    with pytest.raises(NotThere, match=f"{COMMIT}/spiece.model is not there and HF_HUB_OFFLINE"):
        hub_file("org/name", "spiece.model")
    assert world.hub.seen == []


# -------------------------------------------------------------------------------- public models

@pytest.mark.parametrize("name, commit", [("t5-small", SMALL_COMMIT), ("flan-t5-small", "main")])
def test_a_public_model_is_fetched_once_and_then_needs_no_network(
        models, monkeypatch, name, commit):
    assert is_tiny(load_t5(name))
    tokens = load_tokenizer(name).encode(TEXT)
    assert tokens == load_tokenizer("nano").encode(TEXT) and len(tokens) > 4
    repo = models.cache / f"models--{PUBLIC[name][0].replace('/', '--')}"
    wanted = {"config.json", "spiece.model", "model.safetensors"}
    wanted = wanted if name == "t5-small" else models.files.keys()
    assert {path.name for path in (repo / "snapshots" / commit).iterdir()} == wanted
    assert len(models.store.seen) == 2  # weights and tokenizer
    models.stop()
    with pytest.raises(ValueError, match="flan-t5-base/resolve/.*/config.json could not be downl"):
        load_t5("flan-t5-base")
    if name == "flan-t5-small":  # whose index stands in for a file that the hub does not have
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_tiny(load_t5(name)) and load_tokenizer(name).encode(TEXT) == tokens


@pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="not installed")
def test_what_huggingface_hub_left_is_used_and_what_we_left_it_finds(models, monkeypatch):
    def theirs(*args):
        child = python("import sys; from huggingface_hub import hf_hub_download as load\n"
                       "for name in sys.argv[3:]:\n"
                       "    print(load(sys.argv[1], name, revision=sys.argv[2]))", *args)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        return out.split()

    theirs(SMALL, SMALL_COMMIT, "config.json", "model.safetensors", "spiece.model")
    models.hub.seen.clear()
    assert is_tiny(load_t5("t5-small")) and load_tokenizer("t5-small").encode(TEXT)
    assert models.hub.seen == []
    ours = [str(hub_file(FLAN, name, COMMIT)) for name in ("config.json", "spiece.model")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert theirs(FLAN, COMMIT, "config.json", "spiece.model") == ours


# ------------------------------------------------------------------------------------- processes

@pytest.fixture
def large(models):
    """Arguments of hub_file for a file that the server stops sending in the middle."""
    tag = sha256(models.files["model-00001-of-00001.safetensors"])
    there = next(path for path in models.store.files if tag in path)
    models.store.trouble[there] = ["stall"]
    return SMALL, "model.safetensors", SMALL_COMMIT, tag


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_one_can_use(models, large):
    child = python("import sys; from run.hub import hub_file; hub_file(*sys.argv[1:])", *large)
    while not any(path.stat().st_size for path in models.cache.rglob("*.partial")):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert left(models.home) == ["model.safetensors.partial"]
    assert sha256(hub_file(*large).read_bytes()) == large[-1]
    assert left(models.home) == ["model.safetensors"]


def test_of_two_at_once_one_downloads_and_the_other_waits(models, large, monkeypatch, capsys):
    monkeypatch.setattr(hub, "TIMEOUT", 30)
    with ThreadPoolExecutor() as pool:  # a folder's lock tells threads apart, as it does processes
        both = [pool.submit(hub_file, *large) for _ in range(2)]
        time.sleep(0.5)
        models.store.hold.set()
        assert [sha256(one.result().read_bytes()) for one in both] == [large[-1]] * 2
    assert len(models.store.seen) == 1
    assert capsys.readouterr().out.count("waiting for another process that works in") == 1


def rte(world):
    """Puts a small RTE.zip on the file server and returns its sha256."""
    rows = "index\tsentence1\tsentence2\tlabel\n" + "0\tA\tB\tentailment\n" * 20
    archive = world.home.parent / "RTE.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("RTE/train.tsv", rows)
        packed.writestr("RTE/dev.tsv", rows)
    world.serve("/glue/data/RTE.zip", content=archive.read_bytes())
    return sha256(archive.read_bytes())


@pytest.mark.parametrize("trouble", ["cut", "wrong", 404])
def test_a_task_that_does_not_come_leaves_no_file_and_comes_later(world, monkeypatch, trouble):
    downloads = {"RTE.zip": rte(world)}
    monkeypatch.setitem(TASKS, "rte", dataclasses.replace(TASKS["rte"], downloads=downloads))
    world.store.trouble["/glue/data/RTE.zip"] = [trouble] * TROUBLE[trouble][1]
    with pytest.raises(ValueError, match=TROUBLE[trouble][0]) as caught:
        TASKS["rte"].load()
    assert str(caught.value).startswith(f"{world.store.url}/glue/data/RTE.zip ")
    assert str(caught.value).endswith("--data DIR") and left(world.home) == []
    assert len(TASKS["rte"].load().train) == 20 and left(world.home) == ["dev.tsv", "train.tsv"]
