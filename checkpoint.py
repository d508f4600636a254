"""A run's folder, in which a run can be cut off at any moment and go on to the same result.

    config.json           what was asked for, and where it runs; a resume must ask for the same
    metrics.jsonl         the log, one line a step and one an epoch
    state.safetensors     while it runs: all that the next step depends on
    trained.safetensors   what was trained, as it was after the best epoch; its metadata repeats the config, so the file says what it belongs to
    results.json          when it has ended

Each file but the log appears whole or not at all, and takes the place of its predecessor in one step.  The log is cut back to where
the state was saved.
"""
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from download import sha256_of
from model import brief, locate, weight_files

FILES = ("state.safetensors", "results.json", "results.md", "trained.safetensors", "metrics.jsonl", "config.json")
# what `train.load` takes from a run's config
NEEDED = {"task": str, "model": str, "method": str, "prompts": str, "dtype": str, "gates": str, "backbone_sha256": str, "r": int, "keep": (list, type(None)),
          "as_authors": bool, "freeze": int, "checkpoint": bool, "clip": str, "clip_sha256": str, "blank": bool, "dropout": (float, type(None))}
# what a run of an earlier version, which did not have them, stands for
LATER = {"as_authors": False, "freeze": 0, "checkpoint": False, "clip": "nano", "clip_sha256": "", "blank": False, "dropout": None}


# ---------------------------------------------------------------------------------------------------------------- folder

def check_folder(out: str | None, overwrite: bool, resume: bool = False) -> None:
    """ValueError if a run could not go into this folder; nothing is made yet."""
    path = Path(out or "runs")
    if str(path) != str(path).encode("utf-8", "ignore").decode():
        raise ValueError(f"the name {str(path)!r} is no UTF-8 text; choose another --out")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{out} is a link that leads nowhere; choose another --out")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a run needs a folder")
    if any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json", "spiece.model")):
        raise ValueError(f"{out} holds a backbone, which a run would overwrite: choose another --out")
    held = {file.name for file in path.iterdir() if file.suffix != ".partial"} if out and path.exists() else set()
    if held and not overwrite and not resume:
        raise ValueError(f"{out} is not empty: choose another --out, or give --resume to go on with the run in it, or --overwrite")
    if held and resume and "config.json" not in held:
        raise ValueError(f"{out} holds no run that could go on: choose another --out, or give --overwrite")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{path} cannot be made: {there} is no folder that can be written to")


def new_folder(name: str) -> Path:
    """The first free runs/<name>-<number>."""
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            path = Path(f"runs/{name}-{number}")
            path.mkdir(parents=True)  # also decides between two runs that start together
            return path


@contextlib.contextmanager
def claim(path: Path, rank: int = 0) -> Iterator[None]:
    """The folder belongs to this run alone; a lock of a process that died is no lock.  Left empty, it is taken away again.
    Of several processes the one of rank 0 holds it for all."""
    if rank:
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run works in {path}: wait for it, or choose another --out") from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
    finally:
        os.close(folder)


def clear(path: Path) -> None:
    """Take away what an earlier run left; other files stay."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------- files that are whole

@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary file to write; then it is brought to the disk and takes the place of `path`.  On an error `path` is as it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged; train again, with --overwrite")
    return content


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with appearing(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata | {"sha256": _digest(tensors, metadata)})
        except SafetensorError as error:
            raise OSError(f"{partial} could not be written: {error}; what was saved before is kept") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.  ValueError if a byte is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was not written by train.py ({str(error).splitlines()[0][:80]}); train again") from None
    written = metadata.pop("sha256", None)
    if written != _digest(tensors, metadata) and not (written is None and list(metadata) == ["config"]):  # a run of the first version has none
        raise ValueError(f"{path} is damaged: its bytes are not those that were written; train again")
    return tensors, metadata


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- what was trained

def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_trained(out: Path, model: nn.Module, config: dict) -> None:
    write_tensors(out / "trained.safetensors", trainable(model), {"config": json.dumps(config)})


def read_config(out: str | Path) -> dict:
    """The config of the run that left its weights in this folder."""
    path = Path(out) / "trained.safetensors"
    if not path.is_file():
        inside = sorted(folder.parent.name for folder in Path(out).glob("*/trained.safetensors"))
        hint = f"; it holds several: {', '.join(inside[:4])}" if inside else ""
        raise ValueError(f"{path} is not there: {out} is not the folder of a run that kept its weights{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            config = LATER | json.loads((file.metadata() or {})["config"])
        fits = all(isinstance(config[name], kind) and isinstance(config[name], bool) == (kind is bool) for name, kind in NEEDED.items())
        fits = fits and all(type(i) is int for i in config["keep"] or [])
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged or was not written by train.py; train again")
    return config


def load_trained(out: str | Path, model: nn.Module) -> None:
    """Fill what trains in `model`, strictly: ValueError if names or shapes differ, or a byte is damaged."""
    path = Path(out) / "trained.safetensors"
    _fill(path, trainable(model), read_tensors(path)[0])


@torch.no_grad()
def _fill(path: Path, own: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    misshapen = [name for name, tensor in own.items() if name in found and (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype)]
    if missing or unexpected or misshapen:
        raise ValueError(f"{path} does not fit: missing {missing[:3]}, unexpected {brief.repr(unexpected[:3])}, misshapen {misshapen[:3]}")
    for name, tensor in own.items():
        tensor.copy_(found[name])


def sha256_of_backbone(model: str) -> str:
    """One hash over config.json, spiece.model and the weights."""
    return sha256_of(locate(model, "config.json"), locate(model, "spiece.model"), *weight_files(model))


# ----------------------------------------------------------------------------------------------------------------- state

@dataclass
class Position:
    """How far a run is.  Learning rate, order of the rows and every random number are functions of seed and step, so the step says them all."""

    step: int = 0                # optimizer steps made
    epochs: int = 0              # epochs evaluated
    best: dict | None = None     # epoch and validation scores of what trained.safetensors holds
    seconds: float = 0.0         # that all of this took, over all resumes
    log: int = 0                 # bytes of metrics.jsonl
    peak: int = 0                # of memory, in bytes
    began: float = 0.0           # time.time() when it would have begun without the interruptions


def save_state(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, at: Position) -> None:
    """All that the next step depends on: weights, Adam's moments, the position."""
    moments = {f"{key} {name}": value for name, p in trainable(model).items() for key, value in optimizer.state[p].items()}
    write_tensors(out / "state.safetensors", trainable(model) | moments, {"position": json.dumps(asdict(at))})


def load_state(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Model and optimizer are as they were there.  ValueError if the file is damaged or does not fit, or what it counts on is gone."""
    path, own = out / "state.safetensors", trainable(model)
    found, metadata = read_tensors(path)
    _fill(path, own, {name: found.pop(name) for name in own if name in found})
    state = {i: {key: found.pop(f"{key} {name}") for key in ("step", "exp_avg", "exp_avg_sq") if f"{key} {name}" in found} for i, name in enumerate(own)}
    if found:
        raise ValueError(f"{path} does not fit: unexpected {sorted(found)[:3]}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {i: moments for i, moments in state.items() if moments}})
    try:
        at = Position(**json.loads(metadata["position"]))
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path} is not the state of a run; give --overwrite to begin anew") from None
    log = out / "metrics.jsonl"
    if not log.is_file() or log.stat().st_size < at.log or (at.best and not (out / "trained.safetensors").is_file()):
        raise ValueError(f"{out} cannot go on: its metrics.jsonl or trained.safetensors is gone or cut; give --overwrite to begin anew")
    return at


def check_same(out: Path, config: dict) -> None:
    """A run goes on only as it began.  ValueError with the list of what is not the same; where the files lie may change.
    Of a table each run is checked when its turn comes."""
    was = read_json(out / "config.json")
    if ("seeds" in was) != ("seeds" in config):
        raise ValueError(f"{out} cannot go on so: {'a table of several runs' if 'seeds' in was else 'a single run'} is in it; "
                         "give its own arguments, or another --out")
    if was.keys() - {"command", "versions", "hardware", "seconds", "peak_memory_bytes", "peak_memory_kind"} != config.keys():
        raise ValueError(f"{out} cannot go on: its config.json was not written by this version of train.py; choose another --out")
    if "seeds" in config:
        return
    changed = [f"{name.replace('_', ' ')} was {str(was.get(name))[:24]}, is {str(value)[:24]}" for name, value in config.items()
               if name not in ("model", "clip", "data") and was.get(name) != value]
    if changed:
        raise ValueError(f"{out} cannot go on, because the run in it was asked for with other arguments: {'; '.join(changed)}; "
                         "give the same ones, or --overwrite")
