"""NF4 with double quantisation: bitsandbytes' codes, 4.127 bits, and QLoRA's gradients."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm import Llama, LlamaConfig, NF4Linear, quantize_
from llm.nf4 import NF4, blockwise, dynamic_map
from memory.account import bytes_of, saved_bytes
from methods.qlora import QLoRA, add_qlora
from model import T5, T5Config
from tests.llm.test_llama import TINY, text
from tests.workshop import WIDTHS

STORED = load_file(Path(__file__).parent.parent / "fixtures" / "llm" / "nf4.safetensors")
WIDE = TINY | dict(hidden_size=64, intermediate_size=128, head_dim=32)


def linear(weight, bias=None):
    layer = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_the_table_holds_quantiles_of_a_normal_distribution():
    """Sec. 3: 8 above 0 and 7 below, evenly spread in probability, and 0; over the largest."""
    most = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (torch.special.ndtri(torch.linspace(most, 0.5, n, dtype=torch.float64)[:-1])
                    for n in (9, 8))
    values = torch.cat([above, torch.zeros(1), -below]).sort().values
    torch.testing.assert_close((values / above.max()).float(), NF4, rtol=0, atol=1e-6)
    assert torch.equal(NF4, STORED["table"])


def test_codes_and_scales_are_those_of_bitsandbytes_to_the_bit():
    layer = NF4Linear(linear(STORED["weight"]))
    absmax = blockwise(STORED["weight"].flatten().float(), NF4, 64)[1]
    assert torch.equal(layer.codes, STORED["codes"]) and torch.equal(absmax, STORED["absmax"])
    assert torch.equal(layer.scales, STORED["scales"]) and torch.equal(layer.mean, STORED["mean"])
    assert torch.equal(dynamic_map(), STORED["map"])
    assert torch.equal(NF4Linear(linear(STORED["edge"])).codes, STORED["edge_codes"])
    # its CPU looks the last 8 bits up in a coarser table: now and then the second nearest
    steps = layer.absmax_codes.int() - STORED["absmax_codes"].int()
    assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 0.01


def test_weights_made_again_are_those_of_bitsandbytes_to_the_bit():
    layer = NF4Linear(linear(STORED["weight"]))
    layer.absmax_codes = STORED["absmax_codes"]
    assert torch.equal(layer.weight(torch.bfloat16), STORED["made_again"])


def test_a_weight_takes_4_127_bits():
    layer = NF4Linear(linear(torch.randn(512, 1024)))
    bits = 8 * (bytes_of(layer.buffers()) - 4) / (512 * 1024)  # the mean's 4 bytes aside
    assert bits == 8 * (1 / 2 + 1 / 64 + 4 / (64 * 256)) == pytest.approx(4.127, abs=1e-3)


def test_of_a_t5_too_only_the_linear_maps_of_blocks_are_quantised():
    torch.manual_seed(0)
    t5 = T5(T5Config(vocab_size=50, **WIDTHS)).eval().requires_grad_(False)
    maps = sum(isinstance(module, nn.Linear) for module in t5.modules())
    ids, mask = text()
    logits = t5(ids, mask, ids)
    quantize_(t5)
    assert sum(isinstance(module, NF4Linear) for module in t5.modules()) == maps == 32
    assert {name.split(".")[-2] for name, _ in t5.named_parameters()} <= {
        "embed", "table", "final_norm", "self_attention_norm", "cross_attention_norm",
        "feed_forward_norm"}
    error = (t5(ids, mask, ids) - logits).square().mean().sqrt() / logits.std()
    assert 0.01 < error < 0.5


def test_a_bias_stays():
    bias, x = torch.randn(64), torch.randn(3, 64)
    layer = linear(torch.randn(64, 64), bias)
    layer.bias = nn.Parameter(bias)
    small = NF4Linear(layer)
    torch.testing.assert_close(small(x), x @ small.weight(torch.float32).T + bias)


def qlora():
    torch.manual_seed(0)
    lm = add_qlora(Llama(LlamaConfig(**WIDE)).eval(), rank=4)
    for name, p in lm.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return lm


def test_qlora_stands_beside_every_linear_map_and_starts_without_effect():
    torch.manual_seed(0)
    lm = Llama(LlamaConfig(**WIDE)).eval()
    before = quantize_(lm.requires_grad_(False))(*text())
    assert torch.equal(add_qlora(lm, rank=4)(*text()), before)
    kinds = [type(module) for module in lm.modules()]
    assert kinds.count(QLoRA) == 7 * 3 and kinds.count(nn.Linear) == 1  # the head
    assert {name.rpartition(".")[2] for name, p in lm.named_parameters() if p.requires_grad} \
        == {"A", "B"}
    assert lm.layers[0].self_attn.q_proj.scale == 16 / 4


def test_qloras_gradients_equal_those_beside_a_dense_copy():
    lm, dense = qlora(), qlora()
    layer, x = lm.layers[0].mlp.up_proj, torch.randn(3, 64)
    torch.testing.assert_close(layer(x), layer.linear(x) + 16 / 4 * x @ layer.A.T @ layer.B.T)
    for module in dense.modules():
        if isinstance(module, QLoRA):
            module.linear = linear(module.linear.weight(torch.float32))
    for net in (lm, dense):
        net(*text()).square().mean().backward()
    for name, p in lm.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, dense.get_parameter(name).grad)


def test_backward_keeps_no_weight_that_was_made_again():
    layer, x = NF4Linear(linear(torch.randn(256, 64))), torch.randn(2, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x), [x]) == 0


def test_everything_is_built_and_counted_without_content():
    with torch.device("meta"):
        lm = add_qlora(Llama(LlamaConfig(**WIDE)), rank=4)
        assert lm(*(tensor.to("meta") for tensor in text())).shape == (2, 9, 50)
