"""Picture files -> what a frozen CLIP sees in them, computed once and kept on the disk (Sec. 4, "Vision-and-language").

    <folder>/**/<key>.jpg --find_images, read_image--> (H, W, 3) --preprocess--> (B, 3, size, size) --CLIP, pool--> Features (B, N, P, C)

    B batch   N images of an example   P positions of an image   C channels   H, W height and width of a picture

CLIP never trains, so training reads its features alone.  Pillow is needed for picture files only (requirements-vl.txt).
"""
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import read_tensors, write_tensors
from clip import CLIP_MEAN, CLIP_STD
from download import one_at_a_time
from report import Progress, say

CACHE = Path(os.path.expanduser("~/.cache/ladder-side-tuning/features"))
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # Pillow knows more, for some of which it starts other programs
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
MAX_PIXELS = 2**26                               # of one picture: 8192 x 8192, 200 MB
VERSION = 1                                      # of preprocessing and pooling; another number makes all features again
SHARD = 256                                      # pictures in a file of features, what a killed run loses at most: 38 MB for RN101


# -------------------------------------------------------------------------------------------------------------- pictures

def find_images(folder: str | Path, keys: Iterable[str]) -> dict[str, Path]:
    """key -> its file, <key>.jpg, .png, ..., anywhere below the folder.  ValueError if one is missing or there twice."""
    wanted, found, seen = set(keys), {}, set()
    for place, folders, names in os.walk(os.path.expanduser(folder), followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            key, ending = os.path.splitext(name)
            if key in wanted and ending.lower() in ENDINGS:
                if key in found:
                    raise ValueError(f"{found[key]} and {Path(place, name)} have the same name; leave one of them in {folder}")
                found[key] = Path(place, name)
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{len(missing)} of {len(wanted)} pictures are not in {folder}, among them {missing[0]}{ENDINGS[0]} "
                         f"(or {', '.join(ENDINGS[1:])}); put them there or into {Path(folder, 'images')}, in sub-folders or not")
    return found


def read_image(path: str | Path) -> Tensor:
    """A picture file, from 1 x 1 to MAX_PIXELS pixels -> uint8 (H, W, 3).  ValueError of one line if it is damaged, animated or no picture.

    As CLIP's preprocessing: the camera's rotation (EXIF) and colour profiles are not applied.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError(f"{path}: reading pictures needs Pillow; pip install -r requirements-vl.txt") from None
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # Pillow's about damaged EXIF, and about the size, which is checked here
            if not os.path.isfile(path) or os.path.getsize(path) == 0:
                raise ValueError("it is empty")
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
                if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's JPEG with a preview behind it
                    raise ValueError("it is animated; save one of its frames")
                if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255 and so make white
                    return torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8)[:, :, None].repeat(3, axis=2))
                if image.has_transparency_data:
                    # Paper: CLIP's preprocessing drops alpha and so shows what happens to lie under it; ours lays the picture on white.
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return torch.from_numpy(np.array(image.convert("RGB")))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is damaged or no picture of the kinds {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow has a dozen kinds for a damaged file
        error = getattr(error, "strerror", None) or error  # without the file's name again
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}") from None


def preprocess(images: Iterable[Tensor], size: int = 224) -> Tensor:
    """Pictures of any sizes, uint8 (H, W, 3) -> float (B, 3, size, size), squashed, bicubic, and normalised as CLIP was trained.

    torch's antialiased resize of bytes, across and then down, is within 2 of 255 of Pillow's.  Only where a picture is much taller than
    wide does Pillow 13 go down first, which at sharp edges differs by up to 14 in photographs and 22 in noise.
    """
    # Paper: squashed to a square as in its text; the authors' script for features crops the middle out instead.
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    squashed = []
    for image in images:
        assert image.dtype == torch.uint8 and image.ndim == 3 and image.size(2) == 3, \
            f"a picture is uint8 ['H', 'W', 3], not {image.dtype} {list(image.shape)}"
        squashed.append(F.interpolate(image.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True))  # (1, 3, size, size)
    return torch.cat(squashed).float().div_(255).sub_(mean).div_(std)


# -------------------------------------------------------------------------------------------------------------- features

def pool(tokens: Tensor, g: int = 6) -> Tensor:
    """Adaptive max pooling of a square grid to g x g, (B, P, C) -> (B, g * g, C); a grid that is not larger stays as it is."""
    n = math.isqrt(tokens.size(1))
    assert tokens.ndim == 3 and n * n == tokens.size(1), f"CLIP must give a square grid {['B', 'n * n', 'C']}, not {list(tokens.shape)}"
    if n <= g:
        return tokens
    grid = tokens.transpose(1, 2).unflatten(2, (n, n))  # (B, C, n, n)
    return F.adaptive_max_pool2d(grid, g).flatten(2).transpose(1, 2)  # (B, g * g, C)


class Features:
    """What CLIP saw in each picture, on the disk.  `lookup` reads the rows that it is asked for; mapped memory would count as the run's."""

    def __init__(self):
        self.where: dict[str, tuple[Path, int]] = {}  # key -> file, and where in it
        self.shape: tuple[int, int] | None = None     # P, C
        self.hidden = False                           # then every picture is blank: all that CLIP saw is 0

    def add(self, path: Path, keys: Sequence[str], tensor: Tensor) -> None:
        """The rows of a shard, whose only tensor lies at its end.  tensor (len(keys), P, C)"""
        if self.shape not in (None, tuple(tensor.shape[1:])):
            raise ValueError(f"{path} would have features {list(tensor.shape[1:])}, those beside it {list(self.shape)}; give another folder")
        self.shape, start = tuple(tensor.shape[1:]), path.stat().st_size - tensor.nbytes
        self.where |= {key: (path, start + i * tensor[0].nbytes) for i, key in enumerate(keys)}

    def lookup(self, images: Sequence[tuple[str, ...]]) -> Tensor:
        """Example.images of a batch -> float (B, N, P, C)"""
        B, N = len(images), len(images[0])
        assert all(len(keys) == N for keys in images), "a batch is of one task, so its examples have the same number of pictures"
        if self.hidden:
            return torch.zeros(B, N, *self.shape)
        rows = np.empty((B * N, *self.shape), dtype=np.float16)
        for row, key in zip(rows, itertools.chain(*images)):
            path, start = self.where[key]
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                if file.readinto(row) != row.nbytes:
                    raise ValueError(f"{path} was cut while it was in use; start again")
        return torch.from_numpy(rows).float().unflatten(0, (B, N))  # (B, N, P, C)


@torch.no_grad()
def features(clip: Callable[[Tensor], Tensor], read: Callable[[str], Tensor], keys: Iterable[str], folder: str | Path, made_by: str,
             size: int = 224, g: int = 6, batch_size: int = 32, device: str = "cpu") -> Features:
    """Runs CLIP over the pictures whose features are not in the folder yet, and hands out all of them.

    clip: (B, 3, size, size) -> (B, P, C), on `device`; read: key -> uint8 (H, W, 3); made_by: what says whose features these are, CLIP's hash
    and where the pictures come from.  A shard is whole or not there; one that is damaged or made by something else is made again.

    Stored as fp16: RN101's of COCO's 123,287 pictures take 18 GB, in fp32 36.  Its error, 2^-11 of a value, is below that of CLIP in bf16.
    """
    keys, folder = list(dict.fromkeys(keys)), Path(os.path.expanduser(folder))
    origin = json.dumps({"made_by": made_by, "size": size, "g": g, "version": VERSION})
    with one_at_a_time(folder):
        for partial in folder.glob("shard-*.partial"):  # of a run that was killed
            partial.unlink()
        found, bad = Features(), []
        for path in sorted(folder.glob("shard-*.safetensors")):
            try:
                found.add(path, *_open(path, origin))
            except ValueError:
                bad.append(path)
        if bad:
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            say(f"{folder}: {bad[0].name}{others} made again, because damaged or from another CLIP or other pictures")
        for path in bad:
            path.unlink()
        missing = [key for key in keys if key not in found.where]
        done = len(keys) - len(missing)
        progress = Progress("CLIP sees pictures", len(keys), begin=done)
        names = (path for path in (folder / f"shard-{i:05d}.safetensors" for i in itertools.count()) if not path.exists())
        for begin in range(0, len(missing), SHARD):
            of_shard, rows = missing[begin:begin + SHARD], []
            for i in range(0, len(of_shard), batch_size):
                batch = of_shard[i:i + batch_size]
                rows.append(pool(clip(preprocess(map(read, batch), size).to(device)), g).half().cpu())
                if not rows[-1].isfinite().all():
                    raise ValueError(f"CLIP's features of the pictures {batch[0]} to {batch[-1]} are not finite in fp16; are its weights whole?")
                if begin == i == 0 and (needed := len(missing) * rows[0][0].nbytes) > (free := shutil.disk_usage(folder).free):
                    raise ValueError(f"{folder} has room for {free / 1e9:.1f} GB, the features of {len(missing)} pictures take {needed / 1e9:.1f} GB")
                done += len(batch)
                progress.step(done)
            path, tensor = next(names), torch.cat(rows)
            try:
                write_tensors(path, {"features": tensor}, {"origin": origin, "keys": json.dumps(of_shard)})
            except OSError as error:
                raise ValueError(f"{folder} takes no more features ({error}); make room and start again, the finished files stay") from None
            found.add(path, of_shard, tensor)
    return found


def _open(path: Path, origin: str) -> tuple[list[str], Tensor]:
    """A shard's keys and features.  ValueError if a byte is not as it was written, or it was made by something else."""
    tensors, metadata = read_tensors(path)
    keys, tensor = json.loads(metadata.get("keys", "[]")), tensors.get("features")
    if metadata.get("origin") != origin or tensor is None or tensor.dtype != torch.float16 or tensor.ndim != 3 or len(tensor) != len(keys):
        raise ValueError(f"{path} was made by something else")
    return keys, tensor
