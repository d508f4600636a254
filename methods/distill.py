"""A distilled start of the side network (Sec. 2.2): it learns to answer as its backbone does."""
import random

import torch
import torch.nn.functional as F

import data
from methods.sides import Alone
from run import kernels
from run.folder import trainable
from run.report import Progress
from run.spans import corrupt_spans
from side import LadderT5


def distill(ladder: LadderT5, rows: list[data.Row], sentinel: int, lr: float, batch_size: int,
            seed: int) -> None:
    """One pass over the rows' sources, with hidden spans: learn them and the teacher's answers."""
    # Paper: it names the objective; the authors' code has it, but no weights of its terms, steps or
    # learning rate, and sums KL over padding. Ours: cross-entropy + KL, both means over label
    # tokens, a fifth of the run's learning rate after a tenth of warm-up (at the whole of it nano's
    # student learns to ignore the source), a random start, and no shortcuts, which would hand on
    # the teacher's own states.
    config, keep, device = ladder.backbone.config, ladder.encoder.keep, ladder.up.weight.device
    student = Alone(ladder.backbone, ladder.r, None if len(keep) == config.num_layers else keep)
    kernels.install(student.train())
    learned = trainable(student)
    optimizer = kernels.AdamW(learned.values(), lr, weight_decay=0.0)
    batches = data.batches(rows, batch_size, seed, epoch=0)
    steps, progress = len(batches), Progress("distillation, step", len(batches))
    for step, indices in enumerate(batches):
        rate = min((step + 1) / (steps // 10 + 1), 1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr / 5 * rate
        rng = random.Random(seed * steps + step)
        drawn = [data.Row(*corrupt_spans(rows[i].source, sentinel, rng)) for i in indices]
        *inputs, labels = (tensor.to(device) for tensor in data.collate(drawn)[:5])
        real = labels != -100
        with torch.no_grad():  # ten times as sharp as it is, as in their code
            teacher = torch.log_softmax(ladder.backbone(*inputs)[real].float() / 0.1, dim=-1)
        answer = torch.log_softmax(student(*inputs)[real].float(), dim=-1)  # (tokens, V)
        kl = F.kl_div(answer, teacher, reduction="batchmean", log_target=True)
        loss = F.nll_loss(answer, labels[real]) + kl
        if not loss.isfinite():
            raise FloatingPointError(f"distillation's loss is {loss.item()}; try a lower --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step(step + 1, f"loss {loss.item():.3f}, of it KL {kl.item():.3f}")
    for name, p in learned.items():
        ladder.get_parameter(name).data.copy_(p)
