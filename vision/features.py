"""Picture files -> what the frozen CLIP sees in them, computed once and kept on disk (Sec. 4).

    <folder>/**/<key>.jpg --find_images, read_image--> (H, W, 3) --preprocess--> (B, 3, size, size)
    --CLIP, pool--> (B, P, C) --Features.lookup--> (B, N, P, C)

    B batch   N images of an example   P positions of an image   C channels   H, W height and width
"""
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from glob import iglob
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from data import Dataset
from run.folder import lock, read_tensors, write_tensors
from run.hub import sha256_of
from run.report import Progress
from vision import scenes
from vision.clip import clip_files, load_clip

CACHE = Path(os.path.expanduser("~/.cache/ladder-side-tuning/features"))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # Pillow starts other programs for some others
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
SHARD = 32  # pictures that CLIP sees at once, and that a file of features has


def find_images(folder: str | Path, keys: Iterable[str]) -> dict[str, Path]:
    """Return {key: <key>.jpg, .png, ... below the folder}. ValueError: one of `keys` is missing."""
    paths = (Path(folder, name) for name in iglob("**", root_dir=folder, recursive=True))
    found = {path.stem: path for path in paths if path.suffix.lower() in ENDINGS}
    if missing := sorted(set(keys) - found.keys()):
        raise ValueError(f"{len(missing)} pictures are not below {folder}, among them "
                         f"{missing[0]}.jpg (or {', '.join(ENDINGS[1:])}); put them there")
    return found


def read_image(path: str | Path) -> Tensor:
    """Return a picture, uint8 (H, W, 3), without EXIF's rotation. What an alpha channel, a palette
    or a key makes transparent (no key of 16-bit colour) is white. ValueError: it is unreadable."""
    try:
        from PIL import Image
        with Image.open(path, formats=FORMATS) as image:
            key, depth = image.info.get("transparency"), image.tile and image.tile[0].args
            if key and depth in ("L;2", "L;4"):  # Pillow scales the greys to 8 bits, not the key
                image.info["transparency"] = key * (85 if depth == "L;2" else 17)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
                grey = np.asarray(image)
                image = Image.fromarray((grey >> 8).astype(np.uint8))
                image.putalpha(Image.fromarray(grey != key))
            # Paper: CLIP's preprocessing drops alpha, and so shows what lies under it.
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
            return torch.from_numpy(np.array(image.convert("RGB")))
    except ImportError:
        raise ValueError(f"{path} needs Pillow: pip install -r requirements-vl.txt") from None
    except Exception as error:  # Pillow has a dozen kinds for a damaged file
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from None


def preprocess(images: Iterable[Tensor], size: int = 224) -> Tensor:
    """Squash pictures, uint8 (H, W, 3), to a square, bicubic as Pillow to 2 of 255, and normalise
    them as CLIP's were. Return float (B, 3, size, size)."""
    # Paper: squashed to a square as in its text; the authors' script crops the middle out.
    squares = [F.interpolate(image.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
               for image in images]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (torch.cat(squares).float() / 255 - mean) / std


def pool(tokens: Tensor, g: int = 6) -> Tensor:
    """Max-pool a grid larger than g x g, (B, P, C) -> (B, g * g, C); the paper's 7 x 7 -> 6 x 6."""
    n = round(tokens.size(1) ** 0.5)
    grid = tokens.transpose(1, 2).unflatten(2, (n, n))  # (B, C, n, n)
    return F.adaptive_max_pool2d(grid, min(n, g)).flatten(2).transpose(1, 2)  # (B, g * g, C)


class Features:
    """What CLIP saw in each picture, on disk, as fp16: RN101's of COCO's 123,287 take 18 GB."""

    def __init__(self):
        self.paths: dict[str, Path] = {}  # key -> the file that has its (P, C)
        self.hidden = False  # then CLIP sees nothing: every feature is 0

    def fill(self, folder: Path, keys: Iterable[str], see: Callable[[list[str]], Tensor]) -> None:
        """Add a folder's pictures. see(keys) -> (B, P, C) is called for those that it lacks."""
        with lock(folder):
            for path in folder.glob("shard-*.safetensors"):
                with suppress(ValueError):  # a damaged file: its pictures are missing
                    self.paths |= dict.fromkeys(read_tensors(path)[0], path)
            missing = [key for key in keys if key not in self.paths]
            progress = Progress("CLIP sees pictures", len(missing))
            for i in range(0, len(missing), SHARD):
                shard = missing[i:i + SHARD]
                path = folder / f"shard-{shard[0]}.safetensors"  # no whole file has this picture
                write_tensors(path, dict(zip(shard, see(shard).half())), {})
                self.paths |= dict.fromkeys(shard, path)
                progress.step(i + len(shard))

    def lookup(self, images: Sequence[tuple[str, ...]]) -> Tensor:
        """Return float (B, N, P, C) for the keys of a batch's pictures, N for each row."""
        seen = []
        for key in (key for keys in images for key in keys):
            with safe_open(self.paths[key], framework="pt") as file:  # open, it counts as memory
                seen.append(file.get_tensor(key))
        seen = torch.stack(seen).float().unflatten(0, (len(images), -1))  # (B, N, P, C)
        return torch.zeros_like(seen) if self.hidden else seen


def clip_features(datasets: dict[str, Dataset], clip: str, device: str) -> Features:
    """Return what CLIP sees in all pictures of the tasks, kept in a folder per CLIP and data set. A
    picture that is replaced under its name is not seen again."""
    tower, clip_sha256, found = load_clip(clip, device), sha256_of(*clip_files(clip)), Features()
    for dataset in datasets.values():
        rows = dataset.train + dataset.val + dataset.test
        keys = sorted({key for example in rows for key in example.images})
        if dataset.name == "scenes":
            origin = dataset.sha256
            read = lambda key: torch.from_numpy(scenes.draw(scenes.scene_of(key)))
        else:
            origin, paths = Path(dataset.folder).resolve(), find_images(dataset.folder, keys)
            read = lambda key: read_image(paths[key])
        see = lambda some: pool(tower(preprocess(map(read, some), tower.image_size).to(device)))
        folder = CACHE / sha256(f"{clip_sha256} {origin}".encode()).hexdigest()[:16]
        found.fill(folder, keys, see)
    return found
