"""Faster ways to do what model.py says in plain lines: `install` puts two of them into a
network; `cross_entropy` takes less memory, and AdamW imports less, than torch's.

Of a step at T5-base's sizes (batch 8, source 128) on 2 CPU cores FastDropout takes off 14 % with
LST and 10 % with full fine-tuning, DroppedSoftmax another 2 and 6 %.
"""
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attention


class FastDropout(nn.Dropout):
    """nn.Dropout, which on a CPU spends its time on random numbers: here 64 random bits decide
    about four elements, p in steps of 2^-16. On other devices torch's own kernel runs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return torch.native_dropout(x, self.p, True)[0]
        words = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * bits.float().ge_(self.p * 2**16 - 2**15).mul_(1 / (1 - self.p)).to(x.dtype)


class DroppedSoftmax(torch.autograd.Function):
    """dropout(softmax(scores)) without keeping dropout's mask (as in arXiv:2205.14135, App. B).

    With w = softmax(scores), y = dropout(w) and g the gradient of y, the gradient of scores is
    g y - w sum(g y). A second derivative is an error, not a wrong number.
    """

    @staticmethod
    def forward(context, scores: Tensor, dropout: nn.Module) -> Tensor:
        w = torch.softmax(scores, dim=-1)
        y = dropout(w)
        context.save_for_backward(w, y)
        return y

    @staticmethod
    def backward(context, g: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        w, y = context.saved_tensors
        g = g * y
        return g.addcmul_(w, g.sum(dim=-1, keepdim=True), value=-1), None


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32 of logits (n, V) in bfloat16 or float16, 32 rows at a time.

    Their gradient, p less 1 at the label, takes the place of the logits themselves, which are lost:
    no other copy of them all is made (as in arXiv:2410.10989). labels (n,) -> losses (n,), 0 where
    the label is -100
    """

    @staticmethod
    def forward(context, logits: Tensor, labels: Tensor) -> Tensor:
        losses = []
        for x, y in zip(logits.split(32), labels.split(32)):
            log_p = F.log_softmax(x, dim=-1, dtype=torch.float32)  # (32, V)
            losses.append(F.nll_loss(log_p, y, reduction="none"))
            labelled, y = (y >= 0).float()[:, None], y.clamp(min=0)[:, None]
            x.copy_(log_p.exp_().scatter_add_(1, y, -labelled).mul_(labelled))
        context.save_for_backward(logits)
        return torch.cat(losses)

    @staticmethod
    def backward(context, g: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        gradient, = context.saved_tensors  # changed in place, so a second backward is an error
        for x, part in zip(gradient.split(32), g.split(32)):
            x.copy_(x * part[:, None])
        return gradient, None


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # torch.autograd.grad walks around @once_differentiable's error
        raise RuntimeError("run/kernels.py has no second derivative: do without it")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each position, in float32: logits (n, V), which may be lost; labels (n,) -> (n,)"""
    if logits.dtype == torch.float32:
        return F.cross_entropy(logits, labels, reduction="none")
    return CrossEntropy.apply(logits, labels)


class AdamW(torch.optim.AdamW):
    """torch's without its decorators, which import torch.compile: that takes as long as torch."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)


def install(net: nn.Module) -> None:
    """Put FastDropout and DroppedSoftmax into a network, in place."""
    def weights(attention: Attention, scores: Tensor) -> Tensor:
        return DroppedSoftmax.apply(scores, attention.dropout)

    for module in list(net.modules()):
        if isinstance(module, Attention):
            module.weights = MethodType(weights, module)
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p).train(child.training))
