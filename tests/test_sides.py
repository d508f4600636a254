"""The paper's other side networks (Fig. 8, Table 4): what they compute, train, keep and refuse."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prune
import train
from bench_memory import Case
from methods import SIDES
from methods.sides import AdapterBlock
from model import T5, Block, T5Config
from run.folder import trainable
from workshop import contents, refused

B, S, T, V = 2, 7, 5, 50
SIZES = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=3, num_heads=3)
each_side = pytest.mark.parametrize("side", SIDES)


def ladder(side, r=4, keep=None, stir=True, **changes):
    torch.manual_seed(0)
    net = SIDES[side](T5(T5Config(**SIZES | changes)), r, keep).eval()
    torch.manual_seed(1)
    for p in trainable(net).values() if stir else ():
        nn.init.normal_(p, std=0.3)
    return net


def batch():
    torch.manual_seed(2)
    mask = torch.ones(B, S).bool()
    mask[1, 4:] = False
    return torch.randint(3, V, (B, S)) * mask, mask, torch.randint(3, V, (B, T))


def gradients(net):
    loss = F.cross_entropy(net(*batch()).flatten(0, 1), torch.arange(B * T))
    loss.backward()
    return loss, {name: p.grad for name, p in trainable(net).items()}


@pytest.mark.parametrize("side, r, count, paper_percent", [
    ("ladder", 8, 5_097_240, 2.29), ("alone", 8, 3_325_440, 1.49), ("last", 8, 3_325_441, 1.49),
    ("cross", 8, 5_984_256, 2.68), ("adapters", 16, 4_622_232, 2.07)])
def test_trained_shares_are_those_of_table_4_and_fig_8(side, r, count, paper_percent):
    net = Case("lst", side=side, r=r, keep=())
    with torch.device("meta"):
        assert sum(p.numel() for p in trainable(net.build()).values()) == count
    assert round(100 * count / 222_882_048, 2) == paper_percent


@each_side
def test_no_gradient_reaches_the_backbone_and_none_is_missing_at_the_side(side):
    net = ladder(side)
    _, found = gradients(net)
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    assert all(p.grad is None for p in net.backbone.parameters())


@each_side
def test_checkpointing_changes_no_gradient(side):
    (plain, one), (again, other) = (gradients(ladder(side, checkpoint=choice))
                                    for choice in (False, True))
    assert torch.equal(plain, again) and all(torch.equal(one[name], other[name]) for name in one)


def close_gates(net):
    for layer in (*net.encoder.blocks, *net.decoder.blocks):
        nn.init.constant_(layer.rung.alpha, -torch.inf)
        layer.rung.requires_grad_(False)


def test_network_compression_is_the_ladder_with_closed_gates_to_the_bit():  # Fig. 8
    closed, alone = ladder("ladder"), ladder("alone")
    close_gates(closed)
    weights = closed.state_dict()
    alone.load_state_dict({name: weights[name] for name in weights if "rung" not in name})
    (loss, expected), (ours, found) = gradients(closed), gradients(alone)
    assert torch.equal(loss, ours) and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)
    assert torch.equal(closed.generate(*batch()[:2], num_beams=2),
                       alone.generate(*batch()[:2], num_beams=2))


def test_network_compression_never_runs_a_layer_of_the_backbone(monkeypatch):
    net = ladder("alone")
    layers, original = {*net.backbone.encoder.blocks, *net.backbone.decoder.blocks}, Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *rest: pytest.fail("it runs") if (
        block in layers) else original(block, *rest))
    net(*batch())
    net.generate(*batch()[:2])


@pytest.mark.parametrize("side", ["alone", "last"])
def test_with_one_seed_the_networks_of_fig_8_start_as_the_ladder_does(side):
    full, fewer = ladder("ladder", stir=False), ladder(side, stir=False)
    assert all(torch.equal(p, full.get_parameter(name))
               for name, p in trainable(fewer).items() if "output" not in name)
    assert side == "alone" or fewer.output.mu == 0.5
    encoder, decoder = fewer.hidden_states(*batch())
    assert encoder[1:3] == decoder[1:3] == [None, None]  # nobody reads them, nobody keeps them


@pytest.mark.parametrize("changes", [{}, dict(feed_forward_proj="gated-gelu",
                                              tie_word_embeddings=False)], ids=["v1.0", "v1.1"])
def test_alone_with_r_1_a_copied_side_network_is_the_backbone(changes):  # Sec. 3.2 and 3.3
    net = ladder("alone", r=1, stir=False, **changes)
    prune.init_side(net, prune.magnitude(net.backbone))
    for projection in (net.encoder.down_emb, net.decoder.down_emb, net.up):
        nn.init.eye_(projection.weight)
    torch.testing.assert_close(net(*batch()), net.backbone(*batch()), rtol=1e-4, atol=1e-4)


def test_the_cross_attention_of_a_decoder_looks_at_no_later_state():
    net, (source_ids, source_mask, ids) = ladder("cross"), batch()
    later = torch.cat([ids[:, :3], ids[:, 3:] % 40 + 7], dim=1)
    one, other = net(source_ids, source_mask, ids), net(source_ids, source_mask, later)
    assert torch.equal(one[:, :3], other[:, :3]) and not torch.equal(one[:, 3], other[:, 3])


def test_cross_attention_starts_as_the_pruned_self_attention_of_its_layer():
    net = ladder("cross", stir=False)
    for name, p in net.backbone.named_parameters():
        p.data.add_("norm" in name)  # else all norms are equal
    down = net.encoder.blocks[0].rung.down.weight.clone()
    prune.init_side(net, prune.magnitude(net.backbone))
    net.start_rungs()
    for layer in (*net.encoder.blocks, *net.decoder.blocks):
        own, pruned = layer.rung.attention.state_dict(), layer.block.self_attention.state_dict()
        assert all(torch.equal(own[name], pruned[name]) for name in own)
        assert torch.equal(layer.rung.norm.weight, layer.block.self_attention_norm.weight)
    assert torch.equal(down, net.encoder.blocks[0].rung.down.weight)


def test_an_adapter_block_computes_what_the_authors_modules_do():
    wide = T5Config(**SIZES)
    block = AdapterBlock(wide, 4, is_decoder=True).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    h_side, z, memory = (torch.randn(B, length, 24) for length in (T, T, S))
    bias, mu = torch.zeros(1, 1, T, S), torch.sigmoid(block.rung.alpha / 0.1)

    def adapter(module, s):
        n = module.linear(s)  # a norm
        return s + n + module.up(F.gelu(module.down(n), approximate="tanh"))

    s = adapter(block.first, h_side)
    q, m = block.down(s), block.down(memory)
    s = block.up(q + block.cross_attention(block.norm(q), bias, m))
    expected = adapter(block.second, mu * z + (1 - mu) * s)
    torch.testing.assert_close(block(h_side, z, None, None, memory, bias), expected)


# ------------------------------------------------------------------------------- train.py --side

@pytest.mark.slow
@each_side
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(argv, tmp_path, monkeypatch, side):
    line = argv("--side", side, "--r", 4, "--init", "random", "--epochs", 2, "--save-steps", 1)
    train.main([*line, "--out", str(tmp_path / "straight")])
    original, count = train.loss_of, 0

    def cut(model, rows):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return original(model, rows)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "loss_of", cut)
        train.main(line)
    train.main([*line, "--resume"])
    one, other = (trainable(train.load(tmp_path / folder)[0]) for folder in ("straight", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_cross_run_starts_its_rungs_by_pruning(argv, tmp_path):
    train.main(argv("--side", "cross", "--lr", "1e-30", "--max-steps", 1))
    net, _ = train.load(tmp_path / "run")
    layer = net.decoder.blocks[0]
    assert torch.equal(layer.rung.attention.q.weight, layer.block.self_attention.q.weight)


@pytest.mark.slow
def test_runs_tell_which_gates_they_have(argv, capsys):
    held = {side: train.main(argv("--side", side, "--r", 4, "--init", "random", "--max-steps", 1,
                                  "--overwrite"))["gates"] for side in SIDES}
    assert {side: [*gates] for side, gates in held.items()} == {
        "ladder": ["encoder", "decoder"], "alone": [], "last": ["output"], "cross": [],
        "adapters": ["encoder", "decoder"]}
    assert "output layer" in capsys.readouterr().out


@pytest.mark.parametrize("more, words", [
    ("--side last --task easy-vqa", "--side last; text"),
    ("--side adapters --r 4 --init fisher", "--side adapters; --init random"),
    ("--side adapters", "16; [1, 2, 4, 8]"), ("--side alone --init {run}", "--side ladder; same")])
def test_a_side_that_does_not_fit_is_refused_in_one_line(argv, tmp_path, capsys, learned, more,
                                                         words):
    before = contents(learned[0])
    refused(capsys, argv(*more.format(run=learned[0]).split()), *words.split("; "))
    assert not (tmp_path / "run").exists() and contents(learned[0]) == before


def test_alone_takes_stacks_of_different_depth():
    for layers, decoder_layers in ((3, 2), (2, 3)):
        sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_heads=4)
        t5 = T5(T5Config(num_layers=layers, num_decoder_layers=decoder_layers, **sizes))
        ids = torch.ones(1, 3, dtype=torch.long)
        assert SIDES["alone"](t5, 4)(ids, ids > 0, ids).shape == (1, 3, 50)
