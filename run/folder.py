"""A run's folder. A run can be killed at any moment and goes on to the same result.

    config.json           the run's arguments, and where it runs; a resume must give the same
    metrics.jsonl         the log: a line per step and one per epoch
    state.safetensors     while it runs: all that the next step depends on
    trained.safetensors   what trains, after the best epoch; its metadata holds the config, too
    results.json          when it has ended; of --task text also answers.jsonl

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
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        with open(temporary) as file:
            os.fsync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """about: what is to be known of them, as JSON holds it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    metadata = {"about": text, "sha256": digest(path.name, tensors, text)}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(f"cannot write {path}: {error}; the old one is kept") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and what is said about them. ValueError: a byte or the name is not as written."""
    metadata, tensors = {}, {}
    damage = SafetensorError, RuntimeError, ValueError
    with contextlib.suppress(*damage), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("sha256") != digest(path.name, tensors, metadata.get("about")):
        raise ValueError(f"{path} is damaged or was not written by us")
    return tensors, json.loads(metadata["about"])


def digest(file: str, tensors: dict[str, Tensor], about: str | None) -> str:
    """The sha256 of the file's name, what it says, and all names, shapes, types and bytes."""
    hasher = hashlib.sha256(f"{file} {about} ".encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


@contextlib.contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder until the end or the process's death. wait=False: ValueError if another process
    does, and the folder is removed if nothing came into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder here ({error.strerror}); for downloads and "
                         "features set HOME to a folder that can be written") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise ValueError(f"another run works in {folder}: choose another --out") from None
        print(f"waiting for another process that works in {folder}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        if not (wait or any(folder.iterdir())):
            folder.rmdir()
        os.close(file)


def lock_run(out: Path) -> contextlib.AbstractContextManager:
    """Hold the folder for all processes of a run."""
    return lock(out, wait=False) if rank() == 0 else contextlib.nullcontext()


def check_folder(out: str | None, overwrite: bool, resume: bool) -> None:
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


def clear(out: Path) -> None:
    """Remove what an earlier run left; other files stay."""
    for name in ("state.safetensors", "results.json", "trained.safetensors", "metrics.jsonl",
                 "answers.jsonl", "config.json", "config.json.partial"):
        (out / name).unlink(missing_ok=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_config(out: str | Path) -> dict:
    """The config of the run that left its weights in this folder."""
    return read_tensors(Path(out) / "trained.safetensors")[1]


@torch.no_grad()
def load_trained(out: str | Path, model: nn.Module, file: str = "trained.safetensors"
                 ) -> tuple[dict[str, Tensor], dict]:
    """Fill what trains in `model`; return the file's other tensors, and what it says about them."""
    tensors, about = read_tensors(Path(out) / file)
    own = {name: p.shape for name, p in trainable(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items() if " " not in name}
    if own != found:
        raise ValueError(f"{out}/{file} does not fit, for example "
                         f"{min(own.items() ^ found.items())[0]}")
    for name in own:
        model.get_parameter(name).copy_(tensors.pop(name))
    return tensors, about


def quality(val: dict) -> float:
    """What the best epoch has most of: score, or where the loss is known the least loss."""
    return -val["loss"] if "loss" in val else val["score"]


class Run:
    """Where a run stands. Learning rate, order of rows and random numbers are functions of seed and
    step, so its state is the weights, Adam's moments and a few numbers. The first process writes.
    """

    def __init__(self, out: Path, config: dict, about: dict, resume: bool,
                 device: str = "cpu", began: float | None = None):
        """config: what a resume must repeat; about: command, versions, hardware; began: a time()"""
        self.out, self.config, self.about, self.device = out, config, about, device
        self.resume, self.began = resume, began or time.time()
        self.step = self.epochs = 0  # optimizer steps made, epochs evaluated
        self.best = None             # {"epoch": n, "val": {...}} of trained.safetensors
        self.results = first(self._results) if resume else None  # of a run that has ended

    def _results(self) -> dict | None:
        config, results = self.out / "config.json", self.out / "results.json"
        was = read_json(config) if config.exists() else self.config
        changed = [f"{name} was {was.get(name)!s:.24}, is {now!s:.24}"
                   for name, now in self.config.items()
                   if was.get(name) != now and name not in ("model", "clip", "data")]
        if changed:  # those three may have moved: their hashes are compared
            raise ValueError(f"{self.out} cannot go on, give --overwrite or the same arguments: "
                             f"{'; '.join(changed)}")
        if results.exists():
            ended = read_json(results)
            if "test" not in ended:
                raise ValueError(f"{results} is damaged")
            (self.out / "state.safetensors").unlink(missing_ok=True)  # if killed before its end
            return ended
        if (self.out / "trained.safetensors").exists() > (self.out / "state.safetensors").exists():
            raise ValueError(f"{self.out} has weights, but neither state.safetensors nor "
                             "results.json: it cannot go on, --overwrite begins anew")

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Bring model and optimizer to the saved state. Return False if there is none."""
        self.resume = self.resume and first((self.out / "state.safetensors").exists)
        if self.resume:
            moments, at = load_trained(self.out, model, "state.safetensors")
            for name, moment in moments.items():
                parameter, key = name.split()  # "up.weight exp_avg"
                optimizer.state[model.get_parameter(parameter)][key] = moment.to(self.device)
            log = self.out / "metrics.jsonl"
            if first(os.path.getsize, log) < at["log"]:
                raise ValueError(f"{log} or state.safetensors is damaged")
            self.step, self.epochs, self.best = at["step"], at["epochs"], at["best"]
            self.began -= at["seconds"]
            if self.best:
                read_config(self.out)  # an error now, not at the end, if those weights are gone
            first(os.truncate, log, at["log"])
        return self.resume

    def begin(self) -> None:
        """Make the folder this run's: clear it, unless the run goes on. The peak starts anew."""
        if not self.resume:
            first(clear, self.out)
            first(write_json, self.out / "config.json", self.config | self.about)
        reset_peak(self.device)

    def seconds(self) -> float:
        return time.time() - self.began

    def peak(self) -> int:
        return peak_memory(self.device)[0]

    def log(self, row: dict) -> None:
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write all that the next step depends on."""
        at = {"step": self.step, "epochs": self.epochs, "best": self.best,
              "seconds": self.seconds(), "log": first(os.path.getsize, self.out / "metrics.jsonl")}
        moments = {f"{name} {key}": moment for name, p in trainable(model).items()
                   for key, moment in optimizer.state[p].items()}
        first(write_tensors, self.out / "state.safetensors", trainable(model) | moments, at)

    def end_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, val: dict) -> None:
        """Log an epoch's validation scores, keep its weights if they are the best, and save."""
        self.epochs += 1
        self.log({"step": self.step, "epoch": self.epochs, "val": val})
        if self.best is None or quality(val) > quality(self.best["val"]):
            self.best = {"epoch": self.epochs, "val": val}
            first(write_tensors, self.out / "trained.safetensors", trainable(model), self.config)
        self.save(model, optimizer)

    def finish(self, results: dict) -> dict:
        """Write and return the results, with what the run knows of itself; remove the state."""
        peak, kind = peak_memory(self.device)
        results = {**results, "steps": self.step, "best_epoch": self.best["epoch"],
                   "seconds": round(self.seconds(), 1), "peak_memory_bytes": peak,
                   "peak_memory_kind": kind, "val": self.best["val"], **self.about,
                   "config": self.config}
        first(write_json, self.out / "results.json", results)
        first((self.out / "state.safetensors").unlink, True)
        return results
