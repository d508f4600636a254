"""A run's folder. A run can be killed at any moment and goes on to the same result.

    config.json           the run's arguments, and where it runs; a resume must give the same
    metrics.jsonl         the log: a line per step and one per epoch
    state.safetensors     while it runs: all that the next step depends on
    trained.safetensors   what trains, after the best epoch; its metadata holds the config, too
    results.json          when it has ended

Files appear whole or not at all, and each byte that is not as it was written is noticed.
"""
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from run.processes import first, rank
from run.report import peak_memory, reset_peak


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which then replaces `path`. An error leaves `path` alone."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        to_disk(partial)
        partial.replace(path)
        to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2))


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        try:
            save_file(tensors, partial, metadata | {"sha256": digest(tensors, metadata)})
        except SafetensorError as error:  # a full disk
            raise OSError(f"cannot write {path}: {error}; the old one is kept") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. ValueError if a byte is not as it was written."""
    metadata, tensors = {}, {}
    with contextlib.suppress(SafetensorError, RuntimeError, ValueError):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.pop("sha256", None) != digest(tensors, metadata):
        raise ValueError(f"{path} is damaged or was not written by us")
    return tensors, metadata


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The sha256 of all names, shapes, types, bytes and metadata."""
    hasher = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def check_folder(out: str | Path | None, overwrite: bool, resume: bool) -> None:
    """ValueError if a run must not go into this folder. None: a new one will be made."""
    held = {path.name for path in Path(out).glob("*") if path.suffix != ".partial"} if out else ()
    if "spiece.model" in held:
        raise ValueError(f"{out} holds a backbone: choose another --out")
    if held and not overwrite and not (resume and "config.json" in held):
        raise ValueError(f"{out} is not empty: choose another --out, or give --resume to go on "
                         "with the run in it, if there is one, or --overwrite")


def new_folder(name: str) -> Path:
    """Make the first free runs/<name>-<number>."""
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            path = Path(f"runs/{name}-{number}")
            path.mkdir(parents=True)  # also decides between two runs that start together
            return path


@contextlib.contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder until the end or the process's death. wait=False: another one's: ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder here: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run works in {folder}: choose another --out") from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        if not wait:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        os.close(file)


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Hold the folder for all processes of a run. If it is empty at the end, it is removed."""
    with contextlib.ExitStack() as held:
        first(held.enter_context, lock(out, wait=False))
        yield


def clear(out: Path) -> None:
    """Remove what an earlier run left; other files stay."""
    for name in ("state.safetensors", "results.json", "results.md", "trained.safetensors",
                 "metrics.jsonl", "config.json"):
        (out / name).unlink(missing_ok=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_config(out: str | Path) -> dict:
    """Return the config of the run that left its weights in this folder."""
    metadata = read_tensors(Path(out) / "trained.safetensors")[1]
    if "config" not in metadata:
        raise ValueError(f"{out}/trained.safetensors is not what a run has trained")
    return json.loads(metadata["config"])


def load_trained(out: str | Path, model: nn.Module) -> None:
    """Fill what trains in `model`. ValueError if names, shapes or bytes are not those saved."""
    path = Path(out) / "trained.safetensors"
    fill(path, trainable(model), read_tensors(path)[0])


@torch.no_grad()
def fill(path: Path, own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    ours, theirs = ({(name, tensor.shape) for name, tensor in tensors.items()}
                    for tensors in (own, found))
    if ours != theirs:
        raise ValueError(f"{path} does not fit, for example {min(ours ^ theirs)[0]}")
    for name, tensor in own.items():
        tensor.copy_(found[name])


# ------------------------------------------------------------------------------------------ the run

class Run:
    """Where a run stands, its log, its state, its results. The first of several processes writes.

    Learning rate, order of rows and random numbers are functions of seed and step, so the state is
    the weights, Adam's moments and a few numbers.
    """

    def __init__(self, out: Path, config: dict, about: dict, resume: bool,
                 device: str = "cpu", began: float | None = None):
        """config: what a resume must repeat; about: command, versions, hardware; began: a time()"""
        self.out, self.config, self.about, self.device = out, config, about, device
        self.resume, self.began = resume, began or time.time()
        self.step = self.epochs = 0  # optimizer steps made, epochs evaluated
        self.best = None             # {"epoch": n, "val": {...}} of trained.safetensors
        self.earlier_peak = 0        # bytes, before the interruption
        self.results = first(self._earlier_results) if resume else None  # of a run that has ended

    def _earlier_results(self) -> dict | None:
        config, results = self.out / "config.json", self.out / "results.json"
        was = read_json(config) if config.exists() else self.config
        changed = [f"{name} was {was.get(name)!s:.24}, is {now!s:.24}"
                   for name, now in self.config.items()
                   if was.get(name) != now and name not in ("model", "clip", "data")]
        if changed:  # model, clip and data may have moved: their hashes are compared
            raise ValueError(f"{self.out} cannot go on, give --overwrite or the same arguments: "
                             f"{'; '.join(changed)}")
        if results.exists():
            ended = read_json(results)
            (self.out / "state.safetensors").unlink(missing_ok=True)
            return ended
        if (self.out / "trained.safetensors").exists() > (self.out / "state.safetensors").exists():
            raise ValueError(f"{self.out} cannot go on: it has weights, but its state.safetensors "
                             "and results.json are gone; --overwrite begins anew")

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Bring model and optimizer to the saved state. Return False if there is none."""
        path, own = self.out / "state.safetensors", trainable(model)
        self.resume = self.resume and first(path.exists)
        if not self.resume:
            return False
        found, metadata = read_tensors(path)
        at = json.loads(metadata["position"])
        if at["best"]:
            read_config(self.out)  # an error now, not at the end, if those weights are gone
        fill(path, own, {name: found[name] for name in found if " " not in name})
        for name in found.keys() - own.keys():
            parameter, key = name.split()  # "up.weight exp_avg"
            optimizer.state[own[parameter]][key] = found[name].to(self.device)
        first(os.truncate, self.out / "metrics.jsonl", at["log"])
        self.step, self.epochs, self.best = at["step"], at["epochs"], at["best"]
        self.earlier_peak, self.began = at["peak"], self.began - at["seconds"]
        return True

    def begin(self) -> None:
        """Make the folder this run's: clear it, unless the run goes on. The peak starts anew."""
        if not self.resume:
            first(clear, self.out)
            first(write_json, self.out / "config.json", self.config | self.about)
        reset_peak(self.device)

    def seconds(self) -> float:
        return time.time() - self.began

    def peak(self) -> int:
        return max(self.earlier_peak, peak_memory(self.device)[0])

    def log(self, row: dict) -> None:
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write all that the next step depends on."""
        log = self.out / "metrics.jsonl"
        first(to_disk, log)
        at = {"step": self.step, "epochs": self.epochs, "best": self.best, "peak": self.peak(),
              "seconds": self.seconds(), "log": first(os.path.getsize, log)}
        moments = {f"{name} {key}": value for name, p in trainable(model).items()
                   for key, value in optimizer.state[p].items()}
        first(write_tensors, self.out / "state.safetensors", trainable(model) | moments,
              {"position": json.dumps(at)})

    def end_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, val: dict) -> None:
        """Log an epoch's validation scores, keep its weights if they are the best, and save."""
        self.epochs += 1
        self.log({"step": self.step, "epoch": self.epochs, "val": val})
        if self.best is None or val["score"] > self.best["val"]["score"]:
            self.best = {"epoch": self.epochs, "val": val}
            first(write_tensors, self.out / "trained.safetensors", trainable(model),
                  {"config": json.dumps(self.config)})
        self.save(model, optimizer)

    def finish(self, results: dict) -> dict:
        """Write and return the results, with what the run knows of itself; remove the state."""
        took = {"seconds": round(self.seconds(), 1), "peak_memory_bytes": self.peak(),
                "peak_memory_kind": peak_memory(self.device)[1]}
        results = {**results, "steps": self.step, "best_epoch": self.best["epoch"], **took,
                   "val": self.best["val"], **self.about, "config": self.config}
        first(write_json, self.out / "config.json", self.config | self.about | took)
        first(write_json, self.out / "results.json", results)
        if rank() == 0:
            (self.out / "state.safetensors").unlink(missing_ok=True)
        return results
