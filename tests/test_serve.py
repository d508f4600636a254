"""Public models and GLUE by name, over real HTTP: two local servers behave as the hub and the file server behind it do."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import download
import model
from data import TASKS
from model import PUBLIC, STRAY, T5, T5Config, load_t5, load_tokenizer, public_name, save_t5

ROOT = Path(model.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL, SMALL_COMMIT, _ = PUBLIC["t5-small"]
TEXT = "a gripping , beautifully acted film"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------------------------------------------- servers

class Handler(BaseHTTPRequestHandler):
    """Gives server.files (headers, bytes), sends on by server.moved (status, headers); server.trouble goes wrong instead."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, trouble = self.server, self.server.trouble.get(self.path)
        server.seen.append((self.command, self.path, self.headers.get("Range")))
        status, (headers, body) = 200, server.files.get(self.path, ({}, b"no such file"))
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if trouble == "mute":
            server.hold.wait(30)
        if self.path in server.moved:
            status, headers = server.moved[self.path]
            body = b""
        elif isinstance(trouble, int) or self.path not in server.files:
            status, headers, body = trouble or 404, {"Content-Type": "text/html"}, b"<html>an error</html>"
        elif trouble == "page":
            headers, body = {"Content-Type": "text/html; charset=utf-8"}, b"<html>please log in</html>"
        elif trouble == "wrong":
            body = bytes(len(body))
        elif first:
            headers = headers | {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[first:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        chunked = trouble == "cut between chunks"
        self.send_header(*("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body))))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        if chunked:
            self.wfile.write(b"%x\r\n%s\r\n" % (half, body[:half]))
        elif trouble in ("cut", "stall"):
            self.wfile.write(body[:half])
        else:
            self.wfile.write(body)
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
        self.glue = home / ".cache" / "ladder-side-tuning" / "glue"
        self.env = {"HOME": str(home), "HF_HOME": str(home / "huggingface"), "HF_ENDPOINT": self.hub.url,
                    "GLUE_BASE_URL": self.store.url + "/glue/data", "no_proxy": "*"}

    def publish(self, repo, revision, commit, files):
        """As the hub does: small files are redirected within it, large ones to the file server; the way there names the commit."""
        for name, content in files.items():
            asked, tag = f"/{repo}/resolve/{revision}/{name}", f'"{sha256(content)}"'
            said = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)), "X-Linked-Etag": tag}
            if name.endswith(".json"):
                there = f"/api/resolve-cache/models/{repo}/{commit}/{name}"
                self.hub.moved[asked] = 307, {"X-Repo-Commit": commit, "Location": there}
                self.hub.files[there] = {"X-Repo-Commit": commit, "ETag": tag}, content
            else:
                there = f"/repos/{sha256(content)}?name={name}&Expires=1"  # signed for a while
                self.hub.moved[asked] = 302, said | {"Location": self.store.url + there}
                self.store.files[there] = {"ETag": tag}, content
            self.hub.moved[asked.replace(repo, "old/name")] = 307, {"Location": asked}  # of a renamed repository

    def stop(self):
        for server in (self.hub, self.store):
            server.hold.set()
            server.shutdown()
            server.server_close()

    def heal(self):
        self.hub.trouble.clear()
        self.store.trouble.clear()

    def python(self, code, *args, **how):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))} | self.env
        return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


@pytest.fixture
def world(tmp_path, monkeypatch):
    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url, server.hold = f"http://127.0.0.1:{server.server_port}", threading.Event()
        server.files, server.moved, server.trouble, server.seen = {}, {}, {}, []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    world = World(tmp_path / "home", start)
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in world.env.items():
        monkeypatch.setenv(name, value)
    yield world
    world.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The files of a tiny T5 v1.0 with the tokenizer of the bundled backbone: {name: bytes}."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_t5(T5(T5Config(vocab_size=8192, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=3)), folder)
    weights = load_file(folder / "model.safetensors") | {key: torch.ones(32, 3) for key in STRAY}  # as published
    save_file(weights, folder / "stray.safetensors")
    return {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": (folder / "stray.safetensors").read_bytes(),
            "spiece.model": (model.NANO / "spiece.model").read_bytes()}


@pytest.fixture
def models(world, tiny, tmp_path, monkeypatch):
    """t5-small at its pinned commit with its hashes, and flan-t5-small on main, in shards and without known hashes."""
    world.publish(SMALL, SMALL_COMMIT, SMALL_COMMIT, tiny)
    monkeypatch.setitem(PUBLIC, "t5-small", (SMALL, SMALL_COMMIT, sha256(tiny["model.safetensors"])))
    monkeypatch.setattr(model, "T5_V1_SPIECE", sha256(tiny["spiece.model"]))
    (tmp_path / "whole.safetensors").write_bytes(tiny["model.safetensors"])
    state = load_file(tmp_path / "whole.safetensors")
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    files = {"config.json": tiny["config.json"], "spiece.model": tiny["spiece.model"], "model.safetensors.index.json": json.dumps(index).encode()}
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    world.publish("google/flan-t5-small", "main", COMMIT, files)
    world.publish("google/flan-t5-small", COMMIT, COMMIT, files)
    world.weights = state
    return world


def same(t5, weights):
    return all(torch.equal(p, weights[public_name(key)]) for key, p in t5.named_parameters())


def patient_for_a_second(monkeypatch):
    for function in (download.download, download._fetch):
        monkeypatch.setattr(function, "__defaults__", (None, None, None, 1, True))  # the 15 seconds of `timeout`


def wait_for(what, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- models

@pytest.mark.parametrize("name, commit", [("t5-small", SMALL_COMMIT), ("flan-t5-small", COMMIT)])
def test_a_public_model_is_fetched_once_and_then_needs_no_network(models, monkeypatch, name, commit):
    repo = PUBLIC[name][0]
    assert same(load_t5(name), models.weights)
    tokens = load_tokenizer(name).encode(TEXT)
    assert tokens == load_tokenizer("nano").encode(TEXT) and len(tokens) > 4
    snapshot = models.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    weights = {"model.safetensors"} if name == "t5-small" else shards
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "spiece.model", *weights}
    assert len({path for _, path, _ in models.store.seen}) == len(models.store.seen) == len(weights - {"model.safetensors.index.json"}) + 1
    models.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same(load_t5(name), models.weights) and load_tokenizer(name).encode(TEXT) == tokens


def test_with_the_server_gone_the_cache_is_enough(models):
    load_t5("t5-small"), load_tokenizer("t5-small")
    models.stop()
    assert same(load_t5("t5-small"), models.weights) and load_tokenizer("t5-small").encode(TEXT)
    with pytest.raises(ValueError, match="google/flan-t5-small/resolve/main/config.json could not be downloaded.*try again"):
        load_t5("flan-t5-small")


def test_offline_with_an_empty_cache_is_one_clear_line(models, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_t5, load_tokenizer):
        with pytest.raises(ValueError, match=f"{SMALL}/.* is not in {models.cache}.* HF_HUB_OFFLINE is set; unset it or fill the cache") as caught:
            load("t5-small")
        assert "\n" not in str(caught.value)
    assert models.hub.seen == [] and not models.cache.exists()


def test_a_renamed_repository_is_followed_to_its_new_name(models, tiny, monkeypatch):
    monkeypatch.setitem(PUBLIC, "t5-small", ("old/name", *PUBLIC["t5-small"][1:]))
    assert same(load_t5("t5-small"), models.weights)
    asked = f"resolve/{SMALL_COMMIT}/model.safetensors"
    assert [path for _, path, _ in models.hub.seen if path.endswith(asked)] == [f"/old/name/{asked}", f"/{SMALL}/{asked}"]


def test_what_huggingface_hub_left_is_used_and_what_we_left_it_finds(models):
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    fetch = """if True:
        import sys
        from huggingface_hub import hf_hub_download
        for name in sys.argv[3:]:
            print(hf_hub_download(sys.argv[1], name, revision=sys.argv[2]))"""

    def theirs(*args, offline="0"):
        models.env["HF_HUB_OFFLINE"] = offline
        child = models.python(fetch, *args)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        return out.split()

    wanted = ("config.json", "model.safetensors", "spiece.model")
    theirs(SMALL, SMALL_COMMIT, *wanted)
    models.hub.seen.clear()
    assert same(load_t5("t5-small"), models.weights) and load_tokenizer("t5-small").encode(TEXT) and models.hub.seen == []
    ours = [download.hub_file("google/flan-t5-small", name) for name in ("config.json", "spiece.model")]
    assert theirs("google/flan-t5-small", "main", "config.json", "spiece.model", offline="1") == [str(path) for path in ours]


# -------------------------------------------------------------------------------------------------- what may go wrong

TROUBLE = {
    "cut": "the connection was cut after [0-9]+ of [0-9]+ bytes.*try again",
    "cut between chunks": "could not be downloaded.*try again",
    "stall": "timed out.*try again",
    "mute": "no answer within 1 seconds.*try again|timed out.*try again",
    "wrong": "has sha256 .* is expected.*try again or check the address",
    "page": "gave a web page instead of a file.*try again",
    403: r"was refused \(403 Forbidden\); (if it needs a login, set HF_TOKEN|check the address)",
    404: r"is not there \(404\); check the name",
    500: r"was refused \(500 .*\); try again later",
}


@pytest.mark.parametrize("name, trouble", [*(("t5-small", trouble) for trouble in TROUBLE), *(
    pytest.param("flan-t5-small", trouble, marks=pytest.mark.slow) for trouble in TROUBLE if trouble != "wrong")])  # only a hash can tell
def test_a_download_that_fails_leaves_no_model_and_the_next_try_succeeds(models, monkeypatch, name, trouble):
    patient_for_a_second(monkeypatch)
    there, (_, content) = next((path, file) for path, file in models.store.files.items() if "spiece" in path)
    models.store.trouble[there] = trouble
    with pytest.raises(ValueError, match=TROUBLE[trouble]) as caught:
        load_tokenizer(name)
    assert str(caught.value).startswith(f"{models.hub.url}/{PUBLIC[name][0]}/resolve/") and "\n" not in str(caught.value)
    assert ("HF_TOKEN" in str(caught.value)) == (trouble == 403)
    assert not list(models.cache.rglob("spiece.model"))
    models.heal()
    assert load_tokenizer(name).encode(TEXT) == load_tokenizer("nano").encode(TEXT)
    path, = models.cache.rglob("spiece.model")
    assert path.read_bytes() == content
    kept = name == "t5-small" and trouble in ("cut", "stall", "cut between chunks")  # without a hash it begins again
    assert models.store.seen[-1] == ("GET", there, f"bytes={len(content) // 2}-" if kept else None)


HUB_FILE = "import sys, download; print(download.hub_file(*sys.argv[1:3], revision=sys.argv[3], sha256=sys.argv[4] or None))"


@pytest.mark.parametrize("pinned", [True, False])
def test_a_process_killed_while_it_downloads_leaves_what_the_next_one_can_use(models, tiny, pinned):
    content, args = tiny["model.safetensors"], (SMALL, "model.safetensors", SMALL_COMMIT)
    there = next(path for path in models.store.files if sha256(content) in path)
    models.store.trouble[there] = "stall"
    child = models.python(HUB_FILE, *args, sha256(content) if pinned else "")
    wait_for(lambda: [path for path in models.cache.rglob("*.partial") if path.stat().st_size == len(content) // 2])
    child.kill()
    child.communicate()
    assert not list(models.cache.rglob("model.safetensors"))
    models.heal()
    child = models.python(HUB_FILE, *args, sha256(content) if pinned else "")
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0 and Path(out.strip()).read_bytes() == content, err
    assert models.store.seen[-1][2] == (f"bytes={len(content) // 2}-" if pinned else None)
    assert not list(models.cache.rglob("*.partial"))


def test_of_two_processes_one_downloads_and_the_other_says_that_it_waits(models, tiny):
    content = tiny["model.safetensors"]
    there = next(path for path in models.store.files if sha256(content) in path)
    models.store.trouble[there] = "stall"
    args = (SMALL, "model.safetensors", SMALL_COMMIT, sha256(content))
    first = models.python(HUB_FILE, *args)
    wait_for(lambda: models.store.seen)
    second = models.python(HUB_FILE, *args)
    assert "waiting" in second.stderr.readline()
    models.store.hold.set()
    for child in (first, second):
        out, err = child.communicate(timeout=30)
        assert child.returncode == 0 and Path(out.strip()).read_bytes() == content, err
    assert len(models.store.seen) == 1


# ---------------------------------------------------------------------------------------------------------------- GLUE

ADDRESSES = {  # as published
    "cola": ["https://dl.fbaipublicfiles.com/glue/data/CoLA.zip"],
    "sst2": ["https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"],
    "mrpc": ["https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt",
             "https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv"],
    "qqp": ["https://dl.fbaipublicfiles.com/glue/data/QQP-clean.zip"],
    "mnli": ["https://dl.fbaipublicfiles.com/glue/data/MNLI.zip"],
    "qnli": ["https://dl.fbaipublicfiles.com/glue/data/QNLIv2.zip"],
    "rte": ["https://dl.fbaipublicfiles.com/glue/data/RTE.zip"],
    "stsb": ["https://dl.fbaipublicfiles.com/glue/data/STS-B.zip"],
}
PARSES = "\tp" * 4
FORMAT = {  # header, a row of training and of validation, what a model reads; {i} numbers the rows, {label} is their label
    "cola": ("", "gj04\t{label}\t*\tS{i} \"sic.", "cola sentence: S{i} \"sic."),
    "sst2": ("sentence\tlabel", "S{i} \t{label}", "sst2 sentence: S{i} "),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t{i}\t7\tA{i}\tB{i}", "mrpc sentence1: A{i} sentence2: B{i}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t1\t2\tA{i}?\tB{i}?\t{label}", "qqp question1: A{i}? question2: B{i}?"),
    "mnli": ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
             "sentence1\tsentence2\tlabel1\tgold_label", f"{{i}}\t1\t1n\tg{PARSES}\tA{{i}}\tB{{i}}\tneutral\t{{label}}",
             "mnli premise: A{i} hypothesis B{i}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "{i}\tA{i}?\tB{i}\t{label}", "qnli question: A{i}? sentence: B{i}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{i}\tA{i}\tB{i}\t{label}", "rte sentence1: A{i} sentence2: B{i}"),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             "{i}\tg\tf\ty\to\ts\ts\tA{i}\tB{i}\t{label}", "stsb sentence1: A{i} sentence2: B{i}"),
}
TRAIN, DEV, MISMATCHED = range(200), range(200, 210), range(210, 216)


def label_of(task, i):
    """(in the file, as a number) of row i."""
    if task == "stsb":
        return f"{i % 6}.000", float(i % 6)
    classes = TASKS[task].words
    return (classes[i % len(classes)] if TASKS[task].labels_are_words else str(i % 2)), i % len(classes)


def table(task, rows, extra=(), end="\n"):
    header, row, _ = FORMAT[task]
    if task == "mnli" and rows != TRAIN:  # five annotators instead of one
        header, row = header.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5"), row.replace("neutral", "\t".join(["neutral"] * 5))
    lines = [header] * bool(header) + [row.format(i=i, label=label_of(task, i)[0]) for i in rows] + list(extra)
    return "".join(line + end for line in lines).encode()


def serve_glue(world, task, monkeypatch):
    """Puts the task's official files on the server and lets their hashes be the expected ones."""
    folder, files = TASKS[task].folder, {"train.tsv": TRAIN, "dev.tsv": DEV}
    if task == "mrpc":
        ids = "".join(f"{i}\t7\n" for i in DEV)
        contents = [table(task, range(210), end="\r\n"), ids.encode()]
    else:
        if task == "mnli":
            files = {"train.tsv": TRAIN, "dev_matched.tsv": DEV, "dev_mismatched.tsv": MISMATCHED}
        archive = world.home.parent / f"{task}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(f"{folder}/", "")
            for name, rows in files.items():
                short = ["9\t1\t2\tA question without an answer"] * (2 if rows == TRAIN else 0) if task == "qqp" else []
                packed.writestr(f"{folder}/{name}", table(task, rows, short))
            packed.writestr(f"{folder}/test.tsv", "not wanted")
            packed.writestr(f"__MACOSX/{folder}/._train.tsv", "not wanted")
        contents = [archive.read_bytes()]
    paths = [address.removeprefix("https://dl.fbaipublicfiles.com") for address in ADDRESSES[task]]
    for path, content in zip(paths, contents, strict=True):
        world.store.files[path] = {}, content
    hashes = dict(zip(TASKS[task].downloads, map(sha256, contents), strict=True))
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], downloads=hashes))
    return paths


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_fetched_from_its_published_address_and_read(world, monkeypatch, task):
    paths = serve_glue(world, task, monkeypatch)
    dataset = data.load(task)

    def expected(rows):
        return [(FORMAT[task][2].format(i=i), label_of(task, i)[1]) for i in rows]

    def read(examples):
        return [(example.source, example.label) for example in examples]

    if task == "mnli":
        assert [read(part) for part in (dataset.train, dataset.val, dataset.test)] == [expected(TRAIN), expected(MISMATCHED), expected(DEV)]
    elif TASKS[task].split == "half of dev":
        assert read(dataset.train) == expected(TRAIN) and sorted(read(dataset.val + dataset.test)) == sorted(expected(DEV))
        assert len(dataset.val) == 5
    else:
        assert sorted(read(dataset.train + dataset.val)) == sorted(expected(TRAIN)) and read(dataset.test) == expected(DEV)
        assert len(dataset.val) == 20
    assert dataset.skipped == (2 if task == "qqp" else 0) and dataset.fallback is None
    assert [path for _, path, _ in world.store.seen] == paths
    assert {path.name for path in (world.glue / TASKS[task].folder).iterdir()} == {".lock", *TASKS[task].files}
    world.stop()
    assert data.load(task) == dataset  # from the disk


@pytest.mark.parametrize("task", TASKS)
def test_without_a_mirror_the_addresses_are_the_published_ones(tmp_path, monkeypatch, task):
    monkeypatch.delenv("GLUE_BASE_URL", raising=False)
    asked = []
    monkeypatch.setattr(data, "download", lambda url, path, sha256: asked.append(url) or path)
    monkeypatch.setattr(data, "unpack", lambda archive, task, home: archive.touch())
    data.fetch(TASKS[task], tmp_path)
    assert asked == ADDRESSES[task]


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_glue_download_that_fails_leaves_no_file_and_the_next_try_succeeds(world, monkeypatch, trouble):
    patient_for_a_second(monkeypatch)
    path, = serve_glue(world, "rte", monkeypatch)
    world.store.trouble[path] = trouble
    with pytest.raises(ValueError, match=TROUBLE[trouble]) as caught:
        data.load("rte")
    assert str(caught.value).startswith(world.store.url + path) and "\n" not in str(caught.value) and "--data DIR" in str(caught.value)
    assert "HF_TOKEN" not in str(caught.value)
    assert {file.name for file in (world.glue / "RTE").iterdir()} <= {".lock", "RTE.zip.partial"}
    world.heal()
    assert len(data.load("rte").train) == 200
    half = len(world.store.files[path][1]) // 2
    assert world.store.seen[-1][2] == (f"bytes={half}-" if trouble in ("cut", "stall", "cut between chunks") else None)


@pytest.mark.slow
def test_of_two_processes_that_want_a_task_one_downloads_it(world, monkeypatch):
    path, = serve_glue(world, "rte", monkeypatch)
    world.store.trouble[path] = "stall"
    load = """if True:
        import dataclasses, sys, data
        data.TASKS["rte"] = dataclasses.replace(data.TASKS["rte"], downloads={"RTE.zip": sys.argv[1]})
        print(len(data.load("rte").train))"""
    first = world.python(load, TASKS["rte"].downloads["RTE.zip"])
    wait_for(lambda: world.store.seen)
    second = world.python(load, TASKS["rte"].downloads["RTE.zip"])
    assert "waiting" in second.stderr.readline()
    world.store.hold.set()
    for child in (first, second):
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out) == (0, "200\n"), err
    assert len(world.store.seen) == 1


def test_sst2_falls_back_to_the_sample_only_as_long_as_the_server_fails(world, monkeypatch):
    path, = serve_glue(world, "sst2", monkeypatch)
    world.store.trouble[path] = 500
    dataset = data.load("sst2")
    assert dataset.name == "bundled-sample" and f"{world.store.url}{path} was refused (500" in dataset.fallback
    world.heal()
    assert (data.load("sst2").name, data.load("sst2").fallback) == ("glue", None)


# -------------------------------------------------------------------------------------------------------- command line

@pytest.mark.slow
def test_the_command_line_trains_a_public_model_on_a_downloaded_task(models, tiny, tmp_path, monkeypatch):
    serve_glue(models, "rte", monkeypatch)
    train = """if True:
        import dataclasses, json, sys
        import data, model, train
        made = json.loads(sys.argv[1])  # the hashes of made files in place of the published ones
        model.PUBLIC["t5-small"], model.T5_V1_SPIECE = made["weights"], made["spiece"]
        data.TASKS["rte"] = dataclasses.replace(data.TASKS["rte"], downloads=made["rte"])
        train.main(sys.argv[2:])"""
    made = {"weights": PUBLIC["t5-small"], "spiece": model.T5_V1_SPIECE, "rte": TASKS["rte"].downloads}
    child = models.python(train, json.dumps(made), *"--task rte --model t5-small --max-steps 2 --batch-size 4 --fisher-samples 2 --device cpu --out".split(),
                          str(tmp_path / "run"))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, out + err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["model"], results["task"], results["data"], results["steps"]) == ("t5-small", "rte", "glue", 2)
    assert (models.glue / "RTE" / "train.tsv").is_file() and len(models.store.seen) == 3  # weights, tokenizer, zip


# ----------------------------------------------------------------------------------------------------- the real tokenizer

@pytest.fixture(scope="module")
def real():
    """T5's published spiece.model, from where T5_SPIECE says or from the Hugging Face cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        path = os.environ.get("T5_SPIECE")
        try:
            path = Path(path) if path else model.locate("t5-small", "spiece.model")
        except ValueError as error:
            pytest.skip(f"T5's own spiece.model is not here: let T5_SPIECE name it, or load t5-small once ({error})")
    assert download.sha256_of(path) == model.T5_V1_SPIECE, f"{path} is not the published file"
    return model.Tokenizer(path)


def test_the_real_tokenizer_gives_the_published_ids(real):
    example = data.Example("translate English to German: The house is wonderful.", "", 0)
    assert data.encode([example], real)[0][0] == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]
    assert real.vocab_size == 32100


@pytest.mark.parametrize("text, ids, back", [
    (" The\t house\n\nis\u00a0 wonderful.\u3000\u200b", [37, 629, 19, 1627, 5], "The house is wonderful."),  # white space is one space, or none
    (" \n", [], ""),
    ("cafe\u0301 \uff21", [11949, 71], "caf\u00e9 A"),                             # compatibility composition (NFKC)
    ("a { b", [3, 9, 3, 2, 3, 115], "a  \u2047  b"),                            # no brace was in the text it was made from
    ("The <extra_id_0> walks in <extra_id_1> park", [37, 32099, 10681, 16, 32098, 2447], "The <extra_id_0> walks in <extra_id_1> park"),
    ("<extra_id_99>", [32000], "<extra_id_99>"),
    ("</s>", [3, 2, 87, 7, 3155], " \u2047 /s>"),                               # text, no end
])
def test_the_real_tokenizer_on_odd_text(real, text, ids, back):
    assert real.encode(text) == ids and real.decode([*ids, 1, 37]) == back
