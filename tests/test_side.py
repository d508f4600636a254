"""The ladder side network: what Sec. 3.1, 3.2, 3.4 and 4 claim, on models of few weights."""
import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from methods import METHODS, apply
from model import CLIPT5, T5, Generates, T5Config
from run import kernels
from side import Gate, LadderT5, side_config

# No two of these widths are equal, and r = 4 makes six new ones: a shape tells whose tensor it is.
B, S, T, V, N, P, C = 2, 7, 5, 50, 2, 4, 10  # two images of 2 x 2 cells
BACKBONE = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=3, num_heads=3)  # H * K = 48
SIDE_WIDTHS = {6, 4, 12, 20}  # d, K, H * K, d_ff of the side network

BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
LARGE = dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
THREE_B = dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32)
TABLE_1 = [1, 2, 3, 5, 6, 7, 9, 10, 11]
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
both_versions = pytest.mark.parametrize("changes", [{}, V1_1], ids=["v1.0", "v1.1"])


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return T5(T5Config(**(BACKBONE | changes))).eval()


def clip_t5(**changes):
    torch.manual_seed(0)
    return CLIPT5(T5Config(**(BACKBONE | dict(dropout_rate=0.0) | changes)), C).eval()


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def lively(t5, r=4, keep=None):
    """A ladder in eval mode with large weights: its own N(0, 0.01^2) hides mistakes in rounding."""
    torch.manual_seed(1)
    ladder = LadderT5(t5, r, keep).eval()
    for p in trainable(ladder):
        nn.init.normal_(p, std=0.3)
    return ladder


def batch(images=None):
    """Source ids and mask, decoder ids and mask; the second row is padded on both sides."""
    torch.manual_seed(2)
    source_mask, decoder_mask = torch.ones(B, S).bool(), torch.ones(B, T).bool()
    source_mask[1, 4:], decoder_mask[1, 3:] = False, False
    text = (torch.randint(3, V, (B, S)) * source_mask, source_mask,
            torch.randint(3, V, (B, T)) * decoder_mask, decoder_mask)
    return text if images is None else (*text, torch.randn(B, images, P, C))


def loss_of(model, inputs):
    labels = torch.randint(V, (B * T,), generator=torch.Generator().manual_seed(3))
    return F.cross_entropy(model(*inputs).flatten(0, 1).float(), labels)


def stacks(ladder):
    return (ladder.encoder, ladder.encoder_bias), (ladder.decoder, ladder.decoder_bias)


def rungs(ladder):
    return [block.rung for side, _ in stacks(ladder) for block in side.blocks]


def set_gates(ladder, alpha):
    for rung in rungs(ladder):
        nn.init.constant_(rung.alpha, alpha)


# ---------------------------------------------------------------------------------------- Sec. 3.2

@pytest.mark.parametrize("sizes, r, keep, count", [
    (BASE, 8, None, 5_097_240), (LARGE, 8, range(1, 24, 2), 9_057_304),  # Table 4
    (THREE_B, 8, [23], 2_494_850),
    (BASE, 2, None, 57_543_192), (BASE, 4, None, 16_386_072),  # Fig. 5
    (BASE, 16, None, 1_775_256), (BASE, 32, None, 694_872),
], ids=["base", "large-12", "3b-1", "r2", "r4", "r16", "r32"])
def test_trainable_parameters_are_those_of_the_tables(sizes, r, keep, count):
    with torch.device("meta"):
        ladder = LadderT5(T5(T5Config(**sizes)), r, keep)
    assert sum(p.numel() for p in trainable(ladder)) == count


@pytest.mark.parametrize("rows, channels, r, keep, count, percent", [
    (32100, None, 8, TABLE_1, 3_878_706, 1.74),  # the authors cut the spare rows of public T5
    (32128, None, 8, TABLE_1, 3_878_706, 1.74), (32200, 2048, 4, None, 17_967_384, 7.46)])
def test_trained_shares_are_those_of_tables_1_and_3(rows, channels, r, keep, count, percent):
    with torch.device("meta"):
        config = T5Config(**BASE, vocab_size=rows)
        t5 = CLIPT5(config, channels) if channels else T5(config)
        backbone = sum(p.numel() for p in t5.parameters())
        ladder = LadderT5(t5, r, keep)
    whole = sum(p.numel() for p in ladder.parameters()) if channels else backbone
    assert sum(p.numel() for p in trainable(ladder)) == count
    assert round(100 * count / whole, 2) == percent


def test_every_width_is_divided_by_r_and_the_heads_stay():  # Sec. 3.2, "Lightweight architecture"
    block = LadderT5(tiny(), r=4).decoder.blocks[0].block
    for attention in (block.self_attention, block.cross_attention):
        assert attention.q.weight.shape == (48 // 4, 24 // 4) and attention.num_heads == 3
        assert attention.o.weight.shape == (24 // 4, 48 // 4)
    assert block.feed_forward.wi.weight.shape == (80 // 4, 24 // 4)
    assert block.feed_forward.wo.weight.shape == (24 // 4, 80 // 4)
    with pytest.raises(AssertionError, match="must divide d_model 24, d_kv 16 and d_ff 80"):
        side_config(tiny().config, 3)


def test_gates_start_at_one_half_and_move_fast():  # Sec. 3.2, temperature 0.1
    for rung in rungs(LadderT5(tiny(), r=4)):
        assert rung.mu.item() == 0.5
        rung.mu.backward()
        torch.testing.assert_close(rung.alpha.grad, torch.tensor([2.5]))  # as the comment says


@pytest.mark.parametrize("alpha, mu", [(0, 0.5), (0.1 * math.log(3), 0.75), (20, 1), (-20, 0)])
def test_gate_is_the_sigmoid_of_alpha_over_the_temperature(alpha, mu):
    rung, h_side, h_backbone = Gate(24, 6), torch.randn(B, S, 6), torch.randn(B, S, 24)
    nn.init.constant_(rung.alpha, alpha)
    expected = mu * rung.down(h_backbone) + (1 - mu) * h_side
    torch.testing.assert_close(rung(h_side, h_backbone), expected)


@pytest.mark.parametrize("keep", [None, [0, 2], [2]], ids=str)
def test_forward_is_the_recursion_of_the_paper(keep):  # Sec. 3.2 and 3.4
    ladder, inputs = lively(tiny(), keep=keep), batch()
    source_ids, source_mask, decoder_ids, decoder_mask = inputs

    def climb(side, bias, h_backbones, mask, memory=None):
        """Block_i(mu_i * down_i(h_backbone_i) + (1 - mu_i) * h_side) for kept layers i."""
        emb, *outputs = h_backbones
        h_side = side.down_emb(emb)
        self_bias, cross_bias = bias(h_side.size(1), mask, None if memory is None else source_mask)
        for layer, i in zip(side.blocks, keep or range(3), strict=True):
            mu = torch.sigmoid(layer.rung.alpha / 0.1)
            h_side = mu * layer.rung.down(outputs[i]) + (1 - mu) * h_side
            h_side = layer.block(h_side, None, self_bias, memory, cross_bias)
        return side.final_norm(h_side)

    t5 = ladder.backbone
    encoder, memory = t5.encode(source_ids, source_mask, keep=range(3))
    decoder = t5.decode(decoder_ids, decoder_mask, memory, keep=range(3))
    memory_side = climb(ladder.encoder, ladder.encoder_bias, encoder, source_mask)
    h_side = climb(ladder.decoder, ladder.decoder_bias, decoder, decoder_mask, memory_side)
    expected = t5.logits(ladder.up(h_side))
    torch.testing.assert_close(ladder(*inputs), expected)


STORED = Path(__file__).parent / "fixtures" / "ladder.safetensors"  # made by make_ladder.py there


@pytest.mark.parametrize("case", ["relu", "gated", "images"])
def test_outputs_are_those_stored_by_the_first_implementation(case):  # a generator, bit-equal then
    with safe_open(STORED, "pt") as file:
        stored = {key.removeprefix(f"{case} "): file.get_tensor(key) for key in file.keys()
                  if key.startswith(f"{case} ")}
    changes = V1_1 if case == "gated" else {}
    sizes = dict(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    config = T5Config(**sizes, **changes)
    t5 = CLIPT5(config, 6) if case == "images" else T5(config)
    ladder = LadderT5(t5, 2, [1]).eval()
    inputs = [stored[name] for name in ("source_ids", "source_mask", "decoder_ids", "decoder_mask")]
    inputs += [stored["images"]] if case == "images" else []
    state = {name.removeprefix("w "): value for name, value in stored.items() if name[:2] == "w "}
    ladder.load_state_dict(state, strict=True)
    logits = ladder(*inputs)
    logits.square().sum().backward()
    torch.testing.assert_close(logits, stored["logits"], rtol=1e-6, atol=1e-6)
    gradients = {name: p.grad for name, p in ladder.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name[2:] for name in stored if name[:2] == "g "}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, stored[f"g {name}"], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- Sec. 3.1

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
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "kernels"])
def test_autograd_saves_nothing_of_the_backbones_insides(attention, fast):
    ladder = lively(tiny(attention=attention)).train()
    if fast:
        kernels.install(ladder)
    shapes = saved_by_autograd(ladder, batch())
    last = {shape[-1] for shape in shapes if shape}
    assert last <= SIDE_WIDTHS | {24, S, T, 1}, "only side widths, handed-out D, scores and norms"
    assert SIDE_WIDTHS <= last, "the hooks see the side network"
    handed_out = sum(shape[-1:] == (24,) for shape in shapes)
    assert handed_out == 2 * (3 + 1), "each stack hands out its embeddings and N outputs"


def test_a_deeper_backbone_adds_nothing_to_what_autograd_saves():
    shallow, deep = (lively(tiny(num_layers=n), keep=[0, 1]).train() for n in (2, 6))
    assert saved_by_autograd(shallow, batch()) == saved_by_autograd(deep, batch())


def test_states_that_no_rung_reads_are_not_kept():  # Sec. 3.4
    ladder = lively(tiny(num_layers=5), keep=[1, 3])
    for hidden in ladder.hidden_states(*batch()):
        assert [h is not None for h in hidden] == [True, False, True, False, True, True]
        assert not any(h.requires_grad for h in hidden if h is not None)


def test_the_graph_holds_every_trainable_parameter_and_no_other():
    ladder = LadderT5(tiny(), r=4, keep=[0, 2])
    assert leaves(loss_of(ladder, batch()).grad_fn) == set(trainable(ladder))


@both_versions
@pytest.mark.parametrize("images", [None, N], ids=["text", "images"])
def test_even_a_thawed_backbone_gets_no_gradient_and_every_side_parameter_gets_one(changes, images):
    ladder = lively((clip_t5 if images else tiny)(**changes))
    side = trainable(ladder)
    ladder.backbone.encoder.requires_grad_(True)  # no_grad, not only requires_grad
    ladder.backbone.decoder.requires_grad_(True)
    loss_of(ladder, batch(images)).backward()
    assert all(p.grad is None for p in ladder.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in side)


def test_training_changes_the_side_network_and_not_one_byte_of_the_backbone():
    ladder, inputs = lively(tiny()).train(), batch()
    before = copy.deepcopy(ladder.backbone.state_dict())
    side_before = [p.clone() for p in trainable(ladder)]
    optimizer = torch.optim.AdamW(ladder.parameters(), lr=1e-2, weight_decay=0.1)
    first = loss_of(ladder.eval(), inputs).item()
    for _ in range(25):
        loss_of(ladder.train(), inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(ladder.eval(), inputs).item() < 0.9 * first
    after = ladder.backbone.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not any(torch.equal(now, then) for now, then in zip(trainable(ladder), side_before))


def test_train_mode_leaves_the_backbone_in_eval_mode():
    ladder, inputs = lively(tiny(dropout_rate=0.5)).train(), batch()
    assert ladder.encoder.training
    assert not any(module.training for module in ladder.backbone.modules())
    assert not torch.equal(ladder(*inputs), ladder(*inputs)), "the side network's dropout is on"
    for module in ladder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(ladder(*inputs), ladder(*inputs))


# ---------------------------------------------------------------------------------------- Sec. 3.4

def test_dropping_a_layer_is_skipping_it():
    full, dropped, inputs = lively(tiny()), lively(tiny(), keep=[2, 0]), batch()
    with torch.no_grad():
        for (whole, whole_bias), (short, short_bias) in zip(stacks(full), stacks(dropped)):
            assert short.keep == (0, 2) and len(short.blocks) == 2
            for j, i in enumerate([0, 2]):
                short.blocks[j].load_state_dict(whole.blocks[i].state_dict())
            short_bias.load_state_dict(whole_bias.state_dict())
            for shared in ("down_emb", "final_norm"):
                getattr(short, shared).load_state_dict(getattr(whole, shared).state_dict())
            whole.blocks[1].rung.alpha.fill_(-torch.inf)  # layer 1: the rung adds nothing ...
            for parameter, value in whole.blocks[1].block.named_parameters():
                if parameter.endswith((".o.weight", ".wo.weight")):
                    value.zero_()  # ... and neither does the block
        dropped.up.load_state_dict(full.up.state_dict())
    torch.testing.assert_close(dropped(*inputs), full(*inputs))


# ------------------------------------------------------------------------- generation and numerics

class Uncached(Generates):
    """Generates as a ladder does, but reads the whole beginning again; it is its own state."""

    def __init__(self, ladder):
        self.ladder, self.moves = ladder, 0

    def start(self, source_ids, source_mask, images=None):
        self.source, self.ids = (source_ids, source_mask), source_ids[:, :0]
        return self

    def repeat(self, num_beams):
        self.source = [tensor.repeat_interleave(num_beams, 0) for tensor in self.source]
        self.ids = self.ids.repeat_interleave(num_beams, 0)

    def step(self, ids, _):
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.ladder(*self.source, self.ids)[:, -1]

    def reorder(self, rows):
        self.moves += int((rows != torch.arange(len(rows))).any())
        self.ids = self.ids[rows]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("keep", [None, [0, 2], [1]], ids=str)
def test_generation_with_two_caches_is_generation_without(keep, num_beams):
    ladder, (source_ids, source_mask, *_) = lively(tiny(), keep=keep), batch()
    nn.init.zeros_(ladder.up.bias)  # it would favour the same token at every position
    set_gates(ladder, 0.0)
    uncached = Uncached(ladder)
    expected = uncached.generate(source_ids, source_mask, 10, num_beams)
    assert torch.equal(ladder.generate(source_ids, source_mask, 10, num_beams), expected)
    moved = uncached.moves > 0
    assert moved == (num_beams > 1), "beams that never change places would prove nothing"


@pytest.mark.parametrize("changes", [dict(attention="eager"), dict(checkpoint=True)], ids=str)
def test_eager_attention_and_checkpointing_change_no_logit_and_no_gradient(changes):
    plain, other = lively(tiny()), lively(tiny(**changes))
    torch.testing.assert_close(plain(*batch()), other(*batch()))
    for ladder in (plain, other):
        loss_of(ladder, batch()).backward()
    for a, b in zip(trainable(plain), trainable(other), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    if "checkpoint" in changes:
        saved = [len(saved_by_autograd(ladder, batch())) for ladder in (plain, other)]
        assert saved[1] < saved[0] / 2


def test_a_bf16_backbone_trains_an_fp32_side_network():
    ladder, exact = lively(tiny().bfloat16()), lively(tiny())
    loss = loss_of(ladder, batch())
    torch.testing.assert_close(loss, loss_of(exact, batch()), rtol=0.05, atol=0.05)
    loss.backward()
    assert {p.dtype for p in ladder.backbone.parameters()} == {torch.bfloat16}
    assert {p.grad.dtype for p in trainable(ladder)} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trainable(ladder))
    assert ladder.generate(*batch()[:2], max_new_tokens=4, num_beams=2).shape[0] == B


# ------------------------------------------------------------------- Sec. 4, "Vision-and-language"

def test_the_backbone_reads_text_only_and_rungs_add_to_the_text_only():
    ladder, (source_ids, source_mask, *_, images) = lively(clip_t5()), batch(N)
    assert ladder.backbone.visual is None and isinstance(ladder.visual, nn.Module)
    assert not any(name.startswith("backbone.visual") for name, _ in ladder.named_parameters())
    set_gates(ladder, torch.inf)  # mu = 1: the text has nothing of the stream below
    seen, outputs = [], []
    for layer in ladder.encoder.blocks:
        layer.block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer.block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    memory, memory_side = ladder.start(source_ids, source_mask, images).memories
    assert memory.h.shape == (B, S, 24) and memory_side.h.shape == (B, S + N * P, 6)
    assert memory_side.mask.shape == (B, S + N * P) and memory_side.mask[:, S:].all()
    h_visual = ladder.visual(images, ladder.backbone.embed.weight)
    torch.testing.assert_close(seen[0][:, S:], ladder.encoder.down_emb(h_visual))
    hidden, _ = ladder.backbone.encode(source_ids, source_mask, keep=range(3))
    for j, layer in enumerate(ladder.encoder.blocks):
        torch.testing.assert_close(seen[j][:, :S], layer.rung.down(hidden[j + 1]))
        if j:
            assert torch.equal(seen[j][:, S:], outputs[j - 1][:, S:])


def seeing(method):
    return lively(clip_t5()) if method == "lst" else apply(clip_t5(), method)


every_method = pytest.mark.parametrize("method", ["lst", *METHODS])


@every_method
def test_every_method_sees_the_images_and_trains_their_embedding(method):
    model, (*text, images) = seeing(method), batch(N)
    logits = model(*text, images)
    assert (logits - model(*text, images + 1)).abs().max() > 1e-3
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.visual.parameters())


@every_method
def test_padding_between_text_and_images_changes_nothing(method):
    model, (source_ids, source_mask, decoder_ids, decoder_mask, images) = seeing(method), batch(N)
    padded = model(source_ids, source_mask, decoder_ids, decoder_mask, images)[1:, :3]
    unpadded = model(source_ids[1:, :4], source_mask[1:, :4], decoder_ids[1:, :3], None, images[1:])
    torch.testing.assert_close(padded, unpadded)


@every_method
@pytest.mark.parametrize("num_beams", [1, 3])
@torch.no_grad()
def test_generation_with_a_cache_reads_the_images(method, num_beams):
    model, (source_ids, source_mask, _, _, images) = seeing(method), batch(N)
    rows = [part.repeat_interleave(num_beams, 0) for part in (source_ids, source_mask, images)]
    state, ids = model.start(source_ids, source_mask, images), rows[0].new_zeros(B * num_beams, 1)
    state.repeat(num_beams)
    for _ in range(3):
        logits = model.step(ids[:, -1:], state)
        torch.testing.assert_close(logits, model(rows[0], rows[1], ids, None, rows[2])[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    if num_beams == 1:
        answer = model.generate(source_ids, source_mask, 1, images=images)
        assert torch.equal(answer, ids[:, 1:2])
