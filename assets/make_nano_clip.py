"""Trains the bundled image tower `assets/nano_clip`: a small CLIP, from nothing, on the drawn scenes of scenes.py.

    python assets/make_nano_clip.py --minutes 25

Contrastive (arXiv:2103.00020, Sec. 2.3): among a batch of pictures and descriptions each has to find its own.  Half of a batch are twins of
the other half, which differ in one thing (a colour, a shape, two colours exchanged, left and right or above and below): to tell them apart
the tower must see what stands where.  The tower is clip.py's ViT.  What is compared is the mean of its patch tokens, so that the tokens
that CLIP-T5 reads are trained, not a class token; the text tower is thrown away.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import scenes  # noqa: E402
from clip import ViT, ViTConfig, clip_key  # noqa: E402
from images import preprocess  # noqa: E402
from model import load_tokenizer  # noqa: E402
from report import Parser, guarded, hardware, positive  # noqa: E402

CONFIG = ViTConfig(image_size=scenes.SIDE, patch_size=8, width=192, num_layers=4, num_heads=3, d_ff=768)
EMBEDDING = 128  # of a picture and of a text, where they are compared
LENGTH = 64  # tokens of a description


class TextTower(nn.Module):
    """ids (B, S), 0 where padded -> (B, EMBEDDING)"""

    def __init__(self, vocab_size: int, width: int = 192):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, EMBEDDING))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0)[..., None]
        h = self.blocks(self.embed(ids) + self.positions[: ids.size(1)], src_key_padding_mask=~mask[..., 0])
        return self.head((h * mask).sum(dim=1) / mask.sum(dim=1))


class Contrast(nn.Module):
    """Both towers; the similarity of every picture to every text, (B, B)."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.image, self.text = ViT(CONFIG), TextTower(vocab_size)
        self.head = nn.Sequential(nn.LayerNorm(CONFIG.width), nn.Linear(CONFIG.width, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        x, y = F.normalize(self.head(self.image(pictures).mean(dim=1)), dim=-1), F.normalize(self.text(ids), dim=-1)
        return self.logit_scale.clamp(max=math.log(100)).exp() * x @ y.T


def twin(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The same scene but for one thing."""
    objects, i = list(scene.objects), rng.randrange(len(scene.objects))
    others = [j for j, o in enumerate(objects) if o.color != objects[i].color]
    how = rng.choice(["color", "shape", "across", "down"] + ["exchange"] * 2 * bool(others))
    if how == "exchange":
        j = rng.choice(others)
        objects[i], objects[j] = replace(objects[i], color=objects[j].color), replace(objects[j], color=objects[i].color)
    elif how == "across":
        objects = [replace(o, x=scenes.SIDE - 1 - o.x, tilt=-o.tilt) for o in objects]
    elif how == "down":
        objects = [replace(o, y=scenes.SIDE - 1 - o.y) for o in objects]
    else:
        every = scenes.COLORS if how == "color" else scenes.OUTLINES
        objects[i] = replace(objects[i], **{how: rng.choice([value for value in every if value != getattr(objects[i], how)])})
    return replace(scene, objects=tuple(objects))


def batch_of(ids: list[str], tokenizer, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Pictures (2 B, 3, 64, 64) and descriptions (2 B, S) of B scenes and, behind them, of their twins."""
    originals = [scenes.scene_of(i) for i in ids]
    both = originals + [twin(scene, rng) for scene in originals]
    texts = [tokenizer.encode(scenes.describe(scene))[:LENGTH] for scene in both]
    width = max(map(len, texts))
    return (preprocess((torch.from_numpy(scenes.draw(scene)) for scene in both), scenes.SIDE),
            torch.tensor([text + [0] * (width - len(text)) for text in texts]))


@torch.no_grad()
def examine(model: Contrast, tokenizer) -> dict[str, float]:
    """On scenes that were never trained on: how often a picture finds its text among 400, and how often it prefers its own to its twin's."""
    pictures, ids = batch_of([f"val-{i}" for i in range(400)], tokenizer, random.Random(0))
    model.eval()
    logits = model(pictures, ids)
    model.train()
    own, twins = logits.diag()[:400], logits[:400, 400:].diag()
    return {"found_among_400": (logits[:400, :400].argmax(dim=1) == torch.arange(400)).float().mean().item(),
            "told_from_twin": ((own > twins).float() + 0.5 * (own == twins).float()).mean().item()}


def train(minutes: float, batch_size: int, lr: float, out: Path) -> dict:
    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), load_tokenizer("nano")
    model = Contrast(tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    start, step, log = time.time(), 0, []
    # training scenes behind those of the tasks, so that not one of their pictures was seen here
    while (passed := (time.time() - start) / (60 * minutes)) < 1:
        pictures, ids = batch_of([f"train-{10_000 + step * batch_size + i}" for i in range(batch_size)], tokenizer, rng)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100) * (1 + math.cos(math.pi * passed)) / 2
        logits, labels = model(pictures, ids), torch.arange(2 * batch_size)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            log.append({"step": step, "seconds": round(time.time() - start, 1), "loss": round(loss.item(), 4)} | (examine(model, tokenizer) if step % 500 == 0 else {}))
            print(json.dumps(log[-1]), flush=True)
    results = {"steps": step, "pictures": 2 * batch_size * step, "seconds": round(time.time() - start), "hardware": hardware("cpu"), **examine(model, tokenizer)}
    save(model.image, out)
    (out / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*log, results]), encoding="utf-8")
    return results


def save(tower: ViT, out: Path) -> None:
    """Under the names of Hugging Face, in float16."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({clip_key(name, 2)[0]: tensor.half().contiguous() for name, tensor in tower.state_dict().items()}, out / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": CONFIG.width, "num_hidden_layers": CONFIG.num_layers, "num_attention_heads": CONFIG.num_heads, "intermediate_size": CONFIG.d_ff,
             "image_size": CONFIG.image_size, "patch_size": CONFIG.patch_size, "hidden_act": CONFIG.activation}
    (out / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **sizes}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch-size", type=positive, default=128, help="scenes; with their twins there are twice as many pictures")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "nano_clip")
    arguments = parser.parse_args()
    print(guarded(lambda: train(arguments.minutes, arguments.batch_size, arguments.lr, arguments.out)))
