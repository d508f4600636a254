"""The ladder beside a decoder-only backbone: LST's promises, its two ends, and xLadder."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm import LadderLM, Llama, LlamaConfig, quantize_
from model import T5, T5Config
from side import LadderT5
from tests.llm.test_llama import TINY, text
from tests.test_model import Recomputing
from tests.workshop import WIDTHS


def backbone(**more):
    torch.manual_seed(0)
    return Llama(LlamaConfig(**TINY | more)).eval()


def ladder(lm=None, learned=True, **more):
    lm = lm or backbone()
    torch.manual_seed(1)
    net = LadderLM(lm, r=4, **more)
    if learned:
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.3)
    return net


def saved_bytes(net, inputs):
    """Bytes that autograd saves in forward, but for parameters."""
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = net(*inputs)
    assert output.requires_grad
    return sum(size for storage, size in saved.items() if storage not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_pretrained_model_to_the_bit(dtype):
    """Sum of both ends with up = 0; the paper's end, up(h) only, starts from nothing."""
    lm, inputs = backbone().to(dtype), text()
    before = lm(*inputs)
    assert torch.equal(ladder(lm, learned=False)(*inputs), before)
    assert not torch.allclose(ladder(lm, learned=False, end="up")(*inputs), before)


def test_the_papers_end_reads_nothing_of_the_backbones_last_state():
    net, inputs = ladder(end="up", keep=[0, 1]), text()
    before = net(*inputs)
    nn.init.normal_(net.backbone.layers[2].mlp.down_proj.weight)
    assert torch.equal(net(*inputs), before)


@pytest.mark.parametrize("nf4", [False, True])
def test_no_gradient_and_no_saved_tensor_is_inside_the_backbone(nf4):
    wide = backbone(hidden_size=64, intermediate_size=128, head_dim=32)
    net, (ids, mask), inside = ladder(quantize_(wide) if nf4 else wide).train(), text(), []
    inner = [net.backbone.layers[1].mlp, net.backbone.layers[1].self_attn]
    for module in inner:
        module.register_forward_hook(lambda module, inputs, y: inside.append(y.grad_fn))
    net(ids, mask, ids).float().square().mean().backward()
    assert inside == [None, None]
    for name, p in net.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
        assert p.requires_grad != name.startswith("backbone."), name
    net.backbone.layers.requires_grad_(True)  # autograd would not see even these
    assert not net.hidden_states(ids, mask)[0][-1].requires_grad


@pytest.mark.parametrize("make", [backbone, ladder])
def test_padding_left_or_right_changes_nothing(make):
    net, (ids, mask) = make(), text(S=5)
    greedy = net.generate(ids, mask, max_new_tokens=6)
    pads = torch.zeros(2, 3, dtype=torch.long)
    for order in (1, -1):
        padded, there = (torch.cat([a, b][::order], 1) for a, b in ((ids, pads), (mask, pads > 0)))
        torch.testing.assert_close(net(padded, there, ids), net(ids, mask, ids))
        assert torch.equal(net.generate(padded, there, 6), greedy)


@pytest.mark.parametrize("make", [backbone, ladder])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_caches_is_generation_without(make, num_beams):
    net, (ids, mask) = make().eval(), text(B=4, S=5)
    mask[1, :2] = False
    uncached = Recomputing(net)
    uncached.pad = uncached.eos = net.eos
    expected = uncached.generate(ids, mask, 6, num_beams)
    assert torch.equal(net.generate(ids, mask, 6, num_beams), expected)
    assert (uncached.moves > 0) == (num_beams > 1), "beams that stay in place would prove nothing"


def test_labelled_positions_only_give_the_loss_of_all_logits():
    net, (ids, mask) = ladder(), text(S=9)
    labels = ids.clone()
    labels[:, :6] = -100
    whole = F.cross_entropy(net(ids, mask)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    seen = []
    net.up.register_forward_hook(lambda module, inputs, y: seen.append(y.size(1)))
    answer = torch.cat([ids[:, :1], ids[:, 6:-1]], dim=1)
    loss = F.cross_entropy(net(ids[:, :6], mask[:, :6], answer).flatten(0, 1),
                           ids[:, 6:].flatten())
    torch.testing.assert_close(loss, whole)
    assert seen == [3]


def test_no_free_block_is_the_ladder_without_them():
    plain, free = ladder(keep=[1, 2]), ladder(keep=[1, 2], free=2)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    more = {name for name, p in free.named_parameters() if p.requires_grad} - trained
    assert more and {name[:14] for name in more} == {"side.blocks.2.", "side.blocks.3."}
    assert not any("rung" in name for name in more)
    for name in trained:
        free.get_parameter(name).data = plain.get_parameter(name).data
    for block in free.side.blocks[2:]:  # blocks that add nothing
        nn.init.zeros_(block.block.self_attn.o_proj.weight)
        nn.init.zeros_(block.block.mlp.down_proj.weight)
    torch.testing.assert_close(free(*text()), plain(*text()))


def test_free_blocks_stand_on_top_and_keep_no_state_of_the_backbone():
    """xLadder: as many blocks as a plain ladder has, fewer rungs, fewer bytes kept."""
    lm = backbone()
    plain, free = ladder(lm), ladder(lm, keep=[2], free=2)
    assert len(plain.side.blocks) == len(free.side.blocks) == 3
    kept = [saved_bytes(net, text()) for net in (plain, free)]
    assert kept[1] <= kept[0] - 2 * 4 * 2 * 9 * 16  # two states (B, S, D)


def test_a_t5_has_free_blocks_too():
    torch.manual_seed(0)
    t5, (ids, mask) = T5(T5Config(vocab_size=50, **WIDTHS)).eval(), text()
    net = LadderT5(t5, r=4, keep=[1], free=2).eval()
    assert len(net.encoder.blocks) == len(net.decoder.blocks) == 3
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    logits = net(ids, mask, ids)
    logits.square().mean().backward()
    assert all(p.grad.any() for p in net.parameters() if p.requires_grad)
    state = net.start(ids, mask)
    steps = [net.step(ids[:, t : t + 1], state) for t in range(ids.size(1))]
    torch.testing.assert_close(torch.stack(steps, dim=1), logits)


def test_the_side_network_can_compute_in_bfloat16_with_float32_parameters():
    net, wide = ladder(backbone().bfloat16(), side_dtype=torch.bfloat16), ladder()
    kept = [saved_bytes(each, text(S=40)) for each in (net, wide)]
    assert kept[0] < kept[1]
    half, full = net(*text()).float(), wide(*text())
    assert 0 < (half - full).square().mean().sqrt() < 0.1 * full.std()
    net(*text()).float().square().mean().backward()
    assert {p.grad.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}


def test_r_must_divide_the_widths():
    with pytest.raises(ValueError, match="r is 3, but it must divide hidden_size 16"):
        LadderLM(backbone(), r=3)
