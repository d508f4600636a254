"""Assignment 7: a batch's loss in several passes and over several processes (Sec. 4)."""
from argparse import Namespace
from random import randint
from unittest.mock import patch

import torch
import torch.nn.functional as F
import train
from compare import equal, same
from data import Row
from run import processes
from torch import nn

V, D = 12, 6


class Words(nn.Embedding):
    """Logits of the next word from the last one, and from the sum of the source's."""

    def forward(self, source_ids, source_mask, decoder_ids, decoder_mask, images=None):
        source = self.weight[source_ids] * source_mask[..., None]
        return (self.weight[decoder_ids] + source.sum(dim=1, keepdim=True)) @ self.weight.T


def at_once(model, rows):
    """The mean loss per label token of all rows."""
    losses = []
    for source, target, *_ in rows:
        ids = torch.tensor([source]), torch.ones(1, len(source)), torch.tensor([[0, *target[:-1]]])
        losses.append(F.cross_entropy(model(*ids, None)[0], torch.tensor(target), reduction="none"))
    return torch.cat(losses).mean()


def check(count, world_size=1, accumulate=1):
    """Let one process after the other do its share, then compare."""
    model, args, now = Words(V, D), Namespace(accumulate=accumulate, device="cpu"), {"sends": True}
    rows = [Row(*(torch.randint(3, V, (randint(1, 5),)).tolist() for _ in range(2)))
            for _ in range(count)]
    what, losses = f"{count} rows, {world_size} processes, {accumulate} passes: ", []

    for rank in range(world_size):
        sent = []
        hook = model.weight.register_hook(lambda _: sent.append(now["sends"]))
        with patch.multiple(processes, rank=lambda: rank, world_size=lambda: world_size,
                            no_sync=lambda _: patch.dict(now, sends=False)):
            losses.append(train.backward(model, rows, args))
        hook.remove()
        equal(what + "does the last one send, does another?", [sent[-1:], any(sent[:-1])],
              [[True], False])

    loss = at_once(model, rows)
    same(what + "the sum of what is returned", sum(losses), loss)
    equal(what + "does that hold a graph?", losses[0].requires_grad, False)
    (gradient,) = torch.autograd.grad(loss, [model.weight])
    same(what + "the mean of their gradients", model.weight.grad / world_size, gradient)


def test_passes_sum_up_to_the_mean_over_label_tokens():
    check(randint(4, 7))
    check(randint(6, 9), accumulate=randint(2, 4))


def test_processes_share_the_rows_and_one_without_a_row_sends_too():
    check(randint(6, 9), world_size=randint(2, 3), accumulate=2)
    check(2, world_size=3, accumulate=2)
