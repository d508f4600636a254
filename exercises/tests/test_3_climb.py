"""Assignment 3: states of the frozen backbone, side blocks, the frozen head (Sec. 3.2)."""
from random import sample

import side
import torch
from compare import equal, same
from model import T5, T5Config

B, S, T, P, D, d, V, N = 2, 6, 4, 3, 16, 4, 30, 4


def ladder():
    sizes = dict(vocab_size=V, d_model=D, d_kv=8, d_ff=32, num_layers=N, num_heads=2)
    net = side.LadderT5(T5(T5Config(**sizes)), r=4, keep=sample(range(N - 1), 2)).eval()
    net.backbone.requires_grad_(True)  # a frozen one could not show that gradients leak
    masks = [torch.arange(length) < torch.tensor([[length], [2]]) for length in (S, T)]
    ids = torch.randint(3, V, (B, S)), torch.randint(3, V, (B, T))
    return net, (ids[0], masks[0], ids[1], masks[1])


def test_a_side_block_is_a_rung_then_a_block_and_images_have_no_rung():
    block = side.SideBlock(None, None)
    block.rung = lambda h_side, h_backbone, cache, bias: h_side + h_backbone[..., :d]
    block.block = lambda h, cache, bias: h * bias
    for more in (0, P):
        h_side, h_backbone, bias = torch.randn(B, S + more, d), torch.randn(B, S, D), torch.randn(1)
        found, expected = block(h_side, h_backbone, None, bias), bias * h_side
        expected[:, :S] += bias * h_backbone[..., :d]
        same(f"{S} tokens, {more} positions of images", found, expected)


def test_rungs_read_what_the_backbone_computes():
    net, batch = ladder()
    outputs = []
    for block in (*net.backbone.encoder.blocks, *net.backbone.decoder.blocks):
        block.register_forward_hook(lambda *call: outputs.append(call[-1]))
    net.backbone(*batch)
    for stack, ids, hidden in zip("ED", batch[::2], net.hidden_states(*batch)):
        same("the word embeddings", hidden[0], net.backbone.embed(ids))
        for i, expected in enumerate(outputs[:N] if stack == "E" else outputs[N : 2 * N]):
            what, found = f"state {i + 1} of {N}, stack {stack}", hidden[i + 1]
            if i in net.encoder.keep:
                same(what, found, expected)
            elif i < N - 1:
                equal(what + ", which no rung reads", found, None)


def test_autograd_sees_nothing_of_the_backbone():
    net, batch = ladder()
    for hidden in net.hidden_states(*batch):
        leaks = [i for i, h in enumerate(hidden) if h is not None and h.requires_grad]
        equal("states that a gradient would flow through", leaks, [])


def test_a_gradient_passes_through_the_frozen_head():
    net, h_side = ladder()[0], torch.randn(B, T, d)
    logits = net.logits(h_side)
    expected = torch.einsum("btD,VD->btV", net.up(h_side), net.backbone.embed.weight) / D ** 0.5
    same("logits", logits, expected)
    logits.sum().backward()
    assert net.up.weight.grad is not None, "the gradient of up.weight is None"
