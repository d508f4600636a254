"""The memory benchmark: Section 3.1, Tables 1 and 3 on the meta device, and the command line."""
import importlib
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import bench_memory
from bench_memory import (ACTIVATIONS, METHODS, PAPER, TABLE_3, Case, backward_by_hand, choose, mlp,
                          parse)
from memory import account, stories
from memory.account import GB
from memory.environment import CONVENTIONS, OF_TABLE_1, OF_TABLE_3
from memory.stories import KINDS

ROOT = Path(__file__).parent.parent
T5_BASE = bench_memory.SIZES["t5-base"]
TINY = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
SMALL = ["--model", "t5-small"]
FEW = ["--batch-size", "2", "--source-length", "8"]
HUGE = str(10**9)
slow = pytest.mark.slow
TABLE_1, TABLE_4 = bench_memory.TABLES[1], bench_memory.TABLES[4]


@pytest.fixture
def tiny(monkeypatch):
    """Every size is that of two layers of width 32."""
    for name in bench_memory.SIZES:
        monkeypatch.setitem(bench_memory.SIZES, name, TINY)
    for name in bench_memory.KEEP:
        monkeypatch.setitem(bench_memory.KEEP, name, (1,))
    for name, values in {"batch": (1, 4), "length": (4, 9), "r": (2, 4), "keep": (1, 2)}.items():
        monkeypatch.setitem(stories.SWEEPS, name, values)


@cache
def published(case):
    """A row as the authors' environment measured it."""
    return replace(case, conventions=OF_TABLE_3 if case.images else OF_TABLE_1).account()


@cache
def peak_of(case, config):  # config: what SIZES says now, so that a patched size is another case
    with torch.device("meta"):
        return account.training_step(case.build(), case.make_batch())["peak"]


def peak(case):
    return peak_of(case, case.config)


def rows_of(*arguments):
    return bench_memory.main([*arguments])["rows"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradients_of_eq_1_and_2_are_autograds(monkeypatch, activation):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 5, dtype=torch.float64) for _ in range(4)]
    a_0 = a = torch.randn(3, 5, dtype=torch.float64)
    sigma, slope, source = ACTIVATIONS[activation]
    for layer in layers:
        a = sigma(layer(a))
    a.sum().backward()
    W, b = [layer.weight for layer in layers], [layer.bias for layer in layers]
    expected = tuple({i: p.grad for i, p in enumerate(parameters)} for parameters in (W, b))
    torch.testing.assert_close(backward_by_hand(a_0, W, b, activation)[:2], expected)
    monkeypatch.setitem(ACTIVATIONS, activation, (sigma, lambda x: slope(x + 1), source))
    with pytest.raises(AssertionError):  # a wrong derivative is seen
        torch.testing.assert_close(backward_by_hand(a_0, W, b, activation)[:2], expected)


@pytest.mark.parametrize("N, B, D, r", [(1, 1, 8, 1), (12, 10, 48, 8), (5, 7, 96, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_the_equations_of_an_mlp_read_is_what_autograd_holds(activation, N, B, D, r):
    held = {}
    for method in ("full", "bias", "ladder"):
        read, held[method] = mlp(method, activation, N, B, D, r)
        assert read == held[method] > 0
    # training biases saves half for GELU, "up to 50 %", and only the input for ReLU
    assert held["bias"] == N * 4 * B * D
    assert held["full"] - held["bias"] == (N if activation == "GELU" else 1) * 4 * B * D


@slow
@pytest.mark.parametrize("case", PAPER, ids=str)
def test_the_papers_memory_is_reproduced_under_the_conventions_of_its_environment(case):
    row = published(case)
    assert (row["paper_gb"], row["paper_inference_gb"]) == PAPER[case]
    assert row["peak_paper_gb"] == row["peak"] / GB
    row_limit, inference_limit = (0.022, 0.01) if case.images else (0.033, 0.02)
    assert row["peak_paper_gb"] == pytest.approx(row["paper_gb"], rel=row_limit)
    # Table 3's LoRA with merged weights, else it would be 0.93; Table 4 has no such column
    paper, ours = row["paper_inference_gb"], row["inference_peak_paper_gb"]
    assert paper is None or ours == pytest.approx(paper, rel=inference_limit)


@slow
def test_the_rows_count_what_the_paper_trains():
    assert [published(case)["trainable_params"] for case in TABLE_1] == [
        222_882_048, 3_625_728, 3_820_644, 280_932, 76_800, 3_878_706, 9_057_304, 2_494_850]
    assert [published(case)["trainable_params"] for case in TABLE_4] == [
        5_097_240, 5_984_256, 4_622_232]
    base = [case for case in TABLE_1 if case.model == "t5-base"]
    table_1, table_3 = ([round(published(case)["trainable_percent"], 2) for case in cases]
                        for cases in (base, [Case(method, **TABLE_3) for method in METHODS]))
    assert table_1 == [100, 1.63, 1.71, 0.13, 0.03, 1.74]
    assert table_3 == [100, 7.98, 7.54, 0.83, 1.26, 7.46]  # of the whole model


@pytest.mark.slow
@pytest.mark.parametrize("name, counts", [
    ("size", [3_625_728, 3_538_944, 1_855_104, 1_769_472, 969_792, 884_736, 527_136, 442_368]),
    ("freeze --method adapters", [3_625_728, 2_721_984, 1_817_472, 909_120]),
    ("freeze --method bitfit", [280_932, 230_244, 179_556, 105_828]),
    ("r --keep all", [57_543_192, 16_386_072, 5_097_240, 1_775_256, 694_872])])
def test_a_sweep_counts_what_figs_5_and_6_train(monkeypatch, name, counts):
    def count(case):
        with torch.device("meta"):
            return sum(p.numel() for p in case.build().parameters() if p.requires_grad)

    monkeypatch.setattr(stories, "show_cases", lambda args, title, cases: [*map(count, cases)])
    assert rows_of("--sweep", *name.split()) == counts


@slow
def test_table_4_has_the_papers_order_as_published_and_today(capsys):
    small = rows_of("--table", "4", "--batch-size", "4", "--source-length", "16")
    assert [row["label"] for row in small] == [
        "LST, base", "LST, cross, base", "LST, adapters, base"]
    for row in small:
        assert row["peak"] > row["today"]["peak"] and row["paper_gb"] is None


@slow
def test_lst_needs_less_than_every_other_method_of_table_3_and_only_it_fits_on_16_gb():  # Sec. 5
    *others, ladder = (published(Case(method, **TABLE_3))["peak"] for method in METHODS)
    assert ladder < 0.7 * min(others) and ladder <= 16 * 2**30 < min(others)


@slow
def test_our_lst_is_smaller_than_lora_with_checkpointing_and_beside_images_too():
    for attention in ("eager", "fused"):
        lora, ladder = (peak(Case(method, attention=attention, checkpoint=True)) / GB
                        for method in ("lora", "lst"))
        assert 2.2 < lora < 2.5 and ladder < 0.8 * lora
    lst, large = Case("lst"), Case("lst", "t5-3b")
    for case, limit in ((lst, 2.7), (replace(lst, checkpoint=True), 1.9), (large, 13.2),
                        (replace(lst, checkpoint=True, dtype="bf16"), 1.2),
                        (replace(large, dtype="bf16"), 7.0)):
        assert peak(replace(case, attention="fused")) / GB <= limit
    for checkpoint, most in ((False, 0.7), (True, 1)):
        changes = TABLE_3 | dict(checkpoint=checkpoint)
        *others, ladder = (peak(Case(method, "t5-small", **changes))
                           for method in ("lora", "bitfit", "lst"))  # the smallest two
        assert ladder < most * min(others)


@slow
def test_a_ladder_beside_a_t5_of_three_billion_in_four_bits():  # the paper: 22.4
    case = Case("lst", "t5-3b", keep=(23,), dtype="nf4", attention="fused")
    row = case.account()
    assert row["peak_paper_gb"] < 2.6 and row["inference_peak_paper_gb"] > row["weights"] / GB


@pytest.mark.parametrize("arguments", [
    pytest.param([], marks=slow), ["--as-published", "--method", "lora"],
    pytest.param(["--method", "lst", "--batch-size", "3"], marks=slow)], ids=" ".join)
def test_table_3_prints_its_rows_as_published_and_today(tiny, capsys, arguments):
    rows, text = rows_of("--table", "3", *arguments), capsys.readouterr().out
    methods = [name for name in METHODS if name in arguments] or list(METHODS)
    assert [row["method"] for row in rows] == methods
    for row in rows:
        today = row["today"]
        assert row["peak"] == sum(row[kind] for kind in KINDS) > today["peak"]
        assert today["peak"] == sum(today[kind] for kind in KINDS)
        paper = None if "--batch-size" in arguments else PAPER[Case(row["method"], **TABLE_3)][0]
        assert row["paper_gb"] == paper
        name, (before, now) = METHODS[row["method"]], (row["peak_paper_gb"], today["peak_paper_gb"])
        assert re.search(rf"{name}, .* {before:.2f} +{paper or ''}.*\n  today .* {now:.2f} ", text)
    assert {name for name, words in CONVENTIONS.items() if words in text} == {*OF_TABLE_3}


@pytest.mark.parametrize("arguments, cases", [
    ([], TABLE_1), (SMALL, [Case(method, "t5-small") for method in METHODS]),
    (["--as-published"], [replace(case, conventions=OF_TABLE_1) for case in TABLE_1]),
    *(([*more, "--table", "3"], [Case(method, **TABLE_3) for method in METHODS])
      for more in ([], ["--as-published"])), (["--table", "4"], TABLE_4)], ids=str)
def test_a_table_or_a_model_has_its_rows(arguments, cases):
    assert choose(parse(arguments)) == cases


def test_an_option_goes_to_the_methods_that_read_it():
    frozen = {case.method: case.freeze for case in choose(parse([*SMALL, "--freeze", "3"]))}
    assert frozen == dict(full=3, adapters=3, lora=3, bitfit=3, prompt=0, lst=0)
    cases = choose(parse(["--r", "4", "--keep", "all"]))
    assert {(case.method, case.r, case.keep) for case in cases} == {
        ("lst", 4, ()), *((method, 8, None) for method in METHODS if method != "lst")}


def test_freezing_the_lowest_layers_lowers_the_peak(monkeypatch):  # Fig. 6
    sizes = bench_memory.SIZES["t5-small"] | {"num_layers": 2}
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", sizes)
    none, encoder, most = (peak(Case("full", "t5-small", freeze=freeze)) for freeze in (0, 2, 3))
    assert most < encoder < 0.5 * none


@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_explain_counts_what_it_predicts(attention, capsys):
    rows = rows_of(*SMALL, "--explain", "--batch-size", "3", "--source-length", "33",
                   "--attention", attention)
    for row in rows:
        listed = sum(tensor["bytes"] for tensor in row["tensors"])
        assert row["formula"] == row["counted"] == listed > 0
    assert len(rows) == 2 and "NOT" not in capsys.readouterr().out


@slow
@pytest.mark.parametrize("name, sign, N", [("r", -1, 1), ("keep", 1, 3)])
def test_a_sweep_over_r_falls_and_one_over_kept_layers_rises(monkeypatch, name, sign, N):
    sizes = dict(d_model=128, d_kv=32, d_ff=256, num_layers=N, num_heads=4)
    monkeypatch.setitem(bench_memory.SIZES, "t5-small", sizes)
    rows = rows_of(*SMALL, "--sweep", name, *FEW)
    values, peaks = [row[name] for row in rows], [row["peak"] for row in rows]
    assert values == sorted(set(values)) and len(values) >= 2
    assert all(row["method"] == "lst" for row in rows)
    assert all(sign * (after - before) > 0 for before, after in zip(peaks, peaks[1:]))


@pytest.mark.parametrize("a_row", [2**30 + 1, 2**30, 2**29 + 1, 2**26, 2**26 + 1, 1025])
def test_bisection_finds_the_largest_batch(tiny, monkeypatch, a_row):  # of a_row bytes each
    count = lambda net, batch: {"peak": a_row * len(batch[0])}  # noqa: E731
    monkeypatch.setattr(account, "training_step", count)
    monkeypatch.setattr(Case, "build", lambda case: None)
    row, = rows_of(*SMALL, "--method", "lst", "--fits", "1", "--source-length", "1")
    assert row["largest_batch"] == 2**30 // a_row


def result_of(arguments, folder, capsys):
    """What main returns and prints, after a look at what it writes."""
    drawn = not {"--explain", "--fits", "--time"} & {*arguments}
    found, picture = folder / "bench.json", folder / "plot.svg"
    files = ["--json", str(found), *(["--plot", str(picture)] if drawn else [])]
    result, text = bench_memory.main([*arguments, *files]), capsys.readouterr().out
    assert json.loads(found.read_text()) == result
    assert result["rows"] and result["torch"] == torch.__version__ and result["hardware"]
    assert "batch" in result["arguments"] and picture.exists() == drawn
    if drawn:
        root = ElementTree.parse(picture).getroot()
        assert root.tag.endswith("svg") and len(list(root)) > 10
        assert not re.search(r"\b(nan|inf)\b", picture.read_text())
    if not {"--time", HUGE} & {*arguments}:  # the name of a processor may be long
        assert max(map(len, text.splitlines())) <= 80
    return result, text


@pytest.mark.parametrize("arguments", [
    ["--as-published", "--method", "lora"], ["--explain"], ["--sweep", "length", "--method", "lst"],
    *(pytest.param(more, marks=slow) for more in (
        ["--table", "3", "--method", "lora"],
        ["--method", "prompt", "--batch-size", HUGE, "--source-length", "10000"],
        ["--sweep", "batch"], ["--sweep", "r"], ["--sweep", "keep"],
        [*SMALL, "--fits", "1", "--method", "lst", "--source-length", "4000"]))], ids=" ".join)
def test_json_holds_what_main_returns_and_the_plot_is_svg(tmp_path, tiny, capsys, arguments):
    result, _ = result_of(arguments, tmp_path, capsys)
    if arguments == ["--sweep", "batch"]:
        assert [row["batch"] for row in result["rows"]] == [1, 1, 1, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, count", [("fp32", 8), ("bf16", 10)])  # bf16 beside fp32
def test_time_measures_each_step_and_prints_it(tmp_path, tiny, capsys, dtype, count):
    result, text = result_of(
        [*SMALL, *FEW, "--time", "--r", "4", "--dtype", dtype], tmp_path, capsys)
    assert len(result["rows"]) == count
    for row in result["rows"]:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert re.search(rf"^{row['method']} +{row['seconds']:.3f} ", text, re.MULTILINE)


@slow
def test_the_whole_story_has_the_promised_keys_and_each_trick_makes_the_ladder_smaller(
        tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setitem(bench_memory.SIZES, "t5-base", T5_BASE | {"num_layers": 3})
    monkeypatch.setitem(bench_memory.KEEP, "t5-base", (1, 2))
    result, text = result_of([], tmp_path, capsys)
    again = [("full", "t5-base"), ("lora", "t5-base"), ("lst", "t5-base")]
    assert [(row["method"], row["model"]) for row in result["rows"]] == [
        *((case.method, case.model) for case in TABLE_1), *again]
    for row in result["rows"]:
        assert row.keys() >= {
            "label", "method", "model", "dtype", "trainable_params", "trainable_percent", *KINDS,
            "peak", "peak_paper_gb", "paper_gb", "inference_peak_paper_gb", "paper_inference_gb"}
        assert row["flops"] > 0 and row["peak"] == sum(row[kind] for kind in KINDS)
    assert len(result["section_3_1"]) == 3 and "≠" not in text
    peaks = [row["peak"] for row in stories.tricks(Case("lst", batch=(100, 64, 2)))]
    assert len(result["tricks"]) == len(peaks) == 10 and peaks == sorted(set(peaks), reverse=True)


WRONG = """
--model foo | --method foo | --attention foo | --table 2 | --sweep foo | --foo | --time --explain
--as-published --fits 12 | --sweep r --method lora | --sweep keep --keep 1
--r 7 | --r 0 | --r 3 --sweep length | --method lora --r 8 | --time --checkpoint
--keep 12 | --keep 1,1 | --keep -1 | --keep one | --keep= | --keep 1.5
--freeze -1 | --freeze 24 | --freeze x | --freeze 3 --method prompt | --freeze 3 --method lst
--fits 0 | --fits -1 | --fits x | --fits 12 --batch-size 3
--batch-size 0 | --batch-size 1000000000000000000 | --source-length 0 | --target-length 0
--as-published --dtype bf16 | --as-published --checkpoint
--table 4 --r 8 | --table 4 --method lora
--sweep size --method bitfit | --sweep freeze --method lst
--table 3 --explain | --table 3 --time | --table 3 --model t5-small
--table 3 --freeze 3 | --table 3 --r 5 | --table 3 --method lora --keep 1
--method lst --r 32 --attention fused
--table 3 --method lst --batch-size HUGE --target-length HUGE
--dtype bf16 --method full | --dtype fp16 --method lst | --dtype nf4 | --dtype nf4 --method lora
--method qlora | --method qlora --model t5-small | --free 3 | --end up | --side-dtype bf16
--plot x.svg --time | --plot missing/x.svg | --json missing/x.json | --json . | --json x --plot x
--model t5-small --method lst --source-length HUGE | --model t5-small --explain --source-length HUGE
--model t5-small --method lst --fits 12 --source-length HUGE
""".replace("HUGE", HUGE).strip().replace("\n", " | ").split(" | ")


@pytest.mark.parametrize("arguments", WRONG + ["--device cuda"] * (not torch.cuda.is_available()))
def test_a_wrong_argument_is_refused_in_one_line_and_nothing_is_written(
        tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    more = [] if "--json" in arguments else ["--json", "bench.json"]
    with pytest.raises(SystemExit) as stop:
        bench_memory.main([*arguments.split(), *more])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.splitlines()) == 1 and text.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, readers", [
    ("--explain --plot x",
     "--as-published or --sweep or --table 1 or --table 3 or --table 4 or no option"),
    ("--as-published --time", "--as-published or --table 3 or --table 4"),
    ("--as-published --device cuda", "--table 1 or --table 3 or --table 4 or --time"),
    ("--sweep length --source-length 9",
     "--as-published or --explain or --fits or --table 1 or --table 3 or --table 4 "
     "or --time"),
    ("--freeze 3 --method lst",
     "--method adapters or --method bitfit or --method full or --method lora"),
    ("--sweep keep --method lora", "--method lst")])
def test_an_option_that_means_nothing_names_who_reads_it(capsys, arguments, readers):
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert f"means nothing here, only with {readers}: leave it out" in capsys.readouterr().err


def test_an_error_of_ours_is_not_taken_for_a_step_too_large(monkeypatch):
    def fails(args, cases):
        raise RuntimeError("a bug")

    monkeypatch.setitem(bench_memory.STORIES, "--explain", (fails, ""))
    with pytest.raises(RuntimeError, match="a bug"):
        bench_memory.main(["--explain"])


@slow
def test_the_prepared_measurement_on_a_gpu_runs_dry(tiny, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    gpu = importlib.import_module("gpu")
    runs = gpu.main(["--dry-run"])
    assert list(runs) == list(gpu.RUNS) and all(run["rows"] for run in runs.values())


def test_cuda_took_what_is_counted_and_what_its_kernels_need_inside():
    """gpu.json: up to 177 MiB more. Prompts with a bf16 backbone are apart: 1.3 GiB less, as CUDA
    makes no padded copies of the bias there."""
    measured = json.loads((ROOT / "experiments/gpu.json").read_text())["runs"]
    rows = [(line, row.get("today", row)) for line, run in measured.items() for row in run["rows"]]
    more = [(row["measured_peak"] - row["peak"]) / 2**20 for line, row in rows
            if "measured_peak" in row and ("bf16" not in line or row["method"] != "prompt")]
    assert len(more) == 37 and -25 < min(more) and max(more) < 180
