"""The account: what it predicts is what autograd holds, to the byte, and what it adds up is what was alive."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import account
import baselines
import model
from account import CONVENTIONS, CONVENTIONS_3, Live, formula_bytes, inference, layer_formula, loss_of, make_batch, saved_bytes, training_step
from model import T5, Stack, T5Config, VisualEmbedding
from side import LadderT5, SideStack, side_config

V, N = 97, 2
SIZES = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=N, num_heads=3)  # H * K = 48; no two widths are equal
SIDE = dict(r=4)  # d = 6, K = 4, d_ff = 20
METHODS = (*baselines.METHODS, "lst")
IMAGES = 2, 9, 10  # N, P, C: two images of 3 x 3 cells
each_attention = pytest.mark.parametrize("attention", ["eager", "fused"])
each_method = pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method in ("adapters", "bitfit", "prompt")))
                                                 for method in METHODS])


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


@pytest.fixture
def unrounded(monkeypatch):
    monkeypatch.setattr(Live.__init__, "__defaults__", (1,))


def build(method, images=None, **changes):
    t5 = T5(T5Config(**(SIZES | dict(attention="eager") | changes)))
    t5.visual = VisualEmbedding(images[-1], t5.config) if images else None
    return LadderT5(t5, **SIDE) if method == "lst" else baselines.apply(t5, method)


def step(method, B=3, S=20, T=4, conventions=(), images=None, **changes):
    return training_step(build(method, images, **changes), make_batch(B, S, T, V, images), conventions)


class Toy(nn.Module):
    """Two layers on embedded decoder ids, (B, T) -> (B, T, V)."""

    def __init__(self, V=11, D=3, width=5):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(V, D), nn.Linear(D, width), nn.Linear(width, V)

    def forward(self, source_ids, source_mask, decoder_ids, decoder_mask):
        return self.second(torch.relu(self.first(self.embed(decoder_ids))))


# ----------------------------------------------------------------------------------------------------------- the formula

@each_attention
@pytest.mark.parametrize("B, S", [(1, 1), (3, 32), (2, 45)])
@pytest.mark.parametrize("widths", [{}, dict(d_model=32, d_kv=8, d_ff=128, num_heads=4), dict(d_kv=32, d_ff=48, num_heads=2)], ids=["odd", "usual", "wide"])
def test_the_formula_of_a_layer_is_what_autograd_holds(attention, B, S, widths):
    config = T5Config(**(SIZES | widths), attention=attention)
    stack, h = Stack(config, is_decoder=False).train(), torch.randn(B, S, config.d_model, requires_grad=True)
    bias, _ = stack.biases(h, torch.ones(B, S, dtype=torch.bool), None, None)
    assert saved_bytes(lambda: stack.blocks[0](h, bias), stack.parameters()) == formula_bytes(layer_formula(config, B, S))

    D, config = config.d_model, side_config(config, 4)
    stack, h_side, h_backbone = SideStack(config, D, [0, 1], is_decoder=False).train(), torch.randn(B, S, config.d_model, requires_grad=True), torch.randn(B, S, D)
    bias, _ = stack.biases(h_side, torch.ones(B, S, dtype=torch.bool), None, None)
    assert saved_bytes(lambda: stack.rung(0, h_side, h_backbone, bias), stack.parameters()) == formula_bytes(layer_formula(config, B, S, D))


@each_attention
def test_each_row_of_the_formula_is_one_tensor_that_autograd_holds(attention):  # its shapes and names, not the sum alone
    config, B, S = T5Config(**SIZES, attention=attention), 2, 32
    stack, h, seen = Stack(config, is_decoder=False).train(), torch.randn(2, 32, 24, requires_grad=True), {}
    bias, _ = stack.biases(h, torch.ones(B, S, dtype=torch.bool), None, None)
    parameters = {p.untyped_storage()._cdata for p in stack.parameters()}

    def see(tensor):
        if tensor.untyped_storage()._cdata not in parameters:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor), account.kernels_of_cuda():
        output = stack.blocks[0](h, bias)
    assert output.shape == h.shape
    sizes = [formula_bytes([row]) for row in layer_formula(config, B, S)]
    if attention == "fused":  # the random state is a seed and an offset
        sizes = [size for size in sizes if size != 16] + [8, 8]
    assert sorted(seen.values()) == sorted(sizes)


def test_a_t5_layer_keeps_what_the_known_sum_says():  # with d_ff = 4 d_model: 54 S B D + 8 H S^2 B, and 8 S B for the two norms
    config, B, S = T5Config(attention="eager"), 5, 33
    assert formula_bytes(layer_formula(config, B, S)) == 54 * S * B * 512 + 8 * 8 * S**2 * B + 8 * S * B


# ------------------------------------------------------------------------------------------------------------- the count

@pytest.mark.parametrize("attention, images", [("eager", None), ("fused", None), ("eager", IMAGES)], ids=["eager", "fused", "images"])
@each_method
def test_the_count_of_a_whole_step_is_what_autograd_holds(unrounded, method, attention, images):
    net, batch = build(method, images, attention=attention).train(), make_batch(3, 20, 4, V, images)
    held = saved_bytes(lambda: loss_of(net, batch), [*net.parameters(), *batch[:4]])  # of a batch the images alone are kept for backward
    assert training_step(net, batch)["saved_by_forward"] == held + 4  # and the loss, which is no input of its own backward


def test_a_toy_keeps_the_hand_counted_bytes(unrounded):
    B, T, V, D, width = 2, 7, 11, 3, 5
    rows, batch = 4 * B * T, make_batch(B, 1, T, V)
    toy = Toy()
    # first's input; relu's output, which is second's input; the log-softmax; the number that the loss divides by; the loss
    assert training_step(toy, batch)["saved_by_forward"] == rows * (D + width + V) + 4 + 4
    toy.embed.requires_grad_(False)
    toy.first.requires_grad_(False)
    assert training_step(toy, batch)["saved_by_forward"] == rows * (width + V) + 4 + 4  # nothing below the second layer


def test_a_toy_peaks_where_the_hand_count_says(unrounded):
    B, T, V, D, width = 2, 700, 11, 3, 5  # activations are far larger than gradients
    toy = Toy()
    toy.embed.requires_grad_(False)
    toy.first.requires_grad_(False)
    row, trained = 4 * B * T, (V * width + V) * 4
    found = training_step(toy, make_batch(B, 1, T, V))
    # in log-softmax's backward relu's output, the log-softmax and the loss are still there, the number it divides by is gone;
    # beside them live the gradients of its output and of its input, and the 1 that backward starts from
    assert found["saved_activations"] == row * (width + V) + 4
    assert found["temporary"] == row * 2 * V + 4
    assert (found["weights"], found["optimizer"], found["gradients"]) == (4 * (V * D + D * width + width) + trained, 2 * trained, 0)


def test_live_counts_a_storage_once_and_sees_it_die():
    with Live([], block=1) as live:
        a = torch.zeros(10, 10)
        views = [a.view(100), a.t(), a[3], a.detach(), a.add_(1)]
        assert [size for _, size in live.alive.values()] == [400]
        del a
        assert live.alive  # its views hold it
        del views
        assert not live.alive
    assert live.diary == [(0, 400), (0, -400)]


def test_live_leaves_out_what_was_known_and_rounds_up_as_cuda_does():
    known = torch.zeros(1000)
    with Live([known[5:]]) as live:
        known.add_(1)
        few, more = torch.zeros(1), torch.zeros(129)
        assert [size for _, size in live.alive.values()] == [512, 1024]
        assert live.numbers([more, known, few.view(1, 1)]) == {0, 1}


def test_live_finds_the_hand_computed_peak():
    with Live([], block=1) as live:
        a = torch.zeros(100)  # 400 alive
        b = a + 1  # 800
        del a  # 400
        c = torch.zeros(150)  # 1000, the peak
        d = c[:10]
        del c  # d holds all of it
        del b  # 600
        e = torch.zeros(90)  # 960
        del d, e
    assert list(live.at_peak().values()) == [400, 600]


# ------------------------------------------------------------------------------------------------------- what a step costs

@each_method
@pytest.mark.parametrize("conventions, images", [((), None), (tuple(CONVENTIONS), None), (tuple(CONVENTIONS_3), IMAGES)], ids=["today", "Table 1", "Table 3"])
def test_the_kinds_sum_to_a_peak_that_holds_all_of_them(method, conventions, images):
    found, net = step(method, conventions=conventions, images=images), build(method, images)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    kinds = [found[kind] for kind in ("weights", "gradients", "optimizer", "saved_activations", "temporary")]
    assert sum(kinds) == found["peak"] and min(kinds) >= 0
    assert (found["weights"], found["optimizer"]) == (4 * sum(p.numel() for p in net.parameters()), 8 * trained)
    assert found["peak"] >= found["weights"] + found["optimizer"] + max(found["saved_by_forward"], 4 * trained)
    assert 0 <= found["saved_activations"] <= found["saved_by_forward"]


def test_with_one_word_full_fine_tuning_costs_four_times_its_weights():  # itself, its gradient and two moments
    found = step("full", 1, 1, 1, d_model=128)
    assert 4 * found["weights"] <= found["peak"] < 4.2 * found["weights"]


@each_method
def test_gradients_that_stay_allocated_are_all_there_at_the_peak(method):
    freed, stay = (step(method, 16, 40, conventions=conventions) for conventions in ((), ("gradients",)))
    trained = 4 * sum(p.numel() for p in build(method).parameters() if p.requires_grad)
    assert stay["gradients"] == trained >= freed["gradients"] and stay["peak"] > freed["peak"]
    assert stay["saved_by_forward"] == freed["saved_by_forward"]


@pytest.mark.parametrize("method, convention, more", [
    # maps of the encoder, of the decoder and between them, for 16 rows and 3 heads; the side network has as many
    ("full", "mask", 16 * 3 * N * (40 * 40 + 4 * 4 + 4 * 40)),
    ("lst", "mask", 16 * 3 * N * (40 * 40 + 4 * 4 + 4 * 40)),
    ("full", "mask softmax", 5 * 16 * 3 * N * (40 * 40 + 4 * 4 + 4 * 40)),
    ("lst", "mask softmax", 5 * 16 * 3 * N * (40 * 40 + 4 * 4 + 4 * 40)),
    ("full", "feed-forward", 4 * 16 * N * 80 * (40 + 4)),
    ("lst", "feed-forward", 4 * 16 * N * 20 * (40 + 4))])
def test_a_convention_keeps_the_bytes_that_its_words_say(unrounded, method, convention, more):
    before, after = (step(method, 16, 40, conventions=conventions)["saved_by_forward"] for conventions in ((), convention.split()))
    assert after - before == more


@pytest.mark.parametrize("method, convention, more", [
    # 18 positions of images behind 20 words; the bottleneck is 6 wide and stands behind attentions and feed-forward: 3 tensors more in each
    ("adapters", "gelu", 3 * 4 * 16 * N * 6 * (2 * 38 + 3 * 4)),
    ("lst", "rung", 4 * 16 * N * 6 * 18)])  # down's output as long as text and images
def test_a_convention_of_table_3_keeps_the_bytes_that_its_words_say(unrounded, method, convention, more):
    before, after = (step(method, 16, conventions=conventions, images=IMAGES)["saved_by_forward"] for conventions in ((), [convention]))
    assert after - before == more


@each_method
def test_buckets_are_a_second_copy_of_all_gradients_and_nothing_else(method):
    before, after = (step(method, 16, conventions=conventions) for conventions in ((), ("buckets",)))
    trained = 4 * sum(p.numel() for p in build(method).parameters() if p.requires_grad)
    assert {kind: after[kind] - before[kind] for kind in before if after[kind] != before[kind]} == {"gradients": trained, "peak": trained}


def test_images_cost_inference_their_bytes_and_their_positions():
    text, both = (inference(build("full", IMAGES), make_batch(1, 20, 4, V, images)) for images in (None, IMAGES))
    assert both - text > 4 * 18 * (10 + 24)


def test_the_cache_convention_makes_the_ladders_peak_larger_and_saves_nothing_more():
    before, after = (step("lst", 16, 40, conventions=conventions) for conventions in ((), ("cache",)))
    assert after["peak"] > before["peak"] and after["saved_by_forward"] == before["saved_by_forward"]


@pytest.mark.parametrize("attention", [pytest.param("eager", marks=pytest.mark.slow), "fused"])
@pytest.mark.parametrize("method", ["full", "lora", "lst"])
def test_checkpointing_shrinks_saved_activations_and_the_peak(method, attention):
    kept, again = (step(method, 16, 32, attention=attention, checkpoint=checkpoint, num_layers=4) for checkpoint in (False, True))
    assert again["saved_by_forward"] < 0.6 * kept["saved_by_forward"] and again["peak"] < kept["peak"]


@each_attention
def test_lst_saves_fewer_bytes_than_lora(attention):  # Sec. 3.1
    ladder, lora, full = (step(method, 8, 64, attention=attention, d_model=96, d_ff=384, d_kv=32) for method in ("lst", "lora", "full"))
    assert ladder["saved_by_forward"] < 0.65 * min(lora["saved_by_forward"], full["saved_by_forward"])


@each_method
def test_twice_the_batch_is_twice_the_saved_activations_and_the_same_weights(method):
    one, two = step(method, 16, 32), step(method, 32, 32)
    assert two["weights"] == one["weights"] and two["optimizer"] == one["optimizer"]
    assert 1.8 < two["saved_by_forward"] / one["saved_by_forward"] < 2.01


@each_attention
def test_of_the_frozen_backbone_only_layer_outputs_are_kept(attention):  # Sec. 3.1: no width of its inside, and (N + 1) outputs in each stack
    B, S, T, seen = 3, 20, 4, {}
    net = build("lst", attention=attention).train()
    parameters = {p.untyped_storage()._cdata for p in net.parameters()}

    def see(tensor):
        if tensor.untyped_storage()._cdata not in parameters:
            seen[tensor.untyped_storage()._cdata] = tensor.shape[-1:], tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor), account.kernels_of_cuda():
        loss = loss_of(net, make_batch(B, S, T, V))
    assert loss.shape == ()
    assert not any(shape in ((48,), (16,), (80,)) for shape, _ in seen.values())  # H * K, K and d_ff of the backbone
    assert sum(numel for shape, numel in seen.values() if shape == (24,)) == (N + 1) * 24 * B * (S + T)


# ---------------------------------------------------------------------------------------------------------- what it leaves

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, *inputs):
        raise RuntimeError("broken")

    start = forward


@pytest.mark.parametrize("count", [training_step, lambda net, batch: training_step(net, batch, [*CONVENTIONS, *CONVENTIONS_3]), inference, account.flops,
                                   lambda net, batch: saved_bytes(lambda: loss_of(net, batch))], ids=["step", "2021", "inference", "flops", "saved"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_the_account_leaves_torch_and_the_model_as_they_were(count, fails):
    def patched():
        return F.scaled_dot_product_attention, F.gelu, torch.softmax, model.FeedForward.forward, SideStack.rung

    before, net = patched(), Broken() if fails else build("lst")
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            count(net, make_batch(2, 5, 3, V))
    else:
        count(net, make_batch(2, 5, 3, V))
    assert before == patched()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("method", ["full", "lst"])
def test_the_account_of_a_step_does_not_depend_on_the_steps_before(method):
    net, batch = build(method), make_batch(3, 20, 4, V)
    assert training_step(net, batch) == (training_step(net, batch, list(CONVENTIONS)), training_step(net, batch))[1]


def test_the_softmax_of_2021_is_softmax():
    with torch.device("cpu"):
        scores = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
        torch.testing.assert_close(account.SoftmaxOf2021.apply(scores, -1), torch.softmax(scores, -1))
        assert torch.autograd.gradcheck(lambda scores: account.SoftmaxOf2021.apply(scores, -1), scores)


@pytest.mark.parametrize("method", ["full", "adapters", "lst"])
def test_the_conventions_change_bytes_and_not_the_loss(method):  # beside images the gate of `rung` weighs them, which changes it
    with torch.device("cpu"):
        torch.manual_seed(0)
        net, batch = build(method).eval(), make_batch(2, 5, 3, V)
        expected = loss_of(net, batch)
        with account.of_2021([*CONVENTIONS, *CONVENTIONS_3]):
            torch.testing.assert_close(account.loss_with_caches(net, batch), expected)


# ----------------------------------------------------------------------------------------------------------- operations

def test_the_operations_of_a_toy_are_the_hand_counted_ones():
    B, T, V, D, width = 2, 7, 11, 3, 5
    toy, batch = Toy(), make_batch(B, 1, T, V)
    products = 2 * B * T * D * width, 2 * B * T * width * V
    assert account.flops(toy, batch) == 3 * sum(products)  # forward, and in backward the gradients of weight and input
    toy.embed.requires_grad_(False)
    assert account.flops(toy, batch) == 3 * sum(products) - products[0]  # nobody asks for the first input's gradient


@pytest.mark.parametrize("attention", [pytest.param("eager", marks=pytest.mark.slow), "fused"])
def test_checkpointing_costs_lora_a_second_forward_pass_and_the_ladder_a_small_one(attention):
    batch, sizes = make_batch(4, 64, 2, V), dict(d_model=128, d_ff=512, d_kv=32, attention=attention)
    lora, lora_again, ladder, ladder_again = (account.flops(build(method, checkpoint=checkpoint, **sizes), batch) for method in ("lora", "lst") for checkpoint in (False, True))
    assert 1.3 < lora_again / lora < 1.7 and 1 < ladder_again / ladder < 1.3 and ladder < lora
