"""Assignment 9: cross-attention as a rung (Appendix A), called as a side block calls any rung."""
from random import randint

import rung
import torch
from compare import equal, same
from model import T5Config

B, S, D, d, H = 2, 6, 16, 8, 2


def attending():
    """A rung; h_side (B, S, d), h_backbone (B, S, D), cache, and a causal bias (1, H, S, S)."""
    config = T5Config(d_model=d, d_kv=4, d_ff=16, num_layers=1, num_heads=H)
    one = rung.CrossAttention(D, d, config).double().eval()
    for p in one.parameters():
        torch.nn.init.normal_(p, std=0.3)
    inputs = [torch.randn(*shape).double() for shape in ((B, S, d), (B, S, D), (1, H, S, S))]
    future = torch.ones(S, S).triu(1).bool()
    return one, *inputs[:2], None, inputs[2].masked_fill(future, torch.finfo(torch.float32).min)


def test_the_side_network_asks_and_the_backbone_answers_where_the_bias_lets_it():
    one, *inputs = attending()
    at, before = randint(1, S - 2), one(*inputs)
    equal("the output's shape", tuple(before.shape), (B, S, d))
    for name, i, expected in (("h_side", 0, [at]), ("h_backbone", 1, [*range(at, S)])):
        other = [tensor if tensor is None else tensor.clone() for tensor in inputs]
        other[i][:, at] += 1
        moved = (one(*other) - before).abs().amax(dim=(0, 2)) > 1e-9
        equal(f"positions that see {name}[:, {at}]", moved.nonzero().flatten().tolist(), expected)


def test_what_it_reads_is_added():
    one, *inputs = attending()
    for p in one.parameters():
        p.data.zero_()
    same("a rung of zeros", one(*inputs), inputs[0])


def test_all_of_it_learns():
    one, *inputs = attending()
    one(*inputs).square().sum().backward()
    dead = [name for name, p in one.named_parameters() if p.grad is None or not p.grad.any()]
    equal("parameters without a gradient", dead, [])


def test_position_by_position_it_says_the_same():
    one, h_side, h_backbone, cache, bias = attending()
    expected, cache = one(h_side, h_backbone, cache, bias), {"self": {}}
    for t in range(S):
        here = slice(t, t + 1)
        found = one(h_side[:, here], h_backbone[:, here], cache, bias[:, :, here, : t + 1])
        same(f"position {t}, generated", found, expected[:, here])
