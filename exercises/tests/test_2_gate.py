"""Assignment 2: the gate of a ladder connection (Sec. 3.2)."""
import math
from random import uniform

import side
import torch
from compare import same


def gate(alpha=0.0, temperature=0.1, D=12, d=4):
    one = side.Gate(D, d, temperature)
    torch.nn.init.constant_(one.alpha, alpha)
    return one, torch.randn(2, 5, d), torch.randn(2, 5, D)


def test_it_starts_half_open():
    one, h_side, h_backbone = gate()
    same("mu", one.mu, torch.full((1,), 0.5))
    same("what goes on", one(h_side, h_backbone), (h_side + one.down(h_backbone)) / 2)


def test_the_temperature_divides_alpha():
    alpha, temperature = uniform(0.1, 0.3), uniform(0.2, 0.9)
    mu, odds = gate(alpha, temperature)[0].mu, torch.tensor([math.exp(alpha / temperature)])
    same(f"mu : (1 - mu) for {alpha:.2f} and {temperature:.2f}", mu / (1 - mu), odds)


def test_it_opens_to_the_backbone_and_shuts_it_out():
    for alpha in (9.0, -9.0):
        one, h_side, h_backbone = gate(alpha)
        expected = one.down(h_backbone) if alpha > 0 else h_side
        same(f"what goes on at alpha {alpha}", one(h_side, h_backbone, "context"), expected)


def test_alpha_learns_how_much_of_the_backbone_helps():
    one, h_side, h_backbone = gate(temperature=uniform(0.1, 0.5))
    one(h_side, h_backbone).sum().backward()
    slope = (one.down(h_backbone) - h_side).sum() / (4 * one.temperature)
    same("dL/d alpha of L = sum", one.alpha.grad, slope[None], 1e-3)
