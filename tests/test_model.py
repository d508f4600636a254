"""model.py against `transformers`: by fixtures that it made (fixtures/make_t5.py), and live."""
import itertools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures.make_t5 import (BUCKETS, CONFIGS, FIXTURES, MAX_NEW_TOKENS, V1_1, expected,
                              random_inputs, random_reference, until_end)
from model import (CLIPT5, NAMES, NANO, PUBLIC, T5, Generates, NotThere, PositionBias, T5Config,
                   load_t5, load_tokenizer, rename, save_t5)
from workshop import set_config

PUBLIC_NAMES = {ours: theirs for theirs, ours in NAMES.items() if ours}
SAVED = ["t5-transformers4/tied", "t5-transformers4/own-head", "t5-transformers5/tied",
         "t5-transformers5/own-head", "t5-transformers5/unscaled-head"]
each_fixture = pytest.mark.parametrize("name", CONFIGS)
each_attention = pytest.mark.parametrize("attention", ["eager", "fused"])


def fixture(name, **how):
    """A fixture's T5, loaded by our own loader, and what transformers computed with it."""
    return load_t5(FIXTURES / name, **how), expected_of(name)


def expected_of(name):
    return load_file(FIXTURES / name / "expected.safetensors")


def inputs_of(saved):
    return [saved[key] for key in ("source_ids", "source_mask", "decoder_ids", "decoder_mask")]


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-6 * max(10, theirs.abs().max())


def assert_same_texts(t5, saved):
    for beams, key in ((1, "greedy"), (4, "beam_4")):
        ids = t5.generate(saved["source_ids"], saved["source_mask"], MAX_NEW_TOKENS, beams)
        assert until_end(ids).tolist() == saved[key].tolist()
        assert torch.equal(ids, until_end(ids, ids.size(1))), "only padding comes after the end"


def assert_same_weights(t5, other):
    for p, q in zip(t5.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# -------------------------------------------------------------------- the numbers of transformers

@each_attention
@each_fixture
@torch.no_grad()
def test_logits_and_texts_equal_transformers(name, attention):
    t5, saved = fixture(name, attention=attention)
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    assert_close(t5(*inputs_of(saved)), saved["logits"])
    state = t5.start(source_ids, source_mask)
    steps = [t5.step(token, state) for token in decoder_ids.split(1, dim=1)]
    assert_close(torch.stack(steps, dim=1), t5(source_ids, source_mask, decoder_ids))
    assert_same_texts(t5, saved)
    many = saved["many_source_ids"].long()
    ids = t5.generate(many, many != 0, MAX_NEW_TOKENS, 4)
    assert until_end(ids).tolist() == saved["many_beam_4"].tolist()


@each_fixture
@torch.no_grad()
def test_every_hidden_state_equals_transformers_and_only_kept_ones_are_there(name):
    t5, saved = fixture(name)
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    hidden, memory = t5.encode(source_ids, source_mask, keep=range(9))
    assert len(hidden) == t5.config.num_layers + 1
    assert_close(torch.stack([*hidden[:-1], memory.h]), saved["encoder"])  # theirs norm the last
    hidden = t5.decode(decoder_ids, decoder_mask, memory, keep=range(9))
    assert len(hidden) == t5.config.num_decoder_layers + 1
    assert_close(torch.stack([*hidden[:-1], t5.decoder.finish(hidden[-1])]), saved["decoder"])
    few = t5.decode(decoder_ids, decoder_mask, memory, keep=[1])
    there = [i for i, h in enumerate(few) if h is not None]
    assert there == sorted({0, min(2, len(few) - 1), len(few) - 1})
    assert all(torch.equal(few[i], hidden[i]) for i in there)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("num, far", BUCKETS)
def test_buckets_of_near_and_far_distances_equal_transformers(num, far, kind):
    saved = load_file(FIXTURES / "buckets.safetensors")
    config = T5Config(relative_attention_num_buckets=num, relative_attention_max_distance=far)
    ours = PositionBias(config, kind == "decoder").buckets(saved["distance"])
    assert ours.tolist() == saved[f"{kind} {num} {far}"].tolist()


@pytest.mark.parametrize("is_decoder", [False, True])
def test_biases_have_whole_rows_without_which_no_fused_kernel_of_cuda_takes_them(is_decoder):
    mask = torch.ones(2, 7, dtype=torch.bool)
    self_bias, cross_bias = PositionBias(T5Config(), is_decoder)(7, mask, mask)
    assert self_bias.stride(-1) == cross_bias.stride(-1) == 1


@pytest.mark.parametrize("files", ["model", "shards"])
@pytest.mark.parametrize("name", SAVED)
@torch.no_grad()
def test_what_transformers_saved_computes_what_it_computed(name, files):
    """Version 5 says of every head that it is tied; the file tells, and whether it is scaled."""
    t5, saved = load_t5(FIXTURES / name / files), expected_of(name)
    assert t5.config.tie_word_embeddings == ("own" not in name) == (t5.head is None)
    assert t5.config.scale_decoder_outputs == name.endswith("/tied")
    assert_close(t5(*inputs_of(saved)), saved["logits"])
    assert_same_texts(t5, saved)


HEADS = {"tied": (True, False), "own": (False, True), "unscaled": (False, False),
         "own-scaled": (True, True)}  # what the config says of tying, and a matrix of its own


def random_config(seed, head):
    draw = random.Random(seed)
    return dict(vocab_size=draw.randint(30, 60), d_model=4 * draw.randint(2, 8),
                d_kv=2 * draw.randint(1, 8), d_ff=draw.randint(8, 60),
                num_heads=draw.randint(1, 5), num_layers=draw.randint(1, 3),
                num_decoder_layers=draw.randint(1, 4), tie_word_embeddings=HEADS[head][0],
                feed_forward_proj=("relu", "gated-gelu")[seed % 2],
                relative_attention_num_buckets=4 * draw.randint(2, 8),
                relative_attention_max_distance=draw.randint(20, 60))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("head", HEADS)
def test_random_configurations_equal_transformers_live(seed, head, tmp_path):
    pytest.importorskip("transformers")
    config = random_config(seed + 10 * len(head), head)
    reference = random_reference(config, seed, own_head=HEADS[head][1])
    inputs = random_inputs(config, seed, S=70, T=20)
    saved = inputs | expected(reference, inputs)
    reference.save_pretrained(tmp_path)
    for attention in ("eager", "fused"):
        t5 = load_t5(tmp_path, attention=attention)
        with torch.no_grad():
            assert_close(t5(*inputs.values()), saved["logits"])
        assert_same_texts(t5, saved)


# --------------------------------------------------------------------------- masks and gradients

@each_attention
@each_fixture
@torch.no_grad()
def test_what_a_mask_hides_does_not_matter(name, attention):
    t5, saved = fixture(name, attention=attention)
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    changed = t5(source_ids.masked_fill(~source_mask, 7), source_mask,
                 decoder_ids.masked_fill(~decoder_mask, 7), decoder_mask)
    assert_close(changed[decoder_mask], saved["logits"][decoder_mask])
    row, target = source_mask[1], decoder_mask[1]
    single = t5(source_ids[1:2, row], source_mask[1:2, row], decoder_ids[1:2, target])
    assert_close(single[0], saved["logits"][1, target])
    source_mask[1], decoder_mask[1] = False, False  # a row of nothing but padding
    logits = t5(source_ids, source_mask, decoder_ids, decoder_mask)
    assert logits.isfinite().all()
    assert_close(logits[[0, 2]], saved["logits"][[0, 2]])
    for beams in (1, 4):
        assert t5.generate(source_ids, source_mask, 3, beams).size(0) == 3


@pytest.mark.parametrize("train", [False, True])
def test_checkpointing_changes_no_gradient_and_saves_memory(train):
    found = []
    for checkpoint in (False, True):
        t5, saved = fixture("gated-untied", checkpoint=checkpoint)
        torch.manual_seed(0)  # the same dropout
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            logits = t5.train(train)(*inputs_of(saved))
        logits.square().mean().backward()
        found.append((sum(sizes), [logits, *(p.grad for p in t5.parameters())]))
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][0] < 0.3 * found[0][0]


# ------------------------------------------------------------------------------------- generation

class Recomputing(Generates):
    """A T5 without any cache: each step runs encoder and decoder on all tokens so far."""

    def __init__(self, t5):
        self.t5, self.moves = t5, 0

    def start(self, source_ids, source_mask, images):
        self.source, self.ids = (source_ids, source_mask), source_ids[:, :0]
        return self

    def repeat(self, num_beams):
        self.source = [part.repeat_interleave(num_beams, dim=0) for part in self.source]
        self.ids = self.ids.repeat_interleave(num_beams, dim=0)

    def step(self, ids, state):
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.t5(*self.source, self.ids)[:, -1]

    def reorder(self, rows):
        self.moves += not torch.equal(rows, torch.arange(len(rows)))
        self.ids = self.ids[rows]


@pytest.mark.parametrize("beams", [1, 2, 4, 7])
@each_fixture
def test_texts_with_cache_equal_texts_without(name, beams):
    t5, inputs = fixture(name)[0], random_inputs(CONFIGS[name], seed=11, B=6)
    source = inputs["source_ids"], inputs["source_mask"]
    uncached = Recomputing(t5)
    plain = uncached.generate(*source, 12, beams)
    assert t5.generate(*source, 12, beams).tolist() == plain.tolist()
    assert (uncached.moves > 0) == (beams > 1), "beams that stay where they are prove nothing"


@pytest.mark.parametrize("beams", [1, 4])
def test_a_text_does_not_depend_on_its_batch(beams):
    t5, saved = fixture("wide-heads")
    source_ids, source_mask = saved["source_ids"], saved["source_mask"]
    batch = until_end(t5.generate(source_ids, source_mask, MAX_NEW_TOKENS, beams))
    for row, mask in enumerate(source_mask.split(1)):
        S = int(mask.nonzero().max()) + 1  # without the padding at the end
        ids = t5.generate(source_ids[row : row + 1, :S], mask[:, :S], MAX_NEW_TOKENS, beams)
        assert until_end(ids)[0].tolist() == batch[row].tolist()
    assert t5.generate(source_ids[:0], source_mask[:0], 5, beams).shape == (0, 1)  # empty batch


def test_generation_stops_where_every_text_has_ended():
    t5, saved = fixture("gated-untied")
    source_ids, source_mask = saved["source_ids"], saved["source_mask"]
    ids = t5.generate(source_ids[:2], source_mask[:2], 50)
    assert ids.shape == (2, 4) and ids.eq(1).any(1).all()
    assert t5.generate(source_ids, source_mask, 1, 4).shape == (3, 1)


# ---------------------------------------------------------------------------- the published files

PUBLISHED = {  # d_model, layers, heads, d_kv, d_ff; tensors without the stray one, parameters
    "t5-small": (512, 6, 8, 64, 2048, {}, 131, 60_506_624),
    "t5-base": (768, 12, 12, 64, 3072, {}, 257, 222_903_552),
    "t5-large": (1024, 24, 16, 64, 4096, {}, 509, 737_668_096),
    "t5-3b": (1024, 24, 32, 128, 16384, {}, 509, 2_851_598_336),
    "flan-t5-small": (512, 8, 6, 64, 1024, V1_1, 190, 76_961_152),
}


def published_keys(layers, v1_1):
    keys = {"shared", "lm_head"} if v1_1 else {"shared"}
    ff = "DenseReluDense", ("wi_0", "wi_1", "wo") if v1_1 else ("wi", "wo")
    attention, cross = ("SelfAttention", "qkvo"), ("EncDecAttention", "qkvo")
    for stack, parts in (("encoder", [attention, ff]), ("decoder", [attention, cross, ff])):
        keys |= {f"{stack}.final_layer_norm",
                 f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"}
        for i, (j, (part, matrices)) in itertools.product(range(layers), enumerate(parts)):
            keys |= {f"{stack}.block.{i}.layer.{j}.{part}.{matrix}" for matrix in matrices}
            keys.add(f"{stack}.block.{i}.layer.{j}.layer_norm")
    return {f"{key}.weight" for key in keys}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_counts_are_those_of_the_published_files(name):
    d_model, layers, heads, d_kv, d_ff, version, tensors, count = PUBLISHED[name]
    with torch.device("meta"):
        t5 = T5(T5Config(d_model=d_model, num_layers=layers, num_heads=heads, d_kv=d_kv,
                         d_ff=d_ff, **version))
    ours = [name for name, _ in t5.named_parameters()]
    keys = [rename(name, PUBLIC_NAMES) for name in ours]
    assert set(keys) == published_keys(layers, v1_1=version is V1_1)
    assert len(keys) == len(set(keys)) == tensors
    assert [rename(key, NAMES) for key in keys] == ours
    assert sum(p.numel() for p in t5.parameters()) == count and name in PUBLIC


def test_the_public_config_of_t5_small_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["T5WithLMHeadModel"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
        "dropout_rate": 0.1, "initializer_factor": 1.0, "layer_norm_epsilon": 1e-06,
        "model_type": "t5", "n_positions": 512, "num_heads": 8, "num_layers": 6,
        "relative_attention_num_buckets": 32, "vocab_size": 32128,
        "task_specific_params": {"summarization": {"num_beams": 4}}}))
    assert T5Config.from_json(tmp_path / "config.json") == T5Config()


# ---------------------------------------------------------------------------------------- loading

SIZES = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=3)
P, C = 4, 10  # images of 2 x 2 cells
WEIGHTS, INDEX, SPIECE = "model.safetensors", "model.safetensors.index.json", "spiece.model"
KINDS = {"tied": {}, "own-head": V1_1,
         "unscaled-head": dict(feed_forward_proj="gated-gelu", scale_decoder_outputs=False)}


def folder_with(folder, weights=None, **changes):
    """A folder with a tiny random T5 in it; `weights` has other tensors, None takes one out."""
    torch.manual_seed(0)
    save_t5(T5(T5Config(**SIZES | changes)), folder)
    if weights:
        state = load_file(folder / WEIGHTS) | weights
        state = {key: p for key, p in state.items() if p is not None}
        save_file(state, folder / "new.safetensors")
        os.replace(folder / "new.safetensors", folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HOME", str(tmp_path))
    t5 = T5(T5Config(**SIZES | KINDS[kind], num_decoder_layers=2, attention="eager"))
    save_t5(t5, tmp_path / "t5")
    again = load_t5("~/t5", attention="eager")
    assert again.config == t5.config and not again.training
    assert_same_weights(t5, again)
    save_t5(again, tmp_path / "t5")  # over the file that its tensors are mapped from
    assert_same_weights(t5, load_t5(tmp_path / "t5"))
    dropped = [m.p for m in load_t5("~/t5", dropout=0.3).modules() if isinstance(m, nn.Dropout)]
    assert set(dropped) == {0.3}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_save(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    t5 = load_t5(folder_with(tmp_path, num_decoder_layers=2, **KINDS[kind]))
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = random_inputs(SIZES, seed=0)
    with torch.no_grad():
        logits = t5(*inputs.values())
    if kind == "unscaled-head" and transformers.__version__ < "5":
        logits *= SIZES["d_model"] ** -0.5  # version 4 scales every tied head
    assert_close(logits, expected(reference, inputs)["logits"])


@pytest.mark.parametrize("copies", [["encoder.embed_tokens"], ["decoder.embed_tokens", "lm_head"]])
@pytest.mark.parametrize("only", [{}, {"shared.weight": None}])
def test_the_embedding_may_come_as_copies(tmp_path, copies, only):
    words = torch.randn(40, 8)
    weights = {f"{name}.weight": words.clone() for name in ["shared", *copies]}
    t5 = load_t5(folder_with(tmp_path, weights | only))
    assert torch.equal(t5.embed.weight, words) and t5.head is None


def test_a_head_that_differs_from_the_embedding_is_its_own(tmp_path):
    t5 = load_t5(folder_with(tmp_path, {"lm_head.weight": torch.ones(40, 8, dtype=torch.bfloat16)}))
    assert torch.equal(t5.head.weight, torch.ones(40, 8))
    assert t5.config.scale_decoder_outputs and not t5.config.tie_word_embeddings


@pytest.mark.parametrize("weights, config, words", [
    ({}, dict(tie_word_embeddings=False), "Missing key.*head.weight"),
    ({"decoder.block.0.layer.1.EncDecAttention.q.weight": None}, {},
     "Missing key.*decoder.blocks.0.cross_attention.q.weight"),
    ({"extra": torch.zeros(1)}, {}, "Unexpected key.*extra"),
    ({"encoder.final_layer_norm.weight": torch.ones(9)}, {},
     r"size mismatch for encoder.final_norm.weight.*\[9\].*\[8\]"),
    ({"lm_head.weight": torch.ones(39, 8)}, {}, "size mismatch for head.weight")])
def test_what_does_not_fit_is_named_in_a_line(tmp_path, weights, config, words):
    set_config(folder_with(tmp_path, weights), **config)
    with pytest.raises(ValueError, match=f"weights of .* do not fit .*{words}") as error:
        load_t5(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype, least, most", [(torch.bfloat16, 1e-4, 0.05),
                                                (torch.float64, 0, 1e-6)])
@torch.no_grad()
def test_other_precisions_are_loaded_and_close(dtype, least, most):
    t5, saved = fixture("gated-untied", dtype=dtype)
    assert all(p.dtype == dtype for p in t5.parameters())
    logits = t5(*inputs_of(saved))
    assert logits.dtype == dtype
    assert least < (logits - saved["logits"]).abs().mean() < most


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_float32_weights_stay_mapped_and_the_file_stays_as_it_is():
    file = FIXTURES / "wide-heads" / WEIGHTS
    t5, before = load_t5(file.parent), file.read_bytes()
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")]
              for line in lines if line.endswith(str(file))]
    for p in t5.parameters():
        assert any(low <= p.data_ptr() < high for low, high in ranges), "a weight was copied"
        p.data.add_(1)  # full fine-tuning changes weights in place
    assert file.read_bytes() == before


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:bd94\nsize 242043056\n"
HTML = b"<!DOCTYPE html><html><head><title>Log in</title></head></html>"
PLACES = ["[]", "{}", *(f'{{"a": {place}}}' for place in ("[]", "null", '"../other.safetensors"'))]
DAMAGE = {  # what a file may hold instead; a number: so many bytes of itself
    WEIGHTS: [LFS, HTML, b"\x80\x02}q\x00X", bytes(1000), 0, 7, 9, 200, -4000, -1],
    "config.json": [b"", b"{", b"[]", b"\xff\xfe{}", HTML, b"{}", b'{"model_type": "bert"}'],
    INDEX: [b"{", b"[]", b"\xff", *(f'{{"weight_map": {places}}}'.encode() for places in PLACES)],
    SPIECE: [LFS, HTML, 0, 1000, -9000],
}


@pytest.mark.parametrize("name, content", [(name, content) for name in DAMAGE
                                           for content in DAMAGE[name]], ids=lambda _: "")
def test_a_damaged_file_is_a_value_error_that_names_it_in_a_line(tmp_path, name, content):
    folder_with(tmp_path)
    shutil.copy(NANO / SPIECE, tmp_path)
    if name == INDEX:
        os.replace(tmp_path / WEIGHTS, tmp_path.parent / "other.safetensors")
    if isinstance(content, int):
        content = (tmp_path / name).read_bytes()[:content]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        load_tokenizer(tmp_path) if name == SPIECE else load_t5(tmp_path)
    advice = "download it again, or run `git lfs pull`" if name == WEIGHTS else ""
    assert advice in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_unknown_names_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor nano, t5-small"):
        load_t5("t5-smal")
    with pytest.raises(ValueError, match="config.json is missing"):
        load_t5(tmp_path)
    with pytest.raises(ValueError, match="spiece.model is missing"):
        load_tokenizer(tmp_path)
    (folder_with(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="overflow"):
        load_t5(NANO, dtype=torch.float16)
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_t5(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"shared.weight": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="model-1.safetensors is missing"):
        load_t5(tmp_path)


WRONG = {
    "d_model": [0, "8", 8.0, None, 10**30, 16], "num_layers": [10**6, 2], "num_heads": [[3]],
    "dropout_rate": [1.5, math.nan], "layer_norm_epsilon": [-1], "vocab_size": [39],
    "feed_forward_proj": ["gated-silu", ["relu"]], "tie_word_embeddings": ["yes"],
    "relative_attention_num_buckets": [0, 6], "relative_attention_max_distance": [8],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_config_with_wrong_values_is_a_value_error(tmp_path, name, value):
    set_config(folder_with(tmp_path), **{name: value})
    with pytest.raises(ValueError, match=f"{name}|do not fit"):
        load_t5(tmp_path)


# ---------------------------------------------------------------------------------------- by name

@pytest.mark.parametrize("name", ["t5-small", "google-t5/t5-small", "flan-t5-small"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_public_name_is_a_repository_at_a_revision(tmp_path, monkeypatch, name, sharded):
    folder = FIXTURES / "t5-transformers5" / "tied" / ("shards" if sharded else "model")

    def hub_file(repo, filename, revision, sha256=None):
        known, pinned, sha256_of_weights = PUBLIC[name.removeprefix("google-t5/")]
        assert (repo, revision) == (known, pinned)
        assert sha256 == (sha256_of_weights if filename == WEIGHTS else None)
        if filename == WEIGHTS and sharded:
            raise NotThere("404")
        return folder / filename
    monkeypatch.setattr("model.hub_file", hub_file)
    assert_same_weights(load_t5(name), load_t5(folder))


# ---------------------------------------------------------------------------------------- CLIP-T5

def test_a_position_is_feature_plus_box_plus_image_plus_number():  # arXiv:2102.02779, Sec. 3.1
    t5, images = CLIPT5(T5Config(**SIZES), C), torch.randn(2, 2, P, C)
    visual, h = t5.visual, t5.visual(images, t5.embed.weight)
    assert h.shape == (2, 2 * P, 8)
    box = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.25])  # the second of four cells: above, on the right
    feature, place = visual.feature(images[1, 1, 1]), visual.box(box)
    sum_of_four = (visual.feature_norm(feature) + visual.box_norm(place)
                   + visual.image_order.weight[1] + t5.embed.weight[-2])
    torch.testing.assert_close(h[1, P + 1], sum_of_four)


def test_images_have_no_distance():  # arXiv:2102.02779, Sec. 3.1
    t5, S, mask = T5(T5Config(**SIZES)), 7, torch.ones(2, 7 + P, dtype=torch.bool)
    bias, _ = t5.encoder.pos_bias(S + P, mask, P=P)
    of_text, _ = t5.encoder.pos_bias(S, mask[:, :S])
    assert torch.equal(bias[..., :S, :S], of_text) and of_text.any()
    assert not bias[..., S:, :].any() and not bias[..., :, S:].any()


def test_a_clip_t5_without_images_is_the_t5_of_its_file():
    saved = expected_of("relu-tied")
    seeing = load_t5(FIXTURES / "relu-tied", channels=C)
    assert_close(seeing(*inputs_of(saved)), saved["logits"])
    images = torch.randn(3, 1, P, C)
    assert (seeing(*inputs_of(saved), images) - saved["logits"]).abs().max() > 1e-3
    half = load_t5(FIXTURES / "relu-tied", channels=C, dtype=torch.bfloat16)
    assert {p.dtype for p in half.visual.parameters()} == {torch.float32}
    with pytest.raises(AssertionError, match="only a CLIPT5"):
        load_t5(FIXTURES / "relu-tied")(*inputs_of(saved), images)
