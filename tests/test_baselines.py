"""The methods that Section 4 compares LST with, on models of a few thousand weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import METHODS, TEXT, apply, merge
from checkpoint import load_trained, save_trained, trainable
from model import PAD, T5, T5Config

PROMPTS = TEXT["prompts"]
B, S, T, V = 2, 7, 5, 150
SIZES = dict(vocab_size=V, d_model=32, d_kv=12, d_ff=80, num_layers=3, num_heads=3)  # H * K = 36; no two widths are equal
BASE = dict(vocab_size=32100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
VARIANTS = [*((method, False) for method in METHODS), ("lora", True), ("prompt", True)]
each_variant = pytest.mark.parametrize("method, as_authors", VARIANTS, ids=lambda value: value if isinstance(value, str) else "as_authors" * value)
LAYERED = ("full", "adapters", "lora", "bitfit")  # those with something in each layer


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return T5(T5Config(**(SIZES | changes))).eval()


def on_meta(method, as_authors=False, freeze=0, **changes):
    with torch.device("meta"):
        return apply(T5(T5Config(**(BASE | changes))), method, as_authors, freeze)


def lively(t5):
    """Trained parameters far from their start, so that everything matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(t5).values():
            p.add_(torch.randn_like(p), alpha=0.3)
    return t5


def batch():
    """source_ids, source_mask, decoder_ids, decoder_mask; the second row is padded on both sides."""
    torch.manual_seed(2)
    source_mask, decoder_mask = torch.ones(B, S, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    source_mask[1, 4:], decoder_mask[1, 3:] = False, False
    return torch.randint(3, V, (B, S)) * source_mask, source_mask, torch.randint(3, V, (B, T)) * decoder_mask, decoder_mask


def loss_of(t5, inputs):
    labels = torch.randint(V, (B * T,), generator=torch.Generator().manual_seed(3))
    return F.cross_entropy(t5(*inputs).flatten(0, 1).float(), labels)


def count(t5):
    return sum(p.numel() for p in trainable(t5).values())


# ------------------------------------------------------------------------------------------------------------ Table 1

@pytest.mark.parametrize("method, as_authors, parameters, percent", [
    ("full", False, 222_882_048, 100), ("adapters", False, 3_625_728, 1.627), ("lora", False, 3_538_944, 1.588), ("lora", True, 3_819_876, 1.714),
    ("bitfit", False, 280_932, 0.126), ("prompt", False, 76_800, 0.034), ("prompt", True, 76_800, 0.034)])
def test_trainable_parameters_are_those_of_table_1(method, as_authors, parameters, percent):
    assert count(on_meta(method, as_authors)) == parameters
    assert round(100 * parameters / 222_882_048, 3) == percent


@pytest.mark.parametrize("freeze, attentions", [(0, 9), (1, 8), (3, 6), (4, 4), (5, 2)])
def test_a_frozen_layer_has_no_module(freeze, attentions):  # Fig. 6; three layers in each stack, a decoder layer has two attentions
    assert count(on_meta("lora", freeze=freeze, **SIZES)) == attentions * 2 * 32 * (32 + 36)
    adapters = 2 * (6 - freeze) * (32 * 2 + 2 + 2 * 32 + 32)
    norms = sum((2, 3)[i >= 3] for i in range(freeze, 6)) + (freeze < 3) + 1
    assert count(on_meta("adapters", freeze=freeze, **SIZES)) == adapters + 32 * norms
    bitfit = on_meta("bitfit", freeze=freeze, **SIZES)
    assert not any(p.requires_grad for block in [*bitfit.encoder.blocks, *bitfit.decoder.blocks][:freeze] for p in block.parameters())


@each_variant
@pytest.mark.parametrize("changes", [{}, V1_1], ids=["v1.0", "v1.1"])
def test_a_step_runs_on_the_meta_device(method, as_authors, changes):
    t5 = on_meta(method, as_authors, **(SIZES | dict(num_layers=1) | changes)).train()
    with torch.device("meta"):
        t5(torch.zeros(B, S, dtype=torch.long), torch.ones(B, S, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long)).sum().backward()
    assert all(p.is_meta for p in t5.parameters()) and all(p.grad is not None for p in trainable(t5).values())


# -------------------------------------------------------------------------------------------------------- where it starts

@pytest.mark.parametrize("method, as_authors", [("full", False), ("adapters", False), ("lora", False), ("lora", True), ("bitfit", False)])
@pytest.mark.parametrize("changes", [{}, V1_1], ids=["v1.0", "v1.1"])
def test_at_step_0_the_logits_are_the_backbones(method, as_authors, changes):
    t5 = apply(tiny(**changes), method, as_authors)
    for name, p in t5.named_parameters():
        if name.endswith("up.weight"):
            nn.init.zeros_(p)  # adapters start near the identity; without their last weight they are it
    with torch.no_grad():  # and frozen: torch adds in another order where it records
        assert torch.equal(t5(*batch()), tiny(**changes).requires_grad_(False)(*batch()))


def test_adapters_start_small_and_random():
    t5 = apply(tiny(d_model=256), "adapters")
    weights = torch.cat([p.flatten() for name, p in t5.named_parameters() if name.endswith(("down.weight", "up.weight"))])
    assert len(weights) == 12 * 2 * 256 * 16 and abs(weights.mean()) < 1e-4 and 0.0099 < weights.std() < 0.0101
    assert not any(p.any() for name, p in t5.named_parameters() if name.endswith(("down.bias", "up.bias")))


def test_adapters_stand_behind_self_attention_and_feed_forward_before_dropout_and_residual():
    t5 = lively(apply(tiny(), "adapters"))
    block, h, memory = t5.decoder.blocks[0], torch.randn(B, T, 32, requires_grad=True), torch.randn(B, S, 32)
    bias, cross_bias = torch.zeros(1, 1, T, T), torch.zeros(1, 1, T, S)

    def adapted(adapter, x):
        return x + adapter.up(F.gelu(adapter.down(x), approximate="tanh"))

    attention, forward = copy.deepcopy(block.self_attention), copy.deepcopy(block.feed_forward)
    attention.o, forward.wo = block.self_attention.o.linear, block.feed_forward.wo.linear
    expected = h + adapted(block.self_attention.o, attention(block.self_attention_norm(h), bias))
    expected = expected + block.cross_attention(block.cross_attention_norm(expected), cross_bias, memory)
    expected = expected + adapted(block.feed_forward.wo, forward(block.feed_forward_norm(expected)))
    found = block(h, bias, memory, cross_bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), h), torch.autograd.grad(expected.sum(), h), rtol=1e-4, atol=1e-4)


def test_bitfit_adds_a_bias_to_what_linear_maps_norms_and_the_head_give():
    t5, plain, x = lively(apply(tiny(), "bitfit")), tiny(), torch.randn(B, T, 32)
    for name in ("self_attention.q", "feed_forward.wi", "cross_attention_norm"):
        biased = t5.decoder.blocks[0].get_submodule(name)
        torch.testing.assert_close(biased(x), plain.decoder.blocks[0].get_submodule(name)(x) + biased.bias)
    torch.testing.assert_close(t5.logits(x), plain.logits(x) + t5.head_bias)


def test_lora_adds_b_a_x_with_scale_1_and_its_own_dropout():  # alpha = rank = 32
    lora = lively(apply(tiny(), "lora")).decoder.blocks[0].cross_attention.q
    x = torch.randn(B, T, 32)
    torch.testing.assert_close(lora(x), x @ (lora.linear.weight + lora.B @ lora.A).T)
    assert lora.A.shape == (32, 32) and lora.B.shape == (36, 32) and not torch.equal(lora.train()(x), lora(x))
    assert lora.dropout.p == 0.1 and apply(tiny(dropout_rate=0.3), "lora").encoder.blocks[0].self_attention.v.dropout.p == 0.3


def test_prompts_start_from_the_first_words_or_from_noise():
    t5 = tiny()
    assert torch.equal(apply(t5, "prompt").prompts, t5.embed.weight[3:103])
    noise = apply(tiny(d_model=256), "prompt", as_authors=True).prompts
    assert 0.97 < noise.std() < 1.03
    assert apply(tiny(vocab_size=20), "prompt").prompts.shape == (100, 32), "a small vocabulary is used again"


# --------------------------------------------------------------------------------------------------------------- training

@each_variant
def test_what_is_said_to_train_moves_the_loss_falls_and_the_backbone_stays(method, as_authors):
    t5, inputs = apply(tiny(), method, as_authors).train(), batch()
    before = {name: p.detach().clone() for name, p in t5.named_parameters()}
    first = loss_of(t5.eval(), inputs).item()
    optimizer = torch.optim.AdamW(trainable(t5).values(), lr=0.1 if method == "prompt" else 1e-2, weight_decay=0.0, fused=True)
    for _ in range(10):
        loss_of(t5.train(), inputs).backward()
        assert all((p.grad is not None) == p.requires_grad for p in t5.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(t5.eval(), inputs).item() < first - (0.01 if method == "prompt" else 0.3)
    assert [name for name, p in t5.named_parameters() if torch.equal(p, before[name]) == p.requires_grad] == []


def test_what_trains_is_named_for_what_it_is():
    assert set(trainable(apply(tiny(), "prompt"))) == {"prompts"}
    assert {name.rsplit(".", 1)[-1] for name in trainable(apply(tiny(), "lora"))} == {"A", "B"}
    names = trainable(apply(tiny(), "bitfit"))
    assert all(name.endswith("bias") and "final_norm" not in name and "embed" not in name for name in names) and "head_bias" in names
    names = [name for name in trainable(apply(tiny(), "adapters")) if "down" not in name and "up" not in name]
    assert all("norm" in name for name in names) and len(names) == 3 * 2 + 3 * 3 + 2
    assert len(trainable(apply(tiny(**V1_1), "bitfit"))) == 3 * (4 + 3 + 2) + 3 * (8 + 3 + 3) + 1  # wi_0 and wi_1


@each_variant
def test_checkpointing_changes_no_gradient(method, as_authors):
    gradients = []
    for checkpoint in (False, True):
        t5 = lively(apply(tiny(checkpoint=checkpoint), method, as_authors)).train()
        torch.manual_seed(5)
        loss_of(t5, batch()).backward()
        gradients.append({name: p.grad for name, p in trainable(t5).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method, as_authors", VARIANTS[1:])
def test_beside_a_bfloat16_backbone_what_trains_is_float32(method, as_authors):
    t5, inputs = apply(tiny().bfloat16(), method, as_authors), batch()
    assert all(p.dtype == torch.float32 for p in trainable(t5).values())
    assert all(p.dtype == torch.bfloat16 for p in t5.parameters() if not p.requires_grad)
    assert t5(*inputs).dtype == torch.bfloat16
    exact = apply(tiny(), method, as_authors)
    exact.load_state_dict(t5.state_dict())
    torch.testing.assert_close(t5(*inputs).float(), exact(*inputs), rtol=0.1, atol=0.1)
    loss_of(t5.train(), inputs).backward()
    assert all(p.grad.isfinite().all() for p in trainable(t5).values())
    assert t5.eval().generate(*inputs[:2], max_new_tokens=3).shape[0] == B


# ------------------------------------------------------------------------------------------------------------ LoRA, merged

@pytest.mark.parametrize("as_authors", [False, True])
def test_merged_lora_is_a_plain_t5_with_the_same_logits(as_authors):  # arXiv:2106.09685, Sec. 4.1: no extra work when it answers
    t5, inputs = lively(apply(tiny(), "lora", as_authors)), batch()
    before, weights = t5(*inputs), tiny().state_dict()
    assert not torch.allclose(before, tiny()(*inputs), atol=0.1)
    torch.testing.assert_close(merge(t5)(*inputs), before, rtol=1e-4, atol=1e-5)
    assert t5.state_dict().keys() - weights.keys() == ({name for name in t5.state_dict() if name.endswith("bias")} if as_authors else set())
    assert all(isinstance(linear, nn.Linear) for name, linear in t5.named_modules() if name.endswith((".q", ".v")))
    with pytest.raises(ValueError, match="no LoRA"):
        merge(t5)


# ---------------------------------------------------------------------------------------------------------------- prompts

def test_prompts_are_words_in_front_of_the_source():
    """With prompts that are words, the answer is that of a plain T5 that reads these words."""
    source_ids, source_mask, decoder_ids, decoder_mask = batch()
    words = torch.arange(3, 103).expand(B, -1)
    expected = tiny()(torch.cat([words, source_ids], 1), torch.cat([torch.ones_like(words).bool(), source_mask], 1), decoder_ids, decoder_mask)
    torch.testing.assert_close(apply(tiny(), "prompt")(source_ids, source_mask, decoder_ids, decoder_mask), expected)


def test_encoder_and_decoder_look_at_the_prompts():
    t5, inputs = lively(apply(tiny(), "prompt")), batch()
    source_ids, source_mask, decoder_ids, decoder_mask = inputs
    memory = t5.encode(source_ids, source_mask)
    assert memory.shape == (B, PROMPTS + S, 32)
    h = t5.decode(decoder_ids, decoder_mask, memory, source_mask)
    changed = memory.clone()
    changed[:, PROMPTS - 1] += 1
    assert not torch.equal(t5.decode(decoder_ids, decoder_mask, changed, source_mask), h), "the decoder sees the last prompt"
    changed = memory.clone()
    changed[1, PROMPTS + 4 :] += 1
    assert torch.equal(t5.decode(decoder_ids, decoder_mask, changed, source_mask), h), "and no padding"
    with torch.no_grad():
        t5.prompts[0] += 1
    assert not torch.allclose(t5.encode(source_ids, source_mask)[:, PROMPTS:], memory[:, PROMPTS:]), "the words see the first prompt"


@each_variant
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_what_forward_would_choose(method, as_authors, num_beams):
    t5, (source_ids, source_mask, *_) = lively(apply(tiny(), method, as_authors)), batch()
    state, ids = t5.start(source_ids, source_mask, num_beams), torch.full((B * num_beams, 1), PAD)
    rows = source_ids.repeat_interleave(num_beams, 0), source_mask.repeat_interleave(num_beams, 0)
    for _ in range(4):  # step by step with a cache, or all at once
        logits = t5.step(ids[:, -1:], state)
        torch.testing.assert_close(logits, t5(*rows, ids)[:, -1], rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, logits.topk(2).indices[:, :1]], dim=1)
    answer = t5.generate(source_ids, source_mask, max_new_tokens=4, num_beams=num_beams)
    if num_beams == 1:
        ended = (ids[:, 1:] == 1).cumsum(1) - (ids[:, 1:] == 1).long() > 0
        assert torch.equal(answer, ids[:, 1 : 1 + answer.size(1)].masked_fill(ended[:, : answer.size(1)], PAD))
    alone = t5.generate(source_ids[1:, :4], source_mask[1:, :4], max_new_tokens=4, num_beams=num_beams)  # without padding
    n = min(answer.size(1), alone.size(1))
    assert torch.equal(answer[1:, :n], alone[:, :n]) and not answer[1:, n:].any()


# ----------------------------------------------------------------------------------------------------------------- Fig. 6

def saved_by_autograd(t5, inputs):
    """Shapes of all that the forward pass keeps for the backward pass, parameters left out."""
    parameters, shapes = {p.untyped_storage().data_ptr() for p in t5.parameters()}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        t5(*inputs)
    return shapes


@pytest.mark.parametrize("method, as_authors", [("full", False), ("adapters", False), ("lora", False), ("lora", True), ("bitfit", False)])
def test_autograd_keeps_nothing_of_frozen_layers(method, as_authors):
    """The same tensors are kept however many frozen layers lie below, in the encoder and in the decoder."""
    def saved(freeze, **layers):
        return saved_by_autograd(apply(tiny(**layers), method, as_authors, freeze).train(), batch())

    assert saved(1, num_layers=2) == saved(4, num_layers=5, num_decoder_layers=2)
    assert saved(3, num_layers=2, num_decoder_layers=3) == saved(8, num_layers=5, num_decoder_layers=5)
    assert len(saved(0)) > len(saved(1)) > len(saved(3)) > len(saved(4)) > len(saved(5)) > 0
    if method != "full":  # frozen is also below the lowest trained module
        assert saved(0, num_layers=2) == saved(3, num_layers=5, num_decoder_layers=2)


@pytest.mark.parametrize("method", LAYERED)
@pytest.mark.parametrize("freeze, changes", [(1, {}), (3, {}), (4, {}), (5, V1_1)], ids=["1", "3", "4", "5-v1.1"])
def test_frozen_layers_get_no_gradient_stay_plain_and_what_is_above_trains(method, freeze, changes):
    t5, plain = apply(tiny(**changes), method, freeze=freeze), tiny(**changes)
    frozen = [f"encoder.blocks.{i}." for i in range(min(freeze, 3))] + [f"decoder.blocks.{i}." for i in range(freeze - 3)]
    frozen += ["embed."] + ["encoder.pos_bias."] + ["encoder.final_norm."] * (freeze >= 3) + ["decoder.pos_bias."] * (freeze > 3)
    assert not [name for name in trainable(t5) if name.startswith(tuple(frozen))]
    lower = [f"{stack}.blocks.{i}" for stack in ("encoder", "decoder") for i in range(3) if f"{stack}.blocks.{i}." in frozen]
    assert [str(t5.get_submodule(name)) for name in lower] == [str(plain.get_submodule(name)) for name in lower]
    loss_of(lively(t5), batch()).backward()
    assert [name for name, p in t5.named_parameters() if (p.grad is not None) != p.requires_grad] == []
    above = [f"{stack}.blocks.{i}." for stack in ("encoder", "decoder") for i in range(3)]
    assert all(any(name.startswith(block) for name in trainable(t5)) for block in above if block not in frozen)
    if method == "full":
        kept = {name for name, _ in plain.named_parameters() if name.startswith(tuple(frozen))}
        assert trainable(t5).keys() == dict(plain.named_parameters()).keys() - kept


# ----------------------------------------------------------------------------------------------------- saved, loaded, refused

@each_variant
def test_what_was_trained_and_nothing_else_is_saved_and_loads_back(method, as_authors, tmp_path):
    t5, inputs = lively(apply(tiny(), method, as_authors)), batch()
    save_trained(tmp_path, t5, {})
    again = apply(tiny(), method, as_authors)
    assert trainable(again).keys() == trainable(t5).keys() and not torch.equal(again(*inputs), t5(*inputs))
    load_trained(tmp_path, again)
    assert torch.equal(again(*inputs), t5(*inputs))
    if method != "full":
        assert (tmp_path / "trained.safetensors").stat().st_size < 4 * count(t5) + 100 * len(trainable(t5)) + 300


def test_the_same_t5_is_given_back():
    for method in METHODS:
        t5 = tiny()
        assert apply(t5, method) is t5


@pytest.mark.parametrize("arguments, words", [
    (dict(method="foo"), "'foo', choose from full, adapters, lora, bitfit, prompt"),
    (dict(method="lora", freeze=-1), "-1.*0 to 6"),
    (dict(method="lora", freeze=7), "7.*0 to 6"), (dict(method="lora", freeze=True), "True.*0 to 6"),
    (dict(method="prompt", freeze=1), "below every layer"),
    (dict(method="lora", freeze=6), "nothing to train")], ids=str)
def test_a_wrong_argument_is_refused_in_one_line(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        apply(tiny(), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_t5_becomes_a_baseline_once(method):
    t5 = apply(tiny(), method)
    with pytest.raises(ValueError, match="before"):
        apply(t5, "bitfit")
