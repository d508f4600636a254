"""Files that appear whole or not at all, and notice each byte that is not as it was written."""
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8


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
        with contextlib.suppress(OSError):
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
            raise OSError(f"cannot write {path}: {error}; what was saved before is kept") from None


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
        hasher.update(tensor.flatten().view(uint8).numpy())
    return hasher.hexdigest()
