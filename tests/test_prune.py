"""Structural weight initialization (Sec. 3.3): importance, rows that stay, the side network."""
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import T5, T5Config
from prune import aligned, fisher, init_side, magnitude, published, sublayers
from side import LadderT5

SIZES = dict(vocab_size=40, d_model=12, d_kv=8, d_ff=20, num_layers=3, num_heads=2)  # H K = 16
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
VERSIONS = pytest.mark.parametrize("changes", [{}, GATED], ids=["v1.0", "v1.1"])


def tiny(**changes):
    """A frozen T5 of random weights: no two are equal, so a weight tells where it comes from."""
    torch.manual_seed(0)
    t5 = T5(T5Config(**(SIZES | changes), attention="eager")).eval().requires_grad_(False)
    for p in t5.parameters():
        nn.init.normal_(p, std=0.5)
    return t5


def random_importance(t5, scale=1.0):
    torch.manual_seed(1)
    return {name: scale * torch.rand_like(p) for name, p in t5.named_parameters()}


def copies(ladder):
    """Every pruned weight of the side network, by the name it has in the backbone."""
    for stack in ("encoder", "decoder"):
        side = ladder.get_submodule(stack)
        yield f"{stack}.final_norm.weight", side.final_norm.weight
        for i, block in zip(side.keep, side.blocks, strict=True):
            for name, p in block.block.named_parameters():
                yield f"{stack}.blocks.{i}.{name}", p


# -------------------------------------------------------------------------------------- selection

IMPORTANCE = {  # for the two tests that are worked by hand: 4 x 4 matrices, one layer, two heads
    "embed": "1234 0201 0001 0101",  # a row for each word
    "encoder.blocks.0.self_attention.q": "9191 9290 0390 0104",
    "encoder.blocks.0.self_attention.k": "1113 1111 1111 1112",
    "encoder.blocks.0.self_attention.v": "1110 1111 1111 1111",
    "encoder.blocks.0.self_attention.o": "0051 9910 0022 9911",
    "encoder.blocks.0.feed_forward.wi": "1909 2030 0929 3010",
    "encoder.blocks.0.feed_forward.wo": "9091 0303 0203 9191",
}


def left_by(choose):
    """Rows and columns of the encoder for r = 2: "23 13" has rows 2 3 and columns 1 3."""
    t5 = tiny(vocab_size=4, d_model=4, d_kv=2, d_ff=4, num_layers=1)
    importance = {name: torch.zeros_like(p) for name, p in t5.named_parameters()}
    for name, matrix in IMPORTANCE.items():
        matrix = torch.tensor([[float(digit) for digit in row] for row in matrix.split()])
        importance[f"{name}.weight"] = matrix
    kept = choose(importance, t5, r=2)
    return {name.split(".")[-2]: " ".join("".join(map(str, index.tolist())) for index in indices)
            for name, indices in kept.items() if name.startswith("encoder")}


def test_published_chain_worked_by_hand():  # Sec. 3.3 and the authors' code
    assert left_by(published) == {
        # embed: the columns sum to 1 5 3 7, so the stream starts with dimensions 1 3
        "self_attention_norm": "13",
        # q * k * v in columns 1 3: 1 1 1 + 1 3 0 = 1, 2 1 1 + 0 = 2, 3 1 1 + 0 = 3, 1 1 1 + 4 2 1
        # = 9: rows 2 3, both of the second head
        "q": "23 13", "k": "23 13", "v": "23 13",
        # o in columns 2 3: its rows sum to 6 1 4 2, so the stream goes on with 0 2, not 1 3
        "o": "02 23", "feed_forward_norm": "02",
        # wi in columns 0 2: its rows sum to 1 5 2 4, rows 1 3 stay
        "wi": "13 02",
        # wo in columns 1 3: its rows sum to 1 6 5 2, the stream goes on with 1 2
        "wo": "12 13", "final_norm": "12",
    }


def test_aligned_pruning_worked_by_hand():  # Sec. 3.3
    assert left_by(aligned) == {
        # what a dimension has in all matrices, columns of q k v wi and rows of o wo: q 18 7 27 5,
        # k 4 4 4 7, v 4 4 4 3, wi 6 18 6 18, o 6 19 4 20, wo 19 6 5 20: 57 58 50 73, so 1 3 stay
        "self_attention_norm": "13", "feed_forward_norm": "13", "final_norm": "13",
        # q and k in columns 1 3: q 2 2 3 5, k 4 2 2 3: sum 6 4 | 5 8: rows 0 and 3, one in a head
        "q": "03 13", "k": "03 13",
        # v in columns 1 3: 1 2 2 2, o's columns in rows 1 3: 18 18 2 1: sum 19 20 | 4 3: 1 and 2
        "v": "12 13", "o": "13 12",
        # wi in columns 1 3: 18 0 18 0, wo's columns in rows 1 3: 9 4 9 4: sum 27 4 27 4: rows 0 2
        "wi": "02 13", "wo": "13 02",
    }


def authors_chain(t5, importance, r):
    """The authors' code step by step: {name: what is left}. The running set is S."""
    def keep_top(scores):  # sort upwards, equal ones in their order; prune the first n - n / r
        n = len(scores)
        return sorted(sorted(range(n), key=scores.tolist().__getitem__)[n - n // r :])

    left, S = {}, keep_top(importance["embed.weight"].double().sum(dim=0))
    wi = ["wi_0", "wi_1"] if "gated" in t5.config.feed_forward_proj else ["wi"]  # gated is ours
    for stack, parts in (("encoder", ["self_attention", "feed_forward"]),
                         ("decoder", ["self_attention", "cross_attention", "feed_forward"])):
        for part in [f"{stack}.blocks.{i}.{part}" for i in range(3) for part in parts]:
            left[f"{part}_norm.weight"] = t5.get_parameter(f"{part}_norm.weight")[S]
            for group in (wi, ["wo"]) if part.endswith("feed_forward") else ("qkv", "o"):
                names, score = [f"{part}.{name}.weight" for name in group], 1.0
                for name in names:
                    score = score * importance[name].double()[:, S]
                rows = keep_top(score.sum(dim=1))
                left |= {name: t5.get_parameter(name)[rows][:, S] for name in names}
                S = rows
        left[f"{stack}.final_norm.weight"] = t5.get_parameter(f"{stack}.final_norm.weight")[S]
    return left


@VERSIONS
@pytest.mark.parametrize("keep", [None, [0, 2], [1]], ids=str)
@pytest.mark.parametrize("r", [1, 2, 4])  # r = 1 copies the backbone
def test_published_is_the_authors_chain_step_by_step(r, keep, changes):  # Sec. 3.3 and 3.4
    t5 = tiny(**changes)  # nothing is rescaled, dropped layers are not there
    importance = random_importance(t5, scale=2.0 ** -100)  # q * k * v underflows in float32
    for name in list(importance)[::2]:
        importance[name] = importance[name].ceil() * 2.0 ** -100  # all are equal: the later stay
    ladder = LadderT5(t5, r, keep)
    init_side(ladder, importance)
    left = authors_chain(t5, importance, r)
    assert len(list(copies(ladder))) >= 2 + len(keep or range(3)) * (8 + 13)
    assert all(torch.equal(p, left[name]) for name, p in copies(ladder))


@VERSIONS
@pytest.mark.parametrize("r", [1, 4])
def test_aligned_keeps_one_residual_stream_and_its_heads(r, changes):
    t5 = tiny(**changes)
    importance, ladder = random_importance(t5), LadderT5(t5, r, [0, 2])
    init_side(ladder, importance, "aligned")
    kept = aligned(importance, t5, r)
    for name, p in copies(ladder):
        assert torch.equal(p, t5.get_parameter(name)[torch.meshgrid(*kept[name], indexing="ij")])
    stream, heads = kept["encoder.final_norm.weight"][0], [0] * (8 // r) + [1] * (8 // r)
    for norm, reads, writes in sublayers(t5):
        streams = [kept[norm][0], *(kept[W][1] for W in reads), kept[writes or norm][0]]
        assert all(torch.equal(index, stream) for index in streams), norm
        rows = [kept[W][0] for W in reads]
        if len(reads) == 3:
            q, k, *rows = rows
            assert torch.equal(q, k), "a score is a product of q's and k's same feature"
            assert (q // 8).tolist() == (rows[0] // 8).tolist() == heads, "heads stay"
        assert all(torch.equal(row, kept[writes][1]) for row in rows), "o reads v, wo reads wi"


@pytest.mark.parametrize("mode", ["published", "aligned"])
def test_position_bias_is_copied_whole_and_what_the_backbone_lacks_stays(mode):  # Sec. 3.3
    t5 = tiny()
    ladder = LadderT5(t5, r=4, keep=[1, 2])
    before = {name: p.clone() for name, p in ladder.named_parameters()}
    init_side(ladder, magnitude(t5), mode)
    for name, p in ladder.named_parameters():
        stays = any(word in name for word in ("down", "up.", "alpha", "backbone."))
        assert torch.equal(p, before[name]) == stays, name
    for side, backbone in ((ladder.encoder_bias, t5.encoder), (ladder.decoder_bias, t5.decoder)):
        assert torch.equal(side.table.weight, backbone.pos_bias.table.weight)


# ------------------------------------------------------------------------------------- importance

def test_magnitude_is_the_absolute_weight():  # Sec. 3.3
    t5 = tiny()
    assert all(torch.equal(magnitude(t5)[name], p.abs()) for name, p in t5.named_parameters())


def samples(T=4, padding=1):
    """Five, of different lengths: source_ids, source_mask, decoder_ids, decoder_mask, labels."""
    torch.manual_seed(2)
    row = padding * torch.arange(5)[:, None]
    source_mask, decoder_mask = torch.arange(7) < 7 - row, torch.arange(T) < T - row % min(3, T)
    source_ids, decoder_ids = torch.randint(3, 12, (5, 7)), torch.randint(3, 40, (5, T))
    labels = torch.randint(3, 40, (5, T)).masked_fill(~decoder_mask, -100)
    return source_ids * source_mask, source_mask, decoder_ids * decoder_mask, decoder_mask, labels


def one_by_one(t5, batch):
    """The definition: the gradient of each sample's mean -log p(gold token), squared and summed."""
    names, parameters = zip(*t5.requires_grad_(True).named_parameters())
    total = dict.fromkeys(names, 0.0)
    for row in range(len(batch[0])):
        S, T = batch[1][row].sum(), batch[3][row].sum()  # without padding
        log_p = t5(*(tensor[row : row + 1, :n] for tensor, n in zip(batch, (S, S, T, T))))[0]
        loss = -log_p.float().log_softmax(dim=-1)[range(T), batch[4][row, :T]].mean()
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters)):
            total[name] = total[name] + gradient.float() ** 2
    t5.requires_grad_(False)
    return total


def assert_same(one, other, share=2e-5):  # of each matrix's largest value
    for name, values in one.items():
        error = (values - other[name]).abs().max() / values.max()
        assert error <= share, (name, error)


@pytest.mark.parametrize("T, padding", [(2, 0), (6, 1)])  # short targets have their own formula
@pytest.mark.parametrize("changes", [{}, GATED, dict(tie_word_embeddings=False), dict(
    scale_decoder_outputs=False), dict(checkpoint=True)], ids=str)
def test_fisher_is_the_sum_of_each_samples_squared_gradients(changes, T, padding):  # Sec. 3.3
    t5, batch = tiny(**changes), samples(T, padding)
    assert_same(fisher(t5, [batch]), one_by_one(t5, batch))
    importance = fisher(t5.bfloat16(), [batch])
    assert_same(importance, one_by_one(t5, batch), share=0.05)
    assert all(values.dtype == torch.float32 for values in importance.values())
    assert published(importance, t5, 2) and aligned(importance, t5, 2)  # nothing is missing


def test_fisher_depends_on_its_samples_only_not_on_their_batches():
    t5, batch = tiny(), samples()
    for n in (1, 2):  # the square of a sum is not the sum of squares
        parts = [tuple(tensor[i : i + n] for tensor in batch) for i in range(0, 5, n)]
        assert_same(fisher(t5, parts), fisher(t5, [batch]))
    first, never_read = [tensor[:3] for tensor in batch], None
    assert_same(fisher(t5, [batch, never_read], samples=3), one_by_one(t5, first))


def test_fisher_leaves_the_model_as_it_was():
    t5, batch = tiny(), samples()
    expected = fisher(t5, [batch])
    norm = t5.train().decoder.final_norm.requires_grad_(True)
    norm.weight.grad = torch.ones(12)  # somebody left it
    assert_same(fisher(t5, [batch]), expected)  # without dropout, and from zero
    assert all(module.training for module in t5.modules())
    assert [p is norm.weight for p in t5.parameters() if p.requires_grad] == [True]
    assert [p.grad.sum() for p in t5.parameters() if p.grad is not None] == [12]


class Largest(TorchDispatchMode):
    elements = 0  # of the largest tensor that is made
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


@VERSIONS
def test_fisher_never_holds_the_gradients_of_several_samples(changes):
    t5 = tiny(vocab_size=500, d_model=96, d_ff=192, **changes)
    with Largest() as largest:
        fisher(t5, [samples(T=2)])
    assert largest.elements == 500 * 96
