"""Beam search (captions take five beams, Sec. 4); greedy search is in model.py."""
from collections.abc import Callable

import torch
from torch import Tensor


def beam_search(step: Callable[[Tensor], Tensor], reorder: Callable[[Tensor], None],
                B: int, beams: int, max_new_tokens: int, device: torch.device,
                pad: int, eos: int) -> Tensor:
    """Keep the `beams` best open beginnings and the `beams` best ended texts of every source.

    step: last tokens (B * beams, 1) -> logits (B * beams, V); reorder: rows move to these places.
    Return the best text of each source, (B, <= max_new_tokens), `pad` after its end.

    As in `transformers`, an ended text scores its log-probability divided by its length, and a
    source is settled when its best open beginning, scored so, is no better than its worst text.
    """
    first = torch.arange(B, device=device)[:, None] * beams  # the row of each source's first beam
    open_ids = torch.full((B, beams, max_new_tokens + 1), pad, device=device)
    open_score = torch.full((B, beams), -torch.inf, device=device)
    ended_ids, ended_score = open_ids, open_score.clone()
    open_score[:, 0] = 0.0  # all beams start equal: use one
    settled = torch.zeros(B, 1, dtype=torch.bool, device=device)

    def pick(ids: Tensor, beam: Tensor) -> Tensor:
        return ids.gather(1, beam[:, :, None].expand(-1, -1, ids.size(2)))

    for t in range(1, max_new_tokens + 1):
        logits = step(open_ids[:, :, t - 1].reshape(B * beams, 1)).float()
        V, score = logits.size(-1), torch.log_softmax(logits, dim=-1).unflatten(0, (B, beams))
        score = (score + open_score[:, :, None]).flatten(1)  # (B, beams * V)
        score, index = score.topk(2 * beams)  # twice as many: at most `beams` of them end here
        parent, token = index // V, index % V  # (B, 2 * beams)
        ids = pick(open_ids, parent)
        ids[:, :, t] = token
        ends = (token == eos) | (t == max_new_tokens)

        open_score, best = score.masked_fill(ends, -torch.inf).topk(beams)
        open_ids = pick(ids, best)
        reorder((first + parent.gather(1, best)).flatten())

        ends[:, beams:] = False  # only an ending among the best `beams` counts
        score = (score / t).masked_fill(settled | ~ends, -torch.inf)
        ended_score, best = torch.cat([ended_score, score], dim=1).topk(beams)
        ended_ids = pick(torch.cat([ended_ids, ids], dim=1), best)
        settled = settled | (open_score[:, :1] / t <= ended_score[:, -1:])
        if settled.all():
            break
    return ended_ids[:, 0, 1 : t + 1]
