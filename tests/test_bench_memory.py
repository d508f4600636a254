"""The memory benchmark: Section 3.1's formulas, Table 1 on the meta device, and what the command line does with its arguments."""

import json
import re
from dataclasses import replace
from functools import cache
from unittest.mock import patch
from xml.etree import ElementTree

import pytest
import torch

import account
import bench_memory
from bench_memory import ACTIVATIONS, GB, METHODS, PAPER, PAPER_3, TABLE_3, Case, kept, mlp

T5_BASE = bench_memory.SIZES["t5-base"]
TINY = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
SMALL = ["--model", "t5-small"]
FEW = ["--batch-size", "2", "--source-length", "8"]


@pytest.fixture
def tiny(monkeypatch):
    """Every size is that of two layers of width 32."""
    for name in bench_memory.SIZES:
        monkeypatch.setitem(bench_memory.SIZES, name, TINY)
        monkeypatch.setitem(bench_memory.KEEP, name, [1])
    monkeypatch.delitem(bench_memory.KEEP, "t5-small")
    for name, values in {"batch": (1, 4), "length": (4, 9), "r": (2, 4), "keep": (1, 2)}.items():
        monkeypatch.setitem(bench_memory.SWEEPS, name, values)


@cache
def published(method, model):
    """A row of Table 1 as the authors' environment measured it."""
    return Case(method, model, keep=kept(model), as_authors=True).account(list(account.CONVENTIONS))


@cache
def published_3(method):
    """A row of Table 3 as the authors' environment measured it; inference has a test of its own."""
    with patch.object(account, "inference", lambda net, batch: 0):
        return Case(method, **TABLE_3).account(account.CONVENTIONS_3)


@cache
def peak_of(case, config):  # config: what SIZES says at the moment, so that a patched size is another case
    with torch.device("meta"):
        return account.training_step(case.build(), case.make_batch())["peak"]


def peak(case):
    return peak_of(case, case.config)


def of_few_layers(monkeypatch, N):
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", bench_memory.SIZES["t5-small"] | {"num_layers": N})


# ----------------------------------------------------------------------------------------------------------- Section 3.1

@pytest.mark.parametrize("N, B, D, r", [(1, 1, 8, 1), (3, 2, 8, 4), (12, 10, 48, 8), (5, 7, 96, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", ["full", "bias", "ladder"])
def test_the_formula_of_an_mlp_is_what_autograd_holds(method, activation, N, B, D, r):
    with torch.device("meta"):
        formula, counted = mlp(method, ACTIVATIONS[activation], N, B, D, r)
    assert formula == counted > 0


@pytest.mark.parametrize("activation, saved", [("GELU", 12), ("ReLU", 1), ("sigmoid", 1)])
def test_biases_alone_save_half_for_gelu_and_only_the_input_for_relu_and_sigmoid(activation, saved):  # "up to 50 %"
    with torch.device("meta"):
        full, bias = (mlp(method, ACTIVATIONS[activation], 12, 10, 48, 8)[1] for method in ("full", "bias"))
    assert full - bias == saved * 4 * 10 * 48 and bias == 12 * 4 * 10 * 48
    assert (full == 2 * bias) == (activation == "GELU")


# --------------------------------------------------------------------------------------------------------------- Table 1

@pytest.mark.parametrize("method, model", [pytest.param(*row, marks=[pytest.mark.slow] * (row[1] != "t5-base" or row[0] in ("adapters", "lora", "bitfit"))) for row in PAPER])
def test_table_1_is_reproduced_under_the_conventions_of_its_environment(method, model):
    row = published(method, model)
    assert (row["paper_gb"], row["paper_inference_gb"]) == PAPER[method, model]
    assert row["peak_paper_gb"] == pytest.approx(row["paper_gb"], rel=0.06)
    assert row["inference_peak_paper_gb"] == pytest.approx(row["paper_inference_gb"], rel=0.02)
    assert row["peak_paper_gb"] == row["peak"] / GB


@pytest.mark.slow
def test_the_rows_count_what_table_1_trains_with_larger_models():
    assert [published("lst", model)["trainable_params"] for model in ("t5-large", "t5-3b")] == [9_057_304, 2_494_850]


@pytest.mark.slow
def test_the_rows_count_what_table_1_trains():
    rows = {method: published(method, model) for method, model in PAPER if model == "t5-base"}
    counts = {method: row["trainable_params"] for method, row in rows.items()}
    assert counts == {"full": 222_882_048, "adapters": 3_625_728, "lora": 3_819_876, "bitfit": 280_932, "prompt": 76_800, "lst": 3_878_706}
    percent = {method: round(row["trainable_percent"], 2) for method, row in rows.items()}
    assert percent == {"full": 100, "adapters": 1.63, "lora": 1.71, "bitfit": 0.13, "prompt": 0.03, "lst": 1.74}


def test_our_lora_trains_no_biases():
    with torch.device("meta"):
        assert sum(p.numel() for p in Case("lora").build().parameters() if p.requires_grad) == 3_538_944


@pytest.mark.parametrize("model, changes, limit", [
    pytest.param("t5-base", {}, 2.7, marks=pytest.mark.slow), pytest.param("t5-base", dict(checkpoint=True), 1.9, marks=pytest.mark.slow),
    ("t5-base", dict(checkpoint=True, dtype="bf16"), 1.2), pytest.param("t5-3b", {}, 13.2, marks=pytest.mark.slow),
    pytest.param("t5-3b", dict(dtype="bf16"), 7.0, marks=pytest.mark.slow)], ids=str)
def test_our_lst_is_small(model, changes, limit):
    assert peak(Case("lst", model, keep=kept(model), attention="fused", **changes)) / GB <= limit


@pytest.mark.slow
@pytest.mark.parametrize("attention", [pytest.param("eager", marks=pytest.mark.slow), "fused"])
def test_lora_with_checkpointing_is_the_row_to_beat(attention):
    lora, ladder = (peak(Case(method, keep=kept("t5-base"), attention=attention, checkpoint=True)) / GB for method in ("lora", "lst"))
    assert 2.2 < lora < 2.5 and ladder < 0.8 * lora


def test_paper_values_stand_beside_the_papers_settings_alone(tiny, monkeypatch):
    monkeypatch.setattr(account, "training_step", lambda net, batch, conventions: {"peak": 1})
    monkeypatch.setattr(account, "inference", lambda net, batch: 1)
    case = Case("lst", keep=(1,))
    for change in (dict(batch=(99, 128, 2)), dict(r=4), dict(checkpoint=True), dict(dtype="bf16"), dict(keep=(0,)), dict(model="t5-small")):
        assert replace(case, **change).account()["paper_gb"] is None, change
    assert case.account()["paper_gb"] == 5.5


# --------------------------------------------------------------------------------------------------------------- Table 3

@pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method not in ("lst", "bitfit"))) for method in METHODS])
def test_table_3_is_reproduced_under_the_conventions_of_its_environment(method):
    row = published_3(method)
    assert (row["paper_gb"], row["paper_inference_gb"]) == PAPER_3[method]
    assert row["peak_paper_gb"] == pytest.approx(row["paper_gb"], rel=0.03)


@pytest.mark.parametrize("method", [pytest.param(method, marks=[pytest.mark.slow] * (method != "lora")) for method in METHODS])
def test_inference_of_table_3_is_reproduced(method):  # LoRA's with merged weights, else it would be 0.93
    row = Case(method, **TABLE_3).account()
    assert row["inference_peak_paper_gb"] == pytest.approx(row["paper_inference_gb"], rel=0.01)


@pytest.mark.slow
def test_the_rows_count_the_shares_of_table_3():  # of the whole model, the visual embedding and the added modules included
    assert [round(published_3(method)["trainable_percent"], 2) for method in METHODS] == [100, 7.98, 7.54, 0.83, 1.26, 7.46]


@pytest.mark.slow
def test_lst_is_the_only_method_of_table_3_that_fits_on_16_gb():  # Sec. 5: "the only method that can fit into a single 16GB GPU"
    assert [method for method in METHODS if published_3(method)["peak"] <= 16 * 2**30] == ["lst"]


def test_lst_needs_less_than_every_baseline():  # as published
    *others, ladder = (published_3(method)["peak"] for method in METHODS)
    assert ladder < 0.7 * min(others)


@pytest.mark.parametrize("changes, most", [({}, 0.7), pytest.param(dict(checkpoint=True), 1, marks=pytest.mark.slow)], ids=str)
def test_our_lst_needs_less_than_every_baseline_beside_images(changes, most):
    *others, ladder = (peak(Case(method, **TABLE_3 | dict(model="t5-small") | changes)) for method in ("lora", "bitfit", "lst"))  # the smallest two
    assert ladder < most * min(others)


def test_the_visual_embedding_is_counted(monkeypatch):  # the images, to the byte: test_account.py
    of_few_layers(monkeypatch, 1)
    text = Case("lst", "t5-small", r=4)
    rows = [case.account() for case in (text, replace(text, images=True))]
    embedding = 2048 * 512 + 512 + 5 * 512 + 512 + 4 * 512  # two projections with biases, two norms, two orders of images
    assert rows[1]["trainable_params"] - rows[0]["trainable_params"] == embedding
    assert rows[1]["weights"] - rows[0]["weights"] == 4 * (embedding + 100 * 512)  # and the words that name cells
    assert rows[1]["optimizer"] - rows[0]["optimizer"] == 8 * embedding


def test_table_3_has_a_row_for_each_method_with_all_layers_and_without_added_biases():
    for more in ([], ["--as-published"]):
        assert bench_memory.cases(bench_memory.parse(["--table", "3", *more])) == [Case(method, **TABLE_3) for method in METHODS]


@pytest.mark.parametrize("arguments", [pytest.param([], marks=pytest.mark.slow), ["--as-published", "--method", "lora"], ["--method", "lst", "--batch-size", "3"]],
                         ids=" ".join)
def test_table_3_prints_its_rows_as_published_and_today(tiny, capsys, arguments):
    rows, text = bench_memory.main(["--table", "3", *arguments])["rows"], capsys.readouterr().out
    assert [row["method"] for row in rows] == (arguments[arguments.index("--method") + 1 :][:1] if arguments else list(METHODS))
    for row in rows:
        assert row["peak"] == sum(row[kind] for kind in bench_memory.KINDS) > row["today"]["peak"] == sum(row["today"][kind] for kind in bench_memory.KINDS)
        assert row["paper_gb"] == (None if "--batch-size" in arguments else PAPER_3[row["method"]][0])
        assert re.search(rf"{METHODS[row['method']]} .* {row['peak_paper_gb']:.2f} +{row['today']['peak_paper_gb']:.2f} ", text)
    assert all(words in text for words in account.CONVENTIONS_3.values()) and account.CONVENTIONS["gradients"] not in text


@pytest.mark.slow
def test_attention_and_checkpointing_change_todays_account_and_not_the_published_one(tiny):
    plain, changed = (bench_memory.main(["--table", "3", "--method", "lst", "--r", "2", *more])["rows"][0]
                      for more in ([], ["--attention", "fused", "--checkpoint"]))
    assert changed["today"]["peak"] < plain["today"]["peak"] and changed["peak"] == plain["peak"]


# ---------------------------------------------------------------------------------------------------- rows and their order

def test_a_model_has_a_row_for_each_method():
    assert [(case.method, case.model) for case in bench_memory.cases(bench_memory.parse(SMALL))] == [(method, "t5-small") for method in bench_memory.METHODS]


@pytest.mark.parametrize("method", ["full", "adapters", "lora"])
def test_freezing_the_lowest_layers_lowers_the_peak(monkeypatch, method):  # Fig. 6
    of_few_layers(monkeypatch, 2)
    none, encoder, most = (peak(Case(method, "t5-small", freeze=freeze)) for freeze in (0, 2, 3))
    assert most < encoder < 0.5 * none


def test_freeze_is_for_what_trains_inside_the_backbone():
    frozen = {case.method: case.freeze for case in bench_memory.cases(bench_memory.parse([*SMALL, "--freeze", "3"]))}
    assert frozen == {"full": 3, "adapters": 3, "lora": 3, "bitfit": 3, "prompt": 0, "lst": 0}


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_explain_counts_what_it_predicts(attention, capsys):
    rows = bench_memory.main([*SMALL, "--explain", "--batch-size", "3", "--source-length", "33", "--attention", attention])["rows"]
    for row in rows:
        assert row["formula"] == row["counted"] == sum(tensor["bytes"] for tensor in row["tensors"]) > 0
    assert len(rows) == 2 and "NOT" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- sweeps

@pytest.mark.slow
@pytest.mark.parametrize("attention, N, least, most", [("eager", 3, 0.5, 0.7), ("fused", 6, 0.95, 1)])
def test_the_ladders_lead_shrinks_with_the_source_under_eager_attention_and_keeps_under_fused(monkeypatch, attention, N, least, most):
    of_few_layers(monkeypatch, N)
    # r does not shrink attention maps, and eager attention keeps one in each layer, fused one in each stack
    full, lst = (Case(method, "t5-small", attention=attention) for method in ("full", "lst"))
    near, far = (peak(replace(full, batch=(100, S, 2))) / peak(replace(lst, batch=(100, S, 2))) for S in (64, 256))
    assert near > 2.8 and least < far / near < most


@pytest.mark.parametrize("name, sign, N", [("r", -1, 1), ("keep", 1, 3)])
def test_a_sweep_over_r_falls_and_one_over_kept_layers_rises(monkeypatch, name, sign, N):
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", dict(d_model=128, d_kv=32, d_ff=256, num_layers=N, num_heads=4))
    rows = bench_memory.main([*SMALL, "--sweep", name, *FEW])["rows"]
    values, peaks = [row[name] for row in rows], [row["peak"] for row in rows]
    assert values == sorted(set(values)) and len(values) >= 2 and all(row["method"] == "lst" for row in rows)
    assert all(sign * (after - before) > 0 for before, after in zip(peaks, peaks[1:]))


# ------------------------------------------------------------------------------------------------------------------ fits

@pytest.mark.slow
@pytest.mark.parametrize("method, changes", [("lora", {}), ("lst", dict(checkpoint=True))])
def test_the_batch_that_fits_fits_and_one_more_does_not(tiny, method, changes):
    more = ["--checkpoint"] if changes else []
    row, = bench_memory.main([*SMALL, "--fits", "1", "--method", method, "--source-length", "2000", *more])["rows"]
    case, most = Case(method, "t5-small", **changes), row["largest_batch"]
    assert peak(replace(case, batch=(most, 2000, 2))) <= 2**30 < peak(replace(case, batch=(most + 1, 2000, 2)))


@pytest.mark.parametrize("a_row", [2**30 + 1, 2**30, 2**29 + 1, 2**26, 2**26 + 1, 999])
def test_bisection_finds_the_largest_batch_without_a_limit(tiny, monkeypatch, capsys, a_row):  # an account that is a_row times the batch
    monkeypatch.setattr(account, "training_step", lambda net, batch: {"peak": a_row * len(batch[0])})
    monkeypatch.setattr(Case, "build", lambda case: None)
    row, = bench_memory.main([*SMALL, "--method", "lst", "--fits", "1", "--source-length", "1"])["rows"]
    assert row["largest_batch"] == 2**30 // a_row
    assert ("not even one row" in capsys.readouterr().out) == (a_row > 2**30)


# ----------------------------------------------------------------------------------------------------------------- files

def result_of(arguments, folder):
    drawn = not {"--explain", "--fits", "--time"} & {*arguments}
    json_path, plot_path = folder / "bench.json", folder / "plot.svg"
    result = bench_memory.main([*arguments, "--json", str(json_path), *(["--plot", str(plot_path)] if drawn else [])])
    assert json.loads(json_path.read_text()) == result
    assert result["rows"] and result["torch"] == torch.__version__ and result["hardware"] and "batch" in result["arguments"]
    assert plot_path.exists() == drawn
    if drawn:
        root = ElementTree.parse(plot_path).getroot()
        assert root.tag.endswith("svg") and len(list(root)) > 10
        assert not re.search(r"\b(nan|inf)\b", plot_path.read_text())
    return result


@pytest.mark.parametrize("arguments", [
    ["--as-published", "--method", "lora"], ["--table", "3", "--method", "lora"], ["--sweep", "length", "--method", "lst"], ["--explain"],
    [*SMALL, *FEW, "--time", "--rounds", "1"],
    *(pytest.param(more, marks=pytest.mark.slow) for more in (
        ["--method", "prompt", "--batch-size", "1000000000", "--source-length", "10000"], ["--sweep", "batch"], ["--sweep", "r"], ["--sweep", "keep"],
        [*SMALL, "--fits", "1", "--method", "lst", "--source-length", "4000"]))], ids=" ".join)
def test_json_holds_what_main_returns_and_the_plot_is_one_that_a_browser_can_read(tmp_path, tiny, capsys, arguments):
    rows, text = result_of(arguments, tmp_path)["rows"], capsys.readouterr().out
    if arguments == ["--sweep", "batch"]:
        assert [row["batch"] for row in rows] == [1, 1, 1, 4, 4, 4]
        assert re.findall(r"full / LST ([\d.]+)", text) == [f"{rows[i]['peak'] / rows[i + 2]['peak']:.2f}" for i in (0, 3)]


@pytest.mark.slow
def test_the_whole_story_has_the_promised_keys_and_each_trick_makes_the_ladder_smaller(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setitem(bench_memory.SIZES, "t5-base", T5_BASE | {"num_layers": 3})
    monkeypatch.setitem(bench_memory.KEEP, "t5-base", [1, 2])
    result, text = result_of(["--source-length", "64"], tmp_path), capsys.readouterr().out
    keys = {"method", "model", "trainable_params", "trainable_percent", "weights", "gradients", "optimizer", "saved_activations", "temporary", "peak",
            "peak_paper_gb", "paper_gb", "inference_peak_paper_gb", "paper_inference_gb"}
    assert [(row["method"], row["model"]) for row in result["rows"]] == [*PAPER, ("full", "t5-base"), ("lora", "t5-base"), ("lst", "t5-base")]
    for row in result["rows"]:
        assert keys <= row.keys() and row["flops"] > 0
        assert row["peak"] == sum(row[kind] for kind in bench_memory.KINDS)
    assert len(result["section_3_1"]) == 3 and "≠" not in text and "With checkpointing LoRA comes down to" in text
    peaks = [row["peak"] for row in result["tricks"]]
    assert len(peaks) == 10 and peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


# --------------------------------------------------------------------------------------------------------------- seconds

def test_time_measures_each_step_and_prints_their_ratios(tiny, capsys):
    rows = bench_memory.main([*SMALL, "--time", "--rounds", "2", "--batch-size", "1", "--source-length", "4", "--r", "4"])["rows"]
    for row in rows:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
    seconds, text = {row["method"]: row["seconds"] for row in rows}, capsys.readouterr().out
    assert len(seconds) == 7
    printed = re.findall(r"^(.+) takes ([\d.]+) of (.+)$", text, re.MULTILINE)
    assert len(printed) == 3
    for one, ratio, other in printed:
        assert ratio == f"{seconds[one] / seconds[other]:.2f}"


# ------------------------------------------------------------------------------------------------------- wrong arguments

HUGE = str(10**9)
WRONG = [
    ["--model", "foo"], ["--method", "foo"], ["--attention", "foo"], ["--table", "2"], ["--sweep", "foo"], ["--foo"],
    ["--time", "--explain"], ["--as-published", "--fits", "12"], ["--sweep", "r", "--explain"],
    ["--r", "7"], ["--r", "0"], ["--r", "3", "--sweep", "length"], [*SMALL, "--r", "7", "--explain"],
    ["--keep", "12"], ["--keep", "1,99"], ["--keep", "1,1"], ["--keep", "-1"], ["--keep", "one"], ["--keep", ""], ["--keep", "1,,2"], ["--keep", "1.5"],
    ["--freeze", "-1"], ["--freeze", "24"], ["--freeze", HUGE], ["--freeze", "x"], ["--freeze", "3", "--method", "prompt"],
    ["--freeze", "3", "--method", "lst"], ["--freeze", "-1", "--method", "lst"], [*SMALL, "--freeze", "12"],
    ["--fits", "0"], ["--fits", "-1"], ["--fits", "1.5"], ["--fits", "x"],
    ["--batch-size", "0"], ["--batch-size", "-1"], ["--batch-size", str(10**18)], ["--source-length", "0"], ["--target-length", "0"],
    ["--time", "--rounds", "0"],
    ["--as-published", "--batch-size", "100"], ["--as-published", "--attention", "fused"], ["--as-published", "--r", "4"], ["--as-published", "--dtype", "bf16"],
    ["--table", "3", "--explain"], ["--table", "3", "--fits", "12"], ["--table", "3", "--sweep", "r"], ["--table", "3", "--time"],
    ["--table", "3", *SMALL], ["--table", "3", "--as-authors"], ["--table", "3", "--freeze", "3"], ["--table", "3", "--r", "5"], ["--table", "3", "--keep", "12"],
    ["--table", "3", "--method", "lora", "--keep", "1"], ["--table", "3", "--as-published", "--batch-size", "3"], ["--table", "3", "--dtype", "bf16"],
    ["--table", "3", "--method", "lst", "--batch-size", HUGE, "--target-length", HUGE],
    ["--dtype", "bf16"], ["--dtype", "bf16", "--method", "full"], ["--dtype", "fp16", "--method", "lst"],
    ["--plot", "x.svg", "--time"], ["--plot", "x.svg", "--explain"], ["--plot", "x.svg", "--fits", "12"],
    ["--json", "missing/bench.json"], ["--json", "."], ["--json", "/dev/null/bench.json"], ["--plot", "missing/x.svg"], ["--plot", "/dev/null/x.svg"],
    # sizes that no 64-bit number of bytes can say
    [*SMALL, "--method", "lst", "--source-length", HUGE], [*SMALL, "--explain", "--source-length", HUGE],
    [*SMALL, "--method", "lst", "--fits", "12", "--source-length", HUGE], [*SMALL, "--method", "lst", "--target-length", HUGE, "--batch-size", HUGE],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_argument_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    more = [] if "--json" in arguments else ["--json", "bench.json"]
    with pytest.raises(SystemExit) as stop:
        bench_memory.main([*arguments, *more])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.splitlines()) == 1 and text.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_none_is_measured(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_memory.main(["--device", "cuda"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_of_ours_is_not_taken_for_a_step_too_large(monkeypatch):
    def fails(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench_memory, "show_explain", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        bench_memory.main(["--explain"])


@pytest.mark.slow
def test_numbers_that_are_large_but_count_are_counted(tiny):
    few, many = (bench_memory.main([*SMALL, "--method", "lst", "--batch-size", size, "--source-length", "8"])["rows"][0] for size in ("1000000", HUGE))
    assert many["weights"] == few["weights"] and many["saved_activations"] == pytest.approx(1000 * few["saved_activations"], rel=0.01)
