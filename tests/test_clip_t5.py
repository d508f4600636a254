"""CLIP-T5: images behind the text, for T5 and for the ladder beside it (Sec. 4, "Vision-and-language"; arXiv:2112.06825)."""

import pytest
import torch
from torch import nn

from baselines import METHODS, apply
from model import T5, T5Config, VisualEmbedding
from prune import init_side, magnitude
from side import LadderT5

B, S, T, V, N, P, C = 2, 7, 5, 50, 2, 4, 10  # two images of 2 x 2 cells
SIZES = dict(vocab_size=V, d_model=24, d_kv=16, d_ff=80, num_layers=3, num_heads=3, dropout_rate=0.0)
BASE = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32200)  # the authors add 100 rows for the images' positions


def clip_t5(seed=0, **changes):
    torch.manual_seed(seed)
    t5 = T5(T5Config(**(SIZES | changes)))
    t5.visual = VisualEmbedding(C, t5.config)
    return t5.eval()


def lively(t5, r=4):
    torch.manual_seed(1)
    ladder = LadderT5(t5, r).eval()
    for p in ladder.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return ladder


def batch(images=N):
    """source_ids, source_mask, decoder_ids, decoder_mask, images; the second row is padded on both sides."""
    torch.manual_seed(2)
    source_mask, decoder_mask = torch.ones(B, S, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    source_mask[1, 4:], decoder_mask[1, 3:] = False, False
    return (torch.randint(3, V, (B, S)) * source_mask, source_mask, torch.randint(3, V, (B, T)) * decoder_mask, decoder_mask, torch.randn(B, images, P, C))


def every_model():
    return [lively(clip_t5()), *(apply(clip_t5(), method) for method in METHODS)]


# ------------------------------------------------------------------------------------------------------ visual embedding

def test_a_position_is_feature_plus_box_plus_image_plus_number():  # arXiv:2102.02779, Sec. 3.1
    t5, images = clip_t5(), batch()[-1]
    visual, h = t5.visual, t5.visual(images, t5.embed.weight)
    assert h.shape == (B, N * P, 24)
    box = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.25])  # the second cell of four: above, on the right
    expected = (visual.feature_norm(visual.feature(images[1, 1, 1])) + visual.box_norm(visual.box(box)) + visual.image_order.weight[1] + t5.embed.weight[V - 2])
    torch.testing.assert_close(h[1, P + 1], expected)


def test_images_have_no_distance():  # arXiv:2102.02779, Sec. 3.1
    t5 = clip_t5()
    h, mask = torch.zeros(B, S + P, 24), torch.ones(B, S + P, dtype=torch.bool)
    bias, _ = t5.encoder.biases(h, mask, None, None, P)
    alone, _ = t5.encoder.biases(h[:, :S], mask[:, :S], None, None)
    assert torch.equal(bias[..., :S, :S], alone) and alone.any()
    assert not bias[..., S:, :].any() and not bias[..., :, S:].any()


@pytest.mark.parametrize("index", range(6), ids=["lst", *METHODS])
def test_every_method_sees_the_images_and_trains_their_embedding(index):
    model, inputs = every_model()[index], batch()
    logits, other = model(*inputs), model(*inputs[:4], inputs[4] + 1)
    assert (logits - other).abs().max() > 1e-3
    logits.square().mean().backward()
    visual = dict(model.visual.named_parameters())
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in visual.values()), [name for name, p in visual.items() if p.grad is None]


@pytest.mark.parametrize("method", ["lst", "full", "lora", "bitfit"])  # adapters and prompts have other sizes
def test_without_images_it_is_the_model_of_the_text(method):
    blind = clip_t5()
    blind.visual = None
    seeing, blind = (lively(t5) if method == "lst" else apply(t5, method) for t5 in (clip_t5(), blind))
    torch.testing.assert_close(seeing(*batch()[:4]), blind(*batch()[:4]))


@pytest.mark.parametrize("index", range(6), ids=["lst", *METHODS])
def test_padding_between_text_and_images_changes_nothing(index):
    model, (source_ids, source_mask, decoder_ids, decoder_mask, images) = every_model()[index], batch()
    padded = model(source_ids, source_mask, decoder_ids, decoder_mask, images)[1:, :3]
    torch.testing.assert_close(padded, model(source_ids[1:, :4], source_mask[1:, :4], decoder_ids[1:, :3], None, images[1:]))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("index", range(6), ids=["lst", *METHODS])
def test_generation_with_a_cache_reads_the_images(index, num_beams):
    model, (source_ids, source_mask, _, _, images) = every_model()[index], batch()
    with torch.no_grad():
        rows = [tensor.repeat_interleave(num_beams, 0) for tensor in (source_ids, source_mask, images)]
        state, ids = model.start(source_ids, source_mask, num_beams, images), torch.zeros(B * num_beams, 1, dtype=torch.long)
        for _ in range(3):
            logits = model.step(ids[:, -1:], state)
            torch.testing.assert_close(logits, model(rows[0], rows[1], ids, None, rows[2])[:, -1])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    if num_beams == 1:
        answer = model.generate(source_ids, source_mask, 1, images=images)
        assert torch.equal(answer, ids[:, 1:2])


# ------------------------------------------------------------------------------------------------------------ the ladder

def test_the_backbone_reads_text_alone():  # Sec. 4: "we do not feed combined inputs to the backbone model, but only text inputs"
    ladder, (source_ids, source_mask, _, _, images) = lively(clip_t5()), batch()
    memory_backbone, memory_side = ladder.encode(source_ids, source_mask, images)
    assert memory_backbone.shape == (B, S, 24) and memory_side.shape == (B, S + N * P, 6)
    torch.testing.assert_close(memory_backbone, ladder.encode(source_ids, source_mask, images + 1)[0])
    assert ladder.backbone.visual is None and not any(name.startswith("backbone.visual") for name, _ in ladder.named_parameters())


def test_no_gradient_flows_through_the_backbone_and_every_side_parameter_gets_one():  # Sec. 3.1 and 4
    ladder = lively(clip_t5())
    ladder(*batch()).square().mean().backward()
    assert all(p.grad is None for p in ladder.backbone.parameters())
    assert [name for name, p in ladder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_rungs_add_to_the_text_alone():  # Sec. 4: "only summed to the text part of the side network's combined inputs"
    ladder, (source_ids, source_mask, _, _, images) = lively(clip_t5()), batch()
    side, seen = ladder.encoder, []
    for block, rung in zip(side.blocks, side.ladders):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        nn.init.constant_(rung.alpha, torch.inf)  # mu = 1: the text has nothing of the stream below
    outputs = []
    for block in side.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    ladder.encode(source_ids, source_mask, images)
    h_visual = ladder.visual(images, ladder.backbone.embed.weight)
    torch.testing.assert_close(seen[0][:, S:], side.down_emb(h_visual))
    layers = list(ladder.backbone.encoder_layers(source_ids, source_mask))
    for j, rung in enumerate(side.ladders):
        torch.testing.assert_close(seen[j][:, :S], rung.down(layers[j + 1]))
        if j:
            assert torch.equal(seen[j][:, S:], outputs[j - 1][:, S:])


def test_with_r_1_and_shut_gates_it_is_the_clip_t5_that_reads_both():  # Sec. 3.2 and 4
    t5 = clip_t5()
    inputs = batch()
    expected = t5(*inputs)
    ladder = LadderT5(t5, r=1).eval()
    init_side(ladder, magnitude(t5))
    with torch.no_grad():
        for linear in (ladder.encoder.down_emb, ladder.decoder.down_emb, ladder.up):
            linear.weight.copy_(torch.eye(24))
            linear.bias.zero_()
    torch.testing.assert_close(ladder.shut_gates()(*inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method, trained, percent", [
    ("full", 224_540_160, 100.0), ("adapters", 19_333_632, 7.98), ("lora", 18_170_112, 7.54), ("bitfit", 1_862_344, 0.83), ("prompt", 2_842_400, 1.26),
    ("lst", 17_967_384, 7.46)])
def test_trained_shares_are_those_of_table_3(method, trained, percent):  # Table 3; LST with r = 4, 7.46 % of 240.9 M
    with torch.device("meta"):
        t5 = T5(T5Config(**BASE))
        t5.visual = VisualEmbedding(2048, t5.config)  # RN101's grid
        model = LadderT5(t5, 4) if method == "lst" else apply(t5, method)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == trained and round(100 * count / sum(p.numel() for p in model.parameters()), 2) == percent
