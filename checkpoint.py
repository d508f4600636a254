"""A run's folder: config.json, results.json and trained.safetensors, each written whole or not at all, and the log metrics.jsonl.

trained.safetensors holds what was trained and nothing else; its metadata repeats the run's config with the backbone's sha256,
so the file alone says what it belongs to.
"""
import itertools
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from download import sha256_of
from model import locate, weight_files

# what `train.load` takes from a run's config
NEEDED = {"task": str, "model": str, "method": str, "prompts": str, "dtype": str, "gates": str, "backbone_sha256": str, "r": int, "keep": (list, type(None)),
          "as_authors": bool, "freeze": int, "checkpoint": bool}
LATER = {"as_authors": False, "freeze": 0, "checkpoint": False}  # what a run of the first version, which did not have them, stands for


def check_folder(out: str | None, overwrite: bool) -> None:
    """ValueError if a run could not go into this folder; nothing is made yet."""
    path = Path(out or "runs")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a run needs a folder")
    if any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json", "spiece.model")):
        raise ValueError(f"{out} holds a backbone, which a run would overwrite: choose another --out")
    if out and not overwrite and path.exists() and any(path.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or give --overwrite")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{path} cannot be made: {there} is no folder that can be written to")


def make_folder(out: str | None, task: str, method: str) -> Path:
    """The run's folder, without what an overwritten run left; by default the first free runs/<task>-<method>-<number>."""
    if out is None:
        for number in itertools.count():
            try:
                path = Path(f"runs/{task}-{method}-{number}")
                path.mkdir(parents=True)  # also decides between two runs that start together
                return path
            except FileExistsError:
                pass
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    for stale in ("config.json", "metrics.jsonl", "results.json", "trained.safetensors"):
        (path / stale).unlink(missing_ok=True)
    return path


def write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_trained(out: Path, model: nn.Module, config: dict) -> None:
    path, partial = out / "trained.safetensors", out / "trained.safetensors.partial"
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
    try:
        save_file(tensors, partial, metadata={"config": json.dumps(config)})
    except SafetensorError as error:
        raise OSError(f"{partial} could not be written: {error}") from None
    os.replace(partial, path)


def read_config(out: str | Path) -> dict:
    """The config of the run that left its weights in this folder."""
    path = Path(out) / "trained.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is not there: {out} is not the folder of a run that kept its weights")
    try:
        with safe_open(path, framework="pt") as file:
            config = LATER | json.loads((file.metadata() or {})["config"])
        fits = all(isinstance(config[name], kind) for name, kind in NEEDED.items()) and all(type(i) is int for i in config["keep"] or [])
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged or was not written by train.py; train again")
    return config


def load_trained(out: str | Path, model: nn.Module) -> None:
    """Fill what trains in `model`, strictly: ValueError if names or shapes differ."""
    path, own = Path(out) / "trained.safetensors", trainable(model)
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        misshapen = [name for name, p in own.items() if name in found and found[name] != list(p.shape)]
        if missing or unexpected or misshapen:
            raise ValueError(f"{path} does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}, misshapen {misshapen[:3]}")
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(file.get_tensor(name))


def sha256_of_backbone(model: str) -> str:
    """One hash over config.json, spiece.model and the weights."""
    return sha256_of(locate(model, "config.json"), locate(model, "spiece.model"), *weight_files(model))
