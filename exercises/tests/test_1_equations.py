"""Assignment 1: equations (1) and (2) by hand, and which tensors they read (Sec. 3.1)."""
from random import randint

import equations
import torch
from compare import equal, kept_bytes, same
from torch import nn


def cases():
    """Of each activation: its name, what is found by hand, and what torch says of that MLP."""
    for name, (sigma, *_) in equations.ACTIVATIONS.items():
        N, B, D = randint(3, 5), randint(4, 7), randint(8, 11)
        layers, a, z = [nn.Linear(D, D) for _ in range(N)], [torch.randn(B, D)], []

        def forward():
            for layer in layers:
                z.append(layer(a[-1]))
                a.append(sigma(z[-1]))
            return a[-1]

        W, b = [layer.weight for layer in layers], [layer.bias for layer in layers]
        kept = kept_bytes(forward, W)
        a[-1].sum().backward()
        yield name, equations.backward_by_hand(a[0], W, b, name), W, b, a, z, kept


def test_the_equations_give_the_gradients():
    for name, (dL_dW, dL_db, *_), W, b, *_ in cases():
        for i in range(len(W)):
            same(f"{name}, dL/dW_{i}", dL_dW.get(i), W[i].grad)
            same(f"{name}, dL/db_{i}", dL_db.get(i), b[i].grad)


def test_what_the_equations_read():
    for name, (*_, read, for_slope), _, _, a, z, _ in cases():
        expected = a[:len(z)], z if name == "GELU" else a[1:]
        for what, found, tensors in zip(("a", "sigma' of layer"), (read, for_slope), expected):
            equal(f"{name}, how many {what}", len(found), len(tensors))
            for i, tensor in enumerate(tensors):
                same(f"{name}, {what} {i}: what is read", found[i], tensor)


def test_they_read_as_many_bytes_as_autograd_keeps():
    for name, (*_, read, for_slope), *_, kept in cases():
        once = {tensor.data_ptr(): tensor.numel() * 4 for tensor in (*read, *for_slope)}
        equal(f"{name}, bytes, each tensor once", sum(once.values()), kept)
