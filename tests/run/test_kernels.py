"""run/kernels.py: the same as model.py's plain lines, faster."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import T5, Attention, T5Config
from run.kernels import CrossEntropy, DroppedSoftmax, FastDropout, cross_entropy, install

SIZES = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)


def tiny(**how):
    torch.manual_seed(0)
    return T5(T5Config(**SIZES, **how))


def loss_of(t5):
    ids = torch.arange(3, 15).view(2, 6)
    return F.cross_entropy(t5(ids, ids > 0, ids).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_zeroes_a_share_of_p_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(300_001, dtype=dtype)
    y = FastDropout(p)(x)
    assert abs((y == 0).double().mean() - p) < 0.005 and abs(y.double().mean() - 1) < 0.01
    assert len(y.unique()) == 2 and y.dtype == dtype
    assert torch.equal(FastDropout(p).eval()(x), x)


def test_dropped_softmax_has_the_gradient_of_dropout_after_softmax():
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    weight, dropout, found = torch.randn_like(scores), FastDropout(0.4), []
    for run in (lambda: DroppedSoftmax.apply(scores, dropout),
                lambda: dropout(torch.softmax(scores, dim=-1))):
        torch.manual_seed(3)  # the same elements are dropped
        output = run()
        found.append((output, *torch.autograd.grad((output * weight).sum(), scores)))
    assert (found[0][0] == 0).any() and torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype, off", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_cross_entropy_by_parts_is_that_of_all_logits_in_float32(dtype, off):
    logits, labels = 4 * torch.randn(70, 11, dtype=dtype), torch.arange(70) % 11
    labels[[3, 40]] = -100
    weights, found = torch.randn(70), []
    for run in (cross_entropy, lambda x, y: F.cross_entropy(x.float(), y, reduction="none")):
        leaf = logits.clone().requires_grad_()
        loss = run(leaf * 1, labels)
        (loss @ weights).backward()
        found.append((loss, leaf.grad.float()))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2 * off, atol=1e-7)
    assert (found[0][1][labels < 0] == 0).all() and found[0][1].any(1).sum() == 68


@pytest.mark.parametrize("how", [dict(create_graph=True), dict(retain_graph=True)])
def test_a_second_gradient_of_cross_entropy_by_parts_is_an_error(how):
    leaf = torch.randn(3, 5, requires_grad=True)
    loss = CrossEntropy.apply(leaf * 1, torch.arange(3)).sum()
    with pytest.raises(RuntimeError, match="no second derivative|modified by an inplace"):
        for _ in range(2):
            torch.autograd.grad(loss, leaf, **how)


@pytest.mark.parametrize("attention", ["eager", "fused"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_network_has_both_everywhere_and_computes_the_same(attention, rate):
    found = []
    for checkpoint in (None, False, True):
        t5 = tiny(attention=attention, dropout_rate=rate, checkpoint=bool(checkpoint)).train()
        if checkpoint is not None:
            install(t5)
            dropouts = [m for m in t5.modules() if isinstance(m, nn.Dropout)]
            assert dropouts and {type(m) for m in dropouts} == {FastDropout}
            assert {m.p for m in dropouts} == {rate} and all(m.training for m in dropouts)
            assert all("weights" in vars(m) for m in t5.modules() if isinstance(m, Attention))
        torch.manual_seed(1)
        loss = loss_of(t5)
        loss.backward()
        found.append([loss, *(p.grad for p in t5.parameters())])
    torch.testing.assert_close(found[1], found[2])
    if rate == 0:
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", ["encoder.blocks.0.self_attention.q", "embed"])
@pytest.mark.parametrize("fast", [False, True])
def test_second_derivatives_are_right_or_with_kernels_an_error(fast, name):
    t5 = tiny(attention="eager", dropout_rate=0.0).double()
    p = t5.get_parameter(f"{name}.weight")
    p.data *= 4

    def gradient(create_graph=False):
        return torch.autograd.grad(loss_of(t5), p, create_graph=create_graph)[0]

    if fast:
        install(t5)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient(create_graph=True).square().sum(), p)
        return
    along, norms = torch.randn_like(p), []
    second, = torch.autograd.grad(gradient(create_graph=True).square().sum(), p)
    for step in (1e-6, -2e-6):
        p.data.add_(along, alpha=step)
        norms.append(gradient().square().sum())
    expected = (norms[0] - norms[1]) / 2e-6
    torch.testing.assert_close((second * along).sum(), expected, rtol=1e-4, atol=0)
