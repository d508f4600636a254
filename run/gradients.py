"""Squared gradients of every single sample, from one forward and one backward pass per batch.

Autograd would sum the gradients over a batch before they can be squared. So it is only asked for
g = d loss / d y of the output y = W x of each layer. The gradient of W for one sample is the sum of
g x^T over the sample's positions; at padding g is 0.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from model import T5, PositionBias, RMSNorm


def add_squared_gradients(sums: dict[str, Tensor], t5: T5, source_ids: Tensor, source_mask: Tensor,
                          decoder_ids: Tensor, decoder_mask: Tensor, labels: Tensor) -> None:
    """Add (d loss / d W)^2 of each sample to sums: {parameter name: float32, of the same shape}.

    A sample's loss is the mean cross-entropy of its labels other than -100. The weights need no
    requires_grad and get no gradient. Memory: activations, one sample's gradient of one matrix.
    """
    names = {module: f"{name}.weight" for name, module in t5.named_modules()}
    B, leaves, normed = len(labels), [], []

    def add(module, squares):
        sums[names[module]] += squares

    def watch(module, inputs, y):
        if isinstance(module, nn.Linear):
            y.register_hook(lambda g: add(module, sum_of_squares(g, inputs[0])))
        elif isinstance(module, RMSNorm):  # y = weight * x
            x = F.rms_norm(inputs[0].detach().float(), module.weight.shape, eps=module.epsilon)
            y.register_hook(lambda g: add(module, (g * x).sum(dim=1).square().sum(dim=0)))
            normed.append(y)  # the last one enters the head
        elif isinstance(module, PositionBias):  # one for all samples: give each its own copy
            bias = y[0].detach().expand(B, -1, -1, -1).requires_grad_()  # (B, H, T, T)
            position = torch.arange(bias.size(-1), device=bias.device)
            buckets = module.buckets(position - position[:, None]).flatten()
            x = F.one_hot(buckets, module.table.num_embeddings).float().expand(B, -1, -1)
            bias.register_hook(lambda g: add(module.table, sum_of_squares(x, g.flatten(2).mT)))
            leaves.append(bias)
            return bias, y[1]
        elif module is t5.embed:
            leaves.append(y.requires_grad_())

    with register_module_forward_hook(watch):
        logits = t5(source_ids, source_mask, decoder_ids, decoder_mask)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    loss = (loss.view(B, -1).sum(dim=1) / (labels != -100).sum(dim=1)).sum()
    g_source, _, g_decoder, _, g_logits = torch.autograd.grad(loss, [*leaves, logits])

    # The head, and the embedding: both stacks look words up in it, and in T5 v1.0 it is the head.
    x = normed[-1].detach().float()  # (B, T, D)
    if t5.config.scale_decoder_outputs:
        x = x * t5.config.d_model ** -0.5
    sums["embed.weight" if t5.head is None else "head.weight"] += sum_of_squares(g_logits, x)
    ids, g = torch.cat([source_ids, decoder_ids], 1), torch.cat([g_source, g_decoder], 1).float()
    for b in range(B):  # (head + lookup)^2 = head^2 + (2 head + lookup) lookup, in rows looked up
        words, index = ids[b].unique(return_inverse=True)
        lookup = g.new_zeros(len(words), g.size(2)).index_add_(0, index, g[b])
        head = g_logits[b, :, words].float().T @ x[b] if t5.head is None else 0.0
        sums["embed.weight"][words] += (2 * head + lookup) * lookup


def sum_of_squares(g: Tensor, x: Tensor) -> Tensor:
    """(sum_n g_n x_n^T)^2, summed over samples: (B, n, out), (B, n, in) -> (out, in)."""
    g, x = g.float(), x.detach().float()
    if g.size(1) <= 4:  # (sum_m g_m x_m)^2 = sum_mn (g_m g_n) (x_m x_n), for all samples at once
        g, x = ((h[:, :, None] * h[:, None]).flatten(0, 2) for h in (g, x))
        return g.T @ x
    total = g.new_zeros(g.size(2), x.size(2))
    for g_sample, x_sample in zip(g, x):  # small enough for the processor's cache
        gradient = g_sample.T @ x_sample
        total.addcmul_(gradient, gradient)
    return total
