"""Picture files -> what the frozen CLIP sees in them, computed once and kept on disk (Sec. 4).

    <folder>/**/<key>.jpg --find_images, read_image--> (H, W, 3) --preprocess--> (B, 3, size, size)
    --CLIP, pool--> (B, P, C) --Features.lookup--> (B, N, P, C)

    B batch   N images of an example   P positions of an image   C channels   H, W height and width
"""
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from data import Dataset
from run.files import read_tensors, write_tensors
from run.hub import lock
from run.report import Progress, print0
from vision import scenes
from vision.clip import load_clip, sha256_of_clip

CACHE = Path(os.path.expanduser("~/.cache/ladder-side-tuning/features"))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # Pillow starts other programs for some others
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
VERSION = 2  # of preprocessing and pooling; another number makes all features again
SHARD = 256  # pictures in a file of features: what a killed run loses at most


def find_images(folder: str | Path, keys: Iterable[str]) -> dict[str, Path]:
    """Return {key: its file}: <key>.jpg, .png, ... anywhere below the folder.

    ValueError if one is missing or there twice.
    """
    wanted, found, seen = set(keys), {}, set()
    for place, folders, names in os.walk(os.path.expanduser(folder), followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        if os.path.realpath(place) in seen:  # by a link that leads back
            folders[:], names = [], []
        seen.add(os.path.realpath(place))
        for name in names:
            key, ending = os.path.splitext(name)
            path = Path(place, name)
            if key in wanted and ending.lower() in ENDINGS and found.setdefault(key, path) != path:
                raise ValueError(f"{found[key]} and {path} have the same name; leave one of them")
    missing = sorted(wanted - found.keys())
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} pictures are not below {folder}, among "
                         f"them {missing[0]}.jpg (or {', '.join(ENDINGS[1:])}); put them there")
    return found


def read_image(path: str | Path) -> Tensor:
    """Return a picture, uint8 (H, W, 3). ValueError of one line if it cannot be read.

    As in CLIP's preprocessing, the camera's rotation (EXIF) and colour profiles are not applied.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"{path} needs Pillow: pip install -r requirements-vl.txt") from None
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of damaged EXIF
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # 89 million pixels
            depth = file.read(25)[24:]  # of a PNG: the bits of a sample
            with Image.open(file, formats=FORMATS) as image:
                if getattr(image, "is_animated", False):
                    raise ValueError("it is animated, or several pictures; save one of them")
                key = image.info.get("transparency")  # a colour in the bits of the file
                if image.mode.startswith("I"):  # 16 bits of grey; convert() would cut them at 255
                    grey = np.asarray(image)
                    grey = np.where(grey == key, 255, grey >> 8).astype(np.uint8)
                    return torch.from_numpy(grey)[:, :, None].repeat(1, 1, 3)
                if isinstance(key, int) and image.format == "PNG" and image.mode == "L":
                    image.info["transparency"] = key * 255 // (2**depth[0] - 1)
                if isinstance(key, tuple) and depth == b"\x10":
                    image.info["transparency"] = tuple(value >> 8 for value in key)
                if image.has_transparency_data:
                    # Paper: CLIP's preprocessing drops alpha, and so shows what lies under it.
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image.convert("RGBA"))
                return torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # Pillow has a dozen kinds for a damaged file
        error = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as one of {', '.join(FORMATS)}: {error}") from None


def preprocess(images: Iterable[Tensor], size: int = 224) -> Tensor:
    """Squash pictures, uint8 (H, W, 3), to a square, bicubic, and normalise them as CLIP's were.

    Return float (B, 3, size, size). torch's antialiased resize is within 2 of 255 of Pillow's,
    but for pictures much taller than wide, where Pillow 13 goes down first.
    """
    # Paper: squashed to a square as in its text; the authors' script crops the middle out.
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    squashed = []
    for image in images:
        image = image.permute(2, 0, 1)[None]  # (1, 3, H, W)
        squashed.append(F.interpolate(image, (size, size), mode="bicubic", antialias=True))
    return torch.cat(squashed).float().div_(255).sub_(mean).div_(std)


def pool(tokens: Tensor, g: int = 6) -> Tensor:
    """Max-pool a grid larger than g x g, (B, P, C) -> (B, g * g, C); the paper's 7 x 7 -> 6 x 6."""
    n = math.isqrt(tokens.size(1))
    assert n * n == tokens.size(1), f"the grid {list(tokens.shape)} is not square"
    if n <= g:
        return tokens
    grid = tokens.transpose(1, 2).unflatten(2, (n, n))  # (B, C, n, n)
    return F.adaptive_max_pool2d(grid, g).flatten(2).transpose(1, 2)  # (B, g * g, C)


class Features:
    """What CLIP saw in each picture, on disk, as fp16: RN101's of COCO's 123,287 take 18 GB."""

    def __init__(self):
        self.where: dict[str, tuple[Path, int]] = {}  # key -> file, row
        self.shape: tuple[int, int] | None = None     # P, C
        self.hidden = False  # then CLIP sees nothing: every feature is 0

    def add(self, path: Path) -> None:
        """Add a whole file. ValueError if a byte is not as it was written."""
        tensors, metadata = read_tensors(path)
        self.shape = tuple(tensors["features"].shape[1:])
        self.where |= {key: (path, i) for i, key in enumerate(json.loads(metadata["keys"]))}

    def lookup(self, images: Sequence[tuple[str, ...]]) -> Tensor:
        """Return float (B, N, P, C) for the keys of a batch's pictures, N for each row."""
        B, N, rows = len(images), len(images[0]), []
        if self.hidden:
            return torch.zeros(B, N, *self.shape)
        for path, i in (self.where[key] for keys in images for key in keys):
            with safe_open(path, framework="np") as file:  # left open, it would count as memory
                rows.append(file.get_slice("features")[i:i + 1])
        return torch.from_numpy(np.concatenate(rows)).float().unflatten(0, (B, N))  # (B, N, P, C)


@torch.no_grad()
def features(clip: Callable[[Tensor], Tensor], read: Callable[[str], Tensor], keys: Iterable[str],
             folder: Path, size: int = 224, batch_size: int = 32, device: str = "cpu") -> Features:
    """Run CLIP over the pictures whose features are not in the folder yet; return all features.

    clip: (B, 3, size, size) -> (B, P, C), on `device`; read: key -> uint8 (H, W, 3). A file of
    features is whole or not there; a damaged one is made again.
    """
    found, keys = Features(), list(dict.fromkeys(keys))
    try:
        with lock(folder):
            for path in folder.glob("shard-*.safetensors"):
                try:
                    found.add(path)
                except (ValueError, KeyError):
                    print0(f"{path} is damaged: it is made again")
                    path.unlink()
            missing = [key for key in keys if key not in found.where]
            done = len(keys) - len(missing)
            progress = Progress("CLIP sees pictures", len(keys), begin=done)
            for begin in range(0, len(missing), SHARD):
                shard, rows = missing[begin:begin + SHARD], []
                for i in range(0, len(shard), batch_size):
                    batch = shard[i:i + batch_size]
                    seen = clip(preprocess(map(read, batch), size).to(device))
                    rows.append(pool(seen).half().cpu())
                    if not rows[-1].isfinite().all():
                        raise ValueError(f"CLIP's features of {batch[0]} to {batch[-1]} are not "
                                         "finite in fp16; are its weights whole?")
                    done += len(batch)
                    progress.step(done)
                names = json.dumps(shard)
                path = folder / f"shard-{sha256(names.encode()).hexdigest()[:16]}.safetensors"
                write_tensors(path, {"features": torch.cat(rows)}, {"keys": names})
                found.add(path)
    except OSError as error:
        raise ValueError(f"{folder} takes no features ({error}); make room, or set HOME to a "
                         "folder that can be written to; the finished files stay") from None
    return found


def clip_features(datasets: dict[str, Dataset], clip: str, device: str) -> Features:
    """Return what CLIP sees in all pictures of the tasks, kept in a folder per CLIP and data set.

    A picture that is replaced under its name is not seen again.
    """
    tower, clip_sha256, found = load_clip(clip, device), sha256_of_clip(clip), Features()
    for dataset in datasets.values():
        rows = dataset.train + dataset.val + dataset.test
        keys = sorted({key for example in rows for key in example.images})
        if dataset.name == "scenes":
            origin = dataset.sha256
            read = lambda key: torch.from_numpy(scenes.draw(scenes.scene_of(key)))
        else:
            origin, paths = Path(dataset.folder).resolve(), find_images(dataset.folder, keys)
            read = lambda key: read_image(paths[key])
        name = sha256(f"{VERSION} {clip_sha256} {origin}".encode()).hexdigest()[:16]
        more = features(tower, read, keys, CACHE / name, tower.image_size, device=device)
        found.where, found.shape = found.where | more.where, more.shape
    return found
