"""Structural weight initialization of the side network (Sec. 3.3).

Importance of every backbone weight -> a score for each row of a matrix -> the best rows stay, and the columns that read the
pruned ones go from the next matrix -> what is left, 1/r as wide, starts the side network.

    importance = fisher(t5, batches)            sum over samples of (d loss / d W)^2, the shape of W     (arXiv:2111.09839)
    importance = magnitude(t5)                  |W|                                                      (arXiv:1608.08710)
    init_side(ladder, importance)               mode "published": the authors' chain; mode "aligned": the paper's text, as we read it

Both modes answer one question for each parameter of the backbone: which rows and which columns stay?
"""
from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from model import T5

Kept = dict[str, tuple[Tensor, ...]]  # parameter name -> kept rows, and kept columns where it is a matrix


# ------------------------------------------------------------------------------------------------------------ importance

def magnitude(t5: T5) -> dict[str, Tensor]:
    """|W| of every parameter."""
    return {name: p.detach().abs() for name, p in t5.named_parameters()}


def fisher(t5: T5, batches: Iterable[tuple[Tensor, ...]], samples: int = 1024) -> dict[str, Tensor]:
    """Empirical Fisher information: squared gradients of the loss with gold labels, one sample at a time, summed.

    batches yield (source_ids, source_mask, decoder_ids, decoder_mask, labels) of any batch size; their rows are taken one by one.
    Memory: weights + one gradient + one accumulator (float32).  No dropout.  The model is left as it was, without gradients.
    """
    was_training, was_trainable = t5.training, [p.requires_grad for p in t5.parameters()]
    importance = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in t5.named_parameters()}
    rows = (tuple(tensor[i : i + 1] for tensor in batch[:5]) for batch in batches for i in range(len(batch[0])))
    seen = 0
    t5.requires_grad_(True).eval().zero_grad()
    try:
        for source_ids, source_mask, decoder_ids, decoder_mask, labels, *_ in islice(rows, samples):
            logits = t5(source_ids, source_mask, decoder_ids, decoder_mask)
            F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100).backward()
            for name, p in t5.named_parameters():
                if p.grad is not None:
                    importance[name] += p.grad.float().square()
                    p.grad = None
            seen += 1
    finally:
        t5.train(was_training).zero_grad()
        for p, trainable in zip(t5.parameters(), was_trainable):
            p.requires_grad_(trainable)
    if not seen:
        raise ValueError("fisher needs at least one sample, got none")
    return importance


# ------------------------------------------------------------------------------------------------------------- selection

def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores in ascending order; among equals the later ones stay, as in the authors' code."""
    return scores.argsort(stable=True)[len(scores) - count :].sort().values


def joint(*importances: Tensor) -> Tensor:
    """Row scores of matrices that are pruned together: the row sums of their element-wise product.

    In float64: the product of three squared gradients is far below float32's smallest number.
    """
    product = importances[0].double()
    for importance in importances[1:]:
        product = product * importance.double()
    return product.sum(dim=1)


def published(importance: dict[str, Tensor], t5: T5, r: int) -> Kept:
    """The authors' chain: a running set of kept indices goes through the matrices in the order in which data does.

    Every matrix that writes to the residual stream picks its own dimensions, which the next ones read, from the embedding through
    the encoder into the decoder (cross-attention's keys and values too); heads are not respected.
    """
    # Paper: "the importance score of each row" of each W; the authors (and we, here) score q, k and v by their product, together.
    config, kept = t5.config, {}
    stream = best(joint(importance["embed.weight"].T), config.d_model // r)  # dimensions of the residual stream
    for prefix, module in t5.named_modules():
        if prefix.endswith("norm"):
            kept[f"{prefix}.weight"] = (stream,)
        elif prefix.endswith("attention"):
            heads = [f"{prefix}.{name}.weight" for name in "qkv"]
            inner = best(joint(*(importance[name][:, stream] for name in heads)), config.num_heads * config.d_kv // r)
            kept.update({name: (inner, stream) for name in heads})
            stream = best(joint(importance[f"{prefix}.o.weight"][:, inner]), config.d_model // r)
            kept[f"{prefix}.o.weight"] = (stream, inner)
        elif prefix.endswith("feed_forward"):  # Paper: the authors cannot prune a gated one; its two matrices are scored like q, k and v
            wi = [f"{prefix}.{name}.weight" for name in (("wi_0", "wi_1") if module.gated else ("wi",))]
            inner = best(joint(*(importance[name][:, stream] for name in wi)), config.d_ff // r)
            kept.update({name: (inner, stream) for name in wi})
            stream = best(joint(importance[f"{prefix}.wo.weight"][:, inner]), config.d_model // r)
            kept[f"{prefix}.wo.weight"] = (stream, inner)
    return kept


def aligned(importance: dict[str, Tensor], t5: T5, r: int) -> Kept:
    """Our reading of the paper's text: what is pruned stays pruned.  One choice of residual dimensions for the whole stream, and in each head its
    own best rows (the same for q and k, the same for v and o), so side head h descends from backbone head h with its position bias.

    Importance of a row or dimension: the sum over all weights that would go with it.
    """
    config, kept = t5.config, {}
    readers, writers = (".q.weight", ".k.weight", ".v.weight", ".wi.weight", ".wi_0.weight", ".wi_1.weight"), (".o.weight", ".wo.weight")
    total = torch.zeros(config.d_model, dtype=torch.float64, device=t5.embed.weight.device)
    for name, values in importance.items():
        if name.endswith(readers):
            total += values.double().sum(dim=0)
        elif name.endswith(writers):
            total += values.double().sum(dim=1)
    stream = best(total, config.d_model // r)

    def best_in_heads(scores: Tensor) -> Tensor:
        first = range(0, len(scores), config.d_kv)
        return torch.cat([start + best(scores[start : start + config.d_kv], config.d_kv // r) for start in first])

    for prefix, module in t5.named_modules():
        if prefix.endswith("norm"):
            kept[f"{prefix}.weight"] = (stream,)
        elif prefix.endswith("attention"):
            q, k, v, o = (f"{prefix}.{name}.weight" for name in "qkvo")
            match = best_in_heads(joint(importance[q][:, stream]) + joint(importance[k][:, stream]))
            carry = best_in_heads(joint(importance[v][:, stream]) + joint(importance[o][stream].T))
            kept.update({q: (match, stream), k: (match, stream), v: (carry, stream), o: (stream, carry)})
        elif prefix.endswith("feed_forward"):
            wi = [f"{prefix}.{name}.weight" for name in (("wi_0", "wi_1") if module.gated else ("wi",))]
            wo = f"{prefix}.wo.weight"
            inner = best(sum(joint(importance[name][:, stream]) for name in wi) + joint(importance[wo][stream].T), config.d_ff // r)
            kept.update({name: (inner, stream) for name in wi} | {wo: (stream, inner)})
    return kept


# -------------------------------------------------------------------------------------------------------- initialization

@torch.no_grad()
def init_side(ladder, importance: dict[str, Tensor], mode: str = "published") -> None:
    """Start the side network of a LadderT5 from the rows and columns of its backbone that matter most.

    Blocks, final norms and position bias are copied (all heads stay, so the bias table is copied whole); the projections down
    and up keep their random start and the gates alpha = 0.  r = 1 copies the backbone.  ValueError: unknown mode.
    """
    if mode not in ("published", "aligned"):
        raise ValueError(f"prune mode is {mode!r}, choose from published, aligned")
    t5 = ladder.backbone
    kept = (published if mode == "published" else aligned)(importance, t5, ladder.r)
    for side, name in ((ladder.encoder, "encoder"), (ladder.decoder, "decoder")):
        backbone = t5.get_submodule(name)
        side.pos_bias.table.weight.copy_(backbone.pos_bias.table.weight)
        side.final_norm.weight.copy_(backbone.final_norm.weight[kept[f"{name}.final_norm.weight"][0]])
        for i, block in zip(side.keep, side.blocks):
            for parameter, value in block.named_parameters():
                source = f"{name}.blocks.{i}.{parameter}"
                rows, *columns = kept[source]
                pruned = t5.get_parameter(source)[rows]
                value.copy_(pruned[:, columns[0]] if columns else pruned)
