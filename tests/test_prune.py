"""Structural weight initialization (Sec. 3.3): importance, selection, and what the side network starts from."""

import pytest
import torch
from torch import nn

from model import T5, T5Config
from prune import aligned, best, fisher, init_side, joint, magnitude, published
from side import LadderT5

SIZES = dict(vocab_size=40, d_model=12, d_kv=8, d_ff=20, num_layers=3, num_heads=2)  # H * K = 16, r = 1, 2 or 4
VERSIONS = pytest.mark.parametrize("changes", [{}, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)], ids=["v1.0", "v1.1"])
MODES = pytest.mark.parametrize("mode", ["published", "aligned"])


def tiny(**changes):
    """Norms and all other weights are random: no two are equal, so a weight tells where it comes from."""
    torch.manual_seed(0)
    t5 = T5(T5Config(**(SIZES | changes))).eval()
    for p in t5.parameters():
        nn.init.normal_(p, std=0.5)
    return t5


def random_importance(t5, scale=1.0):
    torch.manual_seed(1)
    return {name: scale * torch.rand_like(p) for name, p in t5.named_parameters()}


# ------------------------------------------------------------------------------------------------------ worked by hand

def hand_made():
    """A T5 of 4x4 matrices (D = 4, two heads of K = 2, d_ff = 4), one layer.  Every weight says where it stands: 21 is row 2, column 1."""
    t5 = T5(T5Config(vocab_size=4, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, relative_attention_num_buckets=4))
    with torch.no_grad():
        for p in t5.parameters():
            p.copy_(torch.arange(4) if p.ndim == 1 else 10 * torch.arange(4)[:, None] + torch.arange(p.size(1)))
    importance = {name: torch.zeros_like(p) for name, p in t5.named_parameters()}
    block = "encoder.blocks.0."
    for name, rows in {
        "embed": [[1, 2, 3, 4],  # a row for each word, a column for each dimension
                  [0, 2, 0, 1],
                  [0, 0, 0, 1],
                  [0, 1, 0, 1]],
        block + "self_attention.q": [[9, 1, 9, 1],
                                     [9, 2, 9, 0],
                                     [0, 3, 0, 0],
                                     [0, 1, 0, 4]],
        block + "self_attention.k": [[1, 1, 1, 3],
                                     [1, 1, 1, 1],
                                     [1, 1, 1, 1],
                                     [1, 1, 1, 2]],
        block + "self_attention.v": [[1, 1, 1, 0],
                                     [1, 1, 1, 1],
                                     [1, 1, 1, 1],
                                     [1, 1, 1, 1]],
        block + "self_attention.o": [[0, 0, 5, 1],
                                     [9, 9, 1, 0],
                                     [0, 0, 2, 2],
                                     [9, 9, 1, 1]],
        block + "feed_forward.wi": [[1, 9, 0, 9],
                                    [2, 0, 3, 0],
                                    [0, 9, 2, 9],
                                    [3, 0, 1, 0]],
        block + "feed_forward.wo": [[9, 0, 9, 1],
                                    [0, 3, 0, 3],
                                    [0, 2, 0, 3],
                                    [9, 1, 9, 1]],
    }.items():
        importance[f"{name}.weight"] = torch.tensor(rows, dtype=torch.float32)
    return t5, importance


def side_weights(ladder):
    """The side encoder's only block as plain numbers."""
    return {name.removesuffix(".weight"): p.tolist() for name, p in ladder.encoder.blocks[0].named_parameters()}


def test_published_chain_worked_by_hand():  # Sec. 3.3 and the authors' code
    t5, importance = hand_made()
    ladder = LadderT5(t5, r=2)
    init_side(ladder, importance, "published")
    assert side_weights(ladder) == {
        # embed: the columns sum to 1 5 3 7, so the stream starts with dimensions 1 3
        "self_attention_norm": [1, 3],
        # q * k * v in columns 1 3:  1*1*1 + 1*3*0 = 1,  2*1*1 + 0 = 2,  3*1*1 + 0 = 3,  1*1*1 + 4*2*1 = 9: rows 2 3 stay
        # (had the columns 0 2 not gone, rows 0 and 1 would stay: 1+18, 2+18, 3, 9; both kept rows belong to the second head)
        "self_attention.q": [[21, 23], [31, 33]],
        "self_attention.k": [[21, 23], [31, 33]],
        "self_attention.v": [[21, 23], [31, 33]],
        # o in columns 2 3: its rows sum to 6 1 4 2, so the stream goes on with dimensions 0 2, no longer 1 3
        "self_attention.o": [[2, 3], [22, 23]],
        "feed_forward_norm": [0, 2],
        # wi in columns 0 2: its rows sum to 1 5 2 4, rows 1 3 stay
        "feed_forward.wi": [[10, 12], [30, 32]],
        # wo in columns 1 3: its rows sum to 1 6 5 2, the stream goes on with 1 2
        "feed_forward.wo": [[11, 13], [21, 23]],
    }
    assert ladder.encoder.final_norm.weight.tolist() == [1, 2]
    assert ladder.decoder.blocks[0].self_attention_norm.weight.tolist() == [1, 2], "from the encoder's end into the decoder"


def test_aligned_pruning_worked_by_hand():  # Sec. 3.3
    t5, importance = hand_made()
    ladder = LadderT5(t5, r=2)
    init_side(ladder, importance, "aligned")
    assert side_weights(ladder) == {
        # what a dimension has in all matrices together, columns of q k v wi and rows of o wo:
        #     q 18 7 18 5,  k 4 4 4 7,  v 4 4 4 3,  wi 6 18 6 18,  o 6 19 4 20,  wo 19 6 5 20: sum 57 58 41 73
        # so the stream is 1 3, everywhere
        "self_attention_norm": [1, 3],
        # q and k in columns 1 3: q 2 2 3 5, k 4 2 2 3: sum 6 4 | 5 8: the first head keeps row 0, the second row 3
        "self_attention.q": [[1, 3], [31, 33]],
        "self_attention.k": [[1, 3], [31, 33]],
        # v in columns 1 3: 1 2 2 2, and o's columns in rows 1 3: 18 18 2 1: sum 19 20 | 4 3: rows 1 and 2
        "self_attention.v": [[11, 13], [21, 23]],
        "self_attention.o": [[11, 12], [31, 32]],
        "feed_forward_norm": [1, 3],
        # wi in columns 1 3: 18 0 18 0, and wo's columns in rows 1 3: 9 4 9 4: sum 27 4 27 4: rows 0 2
        "feed_forward.wi": [[1, 3], [21, 23]],
        "feed_forward.wo": [[10, 12], [30, 32]],
    }
    assert ladder.encoder.final_norm.weight.tolist() == ladder.decoder.final_norm.weight.tolist() == [1, 3]


# ----------------------------------------------------------------------------------------------------------- selection

def keep_top(scores, r):
    """Sort upwards, equal ones in their order, prune the first n - n / r."""
    order = sorted(range(len(scores)), key=lambda i: scores[i].item())
    return sorted(order[len(order) - len(order) // r :])


def authors_chain(t5, importance, r):
    """The chain step by step, as the authors' code runs it on T5 v1.0: {parameter: what is left of it}.  The running set is S."""
    weights, left = dict(t5.named_parameters()), {}

    def norm(name, S):
        left[name] = weights[name][S]

    def prune(names, S):
        score = torch.ones((), dtype=torch.float64)
        for name in names:
            score = score * importance[name].double()[:, S]
        rows = keep_top(score.sum(dim=1), r)
        for name in names:
            left[name] = weights[name][rows][:, S]
        return rows

    S = keep_top(importance["embed.weight"].T.double().sum(dim=1), r)
    for stack, sublayers in (("encoder", ["self_attention"]), ("decoder", ["self_attention", "cross_attention"])):
        for i in range(len(t5.get_submodule(stack).blocks)):
            block = f"{stack}.blocks.{i}"
            for attention in sublayers:
                norm(f"{block}.{attention}_norm.weight", S)
                S = prune([f"{block}.{attention}.{letter}.weight" for letter in "qkv"], S)
                S = prune([f"{block}.{attention}.o.weight"], S)
            norm(f"{block}.feed_forward_norm.weight", S)
            S = prune([f"{block}.feed_forward.wi.weight"], S)
            S = prune([f"{block}.feed_forward.wo.weight"], S)
        norm(f"{stack}.final_norm.weight", S)
    return left


@pytest.mark.parametrize("keep", [None, [0, 2], [1]], ids=str)
@pytest.mark.parametrize("r", [2, 4])
def test_published_is_the_authors_chain_step_by_step(r, keep):  # Sec. 3.3; Sec. 3.4 for the layers that are left
    t5 = tiny()
    importance = random_importance(t5)
    ladder = LadderT5(t5, r, keep)
    init_side(ladder, importance)
    left = authors_chain(t5, importance, r)
    for stack, side in (("encoder", ladder.encoder), ("decoder", ladder.decoder)):
        assert torch.equal(side.final_norm.weight, left[f"{stack}.final_norm.weight"])
        for i, block in zip(keep or range(3), side.blocks, strict=True):  # side layer j comes from backbone layer keep[j]
            for name, p in block.named_parameters():
                assert torch.equal(p, left[f"{stack}.blocks.{i}.{name}"]), (stack, i, name)


@VERSIONS
@MODES
def test_pruning_with_r_1_copies_the_backbone(mode, changes):  # Sec. 3.3
    t5 = tiny(**changes)
    ladder = LadderT5(t5, r=1)
    init_side(ladder, random_importance(t5), mode)
    for stack, side in ((t5.encoder, ladder.encoder), (t5.decoder, ladder.decoder)):
        side_state = dict(side.named_parameters())
        for name, p in stack.named_parameters():
            assert torch.equal(side_state[name], p), name


@VERSIONS
@MODES
def test_pruned_matrices_are_cut_out_of_the_backbones(mode, changes):  # Sec. 3.3: whole rows and columns, nothing rescaled
    t5 = tiny(**changes)
    importance = random_importance(t5)
    ladder = LadderT5(t5, 4, [0, 2])
    init_side(ladder, importance, mode)
    kept = {"published": published, "aligned": aligned}[mode](importance, t5, 4)
    for stack, side in (("encoder", ladder.encoder), ("decoder", ladder.decoder)):
        for i, block in zip([0, 2], side.blocks, strict=True):
            for name, p in block.named_parameters():
                whole, indices = t5.get_parameter(f"{stack}.blocks.{i}.{name}"), kept[f"{stack}.blocks.{i}.{name}"]
                assert len(indices) == p.ndim and all(len(index) * 4 == n for index, n in zip(indices, whole.shape))
                assert all(index.tolist() == sorted(set(index.tolist())) for index in indices)
                assert torch.equal(p, whole[torch.meshgrid(*indices, indexing="ij")])


@VERSIONS
def test_aligned_keeps_one_residual_stream_and_its_heads(changes):  # Sec. 3.3: columns of the pruned feature map go too
    t5 = tiny(**changes)
    kept = aligned(random_importance(t5), t5, 4)
    stream = kept["encoder.final_norm.weight"][0].tolist()
    for name, (rows, *columns) in kept.items():
        if name.endswith(("norm.weight", ".o.weight", ".wo.weight")):
            assert rows.tolist() == stream, name
        else:
            assert columns[0].tolist() == stream, name
    for attention in (name.removesuffix(".q.weight") for name in kept if name.endswith(".q.weight")):
        rows = {letter: kept[f"{attention}.{letter}.weight"][0] for letter in "qkv"}
        assert torch.equal(rows["q"], rows["k"]), "a score is a product of q's and k's same feature"
        assert torch.equal(rows["v"], kept[f"{attention}.o.weight"][1]), "o reads what v writes"
        for letter in "qkv":
            assert (rows[letter] // 8).tolist() == [0, 0, 1, 1], "side head h descends from backbone head h"
    for block in (name.removesuffix(".wo.weight") for name in kept if name.endswith(".wo.weight")):
        for wi in (name for name in kept if name.startswith(f"{block}.wi")):
            assert torch.equal(kept[wi][0], kept[f"{block}.wo.weight"][1]), "wo reads what wi writes"


@pytest.mark.parametrize("marked", ["readers", "writers"])
def test_aligned_prunes_what_matters_least(marked):  # Sec. 3.3: a dimension matters where it is read and where it is written
    t5 = tiny(feed_forward_proj="gated-gelu")
    importance = random_importance(t5, scale=0.01)
    stream, units, features = [2, 7, 11], [3, 5, 8, 13, 19], [1, 6, 9, 15]  # features: two in each head of 8
    for name, values in importance.items():
        if name.endswith(".q.weight"):
            values[features] += 1.0
        elif marked == "readers" and name.endswith(".v.weight"):
            values[features] += 1.0
        elif marked == "readers" and name.endswith((".wi_0.weight", ".wi_1.weight")):
            values[units] += 1.0
            values[:, stream] += 1.0
        elif marked == "writers" and name.endswith(".o.weight"):
            values[:, features] += 1.0
        elif marked == "writers" and name.endswith(".wo.weight"):
            values[:, units] += 1.0
            values[stream] += 1.0
    kept = aligned(importance, t5, 4)
    for name, (rows, *columns) in kept.items():
        expected = units if ".wi_" in name else features if name.endswith((".q.weight", ".k.weight", ".v.weight")) else stream
        assert rows.tolist() == expected, name


def test_among_equals_the_later_rows_stay():  # the authors' stable ascending sort prunes from its start
    assert best(torch.ones(6), 2).tolist() == [4, 5]
    assert best(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2).tolist() == [2, 3]
    assert best(torch.tensor([5.0, 0.0, 9.0, 0.0]), 3).tolist() == [0, 2, 3]


def test_tiny_importances_do_not_underflow_in_their_product():  # q * k * v of squared gradients
    q = torch.tensor([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]) * 1e-30
    score = joint(q, torch.full_like(q, 1e-30), torch.full_like(q, 1e-30))
    assert (q * 1e-30 * 1e-30 == 0).all(), "in float32 all would be equal"
    assert best(score, 2).tolist() == [0, 1]


@MODES
def test_the_scale_of_the_importance_does_not_matter(mode):
    t5 = tiny()
    small, large = (LadderT5(t5, r=4) for _ in range(2))
    init_side(small, random_importance(t5, scale=2.0 ** -100), mode)
    init_side(large, random_importance(t5), mode)
    for a, b in zip(small.encoder.blocks.parameters(), large.encoder.blocks.parameters(), strict=True):
        assert torch.equal(a, b)


@MODES
def test_position_bias_is_copied_whole_and_what_the_backbone_lacks_stays(mode):  # Sec. 3.3
    t5 = tiny()
    ladder = LadderT5(t5, r=4, keep=[1, 2])
    news = ("down", "up.", "alpha", "backbone.")
    before = {name: p.clone() for name, p in ladder.named_parameters()}
    init_side(ladder, magnitude(t5), mode)
    for name, p in ladder.named_parameters():
        assert torch.equal(p, before[name]) == any(new in name for new in news), name
    assert torch.equal(ladder.encoder.pos_bias.table.weight, t5.encoder.pos_bias.table.weight)
    assert torch.equal(ladder.decoder.pos_bias.table.weight, t5.decoder.pos_bias.table.weight)


def test_unknown_mode_is_refused():
    t5 = tiny()
    with pytest.raises(ValueError, match="choose from published, aligned"):
        init_side(LadderT5(t5, r=4), magnitude(t5), mode="fisher-v2")


# ---------------------------------------------------------------------------------------------------------- importance

def samples(count=5):
    """source_ids, source_mask, decoder_ids, decoder_mask, labels; lengths differ from row to row."""
    torch.manual_seed(2)
    source_mask, decoder_mask = torch.ones(count, 6, dtype=torch.bool), torch.ones(count, 4, dtype=torch.bool)
    for row in range(count):
        source_mask[row, 6 - row :], decoder_mask[row, 4 - row % 3 :] = False, False
    decoder_ids = torch.randint(3, 40, (count, 4)) * decoder_mask
    labels = torch.randint(3, 40, (count, 4)).masked_fill(~decoder_mask, -100)
    return torch.randint(3, 40, (count, 6)) * source_mask, source_mask, decoder_ids, decoder_mask, labels


def squared_gradients(t5, batch, rows):
    """Without `backward`: the mean of -log p(gold token) of each sample, its gradient squared, summed over samples."""
    names, parameters = zip(*t5.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in t5.named_parameters()}
    for row in rows:
        *inputs, labels = (tensor[row : row + 1] for tensor in batch)
        gold = [(t, label) for t, label in enumerate(labels[0].tolist()) if label != -100]
        log_p = t5(*inputs)[0].log_softmax(dim=-1)
        loss = -sum(log_p[t, label] for t, label in gold) / len(gold)
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            total[name] += gradient ** 2
    return total


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-9, msg=lambda text: f"{name}: {text}")


@VERSIONS
def test_fisher_is_the_sum_of_squared_gradients(changes):  # Sec. 3.3, empirical Fisher information
    t5, batch = tiny(**changes), samples()
    assert_same(fisher(t5, [batch]), squared_gradients(t5, batch, range(5)))


def test_fisher_takes_rows_one_by_one_whatever_the_batch_size():  # the square of a sum is not the sum of squares
    t5, batch = tiny(), samples()
    one, two = ([tuple(tensor[i : i + n] for tensor in batch) for i in range(0, 5, n)] for n in (1, 2))
    expected = fisher(t5, [batch])
    assert_same(fisher(t5, one), expected)
    assert_same(fisher(t5, two), expected)


def test_fisher_stops_after_its_samples():
    t5, batch = tiny(), samples()
    assert_same(fisher(t5, [batch], samples=3), squared_gradients(t5, batch, range(3)))
    never_read = None
    assert_same(fisher(t5, [batch, batch, never_read], samples=7), squared_gradients(t5, batch, [0, 1, 2, 3, 4, 0, 1]))


def test_fisher_leaves_the_model_as_it_was():
    t5, batch = tiny(), samples()
    weights = {name: p.clone() for name, p in t5.named_parameters()}
    expected = fisher(t5, [batch])
    t5.requires_grad_(False).train()
    t5.decoder.final_norm.requires_grad_(True)
    assert_same(fisher(t5, [batch]), expected)  # all parameters, and no dropout
    assert all(module.training for module in t5.modules())
    assert [name for name, p in t5.named_parameters() if p.requires_grad] == ["decoder.final_norm.weight"]
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in t5.named_parameters())


def test_fisher_without_samples_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        fisher(tiny(), [])


def test_magnitude_is_the_absolute_weight():  # Sec. 3.3
    t5 = tiny()
    importance = magnitude(t5)
    for name, p in t5.named_parameters():
        assert torch.equal(importance[name], torch.where(p < 0, -p, p)) and not importance[name].requires_grad


def test_fisher_starts_from_zero_and_restores_the_model_when_it_fails():
    t5 = T5(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).requires_grad_(False)
    batch = (torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long),
             torch.ones(1, 1, dtype=torch.bool), torch.tensor([[6]]))
    expected = fisher(t5, [batch])
    t5.requires_grad_(True)
    t5(*batch[:4]).sum().backward()  # gradients that somebody left
    assert all(torch.equal(values, expected[name]) for name, values in fisher(t5, [batch]).items())
    t5.requires_grad_(False)
    with pytest.raises(ValueError, match="at least one sample"):
        fisher(t5, [])
    assert not any(p.requires_grad for p in t5.parameters())
