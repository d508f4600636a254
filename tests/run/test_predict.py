"""What a run that has ended is good for: it answers, and another starts from it."""
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from model import T5, T5Config, save_t5
from workshop import SENTENCES, learn_tokenizer, refused, set_config


def ask(out, text="a film"):
    return ["--out", str(out), "--predict", text]


# ---------------------------------------------------------------------------------------- answers

def test_predict_needs_only_the_folder(learned, capsys):
    for text, answer in (("the great plot", "positive"), ("the dull plot", "negative")):
        capsys.readouterr()
        found = train.main(ask(learned[0], text))
        assert found["label"] == ("negative", "positive").index(answer)
        assert capsys.readouterr().out == f"{answer}\n"


def test_a_pair_is_predicted_from_two_parts(argv, tmp_path, capsys):
    train.main(argv("--task", "rte", "--max-steps", 1))
    capsys.readouterr()
    train.main(ask(tmp_path / "run", "a good film | a bad film"))
    assert capsys.readouterr().out.count("\n") == 1
    for text in ("a good film", "a | b | c"):
        refused(capsys, ask(tmp_path / "run", text), "two texts", "A | B")


@pytest.mark.parametrize("text", [
    "", " ", "\x00\x07\x1b[31m\x7f", "\n\n\t", "<extra_id_0> <extra_id_99>", "</s><pad>",
    "電影 🎬", "word " * 5000])
def test_any_text_gets_one_line(learned, capsys, text):
    capsys.readouterr()
    train.main(ask(learned[0], text))
    assert capsys.readouterr().out.count("\n") == 1


def test_what_the_run_has_not_learned_is_refused(learned, capsys):
    refused(capsys, ask(learned[0], "caf\udce9"), "utf-8")
    refused(capsys, [*ask(learned[0]), "--task", "rte"], "sst2", "--task")
    refused(capsys, [*ask(learned[0]), "--image", "a.png"], "sst2", "takes no pictures")
    refused(capsys, [*ask(learned[0]), "--clip", "nano"], "sst2", "leave --clip out")


def test_the_loss_of_a_run_is_drawn(learned, tmp_path, capsys):
    picture = tmp_path / "loss.svg"
    steps = train.main(["--out", str(learned[0]), "--plot", str(picture)])["steps"]
    assert steps == learned[1]["steps"]
    each, means = re.findall('<path class="c[01]" d="M(.*?)"', picture.read_text())
    assert each.count("L") + 1 == steps > means.count("L") > 40
    heights = [float(point.split()[1]) for point in means.split("L")]
    assert heights[0] < heights[-1] - 50  # downwards on the page y grows: the loss fell
    weights = learned[0] / "trained.safetensors"
    refused(capsys, ["--out", str(learned[0]), "--plot", str(weights)], "ends in .svg")
    refused(capsys, ["--out", str(tmp_path), "--plot", str(picture)], "metrics.jsonl")
    for damaged in ("", "5", '{"loss": 1}', '{"loss": "x", "step": 3}', '{"lo'):
        (tmp_path / "metrics.jsonl").write_text(damaged)
        refused(capsys, ["--out", str(tmp_path), "--plot", str(picture)], "jsonl is damaged")
    more = ["--task", "sst2", "--out", str(learned[0]), "--plot", "x.svg"]
    refused(capsys, more, "--task means nothing here")


# ------------------------------------------------------------------------------ the same backbone

@pytest.fixture
def moved(argv, backbone, tmp_path):
    """A copy of the backbone, and a run beside it."""
    copy = shutil.copytree(backbone, tmp_path / "copy")
    train.main(argv("--model", copy, "--max-steps", 1))
    return copy, tmp_path / "run"


def test_a_backbone_that_has_moved_is_named_by_model(moved, tmp_path, capsys):
    copy, out = moved
    new = copy.rename(tmp_path / "new")
    refused(capsys, ask(out), str(copy))
    assert train.main([*ask(out), "--model", str(new)])["text"]
    train.load(out, model=str(new))
    (new / "model.safetensors").unlink()
    refused(capsys, [*ask(out), "--model", str(new)], str(new), "model.safetensors")


def other_weights(copy):
    torch.manual_seed(1)
    save_t5(T5(T5Config.from_json(copy / "config.json")), copy)


def other_config(copy):  # fits the weights and means another model
    set_config(copy, layer_norm_epsilon=0.9)


def other_tokenizer(copy):
    learn_tokenizer(copy, [text for text, _ in SENTENCES] * 3, vocab_size=50)


@pytest.mark.parametrize("change", [other_weights, other_config, other_tokenizer])
def test_a_changed_backbone_is_refused(moved, capsys, change):
    copy, out = moved
    change(copy)
    with pytest.raises(ValueError, match="not the one of"):
        train.load(out)
    refused(capsys, ask(out), str(copy), "sha256")


# ----------------------------------------------------------------------------------- damaged runs

def test_a_damaged_run_is_refused(learned, tmp_path, capsys):
    whole = (learned[0] / "trained.safetensors").read_bytes()
    path = tmp_path / "trained.safetensors"
    cuts = [whole[:cut] for cut in (0, 1, 7, 8, 9, 100, 2000, len(whole) // 2, len(whole) - 1)]
    flips = [*range(60), *range(60, int.from_bytes(whole[:8], "little"), 211)]
    flipped = [whole[:i] + bytes([whole[i] ^ 0x15]) + whole[i + 1:] for i in flips]
    foreign = [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", whole + b"0"]
    for content in (*cuts, *flipped, *foreign):
        path.write_bytes(content)
        refused(capsys, ask(tmp_path), str(path))
    for metadata in (None, {}, {"config": "{}"}, {"config": json.dumps(learned[1]["config"])}):
        save_file(load_file(learned[0] / "trained.safetensors"), path, metadata=metadata)
        refused(capsys, ask(tmp_path), str(path))


# --------------------------------------------------------------------------------- another starts

def test_a_run_starts_from_what_another_has_learned(learned, argv, tmp_path):
    start = shutil.copytree(learned[0], tmp_path / "start")
    line = argv("--task", "rte", "--init", start, "--lr", "1e-30", "--max-steps", 1)
    results = train.main(line)
    before, after = (load_file(out / "trained.safetensors") for out in (start, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(start)  # once it has begun a run does without its start
    assert train.main([*line, "--resume"]) == results
    train.load(tmp_path / "run")


def test_a_start_that_does_not_fit_is_refused_and_nothing_is_written(learned, argv, backbone,
                                                                     tmp_path, capsys):
    start = str(learned[0])
    refused(capsys, argv("--init", start, "--r", 2), start, "--r 4", "does not fit")
    refused(capsys, argv("--init", start, "--keep", 1), "--keep all", "does not fit")
    refused(capsys, argv("--init", start, "--method", "lora"), "--init")
    for wrong in ("fischer", f"{start}/config.json"):
        refused(capsys, argv("--init", wrong), repr(wrong), "fisher, magnitude, random", "folder")
    refused(capsys, argv("--init", tmp_path), f"{tmp_path}/trained.safetensors")
    copy = shutil.copytree(backbone, tmp_path / "copy")
    other_weights(copy)
    refused(capsys, argv("--init", start, "--model", copy), "not the one of", "sha256")
    assert not (tmp_path / "run").exists()
