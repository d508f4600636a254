"""The seams of side.py: the paper's comparisons and another architecture are small classes over it.

methods/ has other rungs, blocks and ends (Fig. 8, Table 4); LadderLM is another family.
"""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import SIDES
from model import T5, RMSNorm, T5Config
from side import Gate, SideStack

B, S, T, V = 2, 7, 5, 50
NARROW = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=3, num_heads=3)


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, S, K)


class NoRung(nn.Module):
    def __init__(self, D, d):
        super().__init__()

    def forward(self, h_side, h_backbone, *context):
        return h_side


class LlamaBlock(nn.Module):
    """Rotary positions, grouped keys and values, SwiGLU."""

    def __init__(self, D, H, G, K, inner):
        super().__init__()
        self.H, self.G, self.norm_1, self.norm_2 = H, G, RMSNorm(D, 1e-6), RMSNorm(D, 1e-6)
        self.q, self.o = nn.Linear(D, H * K, bias=False), nn.Linear(H * K, D, bias=False)
        self.k, self.v = nn.Linear(D, G * K, bias=False), nn.Linear(D, G * K, bias=False)
        self.gate, self.up = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, h, cache, bias):
        def rotate(x):
            angle = torch.arange(x.size(2))[:, None] / 100 ** torch.linspace(0, 1, x.size(3) // 2)
            a, b = x.chunk(2, dim=-1)
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        x = self.norm_1(h)
        q, k, v = rotate(split(self.q(x), self.H)), rotate(split(self.k(x), self.G)), self.v(x)
        a = F.scaled_dot_product_attention(q, k, split(v, self.G), attn_mask=bias, enable_gqa=True)
        h = h + self.o(a.transpose(1, 2).flatten(2))
        x = self.norm_2(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


class LadderLM(nn.Module):
    """A ladder beside a decoder-only backbone, over the same SideStack."""

    def __init__(self, D=32, N=4, H=4, G=2, K=8, inner=64, r=4, keep=(1, 3), rung=Gate):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.layers = nn.ModuleList(LlamaBlock(D, H, G, K, inner) for _ in range(N))
        self.requires_grad_(False)
        blocks = [LlamaBlock(D // r, H, G, K // r, inner // r) for _ in keep]
        self.side = SideStack(blocks, RMSNorm(D // r, 1e-6), D, D // r, keep, rung)
        self.up = nn.Linear(D // r, D)

    def forward(self, ids):
        future = torch.ones(ids.size(1), ids.size(1)).triu(1).bool()
        bias = torch.zeros(future.shape).masked_fill(future, -torch.inf)
        with torch.no_grad():
            hidden = [self.embed(ids)]
            for block in self.layers:
                hidden.append(block(hidden[-1], None, bias))
        return self.head(self.up(self.side(hidden, bias)))


def ladder_beside_t5(side):
    torch.manual_seed(0)
    t5 = T5(T5Config(**NARROW)).eval()
    ladder = SIDES[side](t5, 4, [0, 2])
    for p in ladder.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return ladder


def batch():
    torch.manual_seed(1)
    mask = torch.ones(B, S).bool()
    mask[1, 4:] = False
    return torch.randint(3, V, (B, S)) * mask, mask, torch.randint(3, V, (B, T))


each_side = pytest.mark.parametrize("side", SIDES)


@each_side
def test_other_ladders_train_and_generate_with_their_caches(side):
    ladder, (source_ids, source_mask, decoder_ids) = ladder_beside_t5(side).eval(), batch()
    logits = ladder(source_ids, source_mask, decoder_ids)
    logits.square().mean().backward()
    for name, p in ladder.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    state = ladder.start(source_ids, source_mask)
    steps = [ladder.step(decoder_ids[:, t : t + 1], state) for t in range(T)]
    torch.testing.assert_close(torch.stack(steps, dim=1), logits)


@each_side
def test_other_ladders_keep_their_beams_apart(side):
    ladder, (source_ids, source_mask, ids) = ladder_beside_t5(side).eval(), batch()
    state, rows = ladder.start(source_ids, source_mask), torch.tensor([1, 0, 3, 3])
    state.repeat(2)
    first, second = ids[[0, 1, 0, 1], :1], ids[[1, 1, 0, 0], 1:2]
    ladder.step(first, state)
    state.reorder(rows)
    source = source_ids.repeat_interleave(2, 0), source_mask.repeat_interleave(2, 0)
    expected = ladder(*source, torch.cat([first[rows], second], dim=1))[:, -1]
    torch.testing.assert_close(ladder.step(second, state), expected)


def test_side_tuning_mixes_the_two_ends():
    ladder, inputs = ladder_beside_t5("last").eval(), batch()
    nn.init.constant_(ladder.output.alpha, torch.inf)  # mu = 1
    torch.testing.assert_close(ladder(*inputs), ladder.backbone(*inputs))
    nn.init.constant_(ladder.output.alpha, -torch.inf)
    alone = SIDES["alone"](ladder.backbone, 4, [0, 2]).eval()
    weights = {name: p for name, p in ladder.state_dict().items() if name != "output.alpha"}
    alone.load_state_dict(weights)
    assert torch.equal(ladder(*inputs), alone(*inputs))


@pytest.mark.parametrize("rung", [Gate, NoRung])
def test_a_decoder_only_backbone_has_a_ladder_too(rung):
    torch.manual_seed(0)
    net, ids = LadderLM(rung=rung), torch.randint(V, (8, 10))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    def loss():
        return F.cross_entropy(net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    before = loss().item()
    for _ in range(30):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    loss().backward()
    assert loss().item() < 0.9 * before
    for name, p in net.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
