"""Structural weight initialization of the side network (Sec. 3.3).

    paper                                        here
    importance matrix of a weight matrix W       importance[W] of fisher(t5, ...) or magnitude(t5)
    importance score of each row                 row_scores
    rows with the top importance scores          top_rows
    columns in the next layer that stay          [:, stream], [:, rows]
    initialize the side network                  init_side(ladder, importance)

Which rows stay? `published` answers as the authors' code does, `aligned` as we read the text.
"""
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model import T5
from run.gradients import add_squared_gradients

Kept = dict[str, tuple[Tensor, ...]]  # weight -> rows that stay, and columns if it is a matrix


# -------------------------------------------------------------------------------------- importance

def magnitude(t5: T5) -> dict[str, Tensor]:
    """|W| of every parameter (arXiv:1608.08710)."""
    return {name: p.detach().abs() for name, p in t5.named_parameters()}


def fisher(t5: T5, batches: Iterable[tuple[Tensor, ...]], samples: int = 1024) -> dict[str, Tensor]:
    """Empirical Fisher information: (d loss / d W)^2 of each sample, summed (arXiv:2111.09839).

    Of the matrices that are pruned, and of the embedding. batches yield (source_ids, source_mask,
    decoder_ids, decoder_mask, labels, ...), padded. The model stays as it was, without dropout.
    """
    names = [W for _, reads, writes in sublayers(t5) if reads for W in (*reads, writes)]
    sums = {name: torch.zeros_like(t5.get_parameter(name), dtype=torch.float32)
            for name in ["embed.weight", *names]}
    was_training, seen = t5.training, 0
    t5.eval()
    for batch in batches:
        rows = [tensor[: samples - seen] for tensor in batch[:5]]
        add_squared_gradients(sums, t5, *rows)
        seen += len(rows[0])
        if seen == samples:
            break
    t5.train(was_training)
    if not seen:
        raise ValueError("fisher needs at least one sample, got none")
    return {name: values.clamp_(min=0) for name, values in sums.items()}  # no -1e-9 by rounding


# --------------------------------------------------------------------------------------- selection

def row_scores(*importances: Tensor) -> Tensor:
    """The importance score of each row of a matrix: the sum over the row.

    Matrices pruned together are scored by their element-wise product, in float64: the product of
    three squared gradients is far below float32's smallest number.
    """
    return math.prod(importance.double() for importance in importances).sum(dim=1)


def top_rows(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending: (..., rows) -> (..., count).

    Among equal scores the later ones stay, as in the authors' code.
    """
    return scores.argsort(stable=True)[..., scores.size(-1) - count :].sort().values


def sublayers(t5: T5) -> Iterator[tuple[str, list[str], str | None]]:
    """The weights in the order in which data meets them: a norm, the matrices that read it, and the
    matrix that writes to the residual stream. For a final norm these are [] and None."""
    gated = t5.config.feed_forward_proj == "gated-gelu"
    parts = {"self_attention": (["q", "k", "v"], "o"),
             "cross_attention": (["q", "k", "v"], "o"),  # in the decoder
             "feed_forward": (["wi_0", "wi_1"] if gated else ["wi"], "wo")}
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(t5.get_submodule(stack).blocks):
            for part, (reads, writes) in parts.items():
                if hasattr(block, part):
                    at = f"{stack}.blocks.{i}.{part}"
                    reads = [f"{at}.{W}.weight" for W in reads]
                    yield f"{at}_norm.weight", reads, f"{at}.{writes}.weight"
        yield f"{stack}.final_norm.weight", [], None


def published(importance: dict[str, Tensor], t5: T5, r: int) -> Kept:
    """The authors' chain: the rows that one matrix keeps are the columns that the next one keeps.

    q, k, v keep [rows, stream], then o keeps [a new stream, rows]; so do wi and wo. Each sub-layer
    chooses the stream anew, from the embedding through encoder and decoder. Cross-attention's k and
    v read the side encoder, but keep the decoder's columns. q, k and v choose their rows together
    over all heads, so a side head can mix rows of several backbone heads.
    """
    D, kept = t5.config.d_model, {}
    stream = top_rows(row_scores(importance["embed.weight"].T), D // r)  # dimensions that stay
    for norm, reads, writes in sublayers(t5):
        kept[norm] = (stream,)
        if reads:  # q, k, v -> o   or   wi (wi_0, wi_1) -> wo
            # Paper: "the importance score of each row" of one W; the authors (and we, here) score
            # q, k and v by their product. They cannot prune wi_0 and wi_1, which we treat alike.
            scores = row_scores(*(importance[W][:, stream] for W in reads))
            rows = top_rows(scores, len(scores) // r)
            kept |= {W: (rows, stream) for W in reads}
            # "The columns ... corresponding to the pruned feature map are also pruned": [:, rows]
            stream = top_rows(row_scores(importance[writes][:, rows]), D // r)
            kept[writes] = (stream, rows)
    return kept


def aligned(importance: dict[str, Tensor], t5: T5, r: int) -> Kept:
    """Our reading of the text: what is pruned stays pruned. A score sums all weights that would go.

    One choice of dimensions for the whole residual stream. In each head its own best rows, the same
    for q and k, the same for v and the columns of o, so side head h descends from backbone head h
    with its position bias.
    """
    D, H, scores, kept = t5.config.d_model, t5.config.num_heads, [], {}
    for _, reads, writes in sublayers(t5):
        if reads:
            scores += [row_scores(importance[W].T) for W in reads]
            scores += [row_scores(importance[writes])]
    stream = top_rows(sum(scores), D // r)  # dimensions that stay

    def best(reads: list[str], writes: list[str], heads: int) -> Tensor:
        """Rows of `reads`, which are columns of `writes`; as many in every head."""
        score = sum([row_scores(importance[W][:, stream]) for W in reads]
                    + [row_scores(importance[W][stream].T) for W in writes]).view(heads, -1)
        first = torch.arange(heads, device=score.device)[:, None] * score.size(1)
        return (first + top_rows(score, score.size(1) // r)).flatten()

    for norm, reads, writes in sublayers(t5):
        kept[norm] = (stream,)
        if len(reads) == 3:
            q, k, v = reads
            match, carry = best([q, k], [], H), best([v], [writes], H)
            kept |= {q: (match, stream), k: (match, stream)}
            kept |= {v: (carry, stream), writes: (stream, carry)}
        elif reads:
            rows = best(reads, [writes], heads=1)
            kept |= {W: (rows, stream) for W in reads}
            kept[writes] = (stream, rows)
    return kept


# ---------------------------------------------------------------------------------- initialization

@torch.no_grad()
def init_side(ladder, importance: dict[str, Tensor], mode: str = "published") -> None:
    """Start the side network of a LadderT5 with what matters most in its backbone.

    Blocks and final norms are pruned. The position bias is copied whole: all heads stay (though
    `published` mixes them). Rungs, down_emb and up keep their random start. r = 1 copies all.
    """
    if mode not in ("published", "aligned"):
        raise ValueError(f"prune mode is {mode!r}, choose from published, aligned")
    t5, choose = ladder.backbone, published if mode == "published" else aligned
    kept = choose(importance, t5, ladder.r)
    for name in [name for name in ("encoder", "decoder") if hasattr(ladder, name)]:
        backbone, side = t5.get_submodule(name), ladder.get_submodule(name)
        side_bias = ladder.get_submodule(f"{name}_bias")
        side_bias.table.weight.copy_(backbone.pos_bias.table.weight)
        side.final_norm.weight.copy_(backbone.final_norm.weight[kept[f"{name}.final_norm.weight"]])
        for i, block in zip(side.keep, side.blocks):  # Sec. 3.4: kept layers only
            for parameter, value in block.block.named_parameters():
                W = f"{name}.blocks.{i}.{parameter}"
                value.copy_(t5.get_parameter(W)[torch.meshgrid(*kept[W], indexing="ij")])
