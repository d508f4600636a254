"""CLIP's image towers (arXiv:2103.00020, Sec. 2.4), frozen: an image becomes the P patch tokens that CLIP-T5 reads.

    ModifiedResNet   images --> stem of 3 convolutions --> 4 stages of bottlenecks --> grid, before the attention pool   (B, P, C)
    ViT              images --> patches, class token, positions --> norm --> N blocks --> patch tokens                   (B, P, C)

    B batch   P image positions, row by row   C channels   H heads   K head width (C / H)   h, w height and width of an image or a map

CLIP's pooled embedding, the one vector that is compared with texts, is not built: CLIP-T5 reads patches.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from download import hub_file, sha256_of
from model import Checkpoint, brief

# name: (repository, revision, weights, their sha256), from the public file listings
CLIP_PUBLIC = {
    "clip-rn101": ("timm/resnet101_clip.openai", "main", "open_clip_model.safetensors", None),
    "clip-vit-base-patch32": ("openai/clip-vit-base-patch32", "eaee4c876b93e66f7fac584b529025a96d71ad66", "model.safetensors",
                              "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d"),
    "clip-vit-large-patch14": ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "model.safetensors",
                               "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
}
NANO_CLIP = Path(__file__).parent / "assets" / "nano_clip"  # the tower that comes with this repository
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # red, green, blue of pixels from 0 to 1


# ---------------------------------------------------------------------------------------------------------------- config

@dataclass(frozen=True)
class ResNetConfig:
    """The defaults are RN101's.  RN50 has layers (3, 4, 6, 3); RN50x4, x16 and x64 are also wider and see larger images."""

    image_size: int = 224  # of the images in training; the tower takes others too
    width: int = 64  # of the stem; the grid has C = 32 width
    layers: tuple[int, ...] = (3, 4, 23, 3)  # bottlenecks in each stage

    def __post_init__(self):
        check_sizes(self, image_size=self.image_size, width=self.width, **{f"layer{i}": number for i, number in enumerate(self.layers, 1)})


@dataclass(frozen=True)
class ViTConfig:
    """The defaults are ViT-B/32's."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768  # C
    num_layers: int = 12
    num_heads: int = 12
    d_ff: int = 3072
    activation: str = "quick_gelu"  # OpenAI's x sigmoid(1.702 x); "gelu" in most towers that others have trained

    def __post_init__(self):
        check_sizes(self, **{name: value for name, value in vars(self).items() if name != "activation"})
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"ViTConfig: activation is {brief.repr(self.activation)}, choose from ('quick_gelu', 'gelu')")
        for part, whole in (("num_heads", "width"), ("patch_size", "image_size")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"ViTConfig: {part} {getattr(self, part)} must divide {whole} {getattr(self, whole)}")


def check_sizes(config: ResNetConfig | ViTConfig, **sizes) -> None:
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= 2**16:
            raise ValueError(f"{type(config).__name__}: {name} is {brief.repr(value)}, it must be a whole number from 1 to {2**16}")


# ---------------------------------------------------------------------------------------------------------------- ResNet

class FrozenBatchNorm(nn.Module):
    """Batch norm (arXiv:1502.03167) with the stored statistics, in train mode too: nothing here may drift.  (B, C, h, w) -> same"""

    def __init__(self, C: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (arXiv:1512.03385, Sec. 4.1).  (B, inputs, h, w) -> (B, 4 width, h / stride, w / stride)

    All convolutions have stride 1; a stride is an average pool before the next 1x1, on both ways (anti-aliasing, arXiv:1904.11486).
    """

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), FrozenBatchNorm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), FrozenBatchNorm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), FrozenBatchNorm(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, bias=False), FrozenBatchNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(self.pool(h)))
        return F.relu(h + self.downsample(self.pool(x)))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet up to its last grid, RN101 at 224 pixels: 7 x 7 positions of 2048 channels (arXiv:2103.00020, Sec. 2.4).

    images (B, 3, h, w), h and w multiples of 32 -> (B, P, C) with P = h / 32 * w / 32 and C = 32 width.  Modules have their public names.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config, self.channels = config, 32 * config.width
        half, inputs = config.width // 2, config.width
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), FrozenBatchNorm(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), FrozenBatchNorm(half)
        self.conv3, self.bn3 = nn.Conv2d(half, config.width, 3, padding=1, bias=False), FrozenBatchNorm(config.width)
        for i, number in enumerate(config.layers):
            width = config.width * 2**i
            first = Bottleneck(inputs, width, stride=1 if i == 0 else 2)
            inputs = 4 * width
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *(Bottleneck(inputs, width, stride=1) for _ in range(number - 1))))

    def forward(self, images: Tensor) -> Tensor:
        assert images.ndim == 4 and images.size(1) == 3 and images.size(2) % 32 == images.size(3) % 32 == 0, \
            f"images must be (B, 3, h, w) with h and w multiples of 32, are {list(images.shape)}"
        x = images.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(2).transpose(1, 2)  # (B, P, C)


# ------------------------------------------------------------------------------------------------------------------- ViT

class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward (arXiv:2010.11929, Eq. 2 and 3), with biases and, unlike T5, 1 / sqrt(K).  (B, 1 + P, C) -> same"""

    def __init__(self, config: ViTConfig):
        super().__init__()
        C, self.num_heads, self.quick = config.width, config.num_heads, config.activation == "quick_gelu"
        self.attention_norm = nn.LayerNorm(C, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.feed_forward_norm = nn.LayerNorm(C, eps=1e-5)
        self.wi, self.wo = nn.Linear(C, config.d_ff), nn.Linear(config.d_ff, C)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, 1 + P, K)

    def attention(self, x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(*(self.split_heads(linear(x)) for linear in (self.q, self.k, self.v)))
        return self.o(h.transpose(1, 2).flatten(2))  # (B, 1 + P, C)

    def feed_forward(self, x: Tensor) -> Tensor:
        x = self.wi(x)
        return self.wo(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        return h + self.feed_forward(self.feed_forward_norm(h))


class ViT(nn.Module):
    """CLIP's vision transformer (arXiv:2103.00020, Sec. 2.4).  images (B, 3, image_size, image_size) -> (B, P, C)

    Handed out: the residual stream after the last block, without the class token and without CLIP's last norm.  That norm was trained
    for the class token alone, the published script for grid features skips it too, and CLIP-T5 has a projection and a norm of its own.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, self.channels = config, config.width
        C = config.width
        self.patch_embedding = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(C) * C ** -0.5)
        self.position_embedding = nn.Parameter(torch.randn(1 + (config.image_size // config.patch_size) ** 2, C) * C ** -0.5)
        self.pre_norm = nn.LayerNorm(C, eps=1e-5)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.num_layers))

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.image_size
        assert images.ndim == 4 and images.shape[1:] == (3, size, size), f"images must be {['B', 3, size, size]}, are {list(images.shape)}"
        h = self.patch_embedding(images.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)  # (B, P, C)
        h = torch.cat([self.class_embedding.expand(len(h), 1, -1), h], dim=1)  # (B, 1 + P, C)
        h = self.pre_norm(h + self.position_embedding)
        for block in self.blocks:
            h = block(h)
        return h[:, 1:]  # (B, P, C)


# ---------------------------------------------------------------------------------------------------------- public files

VIT_NAMES = (  # ours, OpenAI's and open_clip's, Hugging Face's
    ("patch_embedding.weight", "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("class_embedding", "visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("position_embedding", "visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("pre_norm.", "visual.ln_pre.", "vision_model.pre_layrnorm."),  # so spelled there
    ("blocks.", "visual.transformer.resblocks.", "vision_model.encoder.layers."),
    (".attention_norm.", ".ln_1.", ".layer_norm1."),
    (".q.", ".attn.in_proj_", ".self_attn.q_proj."),  # OpenAI keeps q, k and v in one tensor, in this order
    (".k.", ".attn.in_proj_", ".self_attn.k_proj."),
    (".v.", ".attn.in_proj_", ".self_attn.v_proj."),
    (".o.", ".attn.out_proj.", ".self_attn.out_proj."),
    (".feed_forward_norm.", ".ln_2.", ".layer_norm2."),
    (".wi.", ".mlp.c_fc.", ".mlp.fc1."),
    (".wo.", ".mlp.c_proj.", ".mlp.fc2."),
)
CLIP_DROPPED = re.compile(  # the text tower, what makes the pooled embedding, counters
    r"transformer\..+|token_embedding\.weight|positional_embedding|ln_final\.(weight|bias)|text_projection(\.weight)?|text(_model)?\..+"
    r"|logit_scale|logit_bias|input_resolution|context_length|vocab_size|visual_projection\.weight"
    r"|visual\.attnpool\.(positional_embedding|[qkvc]_proj\.(weight|bias))|visual\.(bn|layer)[\w.]+\.num_batches_tracked"
    r"|visual\.proj|visual\.ln_post\.(weight|bias)|vision_model\.post_layernorm\.(weight|bias)|vision_model\.embeddings\.position_ids")


def clip_key(name: str, naming: int) -> tuple[str, int | None]:
    """A ViT parameter's public name (naming 1: OpenAI's, 2: Hugging Face's), and where q, k and v share a tensor, which third is ours."""
    third = re.search(r"\.([qkv])\.", name) if naming == 1 else None
    for row in VIT_NAMES:
        name = name.replace(row[0], row[naming])
    return name, "qkv".index(third[1]) if third else None


def clip_file(model: str | Path, *filenames: str) -> Path | None:
    """The first of these files that is in a folder, or in the repository of a public name; "nano" is the bundled tower."""
    model = NANO_CLIP if model == "nano" else model
    if model in CLIP_PUBLIC and not Path(model).is_dir():
        repo, revision, weights, sha256 = CLIP_PUBLIC[model]
        return hub_file(repo, weights, revision, sha256) if weights in filenames else hub_file(repo, filenames[0], revision)
    if not Path(model).is_dir():
        raise ValueError(f"clip {str(model)!r} is neither a folder nor one of: nano, {', '.join(CLIP_PUBLIC)}")
    return next((path for path in (Path(model) / filename for filename in filenames) if path.is_file()), None)


def sha256_of_clip(model: str | Path) -> str:
    """One hash over the weights and, where there is one, the json beside them."""
    jsons = () if model in CLIP_PUBLIC else ("config.json", "open_clip_config.json")  # a public name's are of its revision
    files = clip_file(model, "open_clip_model.safetensors", "model.safetensors"), *(clip_file(model, name) for name in jsons)
    return sha256_of(*(path for path in files if path))


def clip_config(model: str | Path, weights: Checkpoint, naming: int) -> ResNetConfig | ViTConfig:
    """Sizes from the tensors' shapes; what no shape tells from the json file beside the weights: a ViT's heads and activation, and the size of
    the images of a ResNet that came without its attention pool."""
    def count(start: str) -> int:
        return len({key.removeprefix(start).partition(".")[0] for key in weights.files if key.startswith(start)})

    filename = "open_clip_config.json" if naming == 1 else "config.json"
    pool, resnet = "visual.attnpool.positional_embedding", count("visual.layer") > 0
    try:  # isqrt: of the positions one is the class token's, or in the attention pool the mean's, the others are a square
        if resnet:
            sizes = dict(width=weights.shape("visual.conv3.weight")[0], layers=tuple(count(f"visual.layer{i}.") for i in (1, 2, 3, 4)))
            if pool in weights.files:
                return ResNetConfig(image_size=32 * math.isqrt(weights.shape(pool)[0]), **sizes)
        else:
            patches, positions, wi = (weights.shape(clip_key(name, naming)[0])
                                      for name in ("patch_embedding.weight", "position_embedding", "blocks.0.wi.weight"))
            sizes = dict(image_size=patches[3] * math.isqrt(positions[0]), patch_size=patches[3], width=patches[0],
                         num_layers=count(clip_key("blocks.", naming)[0]), d_ff=wi[0])
    except (KeyError, IndexError) as error:
        raise ValueError(f"checkpoint of {model} does not fit: a key that tells a size is missing or misshapen ({error})") from None
    path = clip_file(model, filename)
    if path is None:
        raise ValueError(f"{model} lacks {filename}, which tells " + ("the size of the images" if resnet else "a ViT's heads and activation"))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vision = raw["model_cfg"]["vision_cfg"] if naming == 1 else raw.get("vision_config", raw)
        if resnet:
            told = dict(image_size=vision["image_size"])
        elif naming == 1:
            quick = raw["model_cfg"].get("quick_gelu", False)
            told = dict(num_heads=sizes["width"] // vision.get("head_width", 64), activation="quick_gelu" if quick else "gelu")
        else:  # such a file leaves out what equals ViT-B/32's
            told = dict(num_heads=vision.get("num_attention_heads", 12), activation=vision.get("hidden_act", "quick_gelu"))
        width = vision["width"] if naming == 1 else vision.get("hidden_size", 768)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a CLIP ({error!r:.100}); get it again") from None
    if width != sizes["width"]:
        raise ValueError(f"{path} is another CLIP's: its width is {brief.repr(width)}, that of the weights {sizes['width']}")
    return ResNetConfig(**sizes, **told) if resnet else ViTConfig(**sizes, **told)


def load_clip(model: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> ModifiedResNet | ViT:
    """A CLIP image tower with the weights of a folder or of a public name: strictly loaded, frozen, in eval mode.

    A folder holds open_clip_model.safetensors or model.safetensors in either naming and, for a ViT, open_clip_config.json (keys visual.*)
    or config.json (keys vision_model.*).  ValueError: another dtype, an unknown name, a damaged file, keys that do not fit.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"CLIP in {dtype}: choose float32 or bfloat16")
    path = clip_file(model, "open_clip_model.safetensors", "model.safetensors")
    if path is None:
        raise ValueError(f"{model} holds neither open_clip_model.safetensors nor model.safetensors")
    weights = Checkpoint([path])
    naming = 2 if any(key.startswith("vision_model.") for key in weights.files) else 1
    if naming == 1 and not any(key.startswith("visual.") for key in weights.files):
        raise ValueError(f"{path} holds no CLIP image tower: no key starts with visual. or vision_model., but {brief.repr(sorted(weights.files)[:3])}")
    config = clip_config(model, weights, naming)
    with torch.device("meta"):
        tower = ModifiedResNet(config) if isinstance(config, ResNetConfig) else ViT(config)
    own, shapes = {}, {}
    for name, tensor in tower.state_dict().items():
        own[name] = key, third = ("visual." + name, None) if isinstance(tower, ModifiedResNet) else clip_key(name, naming)
        shapes[key] = list(tensor.shape) if third is None else [3 * len(tensor), *tensor.shape[1:]]
    weights.check(model, shapes, dropped={key for key in weights.files if CLIP_DROPPED.fullmatch(key)})
    state = {name: (weights.tensor(key) if third is None else weights.tensor(key).chunk(3)[third]).to(device=device, dtype=dtype)
             for name, (key, third) in own.items()}
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.requires_grad_(False).eval()
