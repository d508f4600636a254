"""CLIP's image towers (arXiv:2103.00020, Sec. 2.4), frozen: an image becomes P visual tokens.

    ModifiedResNet   images --> stem of 3 convolutions --> 4 stages of bottlenecks --> (B, P, C)
    ViT              images --> patches, class token, positions --> norm --> blocks --> (B, P, C)

    B batch   P image positions, row by row   C channels   H heads   K head width   h, w of a map
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import read_weights, weight_files
from run.hub import hub_file

CLIP_PUBLIC = {  # name: repository, revision, weights, their sha256
    "clip-rn101": ("timm/resnet101_clip.openai", "main", "open_clip_model.safetensors", None),
    "clip-vit-base-patch32": (
        "openai/clip-vit-base-patch32", "eaee4c876b93e66f7fac584b529025a96d71ad66",
        "model.safetensors", "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d"),
}
NANO_CLIP = Path(__file__).parent.parent / "assets" / "nano_clip"  # bundled with this repository


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Bottleneck(nn.Module):
    """(B, inputs, h, w) -> (B, 4 width, h / stride, w / stride) (arXiv:1512.03385, Sec. 4.1). The
    stride is an average pool before the last convolution and in the shortcut (arXiv:1904.11486)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, width, 1)
        self.conv2, self.bn2 = conv_norm(width, width, 3)
        self.conv3, self.bn3 = conv_norm(width, 4 * width, 1)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        projection = conv_norm(inputs, 4 * width, 1) if inputs != 4 * width else ()
        self.downsample = nn.Sequential(*projection)  # an empty one is the identity

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(self.pool(h)))
        return F.relu(h + self.downsample(self.pool(x)))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet up to its last grid. The defaults are RN101's, the modules' names the public.
    images (B, 3, h, w), h and w multiples of 32 -> (B, P, C), P = h / 32 * w / 32, C = 32 width"""

    def __init__(self, image_size: int = 224, width: int = 64, layers=(3, 4, 23, 3)):
        super().__init__()
        self.image_size, self.channels = image_size, 32 * width
        half, inputs = width // 2, width
        self.conv1, self.bn1 = conv_norm(3, half, 3, stride=2)
        self.conv2, self.bn2 = conv_norm(half, half, 3)
        self.conv3, self.bn3 = conv_norm(half, width, 3)
        for i, blocks in enumerate(layers):
            first = Bottleneck(inputs, width, stride=2 if i > 0 else 1)
            others = [Bottleneck(4 * width, width, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *others))
            inputs, width = 4 * width, 2 * width

    def forward(self, images: Tensor) -> Tensor:
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
        self.H, self.quick = H, {"quick_gelu": True, "gelu": False}[activation]
        self.attention_norm = nn.LayerNorm(C, eps)
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.feed_forward_norm = nn.LayerNorm(C, eps)
        self.wi, self.wo = nn.Linear(C, d_ff), nn.Linear(d_ff, C)

    def forward(self, h: Tensor) -> Tensor:
        x = self.attention_norm(h)
        q, k, v = (linear(x).unflatten(-1, (self.H, -1)).transpose(1, 2)  # (B, H, 1 + P, K)
                   for linear in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1 + P, C)
        h = h + self.o(x)
        x = self.wi(self.feed_forward_norm(h))
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        return h + self.wo(x)


class ViT(nn.Module):
    """CLIP's vision transformer. images (B, 3, image_size, image_size) -> (B, P, C). Without CLIP's
    last norm, trained for the class token only, as by the authors' script. Arguments and defaults
    (ViT-B/32's) are those of transformers' config.json."""

    def __init__(self, image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12,
                 num_attention_heads=12, intermediate_size=3072, hidden_act="quick_gelu",
                 layer_norm_eps=1e-5, **unused):
        super().__init__()
        self.image_size, self.channels = image_size, hidden_size
        C, P = hidden_size, (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, C, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(C))
        self.position_embedding = nn.Parameter(torch.randn(1 + P, C))
        self.pre_norm = nn.LayerNorm(C, layer_norm_eps)
        sizes = C, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps
        self.blocks = nn.Sequential(*(ViTBlock(*sizes) for _ in range(num_hidden_layers)))

    def forward(self, images: Tensor) -> Tensor:
        h = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, P, C)
        h = torch.cat([self.class_embedding.expand(len(h), 1, -1), h], dim=1)  # (B, 1 + P, C)
        h = self.blocks(self.pre_norm(h + self.position_embedding))
        return h[:, 1:]  # (B, P, C)


# ----------------------------------------------------------------------------------- public files

NAMES = {  # of a ViT's parts, in transformers' files and in open_clip's: ours
    "embeddings.": "", "position_embedding.weight": "position_embedding",
    "conv1": "patch_embedding", "positional_embedding": "position_embedding",
    "pre_layrnorm": "pre_norm", "ln_pre": "pre_norm",
    "encoder.layers": "blocks", "transformer.resblocks": "blocks",
    "layer_norm1": "attention_norm", "layer_norm2": "feed_forward_norm",
    "ln_1": "attention_norm", "ln_2": "feed_forward_norm",
    "self_attn": "attn", "attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v",
    "attn.out_proj": "o", "mlp.fc1": "wi", "mlp.c_fc": "wi", "mlp.fc2": "wo", "mlp.c_proj": "wo",
}
UNREAD = ("attnpool.", "ln_post.", "post_layernorm.", "proj", "position_ids")  # only pool or count


def clip_files(model: str | Path) -> list[Path]:
    """Return the weights and, last, the json of "nano", a folder (~ works) or a public name."""
    folder = NANO_CLIP if model == "nano" else Path(model).expanduser()
    if folder.is_dir():
        weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
        files = [weights] if weights.is_file() else weight_files(folder)
        return [*files, config if config.is_file() else folder / "config.json"]
    for name, (repo, revision, weights, sha256) in CLIP_PUBLIC.items():
        if model in (name, repo):
            config = hub_file(repo, weights.replace("model.safetensors", "config.json"), revision)
            return [hub_file(repo, weights, revision, sha256), config]
    raise ValueError(f"{model} is neither a folder nor one of: nano, {', '.join(CLIP_PUBLIC)}")


def empty_tower(raw: dict) -> ModifiedResNet | ViT:
    """Build the tower that a json of transformers or of open_clip describes."""
    if "model_cfg" not in raw:
        return ViT(**raw.get("vision_config", raw))
    clip, vision = raw["model_cfg"], raw["model_cfg"]["vision_cfg"]
    if isinstance(vision["layers"], list):
        return ModifiedResNet(vision["image_size"], vision["width"], vision["layers"])
    return ViT(vision["image_size"], vision["patch_size"], vision["width"], vision["layers"],
               num_attention_heads=vision["width"] // vision.get("head_width", 64),
               intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4)),
               hidden_act="quick_gelu" if clip.get("quick_gelu") else "gelu",
               layer_norm_eps=vision.get("norm_kwargs", {}).get("eps", 1e-5))


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return the image tower's weights under our names, without what CLIP-T5 does not read."""
    for prefix in ("vision_model.", "visual."):  # there if the file has texts' weights, too
        inside = [key for key in weights if key.startswith(prefix)]
        weights = {key.removeprefix(prefix): weights[key] for key in inside} or weights
    state = {}
    for key, tensor in weights.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        if ".attn.in_proj_" in key:  # open_clip keeps q, k and v in one tensor
            for x, part in zip("qkv", tensor.chunk(3)):
                state[key.replace("attn.in_proj_", f"{x}.")] = part
        elif not key.startswith(UNREAD):
            state[key] = tensor
    return state


def load_clip(model: str | Path, device: str | torch.device = "cpu") -> ModifiedResNet | ViT:
    """Return a frozen image tower in eval mode: "nano", a public name, or what open_clip or
    transformers saved in a folder, a whole CLIP or its image tower only. ValueError: an unknown
    name, a damaged file, keys that do not fit."""
    *files, config = clip_files(model)
    weights = read_weights(files)
    try:
        with torch.device("meta"):
            tower = empty_tower(json.loads(config.read_bytes()))
        state = renamed(weights, NAMES if isinstance(tower, ViT) else {})
        tower.load_state_dict(state, assign=True)
    except Exception as error:  # of many kinds: the json is not there, no JSON, of something else
        raise ValueError(f"{model}: no CLIP that fits {config.name} ({error!r:.300})") from None
    return tower.float().requires_grad_(False).eval().to(device)
