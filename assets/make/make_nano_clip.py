"""Trains the bundled image tower `assets/nano_clip`: a small CLIP, from nothing, on drawn scenes.

    python assets/make/make_nano_clip.py --minutes 40

The tower is CLIP's own ResNet (vision/clip.py), 36 positions of 512 channels for a picture of 192 x
192 pixels. It learns which of a batch's phrases ("star", "small red object") are true of which of
its pictures, each pair for itself (the sigmoid loss of arXiv:2303.15343). A picture is compared
position by position, as in arXiv:2111.07783: CLIP-T5 reads positions, so they are what should know,
and not their mean.
"""
import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from model import Tokenizer, load_tokenizer  # noqa: E402
from run.options import Parser, positive  # noqa: E402
from run.report import Progress, exit_cleanly, hardware  # noqa: E402
from vision import scenes  # noqa: E402
from vision.clip import ModifiedResNet  # noqa: E402
from vision.features import preprocess  # noqa: E402

SIZES = {"image_size": 192, "width": 16, "layers": (1, 1, 1, 1)}
EMBEDDING = 128  # of a position and of a phrase, where they are compared
PALETTE = scenes.COLORS | {"gray": (128, 128, 128), "brown": (150, 60, 36), "teal": (10, 130, 130),
                           "pink": (240, 130, 180)}  # more than the tasks' seven
JITTER = 20  # of each of red, green and blue


class PhraseTower(nn.Module):
    """ids (M, S), 0 where padded -> (M, EMBEDDING).

    A phrase is about one object, so the order of its words tells nothing.
    """

    def __init__(self, vocab_size: int, width: int = 256):
        super().__init__()
        self.words = nn.EmbeddingBag(vocab_size, width, mode="sum", padding_idx=0)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, EMBEDDING))
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.head(self.words(ids)), dim=-1)


class Contrast(nn.Module):
    """Both towers. pictures (B, 3, 192, 192), ids (M, S) -> how true each phrase is, (B, M)"""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.image = ModifiedResNet(**SIZES)
        self.phrases, C = PhraseTower(vocab_size), self.image.channels
        self.head = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, EMBEDDING))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.image(pictures)
        positions = F.normalize(self.head(tokens.float()), dim=-1)  # (B, P, EMBEDDING)
        logits = self.log_scale.exp() * positions @ self.phrases(ids).T + self.bias
        return logits.logsumexp(dim=1)  # (B, M): true of the picture if true of one position


def repaint(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """Colors from the whole palette, each of the scene's to another one."""
    new = dict(zip(scenes.COLORS, rng.sample(list(PALETTE), len(scenes.COLORS))))
    return replace(scene, objects=tuple(replace(o, color=new[o.color]) for o in scene.objects))


def picture_of(scene: scenes.Scene, rng: random.Random) -> tuple[Tensor, scenes.Scene, bool]:
    """A picture, uint8 (H, W, 3), the scene of those objects whose centre it shows, and whether it
    is a stretched part of the whole."""
    palette = {name: tuple(min(255, max(0, value + rng.randint(-JITTER, JITTER))) for value in rgb)
               for name, rgb in PALETTE.items()}
    pixels = torch.from_numpy(scenes.draw(scene, palette))
    if rng.random() >= 0.5:
        return pixels, scene, False
    w, h = rng.randint(24, scenes.SIDE), rng.randint(24, scenes.SIDE)
    x, y = rng.randint(0, scenes.SIDE - w), rng.randint(0, scenes.SIDE - h)
    shown = tuple(o for o in scene.objects if x <= o.x < x + w and y <= o.y < y + h)
    return pixels[y : y + h, x : x + w], replace(scene, objects=shown), True


def truth(each: list[scenes.Scene], phrases: list[str]) -> Tensor:
    """Whether each phrase is true of each scene: (B, M)"""
    return torch.tensor([[tally[phrase] > 0 for phrase in phrases]
                         for tally in map(scenes.tally, each)])


def batch_of(ids: list[str], rng: random.Random) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Pictures (B, 3, 192, 192), M phrases, whether each is true of each picture, and whether that
    counts, (B, M) both.

    In a stretched part it does not count where a part of an object is seen without its centre, nor
    what is called small or big.
    """
    originals = [repaint(scene, rng) for scene in map(scenes.scene_of, ids)]
    pictures, shown, parts = zip(*(picture_of(scene, rng) for scene in originals))
    phrases = sorted({rng.choice(scenes.names(o.size, o.color, o.shape))
                      for scene in originals for o in scene.objects for _ in range(2)})
    sized = torch.tensor([any(size in phrase for size in scenes.RADIUS) for phrase in phrases])
    true, there = truth(shown, phrases), truth(originals, phrases)
    counts = (true == there) & ~(torch.tensor(parts)[:, None] & sized)
    pictures = preprocess(pictures, SIZES["image_size"]).to(memory_format=torch.channels_last)
    return pictures, phrases, true.float(), counts.float()


def token_ids(phrases: list[str], tokenizer: Tokenizer) -> Tensor:
    ids = [torch.tensor(tokenizer.encode(phrase)) for phrase in phrases]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (M, S)


@torch.no_grad()
def examine(model: Contrast, tokenizer: Tokenizer) -> dict[str, float]:
    """On scenes that were never trained on and all 144 names of objects: the share of what is true
    that is found, and of what is found that is true."""
    phrases = sorted({name for size in scenes.RADIUS for color in scenes.COLORS
                      for shape in scenes.OUTLINES for name in scenes.names(size, color, shape)})
    each = [scenes.scene_of(f"val-{i}") for i in range(400)]
    drawn = (torch.from_numpy(scenes.draw(scene)) for scene in each)
    pictures, true = preprocess(drawn, SIZES["image_size"]), truth(each, phrases)
    model.eval()
    ids = token_ids(phrases, tokenizer)
    found = torch.cat([model(part, ids) for part in pictures.split(50)]) > 0
    model.train()
    return {"recall": round(found[true].float().mean().item(), 4),
            "precision": round(true[found].float().mean().item(), 4)}


def train(minutes: float, batch_size: int, lr: float, out: Path) -> dict:
    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), load_tokenizer("nano")
    model = Contrast(tokenizer.vocab_size).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98),
                                  fused=True)
    start, step, log, total = time.time(), 0, [], 60 * minutes
    progress = Progress("tower, second", round(total))

    def write(row: dict) -> None:
        log.append(json.dumps(row) + "\n")
        (out / "training.jsonl").write_text("".join(log), encoding="utf-8")

    out.mkdir(parents=True, exist_ok=True)
    while (passed := (time.time() - start) / total) < 1:
        # scenes behind those of the tasks, so that not one of their pictures was seen here
        ids = [f"train-{10_000 + step * batch_size + i}" for i in range(batch_size)]
        pictures, phrases, true, counts = batch_of(ids, rng)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * passed)) / 2
        logits = model(pictures, token_ids(phrases, tokenizer))
        loss = F.binary_cross_entropy_with_logits(logits, true, counts, reduction="sum")
        loss = loss / batch_size
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.step(min(round(time.time() - start), round(total)))
        if step % 50 == 0:
            write({"step": step, "seconds": round(time.time() - start, 1),
                   "loss": round(loss.item(), 4)}
                  | (examine(model, tokenizer) if step % 500 == 0 else {}))
    save(model.image, out)
    results = {"steps": step, "pictures": batch_size * step, "seconds": round(time.time() - start),
               "hardware": hardware("cpu"), **examine(model, tokenizer)}
    write(results)
    return results


def save(tower: ModifiedResNet, out: Path) -> None:
    """In float16, under open_clip's names, with the size that no tensor tells."""
    weights = {f"visual.{name}": tensor.half().contiguous()
               for name, tensor in tower.state_dict().items() if "num_batches" not in name}
    save_file(weights, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = json.dumps({"model_cfg": {"vision_cfg": SIZES}}, indent=2)
    (out / "open_clip_config.json").write_text(config + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "nano_clip")
    args = parser.parse_args()
    print(exit_cleanly(lambda: train(args.minutes, args.batch_size, args.lr, args.out)))
