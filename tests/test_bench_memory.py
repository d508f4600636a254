"""The memory table: what Sec. 3.1 claims, counted on the meta device, and the stopwatch on sizes made for it."""

import json

import pytest
import torch
from torch import nn

import bench_memory

TINY = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def small():
    """{"full": row, "lst": row} of t5-small."""
    full, ladder = bench_memory.main(["--model", "t5-small"])["rows"]
    return {"full": full, "lst": ladder}


def test_a_row_names_each_kind_of_bytes(small):
    for row in small.values():
        assert {"method", "model", "trainable_params", "weights", "gradients", "optimizer", "saved_activations"} <= row.keys()
        assert row["model"] == "t5-small"


def test_weights_gradients_and_moments_follow_from_the_parameters(small):
    full, ladder = small["full"], small["lst"]
    assert full["trainable_params"] == 60_506_624  # the public checkpoint's
    for row in (full, ladder):
        assert (row["gradients"], row["optimizer"]) == (4 * row["trainable_params"], 8 * row["trainable_params"])
    assert full["weights"] == 4 * 60_506_624 and ladder["weights"] == 4 * (60_506_624 + ladder["trainable_params"])


def test_the_ladder_saves_fewer_bytes_than_full_fine_tuning(small):  # Sec. 3.1
    full, ladder = small["full"], small["lst"]
    for kind in ("gradients", "optimizer", "saved_activations"):
        assert ladder[kind] < full[kind] / 2, kind


def test_saved_activations_grow_with_the_batch_weights_do_not():
    one, two = (bench_memory.main(["--model", "t5-small", "--batch-size", size, "--source-length", "16"])["rows"] for size in ("4", "8"))
    for few, many in zip(one, two):
        assert many["weights"] == few["weights"]
        assert 1.8 * few["saved_activations"] < many["saved_activations"] < 2 * few["saved_activations"]


class Toy(nn.Module):
    """Two layers on embedded decoder ids, (B, T) -> (B, T, V)."""

    def __init__(self, V=11, D=3, width=5):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(V, D), nn.Linear(D, width), nn.Linear(width, V)

    def forward(self, source_ids, source_mask, decoder_ids):
        return self.second(torch.relu(self.first(self.embed(decoder_ids))))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_two_layer_toy_saves_the_hand_counted_bytes(device):
    B, T, V, D, width = 2, 7, 11, 3, 5
    with torch.device(device):
        ids = torch.zeros(B, T, dtype=torch.long)
        batch = ids, torch.ones(B, T, dtype=torch.bool), ids.clone(), ids.clone()
        saved = bench_memory.saved_bytes(Toy(V, D, width), batch)
    # the first layer's input, relu's output, which is also the second layer's input, and the log-softmax: ids, labels and weights
    # are there anyway.  The loss keeps one more number, by which it divides.
    assert saved == 4 * B * T * (D + width + V) + 4


def test_a_frozen_toy_saves_less():
    with torch.device("meta"):
        ids = torch.zeros(2, 7, dtype=torch.long)
        toy = Toy()
        toy.embed.requires_grad_(False)
        toy.first.requires_grad_(False)
        saved = bench_memory.saved_bytes(toy, (ids, ids.bool(), ids.clone(), ids.clone()))
    assert saved == 4 * 2 * 7 * (5 + 11) + 4  # nothing below the second layer


def test_bench_memory_needs_no_memory_for_the_largest_model():
    for row in bench_memory.main(["--model", "t5-3b"])["rows"]:
        assert row["weights"] > 10 * 2**30


def test_time_measures_each_step_and_prints_their_ratios(monkeypatch, capsys):
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", TINY)
    rows = bench_memory.main(["--model", "t5-small", "--time", "--rounds", "2", "--batch-size", "1", "--source-length", "4", "--r", "4"])["rows"]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
    forward, ladder, full = (row["seconds"] for row in rows)
    assert f"{ladder / full:.2f} of a full fine-tuning step and {ladder / forward:.2f} of the bare forward pass" in capsys.readouterr().out


def test_json_holds_what_main_returns(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", TINY)
    result = bench_memory.main(["--model", "t5-small", "--r", "4", "--json", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == result


@pytest.mark.parametrize("arguments", [
    ["--model", "foo"], ["--r", "7"], ["--r", "0"], ["--batch-size", "0"], ["--batch-size", "-1"], ["--source-length", "0"], ["--attention", "foo"],
    ["--rounds", "0", "--time"], ["--json", "/dev/null/bench.json"], ["--batch-size", str(10**18)]], ids=" ".join)
def test_a_wrong_argument_is_refused_in_one_line(monkeypatch, capsys, arguments):
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", TINY)
    with pytest.raises(SystemExit) as stop:
        bench_memory.main(["--model", "t5-small", *arguments])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
