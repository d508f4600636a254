"""The methods that Section 4 compares LST with, on models of a few thousand weights."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import METHODS, apply, merge
from model import CLIPT5, T5, T5Config
from run.folder import trainable
from run.kernels import install

B, S, T, V = 2, 7, 5, 150
SIZES = dict(vocab_size=V, d_model=32, d_kv=12, d_ff=80, num_layers=3, num_heads=3)  # H * K = 36
BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
VARIANTS = [*((method, False) for method in METHODS), ("lora", True), ("prompt", True)]
LAYERED = [variant for variant in VARIANTS if variant[0] != "prompt"]  # something in each layer
each_layered = pytest.mark.parametrize("method, as_authors", LAYERED)
each_version = pytest.mark.parametrize("changes", [{}, V1_1], ids=["v1.0", "v1.1"])


def tiny(channels=None, **changes):
    torch.manual_seed(0)
    config = T5Config(**SIZES | changes)
    return (CLIPT5(config, channels) if channels else T5(config)).eval()


def stir(model):
    """Move what trains far from its start, so that everything matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def batch(images=False):
    """Source ids, mask, decoder ids, mask, images; the second row is padded on both sides."""
    torch.manual_seed(2)
    source_mask, decoder_mask = (torch.ones(B, n, dtype=torch.bool) for n in (S, T))
    source_mask[1, 4:], decoder_mask[1, 3:] = False, False
    inputs = [torch.randint(3, V, (B, S)) * source_mask, source_mask]
    inputs += [torch.randint(3, V, (B, T)) * decoder_mask, decoder_mask]
    return inputs + [torch.randn(B, 2, 4, 10)] if images else inputs


def loss_of(t5, inputs):
    labels = torch.randint(V, (B * T,), generator=torch.Generator().manual_seed(3))
    return F.cross_entropy(t5(*inputs).flatten(0, 1).float(), labels)


@pytest.mark.parametrize("vocab_size, channels, table", [
    (32100, None, {  # Table 1
        "full": (222_882_048, 100), "adapters": (3_625_728, 1.627), "lora": (3_538_944, 1.588),
        "lora as authors": (3_820_644, 1.714), "bitfit": (280_932, 0.126),
        "prompt": (76_800, 0.034), "prompt as authors": (76_800, 0.034)}),
    (32200, 2048, {  # Table 3
        "full": (224_540_160, 100), "adapters": (19_333_632, 7.98), "lora": (18_170_112, 7.54),
        "bitfit": (1_862_344, 0.83), "prompt": (2_842_400, 1.26)})])
def test_trained_shares_are_those_of_tables_1_and_3(vocab_size, channels, table):
    with torch.device("meta"):
        t5 = tiny(channels, vocab_size=vocab_size, **BASE)
        for name, (parameters, percent) in table.items():
            model = apply(copy.deepcopy(t5), name.split()[0], "authors" in name)
            whole = sum(p.numel() for p in (model if channels else t5).parameters())
            assert sum(p.numel() for p in trainable(model).values()) == parameters
            assert round(100 * parameters / whole, 2 if channels else 3) == percent


@each_layered
@each_version
def test_at_step_0_the_logits_are_the_backbones_to_the_bit(method, as_authors, changes):
    t5 = apply(tiny(**changes), method, as_authors)
    for name, p in t5.named_parameters():
        if name.endswith("up.weight"):  # without it adapters are the identity
            nn.init.zeros_(p)
    with torch.no_grad():  # and frozen: torch adds in another order where it records
        assert torch.equal(t5(*batch()), tiny(**changes).requires_grad_(False)(*batch()))


def test_adapters_start_small_and_random():
    adapter = apply(tiny(d_model=512), "adapters").encoder.blocks[0].self_attention.o
    for linear in (adapter.down, adapter.up):
        assert 0.0095 < linear.weight.std() < 0.0105 and not linear.bias.any()


def test_prompts_start_from_the_first_words_or_from_noise():
    t5 = tiny()
    assert apply(t5, "prompt") is t5 and torch.equal(t5.prompt.vectors, t5.embed.weight[3:103])
    assert 0.97 < apply(tiny(d_model=256), "prompt", as_authors=True).prompt.vectors.std() < 1.03
    assert apply(tiny(vocab_size=20), "prompt").prompt.vectors.shape == (100, 32)  # used again


def test_adapters_add_a_bottleneck_to_self_attention_and_feed_forward():  # before the residual
    t5, plain, x = stir(apply(tiny(), "adapters")), tiny(), torch.randn(B, T, 32)
    for name, inputs in ("self_attention.o", [torch.zeros(1, 1, T, T)]), ("feed_forward.wo", []):
        parent, _, child = name.partition(".")
        ours, theirs = (m.decoder.blocks[0].get_submodule(parent) for m in (t5, plain))
        y, adapter = theirs(x, *inputs), ours.get_submodule(child)
        expected = y + adapter.up(F.gelu(adapter.down(y), approximate="tanh"))
        torch.testing.assert_close(ours(x, *inputs), expected)
    assert type(t5.decoder.blocks[0].cross_attention.o) is nn.Linear


def test_bitfit_adds_a_bias_to_what_linear_maps_norms_and_the_head_give():
    t5, plain, x = stir(apply(tiny(), "bitfit")), tiny(), torch.randn(B, T, 32)
    for name in ("self_attention.q", "feed_forward.wi", "cross_attention_norm"):
        ours, theirs = (m.decoder.blocks[0].get_submodule(name) for m in (t5, plain))
        torch.testing.assert_close(ours(x), theirs(x) + ours.bias)
    torch.testing.assert_close(t5.logits(x), plain.logits(x) + t5.head_bias)


def test_lora_adds_b_a_x_with_scale_1_and_its_own_dropout():  # alpha = rank = 32
    t5, x = stir(apply(tiny(dropout_rate=0.3), "lora")), torch.randn(B, T, 32)
    lora = t5.decoder.blocks[0].cross_attention.q
    torch.testing.assert_close(lora(x), x @ (lora.linear.weight + lora.B @ lora.A).T)
    assert not torch.equal(lora.train()(x), lora(x)) and lora.dropout.p == 0.3


@pytest.mark.parametrize("as_authors", [False, True])
def test_merged_lora_is_a_plain_t5_with_the_same_logits(as_authors):  # arXiv:2106.09685, Sec. 4.1
    t5, inputs = stir(apply(tiny(), "lora", as_authors)), batch()
    before, plain = t5(*inputs), tiny()
    assert not torch.allclose(before, plain(*inputs), atol=0.1)
    torch.testing.assert_close(merge(t5)(*inputs), before, rtol=1e-4, atol=3e-5)
    added = t5.state_dict().keys() - plain.state_dict().keys()
    assert bool(added) == as_authors and all(name.endswith("bias") for name in added)


def test_prompts_are_words_in_front_of_the_source():  # for encoder and decoder
    source_ids, source_mask, *decoder = batch()
    words = torch.arange(3, 103).expand(B, -1)
    longer = torch.cat([torch.ones_like(words).bool(), source_mask], dim=1)
    expected = tiny()(torch.cat([words, source_ids], dim=1), longer, *decoder)
    torch.testing.assert_close(apply(tiny(), "prompt")(source_ids, source_mask, *decoder), expected)


@pytest.mark.parametrize("method, as_authors, checkpoint, loss", [
    ("full", False, False, 1.28662), ("adapters", False, True, 4.31079),
    ("lora", False, True, 2.86211), ("lora", True, False, 2.66621),
    ("bitfit", False, True, 3.9643), ("prompt", False, True, 5.09475),
    ("prompt", True, False, 5.07645)])
def test_the_loss_falls_as_it_did_and_the_backbone_stays(method, as_authors, checkpoint, loss):
    t5, inputs = apply(tiny(checkpoint=checkpoint), method, as_authors), batch()
    before = {name: p.detach().clone() for name, p in t5.named_parameters()}
    first, lr = loss_of(t5, inputs).item(), 0.1 if method == "prompt" else 0.01
    install(t5.train())
    parameters = [*trainable(t5).values()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    torch.manual_seed(4)  # of dropout
    for _ in range(10):
        found = loss_of(t5, inputs)
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert found.item() == pytest.approx(loss, abs=1e-3)  # as the runs of the README took them
    assert loss_of(t5.eval(), inputs).item() < first - 0.3
    for name, p in t5.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("method, as_authors", VARIANTS[1:])
def test_beside_a_bfloat16_backbone_what_trains_is_float32(method, as_authors):
    t5, inputs = apply(tiny().bfloat16(), method, as_authors), batch()
    for p in t5.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    exact = apply(tiny(), method, as_authors)
    exact.load_state_dict(t5.state_dict())
    torch.testing.assert_close(t5(*inputs).float(), exact(*inputs), rtol=0.1, atol=0.1)
    loss_of(t5.train(), inputs).backward()
    assert all(p.grad.isfinite().all() for p in trainable(t5).values())


@each_layered
def test_autograd_keeps_nothing_of_frozen_layers(method, as_authors):
    """It keeps the same however many frozen layers lie below, in encoder and decoder."""
    def saved(freeze, **layers):
        shapes, t5 = [], apply(tiny(**layers), method, as_authors, freeze).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape), id):
            t5(*batch())
        return shapes

    two, five = dict(num_layers=2), dict(num_layers=5)
    assert saved(1, **two) == saved(4, **five, num_decoder_layers=2)
    assert saved(3, **two, num_decoder_layers=3) == saved(8, **five, num_decoder_layers=5)
    assert len(saved(0)) > len(saved(1)) > len(saved(3)) > len(saved(4)) > len(saved(5)) > 0
    if method != "full" and not as_authors:  # frozen is also below the lowest trained module
        assert saved(0, **two) == saved(3, **five, num_decoder_layers=2)


@each_layered
@pytest.mark.parametrize("freeze, changes", [(1, {}), (3, {}), (4, {}), (5, V1_1)], ids=str)
def test_frozen_layers_stay_plain_and_what_is_above_trains(method, as_authors, freeze, changes):
    t5, plain = apply(tiny(**changes), method, as_authors, freeze), tiny(**changes)
    layers = [f"{stack}.blocks.{i}" for stack in ("encoder", "decoder") for i in range(3)]
    assert all(str(t5.get_submodule(name)) == str(plain.get_submodule(name))
               for name in layers[:freeze])
    frozen = (*(f"{name}." for name in layers[:freeze]), "embed.", "encoder.pos_bias.")
    frozen += ("encoder.final_norm.",) * (freeze >= 3) + ("decoder.pos_bias.",) * (freeze > 3)
    names = set(trainable(t5))
    assert not any(name.startswith(frozen) for name in names)
    assert all(any(name.startswith(f"{layer}.") for name in names) for layer in layers[freeze:])
    if method == "full":
        assert {name for name, _ in t5.named_parameters() if not name.startswith(frozen)} == names
    loss_of(stir(t5), batch()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in t5.parameters())


@pytest.mark.parametrize("names, freeze, words", [
    ("foo", 0, "'foo', choose from full, adapters, lora, bitfit, prompt"),
    ("lora", 7, "7, but there are 6 layers"), ("prompt", 1, "below every layer"),
    ("lora", 6, "nothing to train"), ("adapters bitfit", 0, "before")])
def test_what_makes_no_baseline_is_refused_in_one_line(names, freeze, words):
    t5 = tiny()
    with pytest.raises(ValueError, match=f"^.*{words}.*$"):
        for method in names.split():
            apply(t5, method, freeze=freeze)
