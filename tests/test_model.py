"""model.py against the `transformers` library: by fixtures that it made (fixtures/make_t5.py), and
live where it is installed."""
import importlib.metadata
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

import model
from fixtures.make_t5 import (BUCKETS, CONFIGS, FIXTURES, MAX_NEW_TOKENS, V1_1, expected,
                              random_inputs, random_reference, until_end)
from model import (CLIPT5, NAMES, PUBLIC, T5, Generates, NotThere, T5Config, Tokenizer, load_t5,
                   load_tokenizer, rename, save_t5)
from run import kernels

ROOT = Path(model.__file__).parent
PUBLIC_NAMES = {ours: theirs for theirs, ours in NAMES.items() if ours}
SAVED = ["t5-transformers4/tied", "t5-transformers4/own-head", "t5-transformers5/tied",
         "t5-transformers5/own-head", "t5-transformers5/unscaled-head"]
each_fixture = pytest.mark.parametrize("name", CONFIGS)
each_attention = pytest.mark.parametrize("attention", ["eager", "fused"])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No test reaches the network or the Hugging Face cache of whoever runs it."""
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-huggingface-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def fixture(name, **how):
    """A fixture's T5, loaded by our own loader, and what transformers computed."""
    return load_t5(FIXTURES / name, **how), load_file(FIXTURES / name / "expected.safetensors")


def inputs_of(saved):
    return [saved[key] for key in ("source_ids", "source_mask", "decoder_ids", "decoder_mask")]


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5


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
    assert_close(t5(*inputs_of(saved)), saved["logits"])
    assert_same_texts(t5, saved)


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
    last = t5.decoder.finish(hidden[-1])
    assert_close(torch.stack([*hidden[:-1], last]), saved["decoder"])
    few = t5.decode(decoder_ids, decoder_mask, memory, keep=[1])
    there = [i for i, h in enumerate(few) if h is not None]
    assert there == sorted({0, min(2, len(few) - 1), len(few) - 1})
    assert all(torch.equal(few[i], hidden[i]) for i in there)


@each_fixture
def test_a_hundred_beam_searches_equal_transformers(name):
    t5, saved = fixture(name)
    source_ids = saved["many_source_ids"].long()
    ids = t5.generate(source_ids, source_ids != 0, MAX_NEW_TOKENS, 4)
    assert until_end(ids).tolist() == saved["many_beam_4"].tolist()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("num, far", BUCKETS)
def test_buckets_of_near_and_far_distances_equal_transformers(num, far, kind):
    saved = load_file(FIXTURES / "buckets.safetensors")
    t5 = T5(T5Config(vocab_size=4, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1,
                     relative_attention_num_buckets=num, relative_attention_max_distance=far))
    ours = getattr(t5, kind).pos_bias.buckets(saved["distance"])
    assert ours.tolist() == saved[f"{kind} {num} {far}"].tolist()


@pytest.mark.parametrize("files", ["model", "shards"])
@pytest.mark.parametrize("name", SAVED)
@torch.no_grad()
def test_what_transformers_saved_computes_what_it_computed(name, files):
    """Version 5 says of every head that it is tied; the file tells, and whether it is scaled."""
    t5, saved = load_t5(FIXTURES / name / files), load_file(FIXTURES / name / "expected.safetensors")
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


# ---------------------------------------------------------------------------- attention and masks

@each_fixture
@torch.no_grad()
def test_eager_and_fused_attention_agree_on_long_inputs(name):
    inputs = random_inputs(CONFIGS[name], seed=5, B=2, S=200, T=40).values()
    eager, fused = (fixture(name, attention=attention)[0] for attention in ("eager", "fused"))
    assert_close(eager(*inputs), fused(*inputs))


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


@each_attention
@torch.no_grad()
def test_a_fully_padded_row_gives_numbers_and_leaves_the_others_as_they_are(attention):
    t5, saved = fixture("relu-tied", attention=attention)
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    source_mask[1], decoder_mask[1] = False, False
    logits = t5(source_ids, source_mask, decoder_ids, decoder_mask)
    assert logits.isfinite().all()
    assert_close(logits[[0, 2]], saved["logits"][[0, 2]])
    for beams in (1, 4):
        assert t5.generate(source_ids, source_mask, 3, beams).size(0) == 3


@torch.no_grad()
def test_the_decoder_does_not_see_the_future():
    t5, saved = fixture("deep-decoder")
    source_ids, source_mask, decoder_ids, _ = inputs_of(saved)
    before = t5(source_ids, source_mask, decoder_ids)
    decoder_ids[:, 5:] = 9
    after = t5(source_ids, source_mask, decoder_ids)
    assert_close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 0.1


# -------------------------------------------------------------------------------------- gradients

def loss_of(t5, saved):
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    logits = t5(source_ids, source_mask, decoder_ids, decoder_mask)
    return F.cross_entropy(logits.flatten(0, 1), decoder_ids.flatten())


@pytest.mark.parametrize("train", [False, True])
def test_checkpointing_changes_no_gradient_and_saves_memory(train):
    found = []
    for checkpoint in (False, True):
        t5, saved = fixture("gated-untied", checkpoint=checkpoint)
        torch.manual_seed(0)  # the same dropout
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            loss = loss_of(t5.train(train), saved)
        loss.backward()
        found.append((sum(sizes), loss, *(p.grad for p in t5.parameters())))
    torch.testing.assert_close(found[1][1:], found[0][1:])
    assert found[1][0] < 0.3 * found[0][0]


@each_attention
def test_second_derivatives_are_right_or_an_error(attention):
    t5, saved = fixture("gated-untied", attention=attention, dtype=torch.float64)
    assert t5(*inputs_of(saved)).dtype == torch.float64
    p = t5.encoder.blocks[0].self_attention.q.weight

    def gradient(create_graph=False):
        return torch.autograd.grad(loss_of(t5, saved), p, create_graph=create_graph)[0]

    def second_derivative():
        return torch.autograd.grad(gradient(create_graph=True).square().sum(), p)[0]

    if attention == "eager":
        along, norms = torch.randn_like(p), []
        second = (second_derivative() * along).sum()
        for step in (1e-6, -2e-6):
            p.data.add_(along, alpha=step)
            norms.append(gradient().square().sum())
        torch.testing.assert_close(second, (norms[0] - norms[1]) / 2e-6, rtol=1e-4, atol=0)
    kernels.install(t5.train())
    with pytest.raises(RuntimeError, match="twice|not implemented"):
        second_derivative()


@torch.no_grad()
def test_shapes_are_known_on_the_meta_device():
    with torch.device("meta"):
        t5 = T5(T5Config(**CONFIGS["deep-decoder"]))
        ids = torch.zeros(2, 5, dtype=torch.long)
        assert t5(ids, ids == 0, ids[:, :3], ids[:, :3] == 0).shape == (2, 3, 36)


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


@each_attention
@each_fixture
@torch.no_grad()
def test_one_token_at_a_time_gives_the_same_logits(name, attention):
    t5, saved = fixture(name, attention=attention)
    source_ids, source_mask, decoder_ids, _ = inputs_of(saved)
    state = t5.start(source_ids, source_mask)
    steps = [t5.step(token, state) for token in decoder_ids.split(1, dim=1)]
    assert_close(torch.stack(steps, dim=1), t5(source_ids, source_mask, decoder_ids))


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
    for most in (1, 5):  # an empty batch
        assert t5.generate(source_ids[:0], source_mask[:0], most, beams).shape == (0, 1)


@torch.no_grad()
def test_enough_beams_find_the_best_text_of_all():
    V, length, found = 4, 3, set()
    for seed in range(6):
        torch.manual_seed(seed)
        t5 = T5(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
                         tie_word_embeddings=False)).eval()
        torch.nn.init.normal_(t5.head.weight)
        source_ids, source_mask = torch.tensor([[2, 3, 3]]), torch.ones(1, 3, dtype=torch.bool)
        scores = {}
        for text in itertools.product(range(V), repeat=length):
            text = text[: text.index(1) + 1] if 1 in text else text
            logits = t5(source_ids, source_mask, torch.tensor([(0, *text[:-1])]))[0]
            score = logits.log_softmax(-1)[range(len(text)), text].sum()
            scores[text] = score.item() / len(text)
        best = max(scores, key=scores.get)
        ids = t5.generate(source_ids, source_mask, length, V**length)
        assert until_end(ids, length)[0].tolist() == [*best, *[0] * (length - len(best))]
        found.add(len(best))
    assert len(found) > 1, "best texts of one length only would not test the length penalty"


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
    assert sum(p.numel() for p in t5.parameters()) == count
    assert name in PUBLIC


def test_the_public_config_of_t5_small_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["T5WithLMHeadModel"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
        "model_type": "t5", "n_positions": 512, "num_heads": 8, "num_layers": 6,
        "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"num_beams": 4}}, "vocab_size": 32128}))
    assert T5Config.from_json(tmp_path / "config.json") == T5Config()


# ---------------------------------------------------------------------------------------- loading

SIZES = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=3)
KINDS = {"tied": {}, "own-head": V1_1,
         "unscaled-head": dict(feed_forward_proj="gated-gelu", scale_decoder_outputs=False)}


def folder_with(folder, weights=None, **changes):
    """A folder with a tiny random T5 in it; `weights` changes its dict of tensors."""
    torch.manual_seed(0)
    save_t5(T5(T5Config(**SIZES | changes)), folder)
    if weights:
        state = load_file(folder / "model.safetensors")
        save_file(weights(state) or state, folder / "new.safetensors")
        os.replace(folder / "new.safetensors", folder / "model.safetensors")
    return folder


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_round_trip(tmp_path, kind):
    t5 = T5(T5Config(**SIZES | KINDS[kind], num_decoder_layers=2, attention="eager"))
    save_t5(t5, tmp_path)
    again = load_t5(tmp_path, attention="eager")
    assert again.config == t5.config and not again.training
    assert_same_weights(t5, again)
    save_t5(again, tmp_path)  # over the file that its tensors are mapped from
    assert_same_weights(t5, load_t5(tmp_path))


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


def test_the_stray_key_of_v1_files_is_dropped():
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert stray in load_file(FIXTURES / "relu-tied" / "model.safetensors")
    assert load_t5(FIXTURES / "relu-tied").config.tie_word_embeddings  # config.json is silent


@pytest.mark.parametrize("copies", [["encoder.embed_tokens"], ["decoder.embed_tokens", "lm_head"],
                                    ["decoder.embed_tokens", "encoder.embed_tokens"]])
@pytest.mark.parametrize("only", [False, True])
def test_the_embedding_may_come_as_copies(tmp_path, copies, only):
    def copied(state):
        state |= {f"{name}.weight": state["shared.weight"].clone() for name in copies}
        if only:
            del state["shared.weight"]
    t5 = load_t5(folder_with(tmp_path, copied))
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(t5.embed.weight, state[f"{copies[0]}.weight"]) and t5.head is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_differs_from_the_embedding_is_its_own(tmp_path, dtype):
    folder_with(tmp_path, lambda state: {**state, "lm_head.weight": state["shared.weight"].to(
        dtype) + 1})
    t5 = load_t5(tmp_path)
    torch.testing.assert_close(t5.head.weight, t5.embed.weight + 1, atol=0.01, rtol=0)
    assert t5.config.scale_decoder_outputs and not t5.config.tie_word_embeddings


def test_an_untied_config_wants_a_head(tmp_path):
    set_config(folder_with(tmp_path), tie_word_embeddings=False)
    with pytest.raises(ValueError, match="do not fit its config.json.*Missing.*head.weight"):
        load_t5(tmp_path)


def without_attention(state):
    return {key: p for key, p in state.items() if ".SelfAttention.q" not in key}


@pytest.mark.parametrize("change, words", [
    (without_attention, "Missing key.*encoder.blocks.0.self_attention.q.weight"),
    (lambda state: state.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
    (lambda state: state.update({"encoder.final_layer_norm.weight": torch.ones(9)}),
     r"size mismatch for encoder.final_norm.weight.*\[9\].*\[8\]"),
    (lambda state: state.update({"lm_head.weight": torch.ones(39, 8)}), "size mismatch for head"),
])
def test_missing_unexpected_and_misshapen_keys_are_named_in_a_line(tmp_path, change, words):
    folder_with(tmp_path, change)
    with pytest.raises(ValueError, match=f"the weights of .* do not fit.*{words}") as error:
        load_t5(tmp_path)
    assert "\n" not in str(error.value)


def test_float16_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="overflow"):
        load_t5(folder_with(tmp_path), dtype=torch.float16)


@pytest.mark.parametrize("dtype, least, most", [(torch.bfloat16, 1e-4, 0.05),
                                                (torch.float64, 0, 1e-6)])
@torch.no_grad()
def test_other_precisions_are_loaded_and_close(dtype, least, most):
    t5, saved = fixture("gated-untied", dtype=dtype)
    assert all(p.dtype == dtype for p in t5.parameters())
    logits = t5(*inputs_of(saved))
    assert logits.dtype == dtype
    assert least < (logits - saved["logits"]).abs().mean() < most


def test_the_rate_of_dropout_may_be_another_than_the_files(tmp_path):
    for given, rate in ((None, 0.1), (0.3, 0.3), (0.0, 0.0)):
        t5 = load_t5(folder_with(tmp_path), dropout=given)
        assert {m.p for m in t5.modules() if isinstance(m, torch.nn.Dropout)} == {rate}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_float32_weights_stay_mapped_and_the_file_stays_as_it_is():
    file = FIXTURES / "wide-heads" / "model.safetensors"
    t5, before = load_t5(file.parent), file.read_bytes()
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")]
              for line in lines if line.endswith(str(file))]
    for p in t5.parameters():
        assert any(low <= p.data_ptr() < high for low, high in ranges), "a weight was copied"
        p.data.add_(1)  # full fine-tuning changes weights in place
    assert file.read_bytes() == before


def shard(folder):
    """Split model.safetensors in two and write the index, as large public models come."""
    state = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {key: names[i % 2] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name)
    (folder / "model.safetensors").unlink()
    write_index(folder, json.dumps({"metadata": {}, "weight_map": where}))
    return state, folder / names[1]


def write_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text, encoding="latin-1")


def test_a_sharded_checkpoint_is_read(tmp_path):
    state, second = shard(folder_with(tmp_path))
    for name, p in load_t5(tmp_path).named_parameters():
        assert torch.equal(p, state[rename(name, PUBLIC_NAMES)])
    second.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        load_t5(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", "\xff", "[" * 100_000, *(
    f'{{"weight_map": {places}}}' for places in ("[]", "{}", '{"a": []}', '{"a": 5}',
                                                 '{"a": null}'))])
def test_a_damaged_index_is_a_value_error(tmp_path, index):
    shard(folder_with(tmp_path))
    write_index(tmp_path, index)
    with pytest.raises(ValueError, match="index.json is not an index"):
        load_t5(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors",
                                  "..", ".", ""])
def test_an_index_may_not_name_files_elsewhere(tmp_path, name):
    folder_with(tmp_path)
    os.replace(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    write_index(tmp_path, json.dumps({"weight_map": {"shared.weight": name}}))
    with pytest.raises(ValueError, match="index.json"):
        load_t5(tmp_path)


@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:bd94\nsize 242043056\n",
    b"<!DOCTYPE html><html><head><title>Log in</title></head></html>", b"", bytes(1000),
    b"\x80\x02}q\x00X\x0d\x00\x00\x00shared.weight"])  # a pickle, as pytorch_model.bin is
def test_a_file_that_is_no_checkpoint_says_how_to_get_one(tmp_path, content):
    (folder_with(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file.*download it again.*git lfs pull"):
        load_t5(tmp_path)


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 200, -4000, -1])
def test_a_cut_file_is_a_value_error(tmp_path, keep):
    file = folder_with(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="download it again"):
        load_t5(tmp_path)


def test_missing_files_and_unknown_names_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor nano, t5-small"):
        load_t5("t5-smal")
    with pytest.raises(ValueError, match="config.json is missing"):
        load_t5(tmp_path)
    with pytest.raises(ValueError, match="spiece.model is missing"):
        load_tokenizer(tmp_path)
    (folder_with(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_t5(tmp_path)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"<html>", b"{}", b"1" * 5000, b"[" * 100_000,
    b'{"model_type": "bert"}', b'{"d_model": 8}'], ids=range(11))
def test_a_config_that_is_none_is_a_value_error(tmp_path, content):
    (folder_with(tmp_path) / "config.json").write_bytes(content)
    with pytest.raises(ValueError):
        load_t5(tmp_path)


@pytest.mark.parametrize("wrong", [
    dict(d_model=0), dict(d_model=-8), dict(d_model="8"), dict(d_model=8.0), dict(d_model=None),
    dict(d_model=True), dict(d_model=10**30), dict(num_layers=10**6), dict(num_decoder_layers=0),
    dict(num_heads=[3]), dict(dropout_rate=1.5), dict(dropout_rate="0.1"),
    dict(dropout_rate=math.nan), dict(layer_norm_epsilon=-1), dict(layer_norm_epsilon=math.inf),
    dict(feed_forward_proj="gated-silu"), dict(feed_forward_proj=["relu"]),
    dict(tie_word_embeddings="yes"), dict(scale_decoder_outputs="no"), dict(vocab_size=39),
    dict(relative_attention_num_buckets=6), dict(relative_attention_num_buckets=0),
    dict(relative_attention_max_distance=8), dict(d_model=2**24, num_heads=2**24, d_kv=2**24),
    dict(d_model=16), dict(num_layers=2)], ids=str)
def test_a_config_with_wrong_values_is_a_value_error(tmp_path, wrong):
    set_config(folder_with(tmp_path), **wrong)
    with pytest.raises(ValueError, match="|".join(wrong) + "|do not fit"):
        load_t5(tmp_path)


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "d_kv", "d_ff", "num_layers",
                                  "num_heads"])
def test_a_config_without_a_size_is_a_value_error(tmp_path, name):
    path = folder_with(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describe a T5|do not fit"):
        load_t5(tmp_path)


# ---------------------------------------------------------------------------------------- by name

@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["t5-small", "google-t5/t5-small", "flan-t5-small"])
def test_an_existing_hugging_face_cache_is_used(tmp_path, monkeypatch, spiece, name, sharded):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        load_t5(name)
    repo, revision, _ = PUBLIC[name.removeprefix("google-t5/")]
    cache = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot, blobs = cache / "snapshots" / revision, cache / "blobs"
    if revision == "main":
        snapshot = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(snapshot.name)
    folder_with(blobs)
    (blobs / "spiece.model").write_bytes(spiece.read_bytes())
    if sharded:
        shard(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)  # the cache's own way
    assert_same_weights(load_t5(name), load_t5(blobs))
    assert load_tokenizer(name).encode("a film") == load_tokenizer(blobs).encode("a film")


def test_a_network_that_fails_at_the_index_is_a_value_error(tmp_path, monkeypatch):
    def hub_file(repo, filename, revision, sha256=None):
        if filename == "config.json":
            return folder_with(tmp_path) / "config.json"
        down = ValueError("the network is down")
        raise NotThere("404") if filename == "model.safetensors" else down
    monkeypatch.setattr(model, "hub_file", hub_file)
    with pytest.raises(ValueError, match="network is down"):
        load_t5("t5-small")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, spiece):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same_weights(load_t5(f"~/{folder_with(tmp_path / 't5').name}"), load_t5(tmp_path / "t5"))
    (tmp_path / "t5" / "spiece.model").write_bytes(spiece.read_bytes())
    assert load_tokenizer("~/t5").vocab_size == load_tokenizer(spiece.parent).vocab_size


# ---------------------------------------------------------------------------------------- CLIP-T5

P, C = 4, 10  # two images of 2 x 2 cells


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
    saved = load_file(FIXTURES / "relu-tied" / "expected.safetensors")
    seeing = load_t5(FIXTURES / "relu-tied", channels=C)
    assert_close(seeing(*inputs_of(saved)), saved["logits"])
    images = torch.randn(3, 1, P, C)
    assert (seeing(*inputs_of(saved), images) - saved["logits"]).abs().max() > 1e-3
    half = load_t5(FIXTURES / "relu-tied", channels=C, dtype=torch.bfloat16)
    assert {p.dtype for p in half.visual.parameters()} == {torch.float32}
    with pytest.raises(AssertionError, match="only a CLIPT5"):
        load_t5(FIXTURES / "relu-tied")(*inputs_of(saved), images)


# -------------------------------------------------------------------------------------- tokenizer

TEXT = ["the film was a joy , and the cast was better than the film .",
        "a dull , slow story that never finds its end .",
        "I can't say that 123 people didn't like it !", "sst2 sentence: nothing is as it seems",
        "premise: it rains hypothesis: it is wet"]


def train_pieces(path, **how):
    file = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 3), model_writer=file, vocab_size=90,
                               hard_vocab_limit=False, num_threads=1, minloglevel=2, **how)
    path.write_bytes(file.getvalue())
    return path


T5_IDS = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return train_pieces(tmp_path_factory.mktemp("pieces") / "spiece.model", **T5_IDS)


@pytest.fixture
def tokenizer(spiece):
    return load_tokenizer(spiece.parent)


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in TEXT:
        ids = tokenizer.encode(text)
        assert ids and min(ids) > 2 and max(ids) < tokenizer.vocab_size - 100
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([0, *ids, 1, 0, 5, 6]) == text, "nothing comes after the end"
    assert tokenizer.encode("") == tokenizer.encode("  \n\t ") == [] and tokenizer.decode([]) == ""
    plain = tokenizer.encode("the film was a joy")
    assert tokenizer.encode(" the\tfilm \n was\u00a0a   joy ") == plain


def test_sentinels_are_the_last_ids_counted_from_the_end(tokenizer):
    last, the, was = tokenizer.vocab_size - 1, tokenizer.encode("the"), tokenizer.encode("was")
    assert tokenizer.encode("<extra_id_0>") == [last]
    assert tokenizer.encode("<extra_id_99>") == [last - 99] == [tokenizer.pieces.vocab_size()]
    text = "the <extra_id_0> was\n<extra_id_1>"
    assert tokenizer.encode(text) == [*the, last, *was, last - 1]
    assert tokenizer.decode([*the, last, *was]) == "the <extra_id_0> was"


@pytest.mark.parametrize("text", ["<extra_id_100>", "<extra_id_05>", "<extra_id_00>", "<pad>",
                                  "<extra_id_\u0663>", "<extra_id_>", "<extra_id_-1>", "</s>"])
def test_text_that_looks_like_a_special_token_is_text(tokenizer, text):
    pieces = tokenizer.pieces.vocab_size()
    assert all(1 < i < pieces for i in tokenizer.encode(f"the {text} film"))


def test_ids_beyond_the_vocabulary_read_as_unknown(tokenizer):
    the, unknown = tokenizer.encode("the"), tokenizer.decode([2])
    for wrong in (tokenizer.vocab_size, 32127, 10**9, -100):
        assert tokenizer.decode([wrong]) == unknown
        assert tokenizer.decode([*the, wrong, *the]) == tokenizer.decode([*the, 2, *the])


def test_a_tokenizer_without_normalization_is_read(tmp_path):
    path = train_pieces(tmp_path / "spiece.model", normalization_rule_name="identity", **T5_IDS)
    assert Tokenizer(path).decode(Tokenizer(path).encode(TEXT[0])) == TEXT[0]


def test_foreign_and_damaged_tokenizers_are_value_errors(spiece, tmp_path):
    with pytest.raises(ValueError, match=r"must be \(0, 1, 2\)"):
        Tokenizer(train_pieces(tmp_path / "foreign.model"))  # unknown is 0, the start 1, the end 2
    whole = spiece.read_bytes()
    for content in (b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n",
                    bytes(range(256)), whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model"):
            load_tokenizer(tmp_path)


def test_tokens_equal_transformers_live(tokenizer, spiece):
    T5Tokenizer = pytest.importorskip("transformers").T5Tokenizer
    bits = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "the", "film", ".", "!", "can't", "123",
            "\u00ef", "<", ">", "<extra_id_0>", "<extra_id_7>", "<extra_id_99>", "<extra_id_100>",
            "<extra_id_05>"]
    if importlib.metadata.version("transformers") < "5":
        theirs = T5Tokenizer(str(spiece), legacy=True)
        bits += ["\x1c", "\u200b", "\u2581"]  # version 5 does not take these out by itself
    else:  # it reads spiece.model only with protobuf, but takes a list of pieces
        pieces = tokenizer.pieces
        known = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
        theirs = T5Tokenizer(known + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))])
    draw = random.Random(0)
    for text in ["".join(draw.choices(bits, k=draw.randint(1, 12))) for _ in range(300)] + TEXT:
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, repr(text)
        ours = tokenizer.decode(ids).split()  # an unknown piece is a double question mark here
        assert "".join(ours) == "".join(theirs.decode(ids).split()) or 2 in ids, repr(text)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_t5_3b_loads_without_a_second_copy(tmp_path):
    """A file of T5-3B's 11.4 GB, zeros, sparse on disk: loading maps it and copies nothing."""
    sizes = dict(vocab_size=32128, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32)
    with torch.device("meta"):
        t5, header, end = T5(T5Config(**sizes)), {}, 0
    for name, p in t5.named_parameters():
        start, end = end, end + 4 * p.numel()
        header[rename(name, PUBLIC_NAMES)] = {"dtype": "F32", "shape": list(p.shape),
                                              "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    script = f"""if True:
        from model import load_t5
        t5 = load_t5({str(tmp_path)!r})
        status = open('/proc/self/status').read().split()
        print(sum(p.numel() for p in t5.parameters()), status[status.index('VmHWM:') + 1])"""
    parameters, peak_kib = subprocess.run([sys.executable, "-c", script], capture_output=True,
                                          cwd=ROOT, text=True, check=True).stdout.split()
    assert int(parameters) == 2_851_598_336
    assert int(peak_kib) * 1024 < 0.1 * end  # Python and torch themselves are most of it
