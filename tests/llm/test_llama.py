"""The decoder-only backbone: equal to `transformers`, strict about files, blind to padding."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm import Llama, LlamaConfig, NF4Linear, load_llm
from run.backbones import load_tokenizer
from tests.fixtures.make_llama import MODELS, expected, random_model
from tests.workshop import one_line

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llm"
TINY = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8)


def text(B=2, S=9, seed=0):
    ids = torch.randint(3, 50, (B, S), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones(B, S, dtype=torch.bool)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Llama(LlamaConfig(**TINY)).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path):
    """A copy of the model "gqa", and change(key=value) of its config."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "gqa" / name, tmp_path)

    def change(**more):
        config = json.loads((tmp_path / "config.json").read_text()) | more
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path
    return change


def assert_equal(llama, reference):
    ids, mask = reference["ids"], reference["mask"]
    keep = range(len(llama.layers))
    hidden = torch.stack(llama.hidden_states(ids, mask, keep=keep)[:-1])
    torch.testing.assert_close(hidden[:, mask], reference["hidden"][:, mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(llama(ids, mask)[mask], reference["logits"][mask], rtol=0, atol=1e-5)
    greedy = llama.generate(ids, mask, max_new_tokens=8)
    assert torch.equal(greedy, reference["greedy"][:, : greedy.size(1)])


@pytest.mark.parametrize("name", MODELS)
def test_stored_models_equal_transformers(name):
    assert_equal(load_llm(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_models_equal_transformers(name, seed, tmp_path):
    pytest.importorskip("transformers")
    model = random_model(*MODELS[name], seed)
    model.save_pretrained(tmp_path, max_shard_size="8KB")  # in shards, with the new config keys
    assert_equal(load_llm(tmp_path), expected(model))


def test_an_answer_is_the_end_of_a_text(tiny):
    """Its start token falls away, and only its positions reach the head."""
    ids, mask = text(S=9)
    answer = torch.cat([torch.zeros(2, 1, dtype=torch.long), ids[:, 6:-1]], dim=1)
    torch.testing.assert_close(tiny(ids[:, :6], mask[:, :6], answer), tiny(ids, mask)[:, 5:8])


def test_states_that_nobody_reads_are_not_kept(tiny):
    hidden = tiny.hidden_states(*text(), keep=[1])
    assert [h is None for h in hidden] == [False, True, False, False]


def test_a_text_past_the_window_is_refused(folder):
    assert LlamaConfig.from_json(folder(max_position_embeddings=9, sliding_window=20)
                                 / "config.json").max_position_embeddings == 9
    llama = load_llm(folder(max_position_embeddings=64, sliding_window=8))
    llama(*text(S=8))
    with pytest.raises(ValueError, match="9 tokens: this model reads 8"):
        llama(*text(S=9))
    load_llm(folder(use_sliding_window=False))(*text(S=9))  # as Qwen2 writes it


@pytest.mark.parametrize("more, words", [
    (dict(model_type="gemma"), "gemma is not written here, only llama mistral qwen2"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8}), "rope_scaling"),
    (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type yarn"),
    (dict(attention_bias=True), "attention_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(hidden_size=None), "hidden_size"), (dict(num_attention_heads=0), "a wrong one"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (dict(hidden_size=20), "do not fit"),
    (dict(num_hidden_layers=4), "layers.3"), (dict(num_hidden_layers=2), "layers.2"),
])
def test_what_is_not_written_here_is_refused_in_one_line(folder, more, words):
    with pytest.raises(ValueError, match=words) as error:
        load_llm(folder(**more))
    one_line(error)


def test_unknown_names_and_foreign_tokenizers_are_refused_in_one_line(folder):
    with pytest.raises(ValueError, match="neither a folder nor smollm2-135m") as error:
        load_llm("gpt-5")
    one_line(error)
    shutil.copy(FIXTURES / "tokenizer.json", folder(vocab_size=1000))
    with pytest.raises(ValueError, match="do not belong together") as error:
        load_tokenizer(folder())
    one_line(error)


def test_old_angles_and_copies_of_a_tied_head_are_dropped_by_name(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not its map
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(weights | more, path)
    assert torch.equal(load_llm(folder())(*text()), load_llm(FIXTURES / "gqa")(*text()))
    tied = load_llm(folder(tie_word_embeddings=True))
    torch.testing.assert_close(tied(*text()), tied.norm(tied.hidden_states(*text())[-1])
                               @ weights["model.embed_tokens.weight"].T)


def test_layers_are_quantised_while_loading_and_embedding_and_head_are_not():
    llama = load_llm(FIXTURES / "gqa", dtype=torch.bfloat16, nf4=True)
    kinds = {name.rpartition(".")[2]: type(module) for name, module in llama.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is NF4Linear is not kinds["lm_head"]
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    assert llama(*text()).dtype == torch.bfloat16
