"""model.py against the `transformers` library: by fixtures that it made (make_fixtures.py), and live where it is installed."""

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
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

import model
from make_fixtures import BUCKETS, CONFIGS, FIXTURES, MAX_NEW_TOKENS, expected, random_inputs, random_reference, until_end
from model import PUBLIC, T5, Dropout, DroppedSoftmax, NotThere, T5Config, Tokenizer, generate, load_t5, load_tokenizer, public_name, save_t5

ROOT = Path(model.__file__).parent
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
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


# ---------------------------------------------------------------------------------------- the same numbers as transformers

def test_dropped_softmax_has_the_gradient_of_dropout_after_softmax():
    scores, weight = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    gradients = []
    for run in (lambda: DroppedSoftmax.apply(scores, dropout, torch.float64), lambda: dropout(torch.softmax(scores, dim=-1))):
        dropout = Dropout(0.4)
        torch.manual_seed(3)  # the same elements are dropped
        output = run()
        gradients.append((output, *torch.autograd.grad((output * weight).sum(), scores)))
    assert (gradients[0][0] == 0).any() and torch.equal(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_of_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(300_001)
    y = Dropout(p)(x)
    assert abs((y == 0).double().mean() - p) < 0.005 and abs(y.mean() - 1) < 0.01 and set(y.unique().tolist()) <= {0.0, y.max().item()}
    assert torch.equal(Dropout(p).eval()(x), x)


@each_attention
@each_fixture
@torch.no_grad()
def test_logits_equal_transformers(name, attention):
    t5, saved = fixture(name, attention=attention)
    assert_close(t5(*inputs_of(saved)), saved["logits"])


@each_fixture
@torch.no_grad()
def test_every_layer_is_handed_out_and_equals_transformers(name):
    t5, saved = fixture(name)
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    encoder = list(t5.encoder_layers(source_ids, source_mask))
    assert len(encoder) == t5.config.num_layers + 1
    memory = t5.encoder.finish(encoder[-1])
    assert_close(torch.stack([*encoder[:-1], memory]), saved["encoder"])  # transformers norms the last one
    decoder = list(t5.decoder_layers(decoder_ids, decoder_mask, memory, source_mask))
    assert len(decoder) == t5.config.num_decoder_layers + 1
    assert_close(torch.stack([*decoder[:-1], t5.decoder.finish(decoder[-1])]), saved["decoder"])


@each_attention
@pytest.mark.parametrize("beams, key", [(1, "greedy"), (4, "beam_4")])
@each_fixture
def test_texts_equal_transformers(name, beams, key, attention):
    t5, saved = fixture(name, attention=attention)
    ids = t5.generate(saved["source_ids"], saved["source_mask"], MAX_NEW_TOKENS, beams)
    assert until_end(ids, MAX_NEW_TOKENS).tolist() == saved[key].tolist()
    assert torch.equal(ids, until_end(ids, ids.size(1))), "nothing but padding after the end"


@each_fixture
def test_a_hundred_beam_searches_equal_transformers(name):
    t5, saved = fixture(name)
    source_ids = saved["many_source_ids"].long()
    ids = t5.generate(source_ids, source_ids != 0, MAX_NEW_TOKENS, 4)
    assert until_end(ids, MAX_NEW_TOKENS).tolist() == saved["many_beam_4"].tolist()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("num, far", BUCKETS)
def test_buckets_of_near_and_far_distances_equal_transformers(num, far, kind):
    saved = load_file(FIXTURES / "buckets.safetensors")
    t5 = T5(T5Config(vocab_size=4, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1,
                     relative_attention_num_buckets=num, relative_attention_max_distance=far))
    ours = getattr(t5, kind).pos_bias.buckets(saved["distance"])
    assert ours.tolist() == saved[f"{kind} {num} {far}"].tolist()


def random_config(seed):
    draw = random.Random(seed)
    return dict(vocab_size=draw.randint(30, 60), d_model=4 * draw.randint(2, 8), d_kv=2 * draw.randint(1, 8), d_ff=draw.randint(8, 60),
                num_heads=draw.randint(1, 5), num_layers=draw.randint(1, 3), num_decoder_layers=draw.randint(1, 4),
                feed_forward_proj=("relu", "gated-gelu")[seed // 2 % 2], tie_word_embeddings=seed % 2 == 0,
                relative_attention_num_buckets=4 * draw.randint(2, 8), relative_attention_max_distance=draw.randint(20, 60))


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_equal_transformers_live(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = random_config(seed)
    if int(transformers.__version__.split(".")[0]) >= 5 and not config["tie_word_embeddings"]:
        pytest.skip("transformers 5 ties every T5's head when it builds one")
    reference, inputs = random_reference(config, seed), random_inputs(config, seed, S=70, T=20)
    saved = expected(reference, inputs)
    reference.save_pretrained(tmp_path)
    for attention in ("eager", "fused"):
        t5 = load_t5(tmp_path, attention=attention)
        with torch.no_grad():
            assert_close(t5(*inputs.values()), saved["logits"])
        for beams, key in ((1, "greedy"), (4, "beam_4")):
            ids = t5.generate(inputs["source_ids"], inputs["source_mask"], MAX_NEW_TOKENS, beams)
            assert until_end(ids, MAX_NEW_TOKENS).tolist() == saved[key].tolist()


# ------------------------------------------------------------------------------------------------------ attention and masks

@each_fixture
@torch.no_grad()
def test_eager_and_fused_attention_agree_on_long_inputs(name):
    inputs = random_inputs(CONFIGS[name], seed=5, B=2, S=200, T=40)
    assert_close(fixture(name, attention="eager")[0](*inputs.values()), fixture(name, attention="fused")[0](*inputs.values()))


@each_attention
@each_fixture
@torch.no_grad()
def test_what_a_mask_hides_does_not_matter(name, attention):
    t5, saved = fixture(name, attention=attention)
    source_ids, source_mask, decoder_ids, decoder_mask = inputs_of(saved)
    changed = t5(source_ids.masked_fill(~source_mask, 7), source_mask, decoder_ids.masked_fill(~decoder_mask, 7), decoder_mask)
    assert_close(changed[decoder_mask], saved["logits"][decoder_mask])
    alone = t5(source_ids[1:2, source_mask[1]], source_mask[1:2, source_mask[1]], decoder_ids[1:2, decoder_mask[1]])
    assert_close(alone[0], saved["logits"][1, decoder_mask[1]])


@each_attention
@torch.no_grad()
def test_a_fully_padded_row_gives_numbers_and_leaves_the_others_alone(attention):
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


# -------------------------------------------------------------------------------------------------------------- generation

class Recomputing:
    """What `generate` searches with, without any cache: each step runs encoder and decoder on all tokens so far."""

    def __init__(self, t5):
        self.t5, self.moves = t5, 0

    def start(self, source_ids, source_mask, num_beams, images):
        self.source_ids, self.source_mask = (x.repeat_interleave(num_beams, dim=0) for x in (source_ids, source_mask))
        self.ids = self.source_ids[:, :0]
        return self

    def step(self, ids, state):
        self.ids = torch.cat([self.ids, ids], dim=1)
        return self.t5(self.source_ids, self.source_mask, self.ids)[:, -1]

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
    t5 = fixture(name)[0]
    inputs = random_inputs(CONFIGS[name], seed=11, B=6)
    uncached = Recomputing(t5)
    plain = generate(uncached, inputs["source_ids"], inputs["source_mask"], 12, beams)
    assert t5.generate(inputs["source_ids"], inputs["source_mask"], 12, beams).tolist() == plain.tolist()
    assert (uncached.moves > 0) == (beams > 1), "beams that never change places would prove nothing"


@pytest.mark.parametrize("beams", [1, 4])
def test_a_text_does_not_depend_on_its_batch(beams):
    t5, saved = fixture("wide-heads")
    together = t5.generate(saved["source_ids"], saved["source_mask"], MAX_NEW_TOKENS, beams)
    for row, source_mask in enumerate(saved["source_mask"].split(1)):
        S = int(source_mask.nonzero().max()) + 1  # without the padding at the end
        alone = t5.generate(saved["source_ids"][row : row + 1, :S], source_mask[:, :S], MAX_NEW_TOKENS, beams)
        assert until_end(alone, MAX_NEW_TOKENS).tolist() == until_end(together[row : row + 1], MAX_NEW_TOKENS).tolist()


@torch.no_grad()
def test_enough_beams_find_the_best_text_of_all():
    V, length = 4, 3
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        t5 = T5(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=False)).eval()
        torch.nn.init.normal_(t5.head.weight)
        source_ids, source_mask = torch.tensor([[2, 3, 3]]), torch.ones(1, 3, dtype=torch.bool)
        scores = {}
        for text in itertools.product(range(V), repeat=length):
            text = text[: text.index(1) + 1] if 1 in text else text
            logits = t5(source_ids, source_mask, torch.tensor([(0, *text[:-1])]))[0]
            scores[text] = logits.log_softmax(-1)[range(len(text)), text].sum().item() / len(text)
        best = max(scores, key=scores.get)
        ids = t5.generate(source_ids, source_mask, length, V**length)
        assert until_end(ids, length)[0].tolist() == [*best, *[0] * (length - len(best))]
        found.append(len(best))
    assert len(set(found)) > 1, "best texts of one length only would not test the length penalty"


def test_generation_stops_where_every_text_has_ended():
    t5, saved = fixture("gated-untied")
    ids = t5.generate(saved["source_ids"][:2], saved["source_mask"][:2], 50)
    assert ids.shape == (2, 4) and ids.eq(1).any(1).all()
    assert t5.generate(saved["source_ids"], saved["source_mask"], 1, 4).shape == (3, 1)
    for wrong in (dict(max_new_tokens=0), dict(num_beams=0)):
        with pytest.raises(ValueError, match="at least 1"):
            t5.generate(saved["source_ids"], saved["source_mask"], **wrong)


# ------------------------------------------------------------------------------------------------------- the published files

V1, V11 = dict(feed_forward_proj="relu", tie_word_embeddings=True), dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
PUBLISHED = {  # d_model, layers, heads, d_kv, d_ff; tensors without the stray one, parameters
    "t5-small": (512, 6, 8, 64, 2048, V1, 131, 60_506_624),
    "t5-base": (768, 12, 12, 64, 3072, V1, 257, 222_903_552),
    "t5-large": (1024, 24, 16, 64, 4096, V1, 509, 737_668_096),
    "t5-3b": (1024, 24, 32, 128, 16384, V1, 509, 2_851_598_336),
    "flan-t5-small": (512, 8, 6, 64, 1024, V11, 190, 76_961_152),
}


def published_keys(layers, gated, tied):
    keys = {"shared.weight"} if tied else {"shared.weight", "lm_head.weight"}
    for stack, parts in (("encoder", ["SelfAttention", "DenseReluDense"]), ("decoder", ["SelfAttention", "EncDecAttention", "DenseReluDense"])):
        keys |= {f"{stack}.final_layer_norm.weight", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}
        for i, (j, part) in itertools.product(range(layers), enumerate(parts)):
            matrices = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
            keys |= {f"{stack}.block.{i}.layer.{j}.{part}.{matrix}.weight" for matrix in (matrices if part == "DenseReluDense" else "qkvo")}
            keys.add(f"{stack}.block.{i}.layer.{j}.layer_norm.weight")
    return keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_counts_are_those_of_the_published_files(name):
    d_model, layers, heads, d_kv, d_ff, version, tensors, count = PUBLISHED[name]
    with torch.device("meta"):
        t5 = T5(T5Config(d_model=d_model, num_layers=layers, num_heads=heads, d_kv=d_kv, d_ff=d_ff, **version))
    keys = [public_name(key) for key, _ in t5.named_parameters()]
    assert set(keys) == published_keys(layers, gated=version is V11, tied=version is V1)
    assert len(keys) == len(set(keys)) == tensors
    assert sum(p.numel() for p in t5.parameters()) == count
    assert name in PUBLIC


def test_the_public_config_of_t5_small_is_read(tmp_path):
    raw = {"architectures": ["T5WithLMHeadModel"], "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
           "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
           "n_positions": 512, "num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
           "task_specific_params": {"summarization": {"num_beams": 4}}, "vocab_size": 32128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert T5Config.from_json(tmp_path / "config.json") == T5Config()


# ------------------------------------------------------------------------------------------------------------------ loading

SIZES = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=3)


def folder_with(tmp_path, weights=None, **changes):
    """A folder with a tiny random T5 in it; `weights` changes its dict of tensors."""
    torch.manual_seed(0)
    save_t5(T5(T5Config(**SIZES | changes)), tmp_path)
    if weights:
        state = load_file(tmp_path / "model.safetensors")
        save_file(weights(state) or state, tmp_path / "new.safetensors")
        os.replace(tmp_path / "new.safetensors", tmp_path / "model.safetensors")
    return tmp_path


def test_save_and_load_round_trip(tmp_path):
    t5 = T5(T5Config(**SIZES, num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False, attention="eager"))
    save_t5(t5, tmp_path)
    again = load_t5(tmp_path, attention="eager")
    assert again.config == t5.config and not again.training
    assert all(torch.equal(p, q) for p, q in zip(t5.parameters(), again.parameters(), strict=True))
    save_t5(again, tmp_path)  # over the file that its tensors are mapped from
    assert all(torch.equal(p, q) for p, q in zip(t5.parameters(), load_t5(tmp_path).parameters(), strict=True))


@pytest.mark.parametrize("version", [V1, V11])
def test_transformers_reads_what_we_save(tmp_path, version):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5 and version is V11:
        pytest.skip("transformers 5 ties every T5's head when it builds one")
    t5 = load_t5(folder_with(tmp_path, num_decoder_layers=2, **version))
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = random_inputs(SIZES, seed=0)
    with torch.no_grad():
        assert_close(t5(*inputs.values()), expected(reference, inputs)["logits"])


def test_the_stray_key_of_v1_files_is_dropped():
    assert STRAY in load_file(FIXTURES / "relu-tied" / "model.safetensors")
    assert load_t5(FIXTURES / "relu-tied").config.tie_word_embeddings  # its config.json does not say so


@pytest.mark.parametrize("aliases", [["encoder.embed_tokens.weight"], ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"],
                                     ["decoder.embed_tokens.weight", "lm_head.weight"]])
@pytest.mark.parametrize("only_copy", [False, True])
def test_the_embedding_may_come_under_its_aliases(tmp_path, aliases, only_copy):
    def rename(state):
        state |= {alias: state["shared.weight"].clone() for alias in aliases}
        if only_copy:
            del state["shared.weight"]
    folder = folder_with(tmp_path, rename)
    embedding = load_file(folder / "model.safetensors")[aliases[0]]
    assert torch.equal(load_t5(folder).embed.weight, embedding)


@pytest.mark.parametrize("alias", ["encoder.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x[:-1].clone(), lambda x: x.long()])
def test_an_alias_that_differs_is_refused(tmp_path, alias, change):
    folder = folder_with(tmp_path, lambda state: {**state, alias: change(state["shared.weight"])})
    with pytest.raises(ValueError, match=f"{alias} differs from shared.weight"):
        load_t5(folder)


def test_a_tied_config_refuses_a_head_of_its_own_and_an_untied_one_wants_it(tmp_path):
    folder = folder_with(tmp_path, tie_word_embeddings=False)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load_t5(folder)
    folder_with(tmp_path)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
        load_t5(folder)


def test_missing_unexpected_and_misshapen_keys_are_named_up_to_three(tmp_path):
    final = "encoder.final_layer_norm.weight"
    folder = folder_with(tmp_path / "missing", lambda state: {key: p for key, p in state.items() if ".SelfAttention." not in key})
    with pytest.raises(ValueError, match=r"missing \[('decoder\.block\.0\.layer\.0\.SelfAttention\.[^,]*'(, )?){3}\], unexpected \[\], misshapen \[\]"):
        load_t5(folder)
    folder = folder_with(tmp_path / "unexpected", lambda state: state.update({f"extra.{i}": torch.zeros(1) for i in range(5)}))
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['extra.0', 'extra.1', 'extra.2'\], misshapen \[\]"):
        load_t5(folder)
    folder = folder_with(tmp_path / "misshapen", lambda state: state.update({final: torch.ones(9)}))
    with pytest.raises(ValueError, match=r"misshapen \['encoder.final_layer_norm.weight \[9\] not \[8\]'\]"):
        load_t5(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_weights_are_refused(tmp_path, dtype):
    folder = folder_with(tmp_path, lambda state: state.update({"shared.weight": torch.ones(40, 8, dtype=dtype)}))
    with pytest.raises(ValueError, match="shared.weight holds"):
        load_t5(folder)


def test_float16_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="overflow"):
        load_t5(folder_with(tmp_path), dtype=torch.float16)


@torch.no_grad()
def test_bfloat16_is_loaded_and_close():
    t5, saved = fixture("gated-untied", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in t5.parameters())
    logits = t5(*inputs_of(saved))
    assert logits.dtype == torch.bfloat16
    assert 1e-4 < (logits.float() - saved["logits"]).abs().mean() < 0.05


def test_float32_weights_stay_mapped_and_the_file_stays_as_it_is():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    file = FIXTURES / "wide-heads" / "model.safetensors"
    t5, before = load_t5(file.parent), file.read_bytes()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps.read_text().splitlines() if line.endswith(str(file))]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in t5.parameters()), "a weight was copied"
    for p in t5.parameters():
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return state, folder / names[1]


def test_a_sharded_checkpoint_is_read(tmp_path):
    state, second = shard(folder_with(tmp_path))
    t5 = load_t5(tmp_path)
    assert all(torch.equal(p, state[public_name(key)]) for key, p in t5.named_parameters())
    second.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is not there"):
        load_t5(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", "\xff", '{"weight_map": []}', '{"weight_map": {"a": []}}', '{"weight_map": {"a": 5}}',
                                   '{"weight_map": {"a": null}}', '{"weight_map": {}}'])
def test_a_damaged_index_is_a_value_error(tmp_path, index):
    shard(folder_with(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    with pytest.raises(ValueError):
        load_t5(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", ""])
def test_an_index_may_not_name_files_elsewhere(tmp_path, name):
    folder_with(tmp_path)
    os.replace(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"shared.weight": name}}))
    with pytest.raises(ValueError, match="index.json"):
        load_t5(tmp_path)


@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:bd94\nsize 242043056\n", "git lfs pull"),
    (b"<!DOCTYPE html><html><head><title>Log in</title></head></html>", "HTML"),
    (b"\n<html>" + b" " * 500, "HTML"),
    (b"", "damaged"),
    (b"\x80\x02}q\x00X\x0d\x00\x00\x00shared.weight", "damaged"),  # a pickle, as pytorch_model.bin is
    (bytes(1000), "damaged"),
])
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path, content, says):
    (folder_with(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_t5(tmp_path)


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 200, -4000, -1])
def test_a_cut_file_is_a_value_error(tmp_path, keep):
    file = folder_with(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged.*download it again"):
        load_t5(tmp_path)


def test_missing_files_and_unknown_names_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor one of: nano, t5-small"):
        load_t5("t5-smal")
    with pytest.raises(ValueError, match="config.json is not there"):
        load_t5(tmp_path)
    with pytest.raises(ValueError, match="spiece.model is missing"):
        load_tokenizer(tmp_path)
    (folder_with(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is not there"):
        load_t5(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"<html>", b"{}", b"1" * 5000, b"[" * 100_000, b'{"model_type": "bert"}',
                                     b'{"d_model": 8}'])
def test_a_config_that_is_none_is_a_value_error(tmp_path, content):
    (folder_with(tmp_path) / "config.json").write_bytes(content)
    with pytest.raises(ValueError):
        load_t5(tmp_path)


@pytest.mark.parametrize("wrong", [
    dict(d_model=0), dict(d_model=-8), dict(d_model="8"), dict(d_model=8.0), dict(d_model=None), dict(d_model=True), dict(d_model=10**30),
    dict(num_layers=10**6), dict(num_decoder_layers=0), dict(num_heads=[3]), dict(dropout_rate=1.5), dict(dropout_rate="0.1"),
    dict(dropout_rate=float("nan")), dict(layer_norm_epsilon=-1), dict(layer_norm_epsilon=float("inf")), dict(feed_forward_proj="gated-silu"),
    dict(feed_forward_proj=["relu"]), dict(tie_word_embeddings="yes"), dict(relative_attention_num_buckets=6), dict(relative_attention_num_buckets=0),
    dict(relative_attention_max_distance=8), dict(d_model=2**24, num_heads=2**24, d_kv=2**24), dict(d_model=16), dict(num_layers=2), dict(vocab_size=39),
], ids=str)
def test_a_config_with_wrong_values_is_a_value_error(tmp_path, wrong):
    path = folder_with(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match="|".join(wrong) + "|does not fit"):
        load_t5(tmp_path)


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"])
def test_a_config_without_a_size_is_a_value_error(tmp_path, name):
    path = folder_with(tmp_path) / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    with pytest.raises(ValueError, match=name):
        load_t5(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ by name

@pytest.mark.parametrize("name", ["t5-small", "flan-t5-small"])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_existing_hugging_face_cache_is_used(tmp_path, monkeypatch, tokenizer_file, name, sharded):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        load_t5(name)
    repo, revision, _ = PUBLIC[name]
    cache = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    commit = revision
    if revision == "main":
        commit = "0123456789abcdef0123456789abcdef01234567"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
    snapshot, blobs = cache / "snapshots" / commit, cache / "blobs"
    folder_with(blobs)
    (blobs / "spiece.model").write_bytes(tokenizer_file.read_bytes())
    if sharded:
        shard(blobs)

        def not_there(repo, filename, revision, sha256=None, ask=model.hub_file):
            if filename == "model.safetensors":
                raise NotThere("404")  # as the server says where a model has shards only
            return ask(repo, filename, revision, sha256)
        monkeypatch.setattr(model, "hub_file", not_there)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)  # the cache's own way
    t5 = load_t5(name)
    assert torch.equal(t5.embed.weight, load_t5(blobs).embed.weight)
    assert load_tokenizer(name).encode("a film") == load_tokenizer(blobs).encode("a film")


def test_a_network_that_fails_at_the_index_is_a_value_error(tmp_path, monkeypatch):
    def hub_file(repo, filename, revision, sha256=None):
        if filename == "config.json":
            return folder_with(tmp_path) / "config.json"
        raise NotThere("404") if filename == "model.safetensors" else ValueError("the network is down")
    monkeypatch.setattr(model, "hub_file", hub_file)
    with pytest.raises(ValueError, match="network is down"):
        load_t5("t5-small")


# ---------------------------------------------------------------------------------------------------------------- tokenizer

TEXT = ["the film was a joy , and the cast was better than the film .", "a dull , slow story that never finds its end .",
        "I can't say that 123 people didn't like it !", "sst2 sentence: nothing is as it seems", "premise: it rains hypothesis: it is wet"]


def train_pieces(path, **ids):
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 3), model_writer=model, vocab_size=90, hard_vocab_limit=False,
                               num_threads=1, minloglevel=2, **ids)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return train_pieces(tmp_path_factory.mktemp("pieces") / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file.parent)


def test_text_survives_encoding_and_decoding(tokenizer):
    for text in TEXT:
        ids = tokenizer.encode(text)
        assert ids and min(ids) > 2 and max(ids) < tokenizer.vocab_size - 100
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([0, *ids, 1, 0, 5, 6]) == text, "padding is nothing, and nothing comes after the end"
    assert tokenizer.encode("") == tokenizer.encode("  \n\t ") == [] and tokenizer.decode([]) == ""
    assert tokenizer.encode(" the\tfilm \n was\u00a0a   joy ") == tokenizer.encode("the film was a joy")


def test_sentinels_are_the_last_ids_counted_from_the_end(tokenizer):
    last = tokenizer.vocab_size - 1
    assert tokenizer.encode("<extra_id_0>") == [last]
    assert tokenizer.encode("<extra_id_99>") == [last - 99] == [tokenizer.pieces.vocab_size()]
    assert tokenizer.encode("the <extra_id_0> was\n<extra_id_1>") == [*tokenizer.encode("the"), last, *tokenizer.encode("was"), last - 1]
    assert tokenizer.decode([*tokenizer.encode("the"), last, *tokenizer.encode("was")]) == "the <extra_id_0> was"


@pytest.mark.parametrize("text", ["<extra_id_100>", "<extra_id_05>", "<extra_id_00>", "<extra_id_\u0663>", "<extra_id_>", "<extra_id_-1>", "</s>", "<pad>"])
def test_text_that_looks_like_a_special_token_is_text(tokenizer, text):
    pieces = tokenizer.pieces.vocab_size()
    assert all(1 < i < pieces for i in tokenizer.encode(f"the {text} film"))


def test_ids_beyond_the_vocabulary_read_as_unknown(tokenizer):
    the, unknown = tokenizer.encode("the"), tokenizer.decode([2])
    for wrong in (tokenizer.vocab_size, 32127, 10**9, -100):
        assert tokenizer.decode([wrong]) == unknown
        assert tokenizer.decode([*the, wrong, *the]) == tokenizer.decode([*the, 2, *the])


def test_foreign_and_damaged_tokenizers_are_value_errors(tokenizer_file, tmp_path):
    with pytest.raises(ValueError, match=r"must be \(0, 1, 2\)"):
        Tokenizer(train_pieces(tmp_path / "foreign.model"))  # SentencePiece's own defaults: unk 0, bos 1, eos 2
    whole = tokenizer_file.read_bytes()
    for content in (b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)), whole[:1000], whole[: len(whole) // 2]):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model"):
            load_tokenizer(tmp_path)


def test_tokens_equal_transformers_live(tokenizer, tokenizer_file):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 has no slow T5 tokenizer")
    pytest.importorskip("sentencepiece")
    theirs = transformers.T5Tokenizer(str(tokenizer_file), legacy=True)
    draw = random.Random(0)
    bits = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\x1c", "\u200b", "the", "film", ".", "!", "can't", "123", "\u00ef", "<", ">", "\u2581",
            "<extra_id_0>", "<extra_id_7>", "<extra_id_99>", "<extra_id_100>", "<extra_id_05>"]
    texts = ["".join(draw.choices(bits, k=draw.randint(1, 12))) for _ in range(300)] + TEXT
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, repr(text)
        # SentencePiece writes an unknown piece as a double question mark, transformers as <unk>.
        assert tokenizer.decode(ids).replace(" \u2047 ", "<unk>").split() == theirs.decode(ids).split() or 2 in ids, repr(text)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak size from /proc")
def test_t5_3b_loads_without_a_second_copy(tmp_path):
    """A file of T5-3B's 11.4 GB, all zeros and sparse on disk: loading maps it and copies nothing."""
    sizes = dict(vocab_size=32128, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32)
    with torch.device("meta"):
        shapes = {public_name(name): list(p.shape) for name, p in T5(T5Config(**sizes)).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from model import load_t5; t5 = load_t5({str(tmp_path)!r});"
              "print(sum(p.numel() for p in t5.parameters()), [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    parameters, peak_kib = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert int(parameters) == 2_851_598_336
    assert int(peak_kib) * 1024 < 0.1 * end  # Python and torch themselves are most of it
