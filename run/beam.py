"""Beam search (captions take five beams, Sec. 4); greedy search is in model.py."""
from collections.abc import Callable

import torch
from torch import Tensor

NEVER = -1e9  # a score below every text's


def beam_search(step: Callable[[Tensor], Tensor], reorder: Callable[[Tensor], None],
                B: int, beams: int, max_new_tokens: int, device: torch.device,
                pad: int, eos: int) -> Tensor:
    """Keep the `beams` best open beginnings and the `beams` best ended texts of every source.

    step: the last token of each row (B * beams, 1) -> logits (B * beams, V); reorder: rows move to
    these places.  Return the best text of each source, (B, <= max_new_tokens), `pad` after its end.

    An ended text scores its log-probability divided by its length (length penalty 1). A source is
    settled when its best open beginning, scored so, is no better than its worst ended text. These
    are the rules of the `transformers` library.
    """
    first = torch.arange(B, device=device)[:, None] * beams  # the row of each source's first beam
    open_ids = torch.full((B, beams, max_new_tokens + 1), pad, device=device)
    open_score = torch.full((B, beams), NEVER, device=device)
    open_score[:, 0] = 0.0  # all beams start equal: use one
    ended_ids, ended_score = open_ids.clone(), torch.full((B, beams), NEVER, device=device)
    settled = torch.zeros(B, 1, dtype=torch.bool, device=device)

    def pick(ids: Tensor, beam: Tensor) -> Tensor:
        return ids.gather(1, beam[:, :, None].expand(-1, -1, ids.size(2)))

    for t in range(1, max_new_tokens + 1):
        logits = step(open_ids[:, :, t - 1].reshape(-1, 1)).float()  # (B * beams, V)
        score = torch.log_softmax(logits, dim=-1).view(B, beams, logits.size(-1))
        score = (score + open_score[:, :, None]).flatten(1)  # (B, beams * V)
        score, index = score.topk(2 * beams)  # twice as many: at most `beams` of them end here
        parent, token = index // logits.size(-1), index % logits.size(-1)  # (B, 2 * beams)
        ids = pick(open_ids, parent)
        ids[:, :, t] = token
        ends = (token == eos) | (t == max_new_tokens)

        open_score, best = score.masked_fill(ends, NEVER).topk(beams)
        open_ids = pick(ids, best)
        reorder((first + parent.gather(1, best)).flatten())

        counts = ends & ~settled
        counts[:, beams:] = False  # only an ending among the best `beams` counts
        pool = torch.cat([ended_score, (score / t).masked_fill(~counts, NEVER)], dim=1)
        ended_score, best = pool.topk(beams)
        ended_ids = pick(torch.cat([ended_ids, ids], dim=1), best)
        settled = settled | (open_score[:, :1] / t <= ended_score[:, -1:])
        if settled.all() or ends.all():
            break
    output = ended_ids[:, 0, 1:]  # (B, max_new_tokens)
    longest = max([1, *(output != pad).any(dim=0).nonzero().flatten().add(1).tolist()])
    return output[:, :longest]
