"""A run's folder. A run can be killed at any moment and goes on to the same result.

    config.json           the run's arguments, and where it runs; a resume must give the same
    metrics.jsonl         the log: a line per step and one per epoch
    state.safetensors     while it runs: all that the next step depends on
    trained.safetensors   what trains, after the best epoch; its metadata holds the config, too
    results.json          when it has ended
"""
import contextlib
import fcntl
import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from run.files import read_json, read_tensors, to_disk, write_json, write_tensors
from run.processes import first, rank
from run.report import peak_memory, reset_peak

FILES = ("state.safetensors", "results.json", "results.md", "trained.safetensors",
         "metrics.jsonl", "config.json")


def check_folder(out: str | Path | None, overwrite: bool, resume: bool) -> None:
    """ValueError if a run must not go into this folder. None: a new one will be made."""
    files = Path(out).iterdir() if out and Path(out).exists() else ()
    held = {file.name for file in files if file.suffix != ".partial"}
    if held & {"model.safetensors", "model.safetensors.index.json", "spiece.model"}:
        raise ValueError(f"{out} holds a backbone: choose another --out")
    if held and not overwrite and not resume:
        raise ValueError(f"{out} is not empty: choose another --out, or give --resume to go on "
                         "with the run in it, or --overwrite")
    if held and resume and "config.json" not in held:
        raise ValueError(f"{out} holds no run that could go on: choose another --out")


def new_folder(name: str) -> Path:
    """Make the first free runs/<name>-<number>."""
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            path = Path(f"runs/{name}-{number}")
            path.mkdir(parents=True)  # also decides between two runs that start together
            return path


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the folder for this run. A lock ends with its process; an empty folder is removed."""
    def acquire() -> int:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path} cannot be written to: choose another --out")
        folder = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run works in {path}: choose another --out") from None
        except OSError:
            pass  # some network file systems have no locks
        return folder

    folder = first(acquire)
    try:
        yield
    finally:
        if rank() == 0:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
            os.close(folder)


def clear(out: Path) -> None:
    """Remove what an earlier run left; other files stay."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------- what was trained

def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read_config(out: str | Path) -> dict:
    """Return the config of the run that left its weights in this folder."""
    path = Path(out) / "trained.safetensors"
    _, metadata = read_tensors(path)
    if "config" not in metadata:
        raise ValueError(f"{path} is not what a run has kept: {out} cannot be used")
    return json.loads(metadata["config"])


def load_trained(out: str | Path, model: nn.Module) -> None:
    """Fill what trains in `model`. ValueError if names, shapes or bytes are not those saved."""
    path = Path(out) / "trained.safetensors"
    fill(path, trainable(model), read_tensors(path)[0])


@torch.no_grad()
def fill(path: Path, own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    ours, theirs = ({(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
                    for tensors in (own, found))
    if ours != theirs:
        wrong = sorted({name for name, *_ in ours ^ theirs})
        raise ValueError(f"{path} does not fit: missing, unexpected or misshapen {wrong[:3]}")
    for name, tensor in own.items():
        tensor.copy_(found[name])


# ------------------------------------------------------------------------------------------ the run

class Run:
    """A run in its folder: where it stands, its log, its state, its results.

    Learning rate, order of rows and random numbers are functions of seed and step, so the state is
    the weights, Adam's moments and a few numbers. Every process calls every method; the first one
    writes, and its error is raised in all.
    """

    def __init__(self, out: Path, config: dict, about: dict, resume: bool,
                 device: str = "cpu", began: float | None = None):
        """config: what a resume must repeat; about: command, versions, hardware; began: a time().
        `results` are those of a run that has ended, else None."""
        self.out, self.config, self.about, self.device = out, config, about, device
        self.resume, self.began = resume, began or time.time()
        self.step = self.epochs = 0  # optimizer steps made, epochs evaluated
        self.best = None             # {"epoch": n, "val": {...}} of trained.safetensors
        self.earlier_peak = 0        # bytes, before the interruption
        self.results = first(self._earlier_results) if resume else None

    def _earlier_results(self) -> dict | None:
        if (self.out / "config.json").exists():
            was = read_json(self.out / "config.json")
            changed = [f"{name} was {was.get(name)!s:.24}, is {now!s:.24}"
                       for name, now in self.config.items()
                       if was.get(name) != now and name not in ("model", "clip", "data")]
            if changed:  # model, clip and data may have moved: their hashes are compared
                raise ValueError(f"{self.out} cannot go on, because its run had other arguments: "
                                 f"{'; '.join(changed)}; give the same ones, or --overwrite")
        if (self.out / "results.json").exists():
            results = read_json(self.out / "results.json")
            (self.out / "state.safetensors").unlink(missing_ok=True)
            return results

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Bring model and optimizer to the saved state. Return False if there is none."""
        path, log = self.out / "state.safetensors", self.out / "metrics.jsonl"
        self.resume = self.resume and first(path.exists)
        if not self.resume:
            return False
        found, metadata = read_tensors(path)
        at = json.loads(metadata.get("position", "{}"))
        whole = at and log.is_file() and log.stat().st_size >= at["log"]
        if not whole or (at["best"] and not (self.out / "trained.safetensors").is_file()):
            raise ValueError(f"{self.out} cannot go on: state.safetensors, trained.safetensors or "
                             "metrics.jsonl is gone or not its own; --overwrite begins anew")
        first(os.truncate, log, at["log"])
        fill(path, trainable(model), {name: found[name] for name in found if " " not in name})
        state = defaultdict(dict)
        for name in found.keys() - trainable(model).keys():
            i, key = name.split()  # "3 exp_avg": of the fourth tensor that trains
            state[int(i)][key] = found[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
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
        def write() -> None:
            log = self.out / "metrics.jsonl"
            to_disk(log)
            at = {"step": self.step, "epochs": self.epochs, "best": self.best, "log":
                  log.stat().st_size, "peak": self.peak(), "seconds": self.seconds()}
            moments = {f"{i} {key}": value for i, of_one in optimizer.state_dict()["state"].items()
                       for key, value in of_one.items()}
            write_tensors(self.out / "state.safetensors", trainable(model) | moments,
                          {"position": json.dumps(at)})
        first(write)

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
