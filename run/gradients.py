"""Squared gradients of every single sample, from one forward and one backward pass per batch.

Autograd sums gradients over a batch before they can be squared. So it is only asked for
g = d loss / d y of each layer's output y = W x. The gradient of W for one sample is the sum of
g x^T over the sample's positions; at padding g is 0.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from model import T5


def add_squared_gradients(sums: dict[str, Tensor], t5: T5, source_ids: Tensor, source_mask: Tensor,
                          decoder_ids: Tensor, decoder_mask: Tensor, labels: Tensor) -> None:
    """Add (d loss / d W)^2 of each sample to sums: {name of a matrix: float32, of its shape}.

    A sample's loss is the mean cross-entropy of its labels other than -100. Weights need no
    requires_grad and get no gradient. Memory: activations, one sample's gradient of one matrix.
    """
    sum_of = {t5.get_submodule(name.removesuffix(".weight")): sums[name] for name in sums}
    embedded = []

    def watch(module: nn.Module, inputs: tuple, y: Tensor) -> None:
        if module is t5.embed:
            embedded.append(y.requires_grad_())  # backward ends here
        elif module in sum_of:
            y.register_hook(lambda g: add_squares(sum_of[module], g, inputs[0]))

    with register_module_forward_hook(watch):
        _, memory = t5.encode(source_ids, source_mask)
        h = t5.decoder.finish(t5.decode(decoder_ids, decoder_mask, memory)[-1])  # (B, T, D)
    logits = t5.logits(h)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    loss = (loss.view_as(labels).sum(dim=1) / (labels != -100).sum(dim=1)).sum()
    g_source, g_decoder, g_head = torch.autograd.grad(loss, [*embedded, logits])

    # Both stacks look words up in the embedding; and in T5 v1.0 it is the head.
    scale = t5.config.d_model ** -0.5 if t5.config.scale_decoder_outputs else 1.0
    g_head, h = g_head.float(), h.detach().float() * scale
    if t5.head is not None:
        g_head, h = g_head[:, :0], h[:, :0]  # no positions: the terms of the head vanish
    add_squares(sum_of[t5.embed], g_head, h)
    ids, g = torch.cat([source_ids, decoder_ids], 1), torch.cat([g_source, g_decoder], 1).float()
    for b, words in enumerate(ids):  # (head + lookup)^2 = head^2 + (2 head + lookup) lookup
        words, index = words.unique(return_inverse=True)
        lookup = g.new_zeros(len(words), g.size(2)).index_add_(0, index, g[b])
        head = g_head[b, :, words].T @ h[b]
        sum_of[t5.embed][words] += (2 * head + lookup) * lookup


def add_squares(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total (out, in) += (sum_n g_n x_n^T)^2 of each sample; g (B, n, out), x (B, n, in)."""
    g, x = g.float(), x.float()
    if g.size(1) <= 4:  # (sum_m g_m x_m)^2 = sum_mn (g_m g_n) (x_m x_n), for all samples at once
        g, x = ((h[:, :, None] * h[:, None]).flatten(0, 2) for h in (g, x))
        total.addmm_(g.T, x)
    else:
        for g_sample, x_sample in zip(g, x):  # small enough for the processor's cache
            gradient = g_sample.T @ x_sample
            total.addcmul_(gradient, gradient)
