"""Options: Table 5, and every wrong argument in one line before anything is computed."""
from types import SimpleNamespace

import pytest

import train
from data import TASKS, Example
from run import options, settings
from workshop import refused

HUGE = str(10**30)


def filled(line, rows=1000, name="glue"):
    """The options of a run on so many rows."""
    args = options.parse(line.split(), "")
    args.task = args.task[0]
    train = [Example("text", "word", 0)] * rows
    settings.fill_defaults(args, {args.task: SimpleNamespace(train=train, name=name)})
    return args


@pytest.mark.parametrize("method, lr", [("lst", 3e-3), ("full", 3e-4), ("adapters", 3e-4),
                                        ("lora", 3e-4), ("bitfit", 3e-4), ("prompt", 3e-1)])
@pytest.mark.parametrize("task", TASKS)
def test_texts_have_the_settings_of_table_5(task, method, lr):
    args = filled(f"--task {task} --method {method} --model t5-base")
    epochs = 20 if task in ("cola", "mrpc", "rte", "stsb") else 10
    assert (args.lr, args.batch_size, args.warmup_steps, args.epochs) == (lr, 100, 500, epochs)
    assert (args.weight_decay, args.epsilon, args.beta2, args.max_norm) == (0, 1e-8, 0.999, 1)
    assert (args.r, args.steps, args.dropout) == (8, 10 * epochs, None)


@pytest.mark.parametrize("line, rows, name, expected", [
    ("", 30_001, "glue", (1, 60, 3e-3)), ("", 30_000, "glue", (10, 60, 3e-3)),
    ("--method bitfit", 66_000, "glue", (1, 60, 1e-2)),
    ("", 3600, "bundled-sample", (5, 18, 3e-3)),
    ("--model t5-base", 66_000, "glue", (10, 500, 3e-3)),
    ("--epochs 2 --warmup-steps 0 --lr 1", 66_000, "glue", (2, 0, 1))])
def test_beside_nano_a_run_takes_minutes_and_the_command_line_wins(line, rows, name, expected):
    args = filled(f"--task sst2 {line}", rows, name)
    assert (args.epochs, args.warmup_steps, args.lr) == expected


@pytest.mark.parametrize("more, words", [
    ("--task foo", "'foo'; sst2"), ("--task sst2,nope", "nope; choose"), ("--task=", "choose"),
    ("--task sst2,sst2", "sst2; twice"), ("--task sst2+rte", "sst2+rte; pictures"),
    ("--method foo", "foo; lst"), ("--model foo", "foo; nano; t5-small; folder"),
    ("--r 3", "3; [1, 2, 4, 8]"), ("--r 16", "16; [1, 2, 4, 8]"), ("--r 0", "'0'"),
    ("--r -4", "-4"), ("--r 2.5", "2.5"), ("--keep 2", "[2]; 0 to 1"),
    ("--keep 1,1", "'1,1'; twice"), ("--keep=", "--keep; ''"), ("--keep a", "--keep; 'a'"),
    ("--keep -1", "-1"), ("--keep 0,,1", "--keep; ''"), (f"--keep {HUGE}", "--keep; '10000"),
    ("--init foo", "foo; fisher"),
    ("--prune foo", "foo; aligned"), ("--side foo", "foo; alone"), ("--prompts foo", "foo; t5"),
    ("--dtype fp16", "float16; bfloat16"), ("--dtype foo", "foo; bf16"),
    ("--method full --dtype bf16", "bf16; fp32"), ("--method lora --freeze 5", "5; 4 layers"),
    ("--method lora --freeze 4", "4; nothing to train"), ("--freeze -1", "-1"),
    ("--method prompt --freeze 1", "--freeze; means nothing"), ("--device foo", "foo; cpu"),
    ("--device=", "''; cpu"), ("--device meta", "meta; cpu"), ("--device cuda:99", "cuda:99; cpu"),
    ("--lr -1", "-1; above 0"), ("--lr 0", "0"), ("--lr nan", "nan"), ("--lr 1e400", "inf"),
    ("--lr foo", "foo"), ("--dropout 1", "1.0; below 1"), ("--dropout nan", "nan"),
    ("--warmup-steps -1", "-1"), ("--warmup-steps 1.5", "1.5"), ("--seed foo", "foo"),
    ("--seed 1.5", "1.5"),
    ("--seeds 1,1", "twice"), ("--seeds 1,x", "x"), ("--seeds=", "whole number"),
    ("--max-train-rows 0", "'0'"), ("--max-steps 0", "'0'"), ("--epochs 0", "'0'"),
    ("--batch-size -1", "-1"), ("--fisher-samples 0", "'0'"), ("--accumulate 0", "accumulate"),
    ("--save-steps 0", "save-steps"), ("--accumulate 17", "accumulate 17; 16 rows"),
    ("--resume --overwrite", "not allowed"),
    ("--data foo", "foo/SST-2/train.tsv"), ("--out=", "--out; empty"), ("--data=", "--data; empty"),
    ("--model=", "--model; empty"), ("--foo", "--foo"),
])
def test_a_wrong_argument_is_one_line(argv, tmp_path, capsys, more, words):
    line = [part for part in argv() if part not in ("--init", "magnitude", "--r", "4")]
    refused(capsys, [*line, *more.split()], *words.split("; "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more, needs", [
    ("--method full --keep 1", "--keep --method lst"),
    ("--method lora --r 4 --side alone", "--r --method lst"),
    ("--method bitfit --init random", "--init --method lst"),
    ("--method prompt --fisher-samples 8", "--fisher-samples --init fisher"),
    ("--method adapters --prune aligned", "--prune --init magnitude"),
    ("--init magnitude --fisher-samples 5", "--fisher-samples --init fisher"),
    ("--init random --prune aligned", "--prune --init fisher"), ("--freeze 1", "--freeze --method"),
    *((f"--method {method} --as-authors", "--as-authors --method lora")
      for method in ("lst", "full", "adapters", "bitfit")),
    ("--clip clip-rn101", "--clip pictures"), ("--image a.png", "--image --predict"),
    ("--task vqa --prompts t5", "--prompts GLUE"), ("--predict x --lr 1", "--lr training"),
    ("--predict x --seeds 0,1", "--seeds training"), ("--predict x --resume", "--resume training"),
    ("--method lora --init fisher", "--init --method lst"),  # at its default, but given
    ("--init random --fisher-samples 1024", "--fisher-samples --init fisher"),
    ("--size 4", "--size --method adapters or --method lora or --method prompt"),
    ("--method bitfit --size 4", "--size --method lora"), ("--method full --side last", "--side"),
    ("--side adapters --prune aligned", "--prune --init fisher"),
    ("--method y-tuning --freeze 1", "--freeze --method full"),
    ("--method lora --classify", "--classify --method lst"),
    ("--init distill --fisher-samples 8", "--fisher-samples --init fisher"),
])
def test_an_option_that_means_nothing_where_it_is_given_is_refused(capsys, tmp_path, more, needs):
    refused(capsys, ["--task", "sst2", "--out", str(tmp_path / "run"), *more.split()],
            *needs.split(), "means nothing here")
    assert not (tmp_path / "run").exists()


def test_a_command_line_that_lacks_something_is_refused(tmp_path, capsys):
    refused(capsys, [], "--task", "sst2")
    refused(capsys, ["--predict", "a film"], "--out")
    refused(capsys, ["--task", "sst2", "--resume"], "--out")
    refused(capsys, ["--predict", "a film", "--out", str(tmp_path)], "trained.safetensors")


@pytest.mark.parametrize("option, value", [
    ("--seed", -1), ("--seed", 2**63), ("--seed", HUGE), ("--lr", "1e-300"), ("--lr", "1e30"),
    ("--warmup-steps", HUGE), ("--warmup-steps", 10**400), ("--epochs", HUGE),
    ("--batch-size", HUGE), ("--max-steps", HUGE), ("--max-train-rows", HUGE),
    ("--fisher-samples", HUGE), ("--epochs", 10**9), ("--batch-size", 10**9),
    ("--fisher-samples", 10**9)], ids=lambda value: str(value)[:12])
def test_an_absurd_number_is_used_or_refused_in_one_line(argv, capsys, option, value):
    more = () if option == "--max-steps" else ("--max-steps", 1)
    try:
        assert train.main(argv("--init", "fisher", *more, option, value))["steps"] >= 1
    except SystemExit as stop:
        line = capsys.readouterr().err
        assert stop.code in (1, 2) and line.startswith("error: ") and line.count("\n") == 1, line
        assert option in line, line


def test_paths_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t5").mkdir()
    paths = ("--model", "~/t5", "--data", "~/data", "--out", "~/out", "--init", "~/t5")
    args = options.parse(["--task", "sst2", *paths], "")
    assert [args.model, args.data, args.out, args.init] == [
        str(tmp_path / name) for name in ("t5", "data", "out", "t5")]


def test_a_name_is_no_folder_even_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("nano", "sample", "fisher", "mine"):
        (tmp_path / name).mkdir()
    args = options.parse("--task sst2 --model nano --data sample --init fisher".split(), "")
    assert [args.model, args.data, args.init] == ["nano", "sample", "fisher"]
    assert options.parse("--task sst2 --model mine".split(), "").model == str(tmp_path / "mine")


def test_lists_and_joined_tasks():
    glue = list(TASKS)
    for text, runs in (("glue", glue), ("sst2, rte", ["sst2", "rte"]), ("vqa+gqa", ["vqa+gqa"]),
                       ("sst2,vqa + nlvr2,vqa", ["sst2", "vqa+nlvr2", "vqa"])):
        assert options.runs_of(text) == runs


def test_help_lists_every_option_and_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(option in said for option in ("--task", "--predict", "--reduction", "--save-steps"))


def test_the_banner_is_a_box_of_80_columns_with_the_reason():
    lines = settings.banner("https://example.org/" + "long/" * 40 + " does not answer").split("\n")
    assert {(len(line), line[0], line[-1]) for line in lines} == {(78, "#", "#")}
    assert "NOT SST-2" in lines[2] and "does not answer" in "\n".join(lines)
