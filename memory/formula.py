"""What one encoder layer keeps for backward, tensor by tensor, each with its reason (Sec. 3.1)."""
import math

import torch
from torch import nn

from model import Block, PositionBias, T5Config
from run import kernels
from side import Gate, SideBlock


def build_layer(config: T5Config, B: int, S: int, D: int | None = None) -> tuple[nn.Module, tuple]:
    """Return an encoder layer that trains as a whole, and its inputs.

    With D, the backbone's width, it is a side layer with its rung, and `config` a side network's.
    """
    d, layer = config.d_model, Block(config, is_decoder=False)
    mask = torch.ones(B, S, dtype=torch.bool)
    bias, _ = PositionBias(config, is_decoder=False)(S, mask)
    h = torch.randn(B, S, d, requires_grad=True)
    inputs = h, None, bias
    if D is not None:
        layer, inputs = SideBlock(Gate(D, d), layer), (h, torch.randn(B, S, D), None, bias)
    kernels.install(layer)
    return layer.train(), inputs


def layer_formula(config: T5Config, B: int, S: int, D: int | None = None) -> list[dict]:
    """List what that layer keeps; the sum equals the count to the byte."""
    d, H, K, d_ff, rows = config.d_model, config.num_heads, config.d_kv, config.d_ff, []

    def keep(what: str, *shape: int, why: str, size: int = 4) -> None:
        rows.append({"what": what, "shape": shape, "bytes": math.prod(shape) * size, "why": why})

    def norm(of: str, reader: str) -> None:
        keep(of, B, S, d, why="gradients of RMSNorm's input and weight")
        keep("1 / rms", B, S, 1, why="the same")
        keep(f"norm({of})", B, S, d, why=f"gradients of {reader}")

    if D is not None:
        keep("h_backbone", B, S, D, why="gradient of down's weight: full width")
        keep("down(h_backbone)", B, S, d, why="gradient of mu")
        keep("h_side", B, S, d, why="gradient of 1 - mu")
        keep("mu, 1 - mu", 2, why="gradients of the two streams")
    norm("h", "q, k and v's weights")
    if config.attention == "eager":
        keep("q", B, H, S, K, why="gradient of k")
        keep("k", B, H, K, S, why="gradient of q")
        keep("v", B, H, S, K, why="gradient of the map")
        keep("softmax map", B, H, S, S, why="gradient of softmax")
        keep("dropped map", B, H, S, S, why="gradients of softmax and v: no mask")
        keep("context", B, S, H * K, why="gradient of o's weight")
    else:
        for name in "qkv":
            keep(name, B, S, H * K, why="backward computes the map again")
        keep("bias", B, H, S, -(-S // 16) * 16, why="the same; one a stack if 16 divides S")
        keep("log of softmax's sum", B, H, -(-S // 32) * 32, why="the same")
        keep("random state", 2, why="drops the same elements again", size=8)
        keep("context", B, S, H * K, why="gradients of o's weight and of softmax")
    keep("dropout mask, o", B, S, d, why="which elements were dropped", size=1)
    norm("h'", "wi's weight")
    keep("dropout mask, wi", B, S, d_ff, why="which elements were dropped", size=1)
    keep("relu", B, S, d_ff, why="gradients of ReLU and of wo's weight")
    keep("dropout mask, wo", B, S, d, why="which elements were dropped", size=1)
    return rows


def layer_bytes(*sizes) -> int:
    return sum(row["bytes"] for row in layer_formula(*sizes))
