"""A run's folder: config.json, metrics.jsonl, results.json and trained.safetensors, each written whole or not at all.

trained.safetensors holds what was trained and nothing else; its metadata repeats the run's config with the backbone's sha256,
so the file alone says what it belongs to.
"""
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from download import NotThere, sha256_of
from model import locate


def claim(out: str | None, task: str, method: str, overwrite: bool) -> Path:
    """The folder for a new run; it is made by `prepare`.  ValueError if the given one is not empty."""
    if out is None:
        number = 0
        while Path(f"runs/{task}-{method}-{number}").exists():
            number += 1
        return Path(f"runs/{task}-{method}-{number}")
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file; --out names a folder")
    if not overwrite and Path(out).exists() and any(Path(out).iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or give --overwrite")
    return Path(out)


def prepare(out: Path, config: dict) -> None:
    """Make the folder and write config.json.  Results of an overwritten run go; its weights stay until there are better ones."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("results.json", "metrics.jsonl"):
        (out / stale).unlink(missing_ok=True)
    write_json(out / "config.json", config)


def write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_trained(out: Path, model: nn.Module, config: dict) -> None:
    path, partial = out / "trained.safetensors", out / "trained.safetensors.partial"
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
    save_file(tensors, partial, metadata={"config": json.dumps(config)})
    os.replace(partial, path)


def read_config(out: str | Path) -> dict:
    """The config of the run that left its weights in this folder."""
    path = Path(out) / "trained.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is not there: {out} is not the folder of a run that kept its weights")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})["config"]))
    except (SafetensorError, KeyError, ValueError, TypeError):
        raise ValueError(f"{path} is damaged or was not written by train.py; train again") from None


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
    """Hash of the weights' file; where there are shards, of their index."""
    try:
        path = locate(model, "model.safetensors")
    except NotThere:
        path = None
    if path is None or not path.is_file():
        path = locate(model, "model.safetensors.index.json")
    return sha256_of(path)
