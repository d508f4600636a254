"""The ladder side network: what Sec. 3.1, 3.2 and 3.4 claim, on models of a few thousand weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import T5, T5Config, generate
from prune import init_side, magnitude
from side import Ladder, LadderT5, without_grad

# No two of these widths are equal, and r = 4 makes six new ones, so that a shape tells whose tensor it is.
B, S, T, V = 2, 7, 5, 50
BACKBONE = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=3, num_heads=3)  # H * K = 48
SIDE_WIDTHS = {6, 4, 12, 20}  # d, K, H * K, d_ff of the side network

BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
LARGE = dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
THREE_B = dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32)
TABLE_1 = [1, 2, 3, 5, 6, 7, 9, 10, 11]


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return T5(T5Config(**(BACKBONE | changes))).eval()


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def lively(t5, r=4, keep=None):
    """A ladder in eval mode with weights large enough that everything matters: its own N(0, 0.01^2) hides mistakes in rounding."""
    torch.manual_seed(1)
    ladder = LadderT5(t5, r, keep).eval()
    for p in trainable(ladder):
        nn.init.normal_(p, std=0.3)
    return ladder


def batch(seed=2):
    """source_ids, source_mask, decoder_ids, decoder_mask; the second row is padded on both sides."""
    torch.manual_seed(seed)
    source_mask, decoder_mask = torch.ones(B, S, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    source_mask[1, 4:], decoder_mask[1, 3:] = False, False
    return torch.randint(3, V, (B, S)) * source_mask, source_mask, torch.randint(3, V, (B, T)) * decoder_mask, decoder_mask


def loss_of(model, inputs):
    labels = torch.randint(V, (B * T,), generator=torch.Generator().manual_seed(3))
    return F.cross_entropy(model(*inputs).flatten(0, 1).float(), labels)


def set_gates(ladder, alpha):
    for rung in [*ladder.encoder.ladders, *ladder.decoder.ladders]:
        nn.init.constant_(rung.alpha, alpha)


def stir(module):
    """Other weights, so other outputs, wherever anybody looks at them."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


# ------------------------------------------------------------------------------------------------------------- Sec. 3.2

@pytest.mark.parametrize("sizes, r, keep, count", [
    (BASE, 8, None, 5_097_240),  # Table 4
    (BASE, 8, TABLE_1, 3_878_706),  # Table 1
    (LARGE, 8, range(1, 24, 2), 9_057_304),
    (THREE_B, 8, [23], 2_494_850),
    (BASE, 2, None, 57_543_192),  # Fig. 5
    (BASE, 4, None, 16_386_072),
    (BASE, 16, None, 1_775_256),
    (BASE, 32, None, 694_872),
], ids=["base", "base-9", "large-12", "3b-1", "r2", "r4", "r16", "r32"])
def test_trainable_parameters_are_those_of_the_tables(sizes, r, keep, count):  # Tables 1 and 4, Fig. 5, Sec. 3.2
    with torch.device("meta"):
        ladder = LadderT5(T5(T5Config(**sizes)), r, keep)
    assert sum(p.numel() for p in trainable(ladder)) == count


def test_table_1_trains_1_74_percent_of_t5_base():  # Table 1
    for vocab_size, backbone_count in ((32128, 222_903_552), (32100, 222_882_048)):  # public T5; the authors cut spare rows
        with torch.device("meta"):
            t5 = T5(T5Config(**BASE, vocab_size=vocab_size))
            ladder = LadderT5(t5, 8, TABLE_1)
        assert sum(p.numel() for p in t5.parameters()) == backbone_count
        assert round(100 * sum(p.numel() for p in trainable(ladder)) / backbone_count, 3) == 1.740


def test_every_width_is_divided_by_r_and_the_heads_stay():  # Sec. 3.2, "Lightweight architecture"
    block = LadderT5(tiny(), r=4).decoder.blocks[0]
    for attention in (block.self_attention, block.cross_attention):
        assert attention.q.weight.shape == (48 // 4, 24 // 4) and attention.o.weight.shape == (24 // 4, 48 // 4)
        assert attention.num_heads == 3
    assert block.feed_forward.wi.weight.shape == (80 // 4, 24 // 4) and block.feed_forward.wo.weight.shape == (24 // 4, 80 // 4)


def test_gate_starts_at_one_half():  # Sec. 3.2
    ladder = LadderT5(tiny(), r=4)
    for rung in [*ladder.encoder.ladders, *ladder.decoder.ladders]:
        assert rung.mu.item() == 0.5
    h_side, h_backbone = torch.randn(B, S, 6), torch.randn(B, S, 24)
    torch.testing.assert_close(rung(h_side, h_backbone), (rung.down(h_backbone) + h_side) / 2)


def test_gate_is_the_sigmoid_of_alpha_over_the_temperature():  # Sec. 3.2, temperature 0.1
    rung = Ladder(24, 6)
    nn.init.constant_(rung.alpha, 0.1 * torch.log(torch.tensor(3.0)))  # sigmoid(log 3) = 3 / 4, of the backbone
    h_side, h_backbone = torch.randn(B, S, 6), torch.randn(B, S, 24)
    torch.testing.assert_close(rung(h_side, h_backbone), 0.75 * rung.down(h_backbone) + 0.25 * h_side)


def test_a_gate_fully_open_passes_the_backbone_only_and_fully_shut_the_side_only():  # Sec. 3.2
    rung = Ladder(24, 6)
    h_side, h_backbone = torch.randn(B, S, 6), torch.randn(B, S, 24)
    nn.init.constant_(rung.alpha, 20.0)  # mu = sigmoid(200) = 1
    assert torch.equal(rung(h_side, h_backbone), rung.down(h_backbone))
    assert torch.equal(rung(h_side, h_backbone), rung(torch.randn_like(h_side), h_backbone))
    nn.init.constant_(rung.alpha, -20.0)  # mu = sigmoid(-200) = 0, up to rounding
    torch.testing.assert_close(rung(h_side, h_backbone), h_side)
    torch.testing.assert_close(rung(h_side, torch.randn_like(h_backbone)), h_side)


def test_with_all_gates_open_the_answer_no_longer_depends_on_the_first_side_block():  # Sec. 3.2
    ladder, inputs = lively(tiny()), batch()
    before = ladder(*inputs)
    for side in (ladder.encoder, ladder.decoder):
        stir(side.down_emb)
        stir(side.blocks[0])
    assert not torch.equal(ladder(*inputs), before)
    set_gates(ladder, 20.0)
    before = ladder(*inputs)
    for side in (ladder.encoder, ladder.decoder):
        stir(side.down_emb)
        stir(side.blocks[0])
    assert torch.equal(ladder(*inputs), before)


@pytest.mark.parametrize("r", [1, 4])
def test_with_all_gates_shut_the_answer_no_longer_depends_on_the_backbones_blocks(r):  # Fig. 8, network compression
    ladder, inputs = lively(tiny(), r), batch()
    before = ladder(*inputs)
    stir(ladder.backbone.encoder.blocks)
    changed = ladder(*inputs)
    stir(ladder.backbone.decoder.blocks)
    assert not torch.equal(changed, before) and not torch.equal(ladder(*inputs), changed)
    ladder.shut_gates()
    before = ladder(*inputs)
    stir(ladder.backbone.encoder)  # no way from the backbone's encoder: the side decoder looks at the side encoder
    stir(ladder.backbone.decoder)
    assert torch.equal(ladder(*inputs), before)


def test_shut_gates_take_the_rungs_out_of_training():  # Fig. 8
    ladder = LadderT5(tiny(), r=4)
    count = sum(p.numel() for p in trainable(ladder))
    ladder.shut_gates()
    assert count - sum(p.numel() for p in trainable(ladder)) == 6 * (24 * 6 + 6 + 1)  # six rungs: weight, bias, alpha
    loss_of(ladder, batch()).backward()
    assert all(p.grad.isfinite().all() for p in trainable(ladder))


@pytest.mark.parametrize("keep", [None, [0, 2], [2]], ids=str)
def test_forward_is_the_recursion_of_the_paper(keep):  # Sec. 3.2 and 3.4
    ladder, (source_ids, source_mask, decoder_ids, decoder_mask) = lively(tiny(), keep=keep), batch()

    def climb(side, h_backbones, mask, memory=None):
        """Block_i(mu_i * down_i(h_backbone_i) + (1 - mu_i) * h_side) for kept layers i, everything laid out in lists."""
        emb, *outputs = h_backbones
        h_side = side.down_emb(emb)
        self_bias, cross_bias = side.biases(h_side, mask, None if memory is None else source_mask, None)
        for rung, block, i in zip(side.ladders, side.blocks, keep or range(3), strict=True):
            mu = torch.sigmoid(rung.alpha / 0.1)
            h_side = block(mu * rung.down(outputs[i]) + (1 - mu) * h_side, self_bias, memory, cross_bias)
        return side.final_norm(h_side)

    t5 = ladder.backbone
    memory_backbone = t5.encode(source_ids, source_mask)
    memory_side = climb(ladder.encoder, list(t5.encoder_layers(source_ids, source_mask)), source_mask)
    decoder = list(t5.decoder_layers(decoder_ids, decoder_mask, memory_backbone, source_mask))
    h_side = climb(ladder.decoder, decoder, decoder_mask, memory_side)
    torch.testing.assert_close(ladder(source_ids, source_mask, decoder_ids, decoder_mask), t5.logits(ladder.up(h_side)))


@pytest.mark.parametrize("changes", [{}, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)], ids=["v1.0", "v1.1"])
def test_with_r_1_and_shut_gates_a_copied_side_network_is_the_backbone(changes):  # Sec. 3.2 and 3.3
    t5, inputs = tiny(**changes), batch()
    ladder = LadderT5(t5, r=1).eval()
    init_side(ladder, magnitude(t5))
    for projection in (ladder.encoder.down_emb, ladder.decoder.down_emb, ladder.up):
        nn.init.eye_(projection.weight)
    torch.testing.assert_close(ladder.shut_gates()(*inputs), t5(*inputs))


def test_padding_changes_nothing():
    ladder, (source_ids, source_mask, decoder_ids, decoder_mask) = lively(tiny()), batch()
    padded = ladder(source_ids, source_mask, decoder_ids, decoder_mask)[1:, :3]
    alone = ladder(source_ids[1:, :4], source_mask[1:, :4], decoder_ids[1:, :3])
    torch.testing.assert_close(padded, alone)


# ------------------------------------------------------------------------------------------------------------- Sec. 3.1

def saved_by_autograd(model, inputs):
    """Shapes of all that the forward pass keeps for the backward pass, parameters left out."""
    parameters, shapes = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    return shapes


def leaves(grad_fn):
    """The parameters that a backward pass from here would reach."""
    seen, todo, found = set(), [grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= {node.variable} if hasattr(node, "variable") else set()
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_autograd_saves_nothing_of_the_backbones_insides(attention):  # Sec. 3.1
    shapes = saved_by_autograd(lively(tiny(attention=attention)).train(), batch())
    last = {shape[-1] for shape in shapes if shape}
    assert last <= SIDE_WIDTHS | {24, S, T, 1}, "only the side's widths, the handed-out D, scores and norms"
    assert SIDE_WIDTHS <= last, "the hooks see the side network"
    assert sum(shape[-1:] == (24,) for shape in shapes) == 2 * (3 + 1), "each stack hands out its embeddings and N outputs"


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_a_deeper_backbone_adds_nothing_to_what_autograd_saves(attention):  # Sec. 3.1 and 3.4
    shallow, deep = (lively(tiny(attention=attention, num_layers=n), keep=[0, 1]).train() for n in (2, 6))
    assert saved_by_autograd(shallow, batch()) == saved_by_autograd(deep, batch())


def test_the_graph_holds_every_trainable_parameter_and_no_other():  # Sec. 3.1
    ladder = LadderT5(tiny(), r=4, keep=[0, 2])
    assert leaves(loss_of(ladder, batch()).grad_fn) == set(trainable(ladder))


@pytest.mark.parametrize("changes", [{}, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)], ids=["v1.0", "v1.1"])
def test_backbone_gets_no_gradient_and_every_side_parameter_gets_one(changes):  # Sec. 3.1 and 3.2
    ladder = lively(tiny(**changes))
    loss_of(ladder, batch()).backward()
    assert all(p.grad is None for p in ladder.backbone.parameters())
    without = [name for name, p in ladder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_no_gradient_enters_the_backbones_layers_even_if_they_are_thawed():  # Sec. 3.1: no_grad, not only frozen parameters
    ladder = lively(tiny())
    ladder.backbone.encoder.requires_grad_(True)
    ladder.backbone.decoder.requires_grad_(True)
    loss_of(ladder, batch()).backward()
    assert all(p.grad is None for p in ladder.backbone.parameters())
    memory_backbone, memory_side = ladder.encode(*batch()[:2])
    assert memory_side.requires_grad and not memory_backbone.requires_grad


def test_without_grad_stands_around_each_step_and_leaks_nothing():  # Sec. 3.1
    inside = []

    def climb():
        for i in range(3):
            inside.append(torch.is_grad_enabled())
            yield torch.tensor(float(i))

    outside = [torch.is_grad_enabled() for _ in without_grad(climb())]
    assert outside == [True] * 3 and torch.is_grad_enabled()
    abandoned = without_grad(climb())
    next(abandoned)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        next(abandoned)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and inside == [False] * 5


@pytest.mark.parametrize("tied", [True, False])
def test_training_changes_the_side_network_and_not_one_byte_of_the_backbone(tied):  # Sec. 3.2: word embeddings and head stay frozen
    ladder, inputs = lively(tiny(tie_word_embeddings=tied)).train(), batch()
    before, side_before = copy.deepcopy(ladder.backbone.state_dict()), [p.clone() for p in trainable(ladder)]
    optimizer = torch.optim.AdamW(ladder.parameters(), lr=1e-2, weight_decay=0.1)
    first = loss_of(ladder.eval(), inputs).item()
    for _ in range(25):
        loss_of(ladder.train(), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(ladder.eval(), inputs).item() < 0.9 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in ladder.backbone.state_dict().items())
    assert not any(torch.equal(now, then) for now, then in zip(trainable(ladder), side_before))


def test_train_mode_leaves_the_backbone_in_eval_mode():
    ladder, inputs = lively(tiny(dropout_rate=0.5)).train(), batch()
    assert ladder.encoder.training and not any(module.training for module in ladder.backbone.modules())
    assert not torch.equal(ladder(*inputs), ladder(*inputs)), "the side network's own dropout is on"
    for module in [*ladder.encoder.modules(), *ladder.decoder.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(ladder(*inputs), ladder(*inputs))


# ------------------------------------------------------------------------------------------------------------- Sec. 3.4

def test_dropping_a_layer_is_skipping_it():  # Sec. 3.4
    full, inputs = lively(tiny()), batch()
    dropped = lively(tiny(), keep=[0, 2])
    with torch.no_grad():
        for name in ("encoder", "decoder"):
            whole, short = getattr(full, name), getattr(dropped, name)
            for j, i in enumerate([0, 2]):
                short.ladders[j].load_state_dict(whole.ladders[i].state_dict())
                short.blocks[j].load_state_dict(whole.blocks[i].state_dict())
            for shared in ("down_emb", "pos_bias", "final_norm"):
                getattr(short, shared).load_state_dict(getattr(whole, shared).state_dict())
            whole.ladders[1].alpha.fill_(-torch.inf)  # layer 1 of the full ladder: the rung adds nothing ...
            for parameter, value in whole.blocks[1].named_parameters():
                if parameter.endswith((".o.weight", ".wo.weight")):
                    value.zero_()  # ... and neither does the block
        dropped.up.load_state_dict(full.up.state_dict())
    torch.testing.assert_close(dropped(*inputs), full(*inputs))


def test_a_dropped_layer_has_neither_block_nor_rung():  # Sec. 3.4
    ladder = LadderT5(tiny(), r=4, keep=[2, 0])
    for side in (ladder.encoder, ladder.decoder):
        assert side.keep == (0, 2) and len(side.blocks) == len(side.ladders) == 2


def test_by_default_a_deeper_decoder_gets_a_deeper_ladder():
    ladder = lively(tiny(num_layers=2, num_decoder_layers=4))
    assert (len(ladder.encoder.blocks), len(ladder.decoder.blocks)) == (2, 4)
    loss_of(ladder, batch()).backward()
    assert all(p.grad.any() for p in trainable(ladder))
    assert ladder.generate(*batch()[:2], max_new_tokens=3, num_beams=2).shape[0] == B


@pytest.mark.parametrize("r", [0, -4, 3, 5, 16])
def test_r_that_does_not_divide_is_refused_with_the_choices(r):
    with pytest.raises(ValueError, match=r"choose from \[1, 2, 4, 8\]"):
        LadderT5(tiny(), r=r)


@pytest.mark.parametrize("keep", [[], [1, 1], [-1], [0, 3]], ids=str)
def test_keep_that_is_no_set_of_layers_is_refused_with_the_choices(keep):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        LadderT5(tiny(), r=4, keep=keep)


def test_keep_must_name_layers_of_both_stacks():
    with pytest.raises(ValueError, match="layers 0 to 1"):
        LadderT5(tiny(num_layers=2, num_decoder_layers=4), r=4, keep=[0, 2])


# ------------------------------------------------------------------------------------------------ generation and numerics

class Uncached:
    """Answers `generate` like a ladder, but reads the whole beginning again at every step; it is its own state."""

    def __init__(self, ladder):
        self.ladder, self.moves = ladder, 0

    def start(self, source_ids, source_mask, num_beams, images):
        self.source_ids, self.source_mask = source_ids.repeat_interleave(num_beams, 0), source_mask.repeat_interleave(num_beams, 0)
        self.ids = torch.empty(len(self.source_ids), 0, dtype=torch.long)
        return self

    def step(self, ids, _):
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.ladder(self.source_ids, self.source_mask, self.ids)[:, -1]

    def reorder(self, rows):
        self.moves += int((rows != torch.arange(len(rows))).any())
        self.ids = self.ids[rows]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("keep", [None, [0, 2], [1]], ids=str)
def test_generation_with_two_caches_is_generation_without(keep, num_beams):
    ladder, (source_ids, source_mask, _, _) = lively(tiny(), keep=keep), batch()
    nn.init.zeros_(ladder.up.bias)  # it would favour the same token at every position
    set_gates(ladder, 0.0)
    uncached = Uncached(ladder)
    expected = generate(uncached, source_ids, source_mask, 10, num_beams)
    assert torch.equal(ladder.generate(source_ids, source_mask, 10, num_beams), expected)
    assert (uncached.moves > 0) == (num_beams > 1), "beams that never change places would prove nothing"


@pytest.mark.parametrize("keep", [None, [0, 2]], ids=str)
def test_each_step_with_caches_gives_the_logits_of_the_whole_text(keep):
    ladder, (source_ids, source_mask, decoder_ids, _) = lively(tiny(), keep=keep), batch()
    state = ladder.start(source_ids, source_mask)
    steps = torch.stack([ladder.step(decoder_ids[:, t : t + 1], state) for t in range(T)], dim=1)  # (B, T, V)
    torch.testing.assert_close(steps, ladder(source_ids, source_mask, decoder_ids))


def test_caches_of_both_networks_follow_their_beams():
    ladder, (source_ids, source_mask, decoder_ids, _) = lively(tiny()), batch()
    state = ladder.start(source_ids, source_mask, num_beams=2)  # rows: source 0, 0, 1, 1
    first, second, rows = torch.randint(3, V, (4, 1)), torch.randint(3, V, (4, 1)), torch.tensor([1, 0, 3, 3])
    ladder.step(first, state)
    state.reorder(rows)
    whole = torch.cat([first[rows], second], dim=1)
    expected = ladder(source_ids.repeat_interleave(2, 0), source_mask.repeat_interleave(2, 0), whole)[:, -1]
    torch.testing.assert_close(ladder.step(second, state), expected)


def test_eager_and_fused_attention_agree_on_logits_and_gradients():
    eager, fused = (lively(tiny(attention=attention)) for attention in ("eager", "fused"))
    torch.testing.assert_close(eager(*batch()), fused(*batch()))
    for model in (eager, fused):
        loss_of(model, batch()).backward()
    for a, b in zip(trainable(eager), trainable(fused), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_bf16_backbone_trains_an_fp32_side_network():
    ladder, exact = lively(tiny().bfloat16()), lively(tiny())
    loss = loss_of(ladder, batch())
    torch.testing.assert_close(loss, loss_of(exact, batch()), rtol=0.05, atol=0.05)
    loss.backward()
    assert {p.dtype for p in ladder.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainable(ladder)} == {p.grad.dtype for p in trainable(ladder)} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trainable(ladder))
    assert ladder.generate(*batch()[:2], max_new_tokens=4, num_beams=2).shape[0] == B
