"""download.py against a local server: whole or not at all, and the layout of the Hugging Face cache."""

import hashlib
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from download import NotThere, download, hub_file

BYTES = bytes(range(256)) * 8
SHA = hashlib.sha256(BYTES).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers)))
        start, status, headers, body = 0, 200, {}, BYTES
        asked = self.headers.get("Range")
        if self.path == "/missing":
            status = 404
        elif self.path == "/forbidden":
            status = 403
        elif self.path == "/page":
            headers["Content-Type"] = "text/html; charset=utf-8"
        elif self.path == "/circle":
            status, body, headers = 302, b"", {"Location": "/circle"}
        elif self.path == "/redirect":
            status, body, headers = 302, b"", {"Location": self.server.other, "X-Repo-Commit": COMMIT}
        elif asked and self.path != "/no-range":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status, body = (416, b"") if start >= len(BYTES) else (206, BYTES[start:])
            headers["Content-Range"] = f"bytes {start}-{len(BYTES) - 1}/{len(BYTES)}"
        if "/resolve/" in self.path:
            headers["X-Repo-Commit"] = COMMIT
            if self.path.endswith("elsewhere"):
                status, body, headers["Location"] = 302, b"", self.server.other
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/slow":
            for i in range(0, len(body), 128):
                self.wfile.write(body[i:i + 128])
                time.sleep(0.1)
        else:
            self.wfile.write(body[:700] if self.path == "/cut" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """() -> a running server; .url, .seen (path and headers of each request), .other (where it redirects to)."""
    monkeypatch.setenv("no_proxy", "*")
    running = []

    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url, server.seen, server.other = f"http://127.0.0.1:{server.server_port}", [], ""
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A server that plays the hub, and an empty cache at tmp_path/hub."""
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return server


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_file_arrives_whole(server, tmp_path):
    path = download(server.url + "/file", tmp_path / "new" / "file", sha256=SHA, size=len(BYTES))
    assert path.read_bytes() == BYTES and files(tmp_path) == ["file"]


def test_a_wrong_hash_leaves_no_file(server, tmp_path):
    with pytest.raises(ValueError, match="/file has sha256 .* is expected"):
        download(server.url + "/file", tmp_path / "file", sha256="0" * 64)
    assert files(tmp_path) == []


def test_a_wrong_size_leaves_no_file(server, tmp_path):
    with pytest.raises(ValueError, match="offers 2048 bytes where 7 are expected"):
        download(server.url + "/file", tmp_path / "file", size=7)
    assert files(tmp_path) == []


def test_a_cut_connection_leaves_no_file_under_the_final_name(server, tmp_path):
    with pytest.raises(ValueError, match="cut after 700 of 2048 bytes"):
        download(server.url + "/cut", tmp_path / "file", sha256=SHA)
    assert files(tmp_path) == ["file.partial"]


def test_a_cut_download_continues_where_it_stopped(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(BYTES[:700])
    assert download(server.url + "/file", tmp_path / "file", sha256=SHA).read_bytes() == BYTES
    assert [headers.get("Range") for _, headers in server.seen] == ["bytes=700-"]


def test_a_partial_file_that_is_whole_is_taken(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(BYTES)  # stopped while the hash was computed
    assert download(server.url + "/file", tmp_path / "file", sha256=SHA).read_bytes() == BYTES
    assert [headers.get("Range") for _, headers in server.seen] == ["bytes=2048-"] and files(tmp_path) == ["file"]


def test_a_partial_file_of_something_else_is_found_out_and_thrown_away(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(b"another version")
    with pytest.raises(ValueError, match="nothing was kept, try again"):
        download(server.url + "/file", tmp_path / "file", sha256=SHA)
    assert files(tmp_path) == [] and download(server.url + "/file", tmp_path / "file", sha256=SHA).read_bytes() == BYTES


@pytest.mark.slow
def test_a_slow_server_is_waited_for_and_the_progress_is_shown(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert download(server.url + "/slow", tmp_path / "file", timeout=1).read_bytes() == BYTES  # 1.6 s, never silent for 1 s
    shown = capsys.readouterr().err.split("\r")[1:]
    assert len(shown) > 1 and all(line.startswith("file: 0.0 of 0.0 MB, ") and "s left" in line for line in shown)


def test_without_a_hash_it_begins_again(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(b"another version")
    assert download(server.url + "/file", tmp_path / "file").read_bytes() == BYTES


def test_a_server_without_range_makes_it_begin_again(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(BYTES[:700])
    assert download(server.url + "/no-range", tmp_path / "file", sha256=SHA).read_bytes() == BYTES


def test_a_partial_file_that_is_too_long_makes_it_begin_again(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(BYTES * 2)
    assert download(server.url + "/file", tmp_path / "file", sha256=SHA).read_bytes() == BYTES
    assert [headers.get("Range") for _, headers in server.seen] == ["bytes=4096-", None]


@pytest.mark.parametrize("path, words", [("/page", "web page"), ("/forbidden", "403"), ("/missing", "404"), ("/circle", "302.*infinite loop")])
def test_what_is_not_the_file_is_one_clear_line(server, tmp_path, path, words):
    with pytest.raises(ValueError, match=words) as caught:
        download(server.url + path, tmp_path / "file")
    assert "\n" not in str(caught.value) and server.url + path in str(caught.value)
    assert isinstance(caught.value, NotThere) == (path == "/missing") and files(tmp_path) == []


def test_nobody_there_is_a_value_error(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening: refused
        with pytest.raises(ValueError, match="could not be downloaded"):
            download(f"http://127.0.0.1:{s.getsockname()[1]}/file", tmp_path / "file")


def test_a_silent_server_is_given_up_after_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()  # connects, but never answers
        with pytest.raises(ValueError, match="no answer|timed out"):
            download(f"http://127.0.0.1:{s.getsockname()[1]}/file", tmp_path / "file", timeout=0.2)


def test_a_name_look_up_that_hangs_is_given_up_too(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    hold = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: hold.wait(30) and [])
    began = time.monotonic()
    with pytest.raises(ValueError, match="no answer within 0.2 seconds"):
        download("http://nowhere.invalid/file", tmp_path / "file", timeout=0.2)
    hold.set()
    assert time.monotonic() - began < 10


def test_a_hub_file_lies_where_huggingface_hub_looks(hub, tmp_path):
    path = hub_file("org/name", "config.json", sha256=SHA)
    repo = tmp_path / "hub" / "models--org--name"
    assert path == repo / "snapshots" / COMMIT / "config.json" and path.read_bytes() == BYTES
    assert (repo / "refs" / "main").read_text() == COMMIT
    assert hub.seen[0][0] == "/org/name/resolve/main/config.json"
    assert hub_file("org/name", "config.json") == path and len(hub.seen) == 1  # the second time from the cache


def test_of_several_runs_one_downloads_and_the_others_wait(hub):
    runs = [threading.Thread(target=hub_file, args=("org/name", "config.json", COMMIT, SHA)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(hub.seen) == 1 and hub_file("org/name", "config.json", COMMIT).read_bytes() == BYTES


def test_the_commit_is_found_behind_a_redirect(hub, serve, tmp_path):
    hub.other = serve().url + "/file"
    assert hub_file("org/name", "elsewhere").parent.name == COMMIT


def test_a_slash_in_a_revision_is_escaped(hub, tmp_path):
    hub_file("org/name", "model.safetensors", revision="refs/pr/1")
    assert hub.seen[0][0] == "/org/name/resolve/refs%2Fpr%2F1/model.safetensors"
    assert hub_file("org/name", "model.safetensors", revision="refs/pr/1").is_file() and len(hub.seen) == 1


def test_an_existing_cache_is_used_without_network(hub, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--org--name"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs" / "abc").write_bytes(b"weights")
    os.symlink("../../blobs/abc", repo / "snapshots" / COMMIT / "model.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_file("org/name", "model.safetensors").read_bytes() == b"weights"
    assert hub_file("org/name", "model.safetensors", revision=COMMIT, sha256=SHA).read_bytes() == b"weights"
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        hub_file("org/name", "spiece.model")
    assert hub.seen == []


def test_the_cache_lies_where_xdg_cache_home_says(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub_file("org/name", "config.json").is_relative_to(tmp_path / "xdg" / "huggingface" / "hub" / "models--org--name")


def test_a_cache_from_before_the_repository_had_an_organisation_is_used(hub, tmp_path, monkeypatch):
    old = tmp_path / "hub" / "models--name" / "snapshots" / COMMIT / "config.json"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"{}")
    assert hub_file("org/name", "config.json", COMMIT) == old and hub.seen == []
    assert hub_file("org/name", "spiece.model", COMMIT).parts[-4] == "models--org--name"  # what is missing gets its name of today


def test_a_file_that_the_hub_does_not_have_can_be_told_apart(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(NotThere, match="org/name/resolve/main/spiece.model"):
        hub_file("org/name", "spiece.model")
    assert files(tmp_path) == []


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub, serve, monkeypatch):
    elsewhere = serve()
    hub.other = elsewhere.url + "/file"
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub_file("org/name", "elsewhere")
    assert hub.seen[0][1]["Authorization"] == "Bearer secret"
    assert len(elsewhere.seen) == 1 and "Authorization" not in elsewhere.seen[0][1]
