"""Decoder-only backbones on the command line: GLUE as plain text, --free, --dtype nf4, qlora."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import TASKS, Example
from llm import Llama, LlamaConfig, NF4Linear
from run import kernels
from run.backbones import load_tokenizer
from run.folder import trainable
from workshop import SENTENCES, contents, logged, refused, spy, without, write

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llm"
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16)


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of SmolLM2's kind."""
    folder = tmp_path_factory.mktemp("lm")
    shutil.copy(FIXTURES / "tokenizer.json", folder)
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = SIZES | dict(vocab_size=words, eos_token_id=0, tie_word_embeddings=True)
    torch.manual_seed(0)
    weights = Llama(LlamaConfig(**config)).state_dict()
    save_file({f"model.{name}": weight for name, weight in weights.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return folder


@pytest.fixture
def command(lm, glue, tmp_path):
    """argv of a few steps into tmp_path/run; `more` comes last."""
    def build(*more, task="sst2", data=glue):
        where = "--model", lm, "--data", data, "--out", tmp_path / "run", "--device", "cpu"
        usual = "--epochs 2 --max-train-rows 32 --batch-size 16 --dtype fp32 --r 4".split()
        if "qlora" in more:
            usual = without("--dtype", without("--r", usual))
        return [*map(str, where), "--task", task, *usual, *map(str, more)]
    return build


@pytest.mark.parametrize("task", TASKS)
def test_a_plain_prompt_holds_the_texts_and_each_class_is_a_word_that_is_read_back(task):
    of = TASKS[task]
    assert all(f"text {i}" in of._source(["text 1", "text 2"], "plain") for i in
               range(1, len(of.fields) + 1))
    assert len({of.target(label, "plain") for label in range(len(of.words))}) == len(of.words)
    for label in range(len(of.words) or 6):
        assert of.read(f" {of.target(label, 'plain')}", "plain")[0] == label
    assert of.read("positively", "plain")[0] is None


def test_the_answer_continues_the_prompt_and_a_cut_prompt_keeps_its_end(lm):
    tokenizer, task = load_tokenizer(lm), TASKS["sst2"]
    row, = task.encode([Example("Review: fine\nSentiment:", "positive", 1)], tokenizer)
    assert tokenizer.decode(row.source + row.target) == "Review: fine\nSentiment: positive"
    assert row.target[-1] == tokenizer.eos
    long, = task.encode([Example("word " * 999 + "Sentiment:", "positive", 1)], tokenizer)
    assert len(long.source) == tokenizer.longest - 1
    assert tokenizer.decode(long.source).endswith("Sentiment:")


@pytest.mark.parametrize("task", ["cola", "mnli", "stsb"])
def test_glue_is_trained_on_and_answered_beside_a_frozen_llama(command, lm, task):
    before = contents(lm)
    results = train.main(command("--max-steps", "2", task=task))
    assert contents(lm) == before and results["steps"] == 2
    assert results["total_params"] == sum(w.numel() for w in load_file(lm / "model.safetensors")
                                          .values())
    assert list(results["gates"]) == ["side"] and len(results["gates"]["side"]) == 2


def test_its_loss_falls_and_the_backbone_does_not_train(command, tmp_path):
    train.main(command("--epochs", "6", "--lr", "1e-2"))
    losses = logged(tmp_path / "run", "loss")
    assert losses[-1] < 0.8 * losses[0]
    ladder, _ = train.load(tmp_path / "run")
    assert not any(p.requires_grad for p in ladder.backbone.parameters())


def test_a_run_that_was_stopped_goes_on_to_the_same_end(command, tmp_path, monkeypatch):
    whole = train.main(command("--out", tmp_path / "whole", "--free", "1"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        spy(patch, kernels.AdamW, "step", lambda number, *_: (_ for _ in ()).throw(
            KeyboardInterrupt) if number == 3 else None)
        train.main(command("--free", "1"))
    again = train.main(command("--free", "1", "--resume"))
    assert again["test"] == whole["test"]
    assert logged(tmp_path / "run", "loss") == logged(tmp_path / "whole", "loss")


def test_kept_states_change_no_loss_and_are_read(command, tmp_path, monkeypatch):
    calls = spy(monkeypatch, Llama, "hidden_states")
    train.main(command("--cache", "0", "--keep", "1"))
    without_cache = len(calls), logged(tmp_path / "run", "loss")
    results = train.main(command("--cache", "1", "--keep", "1", "--overwrite"))
    assert logged(tmp_path / "run", "loss") == pytest.approx(without_cache[1], abs=1e-5)
    assert results["cache"]["rows"] > 0 and len(calls) - without_cache[0] < without_cache[0]


def test_the_papers_end_needs_no_last_state_so_none_is_kept(command):
    sizes = {end: train.main(command("--cache", "1", "--keep", "0", "--end", end, "--overwrite"))
             ["cache"]["bytes"] for end in ("up", "sum")}
    assert sizes["sum"] == 2 * sizes["up"]


def test_qlora_trains_beside_four_bits_and_answers_again(command, tmp_path):
    results = train.main(command("--method", "qlora", "--size", "4", "--max-steps", "2"))
    net, _ = train.load(tmp_path / "run")
    assert sum(isinstance(module, NF4Linear) for module in net.modules()) == 2 * 7
    assert {name.rpartition(".")[2] for name in trainable(net)} == {"A", "B"}
    assert results["config"]["dtype"] == "nf4"


@pytest.mark.parametrize("options", ["--side-dtype bf16 --dtype nf4", "--checkpoint", "--end up"])
def test_the_options_of_a_ladder_train(command, options):
    assert train.main(command("--max-steps", "2", *options.split()))["steps"] == 2


def test_ones_own_pairs(command, tmp_path):
    for name, rows in (("train", SENTENCES[::2]), ("dev", SENTENCES[1::2])):
        write(tmp_path / "own" / f"{name}.tsv", *(f"{text}\t{'fine' if label else 'no good'}"
                                                  for text, label in rows))
    results = train.main(command("--max-steps", "2", task="text", data=tmp_path / "own"))
    assert results["test"]["loss"] > 0 and len(results["answers"]) == 20


def test_predict_continues_a_text(command, tmp_path, capsys):
    train.main(command("--max-steps", "1"))
    answer = train.main(["--out", str(tmp_path / "run"), "--predict", "a fine film"])
    assert "text" in answer


@pytest.mark.parametrize("init", ["fisher", pytest.param("random", marks=pytest.mark.slow)])
def test_a_t5_in_four_bits_has_the_ladder_that_starts_from_its_full_weights(argv, tmp_path, init):
    more = ("--init", init, "--fisher-samples", "8") if init == "fisher" else ("--init", init)
    for dtype in ("fp32", "nf4"):
        train.main(argv("--max-steps", "1", "--lr", "1e-30", "--dtype", dtype, *more,
                        "--out", tmp_path / dtype))
    nets = [train.load(tmp_path / dtype)[0] for dtype in ("fp32", "nf4")]
    full, bits = map(trainable, nets)
    assert all(torch.allclose(full[name], bits[name], atol=1e-20) for name in full)
    t5 = nets[1].backbone
    assert sum(isinstance(module, NF4Linear) for module in t5.modules()) == 2 * 6 + 2 * 10
    assert t5.embed.weight.dtype == torch.bfloat16 == t5.encoder.final_norm.weight.dtype


def test_free_blocks_stand_on_top_of_a_t5s_ladder(argv, tmp_path):
    train.main(argv("--max-steps", "1", "--free", "2", "--keep", "1"))
    ladder, _ = train.load(tmp_path / "run")
    assert [block.rung is None for block in ladder.encoder.blocks] == [False, True, True]


@pytest.mark.parametrize("more, words", [
    ("--method lora", "lst or qlora"), ("--method full", "lst or qlora"),
    ("--side alone", "--side"), ("--init fisher", "--init"), ("--classify", "--classify"),
    ("--r 3", "hidden_size; choose from [1, 2, 4, 8]"), ("--keep 2", "layers are 0 to 1"),
    ("--checkpoint --side-dtype bf16", "float32"), ("--prune aligned", "--init fisher"),
    ("--method qlora --dtype bf16", "nf4 is for"), ("--method qlora --free 1", "--method lst"),
], ids=lambda text: text.replace(" ", "") if "--" in text else None)
def test_what_does_not_fit_is_refused_and_nothing_is_written(command, tmp_path, capsys, more,
                                                             words):
    refused(capsys, command(*more.split()), *words.split("; "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, words", [
    ("--method qlora", "decoder-only"), ("--method lora --dtype nf4", "nf4 is for"),
    ("--end up", "decoder-only"), ("--side-dtype bf16", "decoder-only"),
    ("--side last --free 1", "--side ladder"),
])
def test_what_is_not_a_t5s_is_refused(argv, capsys, more, words):
    refused(capsys, argv(*more.split()), words)


def test_a_foreign_model_and_a_damaged_tokenizer_are_one_line(command, lm, tmp_path, capsys):
    other = shutil.copytree(lm, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused(capsys, command("--model", other), "gpt2", "llama mistral qwen2")
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").write_text("{}")
    refused(capsys, command("--model", other), "tokenizer")
    (other / "model.safetensors").write_bytes((lm / "model.safetensors").read_bytes()[:999])
    shutil.copy(lm / "tokenizer.json", other)
    refused(capsys, command("--model", other), "model.safetensors")
