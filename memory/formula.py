"""What one encoder layer keeps for backward, tensor by tensor, each with its reason (Sec. 3.1)."""
import math
from argparse import Namespace

import torch
from torch import nn

from memory.account import saved_bytes
from model import Block, PositionBias, T5Config
from run import kernels
from side import Gate, SideBlock, side_config


def build_layer(config: T5Config, B: int, S: int, D: int | None = None) -> tuple[nn.Module, tuple]:
    """Return an encoder layer that trains as a whole, and its inputs. With D, the backbone's width,
    it is a side layer with its rung, and `config` a side network's."""
    d, layer = config.d_model, Block(config, is_decoder=False)
    bias, _ = PositionBias(config, is_decoder=False)(S, torch.ones(B, S, dtype=torch.bool))
    h, inputs = torch.randn(B, S, d, requires_grad=True), (None, bias)
    if D is not None:
        layer, inputs = SideBlock(Gate(D, d), layer), (torch.randn(B, S, D), *inputs)
    kernels.install(layer)
    return layer.train(), (h, *inputs)


def layer_formula(config: T5Config, B: int, S: int, D: int | None = None) -> list[dict]:
    """List what that layer keeps; the sum equals the count to the byte."""
    d, H, K, d_ff, rows = config.d_model, config.num_heads, config.d_kv, config.d_ff, []

    def keep(what: str, *shape: int, why: str, size: int = 4) -> None:
        rows.append({"what": what, "shape": shape, "bytes": math.prod(shape) * size, "why": why})

    if D is not None:
        keep("h_backbone", B, S, D, why="gradient of down's weight: width D")
        keep("down(h_backbone)", B, S, d, why="gradient of mu")
        keep("h_side", B, S, d, why="gradient of 1 - mu")
        keep("mu, 1 - mu", 2, why="gradients of the two streams")
    keep("h", B, S, d, why="gradients of input and weight")
    keep("1 / rms", B, S, 1, why="the same")
    keep("norm(h)", B, S, d, why="gradients of q, k and v's weights")
    if config.attention == "eager":
        keep("q", B, H, S, K, why="gradient of k")
        keep("k", B, H, K, S, why="gradient of q")
        keep("v", B, H, S, K, why="gradient of the map")
        keep("softmax map", B, H, S, S, why="gradient of softmax")
        keep("dropped map", B, H, S, S, why="gradients of softmax and v")
        keep("context", B, S, H * K, why="gradient of o's weight")
    else:
        for name in "qkv":
            keep(name, B, S, H * K, why="backward computes the map again")
        keep("bias", B, H, S, -(-S // 16) * 16, why="one a stack if 16 divides S")
        keep("log-sum-exp", B, H, -(-S // 32) * 32, why="the same")
        keep("random state", 2, why="drops the same elements again", size=8)
        keep("context", B, S, H * K, why="gradients of o's weight, softmax")
    keep("dropout mask, o", B, S, d, why="which elements were dropped", size=1)
    keep("h'", B, S, d, why="gradients of input and weight")
    keep("1 / rms", B, S, 1, why="the same")
    keep("norm(h')", B, S, d, why="gradients of wi's weight")
    keep("dropout mask, wi", B, S, d_ff, why="which elements were dropped", size=1)
    keep("relu", B, S, d_ff, why="gradients of ReLU, wo's weight")
    keep("dropout mask, wo", B, S, d, why="which elements were dropped", size=1)
    return rows


def explain(args: Namespace, cases: list) -> dict:
    """Print the tensors of a layer of the backbone, all of it training, and of one beside it."""
    found, (B, S, _), wide = [], args.batch, cases[0].config
    layers = {"a layer of the backbone, all of it training": (wide, B, S),
              "the side layer beside it": (side_config(wide, args.r), B, S, wide.d_model)}
    print(f"{cases[0].model}, batch {B}, source {S}, {args.attention} attention")
    for title, sizes in layers.items():
        rows = layer_formula(*sizes)
        with torch.device("meta"):
            layer, inputs = build_layer(*sizes)
            counted = saved_bytes(lambda: layer(*inputs), layer.parameters())
        print(f"\n{title}\n")
        for row in rows:
            shape = " ".join(map(str, row["shape"]))
            print(f"{row['what']:17}{shape:16}{row['bytes']:>11,}  {row['why']}")
        total = sum(row["bytes"] for row in rows)
        times, same = total / (4 * B * S * sizes[0].d_model), counted == total
        print(f"{'formula':33}{total:>11,}  4 B S d x {times:.1f}\n"
              f"{'counted':33}{counted:>11,}  {'equal' if same else 'NOT EQUAL'}")
        found.append({"layer": title, "formula": total, "counted": counted, "tensors": rows})
    return {"rows": found}
