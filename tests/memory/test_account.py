"""The count: formula and autograd agree to the byte, and what adds up to the peak was alive."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import methods
import model
from memory import account, formula
from memory.account import Live, inference, loss_of, make_batch, saved_bytes, training_step
from memory.environment import (CONVENTIONS, OF_TABLE_1, OF_TABLE_3, environment,
                                loss_with_caches)
from memory.stories import KINDS
from model import CLIPT5, T5, T5Config
from run import kernels
from side import LadderT5, SideBlock, side_config

V, N = 97, 2
SIZES = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=N, num_heads=3)  # H * K = 48
SIDE = dict(r=4)  # d = 6, K = 4, d_ff = 20
IMAGES = 2, 9, 10  # N, P, C: two images of 3 x 3 cells
slow = pytest.mark.slow
each_attention = pytest.mark.parametrize("attention", ["eager", "fused"])
each_method = pytest.mark.parametrize("method", ["full", "lst", *(
    pytest.param(name, marks=slow) for name in ("adapters", "lora", "bitfit", "prompt"))])


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


@pytest.fixture
def unrounded(monkeypatch):
    monkeypatch.setattr(Live.__init__, "__defaults__", (1,))


def build(method, images=None, fast=True, **changes):
    config = T5Config(**(SIZES | dict(attention="eager") | changes))
    t5 = CLIPT5(config, images[-1]) if images else T5(config)
    net = LadderT5(t5, **SIDE) if method == "lst" else methods.apply(t5, method)
    if fast:
        kernels.install(net)
    return net


def step(method, B=3, S=20, T=4, conventions=(), images=None, **changes):
    net = build(method, images, fast="mask" not in conventions, **changes)
    return training_step(net, make_batch(B, S, T, V, images), conventions)


def held(run, parameters):
    """[(last dimension, elements, bytes)] of each storage that autograd saves; no parameters."""
    seen, left_out = {}, {p.untyped_storage()._cdata for p in parameters}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            seen[storage._cdata] = tensor.shape[-1:], tensor.numel(), storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, environment():
        output = run()
    assert output.requires_grad  # and holds the graph until here
    return list(seen.values())


class Toy(nn.Module):
    """Two layers on embedded decoder ids, (B, T) -> (B, T, V)."""

    def __init__(self, V=11, D=3, width=5):
        super().__init__()
        self.embed, self.first = nn.Embedding(V, D), nn.Linear(D, width)
        self.second = nn.Linear(width, V)

    def forward(self, source_ids, source_mask, decoder_ids, decoder_mask):
        return self.second(torch.relu(self.first(self.embed(decoder_ids))))

    def freeze(self):
        self.embed.requires_grad_(False)
        self.first.requires_grad_(False)
        return self


@each_attention
@pytest.mark.parametrize("B, S", [(1, 1), (3, 32), (2, 45)])
@pytest.mark.parametrize("widths", [{}, dict(d_model=32, d_kv=8, d_ff=128, num_heads=4),
                                    dict(d_kv=32, d_ff=48, num_heads=2)], ids=str)
def test_each_row_of_a_layers_formula_is_one_tensor_that_autograd_holds(attention, B, S, widths):
    config = T5Config(**(SIZES | widths), attention=attention)
    for sizes in ((config, B, S), (side_config(config, 4), B, S, config.d_model)):
        layer, inputs = formula.build_layer(*sizes)
        seen = [size for _, _, size in held(lambda: layer(*inputs), layer.parameters())]
        rows = [row["bytes"] for row in formula.layer_formula(*sizes)]
        assert sum(seen) == sum(rows)
        if attention == "fused":  # the random state is a seed and an offset
            rows.remove(16)
            rows += [8, 8]
        assert sorted(seen) == sorted(rows) or len(sizes) > 3  # a rung has a row for several


def test_a_t5_layer_keeps_what_the_known_sum_says():  # d_ff = 4 d_model; 8 S B for the two norms
    B, S, D, H = 5, 33, 512, 8
    rows = formula.layer_formula(T5Config(attention="eager"), B, S)
    assert sum(row["bytes"] for row in rows) == 54 * S * B * D + 8 * H * S**2 * B + 8 * S * B


@pytest.mark.parametrize("attention, images", [("eager", None), ("fused", None), ("eager", IMAGES)])
@each_method
def test_the_count_of_a_whole_step_is_what_autograd_holds(unrounded, method, attention, images):
    net, batch = build(method, images, attention=attention).train(), make_batch(3, 20, 4, V, images)
    # of a batch only the images are kept for backward
    by_hooks = saved_bytes(lambda: loss_of(net, batch), [*net.parameters(), *batch[:4]])
    assert training_step(net, batch)["saved_by_forward"] == by_hooks + 4  # and the loss itself


def test_a_toy_keeps_the_hand_counted_bytes_and_peaks_where_the_hand_count_says(unrounded):
    B, T, V, D, width = 2, 700, 11, 3, 5  # activations are far larger than gradients
    row, last, batch = 4 * B * T, 4 * (V * width + V), make_batch(B, 1, T, V)
    found = training_step(Toy().freeze(), batch)
    # in log-softmax's backward relu's output, the log-softmax and the loss are still there, the
    # number it divides by is gone; beside them live the gradients of its output and of its input,
    # and the 1 that backward starts from
    assert found["saved_activations"] == row * (width + V) + 4
    assert found["temporary"] == row * 2 * V + 4
    assert found["weights"] == 4 * (V * D + D * width + width) + last
    assert (found["optimizer"], found["gradients"]) == (2 * last, 0)
    # first's input; relu's output, which is second's input; the log-softmax; the number that the
    # loss divides by; the loss
    assert training_step(Toy(), batch)["saved_by_forward"] == row * (D + width + V) + 4 + 4
    # nothing below the second layer
    assert training_step(Toy().freeze(), batch)["saved_by_forward"] == row * (width + V) + 4 + 4


def test_live_counts_a_new_storage_once_sees_it_die_and_rounds_up_as_cuda_does():
    known = torch.zeros(1000)
    with Live([known[5:]]) as live:
        known.add_(1)
        few, more = torch.zeros(1), torch.zeros(129)
        views = [few.view(1, 1), few.t(), few[0], few.detach(), few.add_(1)]
        found = [live.alive[account.storage_of(tensor)] for tensor in (more, known, views[0])]
        assert [storage.bytes for storage in found] == [1024, 0, 512]
        del few
        assert len(live.alive) == 3  # its views hold it
        del views
        assert len(live.alive) == 2
        for _ in range(2):
            torch.zeros(1)  # dies at once
    assert live.most == sum(storage.bytes for storage in live.at_peak) == 512 + 1024


@each_method
@pytest.mark.parametrize("conventions, images", [
    ((), None), (OF_TABLE_1, None), (OF_TABLE_3, IMAGES)], ids=["today", "Table 1", "Table 3"])
def test_the_kinds_sum_to_a_peak_that_holds_all_of_them(method, conventions, images):
    found, net = step(method, conventions=conventions, images=images), build(method, images)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    kinds = [found[kind] for kind in KINDS]
    assert sum(kinds) == found["peak"] and min(kinds) >= 0
    assert found["weights"] == 4 * sum(p.numel() for p in net.parameters())
    assert found["optimizer"] == 8 * trained
    least = max(found["saved_by_forward"], 4 * trained)
    assert found["peak"] >= found["weights"] + found["optimizer"] + least
    assert 0 <= found["saved_activations"] <= found["saved_by_forward"]


@each_method
def test_gradients_that_stay_allocated_are_all_there_at_the_peak_and_buckets_are_a_copy(method):
    freed, stay, twice = (step(method, 16, 40, conventions=names)
                          for names in ((), ("gradients",), ("buckets",)))
    trained = sum(p.numel() for p in build(method).parameters() if p.requires_grad)
    assert stay["gradients"] == 4 * trained >= freed["gradients"]
    assert stay["peak"] > freed["peak"] and stay["saved_by_forward"] == freed["saved_by_forward"]
    changed = {kind: twice[kind] - freed[kind] for kind in freed if twice[kind] != freed[kind]}
    assert changed == {"gradients": 4 * trained, "peak": 4 * trained}


MAPS = 16 * 3 * N * (40 * 40 + 4 * 4 + 4 * 40)  # of encoder, decoder, between them


@pytest.mark.parametrize("convention, images, more", [
    ("mask", None, dict(full=MAPS, lst=MAPS)),  # the side network has as many maps
    ("mask softmax", None, dict(full=5 * MAPS, lst=5 * MAPS)),
    ("feed-forward", None, dict(full=4 * 16 * N * 80 * (40 + 4), lst=4 * 16 * N * 20 * (40 + 4))),
    # 18 positions of images behind 20 words; the bottleneck is 6 wide and stands behind attentions
    # and feed-forward, with 3 more tensors in each
    ("gelu", IMAGES, dict(adapters=3 * 4 * 16 * N * 6 * (2 * 38 + 3 * 4))),
    ("rung", IMAGES, dict(lst=4 * 16 * N * 6 * 18))])  # down's output as long as text and images
def test_a_convention_keeps_the_bytes_that_its_words_say(unrounded, convention, images, more):
    for method, size in more.items():
        before, after = (step(method, 16, 20 if images else 40, conventions=names, images=images)
                         for names in ((), convention.split()))
        assert after["saved_by_forward"] - before["saved_by_forward"] == size


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=slow), "lst"])
def test_checkpointing_shrinks_saved_activations_and_the_peak(method):
    kept, again = (step(method, 16, 32, attention="fused", checkpoint=checkpoint, num_layers=3)
                   for checkpoint in (False, True))
    assert again["saved_by_forward"] < 0.7 * kept["saved_by_forward"]
    assert again["peak"] < kept["peak"]


@each_attention
def test_of_the_frozen_backbone_only_layer_outputs_are_kept(attention):  # Sec. 3.1
    B, S, T, net = 3, 20, 4, build("lst", attention=attention).train()
    seen = held(lambda: loss_of(net, make_batch(B, S, T, V)), net.parameters())
    assert not any(width in ((48,), (16,), (80,)) for width, _, _ in seen)  # H * K, K, d_ff
    of_width_D = sum(elements for width, elements, _ in seen if width == (24,))
    assert of_width_D == (N + 1) * 24 * B * (S + T)


@pytest.mark.parametrize("count", [
    training_step, lambda net, batch: training_step(net, batch, CONVENTIONS), inference,
    lambda net, batch: saved_bytes(lambda: loss_of(net, batch), [])],
    ids=["step", "2021", "inference", "saved"])
def test_a_count_that_fails_leaves_torch_and_the_modules_as_they_were(count):
    def patched():
        return (F.scaled_dot_product_attention, F.rms_norm, F.dropout, F.gelu, torch.softmax,
                model.RMSNorm.forward, model.FeedForward.forward, SideBlock.forward)

    def broken(*inputs):
        raise ArithmeticError

    before, net = patched(), build("lst")
    net.forward = net.start = broken
    with pytest.raises(ArithmeticError):
        count(net, make_batch(2, 5, 3, V))
    assert before == patched()


@pytest.mark.parametrize("method", ["full", "adapters", "lst"])
def test_the_environments_change_bytes_and_not_the_gradients(method):  # beside images `rung` would
    with torch.device("cpu"):
        torch.manual_seed(0)
        net, batch = build(method, fast=False).eval(), make_batch(2, 5, 3, V)
        loss_of(net, batch).backward()
        expected = {name: p.grad for name, p in net.named_parameters()}
        for loss, conventions in ((loss_of, ()), (loss_with_caches, CONVENTIONS)):
            net.zero_grad()
            with environment(conventions):
                loss(net, batch).backward()
            found = {name: p.grad for name, p in net.named_parameters()}
            torch.testing.assert_close(found, expected)


def test_the_operations_of_a_toy_are_the_hand_counted_ones():
    B, T, V, D, width = 2, 7, 11, 3, 5
    batch, products = make_batch(B, 1, T, V), (2 * B * T * D * width, 2 * B * T * width * V)
    toy = Toy()  # forward, and in backward the gradients of weight and input
    assert training_step(toy, batch)["flops"] == 3 * sum(products)
    toy.embed.requires_grad_(False)  # nobody asks for the first input's gradient
    assert training_step(toy, batch)["flops"] == 3 * sum(products) - products[0]


@slow
def test_checkpointing_costs_lora_a_second_forward_pass_and_the_ladder_a_small_one():
    sizes = dict(B=4, S=64, T=2, d_model=128, d_ff=512, d_kv=32, attention="fused")
    lora, lora_again, ladder, ladder_again = (
        step(method, checkpoint=checkpoint, **sizes)["flops"]
        for method in ("lora", "lst") for checkpoint in (False, True))
    assert 1.3 < lora_again / lora < 1.7 and 1 < ladder_again / ladder < 1.3 and ladder < lora
