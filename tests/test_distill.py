"""Sec. 2.2: hidden spans, and a side network that learns to answer as its backbone does."""
import random
from types import SimpleNamespace

import pytest
import torch

import train
from data import Row
from methods import SIDES
from methods.distill import distill
from model import T5, T5Config
from run.folder import trainable
from run.spans import corrupt_spans
from run.start import initialize
from side import LadderT5
from workshop import contents

SIZES = dict(d_model=24, d_kv=16, d_ff=80, num_layers=2, num_heads=3, vocab_size=150)


def spans(length, seed=0, sentinel=32099):
    ids = [*range(10, 10 + length), 1]
    return ids, *corrupt_spans(ids, sentinel, random.Random(seed))


@pytest.mark.parametrize("length", range(2, 129))
def test_source_and_target_give_the_row_back(length):
    ids, source, target = spans(length)
    assert source[-1] == target[-1] == 1 and max(source[:-1]) == 32099 == target[0]
    hidden, at = {}, None
    for i in target[:-1]:
        at = i if i > 1000 else at
        hidden.setdefault(at, []).extend([] if i > 1000 else [i])
    back = [word for i in source for word in (hidden[i] if i > 1000 else [i])]
    assert back == ids
    sentinels = [i for i in source if i > 1000]
    count = max(1, round(0.15 * length))  # 15 %, in spans of three
    assert sum(map(len, hidden.values())) == count and all(hidden.values())
    assert sentinels == [32099 - i for i in range(max(1, round(count / 3)))] == [*hidden]


def test_every_place_is_hidden_at_times_and_a_seed_draws_the_same():
    drawn = [spans(60, seed) for seed in range(400)]
    assert {i for _, _, target in drawn for i in target} >= {*range(14, 70)}
    assert all(source[0] == 10 for _, source, _ in drawn)  # what is seen comes first
    assert spans(60, 7) == spans(60, 7) != spans(60, 8)


def kl_of(net, rows):
    """The student's distance from its teacher on fresh spans, without shortcuts."""
    student = SIDES["alone"](net.backbone, net.r).eval()
    for name, p in trainable(student).items():
        p.data.copy_(net.get_parameter(name))
    total = 0.0
    for seed, row in enumerate(rows):
        source, target = corrupt_spans(row.source, 149, random.Random(seed))
        ids = torch.tensor([source])
        inputs = ids, torch.ones_like(ids).bool(), torch.tensor([[0, *target[:-1]]])
        teacher = (net.backbone(*inputs) / 0.1).log_softmax(-1)
        answer = student(*inputs).log_softmax(-1)
        total += (teacher.exp() * (teacher - answer)).sum(-1).mean().item()
    return total / len(rows)


@pytest.mark.slow
def test_distillation_brings_the_side_network_to_its_backbone_and_leaves_that_alone():
    torch.manual_seed(0)
    t5 = T5(T5Config(**SIZES))
    for p in t5.parameters():
        p.data.mul_(1.5)  # sure of itself
    net, generator = LadderT5(t5, 2), torch.Generator().manual_seed(1)
    before = {name: p.clone() for name, p in net.named_parameters()}
    rows = [Row([*torch.randint(3, 140, (12,), generator=generator).tolist(), 1], [5, 1])
            for _ in range(400)]
    far = kl_of(net, rows[:20])
    distill(net, rows, sentinel=149, lr=1e-2, batch_size=8, seed=0)
    assert kl_of(net, rows[:20]) < 0.9 * far
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == ("rung" in name or not p.requires_grad), name
        assert p.grad is None, name


@pytest.mark.parametrize("side", ["alone", "last", "cross"])
def test_other_sides_start_from_the_same_distilled_network(side):
    args = SimpleNamespace(init="distill", task="sst2", seed=3, lr=1e-2, batch_size=8, dtype="fp32",
                           device="cpu")
    rows, starts = {"sst2": [Row([*range(n, n + 9), 1], [5, 1]) for n in range(3, 99)]}, []
    for args.side in ("ladder", side):
        torch.manual_seed(args.seed)
        net = SIDES[args.side](T5(T5Config(**SIZES)), 2)
        initialize(net, args, rows, SimpleNamespace(vocab_size=150))
        starts.append({name: p for name, p in trainable(net).items() if "rung" not in name})
    assert starts[0].keys() == starts[1].keys() - {"output.alpha"}
    assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())
    if side == "cross":
        layer = net.encoder.blocks[1]
        assert torch.equal(layer.rung.attention.q.weight, layer.block.self_attention.q.weight)


def test_ctrl_c_in_distillation_leaves_nothing_behind(argv, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("methods.distill.corrupt_spans", stop)
    with pytest.raises(SystemExit) as end:
        train.main(argv("--init", "distill"))
    assert end.value.code == 130 and not contents(tmp_path / "run")


def test_distillation_says_how_far_it_is(argv, capsys):
    train.main(argv("--init", "distill", "--max-steps", 1))
    assert "distillation, step 2/2" in capsys.readouterr().out.replace("  ", " ")
