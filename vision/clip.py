"""CLIP's image towers (arXiv:2103.00020, Sec. 2.4), frozen: an image becomes P visual tokens.

    ModifiedResNet   images --> stem of 3 convolutions --> 4 stages of bottlenecks --> (B, P, C)
    ViT              images --> patches, class token, positions --> norm --> blocks --> (B, P, C)

    B batch   P image positions, row by row   C channels   H heads   K head width (C / H)
    h, w height and width of an image or a map

CLIP's pooled embedding, which is compared with texts, is not built: CLIP-T5 reads positions.
"""
import inspect
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import read_weights, weight_files
from run.hub import hub_file, sha256_of

CLIP_PUBLIC = {  # name: repository, revision, weights, their sha256
    "clip-rn101": ("timm/resnet101_clip.openai", "main", "open_clip_model.safetensors", None),
    "clip-vit-base-patch32": (
        "openai/clip-vit-base-patch32", "eaee4c876b93e66f7fac584b529025a96d71ad66",
        "model.safetensors", "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d"),
    "clip-vit-large-patch14": (
        "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41",
        "model.safetensors", "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
}
NANO_CLIP = Path(__file__).parent.parent / "assets" / "nano_clip"  # bundled with this repository


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm (arXiv:1502.03167) with the stored statistics, in train mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (arXiv:1512.03385, Sec. 4.1).

    (B, inputs, h, w) -> (B, 4 width, h / stride, w / stride). A stride is an average pool before
    the next 1x1, on both ways, not a strided convolution (arXiv:1904.11486).
    """

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), FrozenBatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3), FrozenBatchNorm(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), FrozenBatchNorm(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(conv(inputs, 4 * width, 1), FrozenBatchNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(self.pool(h)))
        return F.relu(h + self.downsample(self.pool(x)))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet up to its last grid; RN101 at 224 pixels: 7 x 7 positions of 2048 channels.

    images (B, 3, h, w), h and w multiples of 32 -> (B, P, C), P = h / 32 * w / 32, C = 32 width.
    The defaults are RN101's; modules have their public names.
    """

    def __init__(self, image_size: int = 224, width: int = 64, layers=(3, 4, 23, 3)):
        super().__init__()
        self.image_size, self.channels = image_size, 32 * width
        half, inputs = width // 2, width
        self.conv1, self.bn1 = conv(3, half, 3, stride=2), FrozenBatchNorm(half)
        self.conv2, self.bn2 = conv(half, half, 3), FrozenBatchNorm(half)
        self.conv3, self.bn3 = conv(half, width, 3), FrozenBatchNorm(width)
        for i, blocks in enumerate(layers):
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Bottleneck(inputs, width * 2**i, stride))
                inputs = 4 * width * 2**i
            self.add_module(f"layer{i + 1}", stage)

    def forward(self, images: Tensor) -> Tensor:
        B, colours, h, w = images.shape
        assert colours == 3 and h % 32 == w % 32 == 0, f"images are {list(images.shape)}"
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(2).transpose(1, 2)  # (B, P, C)


class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward (arXiv:2010.11929, Eq. 2 and 3), with biases and, unlike
    T5, 1 / sqrt(K). (B, 1 + P, C) -> same"""

    def __init__(self, C: int, H: int, d_ff: int, activation: str, eps: float):
        super().__init__()
        assert activation in ("quick_gelu", "gelu"), activation
        self.H, self.quick = H, activation == "quick_gelu"
        self.attention_norm = nn.LayerNorm(C, eps)
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.feed_forward_norm = nn.LayerNorm(C, eps)
        self.wi, self.wo = nn.Linear(C, d_ff), nn.Linear(d_ff, C)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.H, -1)).transpose(1, 2)  # (B, H, 1 + P, K)
                   for linear in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.o(h.transpose(1, 2).flatten(2))  # (B, 1 + P, C)

    def feed_forward(self, x: Tensor) -> Tensor:
        x = self.wi(x)
        return self.wo(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        return h + self.feed_forward(self.feed_forward_norm(h))


class ViT(nn.Module):
    """CLIP's vision transformer. images (B, 3, image_size, image_size) -> (B, P, C)

    The output is the residual stream after the last block, without the class token and without
    CLIP's last norm: that norm was trained for the class token only, the authors' script for grid
    features skips it too, and CLIP-T5 has a projection and a norm of its own. Argument names and
    defaults (ViT-B/32's) are those of transformers' config.json.
    """

    def __init__(self, image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12,
                 num_attention_heads=12, intermediate_size=3072, hidden_act="quick_gelu",
                 layer_norm_eps=1e-5):
        super().__init__()
        assert num_hidden_layers < 200, num_hidden_layers
        self.image_size, self.channels = image_size, hidden_size
        C, P = hidden_size, (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, C, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(C))
        self.position_embedding = nn.Parameter(torch.randn(1 + P, C))
        self.pre_norm = nn.LayerNorm(C, layer_norm_eps)
        sizes = C, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps
        self.blocks = nn.ModuleList(ViTBlock(*sizes) for _ in range(num_hidden_layers))

    def forward(self, images: Tensor) -> Tensor:
        shape = (3, self.image_size, self.image_size)
        assert images.shape[1:] == shape, f"images must be (B, *{shape}), are {list(images.shape)}"
        h = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, P, C)
        h = torch.cat([self.class_embedding.expand(len(h), 1, -1), h], dim=1)  # (B, 1 + P, C)
        h = self.pre_norm(h + self.position_embedding)
        for block in self.blocks:
            h = block(h)
        return h[:, 1:]  # (B, P, C)


# ----------------------------------------------------------------------------------- public files

NAMES = {  # of a ViT's parts, in transformers' files and in open_clip's: ours
    "embeddings.": "", "position_embedding.weight": "position_embedding",
    "pre_layrnorm": "pre_norm", "encoder.layers": "blocks",
    "layer_norm1": "attention_norm", "layer_norm2": "feed_forward_norm",
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.out_proj": "o", "mlp.fc1": "wi", "mlp.fc2": "wo",
    "conv1": "patch_embedding", "positional_embedding": "position_embedding",
    "ln_pre": "pre_norm", "transformer.resblocks": "blocks",
    "ln_1": "attention_norm", "ln_2": "feed_forward_norm",
    "attn.out_proj": "o", "mlp.c_fc": "wi", "mlp.c_proj": "wo",
}
POOL = ("attnpool.", "ln_post.", "post_layernorm.", "proj")  # of the pooled embedding: not read


def clip_files(model: str | Path) -> list[Path]:
    """Return the weights and the json of "nano", a folder (~ works) or a public name."""
    folder = NANO_CLIP if model == "nano" else Path(os.path.expanduser(model))
    if folder.is_dir():
        weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
        return [*([weights] if weights.is_file() else weight_files(folder)),
                config if config.is_file() else folder / "config.json"]
    public = CLIP_PUBLIC | {row[0]: row for row in CLIP_PUBLIC.values()}  # the hub's names, too
    if model not in public:
        names = ", ".join(["nano", *CLIP_PUBLIC])
        raise ValueError(f"clip {str(model)!r} is neither a folder nor one of: {names}")
    repo, revision, weights, sha256 = public[model]
    config = weights.replace("model.safetensors", "config.json")
    return [hub_file(repo, weights, revision, sha256), hub_file(repo, config, revision)]


def sha256_of_clip(model: str | Path) -> str:
    """Return one hash over the weights and the json beside them."""
    return sha256_of(*clip_files(model))


def from_open_clip(quick_gelu=False, image_size=224, layers=12, width=768, head_width=64,
                   mlp_ratio=4.0, patch_size=16, norm_kwargs=None) -> ModifiedResNet | ViT:
    """Build the tower of its json, whose names and defaults these are. Others are refused."""
    if isinstance(layers, list):
        assert max(layers) < 200 and image_size < 2000, "too large"
        return ModifiedResNet(image_size, width, layers)
    H, d_ff, eps = width // head_width, int(width * mlp_ratio), (norm_kwargs or {}).get("eps", 1e-5)
    activation = "quick_gelu" if quick_gelu else "gelu"
    return ViT(image_size, patch_size, width, layers, H, d_ff, activation, eps)


def empty_tower(raw: dict) -> ModifiedResNet | ViT:
    """Build the tower that a json of open_clip or of transformers describes."""
    if "model_cfg" in raw:
        clip = raw["model_cfg"]
        return from_open_clip(clip.get("quick_gelu", False), **clip["vision_cfg"])
    vision, names = raw.get("vision_config", raw), inspect.signature(ViT).parameters
    return ViT(**{name: vision[name] for name in names if name in vision})


def to_ours(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return the image tower's weights under our names, without what only pools or counts."""
    starts, state = {key.partition(".")[0] for key in weights}, {}
    prefix = next((f"{start}." for start in ("vision_model", "visual") if start in starts), "")
    for key, tensor in weights.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith(POOL) or not tensor.is_floating_point():
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if ".attn.in_proj_" in name:  # open_clip keeps q, k and v in one tensor
            state |= zip([name.replace("attn.in_proj_", f"{x}.") for x in "qkv"], tensor.chunk(3))
        else:
            state[name] = tensor
    return state


def load_clip(model: str | Path, device: str | torch.device = "cpu") -> ModifiedResNet | ViT:
    """Return a frozen image tower in eval mode: "nano", a public name, or what a folder holds.

    That is what open_clip saves (open_clip_model.safetensors, open_clip_config.json) or
    transformers (model.safetensors or shards, config.json), a whole CLIP or the image tower only.
    ValueError: an unknown name, a damaged file, keys that do not fit.
    """
    *files, config = clip_files(model)
    weights = read_weights(files)
    try:
        with torch.device("meta"):
            tower = empty_tower(json.loads(config.read_text(encoding="utf-8")))
        state = to_ours(weights, NAMES if isinstance(tower, ViT) else {})
        tower.load_state_dict(state, strict=True, assign=True)
        tower = tower.float().requires_grad_(False).eval()
        tower(torch.zeros(1, 3, tower.image_size, tower.image_size))  # do heads and sizes fit?
    except Exception as error:  # of many kinds: the json is not there, no JSON, of something else
        error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{model} holds no CLIP that fits {config.name} ({error})") from None
    return tower.to(device)
