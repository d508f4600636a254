"""Assignment 5: scores of rows, the best rows, columns that follow (Sec. 3.3)."""
from random import choice, randint, sample

import prune
import torch
from compare import equal, same
from model import T5, T5Config


def planted(r):
    """A T5, an importance, and what should stay: there it is above 1, less in other rows of these
    columns, and more in columns that went before."""
    sizes = dict(vocab_size=12, d_model=12, d_kv=8, d_ff=24, num_layers=2, num_heads=3)
    t5, stays = T5(T5Config(**sizes, feed_forward_proj=choice(["relu", "gated-gelu"]))), {}
    importance = {name: torch.rand_like(p) / 10 for name, p in t5.named_parameters()}

    def some(count):
        return sorted(sample(range(count), count // r))

    def plant(name, rows, columns):
        gone = [i for i in range(importance[name].size(1)) if i not in columns]
        importance[name][:, gone] = 1 + 9 * torch.rand(len(importance[name]), len(gone))
        importance[name][torch.tensor(rows)[:, None], columns] += 1
        stays[name] = rows, columns

    stream = some(12)
    importance["embed.weight"][:, stream] += 1
    for norm, reads, writes in prune.sublayers(t5):
        stays[norm] = (stream,)
        if reads:
            rows, before, stream = some(len(importance[reads[0]])), stream, some(12)
            for name in reads:
                plant(name, rows, before)
            plant(writes, stream, rows)
    return t5, importance, stays


def test_a_score_is_the_sum_over_the_row():
    matrix = torch.rand(randint(3, 5), 6)
    same("scores", prune.row_scores(matrix), torch.stack([row.sum() for row in matrix]))


def test_matrices_pruned_together_are_scored_by_their_product():
    matrices = torch.rand(3, 4, 6)
    found = prune.row_scores(*(1e-20 * matrix for matrix in matrices))  # 1e-60 is 0 in float32
    same("scores times 1e60", 1e60 * found, torch.einsum("rc,rc,rc->r", *matrices))


def test_the_top_rows_stay_in_their_order_and_the_later_of_equals():
    scores, count = torch.stack([torch.randperm(9), torch.ones(9).long()]), randint(2, 5)
    expected = [sorted(sorted(range(9), key=lambda i: (row[i], i))[9 - count:])
                for row in scores.tolist()]
    found = prune.top_rows(scores.double(), count)
    same(f"the best {count} of {scores.tolist()}", found, torch.tensor(expected))


def test_the_best_rows_stay_and_columns_follow():
    for r in (2, 4):
        t5, importance, expected = planted(r)
        found = prune.published(importance, t5, r)
        equal("the names of weights", sorted(found), sorted(expected))
        for name, indices in expected.items():
            for what, index, one in zip(("rows", "columns"), indices, found[name]):
                equal(f"{what} of {name} that stay, r = {r}", one.tolist(), index)
