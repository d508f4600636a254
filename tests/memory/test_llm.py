"""The account of decoder-only models: what stands in docs/llm.md, and why."""
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import bench_memory
from llm import LlamaConfig, NF4Linear
from memory import account, llm
from memory.environment import environment
from memory.stories import KINDS

N, V, D, INNER, H, G, K = 4, 997, 48, 80, 4, 2, 32
TINY = LlamaConfig(V, D, INNER, N, H, G, K)  # beside it with r = 4: 12, 20, K = 8
LLAMA = "llama-2-7b"
NF4 = dict(dtype="nf4", side_dtype="bf16")
UPPER = dict(keep=(2, 3), free=2)


@pytest.fixture(autouse=True)
def tiny(request, monkeypatch):
    if "7b" not in request.node.name:
        monkeypatch.setitem(llm.SIZES, LLAMA, TINY)


def case(method, S=20, T=None, r=4, **changes):
    return llm.Case(method, LLAMA, (1, S, T or S), r, **changes)


def step(*arguments, **changes):
    with torch.device("meta"):
        one = case(*arguments, **changes)
        return account.training_step(one.build(), one.make_batch())


def held(one):
    """(shape, bytes) of each tensor that autograd saves; none of them a parameter."""
    seen = {}
    with torch.device("meta"):
        net, batch = one.build().train(), one.make_batch()

        def save(tensor):
            seen[account.storage_of(tensor)] = (*tensor.shape,), tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with environment(), hooks:
            _graph = account.loss_of(net, batch)
    parameters = set(map(account.storage_of, net.parameters()))
    return [row for storage, row in seen.items() if storage not in parameters]


def largest(one):
    """The bytes of the largest tensor that is alive at the peak."""
    with torch.device("meta"):
        net, batch = one.build().train(), one.make_batch()
        known = [*net.parameters(), *net.buffers(), *batch]
        with environment(), account.Live(known) as live:
            account.loss_of(net, batch).backward()
    return max(storage.bytes for storage in live.at_peak)


@pytest.mark.parametrize("side_dtype, size", [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("shape, rungs", [({}, N), (UPPER, 2)])
def test_a_ladder_keeps_its_rungs_inputs_and_nothing_else_of_the_backbone(
        side_dtype, size, shape, rungs):
    seen = held(case("lst", dtype="nf4", side_dtype=side_dtype, **shape))
    wide = [found for shape, found in seen if shape[-2:] == (20, D)]
    assert sum(wide) == (rungs + 1) * 20 * D * size
    assert not any({INNER, H * K, G * K} & {*shape} for shape, _ in seen)


def test_xladder_keeps_less_than_the_full_ladder_and_both_less_than_qlora():
    some = [case("lst", **NF4, **UPPER), case("lst", **NF4), case("qlora", dtype="nf4")]
    few, all_rungs, qlora = (sum(size for _, size in held(one)) for one in some)
    assert few < all_rungs < 0.6 * qlora


@pytest.mark.parametrize("method, more", [("lst", NF4), ("qlora", dict(dtype="nf4"))])
def test_only_labelled_positions_reach_the_head(method, more):
    few, every = largest(case(method, T=3, S=200, **more)), largest(case(method, S=200, **more))
    assert few < 200 * V * 2 <= every < 200 * V * 4  # and never all of them in float32


@pytest.mark.parametrize("method, more", [
    ("lst", NF4), ("lst", dict(side_dtype="fp32")), ("qlora", dict(dtype="nf4")), ("full", {})])
def test_no_attention_map_is_alive_at_the_peak(method, more):
    assert largest(case(method, S=512, **more)) < 2 * H * 512**2


def test_a_weight_in_four_bits_is_made_for_the_moment_and_its_buffers_are_weights():
    with torch.device("meta"):
        linear, n = NF4Linear(torch.nn.Linear(64, 1024, bias=False)), 64 * 1024
        with torch.no_grad(), account.Live(linear.buffers()) as live:
            linear(torch.zeros(1, 64, dtype=torch.bfloat16))
        assert 6 * n < live.most < 8 * n and live.total < n / 10  # in float32, then in bf16
    whole, quarter = (step("lst", dtype=dtype, side_dtype="fp32")["weights"]
                      for dtype in ("bf16", "nf4"))
    matrices = N * D * (2 * H * K + 2 * G * K + 3 * INNER)
    assert whole - quarter == pytest.approx(matrices * (2 - 0.516), rel=0.02)


def test_moments_are_float32_and_full_fine_tuning_keeps_no_copy_of_its_bf16_weights():
    found, count = step("full"), sum(p.numel() for p in llm.Llama(TINY).parameters())
    assert (found["weights"], found["optimizer"]) == (2 * count, 8 * count)


def test_no_dropout_keeps_no_mask():
    x = torch.zeros(3)
    with environment():
        assert F.dropout(x, 0.0, True, False) is x


def rows_of(*arguments):
    return bench_memory.main(["--model", LLAMA, "--source-length", "20", *arguments])["rows"]


EVERY = ["full fine-tuning, bf16", "LoRA r 64, bf16", "QLoRA r 64, NF4",
         "QLoRA r 64, NF4, checkpointing",
         *(f"{name} r 4{shape}, {backbone}, side {side}"
           for name, shape in (("LST", ""), ("xLadder", ", 2 rungs + 2 free"))
           for backbone in ("bf16", "NF4") for side in ("fp32", "bf16"))]


@pytest.mark.parametrize("arguments, labels", [
    pytest.param("", EVERY, marks=pytest.mark.slow), ("--method qlora", EVERY[2:4]),
    pytest.param("--dtype nf4 --side-dtype bf16", [*EVERY[2:4], EVERY[7], EVERY[11]],
                 marks=pytest.mark.slow),
    ("--checkpoint --method lora", ["LoRA r 64, bf16, checkpointing"]),
    ("--method lst --r 2 --keep 1,3 --end up --dtype nf4 --side-dtype bf16",
     ["LST r 2, 2 rungs, NF4, side bf16, end up"]),
    ("--method lst --r 2 --free 3 --dtype bf16 --side-dtype fp32",
     ["xLadder r 2, 4 rungs + 3 free, bf16, side fp32"])])
def test_a_label_says_which_row_it_is_and_the_options_choose(
        tmp_path, capsys, arguments, labels):
    files = ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.svg")]
    rows, text = rows_of(*arguments.split(), *files), capsys.readouterr().out
    assert [row["label"] for row in rows] == labels
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows
    for row in rows:
        assert row["peak"] == sum(row[kind] for kind in KINDS) and row["flops"] > 0
        assert row["inference"] > row["weights"] and f"\n{row['label']}\n" in text
        assert row["label"] in (tmp_path / "x.svg").read_text()
    assert "GB of 10^9 bytes" in text and max(map(len, text.splitlines())) <= 80


WRONG = """
--explain | --sweep r | --time | --as-published | --table 1 | --attention eager | --device cuda
--freeze 3 | --method adapters | --method lora --dtype nf4 | --method lst --checkpoint
--method qlora --r 2 | --dtype fp32 | --r 5 | --r 16 | --keep 4 | --free 0 | --target-length 21
--fits 12 --batch-size 3 | --fits 12 --plot x.svg
""".strip().replace("\n", " | ").split(" | ")


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_is_refused_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        rows_of(*arguments.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and len(text.splitlines()) == 1 and text.startswith("error: ")


@cache
def llama_2(method, **changes):
    return step(method, S=2048, r=16, **changes)


@pytest.mark.slow
def test_a_7b_needs_what_docs_llm_md_says():  # GB of 10^9 bytes
    upper = dict(keep=tuple(range(16, 32)), free=16)
    for one, peak in (
            (llama_2("lst", dtype="nf4", side_dtype="fp32"), 7.76), (llama_2("lst", **NF4), 6.09),
            (llama_2("lst", **NF4, **upper), 5.59), (llama_2("qlora", dtype="nf4"), 17.05),
            (llama_2("qlora", dtype="nf4", checkpoint=True), 7.05)):
        assert one["peak"] / 10**9 == pytest.approx(peak, abs=0.01)


@pytest.mark.slow
def test_qlora_of_a_7b_with_checkpointing_takes_three_times_the_ladders_operations():
    ladder, qlora, again = (llama_2(method, **more)["flops"] for method, more in (
        ("lst", NF4), ("qlora", dict(dtype="nf4")),
        ("qlora", dict(dtype="nf4", checkpoint=True))))
    assert qlora / ladder == pytest.approx(2.06, abs=0.01)
    assert again / ladder == pytest.approx(3.01, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("arguments, batches", [
    ("--method lst --dtype nf4 --side-dtype bf16 --source-length 8192 --target-length 256", [1, 2]),
    ("--method qlora", [0, 7])])
def test_on_12_gb_a_ladder_beside_a_7b_reads_8192_tokens_and_qlora_not_2048(arguments, batches):
    rows = bench_memory.main(["--model", LLAMA, "--fits", "12", *arguments.split()])["rows"]
    assert [row["largest_batch"] for row in rows] == batches
